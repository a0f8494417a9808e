"""Every method of the stream transport, called by a protocol or by its owner."""

from __future__ import annotations

import array
import asyncio
import asyncio.trsock
from typing import Any

import anyio
import pytest
from support import (
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    connected,
    fill,
    pattern,
    settle,
    turns,
    until,
)

pytestmark = pytest.mark.anyio


# -- what it is -----------------------------------------------------------------------------------------------


async def test_the_transport_is_an_asyncio_transport(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        assert isinstance(transport, asyncio.Transport)
        assert protocol.transport is transport


@pytest.mark.ours_only("the test is about the names of this package")
async def test_asyncios_classes_are_re_exported(stack: Stack) -> None:
    import transports_anyio

    for name in (
        "BaseTransport ReadTransport WriteTransport Transport DatagramTransport SubprocessTransport "
        "BaseProtocol Protocol BufferedProtocol DatagramProtocol SubprocessProtocol"
    ).split():
        assert getattr(transports_anyio, name) is getattr(asyncio, name)
        assert name in transports_anyio.__all__
    assert transports_anyio.TransportSocket is asyncio.trsock.TransportSocket
    assert "TransportSocket" in transports_anyio.__all__


async def test_extra_info(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        sock = transport.get_extra_info("socket")
        assert transport.get_extra_info("sockname") == peer.socket.getpeername() == sock.getsockname()
        assert transport.get_extra_info("peername") == peer.socket.getsockname() == sock.getpeername()
        assert sock.fileno() >= 0
        assert transport.get_extra_info("nothing of the kind") is None
        assert transport.get_extra_info("nothing of the kind", 42) == 42
        assert transport.get_extra_info("sslcontext", "plain") == "plain"


async def test_extra_info_outlives_the_connection(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        name = peer.socket.getsockname()
        transport.close()
        await protocol.wait_for("connection_lost")
        assert transport.get_extra_info("peername") == name


async def test_a_transport_takes_attributes(stack: Stack) -> None:
    """Programs store their own attributes on a transport, and tests replace its methods."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        transport.user = "somebody"
        assert transport.user == "somebody"
        written: list[bytes] = []
        transport.write = written.append
        transport.write(b"to the test")
        del transport.write
        transport.write(b"to the peer")
        assert await peer.receive_exactly(11) == b"to the peer"
        assert written == [b"to the test"]


async def test_the_callbacks_of_an_ordinary_connection(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        await peer.send(b"hello")
        assert await protocol.wait_received(5) == b"hello"
        transport.write(b"world")
        assert await peer.receive_exactly(5) == b"world"
        peer.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]
        assert protocol.exception is None
        assert type(protocol.calls[1][1]) is bytes


async def test_duck_typed_protocols_work(stack: Stack) -> None:
    class Duck:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.calls.append("connection_made")

        def data_received(self, data: bytes) -> None:
            self.calls.append("data_received")
            self.transport.write(data.upper())

        def eof_received(self) -> None:
            self.calls.append("eof_received")

        def connection_lost(self, exc: Exception | None) -> None:
            self.calls.append("connection_lost")

    duck = Duck()
    async with stack.open() as group, connected(group, duck) as (transport, _, peer):
        await peer.send(b"quack")
        assert await peer.receive_exactly(5) == b"QUACK"
        assert transport.get_protocol() is duck
        peer.shutdown()
        assert await peer.receive_all() == b""
    assert duck.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]


class StandIn:
    """A proxy object as some frameworks have them: any use fails."""

    def __init__(self) -> None:
        self.exception: list[BaseException | None] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: BaseException | None) -> None:
        self.exception.append(exc)

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


async def test_a_protocol_that_fails_when_it_is_looked_at(stack: Stack) -> None:
    """Only its own connection ends."""
    failing, other = StandIn(), Recorder()
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with connected(group, failing) as (_, _, peer), connected(group, other) as (_, _, other_peer):
            await peer.send(b"x")
            await until(lambda: failing.exception)
            await other_peer.send(b"still here")
            await other.wait_received(10)
    (context,) = contexts
    assert type(context["exception"]) is LookupError
    assert failing.exception == [context["exception"]]


@pytest.mark.ours_only("asyncio raises it in sendto")
async def test_a_datagram_protocol_that_fails_when_it_is_looked_at(stack: Stack) -> None:
    failing = StandIn()
    async with stack.open() as group:
        contexts = collect_contexts(group)
        transport, _ = await group.create_datagram_endpoint(lambda: failing, local_addr=(HOST, 0))
        name = transport.get_extra_info("sockname")
        transport.sendto(b"x" * 100_000, name)  # More than any datagram.
        transport.sendto(b"x", name)
        await until(lambda: len(contexts) == 2)
        transport.close()
    assert [type(context["exception"]) for context in contexts] == [LookupError, LookupError]
    assert failing.exception == [None]


# -- close and abort ------------------------------------------------------------------------------------------


async def test_close(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        assert not transport.is_closing()
        transport.close()
        assert transport.is_closing()
        assert protocol.count("connection_lost") == 0
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert protocol.count("eof_received") == 0
        assert await peer.receive_all() == b""
        transport.close()
        await settle(group)
        assert protocol.count("connection_lost") == 1
        assert transport.is_closing()


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_a_connection_aborted_by_another_receives_no_more(stack: Stack, kind: Any, end: str) -> None:
    """Both have received data, and are served in the same iteration."""
    protocols: list[Any] = []

    def end_the_other(protocol: Any, *_: Any) -> None:
        (other,) = (each for each in protocols if each is not protocol)
        getattr(other.transport, end)()

    hook = {"on_data_received" if kind is Recorder else "on_buffer_updated": end_the_other}
    protocols += [kind(**hook), kind(**hook)]
    first, second = protocols
    async with stack.open() as group:
        async with connected(group, first) as (_, _, peer), connected(group, second) as (_, _, other_peer):
            await turns()
            for each in (peer, other_peer):
                each.socket.send(b"x")
            await until(lambda: first.lost or second.lost)
            assert first.received + second.received == b"x"


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_no_resume_writing_after_abort_in_data_received(stack: Stack, end: str) -> None:
    """The socket becomes writable and readable in the same iteration."""
    protocol = Recorder(on_data_received=lambda p, _: getattr(p.transport, end)())
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        transport.pause_reading()
        written = fill(transport, 100_000)
        await turns()
        assert protocol.names[-1] == "pause_writing"
        transport.resume_reading()
        for _ in range(written):
            try:
                peer.socket.recv(1 << 20)
            except BlockingIOError:
                break
        peer.socket.send(b"x")
        if end == "close":
            await peer.receive_all()
        await protocol.wait_for("connection_lost")
        between = protocol.names[protocol.names.index("data_received") + 1 : -1]
        assert between == (["resume_writing"] if end == "close" else [])


async def test_is_reading_is_false_after_close(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        await peer.send(b"unread")
        fill(transport)
        transport.close()
        await peer.send(b"unread too")
        await settle(group)
        assert protocol.count("data_received") == 0
        transport.abort()


@pytest.mark.parametrize("buffered", [False, True])
async def test_abort_drops_what_is_buffered(stack: Stack, buffered: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        if buffered:
            fill(transport)
        transport.abort()
        assert transport.is_closing()
        assert transport.get_write_buffer_size() == 0
        assert protocol.count("connection_lost") == 0
        transport.abort()
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert await peer.gone()


@pytest.mark.parametrize("method", ["close", "abort"])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received", "connection_lost"])
async def test_ending_inside_a_callback(stack: Stack, method: str, callback: str) -> None:
    hook = {f"on_{callback}": lambda p, *_: getattr(p.transport, method)()}
    async with stack.open() as group, connected(group, Recorder(**hook)) as (_, protocol, peer):
        if callback != "connection_made":
            await peer.send(b"data")
            await protocol.wait_for("data_received")
            if callback != "data_received":
                peer.shutdown()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2] == ("eof_received" if callback == "connection_lost" else callback)
        assert protocol.exception is None


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_a_reset_by_the_peer(stack: Stack, kind: type[Recorder]) -> None:
    async with stack.open() as group, connected(group, kind()) as (transport, protocol, peer):
        peer.reset()
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionResetError)
        assert protocol.count("eof_received") == 0
        assert transport.is_closing()


async def test_a_reset_while_reading_is_paused_and_data_is_buffered(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        fill(transport)
        peer.reset()
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionError)
        assert protocol.count("data_received") == 0


async def test_connection_errors_are_not_reported_to_the_exception_handler(stack: Stack) -> None:
    contexts: list[Any] = []
    async with stack.open() as group:
        group.set_exception_handler(lambda _, context: contexts.append(context))
        async with connected(group) as (_, protocol, peer):
            peer.reset()
            await protocol.wait_for("connection_lost")
    assert contexts == []


# -- end of file and half-close ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
@pytest.mark.parametrize("answer", [None, False, 0])
async def test_end_of_file_closes_if_eof_received_returns_false(
    stack: Stack, kind: type[Recorder], answer: object
) -> None:
    protocol = kind(on_eof_received=lambda p: answer)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        transport.write(b"before")
        peer.shutdown()
        assert await peer.receive_all() == b"before"
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None


async def test_end_of_file_flushes_before_closing(stack: Stack) -> None:
    data = pattern(2 << 20)
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        transport.write(data)
        peer.shutdown()
        await protocol.wait_for("eof_received")
        assert transport.is_closing()
        assert await peer.receive_all() == data
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_eof_received_returning_true_keeps_the_sending_side(stack: Stack, kind: type[Recorder]) -> None:
    protocol = kind(on_eof_received=lambda p: "keep it")
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        await peer.send(b"question")
        peer.shutdown()
        await protocol.wait_for("eof_received")
        await settle(group)
        assert not transport.is_closing()
        assert protocol.count("connection_lost") == 0
        assert protocol.count("eof_received") == 1
        data = pattern(1 << 20)
        transport.write(data)
        assert await peer.receive_exactly(len(data)) == data
        transport.close()
        assert await peer.receive_all() == b""
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_a_half_closed_connection_notices_a_reset(stack: Stack) -> None:
    protocol = Recorder(on_eof_received=lambda p: True)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        peer.shutdown()
        await protocol.wait_for("eof_received")
        fill(transport)
        peer.reset()
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionError)


async def test_write_eof_flushes_and_leaves_the_receiving_side_open(stack: Stack) -> None:
    data = pattern(2 << 20)
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        assert transport.can_write_eof() is True
        transport.write(data)
        transport.write_eof()
        transport.write_eof()
        assert not transport.is_closing()
        assert await peer.receive_all() == data
        await peer.send(b"answer")
        assert await protocol.wait_received(6) == b"answer"
        assert protocol.count("connection_lost") == 0
        peer.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None


async def test_write_eof_with_nothing_buffered(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.write_eof()
        assert await peer.receive_all() == b""
        await peer.send(b"still here")
        assert await protocol.wait_received(10) == b"still here"


@pytest.mark.parametrize("clogged", [False, True])
async def test_writing_after_write_eof_is_a_runtime_error_and_sends_nothing(stack: Stack, clogged: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport) if clogged else 0
        transport.write_eof()
        size = transport.get_write_buffer_size()
        with pytest.raises(RuntimeError):
            transport.write(b"x")
        with pytest.raises(RuntimeError):
            transport.writelines([b"x"])
        assert transport.get_write_buffer_size() == size
        assert len(await peer.receive_all()) == written


async def test_write_eof_on_a_closed_transport_is_harmless(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        transport.close()
        transport.write_eof()
        await protocol.wait_for("connection_lost")
        transport.write_eof()
        assert protocol.exception is None


async def test_write_eof_then_close_flushes(stack: Stack) -> None:
    data = pattern(1 << 20)
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        transport.write(data)
        transport.write_eof()
        transport.close()
        assert await peer.receive_all() == data
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


# -- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clogged", [False, True])
async def test_what_write_accepts(stack: Stack, clogged: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport) if clogged else 0
        transport.write(b"bytes ")
        transport.write(bytearray(b"bytearray "))
        transport.write(memoryview(b"memoryview "))
        transport.write(memoryview(b"xxpart of onexx")[2:-2])
        transport.close()
        assert (await peer.receive_all())[written:] == b"bytes bytearray memoryview part of one"


@pytest.mark.parametrize("bad", ["text", 5, None, [b"x"], ...], ids=repr)
@pytest.mark.parametrize("clogged", [False, True])
async def test_write_refuses_anything_else(stack: Stack, bad: Any, clogged: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport) if clogged else 0
        size = transport.get_write_buffer_size()
        with pytest.raises(TypeError):
            transport.write(bad)
        assert transport.get_write_buffer_size() == size
        assert not transport.is_closing()
        transport.write(b"good")
        transport.close()
        assert (await peer.receive_all())[written:] == b"good"


async def test_write_refuses_an_array(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _peer):
        with pytest.raises(TypeError):
            transport.write(array.array("B", b"x"))


@pytest.mark.differs(
    "`writelines` with an invalid chunk",
    asyncio="the chunks before it are sent",
    here="nothing is sent",
    why="an error at the call leaves everything as it was",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("bad", ["text", 5, None])
@pytest.mark.parametrize("clogged", [False, True])
async def test_writelines_refuses_bad_chunks_and_sends_none(stack: Stack, bad: Any, clogged: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport) if clogged else 0
        with pytest.raises(TypeError):
            transport.writelines([b"good", bad, b"good"])
        transport.close()
        assert len(await peer.receive_all()) == written


@pytest.mark.parametrize("empty", [b"", bytearray(), memoryview(b"")], ids=["bytes", "bytearray", "view"])
@pytest.mark.parametrize("clogged", [False, True])
async def test_empty_data_is_ignored(stack: Stack, empty: Any, clogged: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        written = fill(transport) if clogged else 0
        size = transport.get_write_buffer_size()
        transport.write(empty)
        assert transport.get_write_buffer_size() == size
        transport.close()
        assert len(await peer.receive_all()) == written
        await protocol.wait_for("connection_lost")


async def test_writelines_keeps_the_order(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        transport.write(b"0")
        transport.writelines([b"1", bytearray(b"2"), memoryview(b"3")])
        transport.writelines(iter([b"4", b"5"]))
        transport.write(b"6")
        transport.close()
        assert await peer.receive_all() == b"0123456"


async def test_writes_from_connection_made_arrive(stack: Stack) -> None:
    protocol = Recorder(on_connection_made=lambda p, t: [t.write(b"hel"), t.writelines([b"lo"])])
    async with stack.open() as group, connected(group, protocol) as (_, _, peer):
        assert await peer.receive_exactly(5) == b"hello"


async def test_writes_to_a_lost_connection_are_dropped_with_a_warning_from_the_fifth_on(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        transport.abort()
        await protocol.wait_for("connection_lost")
        with capture_log(stack) as records:
            counts = []
            for _ in range(8):
                transport.write(b"dropped")
                counts.append(len(records))
        # An abort counts as the first of the failures, as on asyncio.
        assert counts == [0, 0, 0, 0, 1, 2, 3, 4]
        assert {record.levelname for record in records} == {"WARNING"}
        assert transport.get_write_buffer_size() == 0


async def test_bytes_written_in_one_iteration_arrive_in_order(stack: Stack) -> None:
    data = pattern(3 << 20)
    async with stack.open() as group, connected(group, small=True) as (transport, _, peer):
        for start in range(0, len(data), 7777):
            transport.write(data[start : start + 7777])
        transport.close()
        assert await peer.receive_all() == data


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_pausing_and_resuming_reading(stack: Stack, kind: type[Recorder]) -> None:
    async with stack.open() as group, connected(group, kind()) as (transport, protocol, peer):
        assert transport.is_reading()
        transport.pause_reading()
        transport.pause_reading()
        assert not transport.is_reading()
        await peer.send(b"held back")
        await settle(group)
        assert protocol.received == b""
        transport.resume_reading()
        transport.resume_reading()
        assert transport.is_reading()
        assert protocol.received == b""  # never from inside a call
        assert await protocol.wait_received(9) == b"held back"


async def test_end_of_file_waits_while_reading_is_paused(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        await peer.send(b"last words")
        peer.close()
        await settle(group)
        assert protocol.names == ["connection_made"]
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == b"last words"
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]


async def test_pausing_in_connection_made_stops_all_reading(stack: Stack) -> None:
    protocol = Recorder(on_connection_made=lambda p, transport: transport.pause_reading())
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        await peer.send(b"x")
        await settle(group)
        assert not transport.is_reading()
        assert protocol.received == b""
        transport.resume_reading()
        await protocol.wait_received(1)


async def test_pausing_inside_data_received(stack: Stack) -> None:
    protocol = Recorder(on_data_received=lambda p, data: p.transport.pause_reading())
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        size = 4 << 20
        received = 0

        async def send() -> None:
            await peer.send(bytes(size))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            turn = 0
            while received < size:
                turn += 1
                await protocol.wait_for("data_received", turn)
                await turns(3)
                assert protocol.count("data_received") == turn
                received = len(protocol.received)
                transport.resume_reading()


async def test_reading_methods_are_harmless_after_close(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        await peer.send(b"never read")
        transport.close()
        assert not transport.is_reading()
        transport.pause_reading()
        transport.resume_reading()
        assert not transport.is_reading()
        await protocol.wait_for("connection_lost")
        transport.pause_reading()
        transport.resume_reading()
        assert not transport.is_reading()
        await settle(group)
        assert protocol.count("data_received") == 0


# -- the protocol ---------------------------------------------------------------------------------------------------


async def test_setting_another_protocol(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, first, peer):
        await peer.send(b"one")
        await first.wait_received(3)
        second = Recorder()
        second.take_over(transport)
        assert transport.get_protocol() is first
        transport.set_protocol(second)
        assert transport.get_protocol() is second
        assert second.calls == []
        await peer.send(b"two")
        assert await second.wait_received(3) == b"two"
        peer.close()
        await second.wait_for("connection_lost")
        assert first.received == b"one"
        assert first.count("connection_lost") == 0
        first.hand_over()


async def test_a_buffered_protocol_receives_into_its_own_buffer(stack: Stack) -> None:
    data = pattern(100_000)
    async with stack.open() as group, connected(group, BufferedRecorder(buffer_size=1000)) as (_, protocol, peer):
        await peer.send(data)
        assert await protocol.wait_received(len(data)) == data
        assert all(call[1] <= 1000 for call in protocol.calls if call[0] == "buffer_updated")
        hints = [call[1] for call in protocol.calls if call[0] == "get_buffer"]
        assert all(isinstance(hint, int) for hint in hints)


async def test_get_buffer_may_return_part_of_a_larger_buffer(stack: Stack) -> None:
    whole = bytearray(64)
    places: list[int] = []

    def part(protocol: BufferedRecorder, hint: int) -> memoryview:
        return memoryview(whole)[10:20]

    def updated(protocol: BufferedRecorder, count: int) -> None:
        places.append(count)

    protocol = BufferedRecorder(on_get_buffer=part, on_buffer_updated=updated)
    async with stack.open() as group, connected(group, protocol) as (_, _, peer):
        await peer.send(b"0123456789")
        await protocol.wait_for("buffer_updated")
        await protocol.wait_until(lambda: sum(places) == 10)
        if places == [10]:
            assert whole == bytes(10) + b"0123456789" + bytes(44)


async def test_the_server_side_is_the_same_transport(stack: Stack) -> None:
    protocol = Recorder(on_data_received=lambda p, data: p.transport.write(data.upper()))
    async with stack.open() as group:
        server = await group.create_server(lambda: protocol, HOST, 0)
        with Peer.connect(server.sockets[0].getsockname()) as peer:
            await peer.send(b"shout")
            assert await peer.receive_exactly(5) == b"SHOUT"
            assert isinstance(protocol.transport, asyncio.Transport)
            assert protocol.transport.get_extra_info("peername") == peer.socket.getsockname()
        await protocol.wait_for("connection_lost")
        server.close()
