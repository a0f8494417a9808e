"""Pipes: `connect_read_pipe`."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from pipe_helpers import connect_reader, connection, pipe, terminal
from support import GUARD, BufferedRecorder, Peer, Recorder, Stack, collect_contexts

from transports_anyio import _capabilities

pytestmark = pytest.mark.anyio


async def until_raises(error: type[Exception], function: Callable[..., object], *args: object) -> None:
    """Call `function` until it raises `error`; at once where pipes are polled."""
    try:
        with anyio.fail_after(GUARD):
            while True:
                function(*args)
                assert not _capabilities.polls_files, f"no {error.__name__}"
                await anyio.sleep(0.001)
    except error:
        pass


@pytest.mark.differs("pipes: `BufferedProtocol`")
@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_reading(stack: Stack, kind: Any) -> None:
    if stack.is_oracle and kind is BufferedRecorder:
        pytest.skip("asyncio's read pipes know no BufferedProtocol")
    with pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_reader(group, reader, kind())
            assert isinstance(transport, asyncio.ReadTransport)
            assert transport.get_extra_info("pipe") is reader
            assert os.get_blocking(reader.fileno()) != _capabilities.polls_files or stack.is_oracle
            writer.write(b"hello")
            assert await protocol.wait_received(5) == b"hello"
            transport.pause_reading()
            assert not transport.is_reading()
            writer.write(b" you")
            await anyio.sleep(0.01)
            assert protocol.received == b"hello"
            transport.resume_reading()
            assert await protocol.wait_received(9) == b"hello you"
            writer.close()
            await protocol.wait_for("connection_lost")
            assert protocol.names[-2:] == ["eof_received", "connection_lost"]
            assert protocol.exception is None
        assert reader.closed


async def test_a_read_pipe_closes_at_its_end_whatever_eof_received_says(stack: Stack) -> None:
    with pipe() as (reader, writer):
        async with stack.open() as group:
            _, protocol = await connect_reader(group, reader, Recorder(on_eof_received=lambda _: True))
            writer.close()
            await protocol.wait_for("connection_lost")


@pytest.mark.parametrize("method", ["close", "abort"])
async def test_closing_a_read_pipe(stack: Stack, method: str) -> None:
    if stack.is_oracle and method == "abort":
        pytest.skip("asyncio's read pipes have none")
    with pipe() as (reader, writer):
        async with stack.open() as group:
            transport, protocol = await connect_reader(group, reader)
            getattr(transport, method)()
            assert transport.is_closing()
            await protocol.wait_for("connection_lost")
            assert protocol.names == ["connection_made", "connection_lost"]
        if not _capabilities.polls_files and not stack.is_oracle:
            writer.write(b"x")  # The thread closes its file when it has read.
        await until_raises(BrokenPipeError, writer.write, b"x")


async def test_a_failing_read_pipe_is_reported(stack: Stack) -> None:
    with connection() as (near, far):
        async with stack.open() as group:
            contexts = collect_contexts(group)
            transport, protocol = await connect_reader(group, near)
            Peer(far).reset()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, ConnectionResetError)
            (context,) = contexts
            assert context["message"] == "Fatal read error on pipe transport"
            assert context["exception"] is protocol.exception
            assert context["transport"] is transport
            assert context["protocol"] is protocol


async def test_a_closed_terminal_is_not_reported(stack: Stack) -> None:
    """On Linux a terminal's master sees the end of its output as this error."""
    with terminal() as (program, user):
        async with stack.open() as group:
            contexts = collect_contexts(group)
            _, protocol = await connect_reader(group, user)
            program.close()
            await protocol.wait_for("connection_lost")
            assert contexts == []
            if sys.platform == "linux":
                assert isinstance(protocol.exception, OSError)
                assert protocol.exception.errno == errno.EIO


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_a_reading_end_sends_no_file(stack: Stack, kind: str, tmp_path: Path) -> None:
    """Not even a socket, which would be able to."""
    (tmp_path / "file").write_bytes(b"content")
    with ExitStack() as files:
        near, far = files.enter_context(pipe() if kind == "pipe" else connection())
        file = files.enter_context(open(tmp_path / "file", "rb"))
        async with stack.open() as group:
            transport, protocol = await connect_reader(group, near)
            with pytest.raises(RuntimeError, match="sendfile is not supported"):
                await group.sendfile(transport, file)
            os.write(far.fileno(), b"goes on")
            assert await protocol.wait_received(7) == b"goes on"
            if kind == "socket":
                far.setblocking(False)
                with pytest.raises(BlockingIOError):
                    far.recv(1)
            transport.close()
            await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`write` and `writelines` of a reading pipe",
    asyncio="no such methods",
    here="`NotImplementedError`",
    why="one class for all streams",
)
@pytest.mark.ours_only
async def test_a_reading_end_does_not_write(stack: Stack) -> None:
    with connection() as (near, far):
        far.setblocking(False)
        async with stack.open() as group:
            transport, _ = await connect_reader(group, near)
            for data in (b"", b"x"):
                with pytest.raises(NotImplementedError):
                    transport.write(data)
                with pytest.raises(NotImplementedError):
                    transport.writelines([data])
            with pytest.raises(NotImplementedError):
                transport.write_eof()
            with pytest.raises(BlockingIOError):
                far.recv(1)
            assert not transport.is_closing()
