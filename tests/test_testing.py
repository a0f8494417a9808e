"""`transports_anyio.testing`: recorders, over asyncio's own transports too, and the connection in memory."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import anyio
import pytest
from network import needs_pipes
from support import (
    GUARD,
    HOST,
    Stack,
    collect_contexts,
    connected,
    fill,
    leaves,
    listening,
    pattern,
    raises_inside,
    turns,
)
from tls_support import NAME, Certificates

from transports_anyio import TransportGroup
from transports_anyio.testing import (
    BufferedRecorder,
    DatagramRecorder,
    Recorder,
    SubprocessRecorder,
    memory_connection,
)

pytestmark = pytest.mark.anyio


class Echo(asyncio.Protocol):
    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def eof_received(self) -> bool:
        self.transport.write(b"bye")
        return True


class Exploding(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        raise ZeroDivisionError


# -- recorders ------------------------------------------------------------------------------------------------


async def test_a_recorder_notes_every_callback_and_passes_it_on(stack: Stack) -> None:
    async with stack.open() as group:
        with listening() as listener:
            _, client = await group.create_connection(Recorder, *listener.getsockname())
            sock, _ = listener.accept()
        with anyio.fail_after(GUARD):
            transport, server = await group.connect_accepted_socket(lambda: Recorder(Echo()), sock)
            client.transport.write(b"hello")
            assert await client.wait_received(5) == b"hello"
            client.transport.write_eof()
            assert await client.wait_received(8) == b"hellobye"
            client.transport.close()
            transport.close()
            await client.wait_for("connection_lost")
            await server.wait_for("connection_lost")
    assert server.calls == [
        ("connection_made", transport),
        ("data_received", b"hello"),
        ("eof_received",),
        ("connection_lost", None),
    ]
    assert server.names == ["connection_made", "data_received", "eof_received", "connection_lost"]
    assert server.exception is None
    assert server.lost
    assert bytes(server.received) == b"hello"
    assert server.transport is server.protocol.transport is transport
    server.check()
    client.check()


async def test_a_buffered_recorder(stack: Stack) -> None:
    class Filled(asyncio.BufferedProtocol):
        def __init__(self) -> None:
            self.buffer = bytearray(3)
            self.got = b""

        def get_buffer(self, sizehint: int) -> memoryview:
            return memoryview(self.buffer)

        def buffer_updated(self, nbytes: int) -> None:
            self.got += self.buffer[:nbytes]

    async with stack.open() as group:
        with listening() as listener:
            _, client = await group.create_connection(lambda: BufferedRecorder(Filled()), *listener.getsockname())
            sock, _ = listener.accept()
        with sock, anyio.fail_after(GUARD):
            sock.send(b"hello")
            assert await client.wait_received(5) == b"hello"
        with anyio.fail_after(GUARD):
            await client.wait_for("connection_lost")
    assert client.protocol.got == b"hello"
    assert [call for call in client.calls if call[0] == "buffer_updated"] == [
        ("buffer_updated", 3),
        ("buffer_updated", 2),
    ]
    assert client.calls[1] == ("get_buffer", -1)
    client.check()


async def test_a_recorder_of_datagrams(stack: Stack) -> None:
    async with stack.open() as group:
        a, one = await group.create_datagram_endpoint(DatagramRecorder, ("127.0.0.1", 0))
        b, other = await group.create_datagram_endpoint(DatagramRecorder, ("127.0.0.1", 0))
        with anyio.fail_after(GUARD):
            a.sendto(b"hello", b.get_extra_info("sockname"))
            await other.wait_for("datagram_received")
            a.close()
            b.close()
            await one.wait_for("connection_lost")
            await other.wait_for("connection_lost")
    assert other.received == [(b"hello", a.get_extra_info("sockname"))]
    one.check()
    other.check()


async def test_a_protocol_that_takes_over(stack: Stack) -> None:
    async with stack.open() as group:
        with listening() as listener:
            transport, before = await group.create_connection(Recorder, *listener.getsockname())
            sock, _ = listener.accept()
        with sock, anyio.fail_after(GUARD):
            after = Recorder(transport=transport)
            transport.set_protocol(after)
            sock.send(b"hello")
            await after.wait_received(5)
            with pytest.raises(AssertionError, match="connection_lost"):
                after.check()
            after.check(finished=False)
        with anyio.fail_after(GUARD):
            await after.wait_for("connection_lost")
    before.check()
    after.check()
    assert before.names == ["connection_made"]
    with pytest.raises(ValueError, match="not come"):
        _ = before.exception


async def test_waiting_after_connection_lost_raises(stack: Stack) -> None:
    async with stack.open() as group:
        with listening() as listener:
            transport, recorder = await group.create_connection(Recorder, *listener.getsockname())
            transport.abort()
            with anyio.fail_after(GUARD), pytest.raises(RuntimeError, match="lost before"):
                await recorder.wait_for("data_received")
    recorder.check()


@needs_pipes
async def test_callbacks_that_are_left_out_do_nothing(stack: Stack) -> None:
    """Every callback is optional except a `BufferedProtocol`'s `get_buffer`."""

    class Buffered(asyncio.BufferedProtocol):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray(10)

    async with stack.open() as group:
        contexts = collect_contexts(group)
        for stream in (Recorder(asyncio.Protocol()), BufferedRecorder(Buffered())):
            async with connected(group, stream, small=True) as (transport, _, peer):
                await peer.send(b"x")
                assert await stream.wait_received(1) == b"x"
                written = fill(transport, 65537)
                assert len(await peer.receive_exactly(written)) == written
                with anyio.fail_after(GUARD):
                    await stream.wait_for("resume_writing")
                peer.shutdown()
                assert await peer.receive_all() == b""
                await stream.wait_for("connection_lost")
            names = [name for name in stream.names if name != "get_buffer"]
            assert names[-4:] == ["pause_writing", "resume_writing", "eof_received", "connection_lost"]
            stream.check()

        with anyio.fail_after(GUARD):
            datagrams = DatagramRecorder(asyncio.DatagramProtocol())
            endpoint, _ = await group.create_datagram_endpoint(lambda: datagrams, (HOST, 0))
            endpoint.sendto(b"to oneself", endpoint.get_extra_info("sockname"))
            await datagrams.wait_for("datagram_received")
            endpoint.sendto(bytes(100_000), endpoint.get_extra_info("sockname"))
            await datagrams.wait_for("error_received")
            endpoint.close()
            await datagrams.wait_for("connection_lost")
            datagrams.check()

            child = SubprocessRecorder(asyncio.SubprocessProtocol())
            process, _ = await group.subprocess_exec(lambda: child, "cat")
            process.get_pipe_transport(0).write(b"x")
            process.get_pipe_transport(0).write_eof()
            await child.wait_for("connection_lost")
            process.close()  # asyncio warns about it otherwise.
            assert child.received == {1: b"x"}
            assert child.count("pipe_connection_lost") == 3
            assert child.count("process_exited") == 1
            child.check()
        assert contexts == []


