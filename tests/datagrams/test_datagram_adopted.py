"""Datagram endpoints: adopted sockets."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import anyio
import pytest
from datagram_helpers import Endpoint, Endpoints, clogged_unix_peer, receive, udp_peer
from network import needs_ipv6, needs_unix
from support import HOST, Stack, until

pytestmark = pytest.mark.anyio


async def test_an_adopted_socket(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((HOST, 0))
            transport, protocol = await endpoints.make(sock=sock)
            assert transport.get_extra_info("sockname") == sock.getsockname()
            peer.sendto(b"x", sock.getsockname())
            await until(lambda: protocol.received)
            assert sock.gettimeout() == 0


async def test_a_socket_in_use_by_another_endpoint(stack: Stack) -> None:
    """Two transports would take each other's datagrams. The first one is not affected."""
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((HOST, 0))
            transport, protocol = await endpoints.make(sock=sock)
            other = Endpoint()
            with pytest.raises(RuntimeError, match=r"is (already in use|used) by"):
                await group.create_datagram_endpoint(lambda: other, sock=sock)
            assert other.transport is None
            peer.sendto(b"question", sock.getsockname())
            await until(lambda: protocol.received)
            transport.sendto(b"answer", peer.getsockname())
            assert (await receive(peer))[0] == b"answer"
            assert protocol.errors == protocol.lost == other.received == []


async def test_d3_an_adopted_socket_that_is_connected(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect(peer.getsockname())
            transport, protocol = await endpoints.make(sock=sock)
            assert transport.get_extra_info("peername") == peer.getsockname()
            transport.sendto(b"without an address")
            transport.sendto(b"with one", peer.getsockname())
            assert [(await receive(peer))[0] for _ in range(2)] == [b"without an address", b"with one"]
            assert protocol.errors == []


@pytest.mark.differs(
    "`sendto` with another address on an adopted socket that is connected",
    asyncio="sent to the socket's own peer",
    here="`ValueError`, as with `remote_addr`",
    why="no datagram goes to the wrong peer",
)
@pytest.mark.ours_only
async def test_d9_sendto_another_address_on_an_adopted_connected_socket(stack: Stack) -> None:
    with udp_peer() as peer, udp_peer() as other:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect(peer.getsockname())
            transport, protocol = await endpoints.make(sock=sock)
            with pytest.raises(ValueError, match=r"must be None or \('127.0.0.1', "):
                transport.sendto(b"for the other", other.getsockname())
            transport.sendto(b"for the peer", peer.getsockname())
            assert (await receive(peer))[0] == b"for the peer"
            for sock in (peer, other):
                with pytest.raises(BlockingIOError):
                    sock.recv(1)
            assert protocol.errors == protocol.lost == []


@needs_ipv6
async def test_sendto_the_peer_of_an_adopted_ipv6_socket_without_scope(stack: Stack) -> None:
    with udp_peer(socket.AF_INET6, "::1") as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            sock.connect(peer.getsockname())
            transport, _ = await endpoints.make(sock=sock)
            transport.sendto(b"one", peer.getsockname()[:2])
            transport.sendto(b"two", peer.getsockname())
            assert [(await receive(peer))[0] for _ in range(2)] == [b"one", b"two"]


@needs_unix
@pytest.mark.ours_only("asyncio sends it to the socket's own peer")
@pytest.mark.parametrize("named", [False, True])
async def test_d9_sendto_another_address_on_an_adopted_unix_socket(stack: Stack, tmp_path: Path, named: bool) -> None:
    with clogged_unix_peer(tmp_path) as other:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        theirs.setblocking(False)
        if named:
            theirs.bind(str(tmp_path / "theirs"))
        with theirs:
            async with stack.open() as group, Endpoints(group) as endpoints:
                transport, _ = await endpoints.make(Endpoint(echo=True), sock=ours)
                with pytest.raises(ValueError, match="address"):
                    transport.sendto(b"for the other", other.getsockname())
                theirs.send(b"hello")  # The answer goes to the sender's address.
                assert (await receive(theirs))[0] == b"hello"
                with pytest.raises(BlockingIOError):
                    other.recv(1)


@pytest.mark.differs(
    "`sendto` on a netlink socket",
    asyncio="sent to the kernel, whatever the address",
    here="sent to the address",
    why="the kernel is only the default",
)
@pytest.mark.skipif(not hasattr(socket, "AF_NETLINK"), reason="there is no netlink")
@pytest.mark.ours_only
async def test_d9_a_netlink_socket_sends_to_others_than_the_kernel(stack: Stack) -> None:
    """`getpeername` returns the kernel's address, connected or not."""
    user_to_user, flags = 2, 1  # NETLINK_USERSOCK; NLM_F_REQUEST
    message = struct.pack("=IHHII", 20, 16, flags, 0, 0) + b"PING"
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, user_to_user) as other:
        other.bind((0, 0))
        other.setblocking(False)
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, user_to_user)
            sock.bind((0, 0))
            transport, protocol = await endpoints.make(sock=sock)
            transport.sendto(message, other.getsockname())
            assert await receive(other) == (message, sock.getsockname())
            other.sendto(message, sock.getsockname())
            await until(lambda: protocol.received)
            assert protocol.received == [(message, other.getsockname())]
            transport.sendto(message)  # To the kernel, which has no such port.
            assert [type(error) for error in protocol.errors] == [ConnectionRefusedError]
            assert protocol.lost == []


@needs_unix
@pytest.mark.differs(
    "an adopted datagram socket whose peer has no name (`socketpair`)",
    asyncio="`sendto` without an address ends the endpoint",
    here="the datagram is sent",
    why="the socket is connected",
)
@pytest.mark.ours_only
async def test_an_adopted_end_of_a_socketpair(stack: Stack) -> None:
    """Its peer has no name."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    with theirs:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(sock=ours)
            transport.sendto(b"hello")
            assert (await receive(theirs))[0] == b"hello"
            theirs.send(b"answer")
            await until(lambda: protocol.received)
            assert protocol.data == [b"answer"]


@pytest.mark.differs("an adopted datagram socket, when the factory raises or the call is cancelled")
@pytest.mark.ours_only
async def test_an_adopted_socket_is_closed_by_a_cancellation(stack: Stack) -> None:
    async with stack.open() as group:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await group.create_datagram_endpoint(Endpoint, sock=sock)
        assert sock.fileno() == -1
