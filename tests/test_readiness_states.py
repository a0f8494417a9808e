"""States in which the system keeps reporting readiness: none of them may keep a processor busy.

Counted, not measured: how often the selector reported something while there was nothing to do.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
from datagram_helpers import Endpoint, receive, udp_peer
from network import bound
from support import HOST, BufferedRecorder, Peer, Recorder, Stack, collect_contexts, connected, fill, turns, until
from tls_support import Certificates, tls_client

from transports_anyio import TransportGroup, _selector
from transports_anyio._channels._socket import take_error_queue

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="states that Linux has")]

#: <linux/in.h>, <linux/in6.h> and <linux/net_tstamp.h>.
IP_RECVERR = 11
IPV6_RECVERR = 25
SO_TIMESTAMPING = 37
SENT_BY_SOFTWARE = (1 << 1) | (1 << 4)

#: The number of reports allowed within `IDLE` seconds: each pause is twice as long as the one before it, so six fill
#: this time. A spinning loop has thousands of reports.
IDLE = 0.1
MOST = 12


@contextmanager
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield the numbers of file descriptors that the selector has reported, without zeros."""
    counts: list[int] = []
    original = _selector.EpollSelector.dispatch

    def dispatch(self: _selector.EpollSelector, failed: _selector.Failed) -> int:
        count = original(self, failed)
        if count:
            counts.append(count)
        return count

    with monkeypatch.context() as patch:
        patch.setattr(_selector.EpollSelector, "dispatch", dispatch)
        yield counts


async def clogged(transport: Any) -> None:
    fill(transport, 1 << 17)
    await turns()
    while transport.get_write_buffer_size() < 1 << 17:
        fill(transport, 1 << 17)
        await turns()


# -- states of streams, each an endless one -----------------------------------------------------------------


@asynccontextmanager
async def paused_and_half_closed(group: TransportGroup) -> AsyncIterator[None]:
    async with connected(group) as (transport, _, peer):
        transport.pause_reading()
        peer.shutdown()
        yield
        transport.abort()


@asynccontextmanager
async def paused_and_reset(group: TransportGroup) -> AsyncIterator[None]:
    async with connected(group) as (transport, _, peer):
        transport.pause_reading()
        peer.reset()
        yield
        transport.abort()


@asynccontextmanager
async def paused_and_clogged_and_half_closed(group: TransportGroup) -> AsyncIterator[None]:
    async with connected(group, small=True) as (transport, _, peer):
        transport.pause_reading()
        await clogged(transport)
        peer.shutdown()
        yield
        transport.abort()


@asynccontextmanager
async def kept_open_after_the_end(group: TransportGroup) -> AsyncIterator[None]:
    protocol = Recorder(on_eof_received=lambda p: True)
    async with connected(group, protocol) as (transport, _, peer):
        peer.shutdown()
        await protocol.wait_for("eof_received")
        yield
        transport.abort()


@asynccontextmanager
async def ended_in_both_directions(group: TransportGroup) -> AsyncIterator[None]:
    protocol = BufferedRecorder(on_eof_received=lambda p: True)
    async with connected(group, protocol) as (transport, _, peer):
        transport.pause_reading()
        transport.write_eof()
        peer.shutdown()
        assert await peer.receive() == b""
        yield
        transport.abort()


@asynccontextmanager
async def closing_and_clogged_and_half_closed(group: TransportGroup) -> AsyncIterator[None]:
    async with connected(group, small=True) as (transport, _, peer):
        await clogged(transport)
        transport.close()
        peer.shutdown()
        yield
        transport.abort()


@asynccontextmanager
async def urgent_byte_of_a_unix_socket(group: TransportGroup) -> AsyncIterator[None]:
    ours, theirs = socket.socketpair()
    with theirs:
        await group.create_unix_connection(Recorder, sock=ours)
        try:
            theirs.send(b"!", socket.MSG_OOB)
        except OSError as exc:
            pytest.skip(f"this kernel has no urgent bytes of UNIX sockets: {exc}")
        yield


