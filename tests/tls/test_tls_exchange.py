"""TLS: exchanging data, over every kind of connection."""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from network import needs_unix
from support import (
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    fill,
    listening,
    pattern,
    settle,
)
from tls_support import (
    NAME,
    Certificates,
    TLSPeer,
    ViewRecorder,
    echo,
    serve,
    tls_client,
    tls_peer_process,
    together,
)

if TYPE_CHECKING:
    pass
from tls_helpers import RECORD, legal, variable

pytestmark = pytest.mark.anyio


# -- exchange -----------------------------------------------------------------------------------------------


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
        assert client.exception is None
        assert serving.protocols[0].exception is None
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


@pytest.mark.parametrize("buffer_size", [None, 1000, RECORD, 65536], ids=str)
async def test_t11_all_that_is_decrypted_is_delivered(
    stack: Stack, certificates: Certificates, version: str, buffer_size: int | None
) -> None:
    # Sizes at the end of a record, of a read and of the protocol's buffer: nothing may wait for more to come.
    sizes = [1, RECORD - 1, RECORD, RECORD + 1, 4 * RECORD, 131072 - 1, 131072, 131072 + 1, 262144, 262144 + 1]
    protocol = Recorder() if buffer_size is None else ViewRecorder(buffer_size=buffer_size)
    async with stack.open() as group, tls_client(group, certificates, protocol, version=version) as (*_, peer):
        expected = b""
        for size in sizes:
            data = pattern(size)
            expected += data
            await peer.send(data)
            assert await protocol.wait_received(len(expected)) == expected
        protocol.transport.close()
        peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "TLS: `get_buffer` returns a `bytearray`, or a view with items wider than a byte",
    asyncio="bytes are lost",
    here="received",
    why="nothing that has arrived is lost",
)
@pytest.mark.ours_only
async def test_t14_buffer_that_is_a_bytearray(stack: Stack, certificates: Certificates) -> None:
    data = pattern(300_000)
    protocol = BufferedRecorder(buffer_size=1000)
    async with stack.open() as group, tls_client(group, certificates, protocol) as (transport, _, peer):
        await peer.send(data)
        assert await protocol.wait_received(len(data)) == data
        protocol.buffer.extend(b"the caller may resize its buffer between callbacks")
        transport.abort()
        await protocol.wait_for("connection_lost")


@pytest.mark.differs("TLS: `get_buffer` returns a `bytearray`, or a view with items wider than a byte")
@pytest.mark.ours_only
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
            await settle(group)
            assert protocol.count(name) == 1
            transport.resume_reading()
            assert protocol.count(name) == 1, "no callback before resume_reading() returns"
            assert await protocol.wait_received(len(data)) == data
        peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "TLS: `close` with data in the buffer",
    asyncio="dropped if flushing takes longer than `ssl_shutdown_timeout`",
    here="flushed, as on plain transports; the time-out begins after that",
    why="nothing that was written is lost",
)
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
            await peer.shut_down_tls()
            await protocol.wait_for("connection_lost")
        assert protocol.exception is None


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
            assert protocol.exception is None
            serving.server.close()


@pytest.mark.differs("TLS: watermarks")
@pytest.mark.ours_only
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


@pytest.mark.ours_only("asyncio counts the buffers of its two transports in another way")
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
            peer.send_close_notify_and_close()
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
        await peer.shut_down_tls()
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


@pytest.mark.differs(
    "answers to TLS key updates, for a peer that does not read",
    asyncio="buffered without limit",
    here="reading stops above 512 KiB of them",
    why="memory stays bounded",
)
@pytest.mark.exhaustive
@pytest.mark.ours_only
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


@pytest.mark.differs("answers to TLS key updates, for a peer that does not read")
@pytest.mark.exhaustive
@pytest.mark.ours_only
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
        assert protocol.exception is None
        serving.server.close()


def test_written_data_never_stops_reading() -> None:
    # Otherwise two ends that both write before they read would wait for each other without end.
    from transports_anyio._channels import _tls_engine

    records = -(-_tls_engine.ENCRYPT_SIZE // RECORD) + 1
    assert records * (RECORD + 256) < _tls_engine.ANSWERS_LIMIT


# -- other ways to a connection -----------------------------------------------------------------------------


@needs_unix
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
            await tls.shut_down_tls()
            await server.wait_for("connection_lost")
        assert server.exception is None


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
        await peer.shut_down_tls()
        await protocol.wait_for("connection_lost")
