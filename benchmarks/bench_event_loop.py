"""Measure what asyncio programs cost on our event loop on trio, beside asyncio, uvloop, trio-asyncio and others.

    nox -s benchmarks_event_loop                              all of it
    nox -s benchmarks_event_loop -- --only uvicorn --rounds 1 --bursts 4
    nox -s benchmarks_event_loop -- --peers asyncio --peers ours

It measures as bench_transports.py does: the processor time of a server for each request. Each server has a process and
a processor of its own, all of them run at the same time, and the load sends bursts to one after the other. Figures are
medians. A ratio is the median of the ratios of neighbouring bursts. Small tasks are measured inside one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench_transports import HERE, Bench, Results, Task, Workload, circumstances, reported
from report import ratio

PEERS = ("asyncio", "uvloop", "ours/trio", "factory", "factory, trio runs", "trio-asyncio")
#: `run_asyncio`, and beside it `EventLoop`: before and after the first call of backend code.
OURS = "ours/trio"
FACTORY = "factory"
FACTORY_ON_TRIO = "factory, trio runs"
#: The greatest ratio of `EventLoop` to `run_asyncio` under load. They are to be the same; this much is noise.
FACTORY_TARGET = 1.03
CONNECTIONS = 16

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
#: A binary frame of 64 bytes, masked with zeros.
FRAME = b"\x82" + bytes([0x80 | 64]) + bytes(4) + bytes(64)
LINE = b"x" * 127 + b"\n"


@dataclass(frozen=True)
class Row:
    """A measurement and its targets."""

    name: str
    kind: str
    #: The greatest ratio of ours to a peer, by peer.
    targets: dict[str, float]
    peers: tuple[str, ...] = PEERS
    request: bytes = b""
    opening: bytes = b""
    #: The greatest figure of ours, in microseconds; of the factory, if `run_asyncio` is not among the peers.
    limit: float | None = None
    #: With one, every message comes after an idle wait.
    connections: int = CONNECTIONS


ROWS = [
    Row("uvicorn, httptools", "uvicorn httptools", {"asyncio": 0.95, "uvloop": 1.25, "trio-asyncio": 0.2}, request=GET),
    Row("uvicorn, h11", "uvicorn h11", {"asyncio": 1.0, "uvloop": 1.2, "trio-asyncio": 0.4}, request=GET),
    Row("aiohttp web", "aiohttp", {"asyncio": 1.0, "uvloop": 1.2, "trio-asyncio": 0.4}, request=GET),
    Row(
        "websockets echo", "websockets", {"asyncio": 1.0, "uvloop": 1.2, "trio-asyncio": 0.2},
        request=FRAME, opening=UPGRADE,
    ),
    Row("line echo by streams", "lines", {"asyncio": 1.0, "uvloop": 1.4, "trio-asyncio": 0.2}, request=LINE),
    Row("a task and a future each", "tasks", {"asyncio": 0.95, "trio-asyncio": 0.2}, request=LINE),
    Row(
        "a bare protocol", "protocol", {"plain group": 1.05, "trio-asyncio": 0.2}, (*PEERS, "plain group"),
        request=LINE,
    ),
    Row(
        "ASGI on trio", "uvicorn httptools", {"hypercorn": 1 / 15, "anycorn": 1 / 18}, (OURS, "hypercorn", "anycorn"),
        request=GET,
    ),
    Row(
        "ASGI of trio's", "uvicorn, application on trio", {"hypercorn": 1 / 6}, (OURS, "hypercorn", "anycorn"),
        request=GET, limit=100.0,
    ),
    *(Row(name, name, {"asyncio": 0.9}) for name in ("call_soon", "sleep(0)", "future", "timer")),
    Row("create_task", "create_task", {"asyncio": 1.0}),
    Row(
        "after an idle wait", "protocol", {}, ("asyncio", "uvloop", OURS, FACTORY, FACTORY_ON_TRIO),
        request=LINE, connections=1,
    ),
    Row("run_until_complete", "run_until_complete", {}, ("asyncio", "uvloop", FACTORY), limit=17.0),
    Row("the same, waiting", "run_until_complete, waiting", {}, ("asyncio", "uvloop", FACTORY)),
    Row("the same, from_asyncio", "run_until_complete, from_asyncio", {}, (FACTORY,)),
    Row("to_asyncio.run", "to_asyncio.run", {}, (OURS, "trio-asyncio"), limit=10.0),
    Row("from_asyncio.run", "from_asyncio.run", {}, (OURS, "trio-asyncio"), limit=50.0),
]  # fmt: skip


class EventLoopBench(Bench):
    servers = HERE / "event_loop_servers.py"
    tasks = HERE / "event_loop_tasks.py"

    def measure_row(self, row: Row, peers: list[str], bursts: int) -> None:
        if row.request:
            workload = Workload(
                row.name, row.kind, "talk", row.connections, 0, tuple(peers), request=row.request, opening=row.opening
            )
            self.measure(workload, peers, bursts)
            return
        for _ in range(bursts):
            for peer in peers:
                with reported(f"{row.name}: {peer}"):
                    self.measure_task(Task(row.name, row.kind), peer)


def report(rows: list[Row], results: Results) -> None:
    """Print the medians, and each ratio that has a target."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
    print(f"{'microseconds':28}" + "".join(f"{peer:>20}" for peer in peers) + "   ours to others (target)")
    for row in rows:
        measured = results.get(f"{row.name} (used)") or results.get(row.name) or {}
        cells = [f"{statistics.median(measured[peer]):20.2f}" if peer in measured else " " * 20 for peer in peers]
        said = []
        for peer, target in row.targets.items():
            value = ratio(measured, OURS, peer)
            if value is not None:
                said.append(f"{peer} {value:.2f} ({verdict(value, target)}, {target:.2f})")
        for peer in (FACTORY, FACTORY_ON_TRIO):
            value = ratio(measured, peer, OURS)
            if value is not None:
                # After an idle wait it costs more while trio runs: it waits in a thread.
                met = f" ({verdict(value, FACTORY_TARGET)}, {FACTORY_TARGET:.2f})" if row.connections > 1 else ""
                said.append(f"{peer}, to ours/trio {value:.2f}{met}")
        ours = measured.get(OURS if OURS in row.peers else FACTORY)
        if row.limit is not None and ours:
            said.append(f"({verdict(statistics.median(ours), row.limit)}, {row.limit:.0f} µs)")
        if measured:
            print(f"{row.name:28}" + "".join(cells) + "   " + ", ".join(said))


def verdict(value: float, target: float) -> str:
    return "ok" if value <= target else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bursts", type=int, default=6, help="to each server in each round")
    parser.add_argument("--seconds", type=float, default=0.12, help="of each burst")
    parser.add_argument("--only", action="append", default=[], help="part of a row's name")
    parser.add_argument("--peers", action="append", default=[], help="part of a peer's name")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()

    def wanted(name: str, parts: list[str]) -> bool:
        return not parts or any(part in name for part in parts)

    rows = [row for row in ROWS if wanted(row.name, options.only)]
    with tempfile.TemporaryDirectory() as folder:
        bench = EventLoopBench(Path(folder), options.seconds)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}".ljust(100), file=sys.stderr)
            for row in rows:
                bench.measure_row(row, [peer for peer in row.peers if wanted(peer, options.peers)], options.bursts)
    if options.json is not None:
        document = {**circumstances(options), "results": bench.results, "own": bench.own}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    report(rows, bench.results)


if __name__ == "__main__":
    main()