@asynccontextmanager
async def client_of_a_server_that_does_not_serve(group: TransportGroup) -> AsyncIterator[None]:
    with bound(backlog=1) as listener:
        server = await group.create_server(Recorder, sock=listener, start_serving=False)
        with Peer.connect(server.sockets[0].getsockname()):
            yield


@asynccontextmanager
async def listener_that_is_shut_down(group: TransportGroup) -> AsyncIterator[None]:
    group.set_exception_handler(lambda *_: None)
    server = await group.create_server(Recorder, HOST, 0)
    server.sockets[0].shutdown(socket.SHUT_RDWR)
    await turns()
    yield
    server.close()


@asynccontextmanager
async def paused_pipe_without_a_writer(group: TransportGroup) -> AsyncIterator[None]:
    reader, writer = os.pipe()
    transport: Any
    transport, _ = await group.connect_read_pipe(Recorder, open(reader, "rb", 0))
    transport.pause_reading()
    os.close(writer)
    yield
    transport.close()


@asynccontextmanager
async def writing_pipe_with_input(group: TransportGroup) -> AsyncIterator[None]:
    ours, theirs = socket.socketpair()
    with theirs:
        transport, _ = await group.connect_write_pipe(Recorder, ours)
        theirs.send(b"unwanted")
        yield
        transport.close()


@asynccontextmanager
async def clogged_pipe_whose_reader_goes(group: TransportGroup) -> AsyncIterator[None]:
    reader, writer = os.pipe()
    protocol = Recorder()
    transport, _ = await group.connect_write_pipe(lambda: protocol, open(writer, "wb", 0))
    await clogged(transport)
    os.close(reader)
    await protocol.wait_for("connection_lost")
    yield


STREAMS: list[Callable[..., Any]] = [
    paused_and_half_closed,
    paused_and_reset,
    paused_and_clogged_and_half_closed,
    kept_open_after_the_end,
    ended_in_both_directions,
    closing_and_clogged_and_half_closed,
    urgent_byte_of_a_unix_socket,
    client_of_a_server_that_does_not_serve,
    listener_that_is_shut_down,
    paused_pipe_without_a_writer,
    writing_pipe_with_input,
    clogged_pipe_whose_reader_goes,
]


# -- states of datagram endpoints -----------------------------------------------------------------------------


@asynccontextmanager
async def udp_that_is_shut_down(group: TransportGroup) -> AsyncIterator[None]:
    with udp_peer() as peer:
        transport, _ = await group.create_datagram_endpoint(Endpoint, remote_addr=peer.getsockname())
        transport.get_extra_info("socket").shutdown(socket.SHUT_RD)
        yield
        transport.sendto(b"still sent")
        assert (await receive(peer))[0] == b"still sent"


@asynccontextmanager
async def unix_pair_that_is_shut_down(group: TransportGroup) -> AsyncIterator[None]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setblocking(False)
    with theirs:
        transport, _ = await group.create_datagram_endpoint(Endpoint, sock=ours)
        ours.shutdown(socket.SHUT_RD)
        yield
        transport.sendto(b"still sent")
        assert (await receive(theirs))[0] == b"still sent"


@asynccontextmanager
async def unix_peer_that_is_gone(group: TransportGroup) -> AsyncIterator[None]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    transport, _ = await group.create_datagram_endpoint(Endpoint, sock=ours)
    theirs.close()
    transport.sendto(b"to nobody")
    yield


@asynccontextmanager
async def full_receiver(group: TransportGroup) -> AsyncIterator[None]:
    async with full(group, "socket") as (transport, protocol, peer, sent):
        yield
        assert [(await receive(peer))[0] for _ in sent] == sent
        await until(lambda: transport.get_write_buffer_size() == 0)
        assert protocol.errors == []


@asynccontextmanager
async def full_receiver_of_a_closing_endpoint(group: TransportGroup) -> AsyncIterator[None]:
    async with full(group, "socket") as (transport, protocol, peer, sent):
        transport.close()
        yield
        assert protocol.lost == []
        assert [(await receive(peer))[0] for _ in sent] == sent
        await until(lambda: protocol.lost == [None])


