"""TLS on sockets: clients, servers, the end of a connection, and what goes wrong."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import hashlib
import hmac
import socket
import ssl
import struct
import sys
import threading
from contextlib import AsyncExitStack, contextmanager
from contextvars import ContextVar
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from network import names
from support import (
    GUARD,
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    connected,
    fill,
    listening,
    open_descriptors,
    pattern,
    turns,
    until,
)
from tls_support import (
    DROPPED,
    NAME,
    VERSIONS,
    Certificates,
    TLSPeer,
    ViewRecorder,
    echo,
    serve,
    tls_client,
    tls_peer_process,
    together,
)

from transports_anyio import TransportGroup, current_group

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable")


@pytest.fixture(scope="session")
def certificates(certificate_authority: trustme.CA) -> Certificates:
    return Certificates(certificate_authority)


@pytest.fixture(params=list(VERSIONS))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[Recorder, ViewRecorder], ids=["protocol", "buffered"])
def recorder(request: pytest.FixtureRequest) -> type[Any]:
    kind: type[Any] = request.param
    return kind


def legal(stack: Stack, recorder: type[Any]) -> None:
    if stack.is_oracle and recorder is not Recorder:
        pytest.skip("asyncio's TLS calls get_buffer() after eof_received(), and buffer_updated() from inside close()")


def peers_contexts(contexts: list[dict[str, Any]]) -> list[BaseException]:
    return [context["exception"] for context in contexts]


# -- exchange ---------------------------------------------------------------------------------------------


async def test_client_and_server(stack: Stack, certificates: Certificates, version: str, recorder: type[Any]) -> None:
    legal(stack, recorder)
    hook = "on_data_received" if recorder is Recorder else "on_buffer_updated"

    def back(protocol: Any, data: Any) -> None:
        protocol.transport.write(data if recorder is Recorder else bytes(protocol.buffer[:data]))

    data = pattern(700_000)
    async with stack.open() as group:
        serving = await serve(group, certificates.server(version=version), lambda: recorder(**{hook: back}))
        client = recorder()
        transport, made = await group.create_connection(
            lambda: client, *serving.address, ssl=certificates.client(), server_hostname=NAME
        )
        assert made is client
        assert client.names[0] == "connection_made"
        transport.write(data)
        assert await client.wait_received(len(data)) == data
        transport.close()
        await client.wait_for("connection_lost")
        await serving.protocols[0].wait_for("connection_lost")
        assert client.lost_with is None
        assert serving.protocols[0].lost_with is None
        serving.server.close()
    assert serving.protocols[0].names[-2:] == ["eof_received", "connection_lost"]
    assert client.names[-2:] == ["eof_received", "connection_lost"]


async def test_data_that_comes_with_the_handshake_is_delivered(stack: Stack, certificates: Certificates) -> None:
    # The client's first data travels in one segment with the last message of its handshake.
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
        with Peer.connect(serving.address) as peer:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await peer.send(outgoing.read())
                    incoming.write(await peer.receive())
            tls.write(b"first")
            await peer.send(outgoing.read())
            protocol = await serving.protocol()
            assert await protocol.wait_received(5) == b"first"
        await protocol.wait_for("connection_lost")
        serving.server.close()


async def test_t5_server_that_speaks_first(stack: Stack, certificates: Certificates, version: str) -> None:
    greeting = pattern(50_000)
    async with stack.open() as group:
        serving = await serve(
            group,
            certificates.server(version=version),
            lambda: Recorder(on_connection_made=lambda protocol, transport: transport.write(greeting)),
        )
        client = Recorder()
        await group.create_connection(lambda: client, *serving.address, ssl=certificates.client(), server_hostname=NAME)
        assert await client.wait_received(len(greeting)) == greeting
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()


RECORD = 16384


@pytest.mark.parametrize("buffer_size", [None, 1000, RECORD, 65536], ids=str)
async def test_t11_all_that_is_decrypted_is_delivered(
    stack: Stack, certificates: Certificates, version: str, buffer_size: int | None
) -> None:
    # Sizes at the end of a record, of a read and of the protocol's buffer: nothing may wait for more to come.
    sizes = [1, RECORD - 1, RECORD, RECORD + 1, 4 * RECORD, 131072 - 1, 131072, 131072 + 1, 262144, 262144 + 1]
    protocol = Recorder() if buffer_size is None else ViewRecorder(buffer_size)
    async with stack.open() as group, tls_client(group, certificates, protocol, version=version) as (*_, peer):
        expected = b""
        for size in sizes:
            data = pattern(size)
            expected += data
            await peer.send(data)
            assert await protocol.wait_received(len(expected)) == expected
        protocol.transport.close()
        peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio reads into a copy of a slice and loses the bytes")
async def test_t14_buffer_that_is_a_bytearray(stack: Stack, certificates: Certificates) -> None:
    data = pattern(300_000)
    protocol = BufferedRecorder(1000)
    async with stack.open() as group, tls_client(group, certificates, protocol) as (transport, _, peer):
        await peer.send(data)
        assert await protocol.wait_received(len(data)) == data
        protocol.buffer.extend(b"the caller may resize its buffer between callbacks")
        transport.abort()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio takes items for bytes, and loses some")
@pytest.mark.parametrize("shape", ["items", "rows"])
@pytest.mark.parametrize("size", [1000, RECORD, 65536])
async def test_a_buffer_whose_items_are_not_bytes(
    stack: Stack, certificates: Certificates, shape: str, size: int
) -> None:
    memory = bytearray(size)
    view = memoryview(memory).cast("I") if shape == "items" else memoryview(memory).cast("B", shape=[size // 8, 8])
    received = bytearray()
    protocol = BufferedRecorder(
        on_get_buffer=lambda *_: view, on_buffer_updated=lambda _, count: received.extend(memory[:count])
    )
    async with stack.open() as group, tls_client(group, certificates, protocol) as (transport, _, peer):
        expected = b""
        for lengths in ((1, 2, 3), (1, RECORD), (size // 8, 1, size // 4), (size, 1), (3 * size, 7, 5)):
            # All of it arrives together, so that one call finds many records and goes on after the first.
            transport.pause_reading()
            for length in lengths:
                expected += (data := pattern(length))
                await peer.send(data)
            transport.resume_reading()
            await protocol.wait_until(lambda: len(received) >= len(expected))  # noqa: B023  # awaited at once
            assert received == expected
        transport.abort()
        await protocol.wait_for("connection_lost")


async def test_paused_reading(stack: Stack, certificates: Certificates, recorder: type[Any]) -> None:
    legal(stack, recorder)
    data = pattern(500_000)

    def pause_once(protocol: Any, _: Any) -> None:
        if protocol.count(name) == 1:
            protocol.transport.pause_reading()

    name = "data_received" if recorder is Recorder else "buffer_updated"
    protocol = recorder(**{f"on_{name}": pause_once})
    async with stack.open() as group, tls_client(group, certificates, protocol) as (transport, _, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer.send, data)
            await protocol.wait_for(name)
            assert not transport.is_reading()
            await turns()
            assert protocol.count(name) == 1
            transport.resume_reading()
            assert protocol.count(name) == 1, "no callback before resume_reading() returns"
            assert await protocol.wait_received(len(data)) == data
        peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")


async def test_writes_that_do_not_fit(stack: Stack, certificates: Certificates, version: str) -> None:
    # Single bytes, blocks, views and lists, to a peer that reads late.
    chunks: list[Any] = [b"x" * n for n in (1, 1, 2, 16384, 100_000, 3)] * 20
    expected = b"".join(chunks)
    async with stack.open() as group:
        async with tls_client(group, certificates, version=version, small=True) as (transport, protocol, peer):
            for index, chunk in enumerate(chunks):
                if index % 3 == 0:
                    transport.write(bytearray(chunk))
                elif index % 3 == 1:
                    transport.write(memoryview(chunk))
                else:
                    transport.writelines([chunk[:1], b"", chunk[1:]])
            assert transport.get_write_buffer_size() > 0
            transport.close()
            assert await peer.receive_all() == expected
            await peer.say_goodbye()
            await protocol.wait_for("connection_lost")
        assert protocol.lost_with is None


async def test_full_duplex_with_small_buffers(stack: Stack, certificates: Certificates, version: str) -> None:
    size = 3_000_000

    to_send = pattern(size)
    with certificates.files() as files:
        async with stack.open() as group:
            serving = await serve(group, certificates.server())
            # Before there is a connection: a buffer that is made smaller later drops data that the peer was allowed to
            # send, and every packet has to be sent again after 0.2 s.
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                serving.server.sockets[0].setsockopt(socket.SOL_SOCKET, option, 8192)
            async with tls_peer_process("exchange", serving.port, files["ca"], NAME, size, version) as peer:
                protocol = await serving.protocol()
                for start in range(0, size, 10_000):
                    protocol.transport.write(to_send[start : start + 10_000])
                received = await protocol.wait_received(size)
                protocol.transport.close()
                sent, got, count = (await peer.line()).split()
            assert int(count) == size
            assert got == hashlib.sha256(to_send).hexdigest()
            assert sent == hashlib.sha256(received).hexdigest()
            await protocol.wait_for("connection_lost")
            assert protocol.lost_with is None
            serving.server.close()


@pytest.mark.ours_only("asyncio pauses at the high mark already, plain transports above it")
async def test_t12_watermarks_count_as_over_tcp(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        written = fill(transport)
        size = transport.get_write_buffer_size()
        assert protocol.count("pause_writing") <= 1
        transport.set_write_buffer_limits(high=size + 10, low=0)
        paused = protocol.count("pause_writing")
        assert paused == protocol.count("resume_writing")
        transport.write(bytes(10))
        assert transport.get_write_buffer_size() == size + 10
        assert protocol.count("pause_writing") == paused
        transport.write(b"x")
        assert protocol.count("pause_writing") == paused + 1
        assert await peer.receive_exactly(written + 11)
        await protocol.wait_for("resume_writing", paused + 1)
        assert transport.get_write_buffer_size() == 0
        transport.abort()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio counts differently what its two transports hold")
async def test_nothing_is_buffered_once_everything_is_sent(stack: Stack, certificates: Certificates) -> None:
    # With watermarks of zero a protocol knows when the system has taken the last byte, ciphertext included.
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        transport.set_write_buffer_limits(0)
        data = bytes(5_000_000)
        transport.write(data)
        assert protocol.count("pause_writing") == 1
        assert protocol.count("resume_writing") == 0
        assert await peer.receive_exactly(len(data)) == data
        await protocol.wait_for("resume_writing")
        assert protocol.count("resume_writing") == 1
        transport.abort()
        await protocol.wait_for("connection_lost")


async def test_callbacks_run_in_the_context_of_create_server(stack: Stack, certificates: Certificates) -> None:
    variable.set("server")
    seen: list[str] = []
    protocol = Recorder(
        on_connection_made=lambda *_: seen.append(variable.get()),
        on_data_received=lambda *_: seen.append(variable.get()),
    )
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), lambda: protocol)
        variable.set("later")
        with await TLSPeer.connect_to(serving.address, certificates.client()) as peer:
            await peer.send(b"x")
            await protocol.wait_received(1)
            peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")
        serving.server.close()
    assert seen == ["server", "server"]


async def test_sslobject_with_partial_writes(stack: Stack, certificates: Certificates) -> None:
    # The return value of a context's own `sslobject_class` counts, as for any `write`.
    class Partial(ssl.SSLObject):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:10_000])

    data = pattern(300_000)
    context = certificates.client()
    context.sslobject_class = Partial
    async with stack.open() as group, tls_client(group, certificates, ssl=context, small=True) as (transport, _, peer):
        transport.write(data[:50_000])
        transport.write(data[50_000:])
        transport.close()
        assert await peer.receive_all() == data
        await peer.say_goodbye()
        await transport.get_protocol().wait_for("connection_lost")


class KeyUpdates:
    """A client that can update its keys at any time, for which Python has no call.

    Python's own makes the handshake and reads; what is sent after that is encrypted here (RFC 8446, sections 5.2, 7.1
    and 7.2).
    """

    def __init__(self, context: ssl.SSLContext, peer: Peer, directory: Path) -> None:
        self.keys = directory / "keys"
        self.context = context
        context.keylog_filename = str(self.keys)
        self.peer = peer
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=NAME)

    async def handshake(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self.peer.send(self.outgoing.read())
                self.incoming.write(await self.peer.receive())
        await self.peer.send(self.outgoing.read())
        assert self.tls.cipher()[0] == "TLS_AES_256_GCM_SHA384"  # type: ignore[index]
        self.context.keylog_filename = None  # type: ignore[assignment]
        logged = dict(line.split()[::2] for line in self.keys.read_text().splitlines() if not line.startswith("#"))
        self._use(bytes.fromhex(logged["CLIENT_TRAFFIC_SECRET_0"]))

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(self._expand("key", 32))
        self._iv = int.from_bytes(self._expand("iv", 12), "big")
        self._sequence = 0

    def _expand(self, label: str, size: int) -> bytes:
        name = f"tls13 {label}".encode()
        info = struct.pack(f">HB{len(name)}sBB", size, len(name), name, 0, 1)
        return hmac.digest(self._secret, info, "sha384")[:size]

    def record(self, kind: int, content: bytes) -> bytes:
        plaintext = content + bytes([kind])
        header = b"\x17\x03\x03" + struct.pack(">H", len(plaintext) + 16)
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return header + self._cipher.encrypt(nonce, plaintext, header)

    def update(self) -> bytes:
        """Announce a new key, and ask the other end for one of its own."""
        announcement = self.record(22, b"\x18\x00\x00\x01\x01")
        self._use(self._expand("traffic upd", 48))
        return announcement

    async def send_unread(self, data: memoryview) -> memoryview:
        """Send without reading until the buffers are full; return the rest."""
        while data:
            with anyio.move_on_after(0.3):  # A peer that reads does so at once.
                await anyio.wait_writable(self.peer.socket)
                data = data[self.peer.socket.send(data) :]
                continue
            break
        return data

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                data += self.tls.read(size - len(data))
            except ssl.SSLWantReadError:
                received = await self.peer.receive()
                assert received, "end of file"
                self.incoming.write(received)
        return data


@pytest.mark.exhaustive
@pytest.mark.ours_only("asyncio keeps the answers without end")
async def test_answers_to_key_updates_do_not_pile_up(
    stack: Stack, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The smaller limit saves filling the real one and the system's buffers.
    monkeypatch.setattr("transports_anyio._channels._tls_engine.ANSWERS_LIMIT", 4096)

    def answer(protocol: Recorder, _: bytes) -> None:
        protocol.transport.write(b"with the last key")

    async with stack.open() as group:
        serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=answer))
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            serving.server.sockets[0].setsockopt(socket.SOL_SOCKET, option, 8192)
        with Peer.connect(serving.address, receive_buffer=8192) as peer:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            client = KeyUpdates(certificates.client(), peer, tmp_path)
            await client.handshake()
            protocol = await serving.protocol()
            rest = memoryview(b"".join(client.update() for _ in range(10_000)) + client.record(23, b"hello"))
            rest = await client.send_unread(rest)
            assert rest, "everything was taken"
            assert protocol.received == b""
            protocol.transport.write(b"in the midst of them")
            answers, _ = await together(lambda: client.read(37), lambda: peer.send(rest))
            assert answers == b"in the midst of themwith the last key"
            assert protocol.received == b"hello"
        await protocol.wait_for("connection_lost")
        serving.server.close()


@pytest.mark.exhaustive
@pytest.mark.ours_only("asyncio keeps the answers without end")
async def test_answers_to_key_updates_do_not_pile_up_during_the_shutdown(
    stack: Stack, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transports_anyio._channels._tls_engine.ANSWERS_LIMIT", 4096)
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            serving.server.sockets[0].setsockopt(socket.SOL_SOCKET, option, 8192)
        with Peer.connect(serving.address, receive_buffer=8192) as peer:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            client = KeyUpdates(certificates.client(), peer, tmp_path)
            await client.handshake()
            protocol = await serving.protocol()
            protocol.transport.close()
            close_notify = b"\x01\x00"
            rest = memoryview(b"".join(client.update() for _ in range(10_000)) + client.record(21, close_notify))
            rest = await client.send_unread(rest)
            assert rest, "everything was taken"
            await together(peer.receive_all, lambda: peer.send(rest))
        await protocol.wait_for("connection_lost")
        assert protocol.lost_with is None
        serving.server.close()


def test_written_data_never_stops_reading() -> None:
    # Otherwise two ends that both write before they read would wait for each other without end.
    from transports_anyio._channels import _tls_engine

    records = -(-_tls_engine.ENCRYPT_SIZE // RECORD) + 1
    assert records * (RECORD + 256) < _tls_engine.ANSWERS_LIMIT


# -- other ways to a connection ---------------------------------------------------------------------------


async def test_unix_sockets(stack: Stack, certificates: Certificates, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    client, server = Recorder(), Recorder(on_data_received=echo)
    async with stack.open() as group:
        listener = await group.create_unix_server(lambda: server, path, ssl=certificates.server())
        await group.create_unix_connection(lambda: client, path, ssl=certificates.client(), server_hostname=NAME)
        client.transport.write(b"hello")
        assert await client.wait_received(5) == b"hello"
        client.transport.close()
        await client.wait_for("connection_lost")
        await server.wait_for("connection_lost")
        with pytest.raises(ValueError, match="server_hostname"):
            await group.create_unix_connection(lambda: client, path, ssl=certificates.client())
        listener.close()


async def test_socket_accepted_elsewhere(stack: Stack, certificates: Certificates) -> None:
    server = Recorder(on_data_received=echo)
    async with stack.open() as group:
        with listening() as listener:
            peer = Peer.connect(listener.getsockname())
            sock, _ = listener.accept()
        _, tls = await together(
            lambda: group.connect_accepted_socket(lambda: server, sock, ssl=certificates.server()),
            lambda: TLSPeer.wrap(peer.socket, certificates.client(), server_hostname=NAME),
        )
        with tls:
            await tls.send(b"hello")
            assert await tls.receive_exactly(5) == b"hello"
            await tls.say_goodbye()
            await server.wait_for("connection_lost")
        assert server.lost_with is None


@pytest.mark.parametrize("count", [None, 300_001])
async def test_f1_f2_sendfile(stack: Stack, certificates: Certificates, tmp_path: Path, count: int | None) -> None:
    # Through the fall-back: exactly `count` bytes from the given offset.
    data = pattern(1_000_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        with path.open("rb") as file:
            file.seek(17)
            stands = stack.is_oracle and sys.version_info < (3, 14, 10)  # CPython 150107
            expected = data[17 if stands else 0 :][:count]
            _, received = await together(
                lambda: group.sendfile(transport, file, 0, count), lambda: peer.receive_exactly(len(expected))
            )
        assert received == expected
        with path.open("rb") as file, pytest.raises(RuntimeError):
            await group.sendfile(transport, file, fallback=False)
        transport.close()
        await peer.say_goodbye()
        await protocol.wait_for("connection_lost")


# -- what is known ----------------------------------------------------------------------------------------


async def test_extra_info(stack: Stack, certificates: Certificates, version: str) -> None:
    context = certificates.client()
    async with stack.open() as group:
        async with tls_client(group, certificates, version=version, ssl=context) as (transport, protocol, peer):
            info = transport.get_extra_info
            assert info("sslcontext") is context
            assert ("DNS", NAME) in info("peercert")["subjectAltName"]
            assert info("cipher") == peer.socket.cipher()
            assert info("compression") is None
            assert info("ssl_object").version() == f"TLSv{version}"
            assert info("sockname") == peer.socket.getpeername()
            assert info("peername") == peer.socket.getsockname()
            assert info("socket").fileno() >= 0
            assert info("nothing", "default") == "default"
            transport.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio raises AttributeError")
async def test_t10_extra_info_after_two_closes(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.close()
        transport.close()
        assert transport.get_extra_info("cipher")[1].startswith("TLS")
        assert transport.get_extra_info("nothing", 7) == 7
        peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")
        assert transport.get_extra_info("cipher")[1].startswith("TLS")


@pytest.mark.ours_only("asyncio has them over TLS, and on no page")
async def test_a_tls_transport_has_only_documented_methods(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        for name in ("get_read_buffer_size", "get_read_buffer_limits", "set_read_buffer_limits"):
            assert not hasattr(transport, name)
        peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio does not count them")
async def test_the_handshake_time_out_ends_with_the_handshake(stack: Stack, certificates: Certificates) -> None:
    """Or else it would end the connection later on."""
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, _):
        assert group.statistics().pending_timers == 0
        transport.abort()
        await protocol.wait_for("connection_lost")


async def test_no_write_eof(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        assert transport.can_write_eof() is False
        with pytest.raises(NotImplementedError):
            transport.write_eof()
        transport.write(b"still open")
        assert await peer.receive_exactly(10) == b"still open"
        transport.abort()
        await protocol.wait_for("connection_lost")


# -- the end ----------------------------------------------------------------------------------------------


async def test_close_sends_close_notify_and_waits_for_the_peers(
    stack: Stack, certificates: Certificates, version: str
) -> None:
    async with stack.open() as group:
        async with tls_client(group, certificates, version=version) as (transport, protocol, peer):
            transport.write(b"last words")
            transport.close()
            assert transport.is_closing()
            assert await peer.receive_exactly(10) == b"last words"
            assert await peer.receive() == b""  # `close_notify`: without it `SSLEOFError`.
            await turns()
            assert not protocol.lost
            await peer.say_goodbye()
            await protocol.wait_for("connection_lost")
            assert await peer.receive_raw() == b""
        # asyncio calls `eof_received` here too.
        assert protocol.names == ["connection_made", "eof_received", "connection_lost"]
        assert protocol.lost_with is None


async def test_peer_closes(stack: Stack, certificates: Certificates, version: str, recorder: type[Any]) -> None:
    legal(stack, recorder)
    data = pattern(400_000)
    protocol = recorder()
    async with stack.open() as group:
        async with tls_client(group, certificates, protocol, version=version) as (_, _, peer):
            await peer.send(data)
            await peer.say_goodbye()  # Returns when our `close_notify` has come.
            await protocol.wait_for("connection_lost")
            assert await peer.receive_raw() == b""
        assert protocol.received == data
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.lost_with is None


@pytest.mark.parametrize("leaves", [True, False], ids=["peer has left", "peer stays"])
async def test_close_in_a_callback_while_more_is_in_memory(
    stack: Stack, certificates: Certificates, version: str, recorder: type[Any], leaves: bool
) -> None:
    # The rest of a record, or the peer's `close_notify`, has been received together with what the callback got.
    legal(stack, recorder)
    if stack.is_oracle and leaves:
        pytest.skip("asyncio's TLS calls eof_received() from inside close()")
    name = "data_received" if recorder is Recorder else "buffer_updated"
    protocol = recorder(**{f"on_{name}": lambda protocol, _: protocol.transport.close()})
    async with stack.open() as group:
        async with tls_client(group, certificates, protocol, version=version) as (transport, _, peer):
            transport.pause_reading()
            await peer.send(pattern(RECORD))
            if leaves:
                peer.say_goodbye_and_leave()
            transport.resume_reading()
            await protocol.wait_for(name)
            if not leaves:
                assert await peer.receive() == b""
                await turns(100)  # It is left in peace until the peer answers.
                await peer.say_goodbye()
            await protocol.wait_for("connection_lost")
        assert protocol.count(name) == 1
        assert protocol.names[-3:] == [name, "eof_received", "connection_lost"]
        assert protocol.lost_with is None


async def test_peer_closes_while_reading_is_paused(stack: Stack, certificates: Certificates) -> None:
    data = pattern(100_000)
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.pause_reading()
        await peer.send(data)
        peer.say_goodbye_and_leave()
        await turns()
        assert protocol.names == ["connection_made"]
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == data
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]


async def test_true_value_from_eof_received_still_closes(stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder(on_eof_received=lambda _: True)
    async with stack.open() as group:
        with capture_log(stack) as records:
            async with tls_client(group, certificates, protocol) as (_, _, peer):
                await peer.say_goodbye()
                await protocol.wait_for("connection_lost")
        assert protocol.lost_with is None
        assert [record.levelname for record in records] == ["WARNING"]


@pytest.mark.ours_only("asyncio warns whatever the callback has done")
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_eof_received_that_aborts_and_returns_true(stack: Stack, certificates: Certificates, end: str) -> None:
    def eof_received(protocol: Any) -> bool:
        getattr(protocol.transport, end)()
        return True

    protocol = Recorder(on_eof_received=eof_received)
    with capture_log(stack) as records:
        async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
            peer.say_goodbye_and_leave()
            await protocol.wait_for("connection_lost")
    assert [record.getMessage() for record in records] == []


async def test_what_is_written_in_eof_received_is_sent(stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder(on_eof_received=lambda protocol: protocol.transport.write(b"answer"))
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        with pytest.raises(ssl.SSLWantReadError):
            peer.socket.unwrap()
        assert await peer.receive_exactly(6) == b"answer"
        assert await peer.receive() == b""
        await protocol.wait_for("connection_lost")


async def test_abort_sends_no_close_notify(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        fill(transport)
        transport.abort()
        assert not protocol.lost
        await protocol.wait_for("connection_lost")
        assert protocol.lost_with is None
        with pytest.raises(DROPPED):
            await peer.receive_all()


async def test_abort_during_the_shutdown(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.close()
        assert await peer.receive() == b""
        assert not protocol.lost
        transport.abort()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "connection_lost"]
        assert protocol.lost_with is None


async def test_abort_after_the_peers_close_notify(stack: Stack, certificates: Certificates) -> None:
    # Both become readable at once, and the callback of the first aborts the second.
    def abort(_: Recorder, data: bytes) -> None:
        if data == b"now":
            transport.abort()

    async with (
        stack.open() as group,
        tls_client(group, certificates) as (transport, protocol, peer),
        tls_client(group, certificates, Recorder(on_data_received=abort)) as (_, other, quick),
    ):
        transport.close()
        assert await peer.receive() == b""
        # epoll reports those first that it has reported the last time: that is this one, alone.
        await quick.send(b"first")
        await other.wait_received(5)
        quick.socket.send(b"now")
        peer.socket.unwrap()
        await protocol.wait_for("connection_lost")
        assert other.received == b"firstnow"
        assert protocol.names == ["connection_made", "connection_lost"]
        assert protocol.lost_with is None
        other.transport.abort()
        await other.wait_for("connection_lost")


async def test_t8_peer_that_never_answers_close_notify(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        async with tls_client(group, certificates, ssl_shutdown_timeout=0.05) as (transport, protocol, peer):
            contexts = collect_contexts(group)
            transport.close()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.lost_with, TimeoutError)
            assert contexts == []
            assert await peer.receive() == b""


async def test_peer_that_disconnects_after_our_close_notify(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        transport.close()
        assert await peer.receive() == b""
        peer.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "eof_received", "connection_lost"]
        assert protocol.lost_with is None
        assert contexts == []


async def test_writing_during_the_shutdown(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.close()
        transport.write(b"too late")
        assert transport.get_write_buffer_size() == 0
        assert await peer.receive() == b""
        await peer.say_goodbye()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio's ends with SSLError: application data after close notify")
async def test_t8_peer_that_goes_on_sending_after_our_close(
    stack: Stack, certificates: Certificates, version: str
) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, version=version) as (transport, protocol, peer):
            await peer.send(b"before")  # May be in any state of delivery when the transport closes.
            transport.close()
            assert await peer.receive() == b""
            before = len(protocol.received)
            for _ in range(5):
                await peer.send(bytes(20_000))
            assert not protocol.lost
            await peer.say_goodbye()
            await protocol.wait_for("connection_lost")
        assert protocol.lost_with is None
        assert len(protocol.received) == before
        assert contexts == []


@pytest.mark.ours_only("asyncio's ends with SSLError: application data after close notify")
async def test_r3_close_in_the_middle_of_an_endless_download(stack: Stack, certificates: Certificates) -> None:
    sent = 0
    closed_at = 0

    async def flood(peer: TLSPeer) -> None:
        nonlocal sent
        try:
            while True:
                await peer.send(bytes(65536))
                sent += 65536
        except OSError:
            pass

    def close(protocol: Recorder, _: bytes) -> None:
        nonlocal closed_at
        if len(protocol.received) > 1_000_000:
            protocol.transport.close()
            closed_at = sent

    protocol = Recorder(on_data_received=close)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, protocol, small=True) as (_, _, peer):
            with anyio.fail_after(GUARD):
                await flood(peer)
            await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "data_received", "connection_lost"]
        assert protocol.lost_with is None
        assert sent - closed_at < 16_000_000
        assert contexts == []


@pytest.mark.parametrize("unread", [False, True], ids=["nothing unread", "unread data"])
async def test_t9_eof_without_close_notify(
    stack: Stack, certificates: Certificates, version: str, unread: bool
) -> None:
    async with stack.open() as group, tls_client(group, certificates, version=version) as (transport, protocol, peer):
        if unread:
            transport.pause_reading()
            await peer.send(b"unread")
        peer.cut()
        await turns()
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == (b"unread" if unread else b"")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.lost_with is None
        if not stack.is_oracle:
            assert transport.get_extra_info("close_notify") is False


async def test_t9_eof_without_close_notify_over_a_unix_socket(stack: Stack, certificates: Certificates) -> None:
    """Our own `close_notify` then fails with EPIPE at once, while TCP accepts it first; neither is an error."""
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        (_, protocol), peer = await together(
            lambda: group.create_unix_connection(Recorder, sock=ours, ssl=certificates.client(), server_hostname=NAME),
            lambda: TLSPeer.wrap(theirs, certificates.server(), server_side=True),
        )
        peer.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.lost_with is None


async def test_an_end_of_file_without_close_notify_is_answered(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (_, protocol, peer):
        peer.cut()
        answer = await peer.receive_raw()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.lost_with is None
        # A record of its own; asyncio cuts the connection as well.
        assert answer == b"" if stack.is_oracle else len(answer) > 0
        assert await peer.receive_raw() == b""


@pytest.mark.parametrize("size", [5, 100_000])
async def test_client_that_sends_and_disconnects_at_once(
    stack: Stack, certificates: Certificates, recorder: type[Any], size: int
) -> None:
    """It has finished the handshake before the server sends its session tickets, which then fails."""
    legal(stack, recorder)
    data = pattern(size)
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size + 65536)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * size + 65536)

    async def client() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client(version="1.3").wrap_bio(incoming, outgoing, server_hostname=NAME)
        with Peer(theirs) as peer:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await peer.send(outgoing.read())
                    incoming.write(await peer.receive())
            tls.write(data)
            with pytest.raises(ssl.SSLWantReadError):
                tls.unwrap()
            ciphertext = outgoing.read()
            assert theirs.send(ciphertext) == len(ciphertext)

    async with stack.open() as group:
        (_, protocol), _ = await together(
            lambda: group.connect_accepted_socket(recorder, ours, ssl=certificates.server()), client
        )
        await protocol.wait_for("connection_lost")
        assert protocol.received == data
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        if not stack.is_oracle:  # asyncio reports the broken pipe, which does not matter after `close_notify`.
            assert protocol.lost_with is None
            assert protocol.transport.get_extra_info("close_notify") is True


@pytest.mark.ours_only("asyncio has no way to tell")
async def test_t9_truncation_can_be_detected(stack: Stack, certificates: Certificates) -> None:
    seen: list[object] = []
    protocol = Recorder(
        on_connection_made=lambda _, transport: seen.append(transport.get_extra_info("close_notify")),
        on_eof_received=lambda protocol: seen.append(protocol.transport.get_extra_info("close_notify")),
    )
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")
        assert seen == [False, True]


async def test_t7_peer_resets_under_a_writer(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        peer.reset()
        with anyio.fail_after(GUARD):
            while not protocol.lost:
                transport.write(bytes(10_000))
                await anyio.lowlevel.checkpoint()
        assert isinstance(protocol.lost_with, ConnectionError)
        assert transport.is_closing()


async def test_damaged_record(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (_, protocol, peer):
        await peer.send(b"good")
        await protocol.wait_received(4)
        socket.socket.send(peer.socket, b"\x17\x03\x03\x00\x20" + bytes(32))
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.lost_with, ssl.SSLError)
        if not stack.is_oracle:  # asyncio does not report the alert
            with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
                await peer.receive()


@pytest.mark.ours_only("asyncio loses the data")
async def test_data_before_a_damaged_record(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.pause_reading()  # Both must be received together.
        await peer.send(b"good")
        socket.socket.send(peer.socket, b"\x17\x03\x03\x00\x20" + bytes(32))
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == b"good"
        assert isinstance(protocol.lost_with, ssl.SSLError)


async def is_dropped(connecting: Awaitable[TLSPeer]) -> bool:
    """The other end disconnects without `close_notify`, during or after the peer's handshake."""
    with pytest.raises(DROPPED):
        with await connecting as peer:
            await peer.receive_all()
    return True


