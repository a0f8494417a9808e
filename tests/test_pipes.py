"""`connect_read_pipe` and `connect_write_pipe`: pipes, FIFOs, sockets, terminals, and our own standard streams."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import pty
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from network import run_main
from process_helpers import Child
from support import (
    GUARD,
    BaseExceptionGroup,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    collect_contexts,
    fill,
    leaves,
    listening,
    open_descriptors,
    pattern,
    settle,
    turns,
    until,
)

from transports_anyio import TransportGroup, _capabilities
from transports_anyio._channels import _pipe, _threaded_pipe
from transports_anyio._driver import TaskDriver
from transports_anyio._poller import Poller
from transports_anyio._selector import make_system_selector

pytestmark = pytest.mark.anyio

#: Why some tests need polling.
HANGUP = "only a write shows that the reader has gone"


@contextmanager
def pipe() -> Iterator[tuple[Any, Any]]:
    read, write = os.pipe()
    with open(read, "rb", 0) as reader, open(write, "wb", 0) as writer:
        yield reader, writer


async def connect_reader(group: Any, reader: Any, protocol: Any = None) -> tuple[Any, Any]:
    protocol = protocol or Recorder()
    transport, made = await group.connect_read_pipe(lambda: protocol, reader)
    assert made is protocol
    await until(lambda: protocol.transport is transport)
    return transport, protocol


async def connect_writer(group: Any, writer: Any, protocol: Any = None) -> tuple[Any, Any]:
    protocol = protocol or Recorder()
    transport, made = await group.connect_write_pipe(lambda: protocol, writer)
    assert made is protocol
    await until(lambda: protocol.transport is transport)
    return transport, protocol


async def drain(reader: Any, size: int | None = None) -> bytes:
    """Read that many bytes, or everything, from a pipe without another reader."""
    os.set_blocking(reader.fileno(), False)
    data = bytearray()
    with anyio.fail_after(GUARD):
        while size is None or len(data) < size:
            try:
                more = os.read(reader.fileno(), 1 << 16)
            except BlockingIOError:
                await anyio.wait_readable(reader.fileno())
                continue
            if not more:
                break
            data += more
    return bytes(data)


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


# -- reading -------------------------------------------------------------------------------------------------


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


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection."""
    with listening() as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            yield near, far


@contextmanager
def unix_connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@contextmanager
def fifo() -> Iterator[tuple[Any, Any]]:
    """Yield the writing end of a named pipe, and its reading end."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "fifo")
        os.mkfifo(path)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0) as reader, open(path, "wb", 0) as writer:
            yield writer, reader


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


# -- writing -------------------------------------------------------------------------------------------------


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


# -- other descriptors ---------------------------------------------------------------------------------------


async def test_fifos(stack: Stack, tmp_path: Path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    reader = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0)
    writer = open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb", 0)
    async with stack.open() as group:
        _, receiver = await connect_reader(group, reader)
        writing, sender = await connect_writer(group, writer)
        data = pattern(1 << 20)
        writing.write(data)
        writing.close()
        assert await receiver.wait_received(len(data)) == data
        await receiver.wait_for("connection_lost")
        await sender.wait_for("connection_lost")


@pytest.mark.needs_polling("a FIFO without a writer reads as one that has ended")
async def test_r4_the_end_of_a_fifo_is_the_end(stack: Stack, tmp_path: Path) -> None:
    """As on asyncio: a second writer does not bring it back."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    reader = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0)
    async with stack.open() as group:
        _, protocol = await connect_reader(group, reader)
        first = os.open(path, os.O_WRONLY)
        os.write(first, b"first")
        os.close(first)
        await protocol.wait_for("connection_lost")
        assert protocol.received == b"first"
        with pytest.raises(OSError, match="No such device"):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)


async def test_sockets(stack: Stack) -> None:
    a, b = socket.socketpair()
    async with stack.open() as group:
        _, receiver = await connect_reader(group, a)
        writing, sender = await connect_writer(group, b)
        writing.write(b"over a socket")
        await receiver.wait_received(13)
        writing.close()
        await sender.wait_for("connection_lost")
        await receiver.wait_for("connection_lost")


