"""Measure what a protocol over an AnyIO object costs, beside that object itself.

    nox -s benchmarks_adapters                              all of it
    nox -s benchmarks_adapters -- --only unix --peers trio --rounds 1

It measures as bench_transports.py does: the processor time of a server for each echo, its memory for each idle
connection, and ratios of neighbouring bursts. A ratio of streams in memory has the client's time on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench_transports import HERE, KIB, SERVER_CPU, Bench, Workload, circumstances, pin, reported
from report import ratio

BACKENDS = ("asyncio", "uvloop", "trio")
IDLE = 2000


@dataclass(frozen=True)
class Row:
    """A measurement, and the greatest ratio of the adapter to the stream on asyncio, uvloop and trio."""

    name: str
    kind: str
    mode: str
    connections: int
    size: int
    targets: tuple[float, float, float]
    idle: int = 0


def rows(name: str, kind: str, mode: str, targets: tuple[float, float, float]) -> Iterable[Row]:
    for size, connections in ((1, 16), (64, 16), (1, 1)):
        yield Row(f"{name} {size} KiB x {connections}", kind, mode, connections, size * KIB, targets)


STREAM = (1.25, 1.3, 1.25)
ROWS = [
    *rows("tcp", "tcp", "tcp", STREAM),
    *rows("tls", "tls", "tls", STREAM),
    *rows("stapled", "stapled", "tcp", STREAM),
    *rows("memory", "memory", "", STREAM),
    *rows("unix", "unix", "unix", (1.4, 1.4, 1.4)),
    Row("udp 512 B x 16", "udp", "udp", 16, 512, (1.4, 1.4, 1.4)),
    Row("udp 512 B x 1", "udp", "udp", 1, 512, (1.4, 1.4, 1.4)),
    Row("idle tcp", "tcp", "tcp", 16, KIB, (2.0, 2.0, 2.0), IDLE),
    Row("idle tls", "tls", "tls", 16, KIB, (2.0, 2.0, 2.0), IDLE),
    Row("idle unix", "unix", "unix", 16, KIB, (2.0, 2.0, 2.0), IDLE),
]


class AdapterBench(Bench):
    servers = HERE / "adapter_servers.py"

    def measure_row(self, row: Row, peers: list[str], bursts: int) -> None:
        if row.mode:
            workload = Workload(row.name, row.kind, row.mode, row.connections, row.size, tuple(peers), idle=row.idle)
            self.measure(workload, peers, 0 if row.idle else bursts)
            return
        for _ in range(bursts):
            for peer in peers:
                with reported(f"{row.name}: {peer}"):
                    self.measure_memory(row, peer)

    def measure_memory(self, row: Row, peer: str) -> None:
        arguments = map(str, (row.connections, row.size, self.seconds))
        command = [sys.executable, str(self.servers), peer, row.kind, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, preexec_fn=pin(SERVER_CPU), check=True)
        self.note(f"{row.name} (used)", peer, float(answer.stdout))

    def note(self, workload: str, peer: str, value: float) -> None:
        if workload.startswith("memory of"):
            workload = self.idle_row
        super().note(workload, peer, value)

    def burst(self, workload: Workload, peer: str, state: str, port: int, pid: int) -> None:
        self.idle_row = f"{workload.name} (used)"  # For `note`: KiB for each connection.
        super().burst(workload, peer, state, port, pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bursts", type=int, default=6, help="to each server in each round")
    parser.add_argument("--seconds", type=float, default=0.12, help="of each burst")
    parser.add_argument("--only", action="append", default=[], help="part of a row's name")
    parser.add_argument("--peers", action="append", default=[], help="a backend")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    wanted = [row for row in ROWS if not options.only or any(part in row.name for part in options.only)]
    backends = [name for name in BACKENDS if not options.peers or name in options.peers]
    with tempfile.TemporaryDirectory() as folder:
        bench = AdapterBench(Path(folder), options.seconds)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}".ljust(100), file=sys.stderr)
            for row in wanted:
                for backend in backends:
                    bench.measure_row(row, [f"stream/{backend}", f"adapter/{backend}"], options.bursts)
    if options.json is not None:
        options.json.write_text(json.dumps({**circumstances(options), "results": bench.results}, indent=1) + "\n")
    print(f"{'microseconds; KiB':24}" + "".join(f"{name:>28}" for name in backends))
    for row in wanted:
        measured = bench.results.get(f"{row.name} (used)", {})
        cells = []
        for backend in backends:
            stream, adapter = f"stream/{backend}", f"adapter/{backend}"
            value = ratio(measured, adapter, stream)
            if value is None:
                cells.append(" " * 28)
                continue
            verdict = "" if value <= row.targets[BACKENDS.index(backend)] else " MISSED"
            medians = f"{statistics.median(measured[adapter]):.2f}/{statistics.median(measured[stream]):.2f}"
            cells.append(f"{medians} {value:.2f}{verdict}".rjust(28))
        print(f"{row.name:24}" + "".join(cells))


if __name__ == "__main__":
    main()