TRANSPORT = asyncio.Transport()
MADE: Any = ("connection_made", TRANSPORT)
LOST: Any = ("connection_lost", None)


@pytest.mark.parametrize(
    ("kind", "calls", "complaint"),
    [
        (Recorder, [("data_received", b"x")], r"data_received\(\) after \[\]"),
        (Recorder, [MADE, MADE, LOST], r"connection_made\(\) after"),
        (Recorder, [MADE, LOST, LOST], r"connection_lost\(\) after"),
        (Recorder, [MADE, ("eof_received",), ("data_received", b"x"), LOST], r"data_received\(\) after"),
        (Recorder, [MADE, ("resume_writing",), LOST], r"resume_writing\(\) without pause_writing"),
        (Recorder, [MADE, ("pause_writing",), ("pause_writing",), LOST], r"pause_writing\(\) twice"),
        (Recorder, [MADE, LOST, ("pause_writing",)], r"pause_writing\(\) after"),
        (BufferedRecorder, [MADE, ("buffer_updated", 0), LOST], r"buffer_updated\(\) after"),
        (DatagramRecorder, [MADE, LOST, ("datagram_received", b"", None)], r"datagram_received\(\) after"),
        (DatagramRecorder, [("error_received", None), MADE, LOST], r"error_received\(\) after"),
        (SubprocessRecorder, [MADE, LOST], r"connection_lost\(\) after"),
        (
            SubprocessRecorder,
            [MADE, ("pipe_connection_lost", 1, None), ("pipe_data_received", 1, b""), ("process_exited",), LOST],
            r"pipe_data_received\(1\) after pipe_connection_lost\(1\)",
        ),
    ],
)
def test_an_illegal_order_is_a_violation(kind: Any, calls: list[tuple[Any, ...]], complaint: str) -> None:
    recorder = kind()
    for name, *args in calls:
        getattr(recorder, name)(*args)
    assert len(recorder.violations) == 1
    with pytest.raises(AssertionError, match=complaint):
        recorder.check()


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        (Recorder, [MADE, ("pause_writing",), ("eof_received",), ("resume_writing",), LOST]),
        (Recorder, [MADE, ("pause_writing",), LOST]),
        (BufferedRecorder, [MADE, ("get_buffer", -1), ("get_buffer", -1), ("buffer_updated", 1), LOST]),
        (BufferedRecorder, [MADE, ("get_buffer", -1), ("pause_writing",), ("eof_received",), LOST]),
        (DatagramRecorder, [MADE, ("error_received", None), ("datagram_received", b"", None), LOST]),
        (
            SubprocessRecorder,
            [
                MADE,
                ("pipe_data_received", 1, b"x"),
                ("process_exited",),
                ("pipe_data_received", 1, b"y"),
                ("pipe_connection_lost", 1, None),
                LOST,
            ],
        ),
    ],
)
def test_a_legal_order_is_no_violation(kind: Any, calls: list[tuple[Any, ...]]) -> None:
    recorder = kind()
    for name, *args in calls:
        getattr(recorder, name)(*args)
    recorder.check()
    assert recorder.calls == calls


