"""`connect_datagram_socket`: AnyIO's datagram sockets."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, UDPSocket, UNIXDatagramSocket
from datagram_helpers import Endpoint, clogged_unix_peer, receive, udp_peer
from network import AF_UNIX, needs_unix
from support import HOST, collect_contexts, turns, until

from transports_anyio import TransportGroup, TransportSocket

pytestmark = pytest.mark.anyio


async def test_an_anyio_udp_socket(anyio_backend: Any) -> None:
    with udp_peer() as peer:
        async with TransportGroup() as group:
            udp = await anyio.create_udp_socket(local_host=HOST)
            transport, protocol = await group.connect_datagram_socket(Endpoint, udp)
            address = transport.get_extra_info("sockname")
            for data in (b"one", b"", b"three"):
                peer.sendto(data, address)
            await until(lambda: len(protocol.received) == 3)
            assert protocol.data == [b"one", b"", b"three"]
            assert protocol.received[0][1] == peer.getsockname()
            for data in (b"1", b"22", b"333"):
                transport.sendto(data, peer.getsockname())
            assert [(await receive(peer))[0] for _ in range(3)] == [b"1", b"22", b"333"]
            transport.close()
            await group.wait_closed()
            assert protocol.lost == [None]


async def test_an_anyio_socket_in_use_by_another_endpoint(anyio_backend: Any) -> None:
    second = Endpoint()
    with udp_peer() as peer:
        async with TransportGroup() as group:
            udp = await anyio.create_udp_socket(local_host=HOST)
            transport, first = await group.connect_datagram_socket(Endpoint, udp)
            with pytest.raises(RuntimeError, match="is already in use by another transport"):
                await group.connect_datagram_socket(lambda: second, udp)
            peer.sendto(b"data", transport.get_extra_info("sockname"))
            await until(lambda: first.data == [b"data"])
            transport.close()
        assert first.lost == [None]
        assert second.transport is None


async def test_a_connected_anyio_udp_socket(anyio_backend: Any) -> None:
    with udp_peer() as peer:
        async with TransportGroup() as group:
            udp = await anyio.create_connected_udp_socket(*peer.getsockname(), local_host=HOST)
            transport, protocol = await group.connect_datagram_socket(Endpoint, udp)
            assert transport.get_extra_info("peername") == peer.getsockname()
            transport.sendto(b"hello")
            transport.sendto(b"you", peer.getsockname())
            assert [(await receive(peer))[0] for _ in range(2)] == [b"hello", b"you"]
            with pytest.raises(ValueError, match="address"):
                transport.sendto(b"x", (HOST, 1))
            peer.sendto(b"answer", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)
            assert protocol.received == [(b"answer", peer.getsockname())]
        assert protocol.lost == [None]


@pytest.mark.skipif(not hasattr(UDPSocket, "from_socket"), reason="this AnyIO makes its sockets itself")
@pytest.mark.parametrize("family", [socket.AF_INET, pytest.param(AF_UNIX, marks=needs_unix)])
async def test_d9_sendto_another_address_on_an_anyio_socket(anyio_backend: Any, tmp_path: Path, family: int) -> None:
    """AnyIO's object is the unconnected one, but was made from a connected socket."""
    unix = family == AF_UNIX
    with clogged_unix_peer(tmp_path) if unix else udp_peer() as peer, udp_peer() as other:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind(str(tmp_path / "ours") if unix else (HOST, 0))
        sock.connect(peer.getsockname())
        async with TransportGroup() as group:
            kind: Any = UNIXDatagramSocket if unix else UDPSocket
            transport, protocol = await group.connect_datagram_socket(Endpoint, await kind.from_socket(sock))
            assert transport.get_extra_info("peername") == peer.getsockname()
            with pytest.raises(ValueError, match="address"):
                transport.sendto(b"for the other", other.getsockname())
            if unix or anyio_backend[1] != {"use_uvloop": True}:  # There AnyIO cannot send to the peer either.
                transport.sendto(b"one")
                transport.sendto(b"two", peer.getsockname())
                assert [(await receive(peer))[0] for _ in range(2)] == [b"one", b"two"]
            with pytest.raises(BlockingIOError):
                other.recv(1)
            peer.sendto(b"answer", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)
        assert protocol.lost == [None]


@needs_unix
@pytest.mark.parametrize("connected", [False, True])
async def test_anyio_unix_datagram_sockets(anyio_backend: Any, tmp_path: Path, connected: bool) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with TransportGroup() as group:
            ours = str(tmp_path / "ours")
            sock: Any
            if connected:
                sock = await anyio.create_connected_unix_datagram_socket(peer.getsockname(), local_path=ours)
            else:
                sock = await anyio.create_unix_datagram_socket(local_path=ours)
            transport, protocol = await group.connect_datagram_socket(Endpoint, sock)
            transport.sendto(b"hello", None if connected else peer.getsockname())
            assert await receive(peer) == (b"hello", ours)
            peer.sendto(b"answer", ours)
            await until(lambda: protocol.received)
            assert protocol.received == [(b"answer", peer.getsockname())]
            for _ in range(2000):
                transport.sendto(b"x" * 100, None if connected else peer.getsockname())
            assert protocol.flow == ["pause"]
            for _ in range(2000):
                await receive(peer)
            await until(lambda: protocol.flow == ["pause", "resume"])


