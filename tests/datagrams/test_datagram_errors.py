"""Datagram endpoints: errors of the system and of callbacks, and invalid addresses, which end no endpoint."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from datagram_helpers import Endpoint, Endpoints, clogged_unix_peer, receive, udp_peer
from network import needs_unix
from support import GUARD, HOST, Stack, collect_contexts, leaves, open_descriptors, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


# -- errors of the system -----------------------------------------------------------------------------------


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


# -- exceptions in callbacks --------------------------------------------------------------------------------


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


# -- every kind of endpoint ---------------------------------------------------------------------------------


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
