"""Flow control of writing: watermarks, buffer sizes, and data that must not be lost."""

from __future__ import annotations

import array
import collections
import hashlib
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support import (
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    capture_log,
    connected,
    fill,
    pattern,
    peer_process,
    settle,
    turns,
    until,
)

from transports_anyio._transports import _flow_control

pytestmark = pytest.mark.anyio


# -- watermarks ---------------------------------------------------------------------------------------------


async def test_the_default_limits(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _peer):
        assert transport.get_write_buffer_limits() == (16384, 65536)


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (16384, 65536)),
        ({"high": 1000}, (250, 1000)),
        ({"high": 1003}, (250, 1003)),
        ({"low": 100}, (100, 400)),
        ({"high": 10, "low": 10}, (10, 10)),
        ({"high": 0}, (0, 0)),
        ({"high": 0, "low": 0}, (0, 0)),
        ({"low": 0}, (0, 0)),
        ({"high": 7, "low": 0}, (0, 7)),
    ],
)
async def test_limits_that_are_not_given_follow_from_the_others(
    stack: Stack, given: dict[str, int], limits: tuple[int, int]
) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _peer):
        transport.set_write_buffer_limits(high=1, low=1)
        transport.set_write_buffer_limits(**given)
        assert transport.get_write_buffer_limits() == limits


@pytest.mark.parametrize("given", [{"high": 5, "low": 6}, {"low": -1}, {"high": -4}, {"high": 1, "low": -1}])
async def test_a_bad_pair_of_limits_is_refused_and_changes_nothing(stack: Stack, given: dict[str, int]) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _peer):
        transport.set_write_buffer_limits(high=20, low=10)
        with pytest.raises(ValueError):
            transport.set_write_buffer_limits(**given)
        assert transport.get_write_buffer_limits() == (10, 20)


async def test_writing_is_paused_only_strictly_above_the_high_limit(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _peer):
        transport.set_write_buffer_limits(high=1 << 30)
        fill(transport)
        size = transport.get_write_buffer_size()
        transport.set_write_buffer_limits(high=size + 10)
        transport.write(b"0123456789")
        assert transport.get_write_buffer_size() == size + 10
        assert protocol.count("pause_writing") == 0
        transport.write(b"x")
        assert protocol.count("pause_writing") == 1
        transport.write(b"yz")
        assert protocol.count("pause_writing") == 1
        assert transport.get_write_buffer_size() == size + 13
        transport.abort()


async def test_pause_writing_comes_from_inside_write(stack: Stack) -> None:
    seen = []
    protocol = Recorder(on_pause_writing=lambda p: seen.append(p.transport.get_write_buffer_size()))
    async with stack.open() as group, connected(group, protocol) as (transport, _, _peer):
        transport.set_write_buffer_limits(high=10)
        fill(transport)
        assert len(seen) == 1
        assert seen[0] > 10
        transport.abort()


async def test_writing_is_resumed_at_the_low_limit(stack: Stack) -> None:
    sizes = []
    protocol = Recorder(on_resume_writing=lambda p: sizes.append(p.transport.get_write_buffer_size()))
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        transport.set_write_buffer_limits(high=200_000, low=100_000)
        written = fill(transport, 200_001)
        assert protocol.count("pause_writing") == 1
        assert await peer.receive_exactly(written) == bytes(written)
        await protocol.wait_for("resume_writing")
        assert protocol.count("resume_writing") == 1
        assert sizes[0] <= 100_000
        await until(lambda: transport.get_write_buffer_size() == 0)


@pytest.mark.parametrize("with_writelines", [False, True])
async def test_limits_of_zero_pause_on_the_first_buffered_byte_and_resume_when_empty(
    stack: Stack, with_writelines: bool
) -> None:
    sizes = []
    protocol = Recorder(on_resume_writing=lambda p: sizes.append(p.transport.get_write_buffer_size()))
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        transport.set_write_buffer_limits(high=0)
        # Small enough for the kernel: nothing is buffered, so nothing pauses.
        transport.write(b"x")
        assert transport.get_write_buffer_size() == 0
        assert protocol.count("pause_writing") == 0
        data = pattern(1 << 20)
        if with_writelines:
            stack.needs_python(3, 14, 10, why="writelines never pauses (CPython 127655)")
            transport.writelines([data[:9], data[9:]])
        else:
            transport.write(data)
        assert protocol.count("pause_writing") == 1
        assert await peer.receive_exactly(1 + len(data)) == b"x" + data
        await protocol.wait_for("resume_writing")
        assert sizes == [0]


