"""Groups in several threads at once, as in servers with a loop in each thread: they must not affect each other."""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from support import GUARD, HOST, Stack
from tls_support import NAME, Certificates

if TYPE_CHECKING:
    import trustme

THREADS = 3
ROUNDS = 200
SIZE = 60_000


class Echo:
    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.sendto(data, address)

    def eof_received(self) -> None: ...

    def error_received(self, exc: OSError) -> None: ...

    def connection_lost(self, exc: BaseException | None) -> None: ...


@pytest.fixture
def hasty() -> Iterator[None]:
    """Switch threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def ask_over_stream(sock: socket.socket, question: bytes) -> bytes:
    """Send and receive at once: a question is larger than what waits in between."""
    with sock:
        sock.sendall(question)
        answer = bytearray()
        while len(answer) < len(question):
            answer += sock.recv(SIZE)
    return bytes(answer)


def connected(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=GUARD)


def in_threads(stack: Stack, backend: Any, kind: str, server_tls: Any, ask: Callable[[int, bytes], bytes]) -> None:
    """Run an echo server in each thread, and ask each for bytes of its own."""

    async def serve(pattern: bytes) -> set[bytes]:
        """Return the wrong answers."""
        async with stack.open() as owner:
            if kind == "udp":
                transport, _ = await owner.create_datagram_endpoint(Echo, local_addr=(HOST, 0))
                port = transport.get_extra_info("sockname")[1]
            else:
                server = await owner.create_server(Echo, HOST, 0, ssl=server_tls)
                port = server.sockets[0].getsockname()[1]
            wrong = await anyio.to_thread.run_sync(keep_asking, port, pattern)
            if kind == "udp":
                transport.close()
            else:
                server.close()
        return wrong

    def keep_asking(port: int, pattern: bytes) -> set[bytes]:
        return {answer for _ in range(ROUNDS) if (answer := ask(port, pattern)) != pattern}

    name, options = backend
    everybody = threading.Barrier(THREADS)

    def run(number: int) -> set[bytes]:
        everybody.wait(GUARD)
        return anyio.run(serve, bytes([number]) * SIZE, backend=name, backend_options=options)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(run, range(THREADS)))
    assert [len(wrong) for wrong in results] == [0] * THREADS


@pytest.mark.usefixtures("hasty")
def test_tcp(stack: Stack, anyio_backend: Any) -> None:
    in_threads(stack, anyio_backend, "tcp", None, lambda port, question: ask_over_stream(connected(port), question))


@pytest.mark.exhaustive
@pytest.mark.usefixtures("hasty")
def test_tls(stack: Stack, anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    certificates = Certificates(certificate_authority)
    context = certificates.client()

    def ask(port: int, question: bytes) -> bytes:
        sock = connected(port)
        try:
            encrypted: ssl.SSLSocket = context.wrap_socket(sock, server_hostname=NAME)
        except BaseException:
            sock.close()
            raise
        return ask_over_stream(encrypted, question)

    in_threads(stack, anyio_backend, "tls", certificates.server(), ask)


@pytest.mark.usefixtures("hasty")
def test_udp(stack: Stack, anyio_backend: Any) -> None:
    def ask(port: int, question: bytes) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(GUARD)
            sock.sendto(question, (HOST, port))
            return sock.recv(SIZE)

    in_threads(stack, anyio_backend, "udp", None, ask)
