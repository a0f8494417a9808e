"""Cancel every endpoint function at each of its checkpoints in turn, until it returns without reaching one."""

from __future__ import annotations

import os
import socket
import subprocess
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from network import Echo, needs_ipv6
from support import (
    GUARD,
    HOST,
    RECORDERS,
    DatagramRecorder,
    Recorder,
    SubprocessRecorder,
    open_descriptors,
    pattern,
    turns,
    until,
)
from tls_support import NAME, Certificates

from transports_anyio import TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = [pytest.mark.anyio, pytest.mark.exhaustive]

#: More checkpoints than any of these functions has.
MOST_CHECKPOINTS = 300

DATA = pattern(300_000)


@types.coroutine
def driven(coroutine: Coroutine[Any, Any, Any], waits: Callable[[], object]) -> Generator[Any, Any, Any]:
    """Run a coroutine and call `waits` at each of its checkpoints."""
    step, value = coroutine.send, None
    while True:
        try:
            asked = step(value)  # type: ignore[arg-type]
        except StopIteration as exc:
            return exc.value
        waits()
        try:
            step, value = coroutine.send, (yield asked)
        except BaseException as exc:
            step, value = coroutine.throw, exc


class Case:
    """What a function under test needs, and the objects it made."""

    def __init__(self, group: TransportGroup, certificates: Certificates) -> None:
        self.group = group
        self.certificates = certificates
        self.made: list[Any] = []

    def stream(self, **hooks: Any) -> Recorder:
        recorder = Recorder(**hooks)
        self.made.append(recorder)
        return recorder

    def datagrams(self) -> DatagramRecorder:
        recorder = DatagramRecorder()
        self.made.append(recorder)
        return recorder

    def child(self) -> SubprocessRecorder:
        recorder = SubprocessRecorder()
        self.made.append(recorder)
        return recorder

    def tls(self) -> dict[str, Any]:
        return {"ssl": self.certificates.client(), "server_hostname": NAME}


Act = Callable[[], Coroutine[Any, Any, Any]]
#: Prepare, yield the call to cancel, and clean up.
Prepare = Callable[[Case], Any]


@asynccontextmanager
async def tcp_connection(case: Case) -> AsyncIterator[Act]:
    server = await case.group.create_server(Echo, HOST, 0)
    yield lambda: case.group.create_connection(case.stream, *server.sockets[0].getsockname())
    server.close()
    server.abort_clients()


@asynccontextmanager
async def happy_eyeballs(case: Case) -> AsyncIterator[Act]:
    server = await case.group.create_server(Echo, None, 0)
    port = server.sockets[0].getsockname()[1]
    yield lambda: case.group.create_connection(case.stream, None, port, happy_eyeballs_delay=0)
    server.close()
    server.abort_clients()