@pytest.mark.differs(
    "input on a writing pipe that can also be read",
    asyncio="taken for a hang-up",
    here="ignored",
    why="only a hang-up is a hang-up",
)
@pytest.mark.ours_only
async def test_p6_input_does_not_end_a_writer_on_a_two_way_file(stack: Stack) -> None:
    a, b = socket.socketpair()
    with b:
        b.setblocking(False)
        async with stack.open() as group:
            transport, protocol = await connect_writer(group, a)
            b.send(b"input that nobody wants")
            await anyio.sleep(0.02)
            assert not transport.is_closing()
            transport.write(b"still here")
            assert await drain(b, 10) == b"still here"
            assert protocol.names == ["connection_made"]


@contextmanager
def terminal() -> Iterator[tuple[Any, Any]]:
    """Yield both ends of a pseudo-terminal: the program's and the user's."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    with open(master, "r+b", 0) as user, open(slave, "r+b", 0) as program:
        os.set_blocking(user.fileno(), False)
        yield program, user


async def test_p6_terminals_in_both_directions(stack: Stack) -> None:
    with terminal() as (program, user):
        second = open(os.dup(program.fileno()), "wb", 0)
        async with stack.open() as group:
            reading, receiver = await connect_reader(group, program)
            writing, sender = await connect_writer(group, second)
            user.write(b"typed")
            await receiver.wait_received(5)
            assert not writing.is_closing()
            writing.write(b"shown")
            assert await drain(user, 5) == b"shown"
            writing.close()
            await sender.wait_for("connection_lost")
            reading.close()
            await receiver.wait_for("connection_lost")


@pytest.mark.needs_polling("the file blocks all the time")
@pytest.mark.differs("standard input, output and error, when their transport ends")
@pytest.mark.parametrize("first", ["reader", "writer"])
@pytest.mark.parametrize("closed", ["reader", "writer"])
async def test_a_terminal_for_both_blocks_again_after_its_last_transport(
    anyio_backend: Any, first: str, closed: str
) -> None:
    """Input and output of a terminal are one open file description: closing one must not affect the other."""
    connect = {"reader": connect_reader, "writer": connect_writer}
    with terminal() as (program, user):
        # Duplicates, as standard input and output are: the test checks the file after they are closed.
        files = {"reader": open(os.dup(program.fileno()), "rb", 0), "writer": open(os.dup(program.fileno()), "wb", 0)}
        transports, protocols = {}, {}
        async with TransportGroup() as group:
            for name in sorted(files, key=first.__ne__):
                transports[name], protocols[name] = await connect[name](group, files[name])
            transports[closed].close()
            await protocols[closed].wait_for("connection_lost")
            assert not os.get_blocking(program.fileno())
            if closed == "reader":
                fill(transports["writer"], 1 << 20)  # more than an unread terminal takes: it would block
            else:
                user.write(b"typed")
                await protocols["reader"].wait_received(5)
            for transport in transports.values():
                transport.abort()
        assert os.get_blocking(program.fileno())


@pytest.mark.needs_polling("the two threads read from each other's files, which neither closes before it has read")
async def test_one_file_for_both_directions(stack: Stack) -> None:
    """Yield both ends of a terminal, each as one file object for reading and writing."""
    data = pattern(200_000)
    with terminal() as files:
        async with stack.open() as group:
            readers = [await connect_reader(group, file) for file in files]
            writers = [await connect_writer(group, file) for file in files]
            for transport, _ in writers:
                transport.write(data)
            for _, protocol in readers:
                assert await protocol.wait_received(len(data)) == data
            for transport, _ in writers + readers:
                assert not transport.is_closing()
                transport.close()
            for _, protocol in writers + readers:
                await protocol.wait_for("connection_lost")
                assert protocol.exception is None
        assert all(file.closed for file in files)


@pytest.mark.needs_polling("a file that is being read stays open")
@pytest.mark.differs(
    "one file for both directions, one of which is closed",
    asyncio="the file is closed for the other direction too",
    here="the other direction stays open; the last one closes the file",
    why="each transport ends by itself",
)
@pytest.mark.parametrize("opened", ["reader", "writer"])
@pytest.mark.parametrize("closed", ["reader", "writer"])
async def test_either_direction_of_one_file_may_be_closed_first(anyio_backend: Any, opened: str, closed: str) -> None:
    """asyncio closes the file that the other transport still uses."""
    connect = {"reader": connect_reader, "writer": connect_writer}
    with terminal() as (program, user):
        async with TransportGroup() as group:
            before = open_descriptors()
            transports, protocols = {}, {}
            for name in sorted(connect, key=opened.__ne__):
                transports[name], protocols[name] = await connect[name](group, user)
            transports[closed].close()
            await protocols[closed].wait_for("connection_lost")
            if closed == "reader":
                data = pattern(100_000)
                transports["writer"].write(data)
                assert await drain(program, len(data)) == data
            else:
                program.write(b"shown")
                assert await protocols["reader"].wait_received(5) == b"shown"
            (last,) = connect.keys() - {closed}
            assert not protocols[last].lost
            number = user.fileno() if not user.closed else None
            transports[last].close()
            await protocols[last].wait_for("connection_lost")
            await turns()
            assert user.closed
            assert number is None or number not in open_descriptors()
            assert len(open_descriptors()) == len(before) - 1


@pytest.mark.differs(
    "devices that are always ready (`/dev/null`)",
    asyncio="`PermissionError` in a callback",
    here="work",
    why="standard input is often one",
)
@pytest.mark.ours_only
async def test_character_devices_that_are_always_ready(stack: Stack) -> None:
    async with stack.open() as group:
        _, nothing = await connect_reader(group, open("/dev/null", "rb", 0))
        await nothing.wait_for("connection_lost")
        assert nothing.names == ["connection_made", "eof_received", "connection_lost"]
        transport, zeros = await connect_reader(group, open("/dev/zero", "rb", 0))
        await zeros.wait_received(1 << 20)
        transport.close()
        await zeros.wait_for("connection_lost")
        assert not any(zeros.received)
        sink, protocol = await connect_writer(group, open("/dev/null", "wb", 0))
        sink.write(bytes(1 << 20))
        sink.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@pytest.mark.parametrize("method", ["connect_read_pipe", "connect_write_pipe"])
async def test_p9_regular_files_are_refused_and_left_usable(stack: Stack, method: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open(tmp_path / "file", "r+b") as file:
        async with stack.open() as group:
            with pytest.raises(ValueError, match=r"[Pp]ipe"):
                await getattr(group, method)(Recorder, file)
        assert file.read() == b"content"
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)


async def test_p8_many_pipes_beside_one_that_carries_much(stack: Stack) -> None:
    data = pattern(4 << 20)
    with pipe() as (reader, writer):
        async with stack.open() as group:
            _, receiver = await connect_reader(group, reader)
            writing, sender = await connect_writer(group, writer)
            writing.write(data)
            writing.close()
            for number in range(60):
                read, write = os.pipe()
                transport, protocol = await connect_reader(group, open(read, "rb", 0))
                os.write(write, b"%d" % number)
                os.close(write)
                await protocol.wait_for("connection_lost")
                assert protocol.received == b"%d" % number
                assert transport.is_closing()
            await sender.wait_for("connection_lost")
            await receiver.wait_for("connection_lost")
            assert receiver.received == data


# -- files that other code closes, or whose close fails --------------------------------------------------------


@pytest.mark.parametrize("method", ["connect_read_pipe", "connect_write_pipe"])
async def test_a_file_that_its_owner_has_closed(stack: Stack, method: str) -> None:
    with anyio.fail_after(GUARD), pipe() as ends:
        async with stack.open() as group:
            contexts = collect_contexts(group)
            end = ends[method == "connect_write_pipe"]
            transport, protocol = await getattr(group, method)(Recorder, end)
            await until(lambda: protocol.transport)
            end.close()
            transport.close()
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None
        assert contexts == []


async def test_a_file_that_its_owner_has_closed_before_the_block_is_left(anyio_backend: Any) -> None:
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            with pipe() as (reader, writer):
                _, receiver = await connect_reader(group, reader)
                _, sender = await connect_writer(group, writer)
        assert receiver.lost
        assert sender.lost
        assert contexts == []


async def test_an_fd_reused_by_another_file_is_left_alone(stack: Stack) -> None:
    """The fd was blocking and would be made blocking again, but it now belongs to another file."""
    with anyio.fail_after(GUARD), unix_connection() as (near, far), pipe() as (reader, _):
        near.setblocking(False)
        async with stack.open() as group:
            transport, protocol = await connect_reader(group, reader)
            number = reader.fileno()
            reader.close()
            os.dup2(near.fileno(), number)
            with socket.socket(fileno=number) as stranger:
                transport.close()
                await protocol.wait_for("connection_lost")
                await settle(group)
                assert not os.get_blocking(number)
                far.send(b"still open")
                assert stranger.recv(100) == b"still open"


@pytest.mark.parametrize("first", ["connect_read_pipe", "connect_accepted_socket"])
async def test_a_pipe_with_the_number_of_a_closed_file_is_closed(anyio_backend: Any, first: str) -> None:
    """Other code has closed the file of a transport that has not noticed, and the pipe got its fd."""
    with anyio.fail_after(GUARD), unix_connection() as (near, _), pipe() as (reader, writer):
        async with TransportGroup() as group:
            _, protocol = await getattr(group, first)(Recorder, near)
            number = near.fileno()
            near.close()
            os.dup2(writer.fileno(), number)
            writer.close()
            transport, sender = await connect_writer(group, open(number, "wb", 0))
            transport.write(b"all")
            transport.close()
            await sender.wait_for("connection_lost")
            await turns()
            assert number not in open_descriptors()
            assert reader.read() == b"all"
            assert not protocol.lost


async def test_one_file_for_both_directions_in_two_groups(anyio_backend: Any) -> None:
    with anyio.fail_after(GUARD), unix_connection() as (near, far):
        async with TransportGroup() as outer:
            _, receiver = await connect_reader(outer, near)
            async with TransportGroup() as inner:
                transport, _ = await connect_writer(inner, near)
                transport.write(b"written")
            assert far.recv(100) == b"written"
            far.send(b"read")
            assert await receiver.wait_received(4) == b"read"
        assert near.fileno() == -1


@pytest.mark.differs(
    "a file descriptor that was closed and now belongs to another pipe",
    asyncio="closing the first transport stops reading from the second pipe",
    here="the second pipe is not affected",
    why="they are two files",
)
@pytest.mark.ours_only
async def test_an_fd_reused_by_another_pipe_is_left_alone(stack: Stack) -> None:
    with anyio.fail_after(GUARD), pipe() as (first, _), pipe() as (second, writer):
        async with stack.open() as group:
            transport, protocol = await connect_reader(group, first)
            number = first.fileno()
            first.close()
            os.dup2(second.fileno(), number)
            reusing, receiver = await connect_reader(group, open(number, "rb", 0))
            transport.close()
            await protocol.wait_for("connection_lost")
            await turns()
            writer.write(b"for the second")
            assert await receiver.wait_received(14) == b"for the second"
            reusing.close()
            await receiver.wait_for("connection_lost")
            await turns()
            assert number not in open_descriptors()


@pytest.mark.needs_polling(HANGUP)
@pytest.mark.differs(
    "a file whose `close` raises",
    asyncio="reported; the transport never ends, and warns",
    here="reported, and the transport ends",
    why="nothing leaks",
)
@pytest.mark.ours_only
async def test_a_file_whose_close_fails(stack: Stack) -> None:
    """Its own buffer is then flushed, although the reader has gone."""
    with anyio.fail_after(GUARD):
        read, write = os.pipe()
        file = open(write, "wb")
        file.write(b"waits in the file")
        async with stack.open() as group:
            contexts = collect_contexts(group)
            _, protocol = await connect_writer(group, file)
            os.close(read)
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None
            await until(lambda: contexts)
            (context,) = contexts
            assert isinstance(context["exception"], BrokenPipeError)
        assert file.closed


@pytest.mark.needs_polling("epoll is not asked")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is epoll's")
@pytest.mark.parametrize("connect", [connect_reader, connect_writer])
async def test_epoll_refuses_the_pipe(anyio_backend: Any, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The epoll limit of the user is reached: that is raised, and not reported as well."""
    from transports_anyio._selector import EpollSelector

    add = EpollSelector.add

    def limited(self: EpollSelector, descriptor: int, interest: int) -> None:
        if descriptor == end.fileno():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, descriptor, interest)

    with pipe() as ends:
        end = ends[connect is connect_writer]
        protocol = Recorder()
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
                patch.setattr(EpollSelector, "add", limited)
                await connect(group, end, protocol)
            await protocol.wait_for("connection_lost")
            await settle(group)
            assert end.closed
            assert contexts == []


