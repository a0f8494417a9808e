"""Pipes: files that are closed by their transport, by other code, or because a call fails."""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import Any

import anyio
import pytest
from pipe_helpers import HANGUP, connect_reader, connect_writer, pipe, unix_connection
from support import GUARD, Recorder, Stack, collect_contexts, leaves, open_descriptors, pattern, settle, turns, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


# -- files that other code closes, or whose close fails ------------------------------------------------------


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


# -- the group, and calls that fail --------------------------------------------------------------------------


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
