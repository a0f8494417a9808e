"""`sendfile`: every way to end: the peer, the transport, the group, a cancellation, the file."""

from __future__ import annotations

import errno
import io
import os
import threading
from typing import Any

import anyio
import pytest
from network import cancelled_after, needs_sendfile
from sendfile_helpers import LARGE_CONTENT, SMALL_CONTENT, Sending, clogged, files, on_disk, send, stuck
from support import GUARD, Stack, collect_contexts, connected, fill, raises_inside, turns, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


# -- the peer, the transport and the group ----------------------------------------------------------------------------


@pytest.mark.differs("`close`, `abort` or a reset during `sendfile`")
@files
@pytest.mark.ours_only
async def test_f3_the_peer_resets_in_the_middle(stack: Stack, make_file: Any) -> None:
    async with clogged(stack, make_file) as (group, transport, protocol, peer, _, sending):
        contexts = collect_contexts(group)
        peer.reset()
        await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionError)
        assert transport.is_closing()
        assert contexts == []


@pytest.mark.ours_only("asyncio reports it from a callback, or never returns")
async def test_f3_the_peer_resets_before_the_file_is_sent(stack: Stack) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        fill(transport, at_least=200_000)
        with on_disk(SMALL_CONTENT) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                await turns()
                peer.reset()
                await sending.wait()
            assert isinstance(sending.error, ConnectionError)
            assert file.tell() == 0
        await protocol.wait_for("connection_lost")
        assert contexts == []


@needs_sendfile
@files
@pytest.mark.ours_only("asyncio reports it from a callback, or never returns")
async def test_f3_an_unnoticed_reset_before_sendfile(stack: Stack, make_file: Any) -> None:
    """Not even the file's first byte is sent, and the fall-back is not used either."""
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        peer.reset()
        with make_file(LARGE_CONTENT) as file:
            with pytest.raises(ConnectionError) as caught:
                await send(group, transport, file, fallback=make_file is not on_disk)
            assert file.tell() == 0 or make_file is not on_disk
        await protocol.wait_for("connection_lost")
        assert protocol.exception is caught.value


@pytest.mark.differs(
    "`close`, `abort` or a reset during `sendfile`",
    asyncio="an error in a callback, or the caller waits without end",
    here="the caller gets a `ConnectionError`",
    why="an awaited call must end",
)
@files
@pytest.mark.ours_only
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_ending_the_transport_in_the_middle(stack: Stack, make_file: Any, how: str) -> None:
    async with clogged(stack, make_file) as (group, transport, protocol, peer, file, sending):
        contexts = collect_contexts(group)
        getattr(transport, how)()
        await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        data = await peer.receive_all()
        assert LARGE_CONTENT.startswith(data)
        assert len(data) < len(LARGE_CONTENT)
        if make_file is on_disk and hasattr(os, "sendfile"):
            assert file.tell() == len(data)
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert contexts == []


@pytest.mark.ours_only("asyncio raises InvalidStateError in a callback")
async def test_close_still_flushes_what_was_written_before(stack: Stack) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        written = fill(transport, at_least=200_000)
        with on_disk(SMALL_CONTENT) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                await turns()
                transport.close()
                await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        assert await peer.receive_all() == bytes(written)
        await protocol.wait_for("connection_lost")


@files
@pytest.mark.ours_only("asyncio has no group")
async def test_the_group_ends_in_the_middle(stack: Stack, make_file: Any) -> None:
    sending = Sending()
    async with anyio.create_task_group() as tasks:
        with make_file(LARGE_CONTENT) as file:
            with raises_inside(ZeroDivisionError):
                async with TransportGroup() as group, connected(group, small=True) as (transport, protocol, _):
                    tasks.start_soon(sending.run, group, transport, file)
                    await stuck(transport)
                    raise ZeroDivisionError
            await sending.wait()
    assert isinstance(sending.error, ConnectionError)
    assert protocol.lost


# -- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.differs(
    "a cancelled `sendfile`",
    asyncio="the file's position does not say how much was sent",
    here="the position is after the last byte sent",
    why="the program can go on from there",
)
@files
@pytest.mark.ours_only
async def test_cancelled_in_the_middle(stack: Stack, make_file: Any) -> None:
    """The file's position says how much was sent, and the transport goes on after it."""
    async with clogged(stack, make_file) as (_, transport, protocol, peer, file, sending):
        sending.scope.cancel()
        await sending.wait()
        assert sending.error is None
        sent = file.tell()
        assert 0 < sent < len(LARGE_CONTENT)
        transport.write(b"the end")
        assert await peer.receive_exactly(sent + 7) == LARGE_CONTENT[:sent] + b"the end"
        assert transport.is_reading()
        await peer.send(b"hello")
        assert await protocol.wait_received(5) == b"hello"


@pytest.mark.ours_only("asyncio cannot send a pipe")
async def test_cancelled_while_a_pipe_has_nothing_to_read(stack: Stack) -> None:
    """The thread that reads from it is abandoned."""
    receiver, sender = os.pipe()
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open(receiver, "rb", 0) as file, open(sender, "wb", 0) as other:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                other.write(b"what there is")
                assert await peer.receive_exactly(13) == b"what there is"
                sending.scope.cancel()
                await sending.wait()
            transport.write(b"alive")
            assert await peer.receive_exactly(5) == b"alive"


@pytest.mark.differs("a cancelled `sendfile`")
@files
@pytest.mark.ours_only
async def test_cancelled_at_every_checkpoint(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        for checkpoints in range(12):
            with make_file(SMALL_CONTENT) as file:
                file.seek(0)
                async with cancelled_after(checkpoints):
                    await group.sendfile(transport, file)
                sent = file.tell()
            transport.write(b"!")
            assert await peer.receive_exactly(sent + 1) == SMALL_CONTENT[:sent] + b"!"


# -- the file ---------------------------------------------------------------------------------------------------------


class Failing(io.BytesIO):
    """A file on a failing disk."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        if self.tell() == 300_000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(min(size, 300_000 - self.tell()))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


async def test_a_file_that_fails_in_the_middle(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        file = Failing(LARGE_CONTENT)
        sending = Sending()
        async with anyio.create_task_group() as tasks:
            stack.expected_tasks = 1
            tasks.start_soon(sending.run, group, transport, file)
            await peer.receive_exactly(300_000)
            await sending.wait()
        assert isinstance(sending.error, OSError)
        assert sending.error.errno == errno.EIO
        assert file.tell() == 300_000
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


class Slow(io.BytesIO):
    """A file whose first block takes long to read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.asked.set()
        assert self.go_on.wait(GUARD)
        return super().read(size)


@pytest.mark.ours_only("asyncio never returns")
async def test_a_block_that_was_read_but_not_sent(stack: Stack) -> None:
    """Nothing of it is sent, so the file's position is before the block."""
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        file = Slow(SMALL_CONTENT)
        sending = Sending()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sending.run, group, transport, file, 100)
            await until(file.asked.is_set)
            transport.abort()
            await protocol.wait_for("connection_lost")
            file.go_on.set()
            await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        assert file.tell() == 100