class FailingObject(ssl.SSLObject):
    """An `SSLObject` that fails with its own error as soon as there is something to read."""

    def read(self, *arguments: Any) -> Any:
        super().read(*arguments)
        raise ZeroDivisionError


async def test_sslobject_that_fails_to_read(stack: Stack, certificates: Certificates) -> None:
    context = certificates.client()
    context.sslobject_class = FailingObject
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, ssl=context) as (transport, protocol, peer):
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.lost_with, ZeroDivisionError)
            assert protocol.names == ["connection_made", "connection_lost"]
            with pytest.raises(DROPPED):
                await peer.receive_all()
        assert peers_contexts(contexts) == [protocol.lost_with]
        if not stack.is_oracle:  # asyncio reports its own internals.
            assert contexts[0]["message"] == "Fatal read error on stream transport"
            assert contexts[0]["transport"] is transport
            assert contexts[0]["protocol"] is protocol
        async with tls_client(group, certificates) as (transport, protocol, peer):
            await peer.send(b"still alive")
            await protocol.wait_received(11)
            transport.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio's ends with SSLError: application data after close notify")
async def test_sslobject_that_fails_to_read_during_the_shutdown(stack: Stack, certificates: Certificates) -> None:
    context = certificates.client()
    context.sslobject_class = FailingObject
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, ssl=context) as (transport, protocol, peer):
            transport.close()
            assert await peer.receive() == b""
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.lost_with, ZeroDivisionError)
        assert peers_contexts(contexts) == [protocol.lost_with]
        async with tls_client(group, certificates) as (transport, protocol, peer):
            await peer.send(b"still alive")
            await protocol.wait_received(11)
            transport.abort()
            await protocol.wait_for("connection_lost")


