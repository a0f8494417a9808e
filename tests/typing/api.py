"""Users' code, as a type checker sees it: nothing here runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from anyio.abc import ByteStream, Process, UDPSocket
from typing_extensions import assert_type

from transports_anyio import (
    BaseTransport,
    BufferedProtocol,
    DatagramProtocol,
    Future,
    Handle,
    Protocol,
    Server,
    ServerStatistics,
    SubprocessProtocol,
    TimerHandle,
    Transport,
    TransportDatagrams,
    TransportGroup,
    TransportSocket,
    TransportStream,
    abc,
    current_group,
    from_asyncio,
    open_event_loop,
    run_asyncio,
    to_asyncio,
)
from transports_anyio.testing import BufferedRecorder, DatagramRecorder, Recorder, SubprocessRecorder, memory_connection


class Counting(Protocol):
    def __init__(self, start: int) -> None:
        self.count = start

    def connection_made(self, transport: BaseTransport) -> None:
        current_group().call_later(1, transport.close)


class Filling(BufferedProtocol):
    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(bytearray(max(sizehint, 1)))

    def buffer_updated(self, nbytes: int) -> None: ...


async def task(number: int) -> None: ...


class Replying(DatagramProtocol):
    def datagram_received(self, data: bytes, addr: object) -> None: ...


async def use(stream: ByteStream, udp: UDPSocket, sock: socket.socket) -> None:
    async with TransportGroup() as group:
        server: Server = await group.create_server(Filling, "localhost", 0)
        assert_type(server.sockets, tuple[TransportSocket, ...])
        transport: Transport
        transport, counting = await group.create_connection(lambda: Counting(3), "localhost", 80)
        counting.count += 1  # the protocol keeps its own type
        transport.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
        _, filling = await group.connect_stream(Filling, stream)
        filling.buffer_updated(1)
        transport, counting = await group.create_connection(
            lambda: Counting(3), b"localhost", "http", local_addr=("localhost", 0), happy_eyeballs_delay=0.25
        )
        transport, filling = await group.create_unix_connection(Filling, Path("socket"))
        transport, filling = await group.connect_accepted_socket(Filling, sock, ssl=ssl.create_default_context())
        server = await group.create_server(Filling, ["localhost", "::1"], "http", reuse_port=True)
        server = await group.create_unix_server(Filling, b"\0name", cleanup_socket=False)
        server = await group.create_server(Filling, "localhost", 0, max_connections=1, max_handshakes=None)
        server = await group.create_unix_server(
            Filling, "name", ssl=ssl.create_default_context(), max_connections=2, max_handshakes=1
        )
        assert_type(server.statistics(), ServerStatistics)
        await server.shutdown(5)
        await group.shutdown(None)
        with Path("file").open("rb") as file:
            count: int = await group.sendfile(transport, file, offset=5, count=None, fallback=False)
            print(count + 1)
        endpoint, replying = await group.create_datagram_endpoint(Replying, ("localhost", 0))
        endpoint.sendto(b"", ("localhost", 9))
        replying.datagram_received(b"", None)
        await group.connect_datagram_socket(Replying, udp)
        context = ssl.create_default_context()
        transport = await group.start_tls(transport, counting, context, server_hostname="localhost", received=b"")
        await group.connect_stream(Filling, stream, ssl=True, server_hostname="localhost", ssl_shutdown_timeout=1)
        await group.connect_stream(Filling, stream, ssl=context, server_side=True)
        handle = group.call_soon(print, "soon")
        handle.cancel()
        timer: TimerHandle = group.call_later(0.5, print)
        timer.when()
        group.start_soon(task, 1, name="a task")
        async with server:
            await group.wait_closed()
        (end, counting), (_, recorder) = await memory_connection(
            group, lambda: Counting(1), lambda: BufferedRecorder(Filling()), chunk_size=1
        )
        end.write(b"x")
        counting.count += 1
        received: bytes = await recorder.wait_received(1)
        await Recorder(counting, transport=end).wait_for("data_received", len(received))


class Making:
    """Protocol factories come in every shape of a callable; a protocol need not have a base class."""

    def connection_made(self, transport: Any) -> None: ...

    def make(self) -> Counting:
        return Counting(1)

    def __call__(self) -> Counting:
        return Counting(2)


class Child(SubprocessProtocol): ...


async def types_of_what_comes_back(stream: ByteStream, udp: UDPSocket, process: Process, sock: socket.socket) -> None:
    """Transports are of asyncio's classes, which is where the public names lead to, and protocols of their own."""
    async with TransportGroup() as group:
        connection = await group.create_connection(partial(Counting, 3), "localhost", 80)
        assert_type(connection, tuple[abc.Transport, Counting])
        transport, _ = connection
        transport.start_soon(asyncio.sleep, 1, name="a task")
        transport.start_soon(asyncio.sleep, "1")  # type: ignore[arg-type]
        assert_type(await transport.drain(), None)
        assert_type(await transport.wait_closed(), None)
        assert_type(await group.create_connection(Making().make, sock=sock), tuple[abc.Transport, Counting])
        assert_type(await group.create_unix_connection(Making(), "socket"), tuple[abc.Transport, Counting])
        assert_type(await group.connect_accepted_socket(Making, sock), tuple[abc.Transport, Making])
        assert_type(await group.connect_stream(Filling, stream), tuple[abc.Transport, Filling])
        endpoints = [await group.create_datagram_endpoint(Replying, ("localhost", port)) for port in range(2)]
        assert_type(endpoints, list[tuple[abc.DatagramTransport, Replying]])
        assert_type(await group.connect_datagram_socket(Replying, udp), tuple[abc.DatagramTransport, Replying])
        children = [await group.subprocess_exec(Child, "cat"), await group.subprocess_shell(Child, "cat")]
        assert_type(children, list[tuple[abc.SubprocessTransport, Child]])
        assert_type(await children[0][0].shutdown(5), None)
        await children[0][0].shutdown("5")  # type: ignore[arg-type]
        assert_type(await group.connect_process(Child, process), tuple[abc.SubprocessTransport, Child])
        with Path("file").open("rb") as file:
            assert_type(await group.connect_read_pipe(Filling, file), tuple[abc.ReadTransport, Filling])
            assert_type(await group.connect_write_pipe(Filling, file), tuple[abc.WriteTransport, Filling])
        async with await group.create_server(Making, None, 0) as server:
            assert_type(server, Server)
        assert_type(group.call_soon_threadsafe(print), Handle)
        recorders = await memory_connection(group, Recorder, BufferedRecorder)
        assert_type(recorders, tuple[tuple[abc.Transport, Recorder], tuple[abc.Transport, BufferedRecorder]])
        assert_type(DatagramRecorder(Replying()).received, list[tuple[bytes, Any]])
        assert_type(SubprocessRecorder(Child()).received, dict[int, bytearray])


