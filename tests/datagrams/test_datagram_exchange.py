"""Datagram endpoints: addresses, and exchanging datagrams over UDP and UNIX sockets."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from datagram_helpers import Endpoint, Endpoints, clogged_unix_peer, receive, udp_peer
from network import a_link_local_address, names, needs_ipv6, needs_unix
from support import HOST, Stack, open_descriptors, peer_process, until

from transports_anyio import current_group

pytestmark = pytest.mark.anyio


# -- UDP ----------------------------------------------------------------------------------------------------


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


# -- broadcast and multicast --------------------------------------------------------------------------------


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
