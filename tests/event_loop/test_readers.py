from __future__ import annotations

import asyncio
import contextvars
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
from network import needs_pipes, needs_selector
from support import socket_pair

#: There these methods are uvloop's own, which differ in details.
LEFT_OUT = ["uvloop"]

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")


async def pauses(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_reader_is_called_while_there_is_something_to_read(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            done = loop.create_future()
            received = []

            def read(*args: object) -> None:
                assert asyncio.get_running_loop() is loop
                received.append((args, variable.get(), ours.recv(1)))
                if len(received) == 3:
                    done.set_result(None)

            token = variable.set("when added")
            assert loop.add_reader(ours, read, 1, "two") is None
            variable.reset(token)
            theirs.send(b"abc")
            await done
            assert received == [((1, "two"), "when added", byte) for byte in (b"a", b"b", b"c")]
            assert loop.remove_reader(ours) is True
            theirs.send(b"d")
            await pauses()
            assert len(received) == 3
            assert loop.remove_reader(ours) is False

    run(main)


def test_a_writer_is_called_while_there_is_room(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            calls = []
            called = asyncio.Event()

            def write() -> None:
                calls.append(1)
                if len(calls) == 3:
                    loop.remove_writer(ours)
                    called.set()

            loop.add_writer(ours, write)
            await called.wait()
            await pauses()
            assert len(calls) == 3
            assert loop.remove_writer(ours) is False

    run(main)


def test_both_directions_of_one_file_descriptor(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            reads: list[bytes] = []
            written = asyncio.Event()
            loop.add_reader(ours.fileno(), lambda: reads.append(ours.recv(10)))
            loop.add_writer(ours.fileno(), written.set)
            await written.wait()
            theirs.send(b"one")
            await until(lambda: reads)
            assert reads == [b"one"]
            assert loop.remove_writer(ours.fileno())
            theirs.send(b"two")
            await until(lambda: len(reads) > 1)
            assert reads == [b"one", b"two"]
            assert loop.remove_reader(ours.fileno())

    run(main)


def test_a_second_callback_takes_the_place_of_the_first(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            calls = []
            called = asyncio.Event()
            loop.add_reader(ours, calls.append, "first")
            loop.add_reader(ours, lambda: called.set() or loop.remove_reader(ours))
            theirs.send(b"x")
            await called.wait()
            assert calls == []

    run(main)


def test_a_callback_that_another_one_removes_does_not_run(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (one, its_peer), socket_pair() as (two, other_peer):
            calls = []

            def first_of(mine: socket.socket, other: socket.socket) -> None:
                calls.append(mine)
                loop.remove_reader(mine)
                loop.remove_reader(other)

            loop.add_reader(one, first_of, one, two)
            loop.add_reader(two, first_of, two, one)
            its_peer.send(b"x")
            other_peer.send(b"x")
            await until(lambda: calls)
            await pauses(10)
            assert len(calls) == 1

    run(main)


def test_a_failing_callback_is_reported_and_stays(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            reported: list[dict[str, Any]] = []
            loop.set_exception_handler(lambda _, context: reported.append(context))
            loop.add_reader(ours, lambda: 1 / 0)
            theirs.send(b"x")
            while len(reported) < 2:
                await asyncio.sleep(0)
            loop.remove_reader(ours)
            assert all(isinstance(context["exception"], ZeroDivisionError) for context in reported)
            assert reported[0]["message"].startswith("Exception in callback")
            assert isinstance(reported[0]["handle"], asyncio.Handle)

    run(main)


def test_the_end_of_a_pipe(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        with open(read_end, "rb", buffering=0) as reading:
            ended = asyncio.Event()
            loop.add_reader(reading, lambda: ended.set() or loop.remove_reader(reading))
            os.close(write_end)
            await ended.wait()

    run(main)


@needs_selector
def test_a_file_on_a_disk_cannot_be_watched(run, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"data")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with path.open("rb") as file:
            for add, remove in [(loop.add_reader, loop.remove_reader), (loop.add_writer, loop.remove_writer)]:
                with pytest.raises(PermissionError):
                    add(file, print)
                assert not remove(file)

    run(main)


def test_what_is_no_file_descriptor(run):
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        for add, remove in [(loop.add_reader, loop.remove_reader), (loop.add_writer, loop.remove_writer)]:
            for bad in ("text", None, object()):
                with pytest.raises(ValueError, match="Invalid file object"):
                    add(bad, print)
                with pytest.raises(ValueError, match="Invalid file object"):
                    remove(bad)

    run(main)


@needs_selector
def test_closed_file_descriptors(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            number = ours.fileno()
            ours.close()
            for add, remove in [(loop.add_reader, loop.remove_reader), (loop.add_writer, loop.remove_writer)]:
                with pytest.raises(OSError):
                    add(number, print)
                assert not remove(number)
                with pytest.raises(ValueError, match="Invalid file descriptor: -1"):
                    add(ours, print)
                with pytest.raises(ValueError, match="Invalid file descriptor: -1"):
                    remove(ours)

    run(main)


@pytest.mark.differs(
    "`remove_reader` for a closed file that also has a writer",
    asyncio="`OSError`",
    here="both can be removed",
    why="there is no reason to fail",
)
def test_a_file_that_was_closed_can_still_be_taken_out(run):
    if run.name != "trio":
        pytest.skip("asyncio raises for the first direction")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            loop.add_reader(ours, print)
            loop.add_writer(ours, print)
            ours.close()
            assert loop.remove_reader(ours) is True
            assert loop.remove_writer(ours) is True

    run(main)


@pytest.mark.differs(
    "`add_reader` for a number that was closed without `remove_reader` and now belongs to another file",
    asyncio="the callback is never called",
    here="the callback is called",
    why="the file is registered again",
)
def test_a_number_that_was_closed_and_not_taken_out(run):
    if run.name != "trio":
        pytest.skip("asyncio does not notice")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        first, peer = socket.socketpair()
        loop.add_reader(first, print, "never")
        number = first.fileno()
        first.close()
        peer.close()
        with socket_pair() as (ours, theirs):
            assert number in (ours.fileno(), theirs.fileno())
            one, other = (ours, theirs) if ours.fileno() == number else (theirs, ours)
            called = asyncio.Event()
            loop.add_reader(one, lambda: called.set() or loop.remove_reader(one))
            other.send(b"x")
            await called.wait()

    run(main)


def test_a_file_descriptor_of_a_transport(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
            number = transport.get_extra_info("socket").fileno()
            for add, remove in [(loop.add_reader, loop.remove_reader), (loop.add_writer, loop.remove_writer)]:
                with pytest.raises(RuntimeError, match="is used by transport"):
                    add(number, print)
                with pytest.raises(RuntimeError, match="is used by transport"):
                    remove(number)
            transport.close()
            await pauses(10)

    run(main)


@pytest.mark.differs(
    "`add_reader` for the listening socket of a server",
    asyncio="the server accepts no more connections",
    here="`RuntimeError`, as for a transport's socket",
    why="a server must not stop without an error",
)
def test_a_listening_socket_of_a_server(run):
    """The server would accept no connections any more. asyncio lets that happen."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        number = server.sockets[0].fileno()
        if run.name == "trio":
            for add in (loop.add_reader, loop.add_writer):
                with pytest.raises(RuntimeError, match="is used by transport"):
                    add(number, print)
        else:
            loop.add_reader(number, print)
            assert loop.remove_reader(number)
        server.close()
        await server.wait_closed()

    run(main)


class Received(asyncio.Protocol):
    def __init__(self) -> None:
        self.data: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.data.set_result(data)


@pytest.mark.parametrize("removed", [False, True])
def test_a_transport_takes_a_socket_over_that_has_a_reader(run, removed):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            calls: list[int] = []
            loop.add_reader(ours, calls.append, 1)
            if removed:
                loop.remove_reader(ours)
            transport, protocol = await loop.create_connection(Received, sock=ours)
            theirs.send(b"data")
            assert await protocol.data == b"data"
            assert calls == []
            transport.close()
            await pauses(10)

    run(main)


@needs_pipes
def test_a_transport_takes_a_pipe_over_that_has_a_reader(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        calls: list[int] = []
        loop.add_reader(read_end, calls.append, 1)
        transport, protocol = await loop.connect_read_pipe(Received, open(read_end, "rb", buffering=0))
        os.write(write_end, b"data")
        os.close(write_end)
        assert await protocol.data == b"data"
        assert calls == []
        transport.close()
        await pauses(10)

    run(main)


def test_what_is_left_at_the_end_is_taken_out(run):
    calls = []
    with socket_pair() as (ours, theirs):

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.add_reader(ours, calls.append, "read")
            loop.add_writer(theirs, lambda: None)

        run(main)
        theirs.send(b"x")
        assert ours.recv(10) == b"x"
        assert calls == []


def test_a_reader_does_not_keep_callbacks_and_timers_waiting(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            loop.add_writer(ours, lambda: None)  # Always ready.
            await asyncio.sleep(0.01)
            called = asyncio.Event()
            loop.call_soon(called.set)
            await called.wait()
            assert await asyncio.to_thread(int, "1") == 1
            loop.remove_writer(ours)

    run(main)


@needs_selector
def test_what_a_callback_schedules_runs_after_the_other_readers(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (one, its_peer), socket_pair() as (two, other_peer):
            order: list[str] = []

            def read(sock: socket.socket, name: str) -> None:
                sock.recv(1)
                order.append(name)
                loop.call_soon(order.append, f"scheduled by {name}")

            loop.add_reader(one, read, one, "reader")
            loop.add_reader(two, read, two, "reader")
            its_peer.send(b"x")
            other_peer.send(b"x")
            await until(lambda: len(order) == 4)
            assert order == ["reader", "reader", "scheduled by reader", "scheduled by reader"]
            loop.remove_reader(one)
            loop.remove_reader(two)

    run(main)
