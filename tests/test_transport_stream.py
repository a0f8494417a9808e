"""Transports as AnyIO streams: one suite for every kind of transport, then what only some of them have."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import anyio.lowlevel
import httpcore
import pytest
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSAttribute, TLSStream
from network import needs_pipes
from stream_pairs import EVERY, HALF_CLOSING, TWO_WAY, Ends
from support import GUARD, HOST, Recorder, connected, fill, pattern, turns, until
from tls_support import NAME, Certificates

from transports_anyio import BufferedProtocol, Protocol, SubprocessProtocol, TransportGroup, TransportStream
from transports_anyio.testing import SubprocessRecorder

pytestmark = pytest.mark.anyio

every_kind = pytest.mark.parametrize("kind", EVERY)
two_way = pytest.mark.parametrize("kind", TWO_WAY)
half_closing = pytest.mark.parametrize("kind", HALF_CLOSING)


@asynccontextmanager
async def ends(kind: str, certificates: Certificates) -> AsyncIterator[Ends]:
    """Two ends of a connection; the first can send to the second."""
    async with TransportGroup() as group:
        with anyio.fail_after(4 * GUARD):
            async with EVERY[kind](group, certificates) as pair:
                yield pair
                for stream in pair:
                    await close_now(stream)


async def close_now(stream: TransportStream) -> None:
    stream.transport.abort()
    with anyio.CancelScope(shield=True):
        await stream.aclose()


def waiting(stream: TransportStream) -> int:
    """How many bytes have arrived that `receive` has not returned yet."""
    return stream._bridge.size


async def receive_exactly(stream: TransportStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += await stream.receive()
    return bytes(data)


# -- every kind


@every_kind
async def test_send_and_receive(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"hello")
        assert await b.receive() == b"hello"
        await a.send(b"")
        await a.send(bytearray(b"0123456789"))  # type: ignore[arg-type]
        assert await b.receive(3) == b"012"
        assert await b.receive(1) == b"3"
        assert await receive_exactly(b, 6) == b"456789"
        if kind in TWO_WAY:
            await b.send(b"back")
            assert await a.receive() == b"back"


@every_kind
async def test_receive_waits(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    got: list[bytes] = []
    async with ends(kind, certificates) as (a, b):

        async def receive() -> None:
            got.append(await b.receive())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await turns()
            assert got == []
            await a.send(b"x")
        assert got == [b"x"]


@every_kind
async def test_the_end_of_the_stream(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"the last")
        await a.aclose()
        assert await b.receive() == b"the last"
        for _ in range(3):
            with pytest.raises(anyio.EndOfStream):
                await b.receive()


@every_kind
async def test_made_in_get_buffer(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    made: list[TransportStream] = []

    class Handing(BufferedProtocol):
        def get_buffer(self, sizehint: int) -> bytearray:
            made.append(TransportStream(b.transport))
            return bytearray(10)

    async with ends(kind, certificates) as (a, b):
        b.transport.set_protocol(Handing())
        await a.send(pattern(1000))
        await until(lambda: made)
        (stream,) = made
        assert await receive_exactly(stream, 1000) == pattern(1000)


@every_kind
async def test_made_in_connection_lost(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    made: list[TransportStream] = []

    class Late(Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            made.append(TransportStream(b.transport, received=b"rest"))

    async with ends(kind, certificates) as (_, b):
        b.transport.set_protocol(Late())
        b.transport.abort()
        await b.transport.wait_closed()
        (stream,) = made
        assert await stream.receive() == b"rest"
        for _ in range(2):
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()
            with pytest.raises(anyio.BrokenResourceError):
                await stream.send(b"x")
        await stream.aclose()


@every_kind
async def test_a_bad_number_of_bytes_loses_nothing(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"hello")
        await until(lambda: waiting(b) == 5)
        for wrong in (1.5, "1"):
            with pytest.raises(TypeError):
                await b.receive(wrong)  # type: ignore[arg-type]
        assert await b.receive(3) == b"hel"
        assert await b.receive() == b"lo"


@two_way
@pytest.mark.parametrize("size", [5, 300_000], ids=["", "paused"])
async def test_a_refused_start_tls_loses_nothing(
    anyio_backend: Any, kind: str, certificates: Certificates, size: int
) -> None:
    async with ends(kind, certificates) as (a, b):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.send, pattern(size))
            await until(lambda: waiting(b) == size or not b.transport.is_reading())
            with pytest.raises(ValueError, match="server_hostname"):
                await b.start_tls(certificates.client())
            with pytest.raises(TypeError):
                await b.start_tls(None)  # type: ignore[arg-type]
            assert await receive_exactly(b, size) == pattern(size)
        await a.send(b"later")
        assert await b.receive() == b"later"


@every_kind
async def test_a_closed_stream(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"never received")
        await until(lambda: waiting(b))
        await b.aclose()
        await a.aclose()
        await a.aclose()
        for stream in (a, b):
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()
            with pytest.raises(anyio.ClosedResourceError):
                await stream.send(b"x")
            with pytest.raises(anyio.ClosedResourceError):
                await stream.send_eof()


@every_kind
async def test_aclose_ends_the_calls_of_other_tasks(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    ended: list[str] = []
    async with ends(kind, certificates) as (a, b):

        async def receive() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await b.receive()
            ended.append("receive")

        async def send() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                while True:
                    await a.send(bytes(65536))
            ended.append("send")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await turns()
            await close_now(b)
        assert ended == ["receive"]
    async with ends(kind, certificates) as (a, b):
        b.transport.pause_reading()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await until(a.transport.is_writing_paused)
            await anyio.aclose_forcefully(a)
        assert ended == ["receive", "send"]


@every_kind
async def test_a_broken_connection(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        a.transport.abort()
        with pytest.raises(anyio.BrokenResourceError):
            await a.send(b"x")
        await turns()
        with pytest.raises(anyio.BrokenResourceError):
            await a.send(b"x")
        b.transport.abort()
        await turns()
        with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
            await b.receive()


@every_kind
async def test_sending_to_an_end_that_is_gone(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        b.transport.abort()
        with pytest.raises(anyio.BrokenResourceError):
            while True:
                await a.send(bytes(65536))


@every_kind
async def test_sending_while_the_transport_is_closing(
    anyio_backend: Any, kind: str, certificates: Certificates
) -> None:
    """What still has something to send takes more, if its kind does, and then it arrives; else the call raises."""
    async with ends(kind, certificates) as (a, b):
        a.transport.set_write_buffer_limits(high=1 << 30)
        b.transport.pause_reading()
        size = 0
        while not a.transport.get_write_buffer_size():
            await a.send(bytes(65536))
            size += 65536
        a.transport.close()
        try:
            await a.send(b"last")
        except anyio.BrokenResourceError:
            pass
        else:
            size += len(b"last")
        b.transport.resume_reading()
        received = [len(chunk) async for chunk in b]
        assert sum(received) == size
        await a.transport.wait_closed()
        with pytest.raises(anyio.BrokenResourceError):
            await a.send(b"too late")


@every_kind
async def test_a_large_send_while_the_transport_is_closing(
    anyio_backend: Any, kind: str, certificates: Certificates
) -> None:
    """It waits until it is sent, or raises at once."""
    sent = 0
    async with ends(kind, certificates) as (a, b):

        async def send() -> None:
            nonlocal sent
            try:
                await a.send(bytes(1 << 20))
            except anyio.BrokenResourceError:
                return
            sent += 1 << 20

        b.transport.pause_reading()
        while not a.transport.get_write_buffer_size():
            a.transport.write(bytes(4096))
            sent += 4096
        a.transport.close()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await turns()
            b.transport.resume_reading()
            received = sum([len(chunk) async for chunk in b])
        assert received == sent


@every_kind
async def test_a_receive_that_is_closed_and_not_cancelled(
    anyio_backend: Any, kind: str, certificates: Certificates
) -> None:
    """As by an interpreter of coroutines of one's own. Data that arrives later wakes nobody."""

    class OneStep:
        def __await__(self) -> Any:
            waiting = b.receive()
            step = waiting.send(None)
            waiting.close()
            return step
            yield

    async with ends(kind, certificates) as (a, b):
        await OneStep()
        await a.send(b"data")
        await turns()
        assert await b.receive() == b"data"


