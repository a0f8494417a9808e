"""Measure the processor time that a server spends on a request, on every backend and beside its peers.

    nox -s benchmarks                       all of it
    nox -s benchmarks -- --only 'tcp 1 KiB'   the workloads whose names contain this
    nox -s benchmarks -- --rounds 3 --bursts 10
    nox -s benchmarks -- --only 'x 16' --update   measure these again, and keep the other lines of the summary
    nox -s benchmarks -- --only spawn --add       more bursts, beside those that `results.json` has

Each server runs in a process of its own, the load generator in another, each pinned to a processor. The figure is the
server's processor time, user plus system, as the operating system accounts it, for each request; connecting is not in
it. In every round each peer's server is started, measured "fresh" before any of its connections has ended, and then
"used": the cost of asyncio differs by a factor between the two, and users live in the second. For that, bursts of load
go to one server after the other while all of them live, so that what disturbs the machine for a while disturbs them
alike: the result is the median of the bursts and their spread, and of ratios the median of what two neighbours give.
What part of it the server spent in its own code, and not in the kernel, is noted beside it, as the kernel's clock
samples it.

Latency is measured with one server at a time, whose processor is busy with bulk: the round trips of small messages, as
the load generator sees them, and how late the server's timers are. Here one burst gives each percentile.

Writes each burst's figure to `results.json`, which is not kept in the repository, and a line for each workload to
`summary.json`, which is. report.py makes the table and the chart of docs/performance.md from the summary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import report
import trustme

HERE = Path(__file__).parent
SERVER_CPU, LOAD_CPU = (sorted(os.sched_getaffinity(0)) * 2)[:2]

# Each of ours beside those that it is compared with: what disturbs the machine for a while disturbs both.
LOOPS = ["asyncio", "ours/asyncio", "uvloop", "ours/uvloop", "trio", "ours/trio", "trio-asyncio"]
STREAMS = ["anyio streams/asyncio", "anyio streams/trio"]
EVERYBODY = ["epoll", *LOOPS, *STREAMS]
KIB = 1024


@dataclass(frozen=True)
class Workload:
    """A workload of a server: its kind, and the load generator's arguments."""

    name: str
    server: str
    mode: str
    connections: int
    size: int
    peers: tuple[str, ...]
    one_cpu: bool = False
    idle: int = 0
    #: What a client sends, for the mode "talk": once, and as each request.
    opening: bytes = b""
    request: bytes = b""
    #: Whether the figure is how many requests a second of processor time serves.
    per_second: bool = False


def echo(size: int, connections: int, **options: Any) -> Workload:
    name = f"tcp {size // KIB} KiB x {connections}"
    return Workload(name, "echo", "tcp", connections, size, tuple(EVERYBODY), **options)


def tls(size: int, connections: int) -> Workload:
    peers = tuple(peer for peer in EVERYBODY if peer != "epoll")
    return Workload(f"tls {size // KIB} KiB x {connections}", "tls", "tls", connections, size, peers)


WITHOUT_STREAMS = tuple(peer for peer in LOOPS if peer != "trio")
WORKLOADS = [
    *(echo(KIB, connections) for connections in (1, 16, 256)),
    Workload("tcp 1 KiB x 1, one processor", "echo", "tcp", 1, KIB, tuple(EVERYBODY), one_cpu=True),
    *(echo(64 * KIB, connections) for connections in (1, 16, 256)),
    *(
        Workload(f"buffered {size // KIB} KiB x {count}", "buffered", "tcp", count, size, ("epoll", *LOOPS))
        for size in (KIB, 64 * KIB)
        for count in (1, 16, 256)
    ),
    Workload("accept, echo, close", "echo", "conn", 16, KIB, tuple(EVERYBODY)),
    *(tls(size, count) for size in (KIB, 64 * KIB, 256 * KIB) for count in (1, 16)),
    *(
        Workload(f"tls buffered {size // KIB} KiB x 16", "tls buffered", "tls", 16, size, WITHOUT_STREAMS)
        for size in (KIB, 64 * KIB, 256 * KIB)
    ),
    Workload("udp 512 B", "udp", "udp", 16, 512, tuple(EVERYBODY)),
    Workload("writelines 1000 x 100 B", "lines", "tcp", 1, 100_000, tuple(LOOPS)),
    Workload("10,000 idle connections", "echo", "tcp", 16, KIB, tuple(EVERYBODY), idle=10_000),
    *(
        Workload(
            f"async code, 1 KiB x {connections}",
            "async",
            "tcp",
            connections,
            KIB,
            (
                "anyio streams/asyncio",
                "ours/asyncio",
                "anyio streams/uvloop",
                "ours/uvloop",
                "trio",
                "ours/trio",
                "anyio streams/trio",
            ),
        )
        for connections in (1, 16)
    ),
    Workload("an AnyIO stream", "stream", "tcp", 16, KIB, ("ours/asyncio", "ours/uvloop", "ours/trio")),
    Workload(
        "http, requests for each second of processor time", "http", "talk", 16, 0, tuple(LOOPS),
        request=b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", per_second=True,
    ),
]  # fmt: skip

