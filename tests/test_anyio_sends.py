"""What protocols over AnyIO objects write: one send at a time, whatever it takes, and receiving goes on."""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trustme
from anyio.abc import ByteStream, ConnectedUDPSocket, SocketAttribute
from anyio_streams import receive_all, receive_exactly, tcp_pair, tls_pair, unix_pair
from network import needs_unix
from support import GUARD, HOST, DatagramRecorder, Recorder, collect_contexts, pattern, turns, until
from tls_support import NAME, Certificates

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


class Gated(ByteStream):
    """A user's stream that receives what the test gives it, and whose sends wait while the test holds them."""

    def __init__(self) -> None:
        self.give, self.items = anyio.create_memory_object_stream[bytes](math.inf)
        self.gate = anyio.Event()
        self.gate.set()
        self.sending = False
        self.begun = 0  # How many sends.
        self.sent: list[bytes] = []
        self.error: Exception | None = None
        self.ended = 0
        self.closed = 0

    def hold(self) -> None:
        """Let sends wait from now on."""
        self.gate = anyio.Event()

    def release(self, error: Exception | None = None) -> None:
        """Let sends end, with `error`."""
        self.error = error
        self.gate.set()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self.items.receive()

    async def send(self, item: bytes) -> None:
        await self._send()
        self.sent.append(item)

    async def send_eof(self) -> None:
        await self._send()
        self.ended += 1

    async def _send(self) -> None:
        assert not self.sending, "two sends at once"
        self.sending = True
        self.begun += 1
        try:
            await anyio.lowlevel.checkpoint()
            await self.gate.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.sending = False

    async def aclose(self) -> None:
        self.closed += 1
        self.give.close()
        self.items.close()
        await anyio.lowlevel.checkpoint()

    @property
    def all_sent(self) -> bytes:
        return b"".join(self.sent)