@asynccontextmanager
async def full_receiver_of_an_aborted_endpoint(group: TransportGroup) -> AsyncIterator[None]:
    async with full(group, "socket") as (transport, protocol, _, _):
        await turns()
        transport.abort()
        yield
        assert protocol.lost == [None]


@asynccontextmanager
async def full_netlink_receiver(group: TransportGroup) -> AsyncIterator[None]:
    message = struct.pack("=IHHII", 1016, 16, 1, 0, 0) + bytes(1000)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 2) as peer:
        peer.bind((0, 0))
        peer.setblocking(False)
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 2)
        sock.bind((0, 0))
        transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=sock)
        count = 0
        while transport.get_write_buffer_size() == 0:  # type: ignore[attr-defined]
            transport.sendto(message, peer.getsockname())
            count += 1
        yield
        for _ in range(count):
            assert (await receive(peer))[0] == message
        await until(lambda: transport.get_write_buffer_size() == 0)  # type: ignore[attr-defined]
        assert protocol.errors == []


@asynccontextmanager
async def full(group: TransportGroup, kind: str) -> AsyncIterator[tuple[Any, Endpoint, socket.socket, list[bytes]]]:
    """An unconnected endpoint with more datagrams than the receiver's queue holds."""
    protocol = Endpoint()
    transport: Any
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(f"\0full {os.getpid()} {id(peer)}")
        peer.setblocking(False)
        if kind == "socket":
            transport, _ = await group.create_datagram_endpoint(lambda: protocol, family=socket.AF_UNIX)
        else:
            transport, _ = await group.connect_datagram_socket(
                lambda: protocol, await anyio.create_unix_datagram_socket()
            )
        sent = [struct.pack("<I", number) for number in range(600)]
        for data in sent:
            transport.sendto(data, peer.getsockname())
        yield transport, protocol, peer, sent


DATAGRAMS: list[Callable[..., Any]] = [
    udp_that_is_shut_down,
    unix_pair_that_is_shut_down,
    unix_peer_that_is_gone,
    full_receiver,
    full_receiver_of_a_closing_endpoint,
    full_receiver_of_an_aborted_endpoint,
    full_netlink_receiver,
]


