"""Receiving: end of file, bad buffers, fairness, changing protocols, and no re-entrant callbacks."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import anyio
import pytest
from network import needs_unix
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
    pattern,
    peer_process,
    until,
)

from transports_anyio._channels._socket import DIRECT_SIZE

pytestmark = pytest.mark.anyio


async def test_r1_end_of_file_reaches_a_buffered_protocol_as_end_of_file(stack: Stack) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with connected(group, BufferedRecorder()) as (_, protocol, peer):
            await peer.send(b"bye")
            peer.shutdown()
            await protocol.wait_for("connection_lost")
            assert protocol.received == b"bye"
            assert protocol.names[-2:] == ["eof_received", "connection_lost"]
            assert protocol.exception is None
        assert contexts == []


def _raise(*_: object) -> None:
    raise RuntimeError("no buffer today")


@pytest.mark.parametrize(
    "get_buffer",
    [
        pytest.param(lambda p, hint: bytearray(), id="empty"),
        pytest.param(lambda p, hint: b"read only", id="read only"),
        pytest.param(lambda p, hint: "no buffer", id="no buffer at all"),
        pytest.param(_raise, id="raises"),
    ],
)
async def test_r2_a_bad_buffer_ends_the_connection_with_a_report(stack: Stack, get_buffer: Any) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with connected(group, BufferedRecorder(on_get_buffer=get_buffer)) as (transport, protocol, peer):
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
            assert protocol.count("get_buffer") == 1
            assert protocol.count("buffer_updated") == 0
            (context,) = contexts
            assert isinstance(context["exception"], (RuntimeError, TypeError))
            assert protocol.exception is context["exception"]
            assert context["transport"] is transport
            assert context["protocol"] is protocol
            assert isinstance(context["message"], str)
            assert await peer.gone()


@pytest.mark.ours_only("asyncio leaves fairness to its event loop")
async def test_r5_a_flood_does_not_starve_the_others(stack: Stack) -> None:
    """While one peer sends without end, each of many others gets its echo; counted in callbacks of the flood."""
    flood = Recorder()
    flood.hooks["data_received"] = lambda p, data: (p.received.clear(), p.calls.clear())[0]
    echoes: list[Recorder] = []

    def echo() -> Recorder:
        echoes.append(Recorder(on_data_received=lambda p, data: p.transport.write(data)))
        return echoes[-1]

    async with stack.open() as group:
        flooded = await group.create_server(lambda: flood, HOST, 0)
        server = await group.create_server(echo, HOST, 0)
        async with peer_process("flood", flooded.sockets[0].getsockname()[1]) as process:
            assert await process.line() == "connected"
            peers = [Peer.connect(server.sockets[0].getsockname()) for _ in range(50)]
            try:
                for turn in range(5):
                    message = b"%d" % turn
                    for peer in peers:
                        await peer.send(message)
                    for peer in peers:
                        assert await peer.receive_exactly(len(message)) == message
            finally:
                for peer in peers:
                    peer.close()
            fired = anyio.Event()
            group.call_later(0, fired.set)
            with anyio.fail_after(10):
                await fired.wait()
        await flood.wait_until(lambda: flood.lost)
        flooded.close()
        server.close()


async def test_r6_the_next_event_goes_to_the_new_protocol_in_its_style(stack: Stack) -> None:
    """Switch from one style to the other and back inside each callback that receives."""
    order: list[tuple[int, bytes]] = []
    total = pattern(40_000)

    def next_style(protocol: Any, *_: Any) -> None:
        received = protocol.calls[-1]
        number = protocol.number
        order.append((number, bytes(protocol.received)))
        del received
        kind = BufferedRecorder if isinstance(protocol, Recorder) else Recorder
        hook = "on_data_received" if kind is Recorder else "on_buffer_updated"
        successor: Any = kind(**{hook: next_style})
        successor.number = number + 1
        successor.take_over(protocol.transport)
        protocol.hand_over()
        protocol.transport.set_protocol(successor)

    first: Any = Recorder(on_data_received=next_style)
    first.number = 0
    async with stack.open() as group, connected(group, first) as (transport, _, peer):
        await peer.send(total)
        await_end = anyio.fail_after(15)
        with await_end:
            while sum(len(data) for _, data in order) < len(total):
                await anyio.sleep(0.001)
        assert b"".join(data for _, data in order) == total
        assert [number for number, _ in order] == list(range(len(order)))
        # The last protocol gets the end of file.
        last = transport.get_protocol()
        peer.close()
        await last.wait_for("connection_lost")
        buffered = ["get_buffer"] if isinstance(last, BufferedRecorder) else []
        assert last.names == [*buffered, "eof_received", "connection_lost"]


@pytest.mark.parametrize("method", ["close", "abort", "write_eof", "resume_reading", "write"])
async def test_no_method_calls_back_before_it_returns(stack: Stack, method: str) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        await peer.send(b"data")
        peer.shutdown()
        before = list(protocol.names)
        if method == "write":
            fill(transport)
            before = [*before, *protocol.names[len(before) :]]
            assert set(before) <= {"connection_made", "pause_writing"}
        else:
            getattr(transport, method)()
            assert protocol.names == before
        transport.abort()
        assert "connection_lost" not in protocol.names


async def test_no_callback_is_entered_inside_another(stack: Stack) -> None:
    """`check` of the recorder fails for a nested callback; here everything is called everywhere."""

    def everything(protocol: Recorder, *_: Any) -> None:
        transport = protocol.transport
        transport.pause_reading()
        transport.resume_reading()
        if not transport.is_closing():
            transport.write(bytes(100_000))

    protocol = Recorder(on_connection_made=everything, on_data_received=everything, on_resume_writing=everything)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        for _ in range(5):
            await peer.send(b"x")
            await peer.receive_exactly(100_000)
        transport.abort()
        await protocol.wait_for("connection_lost")
    assert protocol.violations == []


async def test_bytes_arrive_in_order_and_complete(stack: Stack) -> None:
    data = pattern(8 << 20)
    async with stack.open() as group, connected(group) as (_, protocol, peer):
        await peer.send(data)
        assert await protocol.wait_received(len(data)) == data


async def test_data_received_gets_its_own_bytes_object(stack: Stack) -> None:
    """What was received stays as it was when more comes."""
    async with stack.open() as group, connected(group) as (_, protocol, peer):
        await peer.send(b"first")
        await protocol.wait_received(5)
        await peer.send(b"SECOND")
        await protocol.wait_received(11)
        assert b"".join(call[1] for call in protocol.calls if call[0] == "data_received") == b"firstSECOND"


# -- how much at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DIRECT_SIZE - 1, DIRECT_SIZE, DIRECT_SIZE + 1, 2 * DIRECT_SIZE])
# Over TCP a reset may overtake data.
@pytest.mark.parametrize("then", ["nothing", "the end", pytest.param("a reset", marks=needs_unix)])
async def test_received_data_comes_in_one_piece(stack: Stack, size: int, then: str) -> None:
    """For every way to receive; what follows the data, also an error, is delivered after it."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    data = pattern(size)
    with anyio.fail_after(GUARD), theirs:
        async with stack.open() as group:
            transport, protocol = await group.connect_accepted_socket(Recorder, ours)
            if then == "a reset":
                transport.write(b"never read")
            theirs.sendall(data)
            if then != "nothing":
                theirs.close()
            await protocol.wait_for("data_received")
            assert protocol.received == data
            assert protocol.count("data_received") == 1
            if then == "nothing":
                for piece in (data, b"more", data, data):
                    before = bytes(protocol.received)
                    theirs.sendall(piece)
                    await until(lambda before=before: len(protocol.received) > len(before))
                    assert protocol.received == before + piece
                transport.close()
            await protocol.wait_for("connection_lost")
            if then == "a reset":
                assert isinstance(protocol.exception, ConnectionResetError)
            else:
                assert protocol.exception is None


@pytest.mark.parametrize("size", [DIRECT_SIZE - 1, DIRECT_SIZE, DIRECT_SIZE + 1])
async def test_a_reset_after_data_reaches_the_new_protocol(stack: Stack, size: int) -> None:
    """A `BufferedProtocol`, which receives in another way than the one before it."""
    buffer = bytearray(1000)
    ends: list[Exception | None] = []
    ended = anyio.Event()

    class Second(asyncio.BufferedProtocol):
        def get_buffer(self, sizehint: int) -> bytearray:
            return buffer

        def connection_lost(self, exc: Exception | None) -> None:
            ends.append(exc)
            ended.set()

    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    class First(asyncio.Protocol):
        received = b""

        def data_received(self, data: bytes) -> None:
            self.received += data
            transport.set_protocol(Second())

    with anyio.fail_after(GUARD), theirs:
        async with stack.open() as group:
            transport, protocol = await group.connect_accepted_socket(First, ours)
            transport.write(b"never read")
            theirs.sendall(pattern(size))
            theirs.close()
            await ended.wait()
            assert protocol.received == pattern(size)
            assert [type(exc) for exc in ends] == [ConnectionResetError]
