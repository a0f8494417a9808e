"""TLS over any AnyIO stream: `connect_stream(…, ssl=…)`, and `start_tls` on what it returns."""

from __future__ import annotations

import errno
import ssl
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls
import pytest
from anyio.abc import ByteReceiveStream, ByteStream
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSStream
from anyio_streams import memory_pair, one_way, tcp_pair
from support import GUARD, Recorder, pattern, settle, turns, until
from tls_support import NAME, Certificates, ViewRecorder, echo, together

from transports_anyio import TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "tcp"])
def pair(request: pytest.FixtureRequest) -> Any:
    return {"memory": memory_pair, "tcp": tcp_pair}[request.param]()


async def connect(group: TransportGroup, protocol: Any, stream: ByteStream, context: Any, **options: Any) -> Any:
    if not options.get("server_side"):
        options.setdefault("server_hostname", NAME)
    transport, made = await group.connect_stream(lambda: protocol, stream, ssl=context, **options)
    assert made is protocol
    return transport


async def test_client_and_anyios_server(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    data = pattern(500_000)
    protocol = Recorder()
    async with TransportGroup() as group, pair as (a, b):
        transport, tls = await together(
            lambda: connect(group, protocol, a, certificates.client()),
            lambda: TLSStream.wrap(b, server_side=True, ssl_context=certificates.server()),
        )
        assert ("DNS", NAME) in transport.get_extra_info("peercert")["subjectAltName"]
        assert transport.can_write_eof() is False

        async def back() -> None:
            count = 0
            while count < len(data):
                block = await tls.receive()
                count += len(block)
                await tls.send(block)

        transport.write(data)
        with anyio.fail_after(GUARD):
            await together(back, lambda: protocol.wait_received(len(data)))
        assert protocol.received == data
        transport.write(b"last words")
        transport.close()
        assert await tls.receive() == b"last words"
        with anyio.fail_after(GUARD):
            with pytest.raises(anyio.EndOfStream):  # `close_notify`: without it `BrokenResourceError`.
                await tls.receive()
            await tls.aclose()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None


@pytest.mark.parametrize("kind", [Recorder, ViewRecorder], ids=["protocol", "buffered"])
async def test_both_ends(anyio_backend: Any, certificates: Certificates, pair: Any, kind: type[Any]) -> None:
    data = pattern(1_000_000)
    client = kind()
    server = Recorder(on_data_received=echo)
    async with TransportGroup() as group, pair as (a, b):
        transport, _ = await together(
            lambda: connect(group, client, a, certificates.client()),
            lambda: connect(group, server, b, certificates.server(), server_side=True),
        )
        transport.write(data)
        assert await client.wait_received(len(data)) == data
        transport.close()
        await client.wait_for("connection_lost")
        await server.wait_for("connection_lost")
        assert client.exception is None
        assert server.exception is None


async def test_start_tls_in_mid_stream(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    clear = pattern(300_000)
    client, server = Recorder(), Recorder(on_data_received=echo)
    async with TransportGroup() as group, pair as (a, b):
        for protocol, stream in ((client, a), (server, b)):
            await group.connect_stream(lambda protocol=protocol: protocol, stream)  # type: ignore[misc]
        client.transport.write(clear)
        await client.wait_received(len(clear))
        # The last plaintext is still in flight when both ends begin.
        server.hooks.clear()
        client.transport.write(clear)
        await server.wait_received(2 * len(clear))

        async def upgrade(protocol: Recorder, context: ssl.SSLContext, **options: Any) -> None:
            protocol.transport = await group.start_tls(protocol.transport, protocol, context, **options)

        await together(
            lambda: upgrade(server, certificates.server(), server_side=True),
            lambda: upgrade(client, certificates.client(), server_hostname=NAME),
        )
        server.hooks["data_received"] = echo
        client.transport.write(clear)
        assert await client.wait_received(2 * len(clear)) == 2 * clear
        client.transport.close()
        await client.wait_for("connection_lost")
        await server.wait_for("connection_lost")


@pytest.mark.parametrize("written", ["before", "during"])
async def test_close_during_start_tls(anyio_backend: Any, certificates: Certificates, pair: Any, written: str) -> None:
    # Buffered data is flushed, as plaintext or encrypted, before the connection ends.
    data = pattern(20_000_000 if written == "before" else 1_000_000)
    protocol = Recorder()
    async with TransportGroup() as group, pair as (a, b):
        transport, _ = await group.connect_stream(lambda: protocol, a)

        async def upgrade() -> None:
            if written == "before":
                transport.write(data)
            with pytest.raises(ConnectionAbortedError, match="during"):
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)

        async def end() -> None:
            await turns()
            if written == "during":
                transport.write(data)
            transport.close()
            received = bytearray()
            stream = b
            if written == "during":
                stream = await TLSStream.wrap(b, server_side=True, ssl_context=certificates.server())
            with pytest.raises(anyio.EndOfStream):
                while True:
                    received += await stream.receive()
            if written == "during":
                assert received == data
                await stream.aclose()
            else:
                assert received[: len(data)] == data
                assert received[len(data)] == 0x16  # The handshake, which waited behind it.

        with anyio.fail_after(GUARD):
            await together(upgrade, end)
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_tls_over_a_tls_stream(anyio_backend: Any, certificates: Certificates) -> None:
    # Not over memory: there each of AnyIO's streams waits for the other to receive before it sends `close_notify`.
    data = pattern(200_000)
    client, server = Recorder(), Recorder(on_data_received=echo)
    async with TransportGroup() as group, tcp_pair() as (a, b):
        outer_a, outer_b = await together(
            lambda: TLSStream.wrap(a, hostname=NAME, ssl_context=certificates.client()),
            lambda: TLSStream.wrap(b, server_side=True, ssl_context=certificates.server()),
        )
        transport, _ = await together(
            lambda: connect(group, client, outer_a, certificates.client()),
            lambda: connect(group, server, outer_b, certificates.server(), server_side=True),
        )
        transport.write(data)
        assert await client.wait_received(len(data)) == data
        assert transport.get_extra_info("ssl_object") is not outer_a.extra(anyio.streams.tls.TLSAttribute.ssl_object)
        transport.close()
        await client.wait_for("connection_lost")
        await server.wait_for("connection_lost")


async def test_stream_that_ends_without_close_notify(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    protocol = Recorder()
    async with TransportGroup() as group, pair as (a, b):
        transport, tls = await together(
            lambda: connect(group, protocol, a, certificates.client()),
            lambda: TLSStream.wrap(b, server_side=True, ssl_context=certificates.server()),
        )
        await tls.send(b"x")
        await protocol.wait_received(1)
        await b.aclose()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]
        assert transport.get_extra_info("close_notify") is False


async def test_client_that_sends_in_pieces_and_disconnects_at_once(
    anyio_backend: Any, certificates: Certificates
) -> None:
    """The server's session tickets cannot be sent any more, and the client's data comes piece by piece."""
    pieces = [b"piece %d" % number for number in range(10)]
    protocol = Recorder()
    to_server, from_client = one_way(20)
    to_client, from_server = one_way(20)

    async def client() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client(version="1.3").wrap_bio(incoming, outgoing, server_hostname=NAME)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await to_server.send(outgoing.read())
                incoming.write(await from_server.receive())
        to_server.items.send_nowait(outgoing.read())
        for piece in pieces:
            tls.write(piece)
            to_server.items.send_nowait(outgoing.read())
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        to_server.items.send_nowait(outgoing.read())
        await from_server.aclose()
        await to_server.aclose()

    async with TransportGroup() as group:
        stream = StapledByteStream(to_client, from_client)
        await together(client, lambda: connect(group, protocol, stream, certificates.server(), server_side=True))
        await protocol.wait_for("connection_lost")
        assert protocol.received == b"".join(pieces)
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]
        assert protocol.exception is None


