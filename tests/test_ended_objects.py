"""AnyIO objects that have ended before they get a protocol: reset by the peer, or closed by their owner.

The caller cannot know, so it is no error of the call: the protocol gets `connection_made`, what has been received, and
the reason in `connection_lost`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
import trustme
from anyio.abc import ByteStream, SocketAttribute, UNIXSocketStream
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSAttribute, TLSStream
from anyio_streams import MemoryReceiver, MemorySender
from network import needs_signals, needs_unix
from support import GUARD, Peer, Recorder, collect_contexts, listening, turns

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _knows_how_streams_end(anyio_backend: Any) -> None:
    """On uvloop older releases of AnyIO lose how a connection has ended."""
    if anyio_backend[1].get("use_uvloop") and tuple(map(int, version("anyio").split(".")[:2])) < (4, 14):
        pytest.skip("an older AnyIO on uvloop")


@asynccontextmanager
async def accepted() -> AsyncIterator[tuple[ByteStream, Peer]]:
    """Yield a stream of AnyIO's listener, and its peer."""
    streams: list[ByteStream] = []
    arrived = anyio.Event()

    async def handle(stream: ByteStream) -> None:
        streams.append(stream)
        arrived.set()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        with Peer.connect(listener.extra(SocketAttribute.local_address)) as peer:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, handle)
                with anyio.fail_after(GUARD):
                    await arrived.wait()
                tasks.cancel_scope.cancel()
            yield streams[0], peer


async def lost(protocol: Recorder) -> BaseException | None:
    await protocol.wait_for("connection_lost")
    (exc,) = (args[0] for name, *args in protocol.calls if name == "connection_lost")
    return exc  # type: ignore[no-any-return]


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_a1_a_peer_that_has_reset_the_connection(anyio_backend: Any, noticed: bool) -> None:
    async with TransportGroup() as group, accepted() as (stream, peer):
        contexts = collect_contexts(group)
        await peer.send(b"request")
        peer.reset()
        if noticed:
            await turns(10)
        transport, protocol = await group.connect_stream(Recorder, stream)
        assert transport.get_protocol() in (protocol, None)
        assert transport.get_extra_info("no such thing", 7) == 7
        exc = await lost(protocol)
        assert protocol.received == b"request"
        assert isinstance(exc, ConnectionResetError)
        assert protocol.names[0] == "connection_made"
        assert contexts == []


async def test_a1_a_peer_that_has_reset_the_connection_of_an_accepted_socket(stack: Any) -> None:
    """What asyncio does with the socket itself."""
    with listening() as listener:
        peer = Peer.connect(listener.getsockname())
        sock, _ = listener.accept()
        await peer.send(b"request")
        peer.reset()
        async with stack.open() as group:
            _, protocol = await group.connect_accepted_socket(Recorder, sock)
            exc = await lost(protocol)
    assert protocol.received == b"request"
    assert isinstance(exc, ConnectionResetError)


async def test_a1_a_server_of_anyios_outlives_clients_that_reset(anyio_backend: Any) -> None:
    protocols: list[Recorder] = []
    async with TransportGroup() as group:

        async def handle(stream: ByteStream) -> None:
            await turns(5)
            _, protocol = await group.connect_stream(Recorder, stream)
            protocols.append(protocol)

        async with (
            await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(listener.serve, handle)
            address = listener.extra(SocketAttribute.local_address)
            for number in range(20):
                with Peer.connect(address) as peer:
                    await peer.send(b"%d" % number)
                    peer.reset()
            with anyio.fail_after(GUARD):
                while len(protocols) < 20:  # nothing else shows it
                    await anyio.sleep(0.001)
                for protocol in protocols:
                    assert isinstance(await lost(protocol), ConnectionResetError)
            tasks.cancel_scope.cancel()
    assert {bytes(protocol.received) for protocol in protocols} == {b"%d" % number for number in range(20)}


@needs_unix
async def test_a1_a_peer_that_has_closed_a_unix_connection(anyio_backend: Any) -> None:
    ours, theirs = socket.socketpair()
    async with TransportGroup() as group:
        stream = await UNIXSocketStream.from_socket(ours)
        theirs.send(b"request")
        await stream.send(b"never read")
        theirs.close()  # Unread data turns the close into a reset.
        await turns(10)
        _, protocol = await group.connect_stream(Recorder, stream)
        assert isinstance(await lost(protocol), ConnectionResetError)
        assert protocol.received == b"request"


@asynccontextmanager
async def tls_over_tcp(authority: trustme.CA) -> AsyncIterator[tuple[TLSStream, TLSStream]]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    made: list[TLSStream] = []

    async def handshake(sock: socket.socket, **options: Any) -> None:
        plain = await anyio.abc.SocketStream.from_socket(sock)
        made.append(await TLSStream.wrap(plain, **options))

    with listening() as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: handshake(ours, hostname="localhost", ssl_context=client))
        tasks.start_soon(lambda: handshake(theirs, server_side=True, ssl_context=server))
    a, b = sorted(made, key=lambda each: each.extra(TLSAttribute.server_side))
    try:
        yield a, b
    finally:
        for stream in made:
            with contextlib.suppress(anyio.ClosedResourceError):  # AnyIO before 4.11, for one that the test has closed.
                await anyio.aclose_forcefully(stream)