class Wrapped(ByteStream):
    """A user's stream over another one."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self.stream.receive(max_bytes)

    async def send(self, item: bytes) -> None:
        await self.stream.send(item)

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


def echo(protocol: Any, data: bytes) -> None:
    protocol.transport.write(data.upper())


async def connect(group: TransportGroup, stream: ByteStream, **hooks: Any) -> tuple[Any, Any]:
    protocol = Recorder(**hooks)
    transport, _ = await group.connect_stream(lambda: protocol, stream)
    return transport, protocol


async def stick(stream: Gated, protocol: Any) -> None:
    """Have the protocol write in a callback, and its send stick until a task receives all the same."""
    stream.hold()
    received = len(protocol.received)
    await stream.give.send(b"stuck")
    await until(lambda: stream.sending)
    await stream.give.send(b",")
    await protocol.wait_received(received + 6)


async def test_receiving_goes_on_while_a_send_is_stuck(anyio_backend: Any) -> None:
    """In order, with one send at a time; again and again, and with writes outside of callbacks in between."""
    stream = Gated()
    expected = b""

    async def until_sent() -> None:
        await until(lambda: stream.all_sent == expected)

    async with TransportGroup() as group:
        transport, protocol = await connect(group, stream, on_data_received=echo)
        for number in range(3):
            stream.hold()
            for each in (b"a", b"b", b"c", b"d"):
                received = len(protocol.received)
                await stream.give.send(each)
                await protocol.wait_received(received + 1)
                expected += each.upper()
            transport.write(b"outside")
            expected += b"outside"
            await turns()
            assert stream.all_sent == expected[: number * 13]
            stream.release()
            await until_sent()
            for each in (b"e", b"f"):
                received = len(protocol.received)
                await stream.give.send(each)
                await protocol.wait_received(received + 1)
                expected += each.upper()
            await until_sent()
        assert stream.all_sent == expected
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


async def test_a_send_is_stuck_after_writes_outside_of_callbacks(anyio_backend: Any) -> None:
    """Both tasks exist already."""
    stream = Gated()
    async with TransportGroup() as group:
        transport, protocol = await connect(group, stream, on_data_received=echo)
        await turns()
        transport.write(b"outside")
        await until(lambda: stream.all_sent == b"outside")
        await stick(stream, protocol)
        stream.release()
        await until(lambda: stream.all_sent == b"outsideSTUCK,")
        transport.write(b"!")
        await until(lambda: stream.all_sent == b"outsideSTUCK,!")
        transport.close()


@pytest.mark.parametrize("size", [5, 1 << 16, 1 << 18])
async def test_writes_in_a_callback_are_sent_in_order(anyio_backend: Any, size: int) -> None:
    stream = Gated()
    data = pattern(size)

    def answer(protocol: Any, _: bytes) -> None:
        protocol.transport.write(data)
        protocol.transport.writelines([b"one", b"two"])
        protocol.transport.write(bytearray(b"three"))

    async with TransportGroup() as group:
        transport, _ = await connect(group, stream, on_data_received=answer)
        await stream.give.send(b"x")
        await until(lambda: stream.all_sent == data + b"onetwothree")
        transport.write(b"outside")
        await until(lambda: stream.all_sent == data + b"onetwothreeoutside")
        transport.close()


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", None])
@pytest.mark.parametrize("size", [5, 1 << 18])
async def test_write_then_close(anyio_backend: Any, size: int, callback: str | None, held: bool) -> None:
    """In one callback, and outside of callbacks. Everything is sent before `connection_lost`."""
    stream = Gated()
    data = pattern(size)

    def write_and_close(protocol: Any, *_: Any) -> None:
        protocol.transport.write(data)
        protocol.transport.close()

    if held:
        stream.hold()
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            hooks = {f"on_{callback}": write_and_close} if callback else {}
            _, protocol = await connect(group, stream, **hooks)
            if callback is None:
                await turns()
                write_and_close(protocol)
            else:
                await stream.give.send(b"x")
            if held:
                await until(lambda: stream.sending)
                await anyio.sleep(0.02)
                assert not protocol.lost
                assert not stream.closed
                stream.release()
            await protocol.wait_for("connection_lost")
            assert stream.all_sent == data
    assert protocol.exception is None
    assert stream.closed == 1


@pytest.mark.parametrize("then_close", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("callback", ["connection_made", "data_received", None])
@pytest.mark.parametrize("size", [5, 1 << 18])
async def test_write_then_write_eof(
    anyio_backend: Any, size: int, callback: str | None, held: bool, then_close: bool
) -> None:
    stream = Gated()
    data = pattern(size)

    def write_and_end(protocol: Any, *_: Any) -> None:
        protocol.transport.write(data)
        protocol.transport.write_eof()
        if then_close:
            protocol.transport.close()

    if held:
        stream.hold()
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            hooks = {f"on_{callback}": write_and_end} if callback else {}
            _, protocol = await connect(group, stream, **hooks)
            if callback is None:
                await turns()
                write_and_end(protocol)
            else:
                await stream.give.send(b"x")
            if held:
                await until(lambda: stream.sending)
                await anyio.sleep(0.02)
                assert not stream.ended
                stream.release()
            if then_close:  # The end of the stream need not be sent: closing it shows it to the peer as well.
                await protocol.wait_for("connection_lost")
            else:
                await until(lambda: stream.ended)
            assert stream.all_sent == data
    assert protocol.exception is None
    assert stream.ended == 1 or then_close
    assert stream.closed == 1


@pytest.mark.parametrize("size", [5, 1 << 18])
@pytest.mark.parametrize("reading", [True, False])
@pytest.mark.parametrize("sticks", [False, True])
@pytest.mark.parametrize("then", ["", "close", "write_eof"])
async def test_a_send_that_fails_late(anyio_backend: Any, then: str, sticks: bool, reading: bool, size: int) -> None:
    """Nothing waits for it any more: the protocol has written, and perhaps closed."""
    stream = Gated()
    stream.hold()
    error = anyio.BrokenResourceError()

    def answer(protocol: Any, _: bytes) -> None:
        protocol.transport.write(bytes(size))
        if then:
            getattr(protocol.transport, then)()
        elif not reading:
            protocol.transport.pause_reading()

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            _, protocol = await connect(group, stream, on_data_received=answer)
            await stream.give.send(b"x")
            await until(lambda: stream.sending)
            if sticks:
                await anyio.sleep(0.02)
            assert not protocol.lost
            stream.release(error)
            await protocol.wait_for("connection_lost")
            await turns()
    assert isinstance(protocol.exception, ConnectionResetError)
    assert protocol.exception.__cause__ is error
    assert protocol.count("connection_lost") == 1
    assert contexts == []
    assert stream.closed == 1


@pytest.mark.parametrize("then_close", [False, True])
async def test_a_send_over_tls_fails_late(anyio_backend: Any, certificates: Certificates, then_close: bool) -> None:
    """TLS of ours over a user's stream that breaks for sending only."""

    class Breaking(Wrapped):
        broken = False

        async def send(self, item: bytes) -> None:
            if self.broken:
                await anyio.sleep(0.02)
                raise anyio.BrokenResourceError
            await super().send(item)

    def answer(protocol: Any, _: bytes) -> None:
        breaking.broken = True
        protocol.transport.write(b"lost")
        if then_close:
            protocol.transport.close()

    async with tcp_pair() as (ours, theirs), TransportGroup() as group:
        contexts = collect_contexts(group)
        breaking = Breaking(ours)
        protocol = Recorder(on_data_received=answer)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                lambda: group.connect_stream(
                    lambda: protocol, breaking, ssl=certificates.client(), server_hostname=NAME
                )
            )
            transport, other = await group.connect_stream(Recorder, theirs, ssl=certificates.server(), server_side=True)
        transport.write(b"x")
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionResetError)
        assert protocol.count("connection_lost") == 1
        assert contexts == []
        await other.wait_for("connection_lost")


