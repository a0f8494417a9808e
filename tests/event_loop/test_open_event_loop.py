"""The beginning and the end of an event loop, and the errors that end it."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from importlib.metadata import version

import anyio
import anyio.lowlevel
import pytest
from network import needs_selector, needs_signals, no_descriptors_below
from support import BaseExceptionGroup, Recorder, open_descriptors, turns, until

from transports_anyio import TransportGroup, current_group, from_asyncio, open_event_loop, run_asyncio, to_asyncio


class MistakeError(Exception):
    pass


def only_trio(anyio_backend) -> None:
    if anyio_backend[0] != "trio":
        pytest.skip("there the running event loop is yielded, and goes on")


@asynccontextmanager
async def reported(loop):
    """Collect the reports to the exception handler. On asyncio the test runner has a handler, which is restored."""
    reports = []
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: reports.append(context))
    try:
        yield reports
    finally:
        loop.set_exception_handler(before)


async def start(function, *args):
    """Start an asyncio task and return it."""
    return to_asyncio.run_sync(lambda: asyncio.get_running_loop().create_task(function(*args)))


# -- opening


async def test_it_is_an_asyncio_event_loop(anyio_backend):
    async with open_event_loop() as loop:
        assert isinstance(loop, asyncio.AbstractEventLoop)
        assert loop.is_running()
        assert not loop.is_closed()
        assert to_asyncio.run_sync(asyncio.get_running_loop) is loop
    if anyio_backend[0] == "trio":
        assert loop.is_closed()
        assert not loop.is_running()


async def test_on_asyncio_it_is_the_running_one(anyio_backend):
    async with open_event_loop() as loop:
        if anyio_backend[0] == "trio":
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
        else:
            assert loop is asyncio.get_running_loop()


async def test_inside_asyncio_code_it_is_the_running_one(anyio_backend):
    async def inside(loop):
        async with open_event_loop() as running:
            assert running is loop
        assert not loop.is_closed()

    async with open_event_loop() as loop:
        await to_asyncio.run(inside, loop)


async def test_inside_backend_code_of_asyncio_code_it_is_another_one(anyio_backend):
    """It ends with its own block."""

    async def inside(outer):
        async with open_event_loop() as loop:
            result = await to_asyncio.run(asyncio.sleep, 0.001, 5)
            different = loop is not outer
        return result, different

    async def ask(loop):
        return await from_asyncio.run(inside, loop)

    async with open_event_loop() as loop:
        assert await to_asyncio.run(ask, loop) == (5, anyio_backend[0] == "trio")
        assert await to_asyncio.run(asyncio.sleep, 0, 6) == 6


LOADING = """
import asyncio, sys
import anyio, sniffio
from transports_anyio import EventLoop, from_asyncio, open_event_loop, to_asyncio

loading = []


class Watch:
    def find_spec(self, name, *_):
        loading.append(name)


async def asyncio_code():
    assert "anyio._backends._asyncio" in sys.modules
    sys.meta_path.insert(0, Watch())
    assert sniffio.current_async_library() == "asyncio"
    assert anyio.get_cancelled_exc_class() is asyncio.CancelledError
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep, 0)
    with anyio.move_on_after(0) as scope:
        await anyio.Event().wait()
    assert scope.cancelled_caught
    assert await anyio.to_thread.run_sync(anyio.from_thread.run_sync, sniffio.current_async_library) == "asyncio"
    assert from_asyncio.run_sync(sniffio.current_async_library) == library
    assert await from_asyncio.run(name_of_library) == library
    assert "anyio._backends._asyncio" not in loading


async def name_of_library():
    await anyio.sleep(0)
    return sniffio.current_async_library()


async def backend_code():
    assert sniffio.current_async_library() == library
    async with open_event_loop():
        assert "anyio._backends._asyncio" in sys.modules
        assert sniffio.current_async_library() == library
        await to_asyncio.run(asyncio_code)
        assert sniffio.current_async_library() == library