#: Seconds without a byte after which an answer is over.
QUIET = 0.5


@dataclass(frozen=True)
class Task:
    """What is measured inside one process: its kind, and where it may run; its children inherit that."""

    name: str
    kind: str
    cpus: tuple[int, ...] = (SERVER_CPU,)


TASKS = [
    Task("outgoing connection", "connect"),
    # A child is the other side of these: it has a processor of its own, as every other side has.
    Task("spawn of true", "spawn", (SERVER_CPU, LOAD_CPU)),
    Task("spawn of true, one processor", "spawn"),
    Task("64 MiB through cat", "pipe", (SERVER_CPU, LOAD_CPU)),
    Task("64 MiB through cat, one processor", "pipe"),
    Task("request and awaited reply", "request"),
    Task("timer", "timers"),
    Task("timer, 100,000 pending", "pending"),
    Task("timer, moved", "moved"),
]
SLOW_READER = "64 MiB, slow reader"

#: Half of the streams are TCP, half TLS. Each sends 256 KiB at a time, and receives them back.
MIXED = Workload("8 bulk streams", "mixed", "mixed", 8, 256 * KIB, (*LOOPS, *STREAMS))
#: Seconds of a burst of it: some thousand round trips, and as many timers.
MIXED_SECONDS = 2.0
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}

Results = dict[str, dict[str, list[float]]]


def pin(*cpus: int) -> Any:
    return lambda: os.sched_setaffinity(0, cpus)


def processor_time(pid: int) -> float:
    """Seconds that a process has spent on processors, user and system, to the nanosecond."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        total += int(path.read_text().split()[0])
    return total / 1e9


def clock_ticks(pid: int) -> tuple[int, int]:
    """How often the kernel's clock has found a process in its own code, and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def resident(pid: int) -> int:
    """Bytes of memory that a process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(pid: int) -> int:
    """Bytes of memory that a process has had resident at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return KIB * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class Load(NamedTuple):
    """The cost of a run of the load generator for the server."""

    cost: float
    """Microseconds of processor time for each request."""
    own: float
    """How many of them in the server's own code, and in that of the libraries that it calls."""
    idle: float
    """Bytes of memory for each idle connection."""


