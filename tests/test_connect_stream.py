"""`connect_stream`: a protocol on any AnyIO byte stream; the test drives the other end as a bare AnyIO stream."""

from __future__ import annotations

import os
import platform
import ssl
import subprocess
import sys
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trustme
from anyio.abc import ByteReceiveStream, ByteSendStream, ByteStream, SocketAttribute, UNIXSocketStream
from anyio.streams.stapled import StapledByteStream
from anyio_streams import (
    MemorySender,
    memory_pair,
    one_way,
    receive_all,
    receive_exactly,
    tcp_pair,
    tls_pair,
    unix_pair,
)
from network import needs_unix
from support import (
    GUARD,
    BufferedRecorder,
    Peer,
    Recorder,
    collect_contexts,
    leaves,
    listening,
    pattern,
    settle,
    turns,
    until,
)

from transports_anyio import TransportGroup, TransportSocket

pytestmark = pytest.mark.anyio


unix = pytest.param("unix", marks=needs_unix)


@pytest.fixture(params=["memory", "tcp", unix, "tls"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(kind: str, certificate_authority: trustme.CA) -> Any:
    pairs = {"memory": memory_pair, "tcp": tcp_pair, "unix": unix_pair, "tls": lambda: tls_pair(certificate_authority)}
    return pairs[kind]()


async def close_both(transport: Any, protocol: Any, theirs: ByteStream) -> None:
    """Close both ends: over TLS each waits for the other's close_notify."""
    transport.close()
    if isinstance(theirs, UNIXSocketStream):
        # AnyIO's stream on asyncio raises `InvalidStateError` if the end comes when it is being cancelled.
        await protocol.wait_for("connection_lost")
    with anyio.fail_after(GUARD):
        await theirs.aclose()
    await protocol.wait_for("connection_lost")


async def test_bytes_go_both_ways(anyio_backend: Any, pair: Any) -> None:
    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        assert protocol.calls == [("connection_made", transport)]
        await theirs.send(b"hello")
        assert await protocol.wait_received(5) == b"hello"
        transport.write(b"good ")
        transport.writelines([b"d", bytearray(b"a"), memoryview(b"y")])
        assert await receive_exactly(theirs, 8) == b"good day"
        await close_both(transport, protocol, theirs)
        assert protocol.exception is None


@pytest.mark.parametrize("protocol_class", [Recorder, BufferedRecorder])
async def test_bulk_in_both_directions_at_once(anyio_backend: Any, pair: Any, protocol_class: Any) -> None:
    size = 1 << 20
    there, back = pattern(size), pattern(size)[::-1]
    received = b""

    async def read(stream: ByteStream) -> None:
        nonlocal received
        received = await receive_exactly(stream, size)

    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(protocol_class, ours)
        async with anyio.create_task_group() as tasks:
            for start in range(0, size, 10_000):
                transport.write(there[start : start + 10_000])
            tasks.start_soon(read, theirs)
            await theirs.send(back)
        assert await protocol.wait_received(size) == back
        assert received == there
        await close_both(transport, protocol, theirs)


async def test_writing_is_paused_and_resumed(anyio_backend: Any, pair: Any) -> None:
    size = 8 << 20
    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        transport.write(bytes(size))
        assert protocol.names == ["connection_made", "pause_writing"]
        assert transport.get_write_buffer_size() == size
        assert await receive_exactly(theirs, size) == bytes(size)
        await protocol.wait_for("resume_writing")
        assert transport.get_write_buffer_size() <= 16 * 1024
        await close_both(transport, protocol, theirs)


async def test_a_bytearray_may_be_changed_after_write(anyio_backend: Any, pair: Any) -> None:
    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        data = bytearray(pattern(300_000))
        expected = bytes(data)
        transport.write(data)
        data[:] = bytes(len(data))
        data.clear()
        assert await receive_exactly(theirs, len(expected)) == expected
        await close_both(transport, protocol, theirs)


async def test_close_flushes(anyio_backend: Any, pair: Any) -> None:
    data = pattern(2 << 20)
    received = b""

    async def read(stream: ByteStream) -> None:
        nonlocal received
        received = await receive_all(stream)
        await stream.aclose()

    async with pair as (ours, theirs):
        async with TransportGroup() as group, anyio.create_task_group() as tasks:
            transport, protocol = await group.connect_stream(Recorder, ours)
            transport.write(data)
            transport.close()
            assert transport.is_closing()
            assert not protocol.lost
            tasks.start_soon(read, theirs)
        assert protocol.exception is None
        assert received == data


async def test_abort_drops_what_is_buffered(anyio_backend: Any, pair: Any) -> None:
    size = 32 << 20
    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        transport.write(bytes(size))
        transport.abort()
        assert transport.get_write_buffer_size() == 0
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert len(await receive_all(theirs)) < size


@pytest.mark.parametrize("peer", ["silent", "gone"])
async def test_a_tls_peer_that_never_answers_the_shutdown(
    anyio_backend: Any, certificate_authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, peer: str
) -> None:
    """A TLS stream sends `close_notify` and waits for the answer, for a limited time."""
    monkeypatch.setattr("transports_anyio._channels._anyio.CLOSE_TIMEOUT", 0.05)
    async with tls_pair(certificate_authority) as (ours, theirs):
        with anyio.fail_after(GUARD):
            async with TransportGroup() as group:
                contexts = collect_contexts(group)
                transport, protocol = await group.connect_stream(Recorder, ours)
                if peer == "gone":
                    await anyio.aclose_forcefully(theirs)
                transport.close()
                await protocol.wait_for("connection_lost")
        assert contexts == []
        assert peer == "gone" or protocol.exception is None
        if peer == "silent":
            await anyio.aclose_forcefully(theirs)


async def test_the_end_of_the_stream(anyio_backend: Any, pair: Any) -> None:
    async with pair as (ours, theirs), TransportGroup() as group:
        _, protocol = await group.connect_stream(Recorder, ours)
        await theirs.send(b"bye")
        await theirs.aclose()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]
        assert protocol.exception is None


@pytest.mark.parametrize("kind", ["memory", "tcp", unix])
async def test_half_close(anyio_backend: Any, pair: Any) -> None:
    protocol = Recorder(on_eof_received=lambda _: True)
    async with pair as (ours, theirs), TransportGroup() as group:
        transport, _ = await group.connect_stream(lambda: protocol, ours)
        assert transport.can_write_eof()
        await theirs.send(b"question")
        await theirs.send_eof()
        await protocol.wait_for("eof_received")
        assert not transport.is_closing()
        answer = pattern(1 << 20)
        transport.write(answer)
        transport.write_eof()
        assert await receive_all(theirs) == answer
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_write_eof_then_close(anyio_backend: Any) -> None:
    async with tcp_pair() as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        transport.write(b"all of it")
        transport.write_eof()
        transport.close()
        assert await receive_all(theirs) == b"all of it"
        await protocol.wait_for("connection_lost")


async def test_tls_has_no_half_close(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    protocol = Recorder(on_eof_received=lambda _: True)
    async with tls_pair(certificate_authority) as (ours, theirs), TransportGroup() as group:
        transport, _ = await group.connect_stream(lambda: protocol, ours)
        assert not transport.can_write_eof()
        with pytest.raises(NotImplementedError):
            transport.write_eof()
        await theirs.aclose()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_nothing_is_received_while_reading_is_paused(anyio_backend: Any, pair: Any) -> None:
    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        transport.pause_reading()
        assert not transport.is_reading()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(theirs.send, b"held back")
            await anyio.sleep(0.02)
            assert not protocol.received
            transport.resume_reading()
            assert await protocol.wait_received(9) == b"held back"
        await close_both(transport, protocol, theirs)


async def test_a_paused_reader_bounds_what_is_taken_from_the_stream(anyio_backend: Any) -> None:
    taken = 0

    class Endless(ByteReceiveStream):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            nonlocal taken
            await anyio.lowlevel.checkpoint()
            taken += max_bytes
            return bytes(max_bytes)

        async def aclose(self) -> None: ...

    async with TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, Endless())
        await protocol.wait_received(1 << 20)
        transport.pause_reading()
        before = len(protocol.received)
        await anyio.sleep(0.05)
        assert len(protocol.received) == before
        assert taken <= before + 4 * 65536
        transport.abort()


async def test_extra_info_comes_from_the_typed_attributes(anyio_backend: Any, certificate_authority: Any) -> None:
    async with tls_pair(certificate_authority) as (ours, theirs), TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, ours)
        assert transport.get_extra_info("peername") == ours.extra(SocketAttribute.remote_address)
        assert transport.get_extra_info("sockname") == ours.extra(SocketAttribute.local_address)
        assert transport.get_extra_info("socket").fileno() == ours.extra(SocketAttribute.raw_socket).fileno()
        assert type(transport.get_extra_info("socket")) is TransportSocket
        assert transport.get_extra_info("ssl_object").version().startswith("TLS")
        assert transport.get_extra_info("cipher")[0]
        assert transport.get_extra_info("peercert")["subjectAltName"] == (("DNS", "localhost"),)
        assert transport.get_extra_info("nothing like it", "default") == "default"
        await close_both(transport, protocol, theirs)


