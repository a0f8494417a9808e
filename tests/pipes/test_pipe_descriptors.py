"""Pipes: FIFOs, sockets, terminals, devices, and files that are used in both directions."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Any

import anyio
import pytest
from pipe_helpers import connect_reader, connect_writer, drain, terminal, unix_connection
from support import GUARD, Recorder, Stack, fill, open_descriptors, pattern, turns

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


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


# -- both directions -----------------------------------------------------------------------------------------


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


@pytest.mark.needs_polling("the file blocks all the time")
@pytest.mark.parametrize("appending", [False, True])
async def test_a_terminal_is_never_blocking_while_a_transport_uses_it(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, appending: bool
) -> None:
    """Not even for a moment: another thread, or another process, would hang in a system call."""
    with terminal() as (program, _):
        name = os.ttyname(program.fileno())
        append = os.O_APPEND if appending else 0
        shared = os.open(name, os.O_RDWR | os.O_NOCTTY | append)
        alone = os.open(name, os.O_RDWR | os.O_NOCTTY | append)
        files = [open(os.dup(shared), "rb", 0), open(alone, "wb", 0), open(os.dup(shared), "wb", 0)]
        flags = fcntl.fcntl(shared, fcntl.F_GETFL)
        modes = []

        def set_blocking(fd: int, blocking: bool) -> None:
            if os.get_blocking(fd) != blocking:
                modes.append(blocking)
            original(fd, blocking)

        original = os.set_blocking
        monkeypatch.setattr(os, "set_blocking", set_blocking)
        async with TransportGroup() as group:
            for file, connect in zip(files, [connect_reader, connect_writer, connect_writer], strict=True):
                transport, protocol = await connect(group, file)
                if file is files[0]:
                    first, first_protocol = transport, protocol
            assert modes == [False, False]
            first.close()
            await first_protocol.wait_for("connection_lost")
            assert modes == [False, False]
        assert modes == [False, False, True, True]
        assert fcntl.fcntl(shared, fcntl.F_GETFL) == flags
        os.close(shared)


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
