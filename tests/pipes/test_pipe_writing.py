"""Pipes: `connect_write_pipe`, and readers that go away."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from pipe_helpers import HANGUP, connect_writer, connection, drain, pipe, unix_connection
from support import GUARD, Stack, collect_contexts, fill, pattern, settle

pytestmark = pytest.mark.anyio


async def test_writing(stack: Stack) -> None:
    with pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, writer)
            assert isinstance(transport, asyncio.WriteTransport)
            assert transport.get_extra_info("pipe") is writer
            assert transport.can_write_eof()
            transport.write(b"hello")
            transport.writelines([b" ", bytearray(b"y"), memoryview(b"ou")])
            transport.write_eof()
            assert transport.is_closing()
            assert await drain(reader) == b"hello you"
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None
        assert writer.closed


async def test_w13_closing_flushes_what_waits(stack: Stack) -> None:
    data = pattern(4 << 20)
    with pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, writer)
            transport.write(data)
            assert protocol.names == ["connection_made", "pause_writing"]
            transport.close()
            assert await drain(reader) == data
            await protocol.wait_for("connection_lost")
            assert protocol.names == ["connection_made", "pause_writing", "resume_writing", "connection_lost"]
            assert protocol.exception is None


@pytest.mark.parametrize("buffered", [pytest.param(False, marks=pytest.mark.needs_polling(HANGUP)), True])
async def test_a_writer_notices_that_its_reader_has_gone(stack: Stack, buffered: bool) -> None:
    with pipe() as (reader, writer):
        async with stack.open() as group:
            contexts = collect_contexts(group)
            transport, protocol = await connect_writer(group, writer)
            if buffered:
                fill(transport, 1 << 20)  # More than the pipe takes, even if a thread has still to write it.
            reader.close()
            await protocol.wait_for("connection_lost")
            if buffered:
                assert isinstance(protocol.exception, BrokenPipeError)
            else:
                assert protocol.exception is None
            assert "eof_received" not in protocol.names
            assert contexts == []


@contextmanager
def fifo() -> Iterator[tuple[Any, Any]]:
    """Yield the writing end of a named pipe, and its reading end."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "fifo")
        os.mkfifo(path)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0) as reader, open(path, "wb", 0) as writer:
            yield writer, reader


# The readers of a writer: how each is made, and how it goes away.
GOING: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "TCP close": (connection, lambda reader: reader.close()),
    "TCP shutdown": (connection, lambda reader: reader.shutdown(socket.SHUT_WR)),
    "UNIX close": (unix_connection, lambda reader: reader.close()),
    "UNIX shutdown": (unix_connection, lambda reader: reader.shutdown(socket.SHUT_WR)),
    "FIFO": (fifo, lambda reader: reader.close()),
}


@pytest.mark.needs_polling(HANGUP)
@pytest.mark.ours_only("asyncio's writing pipes have no methods for reading")
async def test_a_writer_notices_it_despite_reading_methods(stack: Stack) -> None:
    with anyio.fail_after(GUARD), pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, writer)
            transport.resume_reading()
            assert not transport.is_reading()
            transport.pause_reading()
            reader.close()
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None


@pytest.mark.needs_polling(HANGUP)
@pytest.mark.parametrize("how", GOING)
async def test_a_writer_on_any_file_notices_that_its_reader_has_gone(stack: Stack, how: str) -> None:
    """As asyncio: the peer of a socket counts as gone once it has shut down its sending side, even if it still
    reads."""
    connect, go = GOING[how]
    with connect() as (writer, reader):
        async with stack.open() as group:
            contexts = collect_contexts(group)
            _, protocol = await connect_writer(group, writer)
            await settle(group)
            assert protocol.names == ["connection_made"]
            go(reader)
            await protocol.wait_for("connection_lost")
            assert protocol.names == ["connection_made", "connection_lost"]
            assert protocol.exception is None
            assert contexts == []


@pytest.mark.needs_polling(HANGUP)
@pytest.mark.parametrize("how", ["TCP shutdown", "UNIX shutdown", "FIFO"])
async def test_a_writer_with_a_full_buffer_notices_that_its_reader_has_gone(stack: Stack, how: str) -> None:
    connect, go = GOING[how]
    with connect() as (writer, reader):
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, writer)
            fill(transport)
            go(reader)
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, BrokenPipeError)


@pytest.mark.needs_polling(HANGUP)
@pytest.mark.differs(
    "input on a writing socket, whose reader then closes",
    asyncio="the input is taken for a hang-up",
    here="stays open until the reader closes, which is noticed (on Linux)",
    why="input is not a hang-up",
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a hang-up cannot be told from input")
@pytest.mark.ours_only
@pytest.mark.parametrize("how", [how for how in GOING if how != "FIFO"])
async def test_p6_a_writer_notices_a_close_after_unread_input(stack: Stack, how: str) -> None:
    connect, go = GOING[how]
    with connect() as (writer, reader):
        async with stack.open() as group:
            _, protocol = await connect_writer(group, writer)
            reader.send(b"input")
            await anyio.wait_readable(writer)
            await settle(group)
            assert protocol.names == ["connection_made"]
            go(reader)
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None


async def test_w14_writing_after_the_reader_has_gone_is_dropped(stack: Stack) -> None:
    with pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, writer)
            reader.close()
            for _ in range(3):
                transport.write(b"x")
            await protocol.wait_for("connection_lost")
            transport.write(b"x")


async def test_a_write_pipe_aborts(stack: Stack) -> None:
    with pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, writer)
            size = fill(transport, 1 << 20)
            transport.abort()
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None
        assert len(await drain(reader)) < size
