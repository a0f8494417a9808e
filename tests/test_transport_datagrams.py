"""Datagram transports as AnyIO objects."""

from __future__ import annotations

import select
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import SocketAttribute
from network import needs_unix
from support import GUARD, HOST, turns, until

from transports_anyio import DatagramProtocol, Protocol, TransportDatagrams, TransportGroup

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def udp(group: TransportGroup) -> AsyncIterator[tuple[TransportDatagrams, TransportDatagrams]]:
    """An endpoint with a remote address, and the one that it sends to."""
    server, _ = await group.create_datagram_endpoint(DatagramProtocol, local_addr=(HOST, 0))
    client, _ = await group.create_datagram_endpoint(DatagramProtocol, remote_addr=server.get_extra_info("sockname"))
    yield TransportDatagrams(client), TransportDatagrams(server)


@asynccontextmanager
async def unix(group: TransportGroup) -> AsyncIterator[tuple[TransportDatagrams, TransportDatagrams]]:
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = (str(Path(directory) / name) for name in ("client", "server"))
        server, _ = await group.create_datagram_endpoint(
            DatagramProtocol,
            local_addr=theirs,
            family=socket.AF_UNIX,  # type: ignore[arg-type]
        )
        client, _ = await group.create_datagram_endpoint(
            DatagramProtocol,
            local_addr=ours,
            remote_addr=theirs,
            family=socket.AF_UNIX,  # type: ignore[arg-type]
        )
        yield TransportDatagrams(client), TransportDatagrams(server)


@asynccontextmanager
async def anyio_sockets(group: TransportGroup) -> AsyncIterator[tuple[TransportDatagrams, TransportDatagrams]]:
    theirs = await anyio.create_udp_socket(local_host=HOST)
    ours = await anyio.create_connected_udp_socket(HOST, theirs.extra(SocketAttribute.local_port))
    server, _ = await group.connect_datagram_socket(DatagramProtocol, theirs)
    client, _ = await group.connect_datagram_socket(DatagramProtocol, ours)
    yield TransportDatagrams(client), TransportDatagrams(server)


KINDS: dict[str, Callable[[TransportGroup], Any]] = {"udp": udp, "anyio_sockets": anyio_sockets}
if sys.platform != "win32":
    KINDS["unix"] = unix

every_kind = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def ends(kind: str) -> AsyncIterator[tuple[TransportDatagrams, TransportDatagrams]]:
    async with TransportGroup() as group:
        with anyio.fail_after(GUARD):
            async with KINDS[kind](group) as pair:
                yield pair
                for each in pair:
                    await each.aclose()


@every_kind
async def test_send_and_receive(anyio_backend: Any, kind: str) -> None:
    async with ends(kind) as (client, server):
        await client.sendto(b"question")
        data, address = await server.receive()
        assert data == b"question"
        await server.sendto(b"answer", address)
        assert (await client.receive())[0] == b"answer"
        await server.send((b"again", address))
        assert (await client.receive())[0] == b"again"
        if kind != "anyio_sockets":  # uvloop's own do not send it.
            await server.sendto(b"", address)
            assert (await client.receive())[0] == b""
        for number in range(10):
            await client.send((b"%d" % number, None))
        assert [(await server.receive())[0] for _ in range(10)] == [b"%d" % number for number in range(10)]


@every_kind
async def test_closed_and_broken(anyio_backend: Any, kind: str) -> None:
    ended: list[str] = []
    async with ends(kind) as (client, server):

        async def receive() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await server.receive()
            ended.append("closed")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await turns()
            with pytest.raises(anyio.BusyResourceError, match="reading from"):
                await server.receive()
            await server.aclose()
        assert ended == ["closed"]
        with pytest.raises(anyio.ClosedResourceError):
            await server.sendto(b"x", (HOST, 1))
        client.transport.abort()
        with pytest.raises(anyio.BrokenResourceError):
            await client.receive()
        with pytest.raises(anyio.BrokenResourceError):
            await client.sendto(b"x")


@every_kind
async def test_a_cancelled_receive_loses_nothing(anyio_backend: Any, kind: str) -> None:
    async with ends(kind) as (client, server):
        received = []
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                with anyio.CancelScope() as scope:

                    async def cancel_soon(scope: anyio.CancelScope = scope, delay: int = number % 4) -> None:
                        await turns(delay)
                        scope.cancel()

                    tasks.start_soon(cancel_soon)
                    await client.sendto(b"%d" % number)
                    received.append((await server.receive())[0])
        while len(received) < 20:
            with anyio.move_on_after(0.01) as scope:
                received.append((await server.receive())[0])
            if scope.cancelled_caught:
                break
        # A datagram whose `sendto` was cancelled was not sent; every other one has come once, in order.
        numbers = [int(data) for data in received]
        assert numbers == sorted(set(numbers))