@pytest.mark.parametrize("keep_open", [False, True])
async def test_the_end_of_the_stream_during_a_stuck_send(anyio_backend: Any, keep_open: bool) -> None:
    stream = Gated()
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            transport, protocol = await connect(
                group, stream, on_data_received=echo, on_eof_received=lambda _: keep_open
            )
            await stick(stream, protocol)
            stream.give.close()
            await protocol.wait_for("eof_received")
            await turns()
            assert not protocol.lost
            if keep_open:
                transport.write(b"more")
            stream.release()
            if keep_open:
                await until(lambda: stream.all_sent == b"STUCK,more")
                transport.write(b"!")
                await until(lambda: stream.all_sent == b"STUCK,more!")
                assert not protocol.lost
                transport.close()
            await protocol.wait_for("connection_lost")
    assert protocol.exception is None
    assert stream.all_sent == (b"STUCK,more!" if keep_open else b"STUCK,")
    assert stream.closed == 1


@pytest.mark.parametrize("sticks", [False, True])
async def test_a_cancellation_while_a_callbacks_data_is_sent(anyio_backend: Any, sticks: bool) -> None:
    stream = Gated()
    protocol = Recorder(on_data_received=echo)
    with anyio.fail_after(GUARD):
        with anyio.CancelScope() as scope:
            async with TransportGroup() as group:
                await group.connect_stream(lambda: protocol, stream)
                if sticks:
                    await stick(stream, protocol)
                else:
                    stream.hold()
                    await stream.give.send(b"x")
                    await until(lambda: stream.sending)
                scope.cancel()
                await anyio.sleep(GUARD)
    assert protocol.lost
    assert protocol.exception is None
    assert not stream.sending
    assert stream.sent == []
    assert stream.closed == 1


@pytest.mark.parametrize("size", [5, 1 << 20])
@pytest.mark.parametrize("sticks", [False, True])
@pytest.mark.parametrize("closed", [False, True])
async def test_abort_ends_a_stuck_send(anyio_backend: Any, size: int, sticks: bool, closed: bool) -> None:
    stream = Gated()

    def answer(protocol: Any, _: bytes) -> None:
        protocol.transport.write(bytes(size))
        if closed:
            protocol.transport.close()

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            stream.hold()
            transport, protocol = await connect(group, stream, on_data_received=answer)
            await stream.give.send(b"x")
            await until(lambda: stream.sending)
            if sticks:
                await anyio.sleep(0.02)
            transport.abort()
            await protocol.wait_for("connection_lost")
            await until(lambda: stream.closed)
    assert protocol.exception is None
    assert stream.sent == []
    assert stream.closed == 1


