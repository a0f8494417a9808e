"""`sendfile`: what is sent, and the file's position afterwards."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest
from network import needs_sendfile
from sendfile_helpers import LARGE_CONTENT, SMALL_CONTENT, Sending, files, in_memory, on_disk, send
from support import Stack, connected

pytestmark = pytest.mark.anyio


@files
@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [
        (0, None, SMALL_CONTENT),
        (100, None, SMALL_CONTENT[100:]),
        (0, 10, SMALL_CONTENT[:10]),
        (990, 10, SMALL_CONTENT[990:]),
        (100, 1, SMALL_CONTENT[100:101]),
        (100, 5000, SMALL_CONTENT[100:]),
        (1000, None, b""),
        (5000, None, b""),
        (5000, 10, b""),
    ],
)
async def test_offset_and_count(stack: Stack, make_file: Any, offset: int, count: int | None, expected: bytes) -> None:
    if make_file is on_disk and not expected:
        stack.needs_python(3, 14, 10, why="a file of which nothing was sent stays where it was")
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with make_file(SMALL_CONTENT) as file:
            if make_file is on_disk:
                file.seek(7)  # Whatever its position.
            assert await send(group, transport, file, offset, count) == len(expected)
            assert file.tell() == offset + len(expected)
        transport.close()
        assert await peer.receive_all() == expected


@files
async def test_an_empty_file(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _):
        with make_file(b"") as file:
            assert await send(group, transport, file) == 0
            assert file.tell() == 0


@files
@pytest.mark.parametrize("buffering", [0, -1], ids=["raw", "buffered"])
async def test_a_large_file(stack: Stack, make_file: Any, buffering: int, tmp_path: Path) -> None:
    content = LARGE_CONTENT
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        path = tmp_path / "file"
        path.write_bytes(content)
        with path.open("rb", buffering) if make_file is on_disk else io.BytesIO(content) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                assert await peer.receive_exactly(len(content)) == content
            assert sending.result == len(content)
            assert file.tell() == len(content)
            assert file.read() == b""
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"
        assert "pause_writing" not in protocol.names


@pytest.mark.differs(
    "a file that the program has read from before",
    asyncio="its buffer and its position disagree",
    here="they agree",
    why="the position says how much was sent",
)
@pytest.mark.ours_only
async def test_a_file_that_was_read_before(stack: Stack) -> None:
    """The position of a buffered file differs from that of its file descriptor, because it has read ahead."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with tempfile.NamedTemporaryFile() as named:
            named.write(SMALL_CONTENT)
            named.flush()
            with open(named.name, "rb") as file:
                assert file.read(1) == SMALL_CONTENT[:1]
                assert await send(group, transport, file, 10, 20) == 20
                assert file.tell() == 30
                assert file.read(5) == SMALL_CONTENT[30:35]
        assert await peer.receive_exactly(20) == SMALL_CONTENT[10:30]


@pytest.mark.differs(
    "`offset=0`, with a file that has to be read",
    asyncio="until 3.14 starts at the file's current position",
    here="starts at the beginning",
    why="as `os.sendfile` ([CPython 150107](https://github.com/python/cpython/issues/150107))",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_f1_offset_0_is_the_beginning_for_the_fallback(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with in_memory(SMALL_CONTENT) as file:
            file.seek(500)
            assert await send(group, transport, file, 0) == 1000
        assert await peer.receive_exactly(1000) == SMALL_CONTENT


@files
@pytest.mark.parametrize("count", [1, 16383, 16385, 256 * 1024 - 1, 256 * 1024 + 1, 1_000_003])
async def test_f2_exactly_count(stack: Stack, make_file: Any, count: int) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with make_file(LARGE_CONTENT) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file, 5, count)
                assert await peer.receive_exactly(count) == LARGE_CONTENT[5 : 5 + count]
            assert sending.result == count
            assert file.tell() == 5 + count
        transport.close()
        assert await peer.receive() == b""


class Descriptor:
    """A file that is nothing but its descriptor."""

    def __init__(self, file: BinaryIO) -> None:
        self.fileno = file.fileno


@needs_sendfile
async def test_a_file_that_is_only_a_descriptor(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with on_disk(SMALL_CONTENT) as file:
            assert await send(group, transport, Descriptor(file), 10, 100) == 100
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 110
        assert await peer.receive_exactly(100) == SMALL_CONTENT[10:110]


@pytest.mark.differs(
    "`sendfile` of a file without positions (a pipe)",
    asyncio="sent, then an error",
    here="sent",
    why="there is no position to restore",
)
@pytest.mark.ours_only
async def test_a_pipe(stack: Stack) -> None:
    """`os.sendfile` refuses a pipe, and a pipe has no position."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        receiver, sender = os.pipe()
        with open(receiver, "rb") as file:
            with open(sender, "wb") as other:
                other.write(SMALL_CONTENT)
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await send(group, transport, file, fallback=False)
            assert await send(group, transport, file) == len(SMALL_CONTENT)
            with pytest.raises(OSError):
                await send(group, transport, file, 10)
        assert await peer.receive_exactly(1000) == SMALL_CONTENT


@pytest.mark.differs(
    "a file that reports a size of 0 (`/proc`)",
    asyncio="nothing is sent",
    here="its content is sent",
    why="a file ends where reading ends",
)
@pytest.mark.ours_only
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
async def test_a_file_with_more_data_than_its_size(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open("/proc/version", "rb") as file:
            assert os.fstat(file.fileno()).st_size == 0
            sent = await send(group, transport, file)
            file.seek(0)
            assert await peer.receive_exactly(sent) == file.read()
