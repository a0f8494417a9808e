"""What the tests share: stacks, recording protocols, raw socket peers, peers in other processes."""

from __future__ import annotations

import array
import asyncio
import functools
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from transports_anyio import testing

if TYPE_CHECKING:
    from typing_extensions import Self

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup
else:
    BaseExceptionGroup = BaseExceptionGroup  # noqa: PLW0127

__all__ = [
    "BACKENDS",
    "GUARD",
    "ORACLE",
    "BaseExceptionGroup",
    "BufferedRecorder",
    "DatagramRecorder",
    "Peer",
    "Recorder",
    "Stack",
    "SubprocessRecorder",
    "array",
    "at_depth",
    "capture_log",
    "collect_contexts",
    "connected",
    "fill",
    "frames_left",
    "leaves",
    "listening",
    "pattern",
    "peer_process",
    "until",
]

#: Seconds after which a wait that should have ended long ago fails. A guard against hanging, not a measurement.
GUARD = 15
ORACLE = "oracle"
#: Name and options of each backend, for AnyIO.
BACKENDS: dict[str, tuple[str, dict[str, object]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
HOST = "127.0.0.1"
#: A kernel buffer small enough to fill at once, large enough not to be throttled by delayed acknowledgements.
SMALL = 65536
#: The recorders of the running test.
RECORDERS: list[Any] = []
#: The number of timers that each group of the running test has left pending.
TIMERS: list[int] = []


def open_descriptors() -> dict[int, str]:
    """Return every open file descriptor of this process with its target; nothing on Windows, where sockets have
    none."""
    found: dict[int, str] = {}
    if sys.platform == "win32":
        return found
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    for name in os.listdir(directory):
        fd = int(name)
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor that listed the directory, or a system without /proc
            try:
                found[fd] = str(os.fstat(fd).st_ino)
            except OSError:
                continue
    return found


def at_depth(depth: int, call: Callable[[], None]) -> None:
    """Call with that many more frames on the stack."""
    if depth:
        at_depth(depth - 1, call)
    else:
        call()


def frames_left() -> int:
    """Return how many more frames fit on the stack."""

    def count(number: int) -> int:
        try:
            return count(number + 1)
        except RecursionError:
            return number

    return count(1)


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds."""
    with anyio.fail_after(GUARD):
        while not condition():
            # A real but tiny pause: a bare checkpoint would keep a processor busy that the peer needs.
            await anyio.sleep(0.001)


async def turns(count: int = 10) -> None:
    """Run a few iterations of the event loop."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def settle(group: Any) -> None:
    """Wait until the group has handled everything that was ready before this call.

    A sentinel shows it: bytes for another connection of the group, which are sent now, have been received. The second
    of them is received in a later batch of the selector than the first, and so after all that was ready with the first.
    Use this, and not `turns`, before checking that something has not happened.
    """
    ours, theirs = socket.socketpair()
    with theirs, anyio.fail_after(GUARD):
        transport, sentinel = await group.create_connection(testing.Recorder, sock=ours)
        for size in (1, 2):
            theirs.send(b"x")
            await sentinel.wait_received(size)
        transport.close()
        await sentinel.wait_for("connection_lost")


@functools.cache
def _numbers(count: int) -> bytes:
    return array.array("I", range(count)).tobytes()


def pattern(size: int) -> bytes:
    """Return bytes in which a lost, doubled or exchanged block is visible."""
    return _numbers(1 << (size // 4).bit_length())[:size]


def leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions inside nested groups as a flat list."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


@contextmanager
def raises_inside(expected: type[BaseException]) -> Iterator[list[BaseException]]:
    """Expect an exception, alone or as the only kind inside an exception group."""
    caught: list[BaseException] = []
    try:
        yield caught
    except BaseException as error:
        found = leaves(error)
        if not all(isinstance(leaf, expected) for leaf in found):
            raise
        caught.extend(found)
    else:
        raise AssertionError(f"{expected.__name__} was not raised")


class _Checked:
    """The part of the tests' recorders that the public ones do not have: their check after the test."""

    _state: str
    calls: list[testing.Call]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        RECORDERS.append(self)

    @property
    def names(self) -> list[str]:
        """The callbacks in order; a run of the same one counts once."""
        return [name for name, _ in groupby(call[0] for call in self.calls)]

    def take_over(self, transport: Any) -> None:
        """Be ready for `set_protocol`, after which `connection_made` does not come."""
        self.transport = transport
        self._state = "open"

    def hand_over(self) -> None:
        """Do not expect `connection_lost` any more: another protocol gets it, or asyncio forgets it."""
        self._state = "lost"


class Recorder(_Checked, testing.Recorder):
    """A recording `Protocol`."""


class BufferedRecorder(_Checked, testing.BufferedRecorder):
    """A recording `BufferedProtocol`."""


class DatagramRecorder(_Checked, testing.DatagramRecorder):
    """A recording `DatagramProtocol`."""


class SubprocessRecorder(_Checked, testing.SubprocessRecorder):
    """A recording `SubprocessProtocol`."""


# -- stacks -----------------------------------------------------------------------------------------------


class OracleGroup:
    """asyncio's running loop, with the interface that it shares with `TransportGroup`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transports: list[Any] = []
        self.protocols: list[Any] = []
        self.servers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def _tracked(self, factory: Callable[[], Any]) -> Callable[[], Any]:
        def make() -> Any:
            protocol = factory()
            self.protocols.append(protocol)
            return protocol

        return make

    async def create_connection(self, factory: Any, *args: Any, **options: Any) -> Any:
        transport, protocol = await self.loop.create_connection(self._tracked(factory), *args, **options)
        self.transports.append(transport)
        return transport, protocol

    async def create_server(self, factory: Any, *args: Any, **options: Any) -> Any:
        server = await self.loop.create_server(self._tracked(factory), *args, **options)
        self.servers.append(server)
        return server

    async def create_unix_connection(self, factory: Any, *args: Any, **options: Any) -> Any:
        transport, protocol = await self.loop.create_unix_connection(self._tracked(factory), *args, **options)
        self.transports.append(transport)
        return transport, protocol

    async def connect_accepted_socket(self, factory: Any, *args: Any, **options: Any) -> Any:
        transport, protocol = await self.loop.connect_accepted_socket(self._tracked(factory), *args, **options)
        self.transports.append(transport)
        return transport, protocol

    async def create_unix_server(self, factory: Any, *args: Any, **options: Any) -> Any:
        server = await self.loop.create_unix_server(self._tracked(factory), *args, **options)
        self.servers.append(server)
        return server

    def _open_recorders(self) -> list[Any]:
        return [each for each in self.protocols if isinstance(each, _Checked) and each._state not in ("new", "lost")]

    async def finish(self, *, abort: bool) -> None:
        with anyio.CancelScope(shield=True):
            for server in self.servers:
                server.close()
            made = [getattr(protocol, "transport", None) for protocol in self.protocols]
            for transport in [*self.transports, *made]:
                if transport is not None:
                    transport.abort() if abort else transport.close()
            with anyio.fail_after(GUARD):
                while self._open_recorders():
                    await anyio.sleep(0.001)
            await turns()


class Stack:
    """asyncio itself, or our group on the running backend."""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The number of tasks that the test starts inside the block and that outlive it.
        self.expected_tasks = 0

    @property
    def is_oracle(self) -> bool:
        return self.name == ORACLE

    def needs_python(self, *version: int, why: str) -> None:
        """Skip the test on an oracle that is older than this Python version."""
        if self.is_oracle and sys.version_info < version:
            pytest.skip(f"asyncio of Python {'.'.join(map(str, version))}: {why}")

    def only_python_before(self, *version: int, why: str) -> None:
        """Skip the test on an oracle that has something that we leave out on purpose."""
        if self.is_oracle and sys.version_info >= version:
            pytest.skip(f"asyncio since Python {'.'.join(map(str, version))}: {why}")

    @property
    def logger(self) -> str:
        return "asyncio" if self.is_oracle else "transports_anyio"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        if self.is_oracle:
            group: Any = OracleGroup()
            # AnyIO's pytest plugin sets an exception handler that a fresh loop would not have.
            plugins_handler = group.get_exception_handler()
            group.set_exception_handler(None)
            try:
                yield group
            except BaseException:
                await group.finish(abort=True)
                raise
            else:
                await group.finish(abort=False)
            finally:
                group.set_exception_handler(plugins_handler)
            return
        from transports_anyio import TransportGroup

        before = {task.id for task in anyio.get_running_tasks()}
        try:
            async with TransportGroup() as group:
                yield group
        finally:
            # Rule 2: when the block has been left, none of the group's tasks remains.
            after = [task for task in anyio.get_running_tasks() if task.id not in before]
            if len(after) > self.expected_tasks:
                raise AssertionError(f"tasks left: {after}")


def collect_contexts(group: Any) -> list[dict[str, Any]]:
    """Install an exception handler that collects its contexts."""
    contexts: list[dict[str, Any]] = []
    group.set_exception_handler(lambda _group, context: contexts.append(context))
    return contexts


@contextmanager
def capture_log(stack: Stack) -> Iterator[list[logging.LogRecord]]:
    """Collect the records of the stack's own logger."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger = logging.getLogger(stack.logger)
    handler = Keep()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# -- peers ------------------------------------------------------------------------------------------------


class Peer:
    """The other end of a connection: a bare non-blocking socket, driven by the test."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)

    @classmethod
    def connect(cls, address: Any, *, receive_buffer: int | None = None) -> Peer:
        family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            sock.connect(address)  # does not block: the kernel answers for a listening socket
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with anyio.fail_after(GUARD):
            while view:
                try:
                    view = view[self.socket.send(view) :]
                except BlockingIOError:
                    await anyio.wait_writable(self.socket)

    async def receive(self, size: int = 65536) -> bytes:
        with anyio.fail_after(GUARD):
            while True:
                try:
                    return self.socket.recv(size)
                except BlockingIOError:
                    await anyio.wait_readable(self.socket)

    async def receive_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = await self.receive(min(size - len(data), 1 << 18))
            assert more, f"end of file after {len(data)} of {size} bytes"
            data += more
        return bytes(data)

    async def receive_all(self) -> bytes:
        data = bytearray()
        while more := await self.receive(1 << 18):
            data += more
        return bytes(data)

    async def gone(self) -> bool:
        """Read until the other side has ended the connection, in order or not."""
        try:
            await self.receive_all()
        except ConnectionError:
            pass
        return True

    def shutdown(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class LinePeer:
    """A peer that speaks in lines."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.pending = b""

    async def say(self, line: str) -> None:
        await self.peer.send(line.encode() + b"\n")

    async def hear(self) -> str:
        while b"\n" not in self.pending:
            more = await self.peer.receive()
            if not more:
                return "(the end)"
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode()


@contextmanager
def listening(*, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.bind((HOST, 0))
        sock.listen(200)
        yield sock


async def open_connection(group: Any, protocol: Any = None, *, small: bool = False) -> tuple[Any, Any, Peer]:
    """Connect the group to a bare socket; return `(transport, protocol, peer)`. The caller closes the peer.

    `small` asks for small kernel buffers on both sides.
    """
    protocol = Recorder() if protocol is None else protocol
    with listening(receive_buffer=SMALL if small else None) as listener:
        with anyio.fail_after(GUARD):
            transport, made = await group.create_connection(lambda: protocol, *listener.getsockname())
        assert made is protocol
        sock, _ = listener.accept()
    if small:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    return transport, protocol, Peer(sock)


@asynccontextmanager
async def connected(group: Any, protocol: Any = None, *, small: bool = False) -> AsyncIterator[tuple[Any, Any, Peer]]:
    """As `open_connection`; the peer is closed at the end of the block. Without a block: the fixture `connect_peer`."""
    transport, protocol, peer = await open_connection(group, protocol, small=small)
    with peer:
        yield transport, protocol, peer


@contextmanager
def socket_pair(*, small: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Open two connected non-blocking sockets; `small` asks for a small send buffer of the first."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        yield ours, theirs


def fill(transport: Any, at_least: int = 1) -> int:
    """Write until at least that many bytes wait in the transport's own buffer; return the number of bytes written.

    The kernel's buffers are then full, as far as one iteration of the event loop can tell.
    """
    chunk = bytes(65536)
    written = 0
    while transport.get_write_buffer_size() < at_least:
        transport.write(chunk)
        written += len(chunk)
        assert written < 1 << 28, "the write buffer never fills"
    return written


class PeerProcess:
    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process
        self._pending = b""

    async def line(self) -> str:
        """Return the next line that the peer printed."""
        assert self._process.stdout is not None
        with anyio.fail_after(4 * GUARD):
            while b"\n" not in self._pending:
                self._pending += await self._process.stdout.receive()
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode()

    async def say(self, line: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send(line.encode() + b"\n")


@asynccontextmanager
async def peer_process(task: str, *args: object) -> AsyncIterator[PeerProcess]:
    """Run one of the peers of `peers.py`, blocking sockets in a process of its own."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("peers.py")), task, *map(str, args)]
    process = await anyio.open_process(command, stderr=None)
    try:
        yield PeerProcess(process)
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            await process.aclose()