@every_kind
async def test_a_cancelled_scope_is_noticed_by_every_call(anyio_backend: Any, kind: str) -> None:
    async with ends(kind) as (client, server):
        await client.sendto(b"first")
        await until(lambda: server._bridge.datagrams)
        for call in (server.receive, lambda: client.sendto(b"not sent")):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        await client.sendto(b"second")
        assert [(await server.receive())[0] for _ in range(2)] == [b"first", b"second"]


async def test_what_nobody_receives_is_dropped_beyond_a_limit(anyio_backend: Any) -> None:
    async with ends("udp") as (client, server):
        for number in range(1000):
            await client.sendto(b"%d" % number)
            await until(lambda number=number: len(server._bridge.datagrams) in (number + 1, 256))
        assert [(await server.receive())[0] for _ in range(256)] == [b"%d" % number for number in range(256)]
        await client.sendto(b"again")
        while (await server.receive())[0] != b"again":
            pass


async def test_a_peer_that_is_not_there(anyio_backend: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, 0))
        address = sock.getsockname()
    async with TransportGroup() as group:
        transport, _ = await group.create_datagram_endpoint(DatagramProtocol, remote_addr=address)
        async with TransportDatagrams(transport) as datagrams:
            await datagrams.sendto(b"x")
            with pytest.raises(anyio.BrokenResourceError) as caught:
                await datagrams.receive()
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(address)
                await datagrams.sendto(b"y")
                assert select.select([sock], [], [], GUARD)[0]
                assert sock.recv(10) == b"y"
                sock.sendto(b"back", transport.get_extra_info("sockname"))
                assert await datagrams.receive() == (b"back", address)


@needs_unix
async def test_sending_waits_while_writing_is_paused(anyio_backend: Any) -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    b.setblocking(False)
    async with TransportGroup() as group:
        transport, _ = await group.create_datagram_endpoint(DatagramProtocol, sock=a)
        async with TransportDatagrams(transport) as datagrams:
            transport.set_write_buffer_limits(high=5000)
            sent = 0

            async def send() -> None:
                nonlocal sent
                while sent < 1000:
                    await datagrams.sendto(b"%04d" % sent + bytes(1000))
                    sent += 1

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                await until(transport.is_writing_paused)
                with pytest.raises(anyio.BusyResourceError, match="writing to"):
                    await datagrams.sendto(b"x")
                assert sent < 1000
                assert transport.get_write_buffer_size() <= 7000
                for number in range(1000):
                    await anyio.wait_readable(b)
                    assert b.recv(2000)[:4] == b"%04d" % number
    b.close()


async def test_typed_attributes(anyio_backend: Any) -> None:
    async with ends("udp") as (client, server):
        assert client.extra(SocketAttribute.remote_port) == server.extra(SocketAttribute.local_port)
        assert server.extra(SocketAttribute.local_address)[0] == HOST
        with pytest.raises(anyio.TypedAttributeLookupError):
            server.extra(SocketAttribute.remote_port)


async def test_bad_arguments(anyio_backend: Any) -> None:
    async with ends("udp") as (client, _), TransportGroup() as group:
        with pytest.raises(TypeError):
            await client.sendto("text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="address"):
            await client.sendto(b"x", (HOST, 1))
        a, b = socket.socketpair()
        transport, _ = await group.create_connection(Protocol, sock=a)
        with b:
            for bad in (None, transport):
                with pytest.raises(TypeError, match="datagram transport"):
                    TransportDatagrams(bad)  # type: ignore[arg-type]


async def test_made_in_connection_lost(anyio_backend: Any) -> None:
    made: list[TransportDatagrams] = []

    class Late(DatagramProtocol):
        def connection_lost(self, exc: Exception | None) -> None:
            made.append(TransportDatagrams(transport))

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            transport, _ = await group.create_datagram_endpoint(Late, local_addr=(HOST, 0))
            transport.close()
            await transport.wait_closed()
            (datagrams,) = made
            with pytest.raises(anyio.BrokenResourceError):
                await datagrams.receive()
            with pytest.raises(anyio.BrokenResourceError):
                await datagrams.sendto(b"x", (HOST, 9))
            await datagrams.aclose()