async def test_exception_in_a_callback(stack: Stack, certificates: Certificates) -> None:
    def fail(protocol: Any, data: bytes) -> None:
        raise ZeroDivisionError

    protocol = Recorder(on_data_received=fail)
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        contexts = collect_contexts(group)
        await peer.send(b"x")
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.lost_with, ZeroDivisionError)
        assert [type(exc) for exc in peers_contexts(contexts)] == [ZeroDivisionError]


async def test_leaving_the_group_in_order(stack: Stack, certificates: Certificates) -> None:
    async def drive(peer: TLSPeer) -> None:
        assert await peer.receive_all() == b"last words"
        await peer.say_goodbye()

    async with AsyncExitStack() as peers, anyio.create_task_group() as tasks:
        async with stack.open() as group:
            transport, protocol, peer = await peers.enter_async_context(tls_client(group, certificates))
            transport.write(b"last words")
            tasks.start_soon(drive, peer)
        assert protocol.lost
        assert protocol.lost_with is None


@pytest.mark.ours_only("asyncio has no group")
async def test_cancelling_the_group_during_a_shutdown(stack: Stack, certificates: Certificates) -> None:
    scope = anyio.CancelScope()

    async def drive(peer: TLSPeer, protocol: Recorder) -> None:
        assert await peer.receive() == b""
        assert not protocol.lost
        scope.cancel()

    async with AsyncExitStack() as peers, anyio.create_task_group() as tasks:
        with scope:
            async with stack.open() as group:
                _, protocol, peer = await peers.enter_async_context(tls_client(group, certificates))
                tasks.start_soon(drive, peer, protocol)
        assert scope.cancelled_caught
        assert protocol.lost
        assert protocol.lost_with is None