@pytest.mark.differs(
    "a socket that is reported as ready when nothing can be received or sent",
    asyncio="tried again in every iteration",
    here="tried again after 1 to 50 milliseconds",
    why="it would keep a processor busy",
)
@pytest.mark.parametrize("state", [*STREAMS, *DATAGRAMS], ids=lambda state: state.__name__)
async def test_d10_no_state_makes_the_selector_spin(
    anyio_backend: Any, state: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with reports(monkeypatch) as counts:
        async with TransportGroup() as group, state(group):
            await turns()
            counts.clear()
            await anyio.sleep(IDLE)
            assert len(counts) <= MOST


async def test_d10_a_full_receiver_of_an_anyio_socket(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnyIO's own method would retry in a loop."""
    calls: list[int] = []
    original = socket.socket.sendto

    def sendto(sock: socket.socket, *args: Any) -> int:
        calls.append(1)
        return original(sock, *args)

    async with TransportGroup() as group:
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "sendto", sendto)
            async with full(group, "AnyIO socket") as (transport, protocol, peer, sent):
                await until(lambda: len(calls) > 10)
                calls.clear()
                await anyio.sleep(IDLE)
                assert len(calls) <= MOST
                assert [(await receive(peer))[0] for _ in sent] == sent
                await until(lambda: transport.get_write_buffer_size() == 0)
                assert protocol.errors == []


async def test_a_receiver_with_space_again_gets_the_rest_at_once(anyio_backend: Any) -> None:
    """Once something has been sent, the pauses start again with the shortest: everything takes far less than a
    second."""
    async with TransportGroup() as group, full(group, "socket") as (_, _, peer, sent):
        await anyio.sleep(IDLE)
        with anyio.fail_after(5):  # 60 of the longest pauses would take three seconds, at ten datagrams each.
            received = [(await receive(peer))[0] for _ in sent]
        assert received == sent


# -- the error queue --------------------------------------------------------------------------------------------


@pytest.mark.differs(
    "the error queue of a socket (`IP_RECVERR`, `SO_TIMESTAMPING`)",
    asyncio="never read, so it is reported in every iteration; one error of many is passed on",
    here="emptied: each network error is passed on, notifications are dropped",
    why="the queue shares its memory with received data",
)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("is_connected", [False, True])
async def test_d11_network_errors_in_the_queue_of_a_socket(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, family: int, is_connected: bool
) -> None:
    """`IP_RECVERR`: each error is passed on once, and then there are no more reports."""
    host = HOST if family == socket.AF_INET else "::1"
    with udp_peer(family, host) as peer:
        nobody = peer.getsockname()
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    sock.bind((host, 0))
    if is_connected:
        sock.connect(nobody)
    with reports(monkeypatch) as counts, udp_peer(family, host) as peer:
        async with TransportGroup() as group:
            transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=sock)
            transport.sendto(b"one", nobody)
            await until(lambda: protocol.errors)
            await anyio.sleep(IDLE)
            assert [type(error) for error in protocol.errors] == [ConnectionRefusedError]
            counts.clear()
            await anyio.sleep(IDLE)
            assert counts == []
            # The second call meets the error of the first one, and sends nothing.
            transport.sendto(b"two", nobody)
            transport.sendto(b"refused", nobody)
            await anyio.sleep(IDLE)
            assert [type(error) for error in protocol.errors] == [ConnectionRefusedError] * 2
            assert take_error_queue(sock) is None
            if not is_connected:
                transport.sendto(b"alive", peer.getsockname())
                assert (await receive(peer))[0] == b"alive"
                peer.sendto(b"answer", sock.getsockname())
                await until(lambda: protocol.data == [b"answer"])
            counts.clear()
            await anyio.sleep(IDLE)
            assert counts == []
            assert protocol.lost == []


async def test_d11_errors_of_many_peers_at_a_time(anyio_backend: Any) -> None:
    """The system raises one of them, and has the others in the queue."""
    peers = [f"127.0.0.{number}" for number in range(1, 6)]
    with udp_peer() as peer:
        port = peer.getsockname()[1]
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sock.bind(("0.0.0.0", 0))
    async with TransportGroup() as group:
        transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=sock)
        for host in peers:
            sock.sendto(b"x", (host, port))  # Refused at once; the next call would raise it.
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        await until(lambda: len(protocol.errors) == len(peers))
        assert {type(error) for error in protocol.errors} == {ConnectionRefusedError}
        await turns()
        assert len(protocol.errors) == len(peers)
        transport.abort()


async def test_aborting_while_the_error_queue_is_read(anyio_backend: Any) -> None:
    class Ending(Endpoint):
        def error_received(self, exc: Exception) -> None:
            super().error_received(exc)
            self.transport.abort()

    with udp_peer() as peer:
        address = peer.getsockname()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sock.bind((HOST, 0))
    for _ in range(3):
        sock.sendto(b"x", address)
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    async with TransportGroup() as group:
        _, protocol = await group.create_datagram_endpoint(Ending, sock=sock)
        await until(lambda: protocol.lost)
        assert len(protocol.errors) == 1
        assert protocol.lost == [None]