@pytest.mark.parametrize("wait", [0, 1, 3])
async def test_t16_a_tls_alert_is_sent_before_the_stream_is_closed(
    anyio_backend: Any, certificates: Certificates, wait: int
) -> None:
    """A record that cannot be read makes OpenSSL send an alert, and ends the connection."""

    class Slow(Wrapped):
        async def send(self, item: bytes) -> None:
            await turns(wait)
            await super().send(item)

    async with tcp_pair() as (ours, theirs), TransportGroup() as group:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        peer = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
        results: list[Any] = []

        async def accept() -> None:
            results.extend(
                await group.connect_stream(Recorder, Slow(ours), ssl=certificates.server(), server_side=True)
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accept)
            while True:
                try:
                    peer.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    if outgoing.pending:
                        await theirs.send(outgoing.read())
                    incoming.write(await theirs.receive())
            await theirs.send(outgoing.read())
        _, protocol = results
        await theirs.send(b"\x17\x03\x03\x00\x20" + bytes(32))  # A record that was not encrypted.
        incoming.write(await receive_all(theirs))
        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            while True:
                peer.read(1024)
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ssl.SSLError)


@pytest.fixture(params=["tcp", pytest.param("unix", marks=needs_unix), "tls"])
def pair(request: pytest.FixtureRequest, certificate_authority: trustme.CA) -> Any:
    pairs: dict[str, Callable[[], Any]] = {
        "tcp": tcp_pair, "unix": unix_pair, "tls": lambda: tls_pair(certificate_authority)
    }  # fmt: skip
    return pairs[request.param]()


async def test_a_peer_that_sends_much_and_reads_nothing(anyio_backend: Any, pair: Any) -> None:
    """64 MiB are received and answered; what is buffered then is bounded by flow control only in writing."""
    size = 64 << 20
    chunk = bytes(1 << 20)

    def answer(protocol: Any, data: bytes) -> None:
        if not protocol.transport.is_writing_paused():
            protocol.transport.write(data)

    async with pair as (ours, theirs), TransportGroup() as group:
        transport, protocol = await connect(group, ours, on_data_received=answer)
        transport.write(b"x")
        assert await receive_exactly(theirs, 1) == b"x"  # Until it has received, AnyIO's stream on asyncio reads on.
        for _ in range(size // len(chunk)):
            await theirs.send(chunk)
        await protocol.wait_received(size)
        assert transport.is_writing_paused()
        assert transport.get_write_buffer_size() <= 512 * 1024
        transport.abort()
        await protocol.wait_for("connection_lost")
        await anyio.aclose_forcefully(theirs)


async def test_back_pressure_is_exact_to_a_chunk(anyio_backend: Any) -> None:
    """A protocol that stops writing when it is paused has at most one chunk more under way."""
    stream = Gated()
    stream.hold()
    chunk = bytes(1 << 14)
    written = 0

    def answer(protocol: Any, _: bytes) -> None:
        nonlocal written
        if not protocol.transport.is_writing_paused():
            protocol.transport.write(chunk)
            written += len(chunk)

    async with TransportGroup() as group:
        transport, protocol = await connect(group, stream, on_data_received=answer)
        transport.set_write_buffer_limits(high=1 << 16, low=0)
        for number in range(1, 21):
            await stream.give.send(b"x")
            await protocol.wait_received(number)
        assert protocol.count("pause_writing") == 1
        size = transport.get_write_buffer_size()
        assert 1 << 16 < size <= (1 << 16) + len(chunk)
        assert size <= written <= size + (1 << 16)  # One write was taken by the channel.
        stream.release()
        await protocol.wait_for("resume_writing")
        await until(lambda: stream.all_sent == bytes(written))
        assert transport.get_write_buffer_size() == 0
        assert max(map(len, stream.sent)) <= 1 << 16
        transport.close()


@pytest.mark.parametrize("in_callback", [False, True])
@pytest.mark.parametrize("sticks", [False, True])
async def test_a_failing_send_eof_does_not_spin(anyio_backend: Any, sticks: bool, in_callback: bool) -> None:
    stream = Gated()

    def end(protocol: Any, *_: Any) -> None:
        protocol.transport.write_eof()

    if sticks:
        stream.hold()
    else:
        stream.release(anyio.BrokenResourceError())
    async with TransportGroup() as group:
        _, protocol = await connect(group, stream, on_data_received=end)
        await turns()
        if in_callback:
            await stream.give.send(b"x")
        else:
            end(protocol)
        if sticks:
            await until(lambda: stream.sending)
            await anyio.sleep(0.02)
            stream.release(anyio.BrokenResourceError())
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionResetError)
        await turns()
        assert stream.begun == 1