@every_kind
async def test_busy(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.receive)
            await turns()
            with pytest.raises(anyio.BusyResourceError, match="reading from"):
                await b.receive()
            with pytest.raises(anyio.BusyResourceError):
                await b.start_tls(certificates.client())
            await a.send(b"x")
        b.transport.pause_reading()
        async with anyio.create_task_group() as tasks:

            async def send() -> None:
                while True:
                    await a.send(bytes(65536))

            tasks.start_soon(send)
            await until(a.transport.is_writing_paused)
            with pytest.raises(anyio.BusyResourceError, match="writing to"):
                await a.send(b"x")
            with pytest.raises(anyio.BusyResourceError, match="writing to"):
                await a.send_eof()
            tasks.cancel_scope.cancel()


@every_kind
async def test_a_cancelled_receive_loses_nothing(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    data = pattern(200_000)
    received = bytearray()
    async with ends(kind, certificates) as (a, b), anyio.create_task_group() as tasks:
        tasks.start_soon(a.send, data)
        count = 0
        while len(received) < len(data):
            count += 1
            with anyio.CancelScope() as scope:

                async def cancel_soon(scope: anyio.CancelScope = scope, delay: int = count % 4) -> None:
                    await turns(delay)
                    scope.cancel()

                tasks.start_soon(cancel_soon)
                received += await b.receive(1000)
        assert received == data


@every_kind
async def test_a_cancelled_scope_is_noticed_by_every_call(
    anyio_backend: Any, kind: str, certificates: Certificates
) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"waiting")
        await until(lambda: waiting(b))
        for call in (b.receive, lambda: a.send(b"not sent"), a.send_eof):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        assert await b.receive() == b"waiting"
        await a.send(b"after")
        assert await b.receive() == b"after"


