"""Datagram endpoints: UDP and UNIX, against bare sockets and asyncio's own endpoints."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.abc import SocketAttribute, UDPSocket, UNIXDatagramSocket
from network import AF_UNIX, a_link_local_address, names, needs_ipv6, needs_reuse_port, needs_unix
from support import (
    GUARD,
    HOST,
    PeerProcess,
    Stack,
    capture_log,
    collect_contexts,
    leaves,
    open_descriptors,
    peer_process,
    settle,
    turns,
    until,
)

from transports_anyio import TransportGroup, TransportSocket, current_group

if TYPE_CHECKING:
    from typing_extensions import Self

pytestmark = pytest.mark.anyio


class Endpoint(asyncio.DatagramProtocol):
    """Record datagrams, and answer if `echo` is set."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.transport: Any = None
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Any] = []
        self.flow: list[str] = []
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))
        if self.echo:
            self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.flow.append("pause")

    def resume_writing(self) -> None:
        self.flow.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.received]


@contextmanager
def udp_peer(family: int = socket.AF_INET, host: str = HOST) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(socket.getaddrinfo(host, 0, family, socket.SOCK_DGRAM)[0][4])  # With its scope.
        sock.setblocking(False)
        yield sock


async def receive(sock: socket.socket, size: int = 65536) -> tuple[bytes, Any]:
    with anyio.fail_after(GUARD):
        while True:
            try:
                return sock.recvfrom(size)
            except BlockingIOError:
                await anyio.wait_readable(sock)