def test_a_callback_inside_another_is_a_violation() -> None:
    class Entered(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            recorder.pause_writing()
            recorder.eof_received()

    recorder = Recorder(Entered())
    recorder.connection_made(TRANSPORT)
    recorder.data_received(b"x")
    assert recorder.violations == ["eof_received() inside data_received()"]


async def test_an_exception_of_the_protocol_passes(stack: Stack) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        with listening() as listener:
            _, recorder = await group.create_connection(lambda: Recorder(Exploding()), *listener.getsockname())
            sock, _ = listener.accept()
        with sock, anyio.fail_after(GUARD):
            sock.send(b"x")
            await recorder.wait_for("connection_lost")
    (context,) = contexts
    assert type(context["exception"]) is ZeroDivisionError is type(recorder.exception)
    recorder.check()


# -- the connection in memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(("chunk_size", "buffer_size"), [(None, 65536), (1, 4096), (7, 1), (1000, 3)])
async def test_everything_arrives_in_chunks_of_the_size(
    anyio_backend: Any, buffered: bool, chunk_size: int | None, buffer_size: int
) -> None:
    kind: Any = BufferedRecorder if buffered else Recorder
    size = 2_000
    async with TransportGroup() as group:
        (a, one), (_, other) = await memory_connection(
            group, Recorder, kind, chunk_size=chunk_size, buffer_size=buffer_size
        )
        a.write(pattern(size)[:1])
        a.writelines([pattern(size)[1:5], pattern(size)[5:]])
        a.close()
        with anyio.fail_after(GUARD):
            await other.wait_for("connection_lost")
    assert other.received == pattern(size)
    most = min(chunk_size or size, buffer_size, size)
    sizes = [call[1] for call in other.calls if call[0] == "buffer_updated"] or [
        len(call[1]) for call in other.calls if call[0] == "data_received"
    ]
    assert max(sizes) == most
    assert one.names == ["connection_made", "connection_lost"]
    one.check()
    other.check()


async def test_back_pressure_begins_after_the_buffer(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, one), (b, other) = await memory_connection(group, Recorder, Recorder, buffer_size=1000)
        b.pause_reading()
        a.set_write_buffer_limits(high=100, low=0)
        a.write(bytes(1000))
        assert a.get_write_buffer_size() == 0
        a.write(bytes(100))
        assert a.get_write_buffer_size() == 100
        assert not one.writing_paused
        a.write(b"x")
        assert one.writing_paused
        b.resume_reading()
        with anyio.fail_after(GUARD):
            await one.wait_for("resume_writing")
            await other.wait_received(1101)
    one.check()
    other.check()


async def test_each_end_closes_its_direction(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, one), (b, other) = await memory_connection(group, Recorder, lambda: Recorder(Echo()))
        a.write(b"hello")
        a.write_eof()
        with anyio.fail_after(GUARD):
            assert await one.wait_received(8) == b"hellobye"
            b.close()
            await one.wait_for("connection_lost")
    assert one.names[-2:] == ["eof_received", "connection_lost"]
    one.check()
    other.check()


async def test_closing_with_unread_data_resets_the_other_end(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, one), (b, other) = await memory_connection(group, Recorder, Recorder)
        b.pause_reading()
        b.write(b"still there")
        a.write(b"unread")
        b.abort()
        with anyio.fail_after(GUARD):
            await one.wait_for("connection_lost")
    assert one.received == b"still there"
    assert type(one.exception) is ConnectionResetError
    assert other.exception is None
    one.check()
    other.check()


async def test_writing_to_an_end_that_has_gone(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, one), (b, other) = await memory_connection(group, Recorder, Recorder)
        a.pause_reading()
        b.close()
        with anyio.fail_after(GUARD):
            await other.wait_for("connection_lost")
            a.write(b"x")
            await one.wait_for("connection_lost")
    assert type(one.exception) is BrokenPipeError
    one.check()
    other.check()


async def test_extra_info(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, _), (b, _) = await memory_connection(group, Recorder, Recorder, info_a={"peername": ("192.0.2.1", 4711)})
        assert a.get_extra_info("peername") == ("192.0.2.1", 4711)
        assert a.get_extra_info("socket") is None
        assert b.get_extra_info("peername", "nobody") == "nobody"


async def test_leaving_the_block_ends_both(anyio_backend: Any) -> None:
    with raises_inside(ZeroDivisionError) as errors:
        async with TransportGroup() as group:
            (a, one), (_, other) = await memory_connection(group, Recorder, Recorder, buffer_size=1)
            a.write(bytes(10))
            raise ZeroDivisionError
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert one.exception is other.exception is None
    one.check()
    other.check()


async def test_a_group_ends_only_when_everything_is_flushed(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, one), (_, other) = await memory_connection(group, Recorder, Recorder, chunk_size=3, buffer_size=5)
        a.write(pattern(1000))
        a.close()
        await other.wait_for("connection_lost")
    assert other.received == pattern(1000)
    one.check()


@pytest.mark.parametrize("who", ["a", "b"])
async def test_a_raising_factory_makes_no_connection(anyio_backend: Any, who: str) -> None:
    made: list[Recorder] = []

    def good() -> Recorder:
        made.append(Recorder())
        return made[-1]

    def bad() -> Recorder:
        raise ZeroDivisionError

    async with TransportGroup() as group:
        with pytest.raises(ZeroDivisionError):
            await memory_connection(group, bad if who == "a" else good, bad if who == "b" else good)
        await group.wait_closed()
    assert [recorder.names for recorder in made] == ([] if who == "a" else [[]])


async def test_a_callback_that_interrupts_ends_both(anyio_backend: Any) -> None:
    class Interrupting(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            raise KeyboardInterrupt

    recorders: list[Recorder] = []

    def factory(*protocol: asyncio.Protocol) -> Recorder:
        recorders.append(Recorder(*protocol))
        return recorders[-1]

    with pytest.raises(BaseException) as caught:  # alone or in a group, depending on the backend
        async with TransportGroup() as group:
            await memory_connection(group, lambda: factory(Interrupting()), factory)
    assert [type(leaf) for leaf in leaves(caught.value)] == [KeyboardInterrupt]
    assert [recorder.names for recorder in recorders] == [["connection_made", "connection_lost"]] * 2


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"chunk_size": 0}, ValueError),
        ({"buffer_size": 0}, ValueError),
        ({"buffer_size": -1}, ValueError),
        ({"chunk_size": 1.5}, TypeError),
        ({"buffer_size": "1"}, TypeError),
        ({"buffer_size": None}, TypeError),
    ],
)
async def test_invalid_sizes(anyio_backend: Any, bad: dict[str, Any], error: type[Exception]) -> None:
    async with TransportGroup() as group:
        with pytest.raises(error, match=r"at least 1|a number of bytes"):
            await memory_connection(group, Recorder, Recorder, **bad)


