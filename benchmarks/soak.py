"""Let connections come and go for some minutes, half of them ill-behaved, and check that memory stays flat.

    nox -s soak                                   every backend, two minutes each
    nox -s soak -- --backend trio --seconds 600

One group serves TCP, TLS and UNIX sockets, and makes connections of its own; the clients are a process of their own,
with bare blocking sockets. After each round every connection has ended, garbage is collected, and memory is
recorded. The first third warms up allocators and caches. The figure is the memory after each round; the program
fails when the last third is not as the middle one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio

from transports_anyio import Protocol, TransportGroup

HOST = "127.0.0.1"
NAME = "soak.example"
BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}

#: The request of a client, in its first byte.
ECHO, FLOOD = b"E", b"F"
FLOOD_SIZE = 1 << 20
#: The server's time-out for a client, in seconds: ill-behaved clients would never leave.
PATIENCE = 0.2
CLIENTS_AT_ONCE = 12

#: When, in seconds; how many connections so far; the memory, in objects and in bytes.
Sample = tuple[float, int, int, int]

#: How much may be left over at the end. Objects, as the collector counts them, are exact: a leak of one for each
#: connection would be tens of thousands. The resident memory moves with the allocator, by pages and arenas.
OBJECTS_ALLOWED = 300
RESIDENT_ALLOWED = 4  # MiB.

#: How many rounds there are at least, however slow the machine is: two in each third.
LEAST_ROUNDS = 6


# The server, in this process


class Service(Protocol):
    """Echo, or send a flood of data, until the time-out."""

    made = lost = 0

    def __init__(self, group: TransportGroup) -> None:
        self.group = group
        self.asked = b""

    def connection_made(self, transport: Any) -> None:
        Service.made += 1
        self.transport = transport
        self.timer = self.group.call_later(PATIENCE, transport.abort)

    def data_received(self, data: bytes) -> None:
        if not self.asked:
            self.asked, data = data[:1], data[1:]
            if self.asked == FLOOD:
                self.transport.write(bytes(FLOOD_SIZE))
        if self.asked == ECHO:
            self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        Service.lost += 1
        self.timer.cancel()


class Once(Protocol):
    """Ask for an echo, and close when it has come."""

    def __init__(self, message: bytes) -> None:
        self.over = anyio.Event()
        self.left = len(message)
        self.message = message

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(ECHO + self.message)

    def data_received(self, data: bytes) -> None:
        self.left -= len(data)
        if not self.left:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set()


async def serve(directory: str, seconds: float, round_seconds: float) -> list[Sample]:
    """Return the time, the connections so far, and the memory, in objects and bytes, after each round."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(f"{directory}/server.pem")
    client_context = ssl.create_default_context(cafile=f"{directory}/ca.pem")
    samples: list[Sample] = []
    async with TransportGroup() as group:
        group.set_exception_handler(lambda *_: None)  # Handshakes that fail: that is what they are for.

        def factory() -> Service:
            return Service(group)

        tcp = await group.create_server(factory, HOST, 0)
        tls = await group.create_server(
            factory, HOST, 0, ssl=server_context, ssl_handshake_timeout=PATIENCE, ssl_shutdown_timeout=PATIENCE
        )
        unix = await group.create_unix_server(factory, f"{directory}/socket")
        ports = [str(server.sockets[0].getsockname()[1]) for server in (tcp, tls)]
        command = [sys.executable, __file__, "--clients", directory, *ports]
        began = time.monotonic()
        async with await anyio.open_process(command, stderr=None) as clients:
            assert clients.stdin is not None
            assert clients.stdout is not None
            while time.monotonic() - began < seconds or len(samples) < LEAST_ROUNDS:
                await clients.stdin.send(f"{round_seconds}\n".encode())
                until = time.monotonic() + round_seconds
                while time.monotonic() < until:
                    await use(group, ports, directory, client_context)
                await clients.stdout.receive()
                # Until the last ill-behaved client has timed out.
                await group.wait_closed()
                gc.collect()
                samples.append((time.monotonic() - began, Service.made, len(gc.get_objects()), resident()))
            await clients.stdin.aclose()
        for server in (tcp, tls, unix):
            server.close()
    assert Service.made == Service.lost
    return samples