async def test_a_stream_without_attributes_has_no_extra_info(anyio_backend: Any) -> None:
    async with memory_pair() as (ours, _), TransportGroup() as group:
        transport, _ = await group.connect_stream(Recorder, ours)
        assert transport.get_extra_info("peername") is None
        assert "closed" not in repr(transport)


async def test_a_receiving_stream(anyio_backend: Any) -> None:
    sender, receiver = one_way()
    async with sender, TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, receiver)
        assert not transport.can_write_eof()
        await sender.send(b"one way")
        assert await protocol.wait_received(7) == b"one way"
        await sender.aclose()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@pytest.mark.parametrize("end", ["close", "abort", "by the stream", "leaving"])
async def test_a_receiving_stream_takes_no_data(anyio_backend: Any, end: str) -> None:
    """It would never be sent, and the close would wait for that."""
    sender, receiver = one_way()
    with anyio.fail_after(GUARD):
        async with sender:
            async with TransportGroup() as group:
                transport, protocol = await group.connect_stream(Recorder, receiver)
                for _ in range(2):
                    with pytest.raises(NotImplementedError, match="only reads"):
                        transport.write(b"data")
                    with pytest.raises(NotImplementedError, match="only reads"):
                        transport.writelines([b"more", b"data"])
                    with pytest.raises(NotImplementedError):
                        transport.write_eof()
                    with pytest.raises(TypeError):
                        transport.write("no bytes")  # type: ignore[arg-type]
                    assert transport.get_write_buffer_size() == 0
                    assert not transport.is_closing()
                    received = len(protocol.received) + 7
                    await sender.send(b"one way")
                    await protocol.wait_received(received)
                if end == "by the stream":
                    await sender.aclose()
                elif end != "leaving":
                    getattr(transport, end)()
                    with pytest.raises(NotImplementedError):
                        transport.write(b"data")
                if end != "leaving":
                    await protocol.wait_for("connection_lost")
    assert protocol.exception is None