async def test_peer_that_floods_after_its_close_notify(anyio_backend: Any, certificates: Certificates) -> None:
    # Our own `close_notify` cannot be sent yet: data that comes until then must not pile up in memory.
    space = 1000
    protocol, peer = Recorder(), Recorder()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = certificates.client(version="1.3").wrap_bio(incoming, outgoing, server_hostname=NAME)

    async def client() -> None:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.transport.write(outgoing.read())
                await peer.wait_until(lambda: peer.received)
                incoming.write(bytes(peer.received))
                peer.received.clear()
        peer.transport.write(outgoing.read())

    async with TransportGroup() as group:
        await memory_connection(group, lambda: protocol, lambda: peer, buffer_size=space)
        protocol.transport.pause_reading()  # The client may run first: the bytes belong to the handshake.
        transport, _ = await together(
            lambda: group.start_tls(protocol.transport, protocol, certificates.server(), server_side=True), client
        )
        transport.write(b"x")
        while True:
            try:
                assert tls.read(1) == b"x"
                break
            except ssl.SSLWantReadError:
                await until(lambda: peer.received)
                incoming.write(bytes(peer.received))
                peer.received.clear()
        peer.transport.pause_reading()
        overhead = 22  # Of one record.
        transport.write(bytes(space - overhead))
        assert transport.get_write_buffer_size() == 0
        transport.close()
        with pytest.raises(ssl.SSLWantReadError):
            tls.unwrap()
        peer.transport.write(outgoing.read() + bytes(10 * space))
        await settle(group)
        assert not protocol.lost
        assert peer.transport.get_write_buffer_size() >= 5 * space
        peer.transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        await peer.wait_for("connection_lost")