async def test_a_group_that_is_not_open(anyio_backend: Any) -> None:
    group = TransportGroup()
    with pytest.raises(RuntimeError, match=r"^memory_connection\(\): the group is not open yet"):
        await memory_connection(group, Recorder, Recorder)
    async with group:
        await turns(1)
    with pytest.raises(RuntimeError, match=r"^memory_connection\(\): the group is not open any more"):
        await memory_connection(group, Recorder, Recorder)


async def test_a_busy_connection_does_not_starve_tasks_and_timers(anyio_backend: Any) -> None:
    """Two ends that write to each other without end in memory do not starve tasks or timers."""

    class Endless(asyncio.Protocol):
        transport: Any

        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            transport.write(b"x")

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    async with TransportGroup() as group:
        (a, _), (b, _) = await memory_connection(group, Endless, Endless)
        done = anyio.Event()
        group.call_later(0.001, done.set)
        with anyio.fail_after(GUARD):
            await done.wait()
        a.abort()
        b.abort()


# -- hooks and time-outs --------------------------------------------------------------------------------------


async def test_hooks_are_called_with_the_recorder_and_the_arguments(stack: Stack) -> None:
    seen: list[tuple[Any, ...]] = []

    def received(recorder: Recorder, data: bytes) -> None:
        assert recorder.calls[-1] == ("data_received", data)  # The callback has been recorded.
        seen.append(("data", recorder, data))

    def ended(recorder: Recorder) -> bool:
        seen.append(("end", recorder))
        return True

    recorder = Recorder(on_data_received=received, on_eof_received=ended)
    async with stack.open() as group, connected(group, recorder) as (transport, _, peer):
        await peer.send(b"x")
        peer.shutdown()
        await recorder.wait_for("eof_received")
        transport.write(b"still open")  # because the hook returned `True`
        assert await peer.receive_exactly(10) == b"still open"
        recorder.hooks["connection_lost"] = lambda recorder, exc: seen.append(("lost", recorder, exc))
    recorder.check()
    assert seen == [("data", recorder, b"x"), ("end", recorder), ("lost", recorder, None)]