class Endpoints:
    """Make endpoints of a stack, and wait at the end until all are closed, on the oracle too."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.made: list[tuple[Any, Endpoint]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport, protocol in self.made:
            if not protocol.lost:  # asyncio's `abort` raises after the end
                transport.abort()
            await until(lambda protocol=protocol: protocol.lost)
            assert len(protocol.lost) == 1

    async def make(self, protocol: Any = None, **options: Any) -> tuple[Any, Any]:
        protocol = protocol or Endpoint()
        with anyio.fail_after(GUARD):
            transport, made = await self.group.create_datagram_endpoint(lambda: protocol, **options)
        assert made is protocol
        if isinstance(protocol, Endpoint):
            self.made.append((transport, protocol))
            await until(lambda: protocol.transport)
        return transport, protocol


# -- exchanging ---------------------------------------------------------------------------------------------


@pytest.mark.differs(
    "`connection_made` of a datagram protocol",
    asyncio="after `create_datagram_endpoint` has returned",
    here="before it returns",
    why="as for streams",
)
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, HOST), (socket.AF_INET6, "::1")])
async def test_datagrams_both_ways(stack: Stack, family: int, host: str) -> None:
    with udp_peer(family, host) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(local_addr=(host, 0))
            assert isinstance(transport, asyncio.DatagramTransport)
            address = transport.get_extra_info("sockname")
            peer.sendto(b"hello", address)
            await until(lambda: protocol.received)
            assert protocol.received == [(b"hello", peer.getsockname())]
            transport.sendto(b"answer", peer.getsockname())
            assert await receive(peer) == (b"answer", address)
            assert transport.get_extra_info("peername") is None
            assert transport.get_extra_info("socket").family == family


@pytest.mark.differs(
    "`pause_reading`, `resume_reading`, `is_reading` of a datagram transport",
    asyncio="there, because it shares a class with streams; `isinstance(transport, asyncio.Transport)` is true",
    here="not there, and false",
    why="they are not documented for datagrams",
)
@pytest.mark.ours_only
async def test_a_datagram_transport_has_no_stream_methods(stack: Stack) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, _ = await endpoints.make(local_addr=(HOST, 0))
        assert not isinstance(transport, asyncio.Transport)
        for name in ("is_reading", "pause_reading", "resume_reading", "write"):
            assert not hasattr(transport, name)


async def test_a_transport_takes_attributes(stack: Stack) -> None:
    """Programs store their own attributes on a transport, and tests replace its methods."""
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, _ = await endpoints.make(local_addr=(HOST, 0))
        sent: list[tuple[bytes, Any]] = []
        transport.sendto = lambda data, addr=None: sent.append((data, addr))
        transport.sendto(b"hello", (HOST, 9))
        assert sent == [(b"hello", (HOST, 9))]
        del transport.sendto


@pytest.mark.skipif(a_link_local_address() is None, reason="there is no link-local address")
@pytest.mark.parametrize("connected", [False, True])
async def test_ipv6_flow_info_and_scope(stack: Stack, connected: bool) -> None:
    address, interface = a_link_local_address() or ("", "")
    host, scope = f"{address}%{interface}", socket.if_nametoindex(interface)
    with udp_peer(socket.AF_INET6, host) as peer:
        port = peer.getsockname()[1]
        async with stack.open() as group, Endpoints(group) as endpoints:
            remote = {"remote_addr": (host, port)} if connected else {}
            transport, protocol = await endpoints.make(local_addr=(host, 0), **remote)
            own = transport.get_extra_info("sockname")
            assert own == (address, own[1], 0, scope)
            assert transport.get_extra_info("peername") == ((address, port, 0, scope) if connected else None)
            transport.sendto(b"question", None if connected else (address, port, 5, scope))
            assert await receive(peer) == (b"question", own)
            peer.sendto(b"answer", own)
            await until(lambda: protocol.received)
            assert protocol.received == [(b"answer", (address, port, 0, scope))]


async def test_a_remote_address(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(remote_addr=peer.getsockname())
            assert transport.get_extra_info("peername") == peer.getsockname()
            transport.sendto(b"one")
            transport.sendto(b"two", peer.getsockname())
            assert [(await receive(peer))[0], (await receive(peer))[0]] == [b"one", b"two"]
            with pytest.raises(ValueError, match="address"):
                transport.sendto(b"three", (HOST, 9))
            peer.sendto(b"answer", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)
            assert protocol.received == [(b"answer", peer.getsockname())]


async def test_both_addresses(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(local_addr=(HOST, 0), remote_addr=peer.getsockname())
            transport.sendto(b"x")
            assert await receive(peer) == (b"x", transport.get_extra_info("sockname"))


async def test_a_family_without_addresses(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(family=socket.AF_INET)
            transport.sendto(b"x", peer.getsockname())
            assert (await receive(peer))[0] == b"x"


async def test_names_are_resolved(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            address = ("localhost", peer.getsockname()[1])
            transport, _ = await endpoints.make(remote_addr=address, family=socket.AF_INET)
            transport.sendto(b"x")
            assert (await receive(peer))[0] == b"x"


@needs_ipv6
async def test_the_second_address_is_used_when_the_first_is_taken(stack: Stack) -> None:
    """A host of `None` means the loopback, IPv4 or IPv6."""
    async with stack.open() as group, Endpoints(group) as endpoints:
        for host, other in ((HOST, "::1"), ("::1", HOST)):  # The order depends on the system.
            with udp_peer(socket.AF_INET6 if ":" in host else socket.AF_INET, host) as taken:
                port = taken.getsockname()[1]
                transport, _ = await endpoints.make(local_addr=(None, port))
                assert transport.get_extra_info("sockname")[:2] == (other, port)


@pytest.mark.differs(
    "`create_datagram_endpoint` for a name with several addresses of one family",
    asyncio="only the last address is tried",
    here="all are tried, in order",
    why="as for TCP",
)
@pytest.mark.skipif(sys.platform != "linux", reason="a loopback network of more than one address")
@pytest.mark.parametrize("free", [0, 1, 2])
@pytest.mark.parametrize("connected", [False, True])
async def test_every_resolved_address_is_tried(
    stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, free: int, connected: bool
) -> None:
    """Of the addresses of one family, the first that can be bound is used."""
    if stack.is_oracle and free != 2:
        pytest.skip("asyncio keeps the last address of each family only")
    addresses = ["127.0.0.5", "127.0.0.6", "127.0.0.7"]
    with ExitStack() as sockets:
        port = 0
        for address in addresses:
            sock = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind((address, port))
            port = sock.getsockname()[1]
            if address == addresses[free]:
                freed = sock
        freed.close()
        async with stack.open() as group, Endpoints(group) as endpoints:
            with names(monkeypatch, {"three.test": addresses}, anyio_backend):
                remote = {"remote_addr": (HOST, 9)} if connected else {}
                transport, _ = await endpoints.make(local_addr=("three.test", port), **remote)
                assert transport.get_extra_info("sockname") == (addresses[free], port)
                before = open_descriptors()
                with pytest.raises(OSError) as caught:  # Now all are taken.
                    await group.create_datagram_endpoint(Endpoint, local_addr=("three.test", port), **remote)
                assert caught.value.errno == errno.EADDRINUSE
                assert open_descriptors() == before


@needs_ipv6
async def test_flags_are_passed_to_the_resolver(stack: Stack) -> None:
    """IPv4 by way of an IPv6 socket: without the flag the host has no address of the family."""
    with udp_peer() as peer:
        port = peer.getsockname()[1]
        async with stack.open() as group, Endpoints(group) as endpoints:
            options: dict[str, Any] = {"remote_addr": (HOST, port), "family": socket.AF_INET6}
            with pytest.raises(socket.gaierror):
                await group.create_datagram_endpoint(Endpoint, **options)
            transport, _ = await endpoints.make(flags=socket.AI_V4MAPPED, **options)
            assert transport.get_extra_info("peername") == (f"::ffff:{HOST}", port, 0, 0)
            transport.sendto(b"hello")
            assert await receive(peer) == (b"hello", (HOST, transport.get_extra_info("sockname")[1]))


async def test_a_protocol_number(stack: Stack) -> None:
    """A protocol by its number. Other numbers than that of UDP depend on the system."""
    async with stack.open() as group, Endpoints(group) as endpoints:
        for where in ({"local_addr": (HOST, 0)}, {"remote_addr": ("localhost", 9)}, {}):
            options: dict[str, Any] = {"family": socket.AF_INET, **where}
            transport, _ = await endpoints.make(proto=socket.IPPROTO_UDP, **options)
            assert transport.get_extra_info("socket").proto == socket.IPPROTO_UDP
            if stack.is_oracle and where.get("local_addr"):
                continue  # uvloop uses UDP whatever it is given, for numeric addresses.
            with pytest.raises(OSError):  # TCP has no datagrams.
                await group.create_datagram_endpoint(Endpoint, proto=socket.IPPROTO_TCP, **options)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_what_sendto_accepts(stack: Stack, kind: Any) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(remote_addr=peer.getsockname())
            transport.sendto(kind(b"payload"))
            assert (await receive(peer))[0] == b"payload"


@pytest.mark.parametrize("data", ["text", 3, None, [1]])
async def test_what_sendto_refuses(stack: Stack, data: Any) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(remote_addr=peer.getsockname())
            with pytest.raises(TypeError, match="bytes-like"):
                transport.sendto(data)
            assert not transport.is_closing()


@pytest.mark.differs(
    "empty datagrams",
    asyncio="until 3.13 dropped",
    here="sent and received",
    why="they are datagrams",
)
@pytest.mark.parametrize("remote", [False, True])
async def test_d6_empty_datagrams(stack: Stack, remote: bool) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            where: Any = {"remote_addr": peer.getsockname()} if remote else {"local_addr": (HOST, 0)}
            transport, protocol = await endpoints.make(**where)
            address = transport.get_extra_info("sockname")
            transport.sendto(b"", None if remote else peer.getsockname())
            assert await receive(peer) == (b"", address)
            peer.sendto(b"", address)
            await until(lambda: protocol.received)
            assert protocol.received == [(b"", peer.getsockname())]


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


# -- flow control -------------------------------------------------------------------------------------------


@contextmanager
def clogged_unix_peer(directory: Path) -> Iterator[socket.socket]:
    """A peer whose queue can be filled: UNIX datagrams wait, while UDP drops them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(directory / "peer"))
        sock.setblocking(False)
        yield sock