# -- handshakes that fail ---------------------------------------------------------------------------------


async def connect_to(group: Any, address: Any, **options: Any) -> BaseException:
    """Connect and return the error."""
    options.setdefault("server_hostname", NAME)
    with anyio.fail_after(GUARD):
        try:
            transport, _ = await group.create_connection(Recorder, *address, **options)
        except Exception as exc:
            return exc.with_traceback(None)
    transport.abort()
    raise AssertionError("the handshake succeeded")


@contextmanager
def plain_server(*answers: Callable[[socket.socket], object]) -> Iterator[Any]:
    """A server without TLS in a thread: each connection gets the next answer."""

    def run() -> None:
        for answer in answers:
            sock, _ = listener.accept()
            with sock:
                try:
                    answer(sock)
                except OSError:
                    pass  # The client was quicker.

    with listening() as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            thread.join(GUARD)
            assert not thread.is_alive()


def read_four(sock: socket.socket) -> None:
    sock.recv(4, socket.MSG_WAITALL)


def read_until_end(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def reset(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer_half(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"\x16\x03\x03\x00\x7a\x02")


def speak_http(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    read_until_end(sock)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda sock: None, ConnectionResetError),
        (read_four, ConnectionResetError),
        (lambda sock: sock.recv(65536), ConnectionResetError),
        (reset, ConnectionResetError),
        (answer_half, ConnectionResetError),
        (speak_http, ssl.SSLError),
    ],
    ids=["closes", "reads four bytes and closes", "reads and closes", "resets", "answers by half", "speaks HTTP"],
)
async def test_t4_peer_that_disconnects_in_mid_handshake(
    stack: Stack, certificates: Certificates, answer: Any, expected: type[Exception]
) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        with plain_server(answer) as address:
            error = await connect_to(group, address, ssl=certificates.client())
        assert type(error) is expected
        assert contexts == []