class Flowing(Protocol):
    """A protocol gets asyncio's type. An `isinstance` check makes it ours, without a cast."""

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, abc.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.transport.is_writing_paused() or self.transport.is_eof_received():
            self.transport.pause_reading()


class Duck:
    """A protocol without a base class can name the type at once, and ignore what it does not use."""

    def connection_made(self, transport: abc.Transport) -> None:
        transport.write(b"paused" if transport.is_writing_paused() else b"")

    def data_received(self, data: bytes) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...


class DatagramDuck:
    def connection_made(self, transport: abc.DatagramTransport) -> None:
        transport.set_write_buffer_limits(
            high=transport.get_write_buffer_limits()[0] + transport.get_write_buffer_size()
        )

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None: ...


class ChildDuck:
    def connection_made(self, transport: abc.SubprocessTransport) -> None:
        assert_type(transport.is_writing_paused(), bool)

    def process_exited(self) -> None: ...


def make_any_protocol(kind: str) -> Any:
    return kind


async def methods_of_our_own(group: TransportGroup, factory: Callable[[], asyncio.BaseProtocol]) -> None:
    """What asyncio's types do not have is there without a cast; duck typing, lambdas and partials stay accepted."""
    transport, _ = await group.create_connection(Flowing, "localhost", 80)
    assert_type(transport.is_writing_paused(), bool)
    assert_type(transport.is_eof_received(), bool)
    same_as_asyncio: asyncio.Transport = transport
    upgraded = await group.start_tls(same_as_asyncio, Flowing(), ssl.create_default_context())
    assert_type(upgraded, abc.Transport)
    endpoint, _ = await group.create_datagram_endpoint(DatagramDuck, ("localhost", 0))
    assert_type(endpoint.is_writing_paused(), bool)
    child, _ = await group.subprocess_exec(ChildDuck, "cat", stdin=subprocess.PIPE, stdout=None, stderr=3)
    await group.subprocess_shell(ChildDuck, "cat", stderr=subprocess.STDOUT, stdout=sys.stdout)
    assert_type(child.is_writing_paused(), bool)
    stdin, stdout = child.get_pipe_transport(0), child.get_pipe_transport(1)
    assert stdin is not None
    assert stdout is not None
    stdin.write(b"" if stdin.is_writing_paused() else b"x")
    stdout.pause_reading()
    await group.create_server(Duck, "localhost", 0)
    await group.create_server(factory, "localhost", 0)
    await group.create_connection(factory, "localhost", 80)
    await group.create_connection(partial(make_any_protocol, "stream"), "localhost", 80)
    await group.create_datagram_endpoint(partial(make_any_protocol, "datagram"), ("localhost", 0))
    await group.subprocess_exec(lambda: make_any_protocol("child"), "cat")
    await group.connect_accepted_socket(lambda: Counting(1), socket.socket())