@needs_unix
@pytest.mark.ours_only("asyncio 3.13.0 never subtracts the size of the header", before=(3, 14, 10))
async def test_unsent_datagrams_wait_in_order(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            sent = [struct.pack("<I", number) * 256 for number in range(500)]
            mutable = bytearray()
            for data in sent:
                mutable[:] = data
                transport.sendto(mutable)
            assert transport.get_write_buffer_size() > 0
            assert protocol.flow == ["pause"]
            received = [(await receive(peer))[0] for _ in sent]
            assert received == sent
            await until(lambda: protocol.flow == ["pause", "resume"])
            assert transport.get_write_buffer_size() == 0


@needs_unix
async def test_new_datagrams_queue_after_waiting_ones(stack: Stack, tmp_path: Path) -> None:
    """The receiver has space again, and the transport has not run yet."""
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            numbers = 0
            while transport.get_write_buffer_size() == 0:
                transport.sendto(struct.pack("<I", numbers))
                numbers += 1
            received = [peer.recv(4) for _ in range(numbers - 1)]
            transport.sendto(struct.pack("<I", numbers))
            received += [(await receive(peer))[0] for _ in range(2)]
            assert received == [struct.pack("<I", number) for number in range(numbers + 1)]


@needs_unix
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_nothing_is_received_after_close(stack: Stack, tmp_path: Path, end: str) -> None:
    """Neither a datagram that has already arrived, nor one that arrives while `close` flushes."""
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            ours = str(tmp_path / "ours")
            options = {"family": socket.AF_UNIX, "local_addr": ours, "remote_addr": peer.getsockname()}
            transport, protocol = await endpoints.make(**options)
            await turns()  # asyncio begins to receive in one of its own.
            while transport.get_write_buffer_size() == 0:
                transport.sendto(b"x")
            peer.sendto(b"too late", ours)
            getattr(transport, end)()
            await settle(group)
            if end == "close":
                assert protocol.lost == []
                peer.sendto(b"later still", ours)
                await turns()
                while not protocol.lost:
                    await receive(peer)
                    await turns(1)
            await until(lambda: protocol.lost)
            assert protocol.received == []


@needs_unix
@pytest.mark.differs(
    "the buffer size of a datagram transport",
    asyncio="until 3.14 the header is added but never subtracted",
    here="added and subtracted",
    why="otherwise a paused protocol is never resumed",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_d2_buffer_size_counts_headers_when_adding_and_removing(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            transport.set_write_buffer_limits(high=100, low=0)
            assert transport.get_write_buffer_limits() == (0, 100)
            filled = 0
            while transport.get_write_buffer_size() == 0:
                transport.sendto(b"12")
                filled += 1
            assert transport.get_write_buffer_size() == 10
            for _ in range(9):
                transport.sendto(b"12")
            assert transport.get_write_buffer_size() == 100
            assert protocol.flow == []
            transport.sendto(b"")
            assert transport.get_write_buffer_size() == 108
            assert protocol.flow == ["pause"]
            for _ in range(filled + 10):
                await receive(peer)
            await until(lambda: protocol.flow == ["pause", "resume"])
            assert transport.get_write_buffer_size() == 0


@needs_unix
async def test_w13_close_sends_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            for number in range(300):
                transport.sendto(struct.pack("<I", number))
            transport.close()
            assert transport.is_closing()
            assert protocol.lost == []
            received = [(await receive(peer))[0] for _ in range(300)]
            assert received == [struct.pack("<I", number) for number in range(300)]
            await until(lambda: protocol.lost)
            assert protocol.lost == [None]


@needs_unix
@pytest.mark.differs(
    "`get_write_buffer_size` of a datagram transport after `abort`",
    asyncio="until 3.15 still counts the datagrams that were dropped",
    here="0",
    why="nothing is buffered any more",
)
@pytest.mark.ours_only(before=(3, 15))
async def test_abort_drops_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            for _ in range(300):
                transport.sendto(b"x")
            transport.abort()
            assert protocol.lost == []
            await until(lambda: protocol.lost)
            assert protocol.lost == [None]
            assert transport.get_write_buffer_size() == 0


@needs_unix
@pytest.mark.ours_only("asyncio has no group")
async def test_leaving_the_block_by_an_exception_drops_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    protocol = Endpoint()
    with clogged_unix_peer(tmp_path) as peer:
        with pytest.raises(BaseException) as caught:
            async with stack.open() as group:
                transport, _ = await group.create_datagram_endpoint(
                    lambda: protocol, family=socket.AF_UNIX, remote_addr=peer.getsockname()
                )
                for _ in range(300):
                    transport.sendto(b"x")
                raise LookupError
        assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
    assert protocol.lost == [None]


async def test_d5_close_in_connection_made_right_after_sendto(stack: Stack) -> None:
    class Hasty(Endpoint):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.sendto(b"in haste")
            transport.close()

    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            _, protocol = await endpoints.make(Hasty(), remote_addr=peer.getsockname())
            assert (await receive(peer))[0] == b"in haste"
            await until(lambda: protocol.lost)
            assert protocol.lost == [None]
            assert protocol.errors == []
            assert contexts == []


async def test_sending_after_the_end_is_dropped_with_a_warning_from_the_fifth_on(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(remote_addr=peer.getsockname())
            transport.close()
            await until(lambda: protocol.lost)
            with capture_log(stack) as records:
                for _ in range(4):
                    transport.sendto(b"x")
                before = len(records)
                for _ in range(3):
                    transport.sendto(b"x")
            assert before == 0
            assert len(records) in (2, 3)  # asyncio counts `close` as one
            with pytest.raises(BlockingIOError):
                peer.recv(1)


@pytest.mark.differs(
    "`sendto` with an address after `close`, without `remote_addr`",
    asyncio="sent in the iteration of the `close`; later `AttributeError`",
    here="dropped",
    why="as with `remote_addr`",
)
@pytest.mark.ours_only
async def test_sending_to_an_address_after_the_close_is_dropped(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            transport, protocol = await endpoints.make(local_addr=(HOST, 0))
            transport.close()
            transport.sendto(b"in the same turn", peer.getsockname())
            await until(lambda: protocol.lost)
            transport.sendto(b"later", peer.getsockname())
            with pytest.raises(BlockingIOError):
                peer.recv(1)
            assert protocol.lost == [None]
            assert protocol.errors == contexts == []


# -- errors -------------------------------------------------------------------------------------------------


async def test_d1_a_peer_that_refuses(stack: Stack) -> None:
    with udp_peer() as peer:
        address = peer.getsockname()
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(remote_addr=address)
        transport.sendto(b"is anybody there?")
        await until(lambda: protocol.errors)
        assert isinstance(protocol.errors[0], ConnectionRefusedError)
        assert not transport.is_closing()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(address)
            peer.setblocking(False)
            transport.sendto(b"now?")
            assert (await receive(peer))[0] == b"now?"
            peer.sendto(b"yes", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)


async def test_an_unconnected_endpoint_ignores_a_refused_datagram(stack: Stack) -> None:
    """The system reports a refusal only to connected sockets."""
    with udp_peer() as peer:
        nobody = peer.getsockname()
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(local_addr=(HOST, 0))
        address = transport.get_extra_info("sockname")
        transport.sendto(b"is anybody there?", nobody)
        transport.sendto(b"to oneself", address)
        await until(lambda: protocol.received)
        assert protocol.received == [(b"to oneself", address)]
        assert protocol.errors == []
        assert not transport.is_closing()


async def test_d1_a_datagram_that_is_too_large(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(remote_addr=peer.getsockname())
            transport.sendto(bytes(100_000))
            (error,) = protocol.errors
            assert isinstance(error, OSError)
            assert error.errno == errno.EMSGSIZE
            transport.sendto(b"small")
            assert (await receive(peer))[0] == b"small"


class Exhausted(socket.socket):
    """A socket whose `sendto` sometimes fails with ENOBUFS, which Linux raises only for a full device queue."""

    failures: list[OSError]

    def send(self, *args: Any) -> int:
        if self.failures:
            raise self.failures.pop()
        return super().send(*args)

    def sendto(self, *args: Any) -> int:
        if self.failures:
            raise self.failures.pop()
        return super().sendto(*args)


@pytest.mark.parametrize("connected", [False, True])
async def test_sendto_without_buffer_space(stack: Stack, connected: bool) -> None:
    """The datagram is lost, and the endpoint lives on."""
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = Exhausted(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((HOST, 0))
            if connected:
                sock.connect(peer.getsockname())
            sock.failures = [OSError(errno.ENOBUFS, "as the system would")]
            transport, protocol = await endpoints.make(sock=sock)
            address = None if connected else peer.getsockname()
            transport.sendto(b"dropped", address)
            assert [error.errno for error in protocol.errors] == [errno.ENOBUFS]
            transport.sendto(b"sent", address)
            assert (await receive(peer))[0] == b"sent"
            peer.sendto(b"answer", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)
            assert protocol.lost == []


@needs_unix
async def test_a_waiting_datagram_without_buffer_space(stack: Stack, tmp_path: Path) -> None:
    """Only the datagram at the head is lost: the others are sent, in order."""
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = Exhausted(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.connect(peer.getsockname())
            sock.failures = []
            transport, protocol = await endpoints.make(sock=sock)
            sent: list[Any] = []
            while transport.get_write_buffer_size() == 0:
                sent.append(struct.pack("<I", len(sent)))
                transport.sendto(sent[-1])
            dropped = sent.pop()
            for _ in range(100):
                sent.append(struct.pack("<I", len(sent) + 1))
                transport.sendto(sent[-1])
            sock.failures = [OSError(errno.ENOBUFS, "as the system would")]
            received = [(await receive(peer))[0] for _ in sent]
            assert received == sent
            assert dropped not in received
            assert [error.errno for error in protocol.errors] == [errno.ENOBUFS]
            transport.sendto(b"alive")
            assert (await receive(peer))[0] == b"alive"
            assert protocol.lost == []


@pytest.mark.differs(
    "epoll cannot register one more file descriptor (`ENOSPC`), for a connection or datagram endpoint",
)
@pytest.mark.skipif(sys.platform != "linux", reason="there is no epoll")
@pytest.mark.ours_only
async def test_epoll_refuses_the_endpoint(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC of epoll (`max_user_watches`) ends the endpoint, not the group."""
    failure = OSError(errno.ENOSPC, "as the system would")

    def full(*_: object) -> None:
        raise failure

    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(local_addr=(HOST, 0))
        address = transport.get_extra_info("sockname")
        before = open_descriptors()
        refused = Endpoint()
        with monkeypatch.context() as patch:
            patch.setattr("transports_anyio._selector.EpollSelector.add", full)
            with pytest.raises(OSError) as caught:
                await group.create_datagram_endpoint(lambda: refused, local_addr=(HOST, 0))
        assert caught.value is failure
        assert refused.transport is not None
        await until(lambda: refused.lost)
        assert refused.lost == [failure]
        await until(lambda: open_descriptors() == before)
        assert group.statistics().open_transports == {"DatagramTransport": 1}
        second, _ = await endpoints.make(local_addr=(HOST, 0))
        second.sendto(b"alive", address)
        await until(lambda: protocol.received)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other codes for it")
async def test_the_peer_is_unreachable(stack: Stack) -> None:
    """No broadcasts without permission; and no IPv4 address but as one of IPv6."""
    async with stack.open() as group, Endpoints(group) as endpoints:
        for host, address, code in (
            (HOST, ("127.255.255.255", 9), errno.EACCES),
            ("::1", ("::ffff:127.0.0.1", 9), errno.ENETUNREACH),
        ):
            transport, protocol = await endpoints.make(local_addr=(host, 0))
            transport.sendto(b"x", address)
            assert [error.errno for error in protocol.errors] == [code]
            with udp_peer(host=host, family=socket.AF_INET6 if ":" in host else socket.AF_INET) as peer:
                transport.sendto(b"alive", peer.getsockname())
                assert (await receive(peer))[0] == b"alive"


@pytest.mark.differs(
    "a datagram protocol without `error_received`",
    asyncio="`AttributeError` from `sendto`",
    here="reported once",
    why="a peer that has gone is not the sender's mistake",
)
async def test_d4_a_protocol_without_error_received(stack: Stack) -> None:
    class Minimal:
        def __init__(self) -> None:
            self.received: list[bytes] = []

        def connection_made(self, transport: Any) -> None: ...

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.received.append(data)

        def connection_lost(self, exc: Exception | None) -> None:
            self.received.append(b"lost")

    if stack.is_oracle:
        pytest.skip("asyncio raises AttributeError out of sendto")
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            transport, protocol = await endpoints.make(Minimal(), remote_addr=peer.getsockname())
            for _ in range(3):
                transport.sendto(bytes(100_000))
            (context,) = contexts
            assert isinstance(context["exception"], AttributeError)
            peer.sendto(b"alive", transport.get_extra_info("sockname"))
            await until(lambda: protocol.received)
            transport.close()
            await until(lambda: protocol.received == [b"alive", b"lost"])


@needs_unix
@pytest.mark.differs(
    "a datagram protocol that raises in a callback",
    asyncio="reported, or raised by `sendto`",
    here="reported, and the endpoint stays open",
    why="one peer's datagram must not end it for the others",
)
@pytest.mark.parametrize("callback", ["connection_made", "datagram_received", "error_received", "pause_writing"])
async def test_a_callback_that_raises_is_reported_and_the_endpoint_lives_on(
    stack: Stack, callback: str, tmp_path: Path
) -> None:
    if stack.is_oracle and callback == "error_received":
        pytest.skip("asyncio raises it out of sendto")

    class Failing(Endpoint):
        failed = False

    def fail(self: Failing, *args: Any) -> None:
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError(callback)
        getattr(Endpoint, callback)(self, *args)

    setattr(Failing, callback, fail)
    if callback == "connection_made":
        Failing.transport = True  # type: ignore[assignment]
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            protocol = Failing()
            protocol.transport = callback == "connection_made"
            transport, _ = await endpoints.make(
                protocol,
                family=socket.AF_UNIX,
                local_addr=str(tmp_path / "ours"),
                remote_addr=peer.getsockname(),
            )
            if callback == "datagram_received":
                peer.sendto(b"the first", str(tmp_path / "ours"))
            elif callback == "error_received":
                transport.sendto(bytes(10 << 20))
            elif callback == "pause_writing":
                transport.set_write_buffer_limits(high=0)
                for _ in range(300):
                    transport.sendto(b"x")
            await until(lambda: contexts)
            (context,) = contexts
            assert str(context["exception"]) == callback
            assert not transport.is_closing()
            peer.sendto(b"the second", str(tmp_path / "ours"))
            await until(lambda: protocol.data[-1:] == [b"the second"])


@pytest.mark.parametrize("kind", ["socket", "AnyIO socket"])
@pytest.mark.parametrize("caught", [False, True])
async def test_system_exit_in_connection_made_propagates(anyio_backend: Any, kind: str, caught: bool) -> None:
    """The call raises, and no endpoint is left."""

    class Leaving(Endpoint):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            raise SystemExit(3)

    protocol = Leaving()
    descriptors = open_descriptors()

    async def connect(group: TransportGroup) -> None:
        if kind == "AnyIO socket":
            await group.connect_datagram_socket(lambda: protocol, await anyio.create_udp_socket(local_host=HOST))
        else:
            await group.create_datagram_endpoint(lambda: protocol, (HOST, 0))

    with anyio.fail_after(GUARD):
        try:
            async with TransportGroup() as group:
                try:
                    await connect(group)
                except SystemExit:
                    if not caught:
                        raise
                    await group.wait_closed()
        except BaseException as error:
            assert [type(leaf) for leaf in leaves(error)] == [SystemExit]
            assert not caught
        else:
            assert caught
    assert protocol.lost == [None]
    assert open_descriptors() == descriptors


async def make_endpoint(endpoints: Endpoints, kind: str, directory: Path) -> tuple[Any, Endpoint, Any]:
    """An unconnected endpoint of every kind: its transport, its protocol and its own address."""
    path = str(directory / kind)
    if kind == "udp":
        transport, protocol = await endpoints.make(local_addr=(HOST, 0))
    elif kind == "unix":
        transport, protocol = await endpoints.make(family=socket.AF_UNIX, local_addr=path)
    elif kind == "adopted unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(path)
        transport, protocol = await endpoints.make(sock=sock)
    else:
        if kind == "anyio udp":
            anyio_socket: Any = await anyio.create_udp_socket(local_host=HOST)
        else:
            anyio_socket = await anyio.create_unix_datagram_socket(local_path=path)
        transport, protocol = await endpoints.group.connect_datagram_socket(Endpoint, anyio_socket)
        endpoints.made.append((transport, protocol))
    return transport, protocol, transport.get_extra_info("sockname")


every_kind = pytest.mark.parametrize(
    "kind",
    [
        "udp",
        pytest.param("unix", marks=needs_unix),
        pytest.param("adopted unix", marks=needs_unix),
        "anyio udp",
        pytest.param("anyio unix", marks=needs_unix),
    ],
)


@pytest.mark.differs("`sendto` without an address, or with an invalid one")
@pytest.mark.ours_only
@every_kind
@pytest.mark.parametrize("address", ["nonsense", ("one", "two", "three"), (HOST, 70000), (HOST, "http"), 5, b"\0", ()])
async def test_an_invalid_address_is_reported_and_the_endpoint_stays_open(
    stack: Stack, kind: str, address: Any, tmp_path: Path
) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        contexts = collect_contexts(group)
        transport, protocol, own = await make_endpoint(endpoints, kind, tmp_path)
        transport.sendto(b"to nobody", address)
        transport.sendto(b"alive", own)
        await until(lambda: protocol.received)
        assert protocol.received == [(b"alive", own)]
        if "unix" in kind and isinstance(address, (str, bytes)):  # A path, at which nothing is bound.
            assert [type(error) for error in protocol.errors] == [
                FileNotFoundError if address == "nonsense" else ConnectionRefusedError
            ]
            assert contexts == []
        else:
            (context,) = contexts
            assert isinstance(context["exception"], (TypeError, ValueError, OverflowError))
            assert repr(address) in context["message"]
            assert context["transport"] is transport
            assert context["protocol"] is protocol
            assert protocol.errors == []
        await until(lambda: transport.get_write_buffer_size() == 0)  # The task of an AnyIO socket sends.
        assert protocol.lost == []


@pytest.mark.ours_only("asyncio cannot adopt AnyIO's sockets")
@every_kind
async def test_a_send_error_loses_no_received_datagram(stack: Stack, kind: str, tmp_path: Path) -> None:
    """Reading the error queue must not take a datagram: UNIX and netlink sockets have no error queue."""
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol, own = await make_endpoint(endpoints, kind, tmp_path)
        family = socket.AF_UNIX if "unix" in kind else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as peer:
            for number in range(3):
                peer.sendto(str(number).encode(), own)
                transport.sendto(bytes(4 << 20), own)  # Too large.
            await until(lambda: len(protocol.received) == 3)
        assert protocol.data == [b"0", b"1", b"2"]
        if kind != "anyio udp":  # On asyncio AnyIO does not report it.
            await until(lambda: len(protocol.errors) == 3)
        assert protocol.lost == []


@pytest.mark.skipif(not hasattr(socket, "AF_NETLINK"), reason="there is no netlink")
async def test_a_netlink_send_error_loses_no_received_datagram(stack: Stack) -> None:
    message = struct.pack("=IHHII", 20, 16, 1, 0, 0) + b"PING"
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 2) as other:
        other.bind((0, 0))
        async with stack.open() as group, Endpoints(group) as endpoints:
            sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 2)
            sock.bind((0, 0))
            transport, protocol = await endpoints.make(sock=sock)
            other.sendto(message, sock.getsockname())
            transport.sendto(message)  # To the kernel, which has no such port.
            await until(lambda: protocol.received)
            assert protocol.data == [message]
            assert [type(error) for error in protocol.errors] == [ConnectionRefusedError]


@pytest.mark.differs(
    "`sendto` without an address, or with an invalid one",
    asyncio="ends the endpoint",
    here=(
        "only that datagram is dropped: `error_received` gets an `OSError` (`EDESTADDRREQ` if it was missing), "
        "another exception is reported"
    ),
    why="the address may come from a peer, whose datagram must not end the endpoint for the others",
)
@pytest.mark.ours_only
@every_kind
async def test_sendto_without_an_address(stack: Stack, kind: str, tmp_path: Path) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        contexts = collect_contexts(group)
        transport, protocol, own = await make_endpoint(endpoints, kind, tmp_path)
        transport.sendto(b"to nobody")
        transport.sendto(b"alive", own)
        await until(lambda: protocol.received)
        assert [error.errno for error in protocol.errors] == [errno.EDESTADDRREQ]
        assert contexts == []
        assert protocol.lost == []


@needs_unix
@pytest.mark.ours_only("asyncio ends the endpoint")
@pytest.mark.parametrize("kind", ["unix", "adopted unix", "anyio unix"])
async def test_d8_a_reply_to_an_unnamed_sender(stack: Stack, kind: str, tmp_path: Path) -> None:
    """Sending to it fails, which does not affect the other peers."""
    async with stack.open() as group, Endpoints(group) as endpoints:
        contexts = collect_contexts(group)
        transport, protocol, own = await make_endpoint(endpoints, kind, tmp_path)
        protocol.echo = True
        protocol.transport = transport
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unnamed, clogged_unix_peer(tmp_path) as peer:
            unnamed.sendto(b"anonymous", own)
            peer.sendto(b"with a name", own)
            assert await receive(peer) == (b"with a name", own)
        assert protocol.received == [(b"anonymous", None), (b"with a name", str(tmp_path / "peer"))]
        assert [error.errno for error in protocol.errors] == [errno.EDESTADDRREQ]
        assert contexts == []
        assert protocol.lost == []


@needs_unix
@pytest.mark.ours_only("asyncio ends the endpoint")
async def test_an_invalid_address_after_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    """Only its own datagram is lost, and the others keep their order."""
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, local_addr=str(tmp_path / "ours"))
            sent: list[Any] = []
            while transport.get_write_buffer_size() == 0:
                sent.append(struct.pack("<I", len(sent)))
                transport.sendto(sent[-1], peer.getsockname())
            transport.sendto(b"to nobody")
            transport.sendto(b"to nobody", 5)
            transport.sendto(b"the last", peer.getsockname())
            sent.append(b"the last")
            assert [(await receive(peer))[0] for _ in sent] == sent
            assert [error.errno for error in protocol.errors] == [errno.EDESTADDRREQ]
            (context,) = contexts
            assert isinstance(context["exception"], TypeError)
            await until(lambda: transport.get_write_buffer_size() == 0)
            assert protocol.lost == []


# -- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"local_addr": "localhost"}, TypeError),
        ({"local_addr": ("localhost", 0, 0)}, TypeError),
        ({"remote_addr": "nowhere"}, TypeError),
        ({"local_addr": (HOST, 0), "remote_addr": ("::1", 9)}, ValueError),
        pytest.param({"family": AF_UNIX, "local_addr": (HOST, 0)}, TypeError, marks=needs_unix),
        ({"local_addr": ("192.0.2.1", 0)}, OSError),
        ({"local_addr": ("no such host.invalid", 0)}, socket.gaierror),
        pytest.param({"family": AF_UNIX, "remote_addr": "/nonexistent/socket"}, FileNotFoundError, marks=needs_unix),
    ],
)
async def test_invalid_arguments(stack: Stack, options: Any, error: type[Exception]) -> None:
    async with stack.open() as group:
        with pytest.raises(error):
            await group.create_datagram_endpoint(Endpoint, **options)


@pytest.mark.differs(
    "errors of `bind` and `connect` for datagrams",
    asyncio="do not name the address",
    here="name the address",
    why="as for TCP",
)
@pytest.mark.ours_only
async def test_errors_name_the_address(stack: Stack) -> None:
    async with stack.open() as group:
        with udp_peer() as taken:
            name = taken.getsockname()
            with pytest.raises(OSError, match=rf"bind on address \('127\.0\.0\.1', {name[1]}\)") as caught:
                await group.create_datagram_endpoint(Endpoint, local_addr=name)
            assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(PermissionError, match=r"Connect call failed \('127\.255\.255\.255', 9\)"):
            await group.create_datagram_endpoint(Endpoint, remote_addr=("127.255.255.255", 9))


@pytest.mark.ours_only("asyncio's errors are freed by the garbage collector only")
async def test_errors_leave_no_reference_cycle(stack: Stack) -> None:
    def errors() -> int:
        return sum(issubclass(type(thing), OSError) for thing in gc.get_objects())

    async with stack.open() as group:
        with udp_peer() as taken:
            gc.collect()
            gc.disable()
            try:
                before = errors()
                with suppress(OSError):
                    await group.create_datagram_endpoint(Endpoint, local_addr=taken.getsockname())
                assert errors() == before
            finally:
                gc.enable()


@needs_unix
@pytest.mark.differs(
    "an adopted socket of type `SOCK_SEQPACKET`",
    asyncio="accepted; its end is received as an empty datagram, in every iteration",
    here="`ValueError`, as for a stream socket",
    why="it is a connection",
)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
async def test_an_adopted_socket_of_the_wrong_kind(stack: Stack, kind: int) -> None:
    if stack.is_oracle and kind == socket.SOCK_SEQPACKET:
        pytest.skip("asyncio takes it, and its end for an empty datagram, in every turn")
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    async with stack.open() as group:
        with ours, theirs, pytest.raises(ValueError, match="A datagram socket was expected, got <socket"):
            await group.create_datagram_endpoint(Endpoint, sock=ours)


@pytest.mark.differs(
    "a datagram that is larger than the receive buffer",
    asyncio="its beginning is delivered",
    here="`error_received` gets an `OSError` with `EMSGSIZE`, as on Windows",
    why="a part is not the datagram",
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let datagrams be as large")
@pytest.mark.ours_only
@pytest.mark.parametrize("kind", ["socket", "AnyIO socket"])
async def test_d12_a_datagram_that_is_not_received_whole(stack: Stack, tmp_path: Path, kind: str) -> None:
    most = 256 * 1024 if kind == "socket" else 65535
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        if peer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 1 << 20:
            pytest.skip("this system's socket buffers are too small")
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            if kind == "socket":
                _, protocol, own = await make_endpoint(endpoints, "unix", tmp_path)
            else:
                _, protocol, own = await make_endpoint(endpoints, "anyio unix", tmp_path)
            largest = bytes(range(256)) * 1024
            peer.sendto(largest[:most], own)
            await until(lambda: protocol.received)
            assert protocol.data == [largest[:most]]
            peer.sendto(bytes(most + 1), own)
            await until(lambda: protocol.errors)
            assert [error.errno for error in protocol.errors] == [errno.EMSGSIZE]
            peer.sendto(b"small", own)
            await until(lambda: len(protocol.received) == 2)
            assert protocol.data == [largest[:most], b"small"]
            assert contexts == []
            assert protocol.lost == []


@pytest.mark.parametrize(
    "option", ["local_addr", "remote_addr", "family", "proto", "flags", "reuse_port", "allow_broadcast"]
)
async def test_sock_excludes_other_parameters(stack: Stack, option: str) -> None:
    async with stack.open() as group:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            with pytest.raises(ValueError, match=option):
                await group.create_datagram_endpoint(Endpoint, sock=sock, **{option: 1})


@pytest.mark.differs(
    "an adopted datagram socket, when the factory raises or the call is cancelled",
    asyncio="left open",
    here="closed",
    why="nothing leaks",
)
async def test_a_factory_that_raises_leaves_nothing_open(stack: Stack) -> None:
    def factory() -> Any:
        raise LookupError

    if stack.is_oracle:
        pytest.skip("asyncio leaves the socket open")
    async with stack.open() as group:
        with pytest.raises(LookupError):
            await group.create_datagram_endpoint(factory, local_addr=(HOST, 0))


@needs_reuse_port
async def test_reuse_port_lets_endpoints_share_a_port(stack: Stack) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        first, _ = await endpoints.make(local_addr=(HOST, 0), reuse_port=True)
        address = first.get_extra_info("sockname")
        second, _ = await endpoints.make(local_addr=address, reuse_port=True)
        assert second.get_extra_info("sockname") == address
        with pytest.raises(OSError, match="in use"):
            await group.create_datagram_endpoint(Endpoint, local_addr=address)


async def test_reuse_port_on_a_system_without_it(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack.open() as group:
        monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
        before = open_descriptors()
        with pytest.raises(ValueError, match="not supported"):
            await group.create_datagram_endpoint(Endpoint, local_addr=(HOST, 0), reuse_port=True)
        if not stack.is_oracle:
            assert open_descriptors() == before


async def test_broadcasting(stack: Stack) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        with udp_peer(host="0.0.0.0") as peer:
            port = peer.getsockname()[1]
            transport, _ = await endpoints.make(remote_addr=("127.255.255.255", port), allow_broadcast=True)
            sock = transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
            transport.sendto(b"to all")
            assert (await receive(peer))[0] == b"to all"
            with pytest.raises(ValueError, match="address"):
                transport.sendto(b"x", (HOST, port))


async def test_multicast_on_loopback(stack: Stack) -> None:
    address = "239.192.7.7"
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(local_addr=("0.0.0.0", 0))
        sock = transport.get_extra_info("socket")
        membership = socket.inet_aton(address) + socket.inet_aton(HOST)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        with udp_peer() as peer:
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(HOST))
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            peer.sendto(b"to the group", (address, sock.getsockname()[1]))
            await until(lambda: protocol.received)
            assert protocol.received == [(b"to the group", peer.getsockname())]


# -- UNIX ---------------------------------------------------------------------------------------------------


@needs_unix
@pytest.mark.parametrize("abstract", [False, True])
async def test_unix_datagrams(stack: Stack, tmp_path: Path, abstract: bool) -> None:
    path = f"\0transports_anyio-{os.getpid()}-{id(tmp_path)}" if abstract else str(tmp_path / "socket")
    async with stack.open() as group, Endpoints(group) as endpoints:
        _, server = await endpoints.make(Endpoint(echo=True), family=socket.AF_UNIX, local_addr=path)
        client, answers = await endpoints.make(
            family=socket.AF_UNIX, local_addr=str(tmp_path / "client"), remote_addr=path
        )
        client.sendto(b"hello")
        await until(lambda: answers.received)
        assert answers.data == [b"hello"]
        assert server.received == [(b"hello", str(tmp_path / "client"))]


@needs_unix
async def test_an_empty_remote_address_means_no_address(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            ours = str(tmp_path / "ours")
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, local_addr=ours, remote_addr="")
            transport.sendto(b"hello", peer.getsockname())
            assert await receive(peer) == (b"hello", ours)
            peer.sendto(b"answer", ours)
            await until(lambda: protocol.received)
            assert protocol.received == [(b"answer", peer.getsockname())]


@needs_unix
async def test_a_stale_unix_socket_is_replaced_and_another_file_is_not(stack: Stack, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
    async with stack.open() as group, Endpoints(group) as endpoints:
        await endpoints.make(family=socket.AF_UNIX, local_addr=path)
        (tmp_path / "file").write_text("precious")
        with pytest.raises(OSError, match="in use"):
            await group.create_datagram_endpoint(Endpoint, family=socket.AF_UNIX, local_addr=str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


# -- many ---------------------------------------------------------------------------------------------------


@needs_unix
async def test_d7_ten_thousand_datagrams_in_a_burst(stack: Stack, tmp_path: Path) -> None:
    """Over UNIX, where nothing is dropped: all arrive, in order."""
    count = 10_000
    async with stack.open() as group, Endpoints(group) as endpoints:
        _, receiver = await endpoints.make(family=socket.AF_UNIX, local_addr=str(tmp_path / "receiver"))
        sender, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=str(tmp_path / "receiver"))
        for number in range(count):
            sender.sendto(struct.pack("<I", number))
        await until(lambda: len(receiver.received) == count)
        assert receiver.data == [struct.pack("<I", number) for number in range(count)]
        assert protocol.errors == []


async def test_r5_a_flood_does_not_starve_other_endpoints(stack: Stack) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        flooded, flood = await endpoints.make(local_addr=(HOST, 0))
        other, quiet = await endpoints.make(Endpoint(echo=True), local_addr=(HOST, 0))
        timer: list[int] = []
        async with peer_process("udp_flood", flooded.get_extra_info("sockname")[1]) as process:
            assert isinstance(process, PeerProcess)
            assert await process.line() == "flooding"
            await until(lambda: len(flood.received) > 100)
            with udp_peer() as peer:
                peer.sendto(b"and I?", other.get_extra_info("sockname"))
                assert (await receive(peer))[0] == b"and I?"
            group.call_later(0.01, timer.append, 1)
            await until(lambda: timer)
            assert quiet.data == [b"and I?"]


class Restless(Endpoint):
    """An endpoint that sends itself a datagram for each that it receives."""

    def __init__(self, *, at_most: int, burn: float = 0) -> None:
        super().__init__()
        self.count = 0
        self.at_most = at_most
        self.burn = burn

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.count += 1
        end = time.perf_counter() + self.burn
        while time.perf_counter() < end:
            pass
        if self.count < self.at_most:
            self.transport.sendto(data, addr)


async def test_an_always_ready_endpoint_does_not_starve_timers(stack: Stack) -> None:
    """Counted, not measured: a timer of some milliseconds, against datagrams that take a second."""
    at_most = 200_000
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(Restless(at_most=at_most), local_addr=(HOST, 0))
        at: list[int] = []

        def due() -> None:
            at.append(protocol.count)
            transport.abort()

        transport.sendto(b"x", transport.get_extra_info("sockname"))
        group.call_later(0.01, due)
        await until(lambda: protocol.lost)
        assert at
        assert at[0] < at_most / 2


async def test_slow_callbacks_do_not_starve_tasks(stack: Stack) -> None:
    """Each callback takes a millisecond, so an iteration must be bounded by time, not by a count. Counted, not
    measured."""
    at_most = 3_000
    counts = []
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(Restless(at_most=at_most, burn=0.001), local_addr=(HOST, 0))
        transport.sendto(b"x", transport.get_extra_info("sockname"))
        await until(lambda: protocol.count)
        for _ in range(5):
            before = protocol.count
            await anyio.sleep(0.01)
            counts.append(protocol.count - before)
        transport.abort()
        assert max(counts) < 250, counts


async def test_closing_in_the_middle_of_a_batch_ends_it(stack: Stack) -> None:
    class Once(Endpoint):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.close()

    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(Once(), local_addr=(HOST, 0))
            address = transport.get_extra_info("sockname")
            for number in range(5):
                peer.sendto(str(number).encode(), address)
            await until(lambda: protocol.lost)
            assert protocol.data == [b"0"]


@pytest.mark.ours_only("asyncio has no current group")
async def test_the_current_group_in_callbacks(stack: Stack) -> None:
    groups = []

    class Asking(Endpoint):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            groups.append(current_group())

        def error_received(self, exc: Exception) -> None:
            groups.append(current_group())

    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(Asking(), remote_addr=peer.getsockname())
            peer.sendto(b"x", transport.get_extra_info("sockname"))
            await until(lambda: groups)
            transport.sendto(bytes(100_000))
            assert groups == [group, group]


# -- other peers --------------------------------------------------------------------------------------------


async def test_a_dnslib_resolver_asks_our_endpoint(stack: Stack) -> None:
    """A name server made with dnslib, asked by a resolver in another process."""
    dnslib = pytest.importorskip("dnslib")

    class NameServer(Endpoint):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            request = dnslib.DNSRecord.parse(data)
            reply = request.reply()
            reply.add_answer(*dnslib.RR.fromZone(f"{request.q.qname} 60 A 192.0.2.53"))
            self.transport.sendto(reply.pack(), addr)

    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, _ = await endpoints.make(NameServer(), local_addr=(HOST, 0))
        async with peer_process("resolve", transport.get_extra_info("sockname")[1], "example.org") as process:
            assert await process.line() == "192.0.2.53"


# -- AnyIO's sockets ----------------------------------------------------------------------------------------


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