async def test_handshake_that_takes_too_long(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        with plain_server(read_until_end) as address:
            error = await connect_to(group, address, ssl=certificates.client(), ssl_handshake_timeout=0.05)
        assert type(error) is ConnectionAbortedError
        assert "0.05 seconds" in str(error)


async def test_handshake_that_is_cancelled(stack: Stack, certificates: Certificates) -> None:
    greeted = threading.Event()

    def answer(sock: socket.socket) -> None:
        sock.recv(1)
        greeted.set()
        read_until_end(sock)  # Returns because the socket is closed.

    async with stack.open() as group:
        with plain_server(answer) as address:
            async with anyio.create_task_group() as tasks:

                async def connect() -> None:
                    await connect_to(group, address, ssl=certificates.client())

                tasks.start_soon(connect)
                await until(greeted.is_set)
                tasks.cancel_scope.cancel()
            await turns()


@pytest.mark.ours_only("asyncio leaks descriptors here")
@pytest.mark.exhaustive
async def test_t3_failed_handshakes_leak_nothing(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        before = len(open_descriptors())
        with plain_server(*[read_four] * 1000) as address:
            for _ in range(1000):
                await connect_to(group, address, ssl=certificates.client())
        with listening() as stalling:
            address = stalling.getsockname()
            stalling.setblocking(False)

            def forget() -> None:
                """Take the silent connections out of the backlog."""
                with contextlib.suppress(BlockingIOError):
                    while True:
                        stalling.accept()[0].close()

            for _ in range(1000):
                await connect_to(group, address, ssl=certificates.client(), ssl_handshake_timeout=0.001)
                forget()
            for _ in range(1000):
                with anyio.move_on_after(0.001):
                    await connect_to(group, address, ssl=certificates.client())
                forget()
        await until(lambda: len(open_descriptors()) <= before)


async def test_failed_handshakes_of_a_servers_clients_leak_nothing(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        group.set_exception_handler(lambda *_: None)
        serving = await serve(group, certificates.server())
        before = len(open_descriptors())
        for number in range(300):
            with Peer.connect(serving.address) as peer:
                if number % 3 == 0:
                    await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                    assert await peer.gone()
                elif number % 3 == 1:
                    await peer.send(b"\x16\x03\x01\x02\x00\x01")
                else:
                    peer.reset()
        await until(lambda: len(open_descriptors()) <= before)
        assert await echoes(group, serving, certificates)
        serving.server.close()


def count_of_openssls_objects() -> int:
    return sum(isinstance(each, (ssl.SSLObject, ssl.MemoryBIO)) for each in gc.get_objects())


@pytest.mark.exhaustive
@pytest.mark.ours_only("about our own objects")
async def test_t6_failed_handshakes_keep_no_memory(stack: Stack, certificates: Certificates) -> None:
    # Counted without the garbage collector: a cycle for each failure would pile up until it runs.
    context = certificates.client()
    server = certificates.server()
    async with stack.open() as group:
        group.set_exception_handler(lambda *_: None)
        serving = await serve(group, server)
        untrusting = ssl.create_default_context()
        gc.collect()
        before = count_of_openssls_objects()
        gc.disable()
        try:
            with plain_server(*[read_four] * 1000) as address:
                for _ in range(1000):
                    await connect_to(group, address, ssl=context)
            for _ in range(1000):
                await connect_to(group, serving.address, ssl=untrusting)
            # The server may still be about to hear of the last ones.
            await until(lambda: count_of_openssls_objects() < before + 10)
        finally:
            gc.enable()
        serving.server.close()


def refused(name: str, certificates: Certificates) -> tuple[ssl.SSLContext, dict[str, Any]]:
    context = ssl.create_default_context() if name == "authority" else certificates.client()
    return context, {"server_hostname": "other.example"} if name == "name" else {}


@pytest.mark.parametrize("what", ["authority", "name"])
async def test_certificate_that_is_refused(stack: Stack, certificates: Certificates, version: str, what: str) -> None:
    context, options = refused(what, certificates)
    context.maximum_version = VERSIONS[version]
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server())
        error = await connect_to(group, serving.address, ssl=context, **options)
        assert isinstance(error, ssl.SSLCertVerificationError)
        assert error.reason == "CERTIFICATE_VERIFY_FAILED"
        assert error.verify_code == (62 if what == "name" else 20)
        if not stack.is_oracle:
            # asyncio's client does not report the alert, and its server does so only in debug mode.
            await until(lambda: contexts)
            (context_,) = contexts
            assert "ALERT" in str(context_["exception"])
            assert isinstance(context_["exception"], ssl.SSLError)
        assert await echoes(group, serving, certificates)
        serving.server.close()


async def echoes(group: Any, serving: Any, certificates: Certificates) -> bool:
    """Return whether a new client of the server gets an answer."""
    with anyio.fail_after(GUARD):
        peer = await TLSPeer.connect_to(serving.address, certificates.client())
    with peer:
        await peer.send(b"are you there?")
        await until(lambda: any(protocol.received == b"are you there?" for protocol in serving.protocols))
        (protocol,) = [protocol for protocol in serving.protocols if protocol.received]
        protocol.transport.write(b"yes")
        assert await peer.receive_exactly(3) == b"yes"
        peer.say_goodbye_and_leave()
    await protocol.wait_for("connection_lost")
    return True


@pytest.mark.parametrize("kind", ["garbage", "leaves", "half", "resets", "slow"])
async def test_server_survives_a_failing_handshake(stack: Stack, certificates: Certificates, kind: str) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server(), ssl_handshake_timeout=0.1 if kind == "slow" else None)
        with Peer.connect(serving.address) as peer:
            client = peer.socket.getsockname()
            if kind == "garbage":
                await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await peer.gone()
            elif kind == "half":
                await peer.send(b"\x16\x03\x01\x02\x00\x01")
                peer.shutdown()
                assert await peer.gone()
            elif kind == "resets":
                await peer.send(b"\x16\x03\x01")
                peer.reset()
            elif kind == "slow":
                assert await peer.gone()
        if not stack.is_oracle:  # asyncio reports it only in debug mode.
            await until(lambda: contexts)
            expected = {"garbage": ssl.SSLError, "slow": ConnectionAbortedError}.get(kind, ConnectionResetError)
            assert [type(context["exception"]) for context in contexts] == [expected]
            assert "Error on transport creation for incoming connection" in contexts[0]["message"]
            assert contexts[0]["peername"] == client
            assert serving.protocols == []
        assert await echoes(group, serving, certificates)
        serving.server.close()


def with_unreadable_certificate(certificates: Certificates, context: ssl.SSLContext, directory: Path) -> ssl.SSLContext:
    """Give `context` a certificate that OpenSSL takes, with a name that Python cannot decode."""
    authority = certificates.authority
    signer: Any = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.timezone.utc)
    name = b"\x30\x04\x82\x02\xff\xfe"  # A sequence of one dNSName, of two bytes.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, name), critical=False)
        .sign(signer, hashes.SHA256())
    )
    path = directory / "unreadable.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context.load_cert_chain(path)
    return context


@pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
async def test_client_with_a_certificate_that_python_cannot_read(
    stack: Stack, certificates: Certificates, tmp_path: Path, version: str, required: bool
) -> None:
    context = certificates.server(version=version)
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    certificates.authority.configure_trust(context)
    unreadable = with_unreadable_certificate(certificates, certificates.client(), tmp_path)
    readable = certificates.client()
    certificates.authority.issue_cert("client.example").configure_cert(readable)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, context)
        for _ in range(2):
            assert await is_dropped(TLSPeer.connect_to(serving.address, unreadable))
        if not stack.is_oracle:  # asyncio makes the protocol before the handshake.
            await until(lambda: len(contexts) == 2)
            for context_ in contexts:
                assert isinstance(context_["exception"], UnicodeDecodeError)
                assert "Error on transport creation for incoming connection" in context_["message"]
            assert serving.protocols == []
        with await TLSPeer.connect_to(serving.address, readable) as peer:
            await peer.send(b"are you there?")
            await until(lambda: any(protocol.received == b"are you there?" for protocol in serving.protocols))
            peer.say_goodbye_and_leave()
        await until(lambda: serving.protocols[-1].lost)
        serving.server.close()


@pytest.mark.parametrize("how", ["create_connection", "start_tls", "connect_stream"])
async def test_server_with_a_certificate_that_python_cannot_read(
    stack: Stack, certificates: Certificates, tmp_path: Path, version: str, how: str
) -> None:
    if stack.is_oracle and how == "connect_stream":
        pytest.skip("asyncio has no such thing")
    theirs = with_unreadable_certificate(certificates, certificates.server(version=version), tmp_path)
    ours = certificates.client()
    ours.check_hostname = False
    protocol = Recorder()

    async def connect(group: Any, address: Any) -> BaseException:
        with pytest.raises(UnicodeDecodeError) as caught:
            if how == "create_connection":
                await group.create_connection(lambda: protocol, *address, ssl=ours, server_hostname=NAME)
            elif how == "start_tls":
                transport, _ = await group.create_connection(lambda: protocol, *address)
                await group.start_tls(transport, protocol, ours, server_hostname=NAME)
            else:
                stream = await anyio.connect_tcp(*address)
                await group.connect_stream(lambda: protocol, stream, ssl=ours, server_hostname=NAME)
        return caught.value.with_traceback(None)

    async def accept(listener: socket.socket) -> None:
        await anyio.wait_readable(listener)
        assert await is_dropped(TLSPeer.wrap(listener.accept()[0], theirs, server_side=True))

    async with stack.open() as group:
        contexts = collect_contexts(group)
        with listening() as listener:
            listener.setblocking(False)
            error, _ = await together(lambda: connect(group, listener.getsockname()), lambda: accept(listener))
        if how == "start_tls":
            await protocol.wait_for("connection_lost")
            assert protocol.lost_with is error
        else:
            assert protocol.calls == []
        assert stack.is_oracle or contexts == []  # The caller has been told.
        async with tls_client(group, certificates) as (transport, living, peer):
            await peer.send(b"still alive")
            await living.wait_received(11)
            transport.abort()
            await living.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio gives each of them 256 KiB and takes far too long")
async def test_a_thousand_silent_connections(stack: Stack, certificates: Certificates) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 1000
    if hard != resource.RLIM_INFINITY and hard < 2 * count + 200:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * count + 200), hard))
    try:
        async with stack.open() as group:
            contexts = collect_contexts(group)
            serving = await serve(group, certificates.server(), backlog=count)
            silent = [Peer.connect(serving.address) for _ in range(count)]
            assert await echoes(group, serving, certificates)
            for peer in silent:
                peer.close()
            await until(lambda: len(contexts) == count)
            serving.server.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.ours_only("asyncio leaves pending handshakes to their time-out")
async def test_leaving_the_group_ends_pending_handshakes(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server())
        peer = Peer.connect(serving.address)
        await until(lambda: "handshakes=1" in repr(serving.server))
    with peer:
        assert await peer.gone()
    assert contexts == []
    assert serving.protocols == []


@pytest.mark.ours_only("abort_clients is new in Python 3.13")
async def test_server_ends_pending_handshakes_with_its_clients(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server())
        with Peer.connect(serving.address) as peer:
            await until(lambda: "handshakes=1" in repr(serving.server))
            serving.server.close()
            serving.server.abort_clients()
            assert await peer.gone()
        with anyio.fail_after(GUARD):
            await serving.server.wait_closed()
        assert contexts == []


@pytest.mark.ours_only("asyncio makes the protocol before the handshake")
async def test_factory_that_raises(stack: Stack, certificates: Certificates) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server(), fail)
        peer = await TLSPeer.connect_to(serving.address, certificates.client())
        with peer, pytest.raises(DROPPED):
            await peer.receive()
        await until(lambda: contexts)
        assert isinstance(contexts[0]["exception"], ZeroDivisionError)
        serving.server.close()


