"""`sendfile`: bad arguments, files that cannot be sent, and transports that cannot send them."""

from __future__ import annotations

import asyncio
import codecs
import io
from pathlib import Path
from typing import Any

import pytest
from sendfile_helpers import SMALL_CONTENT, on_disk
from support import Stack, collect_contexts, connected

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"count": 0}, ValueError),
        ({"count": -1}, ValueError),
        ({"count": 1.5}, TypeError),
        ({"count": "1"}, TypeError),
        ({"offset": -1}, ValueError),
        ({"offset": None}, TypeError),
        ({"offset": 1.0}, TypeError),
    ],
    ids=str,
)
async def test_bad_arguments(stack: Stack, options: dict[str, Any], expected: type[Exception]) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with on_disk(SMALL_CONTENT) as file:
            name = next(iter(options))
            with pytest.raises(expected, match=f"{name} must be a"):
                await group.sendfile(transport, file, **options)
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"


@pytest.mark.differs(
    "`sendfile` of a text file without a `mode` (`StringIO`)",
    asyncio="`AttributeError`",
    here="`ValueError`",
    why="as for text files with one",
)
async def test_text_mode(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    async with stack.open() as group, connected(group) as (transport, _, _):
        with open(tmp_path / "file") as file:
            with pytest.raises(ValueError, match="binary mode"):
                await group.sendfile(transport, file)
        if not stack.is_oracle:  # Which looks for `readinto`.
            with pytest.raises(ValueError, match="binary mode"):
                await group.sendfile(transport, io.StringIO("text"))


@pytest.mark.ours_only("asyncio calls `readinto`, which returns the bytes or is missing")
async def test_a_text_file_without_an_encoding_attribute(stack: Stack) -> None:
    """Only the caller gets the error."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        contexts = collect_contexts(group)
        with pytest.raises(TypeError, match="bytes-like"):
            await group.sendfile(transport, codecs.getreader("utf-8")(io.BytesIO(b"text")))
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"
    assert contexts == []


async def test_a_closed_file(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with on_disk(SMALL_CONTENT) as file:
            pass
        with pytest.raises(ValueError, match="closed file"):
            await group.sendfile(transport, file)
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"


async def test_a_file_that_cannot_be_read(stack: Stack, tmp_path: Path) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open(tmp_path / "file", "wb") as file:
            file.write(SMALL_CONTENT)
            file.flush()
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await group.sendfile(transport, file, fallback=False)
            with pytest.raises((OSError, AttributeError)):
                await group.sendfile(transport, file)
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"


async def test_a_closing_transport(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        transport.close()
        with on_disk(SMALL_CONTENT) as file:
            with pytest.raises(RuntimeError, match="Transport is closing"):
                await group.sendfile(transport, file)
            await protocol.wait_for("connection_lost")
            with pytest.raises(RuntimeError, match="Transport is closing"):
                await group.sendfile(transport, file)


@pytest.mark.differs(
    "`sendfile` after `write_eof`",
    asyncio="`SendfileNotAvailableError` or `RuntimeError`",
    here="`RuntimeError`",
    why="as `write`",
)
@pytest.mark.ours_only
async def test_after_write_eof(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _):
        transport.write_eof()
        with on_disk(SMALL_CONTENT) as file, pytest.raises(RuntimeError, match="after write_eof"):
            await group.sendfile(transport, file)


class ForeignTransport(asyncio.WriteTransport):
    def is_closing(self) -> bool:
        return False


async def test_transports_that_cannot_send_files(stack: Stack) -> None:
    async with stack.open() as group:
        with on_disk(SMALL_CONTENT) as file:
            with pytest.raises(RuntimeError, match="sendfile is not supported for transport"):
                await group.sendfile(ForeignTransport(), file)