async def test_lowering_the_limits_pauses_at_once(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _peer):
        transport.set_write_buffer_limits(high=1 << 30)
        fill(transport)
        size = transport.get_write_buffer_size()
        transport.set_write_buffer_limits(high=size)
        assert protocol.count("pause_writing") == 0
        transport.set_write_buffer_limits(high=size - 1)
        assert protocol.count("pause_writing") == 1
        transport.abort()


@pytest.mark.differs(
    "raising the write limits of a paused transport",
    asyncio="has no effect until more data is sent",
    here="takes effect at once",
    why="the protocol may be waiting for it",
)
@pytest.mark.ours_only
async def test_raising_the_limits_does_not_strand_a_paused_protocol(stack: Stack) -> None:
    """The moment of `resume_writing` may differ, but it must come once the buffer is at or below the low watermark."""
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.set_write_buffer_limits(high=0)
        written = fill(transport)
        assert protocol.count("pause_writing") == 1
        transport.set_write_buffer_limits(high=1 << 30, low=1 << 29)
        await peer.receive_exactly(written)
        await protocol.wait_for("resume_writing")


async def test_the_buffer_of_a_pausing_protocol_is_bounded(stack: Stack) -> None:
    high, chunk, total = 3000, 1000, 4_000_000
    biggest = 0
    sent = 0

    def push(protocol: Recorder) -> None:
        nonlocal biggest, sent
        while sent < total and not protocol.writing_paused:
            protocol.transport.write(bytes(chunk))
            sent += chunk
            biggest = max(biggest, protocol.transport.get_write_buffer_size())

    protocol = Recorder(on_resume_writing=push)
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        transport.set_write_buffer_limits(high=high)
        push(protocol)
        assert protocol.count("pause_writing") == 1
        await peer.receive_exactly(total)
        assert biggest <= high + chunk


async def test_pauses_and_resumes_alternate_and_end_resumed(stack: Stack) -> None:
    protocol = Recorder()
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        transport.set_write_buffer_limits(high=1000, low=500)
        for turn in range(1, 6):
            written = fill(transport, 1001)
            await peer.receive_exactly(written)
            await protocol.wait_for("resume_writing", turn)
        assert protocol.count("pause_writing") == protocol.count("resume_writing") == 5


async def test_no_resume_writing_when_the_connection_is_aborted(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _peer):
        fill(transport, 65537)
        transport.abort()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "pause_writing", "connection_lost"]


# -- what was reported of others ------------------------------------------------------------------------------


@pytest.mark.differs(
    "`writelines` with an empty chunk while something is buffered",
    asyncio="until 3.14 `close` hangs",
    here="the empty chunk is skipped",
    why="[CPython 155888](https://github.com/python/cpython/issues/155888)",
)
@pytest.mark.ours_only(before=(3, 14, 10))
@pytest.mark.parametrize(
    "chunks", [[b"hello", b""], [b"", b"hello"], [b"", b""], [], [b"he", b"", b"llo"], [bytearray(), b"hello"]]
)
@pytest.mark.parametrize("clogged", [False, True])
async def test_w1_empty_chunks_are_skipped_by_writelines(stack: Stack, chunks: list[bytes], clogged: bool) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        written = fill(transport) if clogged else 0
        transport.writelines(chunks)
        transport.close()
        assert (await peer.receive_all())[written:] == b"".join(chunks)
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@pytest.mark.differs("`writelines`")
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_w2_writelines_pauses_the_protocol(stack: Stack) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        data = pattern(10 << 20)
        transport.writelines([data[i : i + 65536] for i in range(0, len(data), 65536)])
        assert protocol.count("pause_writing") == 1
        assert transport.get_write_buffer_size() > 65536
        assert await peer.receive_exactly(len(data)) == data
        await protocol.wait_for("resume_writing")