library = "trio" if "trio" in sys.argv else "asyncio"
assert "anyio._backends._asyncio" not in sys.modules
if "factory" in sys.argv:
    loop = EventLoop()
    loop.run_until_complete(asyncio_code())
    loop.close()
else:
    anyio.run(backend_code, backend=library, backend_options={"use_uvloop": True} if "uvloop" in sys.argv else {})
"""


@pytest.mark.parametrize("words", [["asyncio"], ["uvloop"], ["trio"], ["trio", "factory"]], ids=" ".join)
def test_anyios_asyncio_backend_is_loaded_when_the_event_loop_is_opened(request, words):
    """AnyIO loads a backend when it is used first, in an iteration of the event loop, which would stand still."""
    if words[0] not in (request.config.getoption("--backend") or words):
        pytest.skip("another backend was asked for")
    for name in ("sniffio", words[0]):
        pytest.importorskip(name)
    subprocess.run([sys.executable, "-c", LOADING, *words], timeout=60, check=True)


async def test_two_event_loops_in_one_run(anyio_backend):
    only_trio(anyio_backend)
    found = []

    async def use(number):
        async with open_event_loop() as loop:
            found.append(loop)
            for _ in range(20):
                assert await to_asyncio.run(asyncio.sleep, 0.001, number) == number
                assert to_asyncio.run_sync(asyncio.get_running_loop) is loop

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(use, 1)
        tasks.start_soon(use, 2)
    assert found[0] is not found[1]


async def test_one_event_loop_inside_another(anyio_backend):
    only_trio(anyio_backend)
    async with open_event_loop() as outer:
        async with open_event_loop() as inner:
            assert to_asyncio.run_sync(asyncio.get_running_loop) is inner
        assert to_asyncio.run_sync(asyncio.get_running_loop) is outer
        assert await to_asyncio.run(asyncio.sleep, 0.001, 5) == 5


async def test_transports_wait_in_asyncio_code_and_start_no_tasks(anyio_backend):
    only_trio(anyio_backend)

    async def never():
        raise AssertionError

    async def use(loop):
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
        await transport.drain()
        with pytest.raises(RuntimeError, match=r"asyncio\.create_task\(\)"):
            transport.start_soon(never)
        waiting = asyncio.create_task(transport.wait_closed())
        await asyncio.sleep(0)
        assert not waiting.done()
        transport.close()
        await asyncio.wait_for(waiting, 30)
        server.close()
        await server.wait_closed()

    async with open_event_loop() as loop:
        await to_asyncio.run(use, loop)


async def test_no_group_is_current_in_asyncio_code(anyio_backend):
    def look():
        with pytest.raises(RuntimeError, match="no transport group is current"):
            current_group()

    async with open_event_loop() as loop:
        to_asyncio.run_sync(look)

        async def connect():
            server = await loop.create_server(lambda: Recorder(on_connection_made=lambda *_: look()), "127.0.0.1", 0)
            address = server.sockets[0].getsockname()
            transport, protocol = await loop.create_connection(
                lambda: Recorder(on_connection_lost=lambda *_: look()), *address[:2]
            )
            transport.close()
            await protocol.wait_for("connection_lost")
            server.close()

        await to_asyncio.run(connect)


async def test_a_group_in_asyncio_code(anyio_backend):
    """Its poller is a reader of the event loop."""

    async def use():
        echo = Recorder(on_data_received=lambda self, data: self.transport.write(data))
        async with TransportGroup() as group:
            server = await group.create_server(lambda: echo, "127.0.0.1", 0)
            transport, protocol = await group.create_connection(Recorder, *server.sockets[0].getsockname()[:2])
            transport.write(b"hello")
            assert await protocol.wait_received(5) == b"hello"
            called = asyncio.Event()
            group.call_later(0.01, called.set)
            await called.wait()
            transport.close()
            server.close()

    async with open_event_loop():
        await to_asyncio.run(use)


async def test_a_group_beside_it(anyio_backend):
    """The group belongs to backend code. Asyncio code may use its transports."""
    async with TransportGroup() as group, open_event_loop():
        server = await group.create_server(
            lambda: Recorder(on_data_received=lambda self, data: self.transport.write(data)), "127.0.0.1", 0
        )
        transport, protocol = await group.create_connection(Recorder, *server.sockets[0].getsockname()[:2])

        async def write():
            transport.write(b"hello")
            group.start_soon(work)
            transport.set_write_buffer_limits(0)
            await asyncio.sleep(0)

        tasks = []

        async def work():
            await anyio.lowlevel.checkpoint()
            tasks.append(anyio.get_current_task())

        await to_asyncio.run(write)
        await until(lambda: tasks)
        assert await protocol.wait_received(5) == b"hello"
        to_asyncio.run_sync(transport.close)
        await protocol.wait_for("connection_lost")


# -- the end


async def test_tasks_are_cancelled_and_waited_for(anyio_backend):
    only_trio(anyio_backend)
    events = []

    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            events.append("cleaned up")

    async with open_event_loop():
        task = await start(work)
    assert events == ["cleaned up"]
    assert task.cancelled()


async def test_cancelled_from_outside(anyio_backend):
    only_trio(anyio_backend)
    events = []
    protocols = []

    async def work():
        loop = asyncio.get_running_loop()

        def lost(self, exc):
            assert asyncio.get_running_loop() is loop
            events.append("lost")

        def factory():
            protocol = Recorder(on_connection_lost=lost)
            protocols.append(protocol)
            return protocol

        server = await loop.create_server(factory, "127.0.0.1", 0)
        await loop.create_connection(factory, *server.sockets[0].getsockname()[:2])
        await until_made(2)
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            events.append("cleaned up")

    async def until_made(count):
        while sum(protocol.transport is not None for protocol in protocols) < count:
            await asyncio.sleep(0.001)

    begun = threading.Event()
    with anyio.CancelScope() as scope:
        async with open_event_loop():
            await start(work)
            await until(begun.is_set)
            scope.cancel()
            await anyio.sleep(3600)
    assert scope.cancelled_caught
    assert events == ["cleaned up", "lost", "lost"]


async def test_nothing_is_left_after_a_cancellation(anyio_backend):
    """No file descriptor, no thread, no task."""
    only_trio(anyio_backend)
    import trio

    async def serve(begun):
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        for _ in range(3):
            await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
        if sys.platform != "win32":
            await loop.subprocess_exec(asyncio.SubprocessProtocol, sys.executable, "-c", "input()")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            loop.add_reader(ours, str)
            await loop.run_in_executor(None, str)
            begun.set()
            await from_asyncio.run(anyio.sleep, 3600)

    async def use():
        begun = asyncio.Event()
        with anyio.CancelScope() as scope:
            async with open_event_loop():
                await start(serve, begun)
                await to_asyncio.run(begun.wait)
                scope.cancel()
                await anyio.sleep(3600)
        assert scope.cancelled_caught

    def tasks():
        return trio.lowlevel.current_statistics().tasks_living

    await use()  # Whatever is loaded and opened once.
    before = len(open_descriptors()), threading.active_count(), tasks()
    await use()
    assert (len(open_descriptors()), threading.active_count(), tasks()) == before


async def test_a_task_that_does_not_end_holds_the_end_up(anyio_backend):
    only_trio(anyio_backend)
    cancellations = []

    async def stubborn(enough):
        while not enough.is_set():
            try:
                await enough.wait()
            except asyncio.CancelledError as exc:
                cancellations.append(exc)

    async def release(enough):
        await until(lambda: cancellations)
        await anyio.sleep(0.01)
        assert not loop.is_closed()
        loop.call_soon(enough.set)

    async with anyio.create_task_group() as tasks:
        async with open_event_loop() as loop:
            enough = asyncio.Event()
            await start(stubborn, enough)
            await to_asyncio.run(asyncio.sleep, 0)
            tasks.start_soon(release, enough)
    assert len(cancellations) == 1
    assert loop.is_closed()


async def test_what_is_written_is_flushed_when_the_block_ends(anyio_backend):
    only_trio(anyio_backend)
    data = bytes(3_000_000)
    received = bytearray()
    async with TransportGroup() as group:
        server = await group.create_server(
            lambda: Recorder(on_data_received=lambda _, data: received.extend(data)), "127.0.0.1", 0
        )
        async with open_event_loop() as loop:

            async def send():
                transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname()[:2])
                transport.write(data)

            await to_asyncio.run(send)
        await until(lambda: len(received) == len(data))


async def test_a_cancellation_ends_the_flush(anyio_backend):
    only_trio(anyio_backend)
    lost = []
    async with TransportGroup() as group:
        server = await group.create_server(
            lambda: Recorder(on_connection_made=lambda _, transport: transport.pause_reading()), "127.0.0.1", 0
        )
        with anyio.CancelScope() as scope:
            async with open_event_loop() as loop:

                async def send():
                    transport, _ = await loop.create_connection(
                        lambda: Recorder(on_connection_lost=lambda _, exc: lost.append(exc)),
                        *server.sockets[0].getsockname()[:2],
                    )
                    transport.write(bytes(30_000_000))

                await to_asyncio.run(send)
                scope.deadline = anyio.current_time() + 0.05
        assert scope.cancelled_caught
        assert lost == [None]
        for transport in tuple(group._core.transports):
            transport.abort()


async def test_what_the_block_raises_comes_out_as_itself(anyio_backend):
    mistake = MistakeError()
    for error in (mistake, BaseExceptionGroup("group", [mistake])):
        with pytest.raises(type(error)) as caught:
            async with open_event_loop():
                await to_asyncio.run(asyncio.sleep, 0)
                raise error
        assert caught.value is error


@needs_signals
async def test_the_order_at_the_end(anyio_backend):
    only_trio(anyio_backend)
    order = []

    async def generate():
        try:
            yield 1
        finally:
            order.append("generator")

    async def work():
        loop = asyncio.get_running_loop()
        generator = generate()
        keep.append(generator)
        await generator.asend(None)
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()[:2]

        async def late():
            try:
                await asyncio.sleep(3600)
            finally:
                order.append("started by connection_lost")

        def lost(*_):
            order.append("connection_lost")
            keep.append(loop.create_task(late()))
            loop.call_soon(loop.call_soon, order.append, "callback")

        await loop.create_connection(lambda: Recorder(on_connection_lost=lost), *address)
        loop.run_in_executor(None, str)
        loop.add_signal_handler(signal.SIGUSR1, str)
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            order.append("task")

    import signal

    keep: list[object] = []
    begun = threading.Event()
    before = signal.getsignal(signal.SIGUSR1)
    async with open_event_loop() as loop:
        await start(work)
        await until(begun.is_set)
    assert order[:2] == ["task", "connection_lost"]
    assert order.index("started by connection_lost") < order.index("generator")
    assert "callback" in order
    assert signal.getsignal(signal.SIGUSR1) == before
    assert loop.is_closed()
    for call in (loop.call_soon, loop.call_soon_threadsafe):
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            call(str)
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        loop.call_later(0, str)
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        loop.run_until_complete(None)
    coroutine = asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        loop.create_task(coroutine)
    coroutine.close()
    loop.close()


async def test_a_callback_that_always_schedules_itself_does_not_hold_the_end_up(anyio_backend):
    only_trio(anyio_backend)
    async with open_event_loop() as loop:

        def again():
            loop.call_soon(again)

        to_asyncio.run_sync(again)
        await turns()


async def test_a_task_that_fails_when_it_is_cancelled_is_reported(anyio_backend):
    only_trio(anyio_backend)
    reports = []

    async def fail():
        try:
            await asyncio.sleep(3600)
        finally:
            raise MistakeError

    async with open_event_loop() as loop:
        loop.set_exception_handler(lambda _, context: reports.append(context))
        await start(fail)
        await to_asyncio.run(asyncio.sleep, 0)
    assert [type(report["exception"]) for report in reports] == [MistakeError]


# -- errors


async def test_a_callback_that_fails_goes_to_the_exception_handler(anyio_backend):
    async with open_event_loop() as loop, reported(loop) as reports:

        def fail(exc):
            raise exc

        for error in (MistakeError(), asyncio.CancelledError()):
            to_asyncio.run_sync(loop.call_soon, fail, error)
        to_asyncio.run_sync(loop.call_later, 0, fail, MistakeError())
        await until(lambda: len(reports) >= 2)
        await until(lambda: len([r for r in reports if isinstance(r["exception"], MistakeError)]) == 2)
        assert all("handle" in report for report in reports)


async def test_a_protocol_that_raises_a_cancelled_error_is_reported(anyio_backend):
    async with open_event_loop() as loop, reported(loop) as reports:

        def fail(*_):
            raise asyncio.CancelledError

        async def connect():
            server = await loop.create_server(lambda: Recorder(on_data_received=fail), "127.0.0.1", 0)
            transport, protocol = await loop.create_connection(Recorder, *server.sockets[0].getsockname()[:2])
            transport.write(b"x")
            await protocol.wait_for("connection_lost")
            server.close()

        await to_asyncio.run(connect)
        assert [type(report["exception"]) for report in reports] == [asyncio.CancelledError]


async def test_a_background_task_that_fails_is_logged_by_asyncio(anyio_backend, caplog):
    async def fail():
        raise MistakeError

    async with open_event_loop() as loop, reported(loop):
        loop.set_exception_handler(None)
        with caplog.at_level(logging.ERROR, "asyncio"):
            await start(fail)
            await until(lambda: caplog.records)
        assert caplog.records[0].name == "asyncio"
        assert "Task exception was never retrieved" in caplog.text


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "where", ["callback", "timer", "task", "protocol", "reader", pytest.param("signal", marks=needs_signals)]
)
def test_what_ends_the_program_is_raised_as_itself_after_the_clean_ups(request, kind, where):
    backends = request.config.getoption("--backend") or ["asyncio", "uvloop", "trio"]
    for backend in backends:
        # What uvloop does is its own, and asyncio itself leaves transports and readers open.
        if backend == "trio" or (backend == "asyncio" and where in {"callback", "task"}):
            ends_the_program(kind, where, backend)


def ends_the_program(kind, where, backend):
    import signal
    import socket

    events = []
    error = kind(3)

    async def main():
        loop = asyncio.get_running_loop()

        def fail(*_):
            raise error

        async def work():
            fail()

        ours, theirs = socket.socketpair()
        try:
            match where:
                case "callback":
                    loop.call_soon(fail)
                case "timer":
                    loop.call_later(0, fail)
                case "task":
                    keep = loop.create_task(work())
                    events.append(keep)
                case "protocol":
                    theirs.send(b"x")
                    await loop.create_connection(lambda: Recorder(on_data_received=fail), sock=ours)
                case "reader":
                    theirs.send(b"x")
                    ours.setblocking(False)
                    loop.add_reader(ours, fail)
                case "signal":
                    loop.add_signal_handler(signal.SIGUSR1, fail)
                    signal.raise_signal(signal.SIGUSR1)
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.001)
                events.append("cleaned up")
        finally:
            if where == "reader":
                loop.remove_reader(ours)
            if where != "protocol":
                ours.close()
            theirs.close()

    name, options = {
        "asyncio": ("asyncio", {"use_uvloop": False}),
        "uvloop": ("asyncio", {"use_uvloop": True}),
        "trio": ("trio", {}),
    }[backend]
    if backend != "asyncio":
        pytest.importorskip(backend)
    with pytest.raises(kind) as caught:
        run_asyncio(main, backend=name, backend_options=options)
    if backend == "trio":
        assert caught.value is error
        assert events[-1] == "cleaned up"


async def test_an_exception_handler_that_raises_is_logged(anyio_backend, caplog):
    only_trio(anyio_backend)

    def fail(*_):
        raise MistakeError

    async with open_event_loop() as loop:
        loop.set_exception_handler(fail)
        with caplog.at_level(logging.ERROR, "asyncio"):
            to_asyncio.run_sync(loop.call_soon, fail)
            await until(lambda: caplog.records)
    assert "Unhandled error in exception handler" in caplog.text


# -- run_asyncio


def run_everywhere(request):
    names = request.config.getoption("--backend") or ["asyncio", "uvloop", "trio"]
    for name in names:
        if name != "asyncio":
            pytest.importorskip(name)
        yield ("trio", {}) if name == "trio" else ("asyncio", {"use_uvloop": name == "uvloop"})


def test_run_asyncio_returns_and_raises_what_the_function_does(request):
    async def work(value):
        await asyncio.sleep(0.001)
        if isinstance(value, Exception):
            raise value
        return value

    for backend, options in run_everywhere(request):
        assert run_asyncio(work, 5, backend=backend, backend_options=options) == 5
        error = MistakeError()
        with pytest.raises(MistakeError) as caught:
            run_asyncio(work, error, backend=backend, backend_options=options)
        assert caught.value is error


def test_run_asyncio_of_a_task_that_is_cancelled(request):
    async def cancelled():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    for backend, options in run_everywhere(request):
        with pytest.raises(asyncio.CancelledError):
            run_asyncio(cancelled, backend=backend, backend_options=options)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older Pythons make a new one")
def test_run_asyncio_leaves_no_event_loop_set(request):
    async def set_it():
        asyncio.set_event_loop(asyncio.get_running_loop())

    for backend, options in run_everywhere(request):
        run_asyncio(set_it, backend=backend, backend_options=options)
        with pytest.raises(RuntimeError):
            asyncio.get_event_loop()


def test_run_asyncio_uses_trio_unless_told_otherwise():
    pytest.importorskip("trio")

    async def look():
        import trio

        return from_asyncio.run_sync(trio.lowlevel.in_trio_run)

    assert run_asyncio(look)


@pytest.mark.parametrize("by", ["run_asyncio", "trio.run"])
def test_a_mock_clock(by):
    trio = pytest.importorskip("trio")
    trio_testing = pytest.importorskip("trio.testing")
    if by == "run_asyncio" and tuple(map(int, version("anyio").split(".")[:2])) < (4, 14):
        pytest.skip("an older AnyIO passes no options to trio.run()")

    async def sleep():
        loop = asyncio.get_running_loop()
        start = loop.time()
        await asyncio.sleep(3600)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3600)
        return loop.time() - start

    async def main():
        async with open_event_loop():
            return await to_asyncio.run(sleep)

    clock = trio_testing.MockClock(autojump_threshold=0)
    if by == "run_asyncio":
        duration = run_asyncio(sleep, backend_options={"clock": clock})
    else:
        duration = trio.run(main, clock=clock)
    assert 7200 <= duration < 7201


def test_in_guest_mode_the_event_loop_of_the_host_is_not_ours():
    """The tasks of trio run in callbacks of the host's event loop. Ours is another one."""
    trio = pytest.importorskip("trio")

    async def in_trio():
        async with open_event_loop() as loop:
            assert await to_asyncio.run(asyncio.sleep, 0.001, 5) == 5
            assert to_asyncio.run_sync(asyncio.get_running_loop) is loop
            host = asyncio.get_running_loop()
            assert host is not loop

            async def connect():
                server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                assert await reader.read() == b""
                writer.close()
                server.close()
                assert asyncio.get_running_loop() is loop

            await to_asyncio.run(connect)
            assert asyncio.get_running_loop() is host
        return loop

    async def host():
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        trio.lowlevel.start_guest_run(
            in_trio,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        outcome = await ended
        return outcome.unwrap()

    loop = asyncio.run(host())
    assert loop.is_closed()


def test_where_neither_an_event_loop_nor_trio_runs():
    coroutine = open_event_loop().__aenter__()
    with pytest.raises(RuntimeError):
        coroutine.send(None)


@needs_selector
async def test_a_poller_that_fails_ends_the_block_in_order(anyio_backend):
    only_trio(anyio_backend)
    events = []
    failure = OSError("the system's list is gone")

    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            events.append("cleaned up")

    def fail(*_):
        loop._core.dispatch = dispatch
        raise failure

    with pytest.raises(OSError, match="the system's list is gone") as caught:
        async with open_event_loop() as loop:
            dispatch = loop._core.dispatch
            loop._core.dispatch = fail
            await to_asyncio.run(work)
    assert caught.value is failure
    assert events == ["cleaned up"]


@needs_selector
async def test_a_selector_that_is_lost_ends_the_block_in_order(anyio_backend):
    """The user has closed its file descriptor: every call of it fails."""
    only_trio(anyio_backend)
    events = []

    async def work(loop):
        server = await loop.create_server(Recorder, "127.0.0.1", 0)
        await loop.create_connection(
            lambda: Recorder(on_connection_lost=lambda *_: events.append("lost")),
            *server.sockets[0].getsockname()[:2],
        )
        number = loop._core.poller.selector.fileno()
        os.close(number)
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            await loop.run_in_executor(None, events.append, "thread")
            events.append("cleaned up")

    with pytest.raises((OSError, ValueError)):
        async with open_event_loop() as loop:
            await to_asyncio.run(work, loop)
    assert events == ["thread", "cleaned up", "lost"]


@needs_selector
@pytest.mark.parametrize("lifted", [False, True], ids=["no descriptor", "a descriptor later"])
async def test_a_selector_that_cannot_be_reopened_ends_the_block_in_order(anyio_backend, lifted):
    """There is no file descriptor for another one, or only when a clean-up has released one."""
    only_trio(anyio_backend)
    events = []

    async def work(loop):
        server = await loop.create_server(Recorder, "127.0.0.1", 0)
        await loop.create_connection(
            lambda: Recorder(on_connection_lost=lambda *_: events.append("lost")),
            *server.sockets[0].getsockname()[:2],
        )
        number = loop._core.poller.selector.fileno()
        sender, receiver = socket.socketpair()
        receiver.setblocking(False)
        with sender, receiver, no_descriptors_below(number) as lift:
            os.close(number)
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.001)
                await loop.run_in_executor(None, events.append, "thread")
                receiving = asyncio.ensure_future(loop.sock_recv(receiver, 100))
                await asyncio.sleep(0.001)
                sender.send(b"data")
                await asyncio.sleep(0.1)
                assert not receiving.done()
                if lifted:
                    lift()
                    assert await receiving == b"data"
                receiving.cancel()
                events.append("cleaned up")

    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        async with open_event_loop() as loop:
            await to_asyncio.run(work, loop)
    assert caught.value.errno == errno.EBADF
    assert events == ["thread", "cleaned up", "lost"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older Pythons make a new one")
def test_an_event_loop_that_asyncio_code_has_set_is_set_no_longer():
    """If another one was set, it stays."""
    trio = pytest.importorskip("trio")

    async def main(set_it):
        async with open_event_loop() as loop:
            if set_it:
                to_asyncio.run_sync(asyncio.set_event_loop, loop)

    asyncio.set_event_loop(None)
    for set_it in (False, True):
        trio.run(main, set_it)
        with pytest.raises(RuntimeError):
            asyncio.get_event_loop()
    other = asyncio.SelectorEventLoop()
    try:
        asyncio.set_event_loop(other)
        trio.run(main, False)
        assert asyncio.get_event_loop() is other
    finally:
        asyncio.set_event_loop(None)
        other.close()