class Bench:
    #: What the servers and the tasks are.
    servers = HERE / "servers.py"
    tasks = HERE / "tasks.py"

    def __init__(self, folder: Path, seconds: float) -> None:
        self.seconds = seconds
        self.load = str(folder / "load")
        certificate = folder / "certificate.pem"
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(certificate)
        self.environment = {**os.environ, "BENCHMARK_CERTIFICATE": str(certificate)}
        self.results: Results = {}
        self.own: Results = {}
        self.folder = folder
        #: How many bytes the server at a port answers: to the opening, and to a request.
        self.answers: dict[int, tuple[int, int]] = {}
        self.compile()

    def compile(self) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        source = str(HERE / "load.c")
        self.with_tls = False
        if compiler is not None:
            command = [compiler, "-O2", "-o", self.load, source]
            if not subprocess.run([*command, "-DWITH_TLS", "-lssl", "-lcrypto"], stderr=subprocess.DEVNULL).returncode:
                self.command = [self.load]
                self.with_tls = True
                return
            if not subprocess.run(command).returncode:
                print("no OpenSSL headers: the TLS load comes from Python, which is slower than some servers")
                self.command = [self.load]
                return
        print("no C compiler: the load comes from Python, which is slower than most servers; mind the figures")
        self.command = [sys.executable, str(HERE / "load.py")]

    def note(self, workload: str, peer: str, value: float) -> None:
        self.results.setdefault(workload, {}).setdefault(peer, []).append(value)

    @contextmanager
    def server(self, peer: str, kind: str, cpu: int = SERVER_CPU) -> Iterator[tuple[subprocess.Popen[str], int]]:
        with subprocess.Popen(
            [sys.executable, str(self.servers), peer, kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
            preexec_fn=pin(cpu),
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"{peer} cannot serve {kind}")
                yield process, int(line)
            finally:
                process.kill()

    def load_command(self, workload: Workload, port: int, seconds: float) -> tuple[list[str], dict[str, str]]:
        """Return the command of the load generator, and its environment."""
        command = self.command
        if workload.mode in {"tls", "mixed"} and not self.with_tls:
            command = [sys.executable, str(HERE / "load.py")]
        environment = {**self.environment, "LOAD_IDLE": str(workload.idle)}
        size = workload.size
        if workload.request:
            if port not in self.answers:
                self.answers[port] = answer_sizes(port, workload)
            opening_size, size = self.answers[port]
            environment["LOAD_REQUEST"] = str(self.write("request", workload.request))
            if workload.opening:
                environment["LOAD_OPENING"] = str(self.write("opening", workload.opening))
                environment["LOAD_OPENING_SIZE"] = str(opening_size)
        return [*command, workload.mode, str(port), str(workload.connections), str(size), str(seconds)], environment

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def run_load(self, workload: Workload, port: int, pid: int) -> Load:
        command, environment = self.load_command(workload, port, self.seconds)
        memory = resident(pid)
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            preexec_fn=pin(SERVER_CPU if workload.one_cpu else LOAD_CPU),
        ) as load:  # fmt: skip
            assert load.stdout is not None
            assert load.stdin is not None
            assert load.stdout.readline() == "open\n"
            wait_until_quiet(pid)
            per_connection = (resident(pid) - memory) / workload.idle if workload.idle else 0.0
            before = processor_time(pid)
            ticks = clock_ticks(pid)
            load.stdin.write("\n")
            load.stdin.flush()
            answers = int(load.stdout.readline().split()[0])
            assert answers, "no answer came"
            spent = processor_time(pid) - before
            user, system = (now - then for now, then in zip(clock_ticks(pid), ticks, strict=True))
        wait_until_quiet(pid)
        cost = spent / answers * 1e6
        return Load(cost, cost * user / max(user + system, 1), per_connection)

    def measure(self, workload: Workload, peers: list[str], bursts: int) -> None:
        """One round: every peer fresh, then bursts to each in turn, there and back."""
        self.answers.clear()
        with ExitStack() as stack:
            servers: dict[str, tuple[int, int]] = {}
            for peer in peers:
                with reported(f"{workload.name}: {peer}"):
                    process, port = stack.enter_context(self.server(peer, workload.server))
                    servers[peer] = port, process.pid
                    self.burst(workload, peer, "fresh", *servers[peer])
            order = list(servers)
            for _ in range(bursts):
                for peer in order:
                    with reported(f"{workload.name}: {peer}"):
                        self.burst(workload, peer, "used", *servers[peer])
                order.reverse()

    def burst(self, workload: Workload, peer: str, state: str, port: int, pid: int) -> None:
        load = self.run_load(workload, port, pid)
        name = f"{workload.name} ({state})"
        self.note(name, peer, 1e6 / load.cost if workload.per_second else load.cost)
        self.own.setdefault(name, {}).setdefault(peer, []).append(load.own)
        if workload.idle and state == "fresh":
            self.note("memory of an idle connection, KiB", peer, load.idle / KIB)

    def measure_task(self, task: Task, peer: str) -> None:
        command = [sys.executable, str(self.tasks), peer, task.kind]
        if task.kind == "request":
            with self.server("epoll", "echo", LOAD_CPU) as (_, number):
                self.run_task(task, peer, [*command, str(number)])
            return
        if task.kind != "connect":
            port = None
        else:
            port = subprocess.Popen(
                [*self.command, "serve", "0", "0", "0", "5"],
                stdout=subprocess.PIPE, text=True, preexec_fn=pin(LOAD_CPU),
            )  # fmt: skip
            assert port.stdout is not None
            command.append(port.stdout.readline().strip())
        try:
            self.run_task(task, peer, command)
        finally:
            if port is not None:
                port.kill()
                port.communicate()

    def run_task(self, task: Task, peer: str, command: list[str]) -> None:
        answer = subprocess.run(
            command, capture_output=True, text=True, preexec_fn=pin(*task.cpus), check=True, env=self.environment
        )
        self.note(task.name, peer, float(answer.stdout))

    def measure_slow_reader(self, peer: str) -> None:
        with self.server(peer, "push") as (process, port):
            before = processor_time(process.pid)
            memory = peak_memory(process.pid)
            subprocess.run(
                [sys.executable, str(HERE / "slow_reader.py"), str(port)], preexec_fn=pin(LOAD_CPU), check=True
            )
            wait_until_quiet(process.pid)
            self.note(f"{SLOW_READER}: us for each MiB", peer, (processor_time(process.pid) - before) * 1e6 / 64)
            self.note(f"{SLOW_READER}: growth of the peak memory, KiB", peer, (peak_memory(process.pid) - memory) / KIB)

    def measure_latency(self, workload: Workload, peer: str) -> None:
        """Measure round trips and timers beside bulk, once asyncio has freed its first large block."""
        with self.server(peer, workload.server) as (process, port):
            self.run_mixed(workload, port, process, self.seconds)
            before = processor_time(process.pid)
            answers, _, *round_trips = self.run_mixed(workload, port, process, MIXED_SECONDS)
            spent = processor_time(process.pid) - before
            lateness = sorted(ask(process)["lateness"])
        for (name, share), round_trip in zip(PERCENTILES.items(), round_trips, strict=True):
            self.note(f"1 KiB echo beside {workload.name}, {name}", peer, round_trip)
            late = lateness[round(share * (len(lateness) - 1))]
            self.note(f"5 ms timer beside {workload.name}, late by, {name}", peer, late * 1e6)
        self.note(f"{workload.name}: us for each MiB", peer, spent * 1e6 / (answers * workload.size / KIB**2))

    def run_mixed(self, workload: Workload, port: int, process: subprocess.Popen[str], seconds: float) -> list[float]:
        """Send bulk and small messages; return what the load generator prints. The server's report begins with it."""
        command, environment = self.load_command(workload, port, seconds)
        environment["LOAD_TLS_PORT"] = str(ask(process)["tls_port"])
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=pin(LOAD_CPU)
        ) as load:
            assert load.stdout is not None
            assert load.stdin is not None
            assert load.stdout.readline() == "open\n"
            ask(process)  # What was late while the connections were made is not wanted.
            load.stdin.write("\n")
            load.stdin.flush()
            return [float(number) for number in load.stdout.readline().split()]