class Scripted(ByteStream):
    """A user's stream that returns the given pieces, whatever size is asked for."""

    def __init__(self, *items: bytes) -> None:
        self.items = list(items)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self.items:
            raise anyio.EndOfStream
        return self.items.pop(0)

    async def send(self, item: bytes) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


every_protocol = pytest.mark.parametrize("protocol_kind", [Recorder, BufferedRecorder])


@every_protocol
async def test_an_empty_chunk_is_not_the_end_of_a_stream(anyio_backend: Any, protocol_kind: Any) -> None:
    """`EndOfStream` is. AnyIO asks users to ignore the empty chunks that some streams return."""
    stream = Scripted(b"", b"one ", b"", b"", b"two ", b"three", b"")
    async with TransportGroup() as group:
        _, protocol = await group.connect_stream(protocol_kind, stream)
        await protocol.wait_for("connection_lost")
    assert protocol.received == b"one two three"
    assert protocol.names[-2:] == ["eof_received", "connection_lost"]
    assert protocol.count("eof_received") == 1
    assert protocol.exception is None
    assert (b"",) not in [call[1:] for call in protocol.calls]
    assert (0,) not in [call[1:] for call in protocol.calls]


async def test_a_stream_that_always_returns_empty_chunks(anyio_backend: Any) -> None:
    """It never waits, but other tasks run all the same."""

    class Empty(Scripted):
        async def receive(self, max_bytes: int = 65536) -> bytes:
            return b"" if anyio.current_time() < end else await super().receive(max_bytes)

    end = anyio.current_time() + GUARD
    async with TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, Empty())
        await turns()
        transport.close()
        await protocol.wait_for("connection_lost")
    assert anyio.current_time() < end
    assert protocol.names == ["connection_made", "connection_lost"]


