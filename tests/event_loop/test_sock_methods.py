from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import ssl
from typing import Any

import pytest
from network import needs_sendfile, needs_unix
from support import pattern, socket_pair

#: There these methods are uvloop's own, which differ in details.
LEFT_OUT = ["uvloop"]


@contextlib.contextmanager
def listener(family: int = socket.AF_INET) -> Any:
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        sock.listen()
        yield sock


@contextlib.contextmanager
def client(family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> Any:
    with socket.socket(family, kind) as sock:
        sock.setblocking(False)
        yield sock


async def pauses(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def waiting(coroutine: Any) -> asyncio.Task[Any]:
    """Start a task that has to wait for a socket."""
    task = asyncio.create_task(coroutine)
    await pauses()
    assert not task.done()
    return task


def test_receive_what_is_there_and_what_comes(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            theirs.send(b"at once")
            assert await loop.sock_recv(ours, 100) == b"at once"
            task = await waiting(loop.sock_recv(ours, 4))
            theirs.send(b"later on")
            assert await task == b"late"
            buffer = bytearray(10)
            assert await loop.sock_recv_into(ours, buffer) == 4
            assert buffer[:4] == b"r on"
            task = await waiting(loop.sock_recv_into(ours, memoryview(buffer)[2:5]))
            theirs.send(b"123456")
            assert await task == 3
            assert buffer[:6] == b"r 123\0"
            assert await loop.sock_recv(ours, 100) == b"456"
            theirs.close()
            assert await loop.sock_recv(ours, 100) == b""

    run(main)


def test_send_more_than_the_system_takes(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        data = pattern(3_000_000)
        with socket_pair(small=True) as (ours, theirs):
            task = await waiting(loop.sock_sendall(ours, data))
            received = bytearray()
            while len(received) < len(data):
                received += await loop.sock_recv(theirs, 100_000)
            await task
            assert received == data

    run(main)


@pytest.mark.parametrize("empty", [b"", bytearray(), memoryview(b"")], ids=lambda each: type(each).__name__)
def test_send_nothing(run, empty):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            assert await loop.sock_sendall(ours, empty) is None

    run(main)


@pytest.mark.differs(
    "`sock_sendall` of a buffer whose items are not bytes",
    asyncio="sends parts of it twice",
    here="sends it once",
    why="bytes are counted, not items",
)
def test_send_all_items_of_a_buffer_of_numbers(run):
    if not run.is_ours:
        pytest.skip("asyncio's own compare the number of bytes with the number of items")
    data = memoryview(pattern(400_000)).cast("I")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair(small=True) as (ours, theirs):
            task = await waiting(loop.sock_sendall(ours, data))
            received = bytearray()
            while len(received) < data.nbytes:
                received += await loop.sock_recv(theirs, 100_000)
            await task
            assert received == data.tobytes()

    run(main)


def test_a_buffer_can_be_resized_after_it_was_sent(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        data = bytearray(b"x" * 10)
        with socket_pair() as (ours, theirs):
            await loop.sock_sendall(ours, data)
            data += b"more"
            assert await loop.sock_recv(theirs, 100) == b"x" * 10

    run(main)


def test_sending_what_is_not_bytes(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            with pytest.raises(TypeError):
                await loop.sock_sendall(ours, "text")

    run(main)


def test_datagrams(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        if not hasattr(loop, "sock_recvfrom"):
            pytest.skip("of Python 3.11")
        with client(kind=socket.SOCK_DGRAM) as one, client(kind=socket.SOCK_DGRAM) as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            assert await loop.sock_sendto(one, b"first", two.getsockname()) == 5
            assert await loop.sock_recvfrom(two, 100) == (b"first", one.getsockname())
            task = await waiting(loop.sock_recvfrom(two, 100))
            assert await loop.sock_sendto(one, b"second", two.getsockname()) == 6
            assert await task == (b"second", one.getsockname())
            buffer = bytearray(10)
            task = await waiting(loop.sock_recvfrom_into(two, buffer))
            await loop.sock_sendto(one, b"third", two.getsockname())
            assert await task == (5, one.getsockname())
            assert buffer[:5] == b"third"
            await loop.sock_sendto(one, b"fourth", two.getsockname())
            assert await loop.sock_recvfrom_into(two, buffer, 2) == (2, one.getsockname())
            assert buffer[:5] == b"foird"

    run(main)


class Replaceable(socket.socket):
    """A socket whose methods can be replaced: it has a `__dict__`."""


@pytest.mark.parametrize("method", ["recv", "recv_into", "recvfrom", "recvfrom_into", "send", "sendto", "accept"])
def test_the_method_of_a_socket_is_looked_up_for_each_try(run, method):
    """Code that wraps sockets, or a test, replaces it while a task waits."""

    def blocks(*args: Any) -> Any:
        raise BlockingIOError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            if method == "accept":
                server = stack.enter_context(listener())
                other = stack.enter_context(client())
                other.connect_ex(server.getsockname())
                sock = stack.enter_context(Replaceable(fileno=server.detach()))
            else:
                kind = socket.SOCK_STREAM if method == "send" else socket.SOCK_DGRAM
                sock = stack.enter_context(Replaceable(socket.AF_INET, kind))
                sock.setblocking(False)
                if method == "send":
                    server = stack.enter_context(listener())
                    await loop.sock_connect(sock, server.getsockname())
                else:
                    sock.bind(("127.0.0.1", 0))
                    sock.sendto(b"data", sock.getsockname())  # To itself: what there is to receive.
            address = sock.getsockname()
            call = {
                "recv": lambda: loop.sock_recv(sock, 10),
                "recv_into": lambda: loop.sock_recv_into(sock, bytearray(10)),
                "recvfrom": lambda: loop.sock_recvfrom(sock, 10),
                "recvfrom_into": lambda: loop.sock_recvfrom_into(sock, bytearray(10)),
                "send": lambda: loop.sock_sendall(sock, b"data"),
                "sendto": lambda: loop.sock_sendto(sock, b"data", address),
                "accept": lambda: loop.sock_accept(sock),
            }[method]
            if method.startswith(("recvfrom", "sendto")) and not hasattr(loop, "sock_sendto"):
                pytest.skip("of Python 3.11")
            setattr(sock, method, blocks)
            task = await waiting(call())
            delattr(sock, method)
            result = await task
            if method == "accept":
                stack.enter_context(result[0])
            expected = {
                "recv": b"data",
                "recv_into": 4,
                "recvfrom": (b"data", address),
                "recvfrom_into": (4, address),
                "send": None,
                "sendto": 4,
                "accept": (result[0], other.getsockname()) if method == "accept" else None,
            }
            assert result == expected[method]

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_connect_and_accept(run, host):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener() as server, client() as sock:
            accepting = await waiting(loop.sock_accept(server))
            assert await loop.sock_connect(sock, (host, server.getsockname()[1])) is None
            accepted, address = await accepting
            with accepted:
                assert address == sock.getsockname()
                assert accepted.gettimeout() == 0
                await loop.sock_sendall(sock, b"hello")
                assert await loop.sock_recv(accepted, 100) == b"hello"

    run(main)


def test_connect_to_an_ipv6_address_with_its_scope(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener(socket.AF_INET6) as server, client(socket.AF_INET6) as sock:
            await loop.sock_connect(sock, server.getsockname())
            accepted, _ = await loop.sock_accept(server)
            accepted.close()

    run(main)


def test_names_are_resolved_by_the_event_loop(run):
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        asked = []

        async def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
            asked.append((host, port))
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname())]

        with listener() as server, client() as sock:
            loop.getaddrinfo = getaddrinfo
            try:
                await loop.sock_connect(sock, ("a.name.example", 80))
            finally:
                del loop.getaddrinfo
            assert sock.getpeername() == server.getsockname()
        assert asked == [("a.name.example", 80)]

    run(main)


def test_connecting_to_nothing(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener() as server:
            address = server.getsockname()
        with client() as sock:
            with pytest.raises(ConnectionRefusedError) as caught:
                await loop.sock_connect(sock, address)
            assert f"Connect call failed {address}" in str(caught.value)

    run(main)


def test_connecting_to_a_port_that_is_out_of_range(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with client() as sock:
            with pytest.raises(OverflowError):
                await loop.sock_connect(sock, ("127.0.0.1", 1 << 16))

    run(main)


def test_connecting_to_a_name_that_is_none(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with client() as sock:
            with pytest.raises(socket.gaierror):
                await loop.sock_connect(sock, ("no name", 80))

    run(main)


@needs_unix
def test_unix_sockets(run, tmp_path):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        path = str(tmp_path / "socket")
        with client(socket.AF_UNIX) as server, client(socket.AF_UNIX) as sock:
            server.bind(path)
            with pytest.raises(ConnectionRefusedError):
                await loop.sock_connect(sock, path)
            server.listen()
            accepting = await waiting(loop.sock_accept(server))
            await loop.sock_connect(sock, path)
            accepted, _ = await accepting
            accepted.close()
            assert await loop.sock_recv(sock, 1) == b""

    run(main)


@needs_unix
@pytest.mark.differs(
    "`sock_connect` when the backlog of a UNIX server is full",
    asyncio="returns as if connected",
    here="`BlockingIOError`",
    why="as `create_unix_connection`",
)
def test_connecting_when_the_backlog_of_a_unix_server_is_full(run, tmp_path):
    if not run.is_ours:
        pytest.skip("asyncio's own say that the socket is connected")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        path = str(tmp_path / "socket")
        with client(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
            server.bind(path)
            server.listen(0)
            with pytest.raises(BlockingIOError):
                for _ in range(10):
                    await loop.sock_connect(stack.enter_context(client(socket.AF_UNIX)), path)

    run(main)


@pytest.mark.parametrize("rounds", range(6))
def test_a_cancelled_receive_loses_nothing(run, rounds):
    if not run.is_ours:
        pytest.skip("asyncio's own receive before the task runs")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            task = await waiting(loop.sock_recv(ours, 100))
            theirs.send(b"data")
            await pauses(rounds)
            task.cancel()
            try:
                received = await task
            except asyncio.CancelledError:
                received = await loop.sock_recv(ours, 100)
            assert received == b"data"

    run(main)


@pytest.mark.differs(
    "a task in `sock_recv` or `sock_accept` that is cancelled when the socket has just become ready",
    asyncio="the received data is lost",
    here="the data stays in the socket",
    why="the task itself receives it, once it runs",
)
def test_a_receive_cancelled_when_the_socket_is_ready_loses_nothing(run):
    if not run.is_ours:
        pytest.skip("asyncio's own receive before the task runs")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs), socket_pair() as (other, its_peer):
            task = await waiting(loop.sock_recv(ours, 100))
            loop.add_reader(other, task.cancel)
            theirs.send(b"data")
            its_peer.send(b"cancel")  # In the same batch, and behind the other.
            with pytest.raises(asyncio.CancelledError):
                await task
            loop.remove_reader(other)
            assert await loop.sock_recv(ours, 100) == b"data"

    run(main)


@pytest.mark.parametrize("rounds", range(6))
def test_a_cancelled_accept_loses_no_connection(run, rounds):
    if not run.is_ours:
        pytest.skip("asyncio's own accept before the task runs")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener() as server, client() as sock:
            task = await waiting(loop.sock_accept(server))
            await loop.sock_connect(sock, server.getsockname())
            await pauses(rounds)
            task.cancel()
            try:
                accepted, _ = await task
            except asyncio.CancelledError:
                accepted, _ = await loop.sock_accept(server)
            accepted.close()

    run(main)


def test_a_time_out(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(loop.sock_recv(ours, 1), 0.01)
            theirs.send(b"x")
            assert await loop.sock_recv(ours, 1) == b"x"

    run(main)


def test_a_cancelled_method_leaves_the_next_reader_alone(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            task = await waiting(loop.sock_recv(ours, 1))
            task.cancel()
            ready = loop.create_future()
            loop.add_reader(ours, lambda: ready.done() or ready.set_result(None))
            await pauses()
            theirs.send(b"x")
            await ready
            assert loop.remove_reader(ours)

    run(main)


def test_a_cancelled_method_leaves_the_next_one_alone(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            task = await waiting(loop.sock_recv(ours, 1))
            task.cancel()
            second = asyncio.create_task(loop.sock_recv(ours, 1))
            await pauses()
            theirs.send(b"x")
            assert await second == b"x"

    run(main)


@pytest.mark.differs(
    "two tasks that wait for the same socket",
    asyncio="the first waits without end",
    here="both are served",
    why="a second wait does not replace the first",
)
def test_several_tasks_may_wait_for_one_socket(run):
    if not run.is_ours:
        pytest.skip("in asyncio's own the first of them waits forever")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            tasks = [await waiting(loop.sock_recv(ours, 1)) for _ in range(3)]
            tasks[1].cancel()
            theirs.send(b"a")
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await pauses(20)
            theirs.send(b"b")
            assert sorted([await tasks[0], await tasks[2]]) == [b"a", b"b"]
            assert not loop.remove_reader(ours)

    run(main)


def test_both_directions_at_once(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        data = pattern(1_000_000)
        with socket_pair(small=True) as (ours, theirs):
            sending = await waiting(loop.sock_sendall(ours, data))
            receiving = await waiting(loop.sock_recv(ours, 100))
            theirs.send(b"answer")
            assert await receiving == b"answer"
            received = bytearray()
            while len(received) < len(data):
                received += await loop.sock_recv(theirs, 100_000)
            await sending
            assert received == data

    run(main)


def test_a_number_that_was_closed_while_a_task_waited_for_it(run):
    if run.name != "trio":
        pytest.skip("asyncio's selector does not notice that the number belongs to another socket")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        first, peer = socket.socketpair()
        first.setblocking(False)
        task = await waiting(loop.sock_recv(first, 1))
        number = first.fileno()
        first.close()
        with peer, socket_pair() as (ours, theirs):
            assert number in (ours.fileno(), theirs.fileno())
            one, other = (ours, theirs) if ours.fileno() == number else (theirs, ours)
            second = await waiting(loop.sock_recv(one, 1))
            other.send(b"x")
            assert await second == b"x"
            with pytest.raises(OSError):
                await task

    run(main)


def test_closed_sockets(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            ours.close()
            with pytest.raises(OSError):
                await loop.sock_recv(ours, 1)
            with pytest.raises(OSError):
                await loop.sock_sendall(ours, b"x")
            with pytest.raises(OSError):
                await loop.sock_accept(ours)

    run(main)


def calls(loop: Any, sock: socket.socket) -> list[Any]:
    """A call of each method."""
    every = [
        lambda: loop.sock_recv(sock, 1),
        lambda: loop.sock_recv_into(sock, bytearray(1)),
        lambda: loop.sock_sendall(sock, b"x"),
        lambda: loop.sock_connect(sock, ("127.0.0.1", 1)),
        lambda: loop.sock_accept(sock),
        lambda: loop.sock_sendfile(sock, io.BytesIO(b"x")),
    ]
    if hasattr(loop, "sock_recvfrom"):
        every += [
            lambda: loop.sock_recvfrom(sock, 1),
            lambda: loop.sock_recvfrom_into(sock, bytearray(1)),
            lambda: loop.sock_sendto(sock, b"x", ("127.0.0.1", 1)),
        ]
    return every


def test_a_blocking_socket_is_an_error_in_debug_mode(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, _):
            ours.setblocking(True)
            for call in calls(loop, ours):
                with pytest.raises(ValueError, match="non-blocking"):
                    await call()

    run(main, debug=True)


def test_tls_sockets_are_refused(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        with client() as sock, context.wrap_socket(sock, do_handshake_on_connect=False) as encrypted:
            encrypted.setblocking(False)
            for call in calls(loop, encrypted):
                with pytest.raises(TypeError, match="SSLSocket"):
                    await call()

    run(main)


def test_a_socket_of_a_transport(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener() as server, client() as sock:
            await loop.sock_connect(sock, server.getsockname())
            transport, _ = await loop.create_connection(asyncio.Protocol, sock=sock)
            try:
                for call in calls(loop, sock)[:2]:
                    with pytest.raises(RuntimeError, match="is used by transport"):
                        await call()
            finally:
                transport.abort()
                await pauses()

    run(main)


# -- sock_sendfile ----------------------------------------------------------------------------------------------------


async def received_by(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < size:
        received += await loop.sock_recv(sock, 100_000)
    return bytes(received)


@pytest.fixture(params=["file", "memory"])
def file(request, tmp_path):
    data = pattern(1_000_000)
    if request.param == "memory":
        yield io.BytesIO(data)
        return
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as opened:
        yield opened


@pytest.mark.parametrize(("offset", "count"), [(0, None), (10, None), (999_990, None), (0, 300_000), (7, 999_000)])
def test_send_a_file(run, file, offset, count):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        expected = pattern(1_000_000)[offset:][:count]
        with socket_pair(small=True) as (ours, theirs):
            receiving = asyncio.create_task(received_by(theirs, len(expected)))
            assert await loop.sock_sendfile(ours, file, offset, count) == len(expected)
            assert await receiving == expected
            assert file.tell() == offset + len(expected)

    run(main)


def test_send_less_of_a_file_than_was_asked_for(run, file):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair() as (ours, theirs):
            assert await loop.sock_sendfile(ours, file, 999_999, 100) == 1
            assert await loop.sock_recv(theirs, 10) == pattern(1_000_000)[-1:]
            assert await loop.sock_sendfile(ours, file, 2_000_000) == 0

    run(main)


@pytest.mark.differs(
    "`sock_sendfile` without `offset`, of a file that has to be read",
    asyncio="starts at the file's current position",
    here="starts at the beginning",
    why="as when the system sends the file",
)
def test_a_file_begins_at_its_beginning_wherever_it_stands(run, file):
    if not run.is_ours:
        pytest.skip("asyncio sends a file that it reads itself from where it stands")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        file.seek(100)
        with socket_pair() as (ours, theirs):
            assert await loop.sock_sendfile(ours, file, count=10) == 10
            assert await loop.sock_recv(theirs, 100) == pattern(1_000_000)[:10]

    run(main)


@needs_sendfile
def test_without_a_fallback_only_the_system_sends(run, tmp_path):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        path = tmp_path / "file"
        path.write_bytes(b"data")
        with socket_pair() as (ours, theirs), path.open("rb") as opened:
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await loop.sock_sendfile(ours, io.BytesIO(b"data"), fallback=False)
            assert await loop.sock_sendfile(ours, opened, fallback=False) == 4
            assert await loop.sock_recv(theirs, 100) == b"data"

    run(main)


def test_what_is_no_file_for_sendfile(run, tmp_path):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        file = io.BytesIO(b"data")
        path = tmp_path / "file"
        path.write_text("text")
        with socket_pair() as (ours, _), path.open("r") as text, client(kind=socket.SOCK_DGRAM) as datagrams:
            with pytest.raises(ValueError, match="binary mode"):
                await loop.sock_sendfile(ours, text)
            with pytest.raises(ValueError, match="SOCK_STREAM"):
                await loop.sock_sendfile(datagrams, file)
            for count, error in [(0, ValueError), (-1, ValueError), (1.0, TypeError), ("1", TypeError)]:
                with pytest.raises(error, match="count must be a positive integer"):
                    await loop.sock_sendfile(ours, file, 0, count)
            for offset, error in [(-1, ValueError), (1.0, TypeError), (None, TypeError)]:
                with pytest.raises(error, match="offset must be a non-negative integer"):
                    await loop.sock_sendfile(ours, file, offset)

    run(main)


@pytest.mark.differs(
    "a cancelled `sock_sendfile`",
    asyncio="the file's position is after the last whole block",
    here="the file's position is after the last byte sent",
    why="the program can send the rest later",
)
def test_a_cancelled_sendfile_leaves_the_file_behind_what_was_sent(run, file):
    if not run.is_ours:
        pytest.skip("asyncio counts whole blocks only")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket_pair(small=True) as (ours, theirs):
            task = asyncio.create_task(loop.sock_sendfile(ours, file, 5))
            start = await loop.sock_recv(theirs, 1)
            await asyncio.sleep(0.05)  # The buffer of the system fills up; a shorter wait would do.
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            position = file.tell()
            ours.close()
            rest = await received_until_the_end(theirs)
            assert start + rest == pattern(1_000_000)[5:position]

    async def received_until_the_end(sock: socket.socket) -> bytes:
        received = bytearray()
        while block := await asyncio.get_running_loop().sock_recv(sock, 100_000):
            received += block
        return bytes(received)

    run(main)


@pytest.mark.differs(
    "`sock_sendfile` of a pipe",
    asyncio="`OSError`",
    here="the pipe is read and sent",
    why="it needs no positions",
)
def test_a_pipe_is_sent_by_reading_it(run):
    if not run.is_ours:
        pytest.skip("asyncio wants a file with positions")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        os.write(write_end, b"data")
        os.close(write_end)
        with socket_pair() as (ours, theirs), open(read_end, "rb") as pipe:
            assert await loop.sock_sendfile(ours, pipe) == 4
            assert await loop.sock_recv(theirs, 100) == b"data"

    run(main)