async def wait(seconds: float, *, name: str = "") -> str:
    return f"{seconds} {name}"


def callbacks(group: TransportGroup) -> None:
    """Every callable that takes the arguments, whatever it returns."""
    assert_type(group.call_soon(Counting, 1), Handle)
    numbers: list[int] = []
    assert_type(group.call_soon_threadsafe(numbers.append, 1), Handle)
    assert_type(group.call_later(1, Counting(1).data_received, b""), TimerHandle)
    assert_type(group.call_at(1, partial(Counting, 1)), TimerHandle)
    group.call_soon(lambda text: print(text, end=""), "text", context=copy_context())
    group.start_soon(wait, 1)
    group.start_soon(partial(wait, name="x"), 1.5, name="waits")
    group.start_soon(TransportGroup.wait_closed, group)


async def length(text: str) -> int:
    return len(text)


async def crossings(manager: AbstractAsyncContextManager[int, bool | None]) -> None:
    async with open_event_loop() as loop:
        assert_type(loop, AbstractEventLoop)
        assert_type(await to_asyncio.run(length, "text"), int)
        assert_type(to_asyncio.run_sync(len, "text"), int)
        async with to_asyncio.wrap_async_context_manager(manager) as value:
            assert_type(value, int)
    assert_type(await from_asyncio.run(length, "text"), int)
    assert_type(from_asyncio.run_sync(len, "text"), int)


def whole_programs() -> None:
    assert_type(run_asyncio(length, "text"), int)
    run_asyncio(length, "text", backend="asyncio", backend_options={"use_uvloop": True})


async def await_results(group: TransportGroup, transport: abc.Transport, datagrams: abc.DatagramTransport) -> None:
    future: Future[int] = group.create_future()
    future.add_done_callback(lambda done: done.result().bit_length())
    assert_type(await future, int)
    assert_type(future.result(), int)
    future.set_result("no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    stream: ByteStream = TransportStream(transport, received=bytearray(b"x"))
    assert_type(await stream.receive(), bytes)
    async with TransportDatagrams(datagrams) as endpoint:
        data, _ = await endpoint.receive()
        assert_type(data, bytes)
        await endpoint.sendto(data)