# -- the group -----------------------------------------------------------------------------------------------


async def test_leaving_by_an_exception_closes_both_ends(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        receiver, sender = Recorder(), Recorder()
        with pytest.raises(BaseException) as caught:
            async with TransportGroup() as group:
                await connect_reader(group, reader, receiver)
                transport, _ = await connect_writer(group, writer, sender)
                transport.write(bytes(10 << 20))
                raise LookupError
        assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
        assert receiver.lost
        assert sender.lost
        assert reader.closed
        assert writer.closed


@pytest.mark.parametrize("method", ["connect_read_pipe", "connect_write_pipe"])
async def test_a_factory_that_raises_closes_the_pipe(anyio_backend: Any, method: str) -> None:
    def factory() -> Any:
        raise LookupError

    with pipe() as ends:
        async with TransportGroup() as group:
            end = ends[method == "connect_write_pipe"]
            with pytest.raises(LookupError):
                await getattr(group, method)(factory, end)
            assert end.closed


# -- our own standard streams --------------------------------------------------------------------------------

FILTER = """
import sys, os, anyio
from transports_anyio import *

class Upper(Protocol):
    def __init__(self): self.done = anyio.Event()
    def data_received(self, data): self.out.write(data.upper())
    def connection_lost(self, exc): self.done.set()

async def main():
    async with TransportGroup() as group:
        out, _ = await group.connect_write_pipe(Protocol, sys.stdout)
        upper = Upper()
        upper.out = out
        await group.connect_read_pipe(lambda: upper, sys.stdin)
        await upper.done.wait()
    assert [os.get_blocking(fd) for fd in range(3)] == [True] * 3
    print("usable")
"""


@pytest.mark.differs(
    "standard input, output and error, when their transport ends",
    asyncio="closed",
    here="left open, and blocking again if they were",
    why="other code, and other processes, share them",
)
async def test_standard_streams_work_and_are_left_usable(anyio_backend: Any) -> None:
    result = await run_main(FILTER, anyio_backend, input=b"hello\n", stderr=None)
    assert result.stdout == b"HELLO\nusable\n"


PEAK = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_the_memory_of_a_filter_is_bounded(anyio_backend: Any, tmp_path: Path) -> None:
    """64 MiB through the filter example, gzip in the middle: back-pressure in both directions."""
    name, options = anyio_backend
    backend = "uvloop" if options.get("use_uvloop") else name
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20) * 64)
    example = str(Path(__file__).parents[1] / "examples" / "filter_file.py")
    command = [sys.executable, "-c", PEAK, example, "--backend", backend, str(source), str(tmp_path / "target"), "gzip"]
    result = await anyio.run_process([*command, "-1"], stderr=None)
    assert int(result.stdout) < 96 * 1024, "KiB: the file would not fit"
    unpacked = await anyio.run_process(["gzip", "-dc", str(tmp_path / "target")], stdout=subprocess.PIPE)
    assert unpacked.stdout == source.read_bytes()


