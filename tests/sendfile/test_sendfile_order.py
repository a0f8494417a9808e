"""`sendfile`: the order with what is written, and what waits until the file has been sent."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from sendfile_helpers import LARGE_CONTENT, SMALL_CONTENT, Sending, clogged, files, send
from support import Recorder, Stack, connected, fill, settle

pytestmark = pytest.mark.anyio


@files
async def test_the_file_is_sent_in_order_with_writes(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        written = fill(transport, at_least=200_000)
        with make_file(LARGE_CONTENT[:300_000]) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                assert await peer.receive_exactly(written) == bytes(written)
                assert await peer.receive_exactly(300_000) == LARGE_CONTENT[:300_000]
        assert sending.result == 300_000
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"
        assert protocol.names == ["connection_made", "pause_writing", "resume_writing"]


@pytest.mark.differs(
    "`resume_writing` during `sendfile`",
    asyncio="on plain sockets as soon as the buffer is empty",
    here="after the file",
    why="`write` is refused until then",
)
@files
@pytest.mark.ours_only
async def test_resume_writing_waits(stack: Stack, make_file: Any) -> None:
    """A protocol that goes on writing as soon as it may."""
    async with stack.open() as group:
        protocol = Recorder(on_resume_writing=lambda p: p.transport.write(b"the end"))
        async with connected(group, protocol, small=True) as (transport, _, peer):
            written = fill(transport, at_least=200_000)
            with make_file(LARGE_CONTENT[:300_000]) as file:
                sending = Sending()
                async with anyio.create_task_group() as tasks:
                    stack.expected_tasks = 1
                    tasks.start_soon(sending.run, group, transport, file)
                    await peer.receive_exactly(written)
                    transport.set_write_buffer_limits(high=0)
                    assert await peer.receive_exactly(300_000) == LARGE_CONTENT[:300_000]
            assert await peer.receive_exactly(7) == b"the end"
            assert sending.result == 300_000


@pytest.mark.differs(
    "`write` while a file is read block by block",
    asyncio="written in between",
    here="`RuntimeError`, as on plain sockets",
    why="nothing is reordered",
)
@files
@pytest.mark.ours_only
async def test_writing_is_refused_during_sendfile(stack: Stack, make_file: Any) -> None:
    async with clogged(stack, make_file) as (group, transport, _, peer, file, sending):
        for write in (lambda: transport.write(b"x"), lambda: transport.writelines([b"x"])):
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                write()
        with pytest.raises(RuntimeError, match="sendfile is in progress"):
            await group.sendfile(transport, file)
        with pytest.raises(TypeError):
            transport.write("x")
        assert await peer.receive_exactly(len(LARGE_CONTENT)) == LARGE_CONTENT
        await sending.wait()
        assert sending.result == len(LARGE_CONTENT)
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"


@pytest.mark.differs(
    "`write_eof` during `sendfile`",
    asyncio="breaks the `sendfile`",
    here="takes effect after the file",
    why="it means: after everything",
)
@files
@pytest.mark.ours_only
async def test_write_eof_waits(stack: Stack, make_file: Any) -> None:
    async with clogged(stack, make_file) as (_, transport, protocol, peer, _, sending):
        transport.write_eof()
        assert await peer.receive_all() == LARGE_CONTENT
        await sending.wait()
        assert sending.result == len(LARGE_CONTENT)
        with pytest.raises(RuntimeError, match="after write_eof"):
            transport.write(b"x")
        peer.close()
        await protocol.wait_for("connection_lost")


async def test_nothing_is_received_during_sendfile(stack: Stack) -> None:
    async with clogged(stack) as (group, transport, protocol, peer, _, sending):
        assert not transport.is_reading()
        await peer.send(b"hello")
        await settle(group)
        assert protocol.received == b""
        assert await peer.receive_exactly(len(LARGE_CONTENT)) == LARGE_CONTENT
        assert await protocol.wait_received(5) == b"hello"
        await sending.wait()
        assert transport.is_reading()


@files
async def test_reading_stays_paused_after_sendfile(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        with make_file(SMALL_CONTENT) as file:
            await send(group, transport, file)
        assert not transport.is_reading()
        await peer.send(b"hello")
        await settle(group)
        assert protocol.received == b""
        transport.resume_reading()
        assert await protocol.wait_received(5) == b"hello"


@files
async def test_after_the_end_of_file(stack: Stack, make_file: Any) -> None:
    """The peer has finished, and still listens."""
    protocol = Recorder(on_eof_received=lambda p: True)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        peer.shutdown()
        await protocol.wait_for("eof_received")
        with make_file(SMALL_CONTENT) as file:
            assert await send(group, transport, file) == len(SMALL_CONTENT)
        assert await peer.receive_exactly(len(SMALL_CONTENT)) == SMALL_CONTENT
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "eof_received", "connection_lost"]