@pytest.mark.ours_only("asyncio leaks the socket")
async def test_factory_of_a_client_that_raises(stack: Stack, certificates: Certificates) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        with pytest.raises(ZeroDivisionError):
            await group.create_connection(fail, *serving.address, ssl=certificates.client(), server_hostname=NAME)
        serving.server.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"server_hostname": "x"}, ValueError),
        ({"ssl_handshake_timeout": 1}, ValueError),
        ({"ssl_shutdown_timeout": 1}, ValueError),
        ({"ssl": True, "ssl_handshake_timeout": 0}, ValueError),
        ({"ssl": True, "ssl_shutdown_timeout": -1}, ValueError),
    ],
    ids=str,
)
async def test_parameters_that_are_refused(
    stack: Stack, certificates: Certificates, options: dict[str, Any], error: type[Exception]
) -> None:
    if stack.is_oracle and "ssl" in options:
        pytest.skip("asyncio refuses these after it has connected, and leaks the socket")
    async with stack.open() as group:
        with listening() as listener:
            with pytest.raises(error):
                await group.create_connection(Recorder, *listener.getsockname(), **options)
        if "server_hostname" not in options and options.get("ssl") is not True:
            with pytest.raises(error):
                await group.create_server(Recorder, HOST, 0, **options)
        with pytest.raises(TypeError):
            await group.create_server(Recorder, HOST, 0, ssl=True)


@pytest.mark.ours_only("asyncio refuses these after it has connected, and leaks the socket")
@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
async def test_timeouts_that_are_not_positive(
    stack: Stack, certificates: Certificates, tmp_path: Path, name: str, value: float
) -> None:
    path = str(tmp_path / "socket")
    ours, theirs = socket.socketpair()
    server = {"ssl": certificates.server(), name: value}
    client = {"ssl": certificates.client(), "server_hostname": NAME, name: value}
    async with stack.open() as group:
        with ours, theirs, listening() as listener:
            for call in (
                lambda: group.create_connection(Recorder, *listener.getsockname(), **client),
                lambda: group.create_server(Recorder, HOST, 0, **server),
                lambda: group.create_unix_connection(Recorder, sock=ours, **client),
                lambda: group.create_unix_server(Recorder, path, **server),
                lambda: group.connect_accepted_socket(Recorder, ours, **server),
            ):
                with pytest.raises(ValueError, match=f"{name} should be a positive number"):
                    await call()


@pytest.mark.ours_only("asyncio refuses it since Python 3.14, once it has connected")
async def test_check_hostname_without_a_name(stack: Stack, certificates: Certificates) -> None:
    context = certificates.client()
    ours, theirs = socket.socketpair()
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        with ours, theirs, listening() as listener:
            for call in (
                lambda: group.create_connection(Recorder, *listener.getsockname(), ssl=context, server_hostname=""),
                lambda: group.create_unix_connection(Recorder, sock=ours, ssl=context, server_hostname=""),
                lambda: group.start_tls(transport, protocol, context),
                lambda: group.create_server(Recorder, HOST, 0, ssl=context),  # One for a client.
            ):
                with pytest.raises(ValueError, match="check_hostname requires server_hostname"):
                    await call()
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()  # No client has connected.
        transport.write(b"in the clear")
        assert await peer.receive_exactly(12) == b"in the clear"
        transport.abort()


@pytest.mark.ours_only("asyncio fails in a callback, and the client never ends")
async def test_timeouts_of_other_number_types(stack: Stack, certificates: Certificates) -> None:
    timeouts: Any = {"ssl_handshake_timeout": Decimal(60), "ssl_shutdown_timeout": Decimal(30)}
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), **timeouts)
        options = {"ssl": certificates.client(), "server_hostname": NAME}
        transport, protocol = await group.create_connection(Recorder, *serving.address, **options, **timeouts)
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.lost_with is None
        for name in timeouts:
            with pytest.raises(OverflowError):
                await group.create_connection(Recorder, *serving.address, **options, **{name: 10**400})
        serving.server.close()


@pytest.mark.ours_only("asyncio leaks the socket")
async def test_ssl_of_a_wrong_type(stack: Stack, certificates: Certificates) -> None:
    # It must not count as `True`: the caller wanted something else than the default.
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        with pytest.raises(AttributeError):
            await group.create_connection(Recorder, *serving.address, ssl="certificate.pem", server_hostname=NAME)
        serving.server.close()


@pytest.mark.parametrize("end", ["create_server", "connect_accepted_socket", "create_unix_server", "start_tls"])
async def test_shutdown_timeout_of_a_server(stack: Stack, certificates: Certificates, tmp_path: Path, end: str) -> None:
    protocol = Recorder()
    options: dict[str, Any] = {"ssl_shutdown_timeout": 0.05}
    path = str(tmp_path / "socket")
    listener = None
    async with stack.open() as group:
        if end == "create_unix_server":
            listener = await group.create_unix_server(lambda: protocol, path, ssl=certificates.server(), **options)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
        elif end == "create_server":
            listener = await group.create_server(lambda: protocol, HOST, 0, ssl=certificates.server(), **options)
            sock = socket.create_connection(listener.sockets[0].getsockname())
        else:
            ours, sock = socket.socketpair()

        async def serve_it() -> None:
            if end == "connect_accepted_socket":
                await group.connect_accepted_socket(lambda: protocol, ours, ssl=certificates.server(), **options)
            elif end == "start_tls":
                plain, _ = await group.connect_accepted_socket(lambda: protocol, ours)
                protocol.transport = await group.start_tls(
                    plain, protocol, certificates.server(), server_side=True, **options
                )

        _, peer = await together(serve_it, lambda: TLSPeer.wrap(sock, certificates.client(), server_hostname=NAME))
        with peer:
            await protocol.wait_for("connection_made")
            protocol.transport.close()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.lost_with, TimeoutError)
            assert "0.05" in str(protocol.lost_with) or stack.is_oracle
        if listener is not None:
            listener.close()


def test_default_timeouts(certificates: Certificates) -> None:
    """One minute for the handshake and half a minute for the shutdown, on a clock that the test moves."""
    trio = pytest.importorskip("trio")
    clock = pytest.importorskip("trio.testing").MockClock()
    errors: list[Exception] = []

    async def connect(group: Any, address: Any) -> None:
        try:
            await group.create_connection(Recorder, *address, ssl=certificates.client(), server_hostname=NAME)
        except ConnectionAbortedError as exc:
            errors.append(exc.with_traceback(None))

    async def main() -> None:
        async with TransportGroup() as group, anyio.create_task_group() as tasks:
            with listening() as listener:
                tasks.start_soon(connect, group, listener.getsockname())
                while not group.statistics().pending_timers:
                    await anyio.lowlevel.checkpoint()
                clock.jump(59.9)
                await turns()
                assert not errors
                clock.jump(0.2)
                while not errors:
                    await anyio.lowlevel.checkpoint()
                assert "60" in str(errors[0])
            async with tls_client(group, certificates) as (transport, protocol, _):
                transport.close()
                clock.jump(29.9)
                await turns()
                assert not protocol.lost
                clock.jump(0.2)
                while not protocol.lost:
                    await anyio.lowlevel.checkpoint()
                assert isinstance(protocol.lost_with, TimeoutError)
                assert "30" in str(protocol.lost_with)

    trio.run(main, clock=clock)  # AnyIO 4.10 does not export the clock.


# -- features of contexts ---------------------------------------------------------------------------------


