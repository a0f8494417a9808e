"""Unexpected errors, from system calls and from the `repr` of a logged object.

Each is reported. It ends its connection, or the call is retried; the group and its other connections go on.
asyncio's transports do the same.
"""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.abc import ByteStream
from network import needs_pipes
from support import (
    GUARD,
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    collect_contexts,
    connected,
    fill,
    raises_inside,
    until,
)
from tls_support import NAME, Certificates

import transports_anyio._server
from transports_anyio import DatagramProtocol, SubprocessProtocol

pytestmark = pytest.mark.anyio


class SignalledError(BaseException):
    """What a program's own signal handler may raise anywhere."""


every_error = pytest.mark.parametrize("error", [MemoryError, RecursionError, ZeroDivisionError, SignalledError])


class Faults:
    """Make system calls fail, once each, for the file descriptor `armed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.armed: int | None = None
        self.failed = 0

    def let_fail(self, owner: Any, error: type[BaseException], *names: str) -> None:
        """The first argument of the calls is a file descriptor or a socket."""
        for name in names:
            if hasattr(owner, name):
                self.monkeypatch.setattr(owner, name, self._failing(getattr(owner, name), error))

    def _failing(self, original: Callable[..., Any], error: type[BaseException]) -> Callable[..., Any]:
        def call(what: Any, *args: Any, **options: Any) -> Any:
            descriptor = what if isinstance(what, int) else what.fileno()
            if descriptor == self.armed:
                self.armed = None
                self.failed += 1
                raise error
            return original(what, *args, **options)

        return call

    def arm(self, transport: Any, name: str = "socket") -> None:
        self.armed = transport.get_extra_info(name).fileno()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


async def answers(peer: Peer) -> bool:
    await peer.send(b"are you there?")
    return await peer.receive_exactly(14) == b"are you there?"


def echo() -> Recorder:
    return Recorder(on_data_received=lambda self, data: self.transport.write(data))


def reported(contexts: list[dict[str, Any]]) -> list[type[BaseException]]:
    return [type(context["exception"]) for context in contexts]


@pytest.mark.differs(
    "`accept` fails with an exception that is not an `OSError`",
    asyncio="reported, and tried again in every iteration",
    here="reported, and tried again after a second",
    why="it must not fill the log",
)
@every_error
@pytest.mark.parametrize("encrypted", [False, True])
async def test_g5_accept_fails(
    stack: Stack,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    certificate_authority: Any,
    encrypted: bool,
    error: Any,
) -> None:
    """It is tried again, and the client that waits is served."""
    monkeypatch.setattr(transports_anyio._server, "RETRY_DELAY", 0.01)
    faults.let_fail(socket.socket, error, "accept")
    certificates = Certificates(certificate_authority)
    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        server = await group.create_server(echo, HOST, 0, ssl=certificates.server() if encrypted else None)
        faults.armed = server.sockets[0].fileno()
        options = {"ssl": certificates.client(), "server_hostname": NAME} if encrypted else {}
        with anyio.fail_after(GUARD):
            transport, protocol = await group.create_connection(Recorder, *server.sockets[0].getsockname(), **options)
            transport.write(b"hello")
            assert await protocol.wait_received(5) == b"hello"
        assert faults.failed == 1
        assert await answers(other)
        assert reported(contexts) == [error]
        transport.abort()
        server.close()


@pytest.mark.ours_only("asyncio drops it and does not report it")
@every_error
@pytest.mark.parametrize("encrypted", [False, True])
async def test_g5_an_accepted_connection_cannot_be_set_up(
    stack: Stack, faults: Faults, certificate_authority: Any, encrypted: bool, error: Any
) -> None:
    """It is closed; the next one is served."""
    certificates = Certificates(certificate_authority)
    original = socket.socket.setblocking
    failed: list[int] = []

    def setblocking(sock: socket.socket, flag: bool) -> None:
        if not failed and not flag and sock.getsockname() == address:
            failed.append(1)
            raise error
        original(sock, flag)

    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(echo, HOST, 0, ssl=certificates.server() if encrypted else None)
        address = server.sockets[0].getsockname()
        faults.monkeypatch.setattr(socket.socket, "setblocking", setblocking)
        with Peer.connect(address) as peer:
            assert await peer.gone()
        options = {"ssl": certificates.client(), "server_hostname": NAME} if encrypted else {}
        transport, protocol = await group.create_connection(Recorder, *address, **options)
        transport.write(b"hello")
        assert await protocol.wait_received(5) == b"hello"
        (context,) = contexts
        assert type(context["exception"]) is error
        assert context["peername"] is not None


@every_error
@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_g5_receiving_fails(stack: Stack, faults: Faults, kind: Any, error: Any) -> None:
    faults.let_fail(socket.socket, error, "recv", "recv_into")
    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        async with connected(group, kind()) as (transport, protocol, peer):
            faults.arm(transport)
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
            assert await peer.gone()
        assert await answers(other)
    assert faults.failed == 1
    assert reported(contexts) == [error]
    if kind is Recorder:
        assert isinstance(protocol.exception, error)


@every_error
@pytest.mark.parametrize("when", ["at once", "later"])
async def test_g5_sending_fails(stack: Stack, faults: Faults, when: str, error: Any) -> None:
    faults.let_fail(socket.socket, error, "send", "sendmsg")
    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        async with connected(group, small=True) as (transport, protocol, peer):
            if when == "later":
                fill(transport, 1 << 20)
            faults.arm(transport)
            if when == "at once":
                transport.write(b"x")
            await peer.gone()
            await protocol.wait_for("connection_lost")
        assert await answers(other)
    assert faults.failed == 1
    assert reported(contexts) == [error]
    assert isinstance(protocol.exception, error)


class Datagrams(DatagramProtocol):
    def __init__(self) -> None:
        self.lost: list[BaseException | None] = []

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.append(exc)


@every_error
@pytest.mark.parametrize("doing", ["receiving", "sending"])
async def test_g5_a_datagram_endpoint_fails(stack: Stack, faults: Faults, doing: str, error: Any) -> None:
    faults.let_fail(socket.socket, error, "recvfrom", "recvfrom_into", "sendto")
    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        transport, protocol = await group.create_datagram_endpoint(Datagrams, local_addr=(HOST, 0))
        address = transport.get_extra_info("sockname")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            faults.arm(transport)
            if doing == "receiving":
                sender.sendto(b"x", address)
            else:
                transport.sendto(b"x", address)
            await until(lambda: protocol.lost)
        assert await answers(other)
    assert reported(contexts) == [error]
    assert [type(exc) for exc in protocol.lost] == [error]


@pytest.mark.differs(
    "reading from a pipe fails with an exception that is not an `OSError`",
    asyncio="reported, and tried again",
    here="reported, and the connection is lost, as on a socket",
    why="one rule for every transport",
)
@every_error
@needs_pipes
@pytest.mark.needs_polling("the fault is made for our own file descriptor, and the thread has another")
async def test_g5_reading_from_a_pipe_fails(stack: Stack, faults: Faults, error: Any) -> None:
    faults.let_fail(os, error, "read")
    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        reader, writer = os.pipe()
        transport, protocol = await group.connect_read_pipe(Recorder, open(reader, "rb", 0))
        faults.armed = reader
        os.write(writer, b"x")
        if stack.is_oracle:  # It is read again, in the next iteration of the event loop.
            await protocol.wait_received(1)
            transport.close()
        await protocol.wait_for("connection_lost")
        os.close(writer)
        assert await answers(other)
    assert reported(contexts) == [error]


class FailingStream(ByteStream):
    """A user's stream that waits, and then fails."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.go = anyio.Event()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await self.go.wait()
        raise self.error

    async def send(self, item: bytes) -> None:
        raise self.error

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