async def test_no_timer_of_ours_is_in_the_statistics(anyio_backend: Any) -> None:
    stream = Gated()
    async with TransportGroup() as group:
        _, protocol = await connect(group, stream, on_data_received=echo)
        handle = group.call_later(GUARD, turns.__name__.upper)
        stream.hold()
        await stream.give.send(b"x")
        await until(lambda: stream.sending)
        assert group.statistics().pending_timers == 1
        assert "timers=1" in repr(group)
        handle.cancel()
        assert group.statistics().pending_timers == 0
        await stream.give.send(b"y")
        await protocol.wait_received(2)
        assert group.statistics().pending_timers == 0
        stream.release()
        await until(lambda: stream.all_sent == b"XY")
        assert group.statistics().pending_timers == 0


async def test_a_slow_reader_does_not_slow_receiving_down(anyio_backend: Any) -> None:
    """After one slow send the other task sends for a while, so that not each of them holds up receiving."""

    class Slow(Gated):
        async def send(self, item: bytes) -> None:
            await anyio.sleep(0.05)
            await super().send(item)

    stream = Slow()
    async with TransportGroup() as group:
        transport, protocol = await connect(group, stream, on_data_received=echo)
        begin = anyio.current_time()
        for number in range(1, 101):
            await stream.give.send(b"x")
            await protocol.wait_received(number)
        # Two slow sends at most held it up; a hundred would have taken five seconds.
        assert anyio.current_time() - begin < 1
        transport.abort()


