"""What fails inside `write`, `writelines`, `sendto` and `sendfile` once something may have been sent.

No message may follow one of which only a part went out: either nothing of it was taken, or the connection ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from network import needs_pipes, needs_selector, needs_sendfile, needs_unix
from support import (
    GUARD,
    Peer,
    Recorder,
    Stack,
    at_depth,
    collect_contexts,
    connected,
    fill,
    frames_left,
    listening,
    turns,
    until,
)
from tls_support import NAME, Certificates, TLSPeer, together

from transports_anyio import DatagramProtocol
from transports_anyio.testing import Recorder as PublicRecorder, memory_connection

pytestmark = pytest.mark.anyio

#: The size of a message that cannot be copied for lack of memory.
HUGE = 124 << 20


@contextmanager
def no_memory(room: int = 40 << 20) -> Iterator[None]:
    """Limit the process to `room` more bytes of address space."""
    resource = pytest.importorskip("resource", reason="no limits of memory here")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc and RLIMIT_AS")
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# -- carriers: each yields the transport, its protocol, and a function that returns what the peer got ------------


@asynccontextmanager
async def tcp(group: Any, _: Certificates) -> AsyncIterator[tuple[Any, Recorder, Callable[[], Any]]]:
    async with connected(group, small=True) as (transport, protocol, peer):
        yield transport, protocol, lambda: received_from(peer)


@asynccontextmanager
async def unix(group: Any, _: Certificates) -> AsyncIterator[tuple[Any, Recorder, Callable[[], Any]]]:
    ours, theirs = socket.socketpair()
    transport, protocol = await group.create_unix_connection(Recorder, sock=ours)
    with Peer(theirs) as peer:
        yield transport, protocol, lambda: received_from(peer)


@asynccontextmanager
async def tls(group: Any, certificates: Certificates) -> AsyncIterator[tuple[Any, Recorder, Callable[[], Any]]]:
    ours, theirs = socket.socketpair()
    (transport, protocol), peer = await together(
        lambda: group.create_connection(Recorder, sock=ours, ssl=certificates.client(), server_hostname=NAME),
        lambda: TLSPeer.wrap(theirs, certificates.server(), server_side=True),
    )
    with peer:
        yield transport, protocol, lambda: received_from(peer)


@asynccontextmanager
async def pipe(group: Any, _: Certificates) -> AsyncIterator[tuple[Any, Recorder, Callable[[], Any]]]:
    reading, writing = os.pipe()
    transport, protocol = await group.connect_write_pipe(Recorder, os.fdopen(writing, "wb", 0))

    async def received() -> bytes:
        got = bytearray()
        with os.fdopen(reading, "rb", 0) as file:
            while data := await anyio.to_thread.run_sync(file.read, 65536):
                got += data
        return bytes(got)

    yield transport, protocol, received


@asynccontextmanager
async def stream(group: Any, _: Certificates) -> AsyncIterator[tuple[Any, Recorder, Callable[[], Any]]]:
    with listening() as listener:
        anyio_stream: SocketStream = await anyio.connect_tcp(*listener.getsockname())
        sock, _ = listener.accept()
    transport, protocol = await group.connect_stream(Recorder, anyio_stream)
    with Peer(sock) as peer:
        yield transport, protocol, lambda: received_from(peer)


async def received_from(peer: Peer) -> bytes:
    data = bytearray()
    try:
        while more := await peer.receive(1 << 18):
            data += more
    except OSError:  # It was reset, or ended without `close_notify`.
        pass
    peer.close()  # Over TLS the other end waits for `close_notify`.
    return bytes(data)


OVER_DESCRIPTORS = [tcp, pytest.param(unix, marks=needs_unix), tls, pytest.param(pipe, marks=needs_pipes)]
WAYS = pytest.mark.parametrize("connect", [*OVER_DESCRIPTORS, stream])

WRITES = pytest.mark.parametrize(
    "write",
    [
        lambda transport, data: transport.write(data),
        lambda transport, data: transport.writelines([data, b"behind it"]),
    ],
    ids=["write", "writelines"],
)


@pytest.mark.differs(
    "a `write` that fails after a part was sent (no memory for the rest, epoll is full)",
    asyncio="raises, and later data follows after a gap",
    here="`connection_lost` gets the error",
    why="data without a gap, or the end",
)
@WAYS
@WRITES
@pytest.mark.ours_only
async def test_w17_a_partly_sent_write_that_fails_ends_the_connection(
    stack: Stack, certificates: Certificates, connect: Any, write: Any
) -> None:
    message = bytearray(HUGE)
    async with stack.open() as group, connect(group, certificates) as (transport, protocol, received):
        contexts = collect_contexts(group)
        with no_memory():
            write(transport, message)
        assert transport.is_closing()
        transport.write(b"the next message")
        assert transport.get_write_buffer_size() == 0
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, MemoryError)
        assert [type(context["exception"]) for context in contexts] == [MemoryError]
        got = await received()
        assert len(got) < HUGE
        assert got == bytes(len(got))


@WAYS
@WRITES
@pytest.mark.ours_only("asyncio keeps the caller's buffer, and does not allocate memory here")
async def test_w17_a_failing_write_leaves_earlier_ones_alone(
    stack: Stack, certificates: Certificates, connect: Any, write: Any
) -> None:
    """Nothing of it was taken, and the caller knows."""
    message = bytearray(b"x") * HUGE
    async with stack.open() as group, connect(group, certificates) as (transport, protocol, received):
        contexts = collect_contexts(group)
        size = fill(transport)
        with no_memory(), pytest.raises(MemoryError):
            write(transport, message)
        del message
        assert not transport.is_closing()
        transport.write(b"the next message")
        transport.close()
        assert await received() == bytes(size) + b"the next message"
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert contexts == []


@pytest.mark.differs("a `write` that fails after a part was sent (no memory for the rest, epoll is full)")
@pytest.mark.skipif(sys.platform != "linux", reason="there is no epoll")
@pytest.mark.ours_only
@pytest.mark.parametrize(
    "connect",
    [*OVER_DESCRIPTORS[:-1], pytest.param(pipe, marks=[needs_pipes, pytest.mark.needs_polling("epoll is not asked")])],
)
@WRITES
async def test_w17_epoll_refuses_a_write_registration(
    stack: Stack, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, connect: Any, write: Any
) -> None:
    """ENOSPC of epoll (`max_user_watches`) for a transport that has paused reading, and so is not watched yet."""
    failure = OSError(errno.ENOSPC, "as the system would")

    def full(*_: object) -> None:
        raise failure

    async with stack.open() as group, connect(group, certificates) as (transport, protocol, received):
        contexts = collect_contexts(group)
        if connect is not pipe:
            transport.pause_reading()
        await turns()
        with monkeypatch.context() as patch:
            patch.setattr("transports_anyio._selector.EpollSelector.add", full)
            patch.setattr("transports_anyio._selector.EpollSelector.change", full)
            write(transport, bytes(4 << 20))
        assert transport.is_closing()
        transport.write(b"the next message")
        await protocol.wait_for("connection_lost")
        assert protocol.exception is failure
        assert contexts == []
        got = await received()
        assert 0 < len(got) < 4 << 20
        assert got == bytes(len(got))


# -- the recursion limit ----------------------------------------------------------------------------------------------


def never() -> None:
    raise AssertionError


#: In seconds: when timers of tests at the recursion limit run.
SOON = 0.01


@WAYS
@WRITES
@pytest.mark.parametrize("size", [10, 4 << 20])
@pytest.mark.ours_only("asyncio raises it and goes on with a gap in the data")
@needs_selector
async def test_w17_writing_near_the_recursion_limit(
    stack: Stack, certificates: Certificates, connect: Any, write: Any, size: int
) -> None:
    limit = sys.getrecursionlimit()
    ended = taken = refused = 0
    for spare in range(25):
        async with stack.open() as group, connect(group, certificates) as (transport, protocol, received):
            contexts = collect_contexts(group)
            raised = False
            try:
                at_depth(frames_left() - spare, lambda: write(transport, bytes(size)))
            except RecursionError:
                raised = True
            whole = size if write is WRITES.args[1][0] else size + len(b"behind it")
            closing = transport.is_closing()
            transport.write(b"the next message")
            transport.close()
            got = await received()
            await protocol.wait_for("connection_lost")
            if closing:
                ended += 1
                assert isinstance(protocol.exception, RecursionError)
                assert [type(context["exception"]) for context in contexts] == [RecursionError]
                assert b"the next message" not in got
            elif raised:
                refused += 1
                assert got == b"the next message"
            else:
                taken += 1
                assert len(got) == whole + len(b"the next message")
                assert got.endswith(b"the next message")
            assert sys.getrecursionlimit() == limit
    assert refused
    assert taken
    assert ended or size == 10


@pytest.mark.parametrize("event", ["write", "writelines", "close", "write_eof", "end of file", "readiness"])
@pytest.mark.ours_only("asyncio raises it and goes on with a gap in the data")
async def test_a_write_that_could_not_even_end_the_connection(stack: Stack, event: str) -> None:
    """At the recursion limit no function can be called. The next call or event ends the connection."""
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        spare = 1
        # With too few frames left the write is refused as a whole.
        while not transport.is_closing():
            with contextlib.suppress(RecursionError):
                at_depth(frames_left() - spare, lambda: transport.write(bytes(4 << 20)))
            spare += 1
        assert transport._state.name == "OPEN"
        await turns(3)
        if event == "write":
            transport.write(b"the next message")
        elif event == "writelines":
            transport.writelines([b"the next", b" message"])
        elif event == "close":
            transport.close()
        elif event == "write_eof":
            transport.write_eof()
            transport.close()
        elif event == "end of file":
            peer.shutdown()
        else:
            transport._channel.set_writing(True)
        got = await received_from(peer)
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, RecursionError)
        assert [type(context["exception"]) for context in contexts] == [RecursionError]
        assert got == bytes(len(got))
        assert len(got) < 4 << 20


@pytest.mark.ours_only("asyncio's call_soon does not wake its event loop")
async def test_w17_callbacks_scheduled_at_the_recursion_limit(stack: Stack) -> None:
    """A call that is refused runs nothing, and the iterations go on."""
    async with stack.open() as group:
        refused = 0
        for spare in range(25):
            await turns(3)  # The group waits again, so that the call has to wake it.
            ran: list[str] = []
            raised = False
            try:
                at_depth(frames_left() - spare, lambda ran=ran: group.call_soon(ran.append, "refused"))
            except RecursionError:
                raised = True
            refused += raised
            with anyio.fail_after(GUARD):
                await until(lambda ran=ran, raised=raised: raised or ran)
            group.call_soon(ran.append, "next")
            await until(lambda ran=ran: "next" in ran)
            assert ran == (["next"] if raised else ["refused", "next"])
        assert refused


@pytest.mark.ours_only("asyncio's own timers need no driver")
@pytest.mark.parametrize("name", ["call_later", "call_at"])
async def test_timers_set_at_the_recursion_limit(stack: Stack, name: str) -> None:
    """A call that is refused leaves no timer. Timers set before run on time, although nothing else wakes the group."""
    async with stack.open() as group:
        others = [group.call_later(3600 + number, never) for number in range(5)]  # The new one is compared with them.
        refused = 0
        for spare in range(50):
            ran: list[str] = []
            before_ran = anyio.Event()
            before = group.call_later(SOON, before_ran.set)
            await turns(3)  # The group waits again, so that the call has to move the end of the wait.
            when = before.when() - SOON * 0.9
            delay = when if name == "call_at" else SOON * 0.1
            pending = group.statistics().pending_timers
            raised = False
            try:
                at_depth(
                    frames_left() - spare,
                    lambda ran=ran, delay=delay: getattr(group, name)(delay, ran.append, "refused"),
                )
            except RecursionError:
                raised = True
            refused += raised
            assert group.statistics().pending_timers == pending + (not raised)
            with anyio.fail_after(GUARD):
                await before_ran.wait()
            await until(lambda ran=ran, raised=raised: raised or ran)
            assert ran == ([] if raised else ["refused"])
            assert group.statistics().pending_timers == len(others)
        assert refused
        assert not raised
        for other in others:
            other.cancel()


@pytest.mark.ours_only("asyncio cannot move a timer")
@pytest.mark.parametrize("delay", [0, 7200], ids=["earlier", "later"])
async def test_a_timer_moved_at_the_recursion_limit(stack: Stack, delay: float) -> None:
    """A call that is refused leaves the timer as it was, and it can be moved again."""
    async with stack.open() as group:
        others = [group.call_later(3500 + number, never) for number in range(5)]
        refused = 0
        for spare in range(50):
            ran = anyio.Event()
            before_ran = anyio.Event()
            moved = group.call_later(3600, ran.set)
            group.call_later(SOON, before_ran.set)
            when = moved.when()
            await turns(3)
            raised = False
            try:
                at_depth(frames_left() - spare, lambda moved=moved: moved.reschedule(delay))
            except RecursionError:
                raised = True
            refused += raised
            assert (moved.when() == when) is raised
            with anyio.fail_after(GUARD):
                await before_ran.wait()
            if raised or delay:
                assert not ran.is_set()
                moved.reschedule(0)
            with anyio.fail_after(GUARD):
                await ran.wait()
            assert group.statistics().pending_timers == len(others)
        assert refused
        assert not raised
        for other in others:
            other.cancel()


@pytest.mark.ours_only("asyncio's own call_soon_threadsafe leaves the callback behind")
async def test_callbacks_of_threads_scheduled_at_the_recursion_limit(stack: Stack) -> None:
    async with stack.open() as group:
        refused = 0
        for spare in range(50):
            await turns(3)
            ran: list[str] = []
            raised = False
            try:
                at_depth(frames_left() - spare, lambda ran=ran: group.call_soon_threadsafe(ran.append, "refused"))
            except RecursionError:
                raised = True
            refused += raised
            group.call_soon_threadsafe(ran.append, "next")
            with anyio.fail_after(GUARD):
                await until(lambda ran=ran: "next" in ran)
            assert ran == (["next"] if raised else ["refused", "next"])
        assert refused
        assert not raised


# -- datagrams --------------------------------------------------------------------------------------------------------


class Endpoint(DatagramProtocol):
    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.lost: list[Exception | None] = []

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


@asynccontextmanager
async def full_endpoint(group: Any) -> AsyncIterator[tuple[Any, Endpoint, socket.socket, int]]:
    """A datagram endpoint in which datagrams wait: the transport, its protocol, the peer, and how many were sent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        theirs.setblocking(False)
        transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=ours)
        sent = 0
        while not transport.get_write_buffer_size():
            transport.sendto(b"one")
            sent += 1
        yield transport, protocol, theirs, sent