@pytest.mark.differs("a buffer that its owner changes after `write`")
@pytest.mark.ours_only
@pytest.mark.parametrize("clogged", [False, True])
@pytest.mark.parametrize(("count", "size"), [(200, 5000), (40_000, 50)])
async def test_writelines_of_chunks_of_every_kind(stack: Stack, count: int, size: int, clogged: bool) -> None:
    """Joined or not, the data that the system does not take at once is kept."""
    data = pattern(4 << 20)
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        written = fill(transport) if clogged else 0
        chunks: list[Any] = []
        at = 0
        for number in range(count):
            piece = data[at : at + size + number % size]
            kinds = (piece, bytearray(piece), memoryview(piece), memoryview(bytearray(piece)), b"")
            chunks.append(kinds[number % 5])
            at += len(chunks[-1])
        transport.writelines(iter(chunks))
        assert transport.get_write_buffer_size() > 0
        assert protocol.count("pause_writing") == 1
        for chunk in chunks:  # It belongs to the caller again.
            if isinstance(chunk, bytearray):
                chunk[:] = bytes(len(chunk))
                chunk.clear()
            elif isinstance(chunk, memoryview) and not chunk.readonly:
                chunk[:] = bytes(len(chunk))
        transport.close()
        assert (await peer.receive_all())[written:] == data[:at]


@pytest.mark.parametrize(("count", "size"), [(100, 6500), (3000, 6500), (60_000, 100)])
async def test_w3_writelines_larger_than_one_system_call(stack: Stack, count: int, size: int) -> None:
    """More bytes than the kernel takes, and more chunks than one `sendmsg` may have."""
    protocol = Recorder()
    async with stack.open() as group:
        server = await group.create_server(lambda: protocol, HOST, 0)
        async with peer_process("late_reader", server.sockets[0].getsockname()[1]) as peer:
            assert await peer.line() == "connected"
            await protocol.wait_for("connection_made")
            data = pattern(size * count)
            protocol.transport.writelines(data[i : i + size] for i in range(0, len(data), size))
            protocol.transport.close()
            await peer.say("read")
            assert await peer.line() == f"{len(data)} {hashlib.sha256(data).hexdigest()}"
        server.close()


@pytest.mark.ours_only("asyncio looks for sendmsg once, when it is imported")
async def test_writelines_without_sendmsg(stack: Stack) -> None:
    """Windows has no `sendmsg`."""

    class Socket(socket.socket):
        @property
        def sendmsg(self) -> Any:  # type: ignore[override]
            raise AttributeError("sendmsg")

    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        with Peer(theirs) as peer:
            sock = Socket(ours.family, ours.type, ours.proto, ours.detach())
            transport, protocol = await group.connect_accepted_socket(Recorder, sock)
            full = fill(transport)
            data = pattern(1 << 20)
            for at in range(0, len(data), 1000):
                transport.write(data[at : at + 1000])
            transport.close()
            assert await peer.receive_all() == bytes(full) + data
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_w4_close_flushes_through_any_number_of_partial_sends(stack: Stack) -> None:
    protocol = Recorder()
    async with stack.open() as group:
        server = await group.create_server(lambda: protocol, HOST, 0)
        async with peer_process("late_reader", server.sockets[0].getsockname()[1]) as peer:
            assert await peer.line() == "connected"
            await protocol.wait_for("connection_made")
            sock = protocol.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            data = pattern(1 << 20)
            protocol.transport.write(data)
            protocol.transport.close()
            assert protocol.transport.get_write_buffer_size() > 0
            await peer.say("read")
            assert await peer.line() == f"{len(data)} {hashlib.sha256(data).hexdigest()}"
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        server.close()


@pytest.mark.differs(
    "many small writes to a peer that does not read",
    asyncio="until 3.14 each write adds up the whole buffer",
    here="each write takes the same time",
    why="[CPython 146507](https://github.com/python/cpython/issues/146507)",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_w5_the_size_of_many_small_writes_is_exact(stack: Stack) -> None:
    count = 2000 if stack.is_oracle else 100_000  # asyncio looks at the whole buffer for each write
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport)
        size = transport.get_write_buffer_size()
        for _ in range(count):
            transport.write(b"x")
        assert transport.get_write_buffer_size() == size + count
        transport.close()
        received = await peer.receive_all()
        assert len(received) == written + count
        assert received.endswith(b"x" * count)