class Copied(bytes):
    """Bytes that count what is copied from them and from their copies."""

    total = 0

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        Copied.total += len(part)
        return Copied(part)


@pytest.mark.parametrize("pauses", [False, True])
@pytest.mark.parametrize("size", [64, 4096])
async def test_a_stream_that_gives_more_than_it_was_asked_for(anyio_backend: Any, size: int, pauses: bool) -> None:
    """The protocol takes little at a time. The rest is not copied each time."""
    data = Copied(pattern(1 << 20))
    Copied.total = 0
    given = 0

    def updated(protocol: Any, count: int) -> None:
        nonlocal given
        given += 1
        if pauses and given % 100 == 0:
            protocol.transport.pause_reading()
            group.call_soon(protocol.transport.resume_reading)

    async with TransportGroup() as group:
        stream = Scripted(data, b"and the rest")
        _, protocol = await group.connect_stream(
            lambda: BufferedRecorder(buffer_size=size, on_buffer_updated=updated), stream
        )
        await protocol.wait_for("connection_lost")
    assert protocol.received == data + b"and the rest"
    assert protocol.exception is None
    assert Copied.total <= 2 * len(data)


async def test_a_sending_stream(anyio_backend: Any) -> None:
    sender, receiver = one_way()
    async with receiver, TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, sender)
        transport.write(b"one way")
        assert await receive_exactly(receiver, 7) == b"one way"
        transport.close()
        await protocol.wait_for("connection_lost")
    assert sender.closed


class Failing(ByteStream):
    """A stream that fails in each direction with the given error."""

    def __init__(self, receiving: Exception | None, sending: Exception | None) -> None:
        self.receiving = receiving
        self.sending = sending
        self.closed = 0

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self.receiving is None:
            await anyio.sleep_forever()
            raise AssertionError
        raise self.receiving

    async def send(self, item: bytes) -> None:
        if self.sending is not None:
            raise self.sending

    async def send_eof(self) -> None:
        await self.send(b"")

    async def aclose(self) -> None:
        self.closed += 1


class PickyError(OSError):
    def __init__(self, *args: object, where: str) -> None:
        super().__init__(*args)
        self.where = where


def broken_by(cause: BaseException) -> Exception:
    error = anyio.BrokenResourceError()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("direction", ["receiving", "sending"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (anyio.BrokenResourceError(), ConnectionResetError),
        (broken_by(BrokenPipeError(32, "broken pipe")), BrokenPipeError),
        (broken_by(ssl.SSLError(1, "bad record")), ssl.SSLError),
        (broken_by(PickyError(104, "reset", where="there")), ConnectionResetError),
        (anyio.ClosedResourceError(), ConnectionAbortedError),
        (ConnectionRefusedError(111, "refused"), ConnectionRefusedError),
        (ValueError("a user's own"), OSError),
    ],
    ids=["broken", "broken by a pipe", "broken by TLS", "broken pickily", "closed", "an OSError", "anything else"],
)
async def test_errors_become_os_errors_with_their_cause(
    anyio_backend: Any, direction: str, error: Exception, expected: type[OSError]
) -> None:
    stream = Failing(error if direction == "receiving" else None, error if direction == "sending" else None)
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        transport, protocol = await group.connect_stream(Recorder, stream)
        if direction == "sending":
            transport.write(b"x")
        await protocol.wait_for("connection_lost")
        lost_with = protocol.exception
        assert isinstance(lost_with, expected)
        assert lost_with is error or lost_with.__cause__ is error
        assert contexts == []
    assert stream.closed