async def test_a_hook_runs_before_the_wrapped_protocol(stack: Stack) -> None:
    order: list[str] = []

    class Wrapped(asyncio.Protocol):
        def eof_received(self) -> bool:
            order.append("protocol")
            return False

    def hook(recorder: Recorder) -> bool:
        order.append("hook")
        return True

    recorder = Recorder(Wrapped(), on_eof_received=hook)
    async with stack.open() as group, connected(group, recorder) as (_, _, peer):
        peer.shutdown()
        assert await peer.receive_all() == b""  # The protocol's `False` counts.
        await recorder.wait_for("connection_lost")
    assert order == ["hook", "protocol"]
    recorder.check()


async def test_a_hook_may_give_the_buffer(stack: Stack) -> None:
    mine = bytearray(3)
    recorder = BufferedRecorder(on_get_buffer=lambda recorder, size: memoryview(mine))
    async with stack.open() as group, connected(group, recorder) as (_, _, peer):
        await peer.send(b"abcdefgh")
        assert await recorder.wait_received(8) == b"abcdefgh"
    assert bytes(mine) == b"ghf"
    recorder.check()


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder, DatagramRecorder, SubprocessRecorder])
@pytest.mark.parametrize("name", ["on_data_recieved", "data_received", "connection_made", "on_"])
def test_an_unknown_hook(kind: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__}\(\) got an unknown hook '{name}': its hooks are on_connect"):
        kind(**{name: print})


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder, DatagramRecorder, SubprocessRecorder])
async def test_mistakes(anyio_backend: Any, kind: Any) -> None:
    async def hook(recorder: Any, transport: Any) -> None: ...

    for wrong in (hook, 5):
        with pytest.raises(TypeError, match=r"start_soon\(\)|callable"):
            kind(on_connection_made=wrong)
    for refused in (asyncio.Protocol, 5):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\(\) takes a protocol"):
            kind(refused)
    with pytest.raises(ValueError, match="connection_made"):
        await kind().wait_for("conection_made")