@pytest.mark.ours_only("asyncio adds up the whole buffer for each write")
async def test_w5_a_write_does_not_scan_the_buffer(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is time; the test counts the chunks that are visited, which must be linear."""
    count = 2000
    looked_at = 0

    class Counting(collections.deque[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal looked_at
            for chunk in super().__iter__():
                looked_at += 1
                yield chunk

        def __getitem__(self, index: Any) -> Any:
            nonlocal looked_at
            looked_at += 1
            return super().__getitem__(index)

    monkeypatch.setattr(_flow_control, "deque", Counting)
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport)
        for _ in range(count):
            transport.write(b"x")
            transport.get_write_buffer_size()
        assert looked_at <= count
        transport.close()
        assert len(await peer.receive_all()) == written + count
        assert 0 < looked_at <= 10 * count


@pytest.mark.differs(
    "`close` or `abort` inside a flow-control callback",
    asyncio="`connection_lost` is called twice",
    here="`connection_lost` is called once",
    why="[CPython 156512](https://github.com/python/cpython/issues/156512)",
)
@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("callback", ["pause_writing", "resume_writing"])
@pytest.mark.parametrize("with_writelines", [False, True])
@pytest.mark.ours_only
async def test_w7_ending_inside_a_flow_control_callback(
    stack: Stack, end: str, callback: str, with_writelines: bool
) -> None:
    hook = {f"on_{callback}": lambda p: getattr(p.transport, end)()}
    protocol = Recorder(**hook)
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        data = pattern(1 << 20)
        if with_writelines:
            stack.needs_python(3, 14, 10, why="writelines never pauses (CPython 127655)")
            transport.writelines([data[:1000], data[1000:]])
        else:
            transport.write(data)
        if end == "close":
            assert await peer.receive_all() == data
        elif callback == "resume_writing":
            assert await peer.gone()
        await protocol.wait_for("connection_lost")
        await settle(group)
        assert protocol.count("connection_lost") == 1
        assert protocol.exception is None


@pytest.mark.ours_only("asyncio may delay connection_lost without end: python/asyncio 301")
async def test_w8_a_busy_writer_does_not_delay_connection_lost(stack: Stack) -> None:
    """A writer that yields and writes again without end does not delay `connection_lost`."""
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        with capture_log(stack):
            peer.reset()
            with anyio.fail_after(10):
                while not protocol.lost:
                    transport.write(b"x" * 100)
                    await anyio.lowlevel.checkpoint()
        assert transport.is_closing()
        assert protocol.count("connection_lost") == 1


@pytest.mark.differs(
    "`is_closing` after a write has failed",
    asyncio="false until a later iteration",
    here="true at once",
    why="a protocol that writes in a loop can stop",
)
@pytest.mark.ours_only
async def test_w8_is_closing_is_true_as_soon_as_a_write_has_failed(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        peer.reset()
        with capture_log(stack) as records:
            # No waiting between the writes: only their own failure can tell the transport.
            for _ in range(100):
                transport.write(b"x")
                if transport.is_closing():
                    break
        assert transport.is_closing()
        assert protocol.count("connection_lost") == 0
        assert [record for record in records if record.levelname != "WARNING"] == []
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionError)


@pytest.mark.differs("a buffer that its owner changes after `write`")
@pytest.mark.ours_only
@pytest.mark.parametrize("clogged", [False, True])
@pytest.mark.parametrize("method", ["write", "writelines"])
async def test_w9_a_bytearray_may_be_changed_after_write(stack: Stack, clogged: bool, method: str) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport) if clogged else 0
        data = pattern(8 << 20)
        mutable = bytearray(data)
        if method == "write":
            transport.write(mutable)
        else:
            transport.writelines([memoryview(mutable)[:5000], bytearray(mutable[5000:])])
        assert transport.get_write_buffer_size() > 0
        if method == "write":
            mutable[:] = bytes(len(mutable))
            mutable.clear()  # a BufferError here would mean that a view of the array is still held
        else:
            mutable[:] = bytes(len(mutable))
        transport.close()
        assert (await peer.receive_all())[written:] == data


@pytest.mark.ours_only("CPython 3.10 and 3.11 keep the bytearray's type in the buffer")
async def test_w9_writelines_releases_its_chunks(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        written = fill(transport)
        chunks = [bytearray(b"abc"), bytearray(b"defg")]
        transport.writelines(chunks)
        for chunk in chunks:
            chunk[:] = b"?" * len(chunk)
            chunk.clear()
        transport.close()
        assert (await peer.receive_all())[written:] == b"abcdefg"


@pytest.mark.differs(
    "`close` with a peer that never reads",
    asyncio="waits without end",
    here="waits too, until `abort` or until the group is cancelled",
    why="only the program knows how long is too long",
)
@pytest.mark.ours_only
async def test_w10_a_flush_that_hangs_ends_with_the_group(stack: Stack) -> None:
    with anyio.fail_after(10):
        with anyio.CancelScope() as scope:
            async with stack.open() as group, connected(group) as (transport, protocol, _peer):
                fill(transport, 65537)
                transport.close()
                await settle(group)
                assert protocol.count("connection_lost") == 0
                scope.cancel()
                await anyio.sleep_forever()
        assert protocol.count("connection_lost") == 1


@pytest.mark.differs(
    "`memoryview`s with items wider than a byte",
    asyncio="the buffer size is counted in items",
    here="the buffer size is counted in bytes",
    why="the limits are in bytes",
)
@pytest.mark.parametrize("method", ["write", "writelines"])
@pytest.mark.parametrize("clogged", [False, True])
@pytest.mark.ours_only
async def test_w11_views_of_wide_items_are_counted_in_bytes(stack: Stack, method: str, clogged: bool) -> None:
    numbers = array.array("I", range(500_000))
    raw = numbers.tobytes()
    views = [
        memoryview(numbers),
        memoryview(raw).cast("B", shape=[len(raw) // 8, 8]),
        memoryview(raw[:800]).cast("I", shape=[2, 100]),
        memoryview(raw)[::2],
    ]
    expected = raw + raw + raw[:800] + raw[::2]
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.set_write_buffer_limits(high=1 << 30)
        written = fill(transport) if clogged else 0
        size = transport.get_write_buffer_size()
        if clogged:
            transport.set_write_buffer_limits(high=size + len(expected))
        if method == "write":
            for view in views:
                transport.write(view)
        else:
            transport.writelines(views)
        if clogged:
            assert transport.get_write_buffer_size() == size + len(expected)
            assert protocol.count("pause_writing") == 0
            transport.write(b"!")
            assert protocol.count("pause_writing") == 1
            expected += b"!"
        transport.close()
        assert (await peer.receive_all())[written:] == expected


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_w13_closing_with_a_full_buffer_flushes(stack: Stack, kind: type[Recorder]) -> None:
    data = pattern(5 << 20)
    async with stack.open() as group, connected(group, kind(), small=True) as (transport, protocol, peer):
        transport.write(data)
        transport.close()
        assert transport.is_closing()
        assert protocol.count("connection_lost") == 0
        assert await peer.receive_all() == data
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_w13_leaving_the_block_flushes(stack: Stack) -> None:
    data = pattern(2 << 20)
    protocol = Recorder()
    received = bytearray()

    async def drain(peer: Peer) -> None:
        received.extend(await peer.receive_all())

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with socket.create_server((HOST, 0)) as listener:
                async with stack.open() as group:
                    transport, _ = await group.create_connection(lambda: protocol, *listener.getsockname())
                    peer = Peer(listener.accept()[0])
                    transport.write(data)
                    # Read by a task of an outer group: the block is left while data is still buffered.
                    stack.expected_tasks = 1
                    tasks.start_soon(drain, peer)
                assert protocol.lost
    peer.close()
    assert bytes(received) == data


@pytest.mark.differs(
    "`abort` while `close` flushes",
    asyncio="until 3.14 `AttributeError`",
    here="ends the flush",
    why="it is the only way to end it",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_w16_abort_ends_a_flushing_close(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _peer):
        fill(transport, 65537)
        transport.close()
        transport.abort()
        transport.abort()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert transport.get_write_buffer_size() == 0


@pytest.mark.differs("`writelines`")
@pytest.mark.ours_only(before=(3, 14, 10))
@pytest.mark.parametrize("clogged", [False, True])
@pytest.mark.parametrize("chunks", [[b"too", b"late"], [bytes(9000), bytes(9000)]])
async def test_w16_writelines_after_close_drops_as_write_does(stack: Stack, clogged: bool, chunks: list[bytes]) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        written = fill(transport) if clogged else 0
        transport.write(b"end")
        transport.close()
        await turns()
        if not clogged:
            await protocol.wait_for("connection_lost")
            transport.writelines(chunks)
            transport.write(b"too late")
        else:
            # asyncio goes on sending what is written while a close is flushing.
            transport.writelines([b"a", b"b"])
        received = await peer.receive_all()
        assert received[written : written + 3] == b"end"
        await protocol.wait_for("connection_lost")