@pytest.mark.parametrize("is_closing", [False, True])
async def test_d11_an_error_of_the_network_while_datagrams_wait(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, is_closing: bool
) -> None:
    """An error condition is also reported to a socket that only waits to write."""

    class Blocked(socket.socket):
        is_blocked = False

        def sendto(self, *args: Any) -> int:
            if self.is_blocked:
                raise BlockingIOError
            return super().sendto(*args)

    with udp_peer() as peer:
        nobody = peer.getsockname()
    sock = Blocked(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    sock.bind((HOST, 0))
    with reports(monkeypatch) as counts, udp_peer() as peer:
        async with TransportGroup() as group:
            transport, protocol = await group.create_datagram_endpoint(Endpoint, sock=sock)
            sock.is_blocked = True
            transport.sendto(b"waits", peer.getsockname())
            socket.socket.sendto(sock, b"x", nobody)
            if is_closing:
                transport.close()
            await until(lambda: protocol.errors)
            counts.clear()
            await anyio.sleep(IDLE)
            assert len(counts) <= MOST
            assert [type(error) for error in protocol.errors] == [ConnectionRefusedError]
            sock.is_blocked = False
            assert (await receive(peer))[0] == b"waits"


@pytest.mark.differs("the error queue of a socket (`IP_RECVERR`, `SO_TIMESTAMPING`)")
@pytest.mark.parametrize("kind", ["tcp", "tls", "buffered", "udp"])
async def test_d11_notifications_in_the_queue_of_a_socket(
    anyio_backend: Any, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """`SO_TIMESTAMPING`: no call but `recvmsg` with `MSG_ERRQUEUE` takes them."""
    with reports(monkeypatch) as counts:
        async with AsyncExitStack() as stack:
            group = await stack.enter_async_context(TransportGroup())
            contexts = collect_contexts(group)
            transport: Any
            if kind == "udp":
                peer = stack.enter_context(udp_peer())
                transport, _ = await group.create_datagram_endpoint(Endpoint, remote_addr=peer.getsockname())
            elif kind == "tls":
                transport, _, _ = await stack.enter_async_context(tls_client(group, certificates))
            else:
                protocol = BufferedRecorder() if kind == "buffered" else Recorder()
                transport, _, _ = await stack.enter_async_context(connected(group, protocol))
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, SENT_BY_SOFTWARE)
            for _ in range(3):
                getattr(transport, "sendto" if kind == "udp" else "write")(b"stamped")
                await turns()
            await anyio.sleep(IDLE)
            counts.clear()
            await anyio.sleep(IDLE)
            assert len(counts) <= MOST
            with transport.get_extra_info("socket").dup() as copy:
                assert take_error_queue(copy) is None
            assert not transport.is_closing()
            assert contexts == []
            transport.abort()


@pytest.mark.parametrize("paused", [False, True])
async def test_d11_notifications_for_a_connection_that_waits_to_write(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    with reports(monkeypatch) as counts:
        async with TransportGroup() as group, connected(group, small=True) as (transport, _, peer):
            if paused:
                transport.pause_reading()
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, SENT_BY_SOFTWARE)
            await clogged(transport)
            await anyio.sleep(IDLE)
            counts.clear()
            await anyio.sleep(IDLE)
            assert len(counts) <= MOST
            transport.close()
            await peer.receive_all()


@pytest.mark.parametrize("direction", ["read", "write", "both"])
async def test_d11_notifications_for_a_socket_used_as_a_pipe(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    with reports(monkeypatch) as counts, bound(backlog=1) as listener:
        sock = socket.create_connection(listener.getsockname())
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, SENT_BY_SOFTWARE)
        with Peer(listener.accept()[0]) as peer:
            async with TransportGroup() as group:
                protocols = {name: Recorder() for name in ("read", "write") if direction in (name, "both")}
                for name, protocol in protocols.items():
                    await getattr(group, f"connect_{name}_pipe")(lambda protocol=protocol: protocol, sock)
                for _ in range(3):
                    if "write" in protocols:
                        protocols["write"].transport.write(b"stamped")
                    else:
                        sock.send(b"stamped")
                    await turns()
                assert await peer.receive_exactly(21) == b"stamped" * 3
                await anyio.sleep(IDLE)
                counts.clear()
                await anyio.sleep(IDLE)
                assert len(counts) <= MOST
                for protocol in protocols.values():
                    assert protocol.names == ["connection_made"]
                if "read" in protocols:
                    await peer.send(b"hello")
                    await protocols["read"].wait_received(5)
                peer.close()
                for protocol in protocols.values():
                    await protocol.wait_for("connection_lost")


async def test_an_error_of_a_connection_is_not_lost_with_the_queue(stack: Stack) -> None:
    """A reset and a notification at a time."""
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, SENT_BY_SOFTWARE)
        transport.write(b"stamped")
        peer.reset()
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionResetError)