@pytest.mark.ours_only("asyncio has no AnyIO streams")
@every_error
@pytest.mark.parametrize("doing", ["receiving", "sending"])
async def test_g5_an_anyio_stream_fails(stack: Stack, doing: str, error: Any) -> None:
    """It ends as a broken stream; its own error is the cause."""
    stream = FailingStream(error)
    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        transport, protocol = await group.connect_stream(Recorder, stream)
        if doing == "receiving":
            stream.go.set()
        else:
            transport.write(b"x")
        await protocol.wait_for("connection_lost")
        assert await answers(other)
    assert isinstance(protocol.exception, OSError)
    assert type(protocol.exception.__cause__) is error


class ChildProtocol(SubprocessProtocol):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def process_exited(self) -> None:
        self.calls.append("process_exited")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")


@pytest.mark.ours_only("asyncio waits in a thread")
@every_error
@needs_pipes
async def test_g5_polling_a_child_fails(stack: Stack, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """It is polled again."""
    original = os.waitid
    failures = 0

    def waitid(*args: Any) -> Any:
        nonlocal failures
        if failures < 3:
            failures += 1
            raise error
        return original(*args)

    async with stack.open() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        transport, protocol = await group.subprocess_exec(ChildProtocol, "cat")
        monkeypatch.setattr(os, "waitid", waitid)
        transport.get_pipe_transport(0).close()
        await until(lambda: "connection_lost" in protocol.calls)
        assert await answers(other)
    assert protocol.calls == ["process_exited", "connection_lost"]
    assert transport.get_returncode() == 0
    assert reported(contexts) == [error] * 3


class Unprintable:
    """A pipe whose `repr` fails."""

    def __init__(self, descriptor: int, error: type[BaseException]) -> None:
        self.file = open(descriptor, "rb", 0)
        self.error = error

    def __repr__(self) -> str:
        raise self.error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.ours_only("the repr of asyncio's transports does not include the pipe")
@every_error
@needs_pipes
async def test_g5_the_repr_of_a_logged_object_fails(stack: Stack, error: Any) -> None:
    """Every callback comes all the same, and the transport is closed."""
    logger = logging.getLogger(stack.logger)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    handler = logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    logging.raiseExceptions = False  # As in production; otherwise the traceback goes to standard error.
    try:
        async with stack.open() as group, connected(group, echo()) as (_, _, other):
            contexts = collect_contexts(group)
            reader, writer = os.pipe()
            transport, protocol = await group.connect_read_pipe(Recorder, Unprintable(reader, error))
            os.write(writer, b"x")
            await protocol.wait_received(1)
            os.close(writer)
            await protocol.wait_for("connection_lost")
            assert await answers(other)
    finally:
        logging.raiseExceptions = True
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]
    assert transport.is_closing()
    assert set(reported(contexts)) <= {error}
    assert contexts or issubclass(error, Exception)  # `logging` swallows most of these.


@every_error
@pytest.mark.ours_only("the repr of asyncio's transports does not include the pipe")
async def test_g5_a_failing_callback_with_a_failing_repr(stack: Stack, error: Any) -> None:
    class Callback:
        def __call__(self) -> None:
            raise ZeroDivisionError

        def __getattr__(self, name: str) -> Any:
            raise error

        def __repr__(self) -> str:
            raise error

    done: list[int] = []
    async with stack.open() as group:
        contexts = collect_contexts(group)
        group.call_soon(Callback())
        group.call_soon(done.append, 1)
        await until(lambda: done)
    assert reported(contexts) == [ZeroDivisionError]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.ours_only("asyncio's event loop would stop")
async def test_g5_system_exit_still_propagates(stack: Stack, faults: Faults, error: Any) -> None:
    if stack.name != "trio":
        pytest.skip("such an error ends the event loop of asyncio")
    faults.let_fail(socket.socket, error, "recv")
    with raises_inside(error):
        async with stack.open() as group, connected(group) as (transport, _, peer):
            faults.arm(transport)
            await peer.send(b"x")
            await anyio.sleep(GUARD)