@every_kind
async def test_calls_that_need_not_wait_let_other_tasks_run(
    anyio_backend: Any, kind: str, certificates: Certificates
) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(bytes(1000))
        await until(lambda: waiting(b) == 1000)
        ran: list[int] = []

        async def other() -> None:
            while True:
                ran.append(1)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            for _ in range(1000):
                assert len(await b.receive(1)) == 1
            assert len(ran) >= 20
            ran.clear()
            for _ in range(1000):
                await a.send(b"x")
            assert len(ran) >= 20
            tasks.cancel_scope.cancel()


@every_kind
async def test_sending_waits_for_the_receiver(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    """Memory is bounded on both sides, and nothing is lost or exchanged."""
    block = pattern(100_000)
    async with ends(kind, certificates) as (a, b):
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < 100:
                await a.send(block)
                sent += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await until(a.transport.is_writing_paused)
            await turns(100)
            before = sent
            assert before < 100
            assert a.transport.get_write_buffer_size() <= 64 * 1024 + len(block)
            assert waiting(b) <= 2 * 256 * 1024
            for _ in range(100):
                assert await receive_exactly_of(b, len(block)) == block
        assert sent == 100


async def receive_exactly_of(stream: TransportStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += await stream.receive(min(size - len(data), 30_000))
    return bytes(data)


@every_kind
async def test_bad_arguments_change_nothing(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        for bad in (0, -1):
            with pytest.raises(ValueError, match="max_bytes"):
                await b.receive(bad)
        with pytest.raises(TypeError):
            await a.send("text")  # type: ignore[arg-type]
        await a.send(b"x")
        assert await b.receive() == b"x"


@every_kind
async def test_a_buffered_stream_on_top(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        buffered = BufferedByteReceiveStream(b)
        await a.send(b"first line\nsecond")
        await a.send(b" line\nfive!rest")
        assert await buffered.receive_until(b"\n", 100) == b"first line"
        assert await buffered.receive_until(b"\n", 100) == b"second line"
        assert await buffered.receive_exactly(5) == b"five!"
        assert await buffered.receive() == b"rest"


@every_kind
async def test_iteration(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"one")
        await a.aclose()
        assert b"".join([chunk async for chunk in b]) == b"one"


# -- two-way kinds


async def test_a_subclass_with_its_own_receive(anyio_backend: Any, certificates: Certificates) -> None:
    """Iteration calls it, as that of every stream of AnyIO's does."""

    class Upper(TransportStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            return (await super().receive(max_bytes)).upper()

    async with ends("tcp", certificates) as (a, b):
        stream = Upper(b.transport)
        await a.send(b"data")
        await a.send_eof()
        assert b"".join([chunk async for chunk in stream]) == b"DATA"


@half_closing
async def test_send_eof(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        await a.send(b"question")
        await a.send_eof()
        with pytest.raises(anyio.ClosedResourceError):
            await a.send(b"more")
        assert b"".join([chunk async for chunk in b]) == b"question"
        await b.send(b"answer")
        assert await a.receive() == b"answer"
        await b.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await a.receive()
        await a.aclose()
        await b.aclose()


@pytest.mark.parametrize("kind", ["tls", "started_tls"])
async def test_send_eof_is_not_for_tls(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        with pytest.raises(NotImplementedError):
            await a.send_eof()
        await a.send(b"still open")
        assert await b.receive() == b"still open"


@two_way
async def test_aclose_flushes(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    data = pattern(300_000)
    got = bytearray()
    async with ends(kind, certificates) as (a, b):

        async def receive() -> None:
            async for chunk in b:
                got.extend(chunk)

        async with anyio.create_task_group() as tasks:
            a.transport.write(data)
            tasks.start_soon(receive)
            await a.aclose()
            assert a.transport.get_protocol() is None  # `connection_lost` has been delivered.
        assert got == data


@two_way
async def test_a_cancelled_aclose_drops_what_is_buffered(
    anyio_backend: Any, kind: str, certificates: Certificates
) -> None:
    async with ends(kind, certificates) as (a, b):
        b.transport.pause_reading()
        fill(a.transport, 100_000)
        with anyio.move_on_after(0.01) as scope:
            await a.aclose()
        assert scope.cancelled_caught
        await until(lambda: a.transport.get_protocol() is None)


@two_way
async def test_tls_of_anyio_on_top(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    async with ends(kind, certificates) as (a, b):
        data = pattern(500_000)

        async def serve() -> None:
            server = await TLSStream.wrap(
                b, server_side=True, ssl_context=certificates.server(), standard_compatible=False
            )
            async with server:
                async for chunk in server:
                    await server.send(chunk)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            client = await TLSStream.wrap(
                a, hostname=NAME, ssl_context=certificates.client(), standard_compatible=False
            )
            tasks.start_soon(client.send, data)
            got = bytearray()
            while len(got) < len(data):
                got += await client.receive()
            assert got == data
            await client.aclose()


@two_way
async def test_much_data_both_ways(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    await exchange(kind, certificates, 8 << 20 if kind in ("memory", "anyio_stream") else 16 << 20)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["tcp", "unix", "tls"])
async def test_1_gib_both_ways(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    if kind not in TWO_WAY:
        pytest.skip("this system has none")
    await exchange(kind, certificates, 1 << 30)


async def exchange(kind: str, certificates: Certificates, size: int) -> None:
    block = pattern(1 << 20)
    highest = 0
    async with TransportGroup() as group, TWO_WAY[kind](group, certificates) as pair:

        async def send(stream: TransportStream) -> None:
            for _ in range(size // len(block)):
                await stream.send(block)

        async def receive(stream: TransportStream) -> None:
            nonlocal highest
            count = 0
            while count < size:
                here = count % len(block)
                chunk = await stream.receive(len(block) - here)
                assert chunk == block[here : here + len(chunk)]
                count += len(chunk)
                highest = max(
                    highest,
                    waiting(stream),
                    stream.transport.get_write_buffer_size(),
                )

        async with anyio.create_task_group() as tasks:
            for stream in pair:
                tasks.start_soon(send, stream)
                tasks.start_soon(receive, stream)
        for stream in pair:
            await close_now(stream)
    assert highest <= len(block) + 64 * 1024


@pytest.mark.parametrize("kind", ["tcp", "tls", "started_tls", "unix"])
async def test_typed_attributes(anyio_backend: Any, kind: str, certificates: Certificates) -> None:
    if kind not in TWO_WAY:
        pytest.skip("this system has none")
    async with ends(kind, certificates) as (a, b):
        assert a.extra(SocketAttribute.remote_address) == b.extra(SocketAttribute.local_address)
        sock = a.transport.get_extra_info("socket")
        assert a.extra(SocketAttribute.family) == sock.family
        assert a.extra(SocketAttribute.raw_socket).fileno() == sock.fileno()
        if kind == "unix":
            with pytest.raises(anyio.TypedAttributeLookupError):
                a.extra(SocketAttribute.remote_port)
        else:
            assert a.extra(SocketAttribute.remote_address) == sock.getpeername()[:2]
            assert a.extra(SocketAttribute.local_port) == sock.getsockname()[1]
            assert a.extra(SocketAttribute.remote_port) == b.extra(SocketAttribute.local_port)
        if kind.endswith("tls"):
            assert isinstance(a.extra(TLSAttribute.ssl_object), ssl.SSLObject)
            assert a.extra(TLSAttribute.tls_version) == "TLSv1.3"
            assert a.extra(TLSAttribute.cipher) == a.transport.get_extra_info("cipher")
            assert not a.extra(TLSAttribute.server_side)
            assert b.extra(TLSAttribute.server_side)
            assert b.extra(TLSAttribute.shared_ciphers)
            assert a.extra(TLSAttribute.shared_ciphers) is None
            assert a.extra(TLSAttribute.alpn_protocol) is None
            assert ("DNS", NAME) in a.extra(TLSAttribute.peer_certificate)["subjectAltName"]  # type: ignore[index]
            assert a.extra(TLSAttribute.peer_certificate_binary)
            assert a.extra(TLSAttribute.standard_compatible) is False
            a.extra(TLSAttribute.channel_binding_tls_unique)
        else:
            with pytest.raises(anyio.TypedAttributeLookupError):
                a.extra(TLSAttribute.ssl_object)


async def test_addresses_of_ipv6_are_host_and_port(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        try:
            server = await group.create_server(Protocol, "::1", 0)
        except OSError:
            pytest.skip("no IPv6")
        transport, _ = await group.create_connection(Protocol, *server.sockets[0].getsockname()[:2])
        assert TransportStream(transport).extra(SocketAttribute.remote_address) == server.sockets[0].getsockname()[:2]


# -- taking a connection over


class HandsOver(Recorder):
    """Read one line, then hand the connection over with what came behind it."""

    stream: TransportStream | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        _line, found, rest = bytes(self.received).partition(b"\n")
        if found:
            self.stream = TransportStream(self.transport, rest)

    def check_finished(self) -> None:
        """Nothing: this one's `connection_lost` goes to the stream."""


async def test_in_the_middle_of_a_connection_with_bytes_in_hand(anyio_backend: Any) -> None:
    protocol = HandsOver()
    async with TransportGroup() as group, connected(group, protocol) as (transport, _, peer):
        await peer.send(b"upgrade\nbinary")
        await until(lambda: protocol.stream)
        stream = protocol.stream
        assert stream is not None
        assert stream.transport is transport
        await peer.send(b" data")
        assert await stream.receive() == b"binary"
        assert await stream.receive() == b" data"
        await stream.send(b"answer")
        assert await peer.receive() == b"answer"
        assert protocol.received == b"upgrade\nbinary"
        await stream.aclose()
    assert "connection_lost" not in protocol.names


async def test_while_writing_and_reading_are_paused(anyio_backend: Any) -> None:
    protocol = HandsOver()
    async with TransportGroup() as group, connected(group, protocol, small=True) as (transport, _, peer):
        written = fill(transport, 100_000)
        transport.pause_reading()
        stream = TransportStream(transport, received=memoryview(b"before"))
        with anyio.move_on_after(0.01) as scope:
            await stream.send(b"after")
        assert scope.cancelled_caught
        await peer.send(b" and behind")
        assert await stream.receive() == b"before"
        assert await stream.receive() == b" and behind"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, b"after")
            assert await peer.receive_exactly(written) == bytes(written)
            assert await peer.receive_exactly(5) == b"after"
        await stream.aclose()


@pytest.mark.parametrize("keep_open", [True, False])
async def test_after_an_end_of_file(anyio_backend: Any, keep_open: bool) -> None:
    protocol = HandsOver(on_eof_received=lambda _: keep_open)
    async with TransportGroup() as group, connected(group, protocol) as (transport, _, peer):
        await peer.send(b"line")
        peer.shutdown()
        await protocol.wait_for("eof_received")
        stream = TransportStream(transport, bytes(protocol.received))
        assert await stream.receive() == b"line"
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        if keep_open:
            await stream.send(b"answer")
            assert await peer.receive() == b"answer"
        else:
            with pytest.raises(anyio.BrokenResourceError):
                await stream.send(b"answer")
        await stream.aclose()


async def test_of_a_connection_that_is_lost(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group) as (transport, protocol, _):
        transport.abort()
        await protocol.wait_for("connection_lost")
        stream = TransportStream(transport, b"rest")
        assert await stream.receive() == b"rest"
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
        with pytest.raises(anyio.BrokenResourceError):
            await stream.send(b"x")
        await stream.aclose()


async def test_a_reset_is_the_cause_of_the_error(anyio_backend: Any) -> None:
    protocol = HandsOver()
    async with TransportGroup() as group, connected(group, protocol) as (transport, _, peer):
        stream = TransportStream(transport)
        peer.reset()
        with pytest.raises(anyio.BrokenResourceError) as caught:
            await stream.receive()
        assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_what_is_not_a_stream_transport_is_refused(anyio_backend: Any, certificates: Certificates) -> None:
    protocol = HandsOver()
    async with TransportGroup() as group, connected(group, protocol) as (transport, _, peer):
        datagrams, _ = await group.create_datagram_endpoint(asyncio_datagrams, local_addr=(HOST, 0))
        for bad in (None, peer, datagrams):
            with pytest.raises(TypeError, match="stream transport"):
                TransportStream(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="received"):
            TransportStream(transport, "text")  # type: ignore[arg-type]
        assert transport.get_protocol() is protocol
        datagrams.close()
        transport.abort()
        TransportStream(transport)


def asyncio_datagrams() -> Any:
    from transports_anyio import DatagramProtocol

    return DatagramProtocol()


async def test_a_transport_that_start_tls_has_replaced_is_refused(
    anyio_backend: Any, certificates: Certificates
) -> None:
    async with ends("tcp", certificates) as (a, b):
        before = a.transport
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: b.start_tls(certificates.server(), server_side=True))
            await a.start_tls(certificates.client(), server_hostname=NAME)
        assert a.transport is not before
        with pytest.raises(RuntimeError, match="start_tls"):
            TransportStream(before)


async def test_start_tls_takes_what_has_arrived_to_the_handshake(
    anyio_backend: Any, certificates: Certificates
) -> None:
    """A client that sends its part of the handshake without waiting for the server's answer."""
    async with ends("tcp", certificates) as (a, b):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: a.start_tls(certificates.client(), server_hostname=NAME))
            await until(lambda: waiting(b))
            await b.start_tls(certificates.server(), server_side=True)
        await a.send(b"secret")
        assert await b.receive() == b"secret"


async def test_start_tls_that_fails_breaks_the_stream(anyio_backend: Any, certificates: Certificates) -> None:
    async with ends("tcp", certificates) as (a, b):
        await a.send(b"this is not TLS")
        await until(lambda: waiting(b))
        with pytest.raises(ssl.SSLError):
            await b.start_tls(certificates.server(), server_side=True)
        with pytest.raises(anyio.BrokenResourceError):
            await b.receive()
        with pytest.raises(anyio.BrokenResourceError):
            await b.start_tls(certificates.server(), server_side=True)


async def test_the_end_of_the_group_ends_the_stream(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group, HandsOver()) as (transport, _, _peer):
        stream = TransportStream(transport)
        ended: list[str] = []

        async def receive() -> None:
            with pytest.raises(anyio.BrokenResourceError):
                await stream.receive()
            ended.append("broken")

        group.start_soon(receive)
        await turns()
    assert ended == ["broken"]


async def test_two_streams_of_one_transport(anyio_backend: Any) -> None:
    """The second takes over from the first."""
    async with TransportGroup() as group, connected(group, HandsOver()) as (transport, _, peer):
        TransportStream(transport)
        second = TransportStream(transport)
        await peer.send(b"x")
        assert await second.receive() == b"x"
        await second.aclose()


# -- libraries


async def test_httpcore_on_top(anyio_backend: Any, certificates: Certificates) -> None:
    """An HTTP client over a connection that a protocol has made."""
    requests: list[bytes] = []

    async def serve(stream: TransportStream) -> None:
        buffered = BufferedByteReceiveStream(stream)
        for number in range(3):
            requests.append(await buffered.receive_until(b"\r\n\r\n", 65536))
            body = b"answer %d" % number
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with ends("tcp", certificates) as (a, b), anyio.create_task_group() as tasks:
        tasks.start_soon(serve, b)
        async with httpcore.AsyncConnectionPool(network_backend=OneConnection(a)) as pool:
            for number in range(3):
                response = await pool.request("GET", "http://localhost/")
                assert response.content == b"answer %d" % number
    assert len(requests) == 3
    assert all(request.startswith(b"GET / HTTP/1.1\r\n") for request in requests)


class OneConnection(httpcore.AsyncNetworkBackend):
    def __init__(self, stream: TransportStream) -> None:
        self.stream = stream

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return Network(self.stream)


class Network(httpcore.AsyncNetworkStream):
    def __init__(self, stream: TransportStream) -> None:
        self.stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with anyio.fail_after(timeout):
            try:
                return await self.stream.receive(max_bytes)
            except anyio.EndOfStream:
                return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with anyio.fail_after(timeout):
            await self.stream.send(buffer)

    async def aclose(self) -> None:
        await self.stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return None


# -- pipes and children


@needs_pipes
async def test_the_other_direction_of_a_pipe(anyio_backend: Any, certificates: Certificates) -> None:
    async with ends("pipe", certificates) as (a, b):
        with pytest.raises(NotImplementedError):
            await a.receive()
        with pytest.raises(NotImplementedError):
            await b.send(b"x")
        with pytest.raises(NotImplementedError):
            await b.send_eof()
        await a.send(b"x")
        assert await b.receive() == b"x"
        await a.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await b.receive()


@needs_pipes
async def test_the_pipes_of_a_child(anyio_backend: Any) -> None:
    program = "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer); sys.stderr.write('done')"
    data = pattern(1_000_000)
    async with TransportGroup() as group:
        transport, recorder = await group.subprocess_exec(
            lambda: SubprocessRecorder(SubprocessProtocol()), sys.executable, "-c", program
        )
        stdin, stdout = (TransportStream(cast("Any", transport.get_pipe_transport(fd))) for fd in (0, 1))

        async def feed() -> None:
            for start in range(0, len(data), 50_000):
                await stdin.send(data[start : start + 50_000])
            await stdin.aclose()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed)
            got = b"".join([chunk async for chunk in stdout])
        assert got == data
        with anyio.fail_after(GUARD):
            await recorder.wait_for("connection_lost")
    recorder.check()
    assert sorted(call[1] for call in recorder.calls if call[0] == "pipe_connection_lost") == [0, 1, 2]
    assert [call[1] for call in recorder.calls if call[0] == "pipe_data_received"] == [2]
    assert recorder.count("process_exited") == 1
    assert recorder.count("pause_writing") == recorder.count("resume_writing") >= 1
    assert transport.get_returncode() == 0


@needs_pipes
async def test_a_childs_pipe_that_is_taken_over_while_it_is_paused(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, recorder = await group.subprocess_exec(
            lambda: SubprocessRecorder(SubprocessProtocol()),
            sys.executable, "-c", "import sys; sys.stdin.readline(); sys.stdin.buffer.read()", stdout=None, stderr=None,
        )  # fmt: skip
        pipe = transport.get_pipe_transport(0)
        fill(pipe, 100_000)
        assert recorder.names[-1] == "pause_writing"
        assert pipe is not None
        stdin = TransportStream(pipe)
        await turns()
        assert recorder.count("pause_writing") == 1
        await stdin.send(b"\n")
        assert recorder.names[-1] == "resume_writing"
        await stdin.aclose()
        with anyio.fail_after(GUARD):
            await recorder.wait_for("connection_lost")
    recorder.check()
    assert recorder.count("pause_writing") == recorder.count("resume_writing")


@needs_pipes
async def test_a_socket_given_as_a_pipe(anyio_backend: Any) -> None:
    a, b = socket.socketpair()
    async with TransportGroup() as group:
        writing, _ = await group.connect_write_pipe(Protocol, a.makefile("wb", 0))
        a.close()
        stream = TransportStream(writing)
        await stream.send(b"x")
        assert b.recv(1) == b"x"
        b.close()
        with pytest.raises(anyio.BrokenResourceError):
            while True:
                await stream.send(b"x")
                await turns()