@pytest.mark.parametrize("direction", ["receiving", "sending", "closing"])
async def test_an_error_whose_repr_fails_ends_one_connection(anyio_backend: Any, direction: str) -> None:
    class Mute:
        def __repr__(self) -> str:
            raise LookupError("no words")

    class MuteError(Mute, Exception): ...

    class MuteStream(Mute, Failing):
        async def aclose(self) -> None:
            await super().aclose()
            if direction == "closing":
                raise error

    error = MuteError()
    stream = MuteStream(error if direction == "receiving" else None, error if direction == "sending" else None)
    async with memory_pair() as (ours, theirs), TransportGroup() as group:
        contexts = collect_contexts(group)
        _, other = await group.connect_stream(Recorder, ours)
        transport, protocol = await group.connect_stream(Recorder, stream)
        transport.write(b"x")
        if direction == "closing":
            transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None if direction == "closing" else protocol.exception.__cause__ is error
        await until(lambda: stream.closed)
        assert [context["exception"] for context in contexts] == ([error] if direction == "closing" else [])
        await theirs.send(b"alive")
        await other.wait_received(5)


async def test_a_failing_send_eof_breaks_the_connection(anyio_backend: Any) -> None:
    stream = Failing(None, anyio.BrokenResourceError())
    async with TransportGroup() as group:
        transport, protocol = await group.connect_stream(Recorder, stream)
        transport.write_eof()
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionResetError)


class Farewell(Failing):
    """Record that `send_eof` was called; it takes a while, may fail, and may never return."""

    def __init__(self, how: str) -> None:
        super().__init__(None, None)
        self.how = how
        self.ended = 0

    async def send_eof(self) -> None:
        self.ended += 1
        await anyio.sleep(0.005)
        if self.how == "fails":
            raise anyio.BrokenResourceError
        if self.how == "hangs":
            await anyio.sleep_forever()