async def test_server_name_indication(stack: Stack, certificates: Certificates) -> None:
    seen: list[str | None] = []
    other = certificates.server("other.example")
    context = certificates.server()

    def choose(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        seen.append(name)
        if name == "other.example":
            tls.context = other

    context.sni_callback = choose
    async with stack.open() as group:
        serving = await serve(group, context, lambda: Recorder(on_data_received=echo))
        for name in ("other.example", NAME):
            client = Recorder()
            await group.create_connection(
                lambda client=client: client, *serving.address, ssl=certificates.client(), server_hostname=name
            )
            client.transport.write(b"hi")
            await client.wait_received(2)
            assert ("DNS", name) in client.transport.get_extra_info("peercert")["subjectAltName"]
            client.transport.close()
            await client.wait_for("connection_lost")
        assert seen == ["other.example", NAME]
        serving.server.close()


async def test_server_name_callback_is_called_as_a_callback(
    stack: Stack, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It runs in the context of `create_server`; if it raises or refuses, only that handshake ends.
    seen: list[Any] = []
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    context = certificates.server()

    def choose(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        seen.append((name, variable.get(), stack.is_oracle or current_group() is group))
        variable.set("callback")
        if name == "raises.example":
            raise ZeroDivisionError
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME if name == "unknown.example" else None

    context.sni_callback = choose
    variable.set("server")
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, context)
        variable.set("client")
        for name, alert in (("raises.example", "HANDSHAKE_FAILURE"), ("unknown.example", "UNRECOGNIZED_NAME")):
            with pytest.raises(ssl.SSLError, match=None if stack.is_oracle else alert):
                await TLSPeer.connect_to(serving.address, certificates.client(), name)
        assert await echoes(group, serving, certificates)
        assert seen == [(name, "server", True) for name in ("raises.example", "unknown.example", NAME)]
        assert unraisable == [ZeroDivisionError]  # Python's `ssl` does not pass it on.
        if not stack.is_oracle:
            assert ["CALLBACK_FAILED" in str(error) for error in peers_contexts(contexts)] == [True, True]
        serving.server.close()


async def test_alpn(stack: Stack, certificates: Certificates) -> None:
    ours, theirs = certificates.server(), certificates.client()
    ours.set_alpn_protocols(["h2", "http/1.1"])
    theirs.set_alpn_protocols(["http/1.1"])
    async with stack.open() as group:
        serving = await serve(group, ours)
        with await TLSPeer.connect_to(serving.address, theirs) as peer:
            assert peer.socket.selected_alpn_protocol() == "http/1.1"
            protocol = await serving.protocol()
            assert protocol.transport.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
            peer.say_goodbye_and_leave()
        await protocol.wait_for("connection_lost")
        serving.server.close()


async def test_client_certificate_that_is_asked_for_later(stack: Stack, certificates: Certificates) -> None:
    # Post-handshake authentication (RFC 8446, section 4.6.2): messages of the handshake in the midst of the data.
    ours, theirs = certificates.server(version="1.3"), certificates.client()
    ours.post_handshake_auth = theirs.post_handshake_auth = True
    ours.verify_mode = ssl.CERT_REQUIRED
    certificates.authority.configure_trust(ours)
    certificates.authority.issue_cert("client.example").configure_cert(theirs)
    names: list[Any] = []

    def serve_it(protocol: Recorder, data: bytes) -> None:
        tls = protocol.transport.get_extra_info("ssl_object")
        names.append((data, (tls.getpeercert() or {}).get("subjectAltName")))
        if data == b"private":
            tls.verify_client_post_handshake()
        protocol.transport.write(data)

    async with stack.open() as group:
        serving = await serve(group, ours, lambda: Recorder(on_data_received=serve_it))
        client = Recorder()
        await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
        for request, so_far in ((b"public", 6), (b"private", 13), (b"secret", 19)):
            client.transport.write(request)
            await client.wait_received(so_far)
        assert names == [(b"public", None), (b"private", None), (b"secret", (("DNS", "client.example"),))]
        client.transport.close()
        await client.wait_for("connection_lost")
        await serving.protocols[0].wait_for("connection_lost")
        serving.server.close()


@pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "none"])
async def test_client_certificates(
    stack: Stack, certificates: Certificates, version: str, required: bool, given: bool
) -> None:
    ours, theirs = certificates.server(version=version), certificates.client()
    ours.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    certificates.authority.configure_trust(ours)
    if given:
        certificates.authority.issue_cert("client.example").configure_cert(theirs)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, ours)
        client = Recorder()
        if required and not given:  # asyncio's server keeps the alert to itself.
            if version == "1.2":
                error = await connect_to(group, serving.address, ssl=theirs)
            else:  # In TLS 1.3 the client finishes before the server has checked its certificate.
                await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
                await client.wait_for("connection_lost")
                error = client.lost_with
            if not stack.is_oracle:
                assert isinstance(error, ssl.SSLError)
                assert "ALERT" in str(error)
                await until(lambda: contexts)
                assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in str(contexts[0]["exception"])
                assert serving.protocols == []
        else:
            await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
            protocol = await serving.protocol()
            peercert = protocol.transport.get_extra_info("peercert")
            if given:
                assert ("DNS", "client.example") in peercert["subjectAltName"]
            else:
                assert peercert is None
            client.transport.close()
            await protocol.wait_for("connection_lost")
            await client.wait_for("connection_lost")
        serving.server.close()


async def test_session_resumption(stack: Stack, certificates: Certificates, version: str) -> None:
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=echo))
        context = certificates.client(version=version)
        session = None
        for number in range(2):
            with await TLSPeer.connect_to(serving.address, context, session=session) as peer:
                await peer.send(b"x")
                assert await peer.receive() == b"x"
                assert peer.socket.session_reused == (number == 1)
                session = peer.socket.session
                protocol = await serving.protocol(number)
                assert protocol.transport.get_extra_info("ssl_object").session_reused == (number == 1)
                await peer.say_goodbye()
            await protocol.wait_for("connection_lost")
        serving.server.close()


async def test_session_resumption_by_a_client(stack: Stack, certificates: Certificates, version: str) -> None:
    # As with asyncio: an `sslobject_class` may set the session before the handshake.
    sessions: list[ssl.SSLSession] = []

    class Resuming(ssl.SSLObject):
        def do_handshake(self) -> None:
            if sessions and self.session is None:
                self.session = sessions[-1]
            super().do_handshake()

    context = certificates.client(version=version)
    context.sslobject_class = Resuming
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=echo))
        for number in range(2):
            client = Recorder()
            await group.create_connection(
                lambda client=client: client, *serving.address, ssl=context, server_hostname=NAME
            )
            client.transport.write(b"x")
            await client.wait_received(1)
            tls = client.transport.get_extra_info("ssl_object")
            assert tls.session_reused == (number == 1)
            sessions.append(tls.session)
            client.transport.close()
            await client.wait_for("connection_lost")
        serving.server.close()


@pytest.mark.parametrize(
    ("certified", "name"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("b\xfccher.example", "b\xfccher.example"),
        ("*.example.org", "www.example.org"),
    ],
    ids=["IPv4", "IPv6", "IDNA", "wildcard"],
)
async def test_server_hostname_is_verified(stack: Stack, certificates: Certificates, certified: str, name: str) -> None:
    host = name if name == "::1" else HOST
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    async with stack.open() as group:
        serving = await serve(group, certificates.server(certified), host=host)
        client = Recorder()
        # An address is verified without being given again.
        options = {} if name == host else {"server_hostname": name}
        await group.create_connection(lambda: client, host, serving.port, ssl=certificates.client(), **options)
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()


@pytest.mark.parametrize(
    ("certified", "host"),
    [
        ("b\xfccher.example", "b\xfccher.example"),
        ("localhost", "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54"),
    ],
    ids=["IDNA", "full width"],
)
async def test_host_with_an_internationalised_name(
    stack: Stack, certificates: Certificates, certified: str, host: str, anyio_backend: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is resolved and verified without `server_hostname`; the second one by the system's own resolver."""
    async with stack.open() as group:
        serving = await serve(group, certificates.server(certified))
        client = Recorder()
        known = {"b\xfccher.example": [HOST], "xn--bcher-kva.example": [HOST]}
        with names(monkeypatch, known, anyio_backend):
            await group.create_connection(lambda: client, host, serving.port, ssl=certificates.client())
        assert client.transport.get_extra_info("peercert")["subjectAltName"][0][1] in {*known, "localhost"}
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()


async def test_ssl_true_uses_the_systems_authorities(
    stack: Stack, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        error = await connect_to(group, serving.address, ssl=True)
        assert isinstance(error, ssl.SSLCertVerificationError)
        with certificates.files() as files:
            monkeypatch.setenv("SSL_CERT_FILE", files["ca"])
            client = Recorder()
            await group.create_connection(lambda: client, *serving.address, ssl=True, server_hostname=NAME)
            client.transport.close()
            await client.wait_for("connection_lost")
            # No name at all: the certificate is still verified, its name is not.
            unnamed = certificates.client()
            unnamed.check_hostname = False
            for context in (True, unnamed):
                client = Recorder()
                await group.create_connection(
                    lambda client=client: client, *serving.address, ssl=context, server_hostname=""
                )
                client.transport.close()
                await client.wait_for("connection_lost")
        serving.server.close()


async def test_settings_of_the_context_are_used(stack: Stack, certificates: Certificates) -> None:
    ours, theirs = certificates.server(), certificates.client()
    ours.maximum_version = ssl.TLSVersion.TLSv1_2
    ours.options |= ssl.OP_NO_TICKET
    theirs.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-GCM-SHA256")
    async with stack.open() as group:
        serving = await serve(group, ours)
        client = Recorder()
        await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
        cipher = client.transport.get_extra_info("cipher")
        assert cipher[0].endswith("AES128-GCM-SHA256")
        assert cipher[1] == "TLSv1.2"
        assert not client.transport.get_extra_info("ssl_object").session.has_ticket
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()