async def datagrams(sock: socket.socket, count: int) -> list[bytes]:
    got: list[bytes] = []
    with anyio.fail_after(GUARD):
        while len(got) < count:
            try:
                got.append(sock.recv(100))
            except BlockingIOError:
                await anyio.sleep(0.001)
    return got


@pytest.mark.ours_only("asyncio of Python 3.13 copies too, and fails in another way")
@needs_unix
async def test_w17_sendto_without_memory(stack: Stack) -> None:
    message = bytearray(HUGE)
    async with stack.open() as group, full_endpoint(group) as (transport, protocol, peer, sent):
        with no_memory(), pytest.raises(MemoryError):
            transport.sendto(message)
        transport.sendto(b"the last")
        assert await datagrams(peer, sent + 1) == [b"one"] * sent + [b"the last"]
        assert not transport.is_closing()
        assert protocol.errors == []


@pytest.mark.skipif(sys.platform != "linux", reason="there is no epoll")
@pytest.mark.ours_only("asyncio raises it in sendto")
async def test_w17_sendto_that_cannot_wait(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this datagram is not sent; the endpoint lives on."""
    failure = OSError(errno.ENOSPC, "as the system would")

    def full(*_: object) -> None:
        raise failure

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        theirs.setblocking(False)
        async with stack.open() as group:
            transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=ours)
            sent = 0
            with monkeypatch.context() as patch:
                patch.setattr("transports_anyio._selector.EpollSelector.change", full)
                while not protocol.errors:
                    transport.sendto(b"one")
                    sent += 1
            assert protocol.errors == [failure]
            assert transport.get_write_buffer_size() == 0
            assert await datagrams(theirs, sent - 1) == [b"one"] * (sent - 1)
            transport.sendto(b"the last")
            assert await datagrams(theirs, 1) == [b"the last"]


@pytest.mark.ours_only("asyncio raises it in sendto")
@needs_unix
async def test_w17_sendto_near_the_recursion_limit(stack: Stack) -> None:
    limit = sys.getrecursionlimit()
    outcomes = set()
    for spare in range(20):  # From none at all: how many a call takes depends on what Python has specialized.
        async with stack.open() as group:
            collect_contexts(group)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with theirs:
                theirs.setblocking(False)
                transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=ours)
                sent = 0
                with ours.dup() as same:  # Full, and nothing waits in the transport yet.
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            same.send(b"one")
                            sent += 1
                raised = False
                try:
                    at_depth(frames_left() - spare, lambda: transport.sendto(b"deep"))  # noqa: B023
                except RecursionError:
                    raised = True
                closing = transport.is_closing()
                outcomes.add("ended" if closing else "raised" if raised else "taken")
                if closing:
                    transport.sendto(b"the last")
                    await until(lambda: protocol.lost)  # noqa: B023
                    assert isinstance(protocol.lost[0], RecursionError)
                else:
                    transport.sendto(b"the last")
                    got = await datagrams(theirs, sent + (1 if raised else 2))
                    assert got == [b"one"] * sent + ([] if raised else [b"deep"]) + [b"the last"]
        assert sys.getrecursionlimit() == limit
    assert outcomes == {"ended", "raised", "taken"}


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.differs("a `write` that fails after a part was sent (no memory for the rest, epoll is full)")
@pytest.mark.skipif(sys.platform != "linux", reason="there is no epoll")
@pytest.mark.ours_only
@pytest.mark.parametrize("native", [True, False])
async def test_w17_sendfile_that_cannot_wait(stack: Stack, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    failure = OSError(errno.ENOSPC, "as the system would")

    def full(*_: object) -> None:
        raise failure

    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        with tempfile.TemporaryFile() if native else open("/dev/zero", "rb") as file:
            if native:
                file.truncate(64 << 20)
            with monkeypatch.context() as patch:
                patch.setattr("transports_anyio._selector.EpollSelector.add", full)
                with anyio.fail_after(GUARD), pytest.raises(OSError) as caught:
                    await group.sendfile(transport, file, 0, 64 << 20)
        assert caught.value is failure
        await protocol.wait_for("connection_lost")
        assert protocol.exception is failure
        assert len(await received_from(peer)) < 64 << 20


@pytest.mark.ours_only("asyncio leaves the connection open, although its error has been reported")
@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.EHOSTUNREACH])
@needs_sendfile
async def test_w17_an_error_of_the_connection_in_sendfile(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The socket reports it once, here to `os.sendfile`. The file did not fail, so the fall-back is not used."""

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    async with stack.open() as group, connected(group) as (transport, protocol, _):
        with tempfile.TemporaryFile() as file:
            file.write(b"content")
            monkeypatch.setattr(os, "sendfile", fail)
            with anyio.fail_after(GUARD), pytest.raises(OSError) as caught:
                await group.sendfile(transport, file)
        assert caught.value.errno == code
        await protocol.wait_for("connection_lost")
        assert protocol.exception is caught.value


# -- after `close` ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connect", OVER_DESCRIPTORS)
@WRITES
async def test_writing_during_the_flush_of_close(
    stack: Stack, certificates: Certificates, connect: Any, write: Any
) -> None:
    """Sent over plain sockets; dropped over TLS and pipes."""
    async with stack.open() as group, connect(group, certificates) as (transport, protocol, received):
        if stack.is_oracle:
            group.protocols.append(protocol)
        size = fill(transport, 600_000)
        transport.close()
        lines = write is WRITES.args[1][1]
        if not (stack.is_oracle and lines):  # Which raises in asyncio of Python 3.13.
            write(transport, b"late")
        got = await received()
        await protocol.wait_for("connection_lost")
        assert got[:size] == bytes(size)
        if connect in (tls, pipe) or (stack.is_oracle and lines):
            assert got[size:] == b""
        else:
            assert got[size:] == (b"latebehind it" if lines else b"late")


@pytest.mark.ours_only("asyncio has no connection in memory")
async def test_w17_memory_connection(stack: Stack) -> None:
    async with stack.open() as group:
        (a, one), (_, other) = await memory_connection(group, PublicRecorder, PublicRecorder, buffer_size=1000)
        collect_contexts(group)
        message = bytearray(HUGE)
        with no_memory():
            a.write(message)
        a.write(b"the next message")
        with anyio.fail_after(GUARD):
            await other.wait_for("connection_lost")
            await one.wait_for("connection_lost")
        assert isinstance(one.exception, MemoryError)
        assert bytes(other.received) == bytes(len(other.received))