@pytest.mark.parametrize("how", ["works", "fails", "hangs"])
@pytest.mark.parametrize("callback", ["connection_made", "resume_writing", None])
async def test_send_eof_comes_after_all_data(
    anyio_backend: Any, callback: str | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`close` after `write_eof`: the stream gets both, and the connection does not hold up the end of the group."""
    monkeypatch.setattr("transports_anyio._channels._anyio.CLOSE_TIMEOUT", 0.05)

    def end(protocol: Recorder) -> None:
        protocol.transport.write_eof()
        protocol.transport.close()

    def begin(protocol: Recorder, *_: Any) -> None:
        if callback == "connection_made":
            end(protocol)
        elif callback == "resume_writing":
            protocol.transport.set_write_buffer_limits(0)
            protocol.transport.write(bytes(1 << 18))

    stream = Farewell(how)
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            protocol = Recorder(on_connection_made=begin, on_resume_writing=end)
            await group.connect_stream(lambda: protocol, stream)
            if callback is None:
                await turns()
                end(protocol)
            await protocol.wait_for("connection_lost")
    assert (stream.ended, stream.closed) == (1, 1)
    assert protocol.exception is None
    assert contexts == []


@pytest.mark.parametrize("callback", ["connection_made", "data_received", "eof_received", "connection_lost"])
async def test_a_callback_that_raises_ends_its_connection_only(anyio_backend: Any, callback: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError(callback)

    protocol = Recorder(**{f"on_{callback}": fail})
    async with memory_pair() as (ours, theirs), memory_pair() as (other_ours, other_theirs), TransportGroup() as group:
        contexts = collect_contexts(group)
        await group.connect_stream(lambda: protocol, ours)
        _, other = await group.connect_stream(Recorder, other_ours)
        if callback != "connection_made":
            await theirs.send(b"x")
        if callback in ("eof_received", "connection_lost"):
            await theirs.aclose()
        await protocol.wait_for("connection_lost")
        await until(lambda: contexts)
        (context,) = contexts
        assert str(context["exception"]) == callback
        assert context["protocol"] is protocol
        if callback != "connection_lost":
            assert protocol.exception is context["exception"]
        await other_theirs.send(b"alive")
        await other.wait_received(5)


@pytest.mark.parametrize("what", ["an object stream", "no stream"])
async def test_objects_that_are_no_byte_streams_are_refused(anyio_backend: Any, what: str) -> None:
    sender, receiver = anyio.create_memory_object_stream[bytes](1)
    with sender, receiver:
        async with TransportGroup() as group:
            for stream in (sender, receiver) if what == "an object stream" else (object(), None):
                with pytest.raises(TypeError, match="ByteStream"):
                    await group.connect_stream(Recorder, stream)  # type: ignore[arg-type]
        await sender.send(b"still the caller's")
        assert await receiver.receive() == b"still the caller's"


async def test_a_stream_that_fails_to_close_ends_one_connection(anyio_backend: Any) -> None:
    class Unclosable(Failing):
        async def aclose(self) -> None:
            await super().aclose()
            raise ValueError("a user's own")

    stream = Unclosable(None, None)
    async with memory_pair() as (ours, theirs), TransportGroup() as group:
        contexts = collect_contexts(group)
        _, other = await group.connect_stream(Recorder, ours)
        transport, protocol = await group.connect_stream(Recorder, stream)
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        await until(lambda: contexts)
        (context,) = contexts
        assert context["message"].startswith("Closing <")
        assert isinstance(context["exception"], ValueError)
        await theirs.send(b"alive")
        await other.wait_received(5)
    assert stream.closed == 1


async def test_a_factory_that_raises_leaves_the_stream_to_the_caller(anyio_backend: Any) -> None:
    def factory() -> Any:
        raise LookupError

    async with memory_pair() as (ours, theirs), TransportGroup() as group:
        with pytest.raises(LookupError):
            await group.connect_stream(factory, ours)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(theirs.send, b"still open")
            assert await ours.receive() == b"still open"
        _, protocol = await group.connect_stream(Recorder, ours)
        await theirs.send(b"another time")
        await protocol.wait_received(12)


async def test_a_stream_in_use_by_another_transport(anyio_backend: Any, pair: Any) -> None:
    """Two transports would take each other's bytes, and the first to end would close the stream of the other."""
    second = Recorder()
    refused: list[TransportGroup] = []

    async with pair as (ours, theirs), TransportGroup() as group:

        async def connect_again(group: TransportGroup) -> None:
            with pytest.raises(RuntimeError, match="is already in use by another transport"):
                await group.connect_stream(lambda: second, ours)
            refused.append(group)

        async with anyio.create_task_group() as tasks:
            transport, first = await group.connect_stream(Recorder, ours)
            tasks.start_soon(connect_again, group)
            await connect_again(group)
            async with TransportGroup() as other:
                await connect_again(other)
        assert len(refused) == 3
        assert second.calls == []
        await theirs.send(b"hello")
        await first.wait_received(5)
        transport.abort()
        await first.wait_for("connection_lost")
        assert first.exception is None


async def test_one_stream_connected_by_two_calls_at_once(anyio_backend: Any) -> None:
    outcomes: list[Any] = []

    async def connect(group: TransportGroup, stream: ByteStream) -> None:
        try:
            outcomes.append(await group.connect_stream(Recorder, stream))
        except RuntimeError as exc:
            outcomes.append(exc)

    async with memory_pair() as (ours, theirs), TransportGroup() as group:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(connect, group, ours)
        assert [type(outcome) for outcome in outcomes].count(RuntimeError) == 2
        (protocol,) = [outcome[1] for outcome in outcomes if not isinstance(outcome, RuntimeError)]
        await theirs.send(b"hello")
        await protocol.wait_received(5)


async def test_cancelling_the_group_closes_the_streams(anyio_backend: Any, pair: Any) -> None:
    protocol = Recorder()
    async with pair as (ours, theirs):
        with anyio.CancelScope() as scope:
            async with TransportGroup() as group:
                transport, _ = await group.connect_stream(lambda: protocol, ours)
                transport.write(bytes(32 << 20))
                await anyio.sleep(0.01)
                scope.cancel()
                await anyio.sleep_forever()
        assert protocol.lost
        assert protocol.exception is None
        with pytest.raises((anyio.ClosedResourceError, anyio.BrokenResourceError)):
            await ours.receive()
        assert len(await receive_all(theirs)) < 32 << 20


@pytest.mark.parametrize("how", ["abort", "a failing half", "a cancellation"])
async def test_both_halves_of_a_stapled_stream_are_closed(anyio_backend: Any, how: str) -> None:
    """`StapledByteStream` closes one after the other, and stops when it is interrupted or fails in between."""

    class Sender(MemorySender):
        async def aclose(self) -> None:
            await super().aclose()
            if how == "a failing half":
                raise anyio.BrokenResourceError
            await anyio.lowlevel.checkpoint()

    sending, receiver = one_way()
    sender, receiving = one_way()
    async with receiver, sender:
        sending = Sender(sending.items)
        with anyio.CancelScope() as scope, anyio.fail_after(GUARD):
            async with TransportGroup() as group:
                contexts = collect_contexts(group)
                transport, protocol = await group.connect_stream(Recorder, StapledByteStream(sending, receiving))
                if how == "a cancellation":
                    scope.cancel()
                    await anyio.sleep(GUARD)
                elif how == "abort":
                    transport.abort()
                else:
                    transport.close()
                await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert contexts == []
        assert sending.closed
        with pytest.raises(anyio.BrokenResourceError), anyio.fail_after(GUARD):
            await sender.send(b"to nobody")


async def test_an_exception_of_the_block_aborts(anyio_backend: Any, pair: Any) -> None:
    protocol = Recorder()
    async with pair as (ours, _):
        with pytest.raises(BaseException) as caught:
            async with TransportGroup() as group:
                transport, _ = await group.connect_stream(lambda: protocol, ours)
                transport.write(bytes(32 << 20))
                raise LookupError
        assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
        assert protocol.lost


async def test_protocols_relay_through_tasks_of_the_group(anyio_backend: Any) -> None:
    """Two protocols, each on one end of a pair, connected by tasks of the group."""
    received: list[bytes] = []

    def answer(protocol: Any, data: bytes) -> None:
        received.append(data)
        protocol.transport.write(data.upper())

    async with memory_pair() as (a, b), TransportGroup() as group:
        await group.connect_stream(lambda: Recorder(on_data_received=answer), a)
        transport, asking = await group.connect_stream(Recorder, b)
        for word in (b"one", b"two", b"three"):
            transport.write(word)
            size = len(asking.received) + len(word)
            await asking.wait_received(size)
        assert asking.received == b"ONETWOTHREE"
        transport.close()
        await group.wait_closed()
    assert b"".join(received) == b"onetwothree"


async def test_a_send_that_ends_together_with_the_connection(anyio_backend: Any) -> None:
    """The task's `send` returns when the buffer is already gone."""

    class Slow(ByteSendStream):
        def __init__(self) -> None:
            self.begun = anyio.Event()
            self.done = anyio.Event()

        async def send(self, item: bytes) -> None:
            self.begun.set()
            await self.done.wait()

        async def aclose(self) -> None:
            pass

    # trio runs ready tasks in random order.
    for _ in range(20):
        async with TransportGroup() as group:
            stream = Slow()
            transport, protocol = await group.connect_stream(Recorder, stream)
            transport.write(b"hello")
            await stream.begun.wait()
            stream.done.set()
            transport.abort()
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None


async def test_reading_that_is_resumed_and_paused_at_once(anyio_backend: Any) -> None:
    # The task that receives has been woken by then, and must look again.
    protocol = Recorder()
    with listening() as listener:
        async with TransportGroup() as group:
            stream = await anyio.connect_tcp(*listener.getsockname())
            transport, _ = await group.connect_stream(lambda: protocol, stream)
            with Peer(listener.accept()[0]) as peer:
                transport.pause_reading()
                await peer.send(b"x")
                await settle(group)  # The task has received it, and waits.
                transport.resume_reading()
                transport.pause_reading()
                await settle(group)
                assert protocol.received == b""
                transport.resume_reading()
                assert await protocol.wait_received(1) == b"x"
                transport.close()
                await protocol.wait_for("connection_lost")


#: Frees sixteen chunks of 64 KiB and allocates them again, many times; prints how often the system has to give a page.
FREE_AND_ALLOCATE = """
import resource
from transports_anyio._channels._receive_buffers import keep_freed_memory

keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    [b"x" * 65_536 for _ in range(16)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of another C library")
def test_memory_for_the_next_chunks_is_kept() -> None:
    program = [sys.executable, "-c", FREE_AND_ALLOCATE]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = int(subprocess.run(program, capture_output=True, check=True, text=True, env=environment).stdout)
    assert faults < 1000  # Without it 16 for each chunk: 25,600.