@needs_unix
async def test_an_anyio_socket_that_fails_to_send(anyio_backend: Any, tmp_path: Path) -> None:
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        sock = await anyio.create_unix_datagram_socket(local_path=str(tmp_path / "ours"))
        transport, protocol = await group.connect_datagram_socket(Endpoint, sock)
        transport.sendto(b"x", str(tmp_path / "missing"))
        transport.sendto(b"to myself", str(tmp_path / "ours"))
        await until(lambda: protocol.received)
        assert [type(error) for error in protocol.errors] == [FileNotFoundError]
        assert contexts == []


async def test_an_anyio_socket_that_a_peer_refuses(anyio_backend: Any) -> None:
    """AnyIO raises it on trio and hides it on asyncio; in both cases the endpoint lives on."""
    with udp_peer() as peer:
        address = peer.getsockname()
    async with TransportGroup() as group:
        udp = await anyio.create_connected_udp_socket(*address)
        transport, protocol = await group.connect_datagram_socket(Endpoint, udp)
        transport.sendto(b"is anybody there?")
        if anyio_backend[0] == "trio":
            await until(lambda: protocol.errors)
            assert isinstance(protocol.errors[0], ConnectionRefusedError)
        else:
            await until(lambda: transport.get_write_buffer_size() == 0)  # type: ignore[attr-defined]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(address)
            peer.setblocking(False)
            if anyio_backend[0] != "trio":
                # asyncio drops a datagram if it has not noticed a refusal yet.
                transport.sendto(b"now?")
                await until(lambda: transport.get_write_buffer_size() == 0)  # type: ignore[attr-defined]
            transport.sendto(b"now!")
            while (await receive(peer))[0] != b"now!":
                pass
            peer.sendto(b"yes", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)
        assert not transport.is_closing()


async def test_the_transport_socket_of_an_anyio_socket_cannot_do_io(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        udp = await anyio.create_udp_socket(local_host=HOST)
        transport, _ = await group.connect_datagram_socket(Endpoint, udp)
        sock = transport.get_extra_info("socket")
        assert sock.getsockname() == transport.get_extra_info("sockname")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
        assert type(sock) is TransportSocket


async def test_cancelling_the_group_closes_an_anyio_socket(anyio_backend: Any) -> None:
    protocol = Endpoint()
    with anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            udp = await anyio.create_udp_socket(local_host=HOST)
            await group.connect_datagram_socket(lambda: protocol, udp)
            scope.cancel()
            await anyio.sleep_forever()
    assert protocol.lost == [None]
    with pytest.raises(anyio.ClosedResourceError):
        await udp.receive()


async def test_an_anyio_socket_closed_by_its_owner(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        udp = await anyio.create_udp_socket(local_host=HOST)
        _, protocol = await group.connect_datagram_socket(Endpoint, udp)
        await until(lambda: protocol.transport)
        await anyio.sleep(0.01)
        await udp.aclose()
        await until(lambda: protocol.lost)
        assert isinstance(protocol.lost[0], OSError)


async def test_an_anyio_socket_that_another_task_reads(anyio_backend: Any) -> None:
    """AnyIO raises without yielding: retrying in a loop would stop everything else."""

    async def receive_first() -> None:
        with suppress(anyio.ClosedResourceError):
            await udp.receive()

    async with TransportGroup() as group:
        udp = await anyio.create_udp_socket(local_host=HOST)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive_first)
            await turns()
            _, protocol = await group.connect_datagram_socket(Endpoint, udp)
            await until(lambda: protocol.lost)
        (error,) = protocol.lost
        assert isinstance(error, OSError)
        assert isinstance(error.__cause__, anyio.BusyResourceError)
        assert protocol.errors == []


@needs_unix
async def test_an_anyio_socket_with_a_closed_fd(anyio_backend: Any, tmp_path: Path) -> None:
    """Every datagram fails, but not every failure is reported."""
    async with TransportGroup() as group:
        sock = await anyio.create_unix_datagram_socket(local_path=str(tmp_path / "socket"))
        _, protocol = await group.connect_datagram_socket(Endpoint, sock)
        sock.extra(SocketAttribute.raw_socket).close()  # Before anything is received.
        await until(lambda: protocol.lost)
        (error,) = protocol.lost
        assert isinstance(error, OSError)
        assert error.errno == errno.EBADF
        assert protocol.errors == []


async def test_connect_datagram_socket_refuses_other_objects(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(TypeError, match="AnyIO"):
            await group.connect_datagram_socket(Endpoint, sock)  # type: ignore[arg-type]
