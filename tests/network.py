"""Helpers for the tests of the endpoint functions: addresses with a certain behaviour, and peers."""

from __future__ import annotations

import os
import random
import select
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from subprocess import CompletedProcess
from typing import Any

import anyio
import pytest
from support import GUARD, Recorder, open_descriptors

from transports_anyio._selector import make_system_selector

HOST = "127.0.0.1"
HOST_6 = "::1"

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a loopback network of more than one address")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind((HOST_6, 0))
    except OSError:
        return False
    return True


#: The family of UNIX sockets. On systems without them it is a number that no family has; tests are skipped there.
AF_UNIX = getattr(socket, "AF_UNIX", socket.AF_UNSPEC)
needs_unix = pytest.mark.skipif(AF_UNIX == socket.AF_UNSPEC, reason="no UNIX sockets here")
#: For tests of transports of pipes or children. Windows has them, in threads, but these tests have not run there yet.
needs_pipes = pytest.mark.skipif(sys.platform == "win32", reason="the tests of pipes are written for polled ones")
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="this system has no signals of POSIX")
#: For tests about the selector of the system. Where none can be waited for, a task waits for each file descriptor.
needs_selector = pytest.mark.skipif(make_system_selector() is None, reason="a task waits for each file descriptor")
needs_sendfile = pytest.mark.skipif(not hasattr(os, "sendfile"), reason="the system does not send files")
needs_reuse_port = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="no SO_REUSEPORT here")
#: For tests that find something in `open_descriptors`, which is empty on Windows.
needs_descriptors = pytest.mark.skipif(not open_descriptors(), reason="open file descriptors cannot be listed here")
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="IPv6 is not configured")


@contextmanager
def bound(host: str = HOST, port: int = 0, *, backlog: int | None = None) -> Iterator[socket.socket]:
    """Open a bare stream socket of the host's family; it listens if `backlog` is given."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        # A client may have used the port a moment ago.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if backlog is not None:
            sock.listen(backlog)
        yield sock


def unused_port(kind: int = socket.SOCK_STREAM) -> int:
    """Return a free port that the system does not assign by itself: it assigns ports from 32768 on."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket(socket.AF_INET, kind) as sock:
            try:
                sock.bind((HOST, port))
            except OSError:
                continue
        return port


@contextmanager
def black_hole(host: str, port: int = 0) -> Iterator[int]:
    """A port at which connections are neither accepted nor refused: the backlog of its listener is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(bound(host, port, backlog=0))
        for _ in range(16):
            sock = stack.enter_context(socket.socket(listener.family))
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
            if not select.select([], [sock], [], 0.3)[1]:
                break
        else:
            pytest.skip("this system's backlogs are never full")
        yield listener.getsockname()[1]


@contextmanager
def few_descriptors(more: int = 0) -> Iterator[Callable[[], None]]:
    """Limit the file descriptors that the process may still open; yield a function that lifts the limit."""
    resource = pytest.importorskip("resource", reason="no limits of descriptors here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[socket.socket] = []

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for sock in opened:
            sock.close()
        opened.clear()

    try:
        # The limit applies to the highest number, so the gaps below it are filled.
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1 + more, hard))
        while True:
            try:
                opened.append(socket.socket())
            except OSError:
                break
        for sock in opened[len(opened) - more :]:
            opened.remove(sock)
            sock.close()
        yield lift
    finally:
        lift()


@contextmanager
def no_descriptors_below(number: int) -> Iterator[Callable[[], None]]:
    """Allow only file descriptors below `number`, all of which are in use; yield a function that lifts the limit."""
    resource = pytest.importorskip("resource", reason="no limits of descriptors here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filling: list[int] = []

    def lift() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filling:
            os.close(fd)
        filling.clear()

    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                filling.append(os.dup(0))
        yield lift
    finally:
        lift()


@contextmanager
def names(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]], backend: Any) -> Iterator[None]:
    """Make the C library's resolver know other names, each of some numeric addresses."""
    original = socket.getaddrinfo
    original_of_anyio = anyio.getaddrinfo

    def getaddrinfo(host: Any, port: Any, family: int = 0, kind: int = 0, proto: int = 0, flags: int = 0) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known or flags & socket.AI_NUMERICHOST:
            return original(host, port, family, kind, proto, flags)
        found = []
        for address in known[name]:
            if family in (0, socket.AF_INET6 if ":" in address else socket.AF_INET):
                found += original(address, port, family, kind, proto, flags)
        return found

    async def getaddrinfo_of_anyio(host: Any, port: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            return await original_of_anyio(host, port, **options)
        found = getaddrinfo(host, port, *(options[key] for key in ("family", "type", "proto", "flags")))
        return [(family, kind, proto, "", address[:2]) for family, kind, proto, _, address in found]

    with monkeypatch.context() as patch:
        if backend[1].get("use_uvloop"):  # uvloop has its own resolver.
            patch.setattr(anyio, "getaddrinfo", getaddrinfo_of_anyio)
        else:
            patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


class Echo(Recorder):
    """Send all data back."""

    def __init__(self) -> None:
        super().__init__(on_data_received=lambda self, data: self.transport.write(data))


class Web(Recorder):
    """Answer one HTTP/1.1 request with its first line."""

    def __init__(self) -> None:
        super().__init__(on_data_received=Web.answer)

    def answer(self, data: bytes) -> None:
        if b"\r\n\r\n" in self.received and not self.transport.is_closing():
            body = self.received.split(b"\r\n")[0]
            self.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
            self.transport.write(bytes(body))
            self.transport.close()


def a_link_local_address() -> tuple[str, str] | None:
    """Return an address of this machine that needs a scope, and the name of its interface."""
    try:
        with open("/proc/net/if_inet6") as file:
            lines = [line.split() for line in file]
    except OSError:
        return None
    for digits, *_, name in lines:
        if digits.startswith("fe80"):
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), name
    return None


async def run_program(*command: str, stdin: bytes | None = None) -> bytes:
    """Run another program and return what it prints."""
    with anyio.fail_after(4 * GUARD):
        return (await anyio.run_process(command, input=stdin)).stdout


async def run_main(source: str, backend: tuple[str, dict[str, Any]], **options: Any) -> CompletedProcess[bytes]:
    """Run the async function `main` of a Python program in a process of its own, on a backend."""
    name, backend_options = backend
    last = f"\nimport anyio\nanyio.run(main, backend={name!r}, backend_options={backend_options!r})\n"
    with anyio.fail_after(4 * GUARD):
        return await anyio.run_process([sys.executable, "-c", source + last], **options)


@asynccontextmanager
async def cancelled_after(checkpoints: int) -> AsyncIterator[anyio.CancelScope]:
    """Cancel the block after that many iterations of the event loop; 0 cancels it at its first checkpoint."""

    async def count() -> None:
        for _ in range(checkpoints):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            if checkpoints:
                tasks.start_soon(count)
            else:
                scope.cancel()
            yield scope
        tasks.cancel_scope.cancel()