def ask(process: subprocess.Popen[str]) -> Any:
    """Return the report of a server: what it has to say since the last one."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def answer_sizes(port: int, workload: Workload) -> tuple[int, int]:
    """Return the sizes of the answers of a server, whose headers are its own."""

    def ask(message: bytes) -> int:
        sock.sendall(message)
        size = 0
        while True:
            try:
                size += len(sock.recv(1 << 16))
            except TimeoutError:
                return size

    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(QUIET)
        return ask(workload.opening) if workload.opening else 0, ask(workload.request)


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Skip a measurement that fails, and print the error."""
    print(what.ljust(100), end="\r", file=sys.stderr)
    try:
        yield
    except (RuntimeError, subprocess.CalledProcessError, AssertionError, ValueError, IndexError) as exc:
        print(f"\n{what}: {exc!r}", file=sys.stderr)


def wait_until_quiet(pid: int) -> None:
    """Wait until a process is idle: it has handled all connections of the previous run."""
    import time

    before = -1.0
    while (now := processor_time(pid)) != before:
        before = now
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bursts", type=int, default=6, help="to each server in each round")
    parser.add_argument("--seconds", type=float, default=0.12, help="of each burst")
    parser.add_argument("--only", action="append", default=[], help="part of a workload's name")
    parser.add_argument("--peers", action="append", default=[], help="part of a peer's name")
    parser.add_argument("--json", type=Path, default=HERE / "results.json")
    parser.add_argument("--update", action="store_true", help="keep what the file has of others")
    parser.add_argument("--add", action="store_true", help="keep what the file has, of these too")
    options = parser.parse_args()
    now = circumstances(options)
    if options.add and not options.json.exists():
        parser.error(f"there is no {options.json} to add to")
    kept = json.loads(options.json.read_text()) if options.json.exists() and (options.update or options.add) else {}
    summary: dict[str, report.Row] = {}
    if options.update or options.add:
        then, summary = report.read_summary()
        for file, before in ((report.SUMMARY, then), (options.json, kept or now)):
            for name, value in now.items():
                if before[name] != value:
                    parser.error(f"{file} was measured with {before[name]}, not {value}: figures do not mix")

    def wanted(name: str, parts: list[str]) -> bool:
        return not parts or any(part in name for part in parts)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.seconds)
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}".ljust(100), file=sys.stderr)
            for workload in WORKLOADS:
                peers = [peer for peer in workload.peers if wanted(peer, options.peers)]
                if wanted(workload.name, options.only):
                    # With as many connections as that, a burst takes long to begin.
                    bench.measure(workload, peers, 1 if workload.idle else options.bursts)
            jobs: list[tuple[str, Any, str]] = [
                (task.name, partial(bench.measure_task, task), peer)
                for task in TASKS
                for peer in (LOOPS + STREAMS * (task.kind == "request")) * (1 if task.kind == "pipe" else 2)
                if peer != "trio" or task.kind not in {"timers", "pending", "moved"}
            ]
            jobs += [(SLOW_READER, bench.measure_slow_reader, peer) for peer in LOOPS]
            jobs += [
                (f"latency beside {MIXED.name}", partial(bench.measure_latency, MIXED), peer)
                for peer in (*MIXED.peers, *reversed(MIXED.peers))
            ]
            for name, measure, peer in jobs:
                if wanted(name, options.only) and wanted(peer, options.peers):
                    with reported(f"{name}: {peer}"):
                        measure(peer)
            save(bench, kept, summary, options)
    print_medians(bench.results)


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Return what figures have to share to be in one table."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} processors, {platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("anyio", "trio", "uvloop", "trio-asyncio")},
        "seconds": options.seconds,
    }