async def test_a1_a_peer_that_has_reset_a_tls_connection(anyio_backend: Any, certificate_authority: Any) -> None:
    async with TransportGroup() as group, tls_over_tcp(certificate_authority) as (ours, theirs):
        raw = theirs.extra(SocketAttribute.raw_socket)
        # Otherwise the reset would overtake the data that Nagle's algorithm holds back.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await theirs.send(b"request")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await anyio.aclose_forcefully(theirs)
        await turns(10)
        transport, protocol = await group.connect_stream(Recorder, ours)
        assert not transport.can_write_eof()
        assert isinstance(await lost(protocol), (ConnectionResetError, ssl.SSLEOFError))  # Older AnyIO
        assert protocol.received == b"request"


@pytest.mark.parametrize("server_side", [True, False], ids=["server", "client"])
async def test_a1_a_handshake_after_the_peer_has_gone(
    anyio_backend: Any, server_side: bool, certificate_authority: trustme.CA
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    if server_side:
        certificate_authority.issue_cert("localhost").configure_cert(context)
    name = None if server_side else "localhost"
    async with TransportGroup() as group, accepted() as (stream, peer):
        peer.reset()
        await turns(10)
        with pytest.raises(ConnectionResetError):
            await group.connect_stream(Recorder, stream, ssl=context, server_side=server_side, server_hostname=name)


def memory_stream() -> StapledByteStream:
    sender, receiver = anyio.create_memory_object_stream[bytes](1)
    return StapledByteStream(MemorySender(sender), MemoryReceiver(receiver))


@pytest.mark.parametrize(
    "kind", ["tcp", pytest.param("unix", marks=needs_unix), "tls", "memory", "receiving", "sending"]
)
async def test_a1_a_closed_stream(anyio_backend: Any, kind: str, certificate_authority: trustme.CA) -> None:
    async with TransportGroup() as group:
        stream: Any
        if kind == "tcp":
            async with accepted() as (stream, _):
                await stream.aclose()
        elif kind == "unix":
            ours, theirs = socket.socketpair()
            stream = await UNIXSocketStream.from_socket(ours)
            theirs.close()
            await stream.aclose()
        elif kind == "tls":
            async with tls_over_tcp(certificate_authority) as (stream, _):
                await anyio.aclose_forcefully(stream)
        else:
            stapled = memory_stream()
            stream = {"receiving": stapled.receive_stream, "sending": stapled.send_stream}.get(kind, stapled)
            await stapled.aclose()
        await turns(10)
        transport, protocol = await group.connect_stream(Recorder, stream)
        if kind == "sending":
            transport.write(b"data")  # It cannot be noticed before.
        # To AnyIO's TLS stream its own close looks like the peer's.
        # Newer releases of AnyIO call their TLS streams broken, older ones closed.
        either = (ConnectionResetError, ConnectionAbortedError)
        assert isinstance(await lost(protocol), either if kind == "tls" else ConnectionAbortedError)
        assert protocol.names[0] == "connection_made"
        assert protocol.received == b""


class Datagrams(Recorder, asyncio.DatagramProtocol):
    """A recorder of datagrams; only its end matters here."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.data_received(data)

    def error_received(self, exc: Exception) -> None:
        raise AssertionError(exc)


@pytest.mark.parametrize(
    "kind", ["UDP", "connected UDP", *(pytest.param(kind, marks=needs_unix) for kind in ("UNIX", "connected UNIX"))]
)
async def test_a1_a_closed_datagram_socket(anyio_backend: Any, kind: str, tmp_path: Path) -> None:
    async with TransportGroup() as group:
        sock: Any
        if kind == "UDP":
            sock = await anyio.create_udp_socket(local_host="127.0.0.1")
        elif kind == "connected UDP":
            sock = await anyio.create_connected_udp_socket("127.0.0.1", 9)
        elif kind == "UNIX":
            sock = await anyio.create_unix_datagram_socket(local_path=tmp_path / "ours")
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
                peer.bind(str(tmp_path / "theirs"))
                sock = await anyio.create_connected_unix_datagram_socket(tmp_path / "theirs")
        await sock.aclose()
        await turns(10)
        transport, protocol = await group.connect_datagram_socket(Datagrams, sock)
        assert transport.get_extra_info("peername") is None
        assert isinstance(await lost(protocol), ConnectionAbortedError)
        assert protocol.names[0] == "connection_made"


@needs_unix
async def test_a1_a_datagram_socket_whose_peer_has_gone(anyio_backend: Any, tmp_path: Path) -> None:
    """The system has taken its peer's address away, so AnyIO does not know it either."""
    async with TransportGroup() as group:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.bind(str(tmp_path / "theirs"))
            sock = await anyio.create_connected_unix_datagram_socket(tmp_path / "theirs", local_path=tmp_path / "ours")
        with pytest.raises(anyio.BrokenResourceError):
            await sock.send(b"to nobody")
        protocol = Datagrams()
        transport, _ = await group.connect_datagram_socket(lambda: protocol, sock)
        assert transport.get_extra_info("peername") is None
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as another:
            another.sendto(b"request", str(tmp_path / "ours"))
        await protocol.wait_received(7)
        transport.close()
        assert await lost(protocol) is None


class Child(asyncio.SubprocessProtocol):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.output = b""
        self.finished = anyio.Event()

    def connection_made(self, transport: Any) -> None:
        self.calls.append(("connection_made",))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output += data

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append(("pipe_connection_lost", fd))

    def process_exited(self) -> None:
        self.calls.append(("process_exited",))

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("connection_lost", exc))
        self.finished.set()