# -- where pipes cannot be polled --------------------------------------------------------------------------------------


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: `--descriptors threads` for one test."""
    monkeypatch.setattr(_capabilities, "polls_files", False)


@pytest.mark.usefixtures("in_threads")
async def test_bulk_data_through_threads(anyio_backend: Any) -> None:
    data = pattern(4 << 20)
    with pipe() as (reader, writer):
        async with TransportGroup() as group:
            _, receiver = await connect_reader(group, reader)
            transport, sender = await connect_writer(group, writer)
            assert {thread.name for thread in threading.enumerate()} & {f"transports_anyio: pipe {reader.fileno()}"}
            transport.writelines([data[:100_000], data[100_000:]])
            assert sender.names[-1] == "pause_writing"
            transport.close()
            assert await receiver.wait_received(len(data)) == data
            await receiver.wait_for("connection_lost")
            assert sender.names == ["connection_made", "pause_writing", "resume_writing", "connection_lost"]
            assert sender.exception is receiver.exception is None
        assert reader.closed
        assert writer.closed


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("how", ["close", "exception"])
async def test_a_silent_pipe_that_a_thread_reads_does_not_hold_the_group_back(anyio_backend: Any, how: str) -> None:
    with pipe() as (reader, writer):
        before = open_descriptors()
        with anyio.fail_after(GUARD), suppress(LookupError, BaseExceptionGroup):
            async with TransportGroup() as group:
                transport, protocol = await connect_reader(group, reader)
                if how == "exception":
                    raise LookupError
                transport.close()
        assert protocol.names == ["connection_made", "connection_lost"]
        assert reader.closed
        assert len(open_descriptors()) == len(before), "the thread has one, instead of ours"
        writer.write(b"lost with the thread")
        await until(lambda: len(open_descriptors()) == len(before) - 1)


@pytest.mark.usefixtures("in_threads")
async def test_a_full_pipe_that_a_thread_writes_does_not_hold_the_group_back(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        with anyio.fail_after(GUARD):
            async with TransportGroup() as group:
                transport, protocol = await connect_writer(group, writer)
                size = fill(transport, 1 << 20)
                transport.abort()
                await protocol.wait_for("connection_lost")
                assert protocol.exception is None
        assert len(await drain(reader)) < size


@pytest.mark.usefixtures("in_threads")
async def test_a_write_in_a_thread_shows_that_the_reader_has_gone(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            transport, protocol = await connect_writer(group, writer)
            reader.close()
            await settle(group)
            assert protocol.names == ["connection_made"]
            transport.write(b"x")
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, BrokenPipeError)
            assert contexts == []


@pytest.mark.usefixtures("in_threads")
async def test_windows_has_another_error_for_a_broken_pipe(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call fails as there: https://bugs.python.org/issue19612."""

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pipe() as (_, writer):
        async with TransportGroup() as group:
            monkeypatch.setattr(_threaded_pipe, "sys", SimpleNamespace(platform="win32"))
            monkeypatch.setattr(os, "write", fail)
            transport, protocol = await connect_writer(group, writer)
            transport.write(b"x")
            await protocol.wait_for("connection_lost")
            monkeypatch.undo()
            assert isinstance(protocol.exception, BrokenPipeError)