async def use(group: TransportGroup, ports: list[str], directory: str, context: ssl.SSLContext) -> None:
    """Connect from the same group, in each of the ways, one of them given up half-way."""
    ways: list[Callable[[], Any]] = [
        lambda: group.create_connection(lambda: Once(bytes(5000)), HOST, int(ports[0])),
        lambda: group.create_unix_connection(lambda: Once(b"x"), f"{directory}/socket"),
        lambda: group.create_connection(
            lambda: Once(bytes(50_000)), HOST, int(ports[1]), ssl=context, server_hostname=NAME,
            ssl_shutdown_timeout=PATIENCE,
        ),
    ]  # fmt: skip
    for connect in ways:
        try:
            _, protocol = await connect()
        except OSError:
            continue  # The server has timed out: the machine is busy.
        await protocol.over.wait()
    with anyio.move_on_after(random.random() * 0.002), contextlib.suppress(OSError):
        transport, _ = await group.create_connection(
            lambda: Once(b""), HOST, int(ports[1]), ssl=context, server_hostname=NAME
        )
        transport.abort()


def resident() -> int:
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The clients, in a process of their own: each is given its share of the clients' bad manners.


class Clients:
    """Every way to use a server, well-behaved or not."""

    def __init__(self, directory: str, tcp: int, tls: int) -> None:
        self.addresses: list[Any] = [(HOST, tcp), f"{directory}/socket"]
        self.tls_address = (HOST, tls)
        self.context = ssl.create_default_context(cafile=f"{directory}/ca.pem")
        self.done: Counter[str] = Counter()
        self.polite: list[Callable[[], None]] = [self.echo, self.echo_over_tls, self.download]
        self.rude: list[Callable[[], None]] = [
            self.reset, self.half_open, self.silent, self.never_reads, self.cut_handshake, self.cut_tls,
            self.garbage_for_tls,
        ]  # fmt: skip

    def connect(self) -> socket.socket:
        address = random.choice(self.addresses)
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        sock.settimeout(30)
        sock.connect(address)
        return sock

    def connect_tls(self) -> ssl.SSLSocket:
        plain = socket.create_connection(self.tls_address, timeout=30)
        return self.context.wrap_socket(plain, server_hostname=NAME)

    @staticmethod
    def echo_over(sock: socket.socket) -> None:
        data = random.randbytes(random.randrange(1, 20_000))
        sock.sendall(ECHO + data)
        back = b""
        while len(back) < len(data):
            more = sock.recv(65536)
            if not more:
                raise ConnectionResetError  # The server has timed out: the machine is busy.
            back += more
        assert back == data

    def echo(self) -> None:
        with self.connect() as sock:
            self.echo_over(sock)

    def echo_over_tls(self) -> None:
        with self.connect_tls() as sock:
            self.echo_over(sock)
            sock.unwrap().close()

    def download(self) -> None:
        with self.connect() as sock:
            sock.sendall(FLOOD)
            left = FLOOD_SIZE
            while left:
                data = sock.recv(65536)
                if not data:
                    raise ConnectionResetError
                left -= len(data)

    def reset(self) -> None:
        with self.connect() as sock:
            sock.sendall(ECHO + bytes(10_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def half_open(self) -> None:
        with self.connect() as sock:
            sock.sendall(FLOOD)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
            time.sleep(PATIENCE / 4)

    def silent(self) -> None:
        with self.connect() as sock:
            sock.recv(1)  # Until the server times out.

    def never_reads(self) -> None:
        with self.connect() as sock:
            sock.sendall(FLOOD)
            time.sleep(PATIENCE * random.random() * 2)

    def cut_handshake(self) -> None:
        with socket.create_connection(self.tls_address, timeout=30) as sock:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            try:
                self.context.wrap_bio(incoming, outgoing, server_hostname=NAME).do_handshake()
            except ssl.SSLWantReadError:
                hello = outgoing.read()
                sock.sendall(hello[: random.randrange(len(hello)) + 1])

    def cut_tls(self) -> None:
        with self.connect_tls() as sock:
            sock.sendall(random.choice((ECHO + bytes(10_000), FLOOD)))

    def garbage_for_tls(self) -> None:
        with socket.create_connection(self.tls_address, timeout=30) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            sock.recv(100)

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            client = random.choice(random.choice((self.polite, self.rude)))
            try:
                client()
            except OSError as exc:
                self.done[f"{client.__name__}: {type(exc).__name__}"] += 1
            else:
                self.done[client.__name__] += 1

    def run(self) -> None:
        """For each line of standard input, work for that many seconds, then print a line."""
        for line in sys.stdin:
            until = time.monotonic() + float(line)
            threads = [threading.Thread(target=self.work, args=(until,)) for _ in range(CLIENTS_AT_ONCE)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print("done", flush=True)
        print("clients:", ", ".join(f"{name} {count}" for name, count in sorted(self.done.items())), file=sys.stderr)


# The figure


def figure(backend: str, samples: list[Sample]) -> str:
    """The memory over time, as text: each bar is between the least and the most resident memory."""
    least, most = min(sample[3] for sample in samples), max(sample[3] for sample in samples)
    lines = [f"{backend}: memory after each round", "   s  connections  objects  resident MiB"]
    step = max(1, len(samples) // 30)
    for number, (seconds, connections, objects, size) in enumerate(samples):
        if number % step == 0 or number == len(samples) - 1:
            bar = "#" * (1 + round(39 * (size - least) / max(most - least, 1 << 20)))
            lines.append(f"{seconds:4.0f}  {connections:11}  {objects:7}  {size / (1 << 20):12.2f}  {bar}")
    return "\n".join(lines)


def growth(samples: list[Sample]) -> tuple[int, int, int]:
    """Connections, objects and bytes of the last third, over the middle one. The first is for warming up.

    The least of each third is what counts: what the allocator keeps for a while after a round comes and goes.
    """
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    objects, size = (min(s[n] for s in last) - min(s[n] for s in middle) for n in (2, 3))
    return samples[-1][1] - samples[third][1], objects, size


def soak(backend: str, seconds: float, round_seconds: float, resident_allowed: int) -> bool:
    import trustme

    authority = trustme.CA()
    with tempfile.TemporaryDirectory() as directory:
        authority.cert_pem.write_to_path(f"{directory}/ca.pem")
        authority.issue_cert(NAME).private_key_and_cert_chain_pem.write_to_path(f"{directory}/server.pem")
        samples = anyio.run(serve, directory, seconds, round_seconds, **BACKENDS[backend])
    connections, objects, size = growth(samples)
    flat = objects <= OBJECTS_ALLOWED and size <= resident_allowed
    print(figure(backend, samples))
    print(
        f"{backend}: {'flat' if flat else 'NOT FLAT'}: {objects:+} objects and {size / 1024:+.0f} KiB "
        f"in {connections} connections",
        flush=True,
    )
    return flat


def main() -> None:
    if sys.argv[1:2] == ["--clients"]:
        Clients(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])).run()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=list(BACKENDS), help="default: all")
    parser.add_argument("--seconds", type=float, default=120, help="how long, on each backend")
    parser.add_argument("--round", type=float, default=2, help="seconds between two looks at the memory")
    parser.add_argument("--resident", type=int, default=RESIDENT_ALLOWED, help="how many MiB may be left over")
    arguments = parser.parse_args()
    backends = arguments.backend or list(BACKENDS)
    if len(backends) > 1:
        # Each in a process of its own, or else one would be measured with another's memory.
        common = ["--seconds", str(arguments.seconds), "--round", str(arguments.round)]
        common += ["--resident", str(arguments.resident)]
        codes = [subprocess.run([sys.executable, __file__, "--backend", each, *common]).returncode for each in backends]
        sys.exit(max(codes))
    sys.exit(0 if soak(backends[0], arguments.seconds, arguments.round, arguments.resident << 20) else 1)


if __name__ == "__main__":
    main()