class Breaking(ByteStream):
    """A wrapper of a stream whose `send` fails from some time on."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self.broken = False

    async def send(self, item: bytes) -> None:
        if self.broken:
            raise anyio.BrokenResourceError from BrokenPipeError(errno.EPIPE, "nobody there")
        await self.stream.send(item)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self.stream.receive(max_bytes)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


@pytest.mark.parametrize("layers", [1, 2])
async def test_stream_that_breaks_during_the_shutdown(
    anyio_backend: Any, certificates: Certificates, layers: int
) -> None:
    client, server = Recorder(), Recorder()
    async with TransportGroup() as group, memory_pair() as (a, b):
        breaking = Breaking(a)
        await group.connect_stream(lambda: client, breaking)
        await group.connect_stream(lambda: server, b)

        async def upgrade(protocol: Recorder, context: ssl.SSLContext, **options: Any) -> None:
            protocol.transport = await group.start_tls(protocol.transport, protocol, context, **options)

        for _ in range(layers):
            await together(
                lambda: upgrade(server, certificates.server(), server_side=True),
                lambda: upgrade(client, certificates.client(), server_hostname=NAME),
            )
        server.transport.write(b"x")  # After the session tickets, so that nothing is in flight any more.
        await client.wait_received(1)
        breaking.broken = True
        client.transport.close()
        await client.wait_for("connection_lost")
        assert isinstance(client.exception, BrokenPipeError)
        server.transport.abort()
        await server.wait_for("connection_lost")


# -- handshakes that fail ---------------------------------------------------------------------------------


async def test_certificate_that_is_refused(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    errors: list[BaseException] = []

    async def end(stream: ByteStream, context: ssl.SSLContext, **options: Any) -> None:
        try:
            await connect(group, Recorder(), stream, context, **options)
        except Exception as exc:
            errors.append(exc)

    async with TransportGroup() as group, pair as (a, b):
        with anyio.fail_after(GUARD):
            await together(
                lambda: end(a, certificates.client(), server_hostname="other.example"),
                lambda: end(b, certificates.server(), server_side=True),
            )
        kinds = [type(error) for error in errors]
        assert ssl.SSLCertVerificationError in kinds
        # The other end gets the alert before the stream is closed.
        assert any("ALERT" in str(error) for error in errors)


async def test_peer_that_disconnects_during_the_handshake(
    anyio_backend: Any, certificates: Certificates, pair: Any
) -> None:
    async with TransportGroup() as group, pair as (a, b):

        async def leave() -> None:
            await b.receive()
            await b.aclose()

        with anyio.fail_after(GUARD), pytest.raises(ConnectionResetError):
            await together(lambda: connect(group, Recorder(), a, certificates.client()), leave)


class NoReceiver(ByteStream):
    """The data is never received, which only sending notices."""

    async def send(self, item: bytes) -> None:
        raise anyio.BrokenResourceError from BrokenPipeError(errno.EPIPE, "nobody there")

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True


async def test_peer_that_disconnected_before_the_handshake(anyio_backend: Any, certificates: Certificates) -> None:
    # A broken pipe counts as a connection reset too: which of the two comes is chance.
    stream = NoReceiver()
    async with TransportGroup() as group:
        with anyio.fail_after(GUARD), pytest.raises(ConnectionResetError) as caught:
            await connect(group, Recorder(), stream, certificates.client())
        assert isinstance(caught.value.__cause__, BrokenPipeError)
    assert stream.closed


class Refusing(ByteStream):
    """A server sends an alert and closes; a sender notices the close before the alert has arrived."""

    def __init__(self, context: ssl.SSLContext, words: str) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.words = words
        self.left = anyio.Event()

    async def send(self, item: bytes) -> None:
        self.incoming.write(item)
        with pytest.raises(ssl.SSLError):
            self.tls.do_handshake()
        self.left.set()
        raise anyio.BrokenResourceError from ConnectionResetError(errno.ECONNRESET, "gone")

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await self.left.wait()
        await turns(20)
        if self.words == "broken":
            raise anyio.BrokenResourceError
        alert = self.outgoing.read(1 if self.words == "bytewise" else max_bytes)
        if not alert or self.words == "none":
            raise anyio.EndOfStream
        return alert

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("words", ["at once", "bytewise", "none", "broken"])
async def test_the_last_data_of_a_peer_that_has_disconnected(
    anyio_backend: Any, certificates: Certificates, words: str
) -> None:
    server = certificates.server()
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    client = certificates.client()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    stream = Refusing(server, words)
    has_alert = words in {"at once", "bytewise"}
    async with TransportGroup() as group:
        with anyio.fail_after(GUARD), pytest.raises(ssl.SSLError if has_alert else ConnectionResetError) as caught:
            await connect(group, Recorder(), stream, client)
    # The alert, if it arrived; otherwise the sender's first error, which has the cause.
    assert ("ALERT" if has_alert else "gone") in str(caught.value)
    assert stream.closed


async def test_peer_that_stays_silent(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    async with TransportGroup() as group, pair as (a, b):
        with anyio.fail_after(GUARD), pytest.raises(ConnectionAbortedError):
            await connect(group, Recorder(), a, certificates.client(), ssl_handshake_timeout=0.05)
        with anyio.fail_after(GUARD):  # The stream is closed.
            await drain(b)


async def drain(stream: ByteReceiveStream) -> None:
    try:
        while True:
            await stream.receive()
    except (anyio.EndOfStream, anyio.BrokenResourceError):
        pass


async def test_cancelled_handshake(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    async with TransportGroup() as group, pair as (a, b):
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await b.receive()
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                await connect(group, Recorder(), a, certificates.client())
        with anyio.fail_after(GUARD):
            await drain(b)


async def test_leaving_the_group_ends_a_handshake(anyio_backend: Any, certificates: Certificates, pair: Any) -> None:
    errors: list[BaseException] = []

    async def client(group: TransportGroup, stream: ByteStream) -> None:
        try:
            await connect(group, Recorder(), stream, certificates.client())
        except RuntimeError as exc:
            errors.append(exc)

    async with pair as (a, b), anyio.create_task_group() as tasks:
        async with TransportGroup() as group:
            tasks.start_soon(client, group, a)
            with anyio.fail_after(GUARD):
                await b.receive()
            await turns()
        with anyio.fail_after(GUARD):
            await drain(b)
    (error,) = errors
    assert "not open any more" in str(error)


async def test_parameters_that_are_refused(anyio_backend: Any, certificates: Certificates) -> None:
    context = certificates.client()
    async with TransportGroup() as group, memory_pair() as (a, b):
        for options, error in (
            ({"ssl": context}, ValueError),  # Which name?
            ({"ssl": True}, ValueError),
            ({"server_hostname": NAME}, ValueError),
            ({"ssl_handshake_timeout": 1.0}, ValueError),
            ({"ssl_shutdown_timeout": 1.0}, ValueError),
            ({"server_side": True}, TypeError),
            ({"server_side": True, "ssl": True}, TypeError),
            ({"server_side": True, "ssl": context, "server_hostname": NAME}, ValueError),
            ({"ssl": context, "server_hostname": NAME, "ssl_handshake_timeout": 0}, ValueError),
            ({"ssl": context, "server_hostname": NAME, "ssl_handshake_timeout": float("nan")}, ValueError),
            ({"ssl": context, "server_hostname": NAME, "ssl_shutdown_timeout": float("nan")}, ValueError),
            ({"ssl": context, "server_hostname": ".example"}, ValueError),
            ({"ssl": context, "server_hostname": ""}, ValueError),  # It is to check the name.
            ({"ssl": context, "server_side": True}, ValueError),
            ({"ssl": certificates.server(), "server_hostname": NAME}, ssl.SSLError),
        ):
            with pytest.raises(error):
                await group.connect_stream(Recorder, a, **options)  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.send, b"left alone")
            assert await b.receive() == b"left alone"
        sender, receiver = one_way(1)
        async with sender, receiver:
            for stream in (sender, receiver):
                with pytest.raises(TypeError, match="TLS needs a ByteStream"):
                    await group.connect_stream(Recorder, stream, ssl=context, server_hostname=NAME)
            await sender.send(b"left alone")
            assert await receiver.receive() == b"left alone"