@pytest.mark.usefixtures("in_threads")
async def test_reading_that_is_paused_holds_one_chunk_back(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        async with TransportGroup() as group:
            transport, protocol = await connect_reader(group, reader)
            transport.pause_reading()
            writer.write(b"first")
            await until(lambda: not leftover(reader))
            writer.write(b"second")
            await settle(group)
            assert protocol.received == b""
            assert leftover(reader) == len(b"second")
            for _ in range(3):
                transport.resume_reading()
                transport.pause_reading()
            transport.resume_reading()
            assert await protocol.wait_received(11) == b"firstsecond"
            transport.pause_reading()
            transport.resume_reading()
            writer.close()
            await protocol.wait_for("connection_lost")
            assert protocol.names[-2:] == ["eof_received", "connection_lost"]


def leftover(reader: Any) -> int:
    """Return how many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(reader.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("method", ["connect_read_pipe", "subprocess_exec"])
async def test_no_thread_can_be_started_for_a_pipe(
    anyio_backend: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("transports_anyio: pipe"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with anyio.fail_after(GUARD), pipe() as (reader, _):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            monkeypatch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(OSError, match="no thread can be started"):
                if method == "connect_read_pipe":
                    await connect_reader(group, reader)
                else:
                    await group.subprocess_exec(Child, "cat")
            monkeypatch.undo()
        assert contexts == []


SILENT = """
import sys, anyio
from transports_anyio import Protocol, TransportGroup, _capabilities

_capabilities.polls_files = False

async def main():
    async with TransportGroup() as group:
        transport, _ = await group.connect_read_pipe(Protocol, sys.stdin)
        transport.close()
    print("left", flush=True)
"""


async def test_a_program_ends_although_a_thread_reads_its_input(anyio_backend: Any) -> None:
    """The interpreter waits for no thread of ours: a terminal may never be typed into."""
    read, write = os.pipe()
    try:
        result = await run_main(SILENT, anyio_backend, stdin=read, stderr=None)
        assert result.stdout == b"left\n"
    finally:
        os.close(read)
        os.close(write)


# -- groups in several threads ----------------------------------------------------------------------------------------


#: How often each of two threads uses the terminal and closes its transport.
ROUNDS_IN_THREADS = 300


def poller_of_a_thread() -> Poller:
    selector = make_system_selector()
    assert selector is not None
    return Poller(selector, TaskDriver(selector, anyio.current_time))


@pytest.mark.needs_polling("the file blocks all the time")
def test_g6_a_terminal_used_by_groups_in_two_threads(anyio_backend: Any) -> None:
    """One thread restores the open file's mode while the other starts to use it: the last one makes it blocking
    again."""
    name, options = anyio_backend
    first, second = os.openpty()
    failures: list[BaseException] = []
    meet = threading.Barrier(2)

    async def use() -> None:
        async with TransportGroup() as group:
            for _ in range(ROUNDS_IN_THREADS):
                transport, protocol = await group.connect_read_pipe(Recorder, open(os.dup(second), "rb", 0))
                assert not os.get_blocking(second)
                transport.close()
                await protocol.wait_for("connection_lost")

    def run() -> None:
        meet.wait(GUARD)
        try:
            anyio.run(use, backend=name, backend_options=options)
        except BaseException as exc:
            failures.append(exc)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert os.get_blocking(second)
        assert _pipe.open_channels == {}
    finally:
        sys.setswitchinterval(before)
        os.close(first)
        os.close(second)


def test_g6_shared_state_is_changed_under_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is stopped while it closes a channel: another thread must wait before it makes one."""
    reader, writer = os.pipe()
    half_way, go_on, made = threading.Event(), threading.Event(), threading.Event()
    original = os.set_blocking

    def set_blocking(descriptor: int, blocking: bool) -> None:
        if blocking and threading.current_thread() is closing:
            half_way.set()
            assert go_on.wait(GUARD)
        original(descriptor, blocking)

    def make() -> None:
        others.append(_pipe.PipeChannel(poller_of_a_thread(), open(os.dup(reader), "rb", 0), writing=False))
        made.set()

    others: list[Any] = []
    poller = poller_of_a_thread()
    channel = _pipe.PipeChannel(poller, open(reader, "rb", 0, closefd=False), writing=False)
    monkeypatch.setattr(os, "set_blocking", set_blocking)
    closing = threading.Thread(target=channel.close, kwargs={"aborted": True})
    making = threading.Thread(target=make)
    closing.start()
    assert half_way.wait(GUARD)
    making.start()
    assert not made.wait(0.1)
    go_on.set()
    closing.join()
    making.join()
    monkeypatch.undo()
    assert not os.get_blocking(reader)
    others[0].close(aborted=True)
    assert os.get_blocking(reader)
    for each in (poller, others[0]._poller):
        each.close()
    os.close(reader)
    os.close(writer)
