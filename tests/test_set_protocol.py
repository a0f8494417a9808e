"""A protocol that takes over a connection: what `set_protocol` and `start_tls` refuse, and the new one's callbacks."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import anyio
import pytest
from network import needs_pipes, needs_unix
from support import GUARD, BufferedRecorder, Peer, Recorder, Stack, collect_contexts, connected, fill, settle, until
from tls_support import NAME, Certificates, TLSPeer, together

from transports_anyio import DatagramProtocol, Protocol, SubprocessProtocol, TransportGroup
from transports_anyio.testing import DatagramRecorder, Recorder as PublicRecorder, SubprocessRecorder

pytestmark = pytest.mark.anyio


class ClassMethods:
    """A class that is a protocol itself."""

    lost: list[object]

    @classmethod
    def connection_lost(cls, exc: object) -> None:
        cls.lost.append(exc)


class WithoutConnectionMade:
    """`connection_made` is never called on a later protocol."""

    def __init__(self) -> None:
        self.received = b""
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> None: ...

    def connection_lost(self, exc: object) -> None:
        self.lost = True


async def coroutine() -> None: ...


@pytest.mark.differs(
    "`get_buffer` sets a protocol that is no `BufferedProtocol`",
    asyncio="calls its `buffer_updated`, which it does not have: the connection ends, what was received is lost",
    here="calls its `data_received`",
    why="a protocol may hand its connection over in any callback",
)
async def test_get_buffer_sets_a_protocol_without_a_buffer(stack: Stack) -> None:
    successor = Recorder()

    def hand_over(recorder: Any, sizehint: int) -> None:
        successor.take_over(recorder.transport)
        recorder.hand_over()
        recorder.transport.set_protocol(successor)

    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with connected(group, BufferedRecorder(on_get_buffer=hand_over)) as (_, first, peer):
            await peer.send(b"hello")
            if stack.is_oracle:
                await successor.wait_for("connection_lost")
                assert "buffer_updated" in contexts[0]["message"]
            else:
                assert await successor.wait_received(5) == b"hello"
                assert first.count("buffer_updated") == 0
                assert not contexts


NO_PROTOCOLS = [None, 3, "protocol", object(), Protocol, Recorder, len, coroutine]


def check_refusals(name: str, transport: Any) -> None:
    before = transport.get_protocol()
    for wrong in NO_PROTOCOLS:
        with pytest.raises(TypeError, match=rf"^{name}\(\) takes a protocol"):
            transport.set_protocol(wrong)
    with pytest.raises(TypeError, match="got the coroutine"):
        transport.set_protocol(coroutine())
    assert transport.get_protocol() is before


@pytest.mark.differs(
    "`set_protocol` or `start_tls` with a class, or an object without `connection_lost`",
    asyncio="accepted; every callback fails",
    here="`TypeError`",
    why="the traceback shows the line with the mistake",
)
@pytest.mark.ours_only
@needs_pipes
async def test_r8_set_protocol_refuses_a_non_protocol(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        async with connected(group) as (transport, protocol, peer):
            check_refusals("set_protocol", transport)
            await peer.send(b"as before")
            assert await protocol.wait_received(9) == b"as before"
        endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, ("127.0.0.1", 0))
        check_refusals("set_protocol", endpoint)
        reading, writing = os.pipe()
        for connect, fd, mode in (
            (group.connect_read_pipe, reading, "rb"),
            (group.connect_write_pipe, writing, "wb"),
        ):
            transport, _ = await connect(Protocol, os.fdopen(fd, mode, 0))
            check_refusals("set_protocol", transport)
        child, _ = await group.subprocess_exec(SubprocessProtocol, "cat")
        check_refusals("set_protocol", child)
        check_refusals("set_protocol", child.get_pipe_transport(0))
        child.close()


@pytest.mark.differs("`set_protocol` or `start_tls` with a class, or an object without `connection_lost`")
@pytest.mark.ours_only
async def test_r8_start_tls_refuses_a_non_protocol(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        for wrong in NO_PROTOCOLS:
            with pytest.raises(TypeError, match=r"^start_tls\(\) takes a protocol"):
                await group.start_tls(transport, wrong, certificates.client(), server_hostname=NAME)
        assert transport.get_protocol() is protocol
        await peer.send(b"in the clear")  # The connection is as before.
        assert await protocol.wait_received(12) == b"in the clear"
        _, tls_peer = await together(
            lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME),
            lambda: TLSPeer.wrap(peer.socket, certificates.server(), server_side=True),
        )
        tls_peer.close()


async def test_set_protocol_accepts_duck_types(stack: Stack) -> None:
    """Any object with `connection_lost`: also a class with class methods, and one without `connection_made`."""
    ClassMethods.lost = []
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        protocol.hand_over()  # Another protocol gets `connection_lost`.
        other = WithoutConnectionMade()
        transport.set_protocol(other)
        await peer.send(b"hello")
        await until(lambda: other.received == b"hello")
        transport.set_protocol(ClassMethods)
        transport.close()
        await until(lambda: ClassMethods.lost == [None])


# -- pauses -----------------------------------------------------------------------------------------------------------


@pytest.mark.differs("`set_protocol` while writing is paused")
@pytest.mark.ours_only
@pytest.mark.parametrize("drained", ["later", "at once"])
async def test_r8_a_protocol_that_is_set_while_writing_is_paused(stack: Stack, drained: str) -> None:
    async with stack.open() as group, connected(group, PublicRecorder(), small=True) as (transport, first, peer):
        assert not transport.is_writing_paused()
        size = fill(transport, 65537)
        assert first.writing_paused
        assert transport.is_writing_paused()
        second = PublicRecorder(transport=transport)
        transport.set_protocol(second)
        assert transport.is_writing_paused()
        assert second.names == []  # Not before `set_protocol` has returned.
        if drained == "at once":
            transport.set_write_buffer_limits(high=size, low=size)
            assert not transport.is_writing_paused()
            assert second.names == ["pause_writing", "resume_writing"]
        else:
            with anyio.fail_after(GUARD):
                await second.wait_for("pause_writing")
        assert len(await peer.receive_exactly(size)) == size
        with anyio.fail_after(GUARD):
            await second.wait_for("resume_writing")
        assert not transport.is_writing_paused()
        await settle(group)
        assert second.names == ["pause_writing", "resume_writing"]
        assert first.names == ["connection_made", "pause_writing"]
        transport.close()
        with anyio.fail_after(GUARD):
            await second.wait_for("connection_lost")
        second.check()
        first.check()


@pytest.mark.differs("`set_protocol` while writing is paused")
@pytest.mark.ours_only
async def test_setting_a_protocol_back_within_an_iteration_pauses_it_once(stack: Stack) -> None:
    async with stack.open() as group, connected(group, PublicRecorder(), small=True) as (transport, first, peer):
        size = fill(transport, 65537)
        transport.set_protocol(first)
        transport.set_protocol(second := PublicRecorder(transport=transport))
        transport.set_protocol(first)
        await settle(group)
        assert first.count("pause_writing") == 1
        assert second.names == []
        assert len(await peer.receive_exactly(size)) == size
        with anyio.fail_after(GUARD):
            await first.wait_for("resume_writing")
        transport.close()
        with anyio.fail_after(GUARD):
            await first.wait_for("connection_lost")
        first.check()


@pytest.mark.differs("`set_protocol` while writing is paused")
@pytest.mark.ours_only
async def test_a_protocol_that_calls_set_protocol_in_pause_writing(stack: Stack) -> None:
    class PassingOn(PublicRecorder):
        def pause_writing(self) -> None:
            super().pause_writing()
            self.transport.set_protocol(last)

    async with stack.open() as group, connected(group, PublicRecorder(), small=True) as (transport, _, peer):
        last = PublicRecorder(transport=transport)
        size = fill(transport, 65537)
        middle = PassingOn(transport=transport)
        transport.set_protocol(middle)
        transport.set_write_buffer_limits(high=size, low=size)  # Writing could go on now.
        with anyio.fail_after(GUARD):
            await last.wait_for("resume_writing")
        assert middle.names == ["pause_writing"]
        assert last.names == ["pause_writing", "resume_writing"]
        assert len(await peer.receive_exactly(size)) == size
        transport.close()
        with anyio.fail_after(GUARD):
            await last.wait_for("connection_lost")
        last.check()
        middle.check()


@pytest.mark.differs("`set_protocol` while writing is paused")
@pytest.mark.ours_only
@needs_unix
async def test_datagrams_that_wait_while_a_protocol_is_set(stack: Stack) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        theirs.setblocking(False)
        async with stack.open() as group:
            transport, first = await group.create_datagram_endpoint(DatagramRecorder, sock=ours)
            sent = 0
            while not transport.is_writing_paused():
                transport.sendto(bytes(1000))
                sent += 1
            second = DatagramRecorder(transport=transport)
            transport.set_protocol(second)
            assert transport.is_writing_paused()
            with anyio.fail_after(GUARD):
                await second.wait_for("pause_writing")
                while sent:
                    try:
                        theirs.recv(2000)
                        sent -= 1
                    except BlockingIOError:
                        await anyio.sleep(0.001)
                await second.wait_for("resume_writing")
                transport.close()
                await second.wait_for("connection_lost")
    assert first.names == ["connection_made", "pause_writing"]
    first.check()
    second.check()


@needs_pipes
async def test_r8_a_protocol_of_a_child_that_is_set_while_writing_is_paused(anyio_backend: Any) -> None:
    program = "import sys; sys.stdin.buffer.readline(); print(len(sys.stdin.buffer.read()))"
    async with TransportGroup() as group:
        transport, first = await group.subprocess_exec(SubprocessRecorder, sys.executable, "-c", program)
        stdin = transport.get_pipe_transport(0)
        assert not transport.is_writing_paused()  # type: ignore[attr-defined]
        stdin.write(bytes(4 << 20))
        assert transport.is_writing_paused()  # type: ignore[attr-defined]
        second = SubprocessRecorder(transport=transport)
        transport.set_protocol(second)
        with anyio.fail_after(GUARD):
            await second.wait_for("pause_writing")
            stdin.write(b"\nrest")
            await second.wait_for("resume_writing")
            assert not transport.is_writing_paused()  # type: ignore[attr-defined]
            stdin.close()
            await second.wait_for("connection_lost")
        first.check()
        second.check()
        assert bytes(second.received[1]) == b"4\n"
        assert first.names == ["connection_made", "pause_writing"]


@pytest.mark.differs("`set_protocol` while writing is paused")
@pytest.mark.ours_only
async def test_r8_start_tls_while_writing_is_paused(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group, PublicRecorder(), small=True) as (transport, first, peer):
        size = fill(transport, 65537)
        second = PublicRecorder(transport=transport)

        async def upgrade() -> TLSPeer:
            assert len(await peer.receive_exactly(size)) == size
            return await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True)

        upgraded, tls_peer = await together(
            lambda: group.start_tls(transport, second, certificates.client(), server_hostname=NAME), upgrade
        )
        with anyio.fail_after(GUARD):
            await second.wait_for("resume_writing")
        assert second.names == ["pause_writing", "resume_writing"]
        assert not upgraded.is_writing_paused()
        assert first.names == ["connection_made", "pause_writing"]
        with tls_peer:
            await tls_peer.send(b"x")
            with anyio.fail_after(GUARD):
                await second.wait_received(1)
        with anyio.fail_after(GUARD):
            await second.wait_for("connection_lost")
        second.check()


# -- the end of file --------------------------------------------------------------------------------------------------


@pytest.mark.ours_only("asyncio has no is_writing_paused() and is_eof_received()")
@pytest.mark.parametrize("over", ["tcp", pytest.param("unix", marks=needs_unix), "stream"])
async def test_r8_a_new_protocol_can_ask_for_the_state(stack: Stack, over: str) -> None:
    class KeepOpen(Protocol):
        def eof_received(self) -> bool:
            return True

    async with stack.open() as group:
        ours, theirs = socket.socketpair()
        first = PublicRecorder(KeepOpen())
        if over == "stream":
            stream = await anyio.abc.UNIXSocketStream.from_socket(ours)
            transport, _ = await group.connect_stream(lambda: first, stream)
        elif over == "unix":
            transport, _ = await group.create_unix_connection(lambda: first, sock=ours)
        else:
            ours.close()
            theirs.close()
            server = socket.create_server(("127.0.0.1", 0))
            with server:
                transport, _ = await group.create_connection(lambda: first, *server.getsockname())
                theirs, _ = server.accept()
        with Peer(theirs) as peer:
            assert transport.is_eof_received() is False
            peer.shutdown()
            with anyio.fail_after(GUARD):
                await first.wait_for("eof_received")
            assert transport.is_eof_received() is True
            third = PublicRecorder(transport=transport)
            third.data_received(b"late")  # It knows that no more data can come.
            with pytest.raises(AssertionError, match=r"data_received\(\) after"):
                third.check(finished=False)
            second = PublicRecorder(transport=transport)
            transport.set_protocol(second)
            await settle(group)
            assert second.names == []
            transport.write(b"answer")
            transport.close()
            assert await peer.receive_all() == b"answer"
            with anyio.fail_after(GUARD):
                await second.wait_for("connection_lost")
            assert transport.is_eof_received() is True
            second.check()