def save(bench: Bench, kept: dict[str, Any], summary: dict[str, report.Row], options: argparse.Namespace) -> None:
    """Write what is there so far, over what is kept of earlier runs; the summary only if it is wholly of one kind."""
    document = circumstances(options)
    for name, measured in (("results", bench.results), ("own", bench.own)):
        rows: Results = {row: dict(peers) for row, peers in kept.get(name, {}).items()}
        for row, peers in measured.items():
            for peer, values in peers.items():
                before = rows.get(row, {}).get(peer, []) if options.add else []
                rows.setdefault(row, {})[peer] = before + values
        document[name] = rows
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.update or options.add or not (options.only or options.peers):
        merged = dict(summary)
        new = {name: document["results"][name] for name in bench.results}
        for name, row in report.summarise(new, document["own"]).items():
            merged[name] = report.merge(summary[name], row) if name in summary else row
        report.write_summary(circumstances(options), merged)


def print_medians(results: Results) -> None:
    """Print the medians."""
    peers = [peer for peer in [*EVERYBODY, "anyio streams/uvloop"] if any(peer in row for row in results.values())]
    print(" " * 44 + "".join(f"{peer[-14:]:>16}" for peer in peers))
    for name, row in results.items():
        cells = []
        for peer in peers:
            values = row.get(peer)
            cells.append(f"{statistics.median(values):16.2f}" if values else " " * 16)
        print(f"{name:44}" + "".join(cells))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