@asynccontextmanager
async def name_lookup(case: Case) -> AsyncIterator[Act]:
    server = await case.group.create_server(Echo, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    yield lambda: case.group.create_connection(case.stream, "localhost", port, family=socket.AF_INET)
    server.close()
    server.abort_clients()


@asynccontextmanager
async def tls_connection(case: Case) -> AsyncIterator[Act]:
    server = await case.group.create_server(Echo, HOST, 0, ssl=case.certificates.server())
    yield lambda: case.group.create_connection(case.stream, *server.sockets[0].getsockname(), **case.tls())
    server.close()
    server.abort_clients()


@asynccontextmanager
async def tcp_server(case: Case) -> AsyncIterator[Act]:
    yield lambda: case.group.create_server(case.stream, HOST, 0)


@asynccontextmanager
async def unix_connection(case: Case, path: str = "server") -> AsyncIterator[Act]:
    server = await case.group.create_unix_server(Echo, path)
    yield lambda: case.group.create_unix_connection(case.stream, path)
    server.close()
    server.abort_clients()


@asynccontextmanager
async def unix_server(case: Case) -> AsyncIterator[Act]:
    yield lambda: case.group.create_unix_server(case.stream, "server")
    assert "server" not in os.listdir()


@asynccontextmanager
async def accepted_socket(case: Case) -> AsyncIterator[Act]:
    ours, theirs = socket.socketpair()
    with theirs:
        yield lambda: case.group.connect_accepted_socket(case.stream, ours)


@asynccontextmanager
async def accepted_tls_socket(case: Case) -> AsyncIterator[Act]:
    """Both ends at once: the client's handshake runs in another task."""
    ours, theirs = socket.socketpair()

    async def client() -> None:
        try:
            await case.group.create_connection(case.stream, sock=theirs, **case.tls())
        except OSError:
            pass  # The server's end was cancelled.

    case.group.start_soon(client)
    yield lambda: case.group.connect_accepted_socket(case.stream, ours, ssl=case.certificates.server())


@asynccontextmanager
async def datagram_endpoint(case: Case) -> AsyncIterator[Act]:
    yield lambda: case.group.create_datagram_endpoint(case.datagrams, local_addr=(HOST, 0), remote_addr=(HOST, 9))


@asynccontextmanager
async def datagram_endpoint_by_name(case: Case) -> AsyncIterator[Act]:
    yield lambda: case.group.create_datagram_endpoint(case.datagrams, local_addr=("localhost", 0))


@asynccontextmanager
async def read_pipe(case: Case) -> AsyncIterator[Act]:
    reader, writer = (open(fd, mode, 0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reader, writer:  # A pipe that was not taken over still belongs to the caller.
        yield lambda: case.group.connect_read_pipe(case.stream, reader)
        await until(lambda: all(protocol.lost for protocol in case.made))


@asynccontextmanager
async def write_pipe(case: Case) -> AsyncIterator[Act]:
    reader, writer = (open(fd, mode, 0) for fd, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with reader, writer:
        yield lambda: case.group.connect_write_pipe(case.stream, writer)
        await until(lambda: all(protocol.lost for protocol in case.made))


@asynccontextmanager
async def program(case: Case) -> AsyncIterator[Act]:
    yield lambda: case.group.subprocess_exec(case.child, "cat")


@asynccontextmanager
async def shell(case: Case) -> AsyncIterator[Act]:
    yield lambda: case.group.subprocess_shell(case.child, "exec cat")


@asynccontextmanager
async def process(case: Case) -> AsyncIterator[Act]:
    theirs = await anyio.open_process(["cat"], stderr=subprocess.PIPE)
    yield lambda: case.group.connect_process(case.child, theirs)
    with anyio.CancelScope(shield=True):
        if not case.made:  # It still belongs to the caller.
            theirs.kill()
            await theirs.wait()
            await theirs.aclose()


@asynccontextmanager
async def stream(case: Case, *, ssl: bool = False) -> AsyncIterator[Act]:
    context = case.certificates.server() if ssl else None
    server = await case.group.create_server(Echo, HOST, 0, ssl=context)
    theirs = await anyio.connect_tcp(*server.sockets[0].getsockname())
    options = case.tls() if ssl else {}
    yield lambda: case.group.connect_stream(case.stream, theirs, **options)
    if not case.made and not ssl:
        await theirs.aclose()  # It still belongs to the caller.
    elif not case.made:
        await anyio.aclose_forcefully(theirs)
    server.close()
    server.abort_clients()


def tls_stream(case: Case) -> Any:
    return stream(case, ssl=True)


@asynccontextmanager
async def datagram_socket(case: Case) -> AsyncIterator[Act]:
    theirs = await anyio.create_udp_socket(local_host=HOST)
    yield lambda: case.group.connect_datagram_socket(case.datagrams, theirs)
    if not case.made:
        await theirs.aclose()


@asynccontextmanager
async def upgrade(case: Case) -> AsyncIterator[Act]:
    begun = False

    def begin(protocol: Recorder, data: bytes) -> None:
        async def run() -> None:
            # Otherwise it may end before a cancellation is noticed: a whole handshake fits into one iteration.
            await until(lambda: begun)
            await turns()
            if protocol.transport.is_closing():
                return  # The client's end was cancelled and has closed.
            try:
                await case.group.start_tls(protocol.transport, protocol, case.certificates.server(), server_side=True)
            except OSError:
                pass  # The client's end was cancelled.

        if data == b"STARTTLS":
            protocol.transport.pause_reading()  # The next bytes belong to the handshake.
            protocol.transport.write(b"GO")
            case.group.start_soon(run)

    server = await case.group.create_server(lambda: case.stream(on_data_received=begin), HOST, 0)
    transport, protocol = await case.group.create_connection(case.stream, *server.sockets[0].getsockname())
    transport.write(b"STARTTLS")
    await protocol.wait_received(2)

    async def act() -> Any:
        nonlocal begun
        begun = True
        new = await case.group.start_tls(transport, protocol, case.certificates.client(), server_hostname=NAME)
        return new, protocol

    yield act
    begun = True
    server.close()
    await until(lambda: protocol.lost)
    server.abort_clients()


@asynccontextmanager
async def file(case: Case, *, ssl: bool = False) -> AsyncIterator[Act]:
    context = case.certificates.server() if ssl else None
    receivers: list[Recorder] = []

    def make() -> Recorder:
        receivers.append(case.stream())
        return receivers[-1]

    server = await case.group.create_server(make, HOST, 0, ssl=context)
    options = case.tls() if ssl else {}
    transport, protocol = await case.group.create_connection(case.stream, *server.sockets[0].getsockname(), **options)
    with open("file", "w+b") as source:
        source.write(DATA)
        source.seek(0)

        async def act() -> Any:
            assert await case.group.sendfile(transport, source) == len(DATA)
            return transport, protocol

        yield act
        # Cancelled or not, the connection works, and what has arrived is the beginning of the file.
        position = source.tell()
        if not transport.is_closing():
            transport.write(b"behind it")
            await until(lambda: receivers)
            await receivers[0].wait_until(lambda: receivers[0].received.endswith(b"behind it"))
            assert receivers[0].received[:-9] == DATA[:position]
        transport.close()
    server.close()


def tls_file(case: Case) -> Any:
    return file(case, ssl=True)


@asynccontextmanager
async def in_memory(case: Case) -> AsyncIterator[Act]:
    async def act() -> Any:
        first, _ = await memory_connection(case.group, case.stream, case.stream)
        return first

    yield act


@asynccontextmanager
async def server_wait_closed(case: Case) -> AsyncIterator[Act]:
    server = await case.group.create_server(Echo, HOST, 0)
    _, client = await case.group.create_connection(case.stream, *server.sockets[0].getsockname())
    await until(lambda: server._connections)

    async def act() -> Any:
        server.close()
        case.group.call_soon(client.transport.close)
        await server.wait_closed()
        return client.transport, client

    yield act
    server.close()


@asynccontextmanager
async def serve_forever(case: Case) -> AsyncIterator[Act]:
    server = await case.group.create_server(Echo, HOST, 0, start_serving=False)

    async def act() -> None:
        case.group.call_later(0.005, server.close)
        await server.serve_forever()

    yield act
    server.close()
    assert not server.is_serving()


@asynccontextmanager
async def group_wait_closed(case: Case) -> AsyncIterator[Act]:
    first, _ = await memory_connection(case.group, case.stream, case.stream)

    async def act() -> Any:
        case.group.call_soon(first[0].close)
        await case.group.wait_closed()
        return first

    yield act


CASES: list[Any] = [
    tcp_connection, pytest.param(happy_eyeballs, marks=needs_ipv6, id="happy_eyeballs"), name_lookup, tls_connection,
    tcp_server, unix_connection, unix_server, accepted_socket, accepted_tls_socket, datagram_endpoint,
    datagram_endpoint_by_name, read_pipe, write_pipe, program, shell, process, stream, tls_stream, datagram_socket,
    upgrade, file, tls_file, in_memory, server_wait_closed, serve_forever, group_wait_closed,
]  # fmt: skip


async def echoes(group: TransportGroup) -> None:
    """Check that the group works."""
    (transport, client), _ = await memory_connection(group, Recorder, Echo)
    transport.write(b"still there?")
    assert await client.wait_received(12) == b"still there?"
    transport.close()
    await client.wait_for("connection_lost")


def end(result: Any) -> None:
    """End what a function has returned: a server, or a transport with its protocol."""
    if isinstance(result, tuple):
        result[0].abort() if hasattr(result[0], "abort") else result[0].close()
    elif result is not None:
        result.close()


@pytest.mark.parametrize("prepare", CASES)
async def test_cancelled_at_every_checkpoint(
    anyio_backend: Any, certificates: Certificates, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with TransportGroup() as group:
        group.set_exception_handler(lambda *_: None)  # A server reports handshakes that its clients cancel.
        await echoes(group)
        cancelled = 0
        for number in range(-1, MOST_CHECKPOINTS):
            descriptors = own_descriptors()
            tasks = {task.id for task in anyio.get_running_tasks()}
            case = Case(group, certificates)
            count = 0
            result = None

            def waits(number: int = number) -> None:
                nonlocal count
                if count == number:
                    scope.cancel()
                count += 1

            async with prepare(case) as act:
                with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
                    if number < 0:
                        scope.cancel()  # Before it begins.
                    result = await driven(act(), waits)
                cancelled += scope.cancelled_caught
                end(result)
            await echoes(group)
            for transport in tuple(group._core.transports):
                transport._abort()  # Not `abort`, which a subprocess transport does not have.
            with anyio.fail_after(GUARD):
                await group.wait_closed()
                await until(lambda: {task.id for task in anyio.get_running_tasks()} <= tasks)  # noqa: B023
                await until(lambda: own_descriptors() == descriptors)  # noqa: B023
            assert [each for each in case.made if each.calls and not each.lost] == []
            for recorder in RECORDERS:
                recorder.check()
            RECORDERS.clear()
            if number >= 0 and count <= number:
                break  # It returned before that checkpoint.
        else:
            raise AssertionError("there is no end of checkpoints")
    assert number, "other tasks never ran"
    assert cancelled
    no_child_is_left()


def no_child_is_left() -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def own_descriptors() -> dict[int, str]:
    # uvloop keeps one file descriptor in reserve from its first stream on.
    return {fd: what for fd, what in open_descriptors().items() if what != os.devnull}


async def test_a_group_cancelled_at_every_checkpoint(anyio_backend: Any, certificates: Certificates) -> None:
    """A program that uses a bit of everything is cancelled at any checkpoint, also of the group's entry and exit."""

    async def everything(case: Case) -> None:
        async with TransportGroup() as case.group:
            group = case.group
            group.set_exception_handler(lambda *_: None)
            server = await group.create_server(case.stream, HOST, 0, ssl=case.certificates.server())
            transport, _ = await group.create_connection(case.stream, *server.sockets[0].getsockname(), **case.tls())
            transport.write(DATA)
            await group.subprocess_exec(case.child, "cat")
            (_, recorder), (second, _) = await memory_connection(group, case.stream, case.stream)
            second.write(b"hello")
            await recorder.wait_received(5)

    for number in range(MOST_CHECKPOINTS):
        descriptors = own_descriptors()
        tasks = {task.id for task in anyio.get_running_tasks()}
        case = Case(None, certificates)  # type: ignore[arg-type]
        count = 0

        def waits(number: int = number) -> None:
            nonlocal count
            if count == number:
                scope.cancel()
            count += 1

        with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
            await driven(everything(case), waits)
        # Now, without another iteration.
        assert [each for each in case.made if each.calls and not each.lost] == []
        for recorder in RECORDERS:
            recorder.check()
        assert {task.id for task in anyio.get_running_tasks()} <= tasks
        assert own_descriptors() == descriptors
        RECORDERS.clear()
        if count <= number:
            break
    else:
        raise AssertionError("there is no end of checkpoints")
    assert number > 5
    no_child_is_left()


@pytest.mark.parametrize("path", ["no server", "no listener"])
async def test_a_connection_that_fails_at_once_still_yields(
    anyio_backend: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a program that retries in a loop would starve other tasks."""
    monkeypatch.chdir(tmp_path)
    waits: list[None] = []
    async with TransportGroup() as group:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("no listener")
            with pytest.raises(OSError, match=path):
                await driven(group.create_unix_connection(Recorder, path), lambda: waits.append(None))
    assert waits