class Sized(Gated):
    """Record how many bytes were asked for, and return as many at most."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    async def receive(self, max_bytes: int = 65536) -> bytes:
        self.asked.append(max_bytes)
        item = await self.items.receive()
        assert len(item) <= max_bytes
        return item


async def test_bulk_data_is_received_and_sent_in_large_pieces(anyio_backend: Any) -> None:
    stream = Sized()
    async with TransportGroup() as group:
        transport, protocol = await connect(group, stream, on_data_received=echo)
        for size in (1 << 16, 1 << 18, 1 << 18):
            await until(lambda size=size: stream.asked[-1:] >= [size])
            await stream.give.send(bytes(size))
        await protocol.wait_received((1 << 16) + (2 << 18))
        await until(lambda: len(stream.all_sent) == (1 << 16) + (2 << 18))
        assert list(map(len, stream.sent)) == [1 << 16, 1 << 18, 1 << 18]
        transport.close()


async def test_messages_of_one_chunk_are_seldom_asked_for_as_bulk_data(anyio_backend: Any) -> None:
    """Each is a whole chunk, but nothing follows it."""
    stream = Sized()
    chunk = bytes(1 << 16)
    async with TransportGroup() as group:
        transport, protocol = await connect(group, stream)
        for number in range(1, 101):
            await stream.give.send(chunk)
            await protocol.wait_received(number << 16)
        assert 1 <= sum(size > 1 << 16 for size in stream.asked) <= 100 // 16 + 2
        transport.close()


# Datagrams


class GatedDatagrams(ConnectedUDPSocket):
    """A connected socket that receives what the test gives it, and whose sends wait while the test holds them."""

    def __init__(self, real: ConnectedUDPSocket) -> None:
        self.real = real
        self.stream = Gated()

    @property
    def extra_attributes(self) -> Any:
        return self.real.extra_attributes

    @property
    def _raw_socket(self) -> Any:
        return self.real.extra(SocketAttribute.raw_socket)

    async def receive(self) -> bytes:
        return await self.stream.receive()

    async def send(self, item: bytes) -> None:
        await self.stream.send(item)

    async def aclose(self) -> None:
        await self.stream.aclose()
        await self.real.aclose()


async def gated_datagrams() -> tuple[GatedDatagrams, Gated]:
    datagrams = GatedDatagrams(await anyio.create_connected_udp_socket(HOST, 9))
    return datagrams, datagrams.stream


def reply(protocol: Any, data: bytes, _: Any) -> None:
    protocol.transport.sendto(data.upper())


async def test_datagrams_are_received_while_a_reply_is_stuck(anyio_backend: Any) -> None:
    datagrams, stream = await gated_datagrams()
    protocol = DatagramRecorder(on_datagram_received=reply)
    expected: list[bytes] = []
    async with TransportGroup() as group:
        transport, _ = await group.connect_datagram_socket(lambda: protocol, datagrams)
        for _ in range(2):
            stream.hold()
            for each in (b"a", b"", b"c"):
                received = len(protocol.received)
                await stream.give.send(each)
                await until(lambda received=received: len(protocol.received) > received)
                expected.append(each.upper())
            transport.sendto(b"outside")
            expected.append(b"outside")
            stream.release()
            await until(lambda: stream.sent == expected)
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.count("error_received") == 0


@pytest.mark.parametrize("then_close", [False, True])
@pytest.mark.parametrize("held", [False, True])
async def test_replies_of_one_callback_are_sent_in_order(anyio_backend: Any, held: bool, then_close: bool) -> None:
    """Also if the callback closes the endpoint."""
    datagrams, stream = await gated_datagrams()

    def reply_twice(protocol: Any, _: bytes, __: Any) -> None:
        protocol.transport.sendto(b"one")
        protocol.transport.sendto(bytearray(b"two"))
        if then_close:
            protocol.transport.close()

    protocol = DatagramRecorder(on_datagram_received=reply_twice)
    if held:
        stream.hold()
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            await group.connect_datagram_socket(lambda: protocol, datagrams)
            await stream.give.send(b"x")
            if held:
                await until(lambda: stream.sending)
                await anyio.sleep(0.02)
                assert not stream.closed
                stream.release()
            await until(lambda: stream.sent == [b"one", b"two"])
    assert protocol.exception is None
    assert stream.closed == 1


async def test_one_reply_is_sent_although_the_callback_closes(anyio_backend: Any) -> None:
    datagrams, stream = await gated_datagrams()

    def reply_and_close(protocol: Any, data: bytes, addr: Any) -> None:
        reply(protocol, data, addr)
        protocol.transport.close()

    protocol = DatagramRecorder(on_datagram_received=reply_and_close)
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            await group.connect_datagram_socket(lambda: protocol, datagrams)
            stream.hold()
            await stream.give.send(b"x")
            await protocol.wait_for("connection_lost")
            await turns()
            assert stream.closed == 0
            stream.release()
    assert stream.sent == [b"X"]
    assert stream.closed == 1


@pytest.mark.parametrize("sticks", [False, True])
async def test_a_reply_that_fails_reaches_error_received(anyio_backend: Any, sticks: bool) -> None:
    """As of a socket: the endpoint stays open."""
    datagrams, stream = await gated_datagrams()
    protocol = DatagramRecorder(on_datagram_received=reply)
    error = anyio.BrokenResourceError()
    error.__cause__ = ConnectionRefusedError(111, "refused")
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        transport, _ = await group.connect_datagram_socket(lambda: protocol, datagrams)
        stream.hold()
        await stream.give.send(b"x")
        await until(lambda: stream.sending)
        if sticks:
            await anyio.sleep(0.02)
        stream.release(error)
        await protocol.wait_for("error_received")
        assert protocol.calls[-1][0] == "error_received"
        assert isinstance(protocol.calls[-1][1], ConnectionRefusedError)
        stream.release()
        await stream.give.send(b"y")
        await until(lambda: stream.sent == [b"Y"])
        assert protocol.count("error_received") == 1
        assert contexts == []
        transport.close()