@needs_signals
@pytest.mark.parametrize("how", ["ended", "waited for", "closed", "killed and closed", "a pipe closed"])
async def test_a1_an_ended_process(anyio_backend: Any, how: str) -> None:
    # Writing to a pipe without a reader would end it by a signal. A child of the shell's own would survive the shell.
    program = {"killed and closed": "exec sleep 1000", "closed": "exit 3", "a pipe closed": "exit 3"}.get(
        how, "echo output; exit 3"
    )
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        process = await anyio.open_process(["sh", "-c", program])
        if how in ("ended", "waited for"):
            with contextlib.suppress(ChildProcessError):  # The backend may have reaped it.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222  # it ends by itself
        if how == "waited for":
            await turns(10)
        elif how == "closed":
            await process.aclose()
        elif how == "killed and closed":
            await anyio.aclose_forcefully(process)
        elif how == "a pipe closed":
            await process.stdout.aclose()  # type: ignore[union-attr]
        transport, child = await group.connect_process(Child, process)
        with anyio.fail_after(GUARD):
            await child.finished.wait()
        assert child.calls[0] == ("connection_made",)
        assert child.calls[-1] == ("connection_lost", None)
        assert sorted(fd for name, fd in (c for c in child.calls if c[0] == "pipe_connection_lost")) == [0, 1, 2]
        assert child.calls.count(("process_exited",)) == 1
        if "closed" not in how:
            assert child.output == b"output\n"
        assert transport.get_returncode() == (-signal.SIGKILL if how == "killed and closed" else 3)
        # As for any pipe that cannot be read.
        assert {context["message"] for context in contexts} == (
            {"Fatal read error on pipe transport"} if "closed" in how else set()
        )