async def test_extra_info_that_is_no_mapping(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        for name in ("info_a", "info_b"):
            with pytest.raises(TypeError, match=name):
                await memory_connection(group, Recorder, Recorder, **{name: 5})  # type: ignore[arg-type]
        assert not group.statistics().open_transports


def test_a_callback_inside_a_hook_is_a_violation() -> None:
    recorder = Recorder(on_data_received=lambda recorder, data: recorder.eof_received())
    recorder.connection_made(TRANSPORT)
    recorder.data_received(b"x")
    assert recorder.violations == ["eof_received() inside data_received()"]


async def test_a_wait_that_takes_too_long_shows_what_was_recorded(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, one), (b, _) = await memory_connection(group, Recorder, Recorder)
        b.write(bytes(100_000))
        await one.wait_received(65536)
        with pytest.raises(
            TimeoutError, match=r"more than 0.01 s, recorded so far: \[connection_made\(.*data_received\("
        ):
            await one.wait_for("eof_received", timeout=0.01)
        with pytest.raises(TimeoutError) as caught:
            await one.wait_received(1_000_000, timeout=0.01)
        assert len(str(caught.value)) < 1000
        with pytest.raises(TimeoutError):
            await one.wait_until(lambda: False, timeout=0)
        group.call_later(0.01, a.abort)
        await one.wait_for("connection_lost", timeout=None)


async def test_waits_end_after_ten_seconds_by_default(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float | None] = []
    real = anyio.move_on_after

    def quicker(delay: float | None, shield: bool = False) -> Any:
        given.append(delay)
        return real(0.01, shield)

    monkeypatch.setattr(anyio, "move_on_after", quicker)
    recorder = Recorder(transport=TRANSPORT)
    for wait in (recorder.wait_for("eof_received"), recorder.wait_received(1), recorder.wait_until(lambda: False)):
        with pytest.raises(TimeoutError, match="10 s"):
            await wait
    assert given == [10] * 3


# -- TLS in memory --------------------------------------------------------------------------------------------


def tls(certificates: Certificates) -> dict[str, Any]:
    return {"ssl": certificates.client(), "server_ssl": certificates.server(), "server_hostname": NAME}


@pytest.mark.parametrize(("chunk_size", "buffer_size"), [(None, 65536), (1, 100), (1000, 1)])
async def test_tls_in_memory(
    anyio_backend: Any, certificates: Certificates, chunk_size: int | None, buffer_size: int
) -> None:
    async with TransportGroup() as group:
        (a, one), (b, other) = await memory_connection(
            group, Recorder, BufferedRecorder, chunk_size=chunk_size, buffer_size=buffer_size, **tls(certificates)
        )
        assert one.names == other.names == ["connection_made"]
        assert a.get_extra_info("peercert")["subjectAltName"] == (("DNS", NAME),)
        assert b.get_extra_info("ssl_object").server_side
        a.write(pattern(2000))
        b.write(b"answer")
        assert await other.wait_received(2000) == pattern(2000)
        assert await one.wait_received(6) == b"answer"
        a.close()
        await other.wait_for("connection_lost")
    for recorder in (one, other):
        assert recorder.exception is None
        recorder.check()


async def test_tls_in_memory_that_fails(anyio_backend: Any, certificates: Certificates) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with TransportGroup() as group:
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await memory_connection(group, factory, factory, **{**tls(certificates), "server_hostname": "other.test"})
        with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
            await memory_connection(
                group, factory, factory, **{**tls(certificates), "ssl": ssl.create_default_context()}
            )
        with anyio.CancelScope() as scope:
            group.call_soon(scope.cancel)
            await memory_connection(group, factory, factory, chunk_size=1, **tls(certificates))
        assert scope.cancelled_caught
        assert group.statistics().pending_timers == 0
        await group.wait_closed()
    assert made == []


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ssl": None}, ValueError, "must be given together"),
        ({"server_ssl": None}, ValueError, "must be given together"),
        ({"ssl": True}, TypeError, "ssl must be an SSLContext or None, got True"),
        ({"server_ssl": "context"}, TypeError, "server_ssl must be an SSLContext or None, got 'context'"),
        ({"server_hostname": None}, ValueError, "server_hostname"),
        ({"ssl": None, "server_ssl": None}, ValueError, "server_hostname is only meaningful with ssl"),
    ],
)
async def test_invalid_tls_parameters(
    anyio_backend: Any, certificates: Certificates, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with TransportGroup() as group:
        with pytest.raises(error, match=message):
            await memory_connection(group, Recorder, Recorder, **{**tls(certificates), **changed})
