"""An event loop that is made, run many times and closed by its owner: asyncio's own is the oracle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from network import needs_pipes, needs_selector, needs_signals
from support import GUARD

trio = pytest.importorskip("trio")

from transports_anyio import EventLoop, from_asyncio, new_event_loop, to_asyncio  # noqa: E402
from transports_anyio._event_loop._sides import library  # noqa: E402

HOST = "127.0.0.1"


class EventLoopOnTrio(EventLoop):
    """trio runs from the beginning of each call on, as it does after the first call of backend code."""

    def _check_may_run(self) -> None:
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)


FACTORIES = {"oracle": asyncio.SelectorEventLoop, "without trio": EventLoop, "with trio": EventLoopOnTrio}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" in metafunc.fixturenames:
        backends = metafunc.config.getoption("--backend") or ["asyncio", "trio"]
        # Where Python versions differ, the newest behaviour is right: older ones are no oracle.
        names = ["oracle"] if "asyncio" in backends and sys.version_info >= (3, 13) else []
        names += ["without trio", "with trio"] if "trio" in backends else []
        metafunc.parametrize("make", [FACTORIES[name] for name in names], ids=names)


@pytest.fixture
def loop(make: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[asyncio.AbstractEventLoop]:
    loop = make()
    yield loop
    loop.close()


@pytest.fixture
def ours() -> Iterator[EventLoop]:
    """For what has no oracle: trio from asyncio code."""
    loop = new_event_loop()
    yield loop
    loop.close()


def ours_only(make: Any) -> None:
    if not issubclass(make, EventLoop):
        pytest.skip("there is no trio")


async def echo_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line.upper())
    writer.close()


# Calls, and what lives between them


def test_servers_connections_tasks_and_timers_live_between_the_calls(loop: asyncio.AbstractEventLoop) -> None:
    async def line(text: bytes) -> bytes:
        writer.write(text)
        return await reader.readline()

    async def end() -> None:
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    fired: list[str] = []
    server = loop.run_until_complete(asyncio.start_server(echo_line, HOST, 0))
    reader, writer = loop.run_until_complete(asyncio.open_connection(*server.sockets[0].getsockname()))
    task = loop.create_task(asyncio.sleep(0.01, "slept"))
    loop.call_later(0.005, fired.append, "timer")
    for text in (b"one\n", b"two\n"):
        assert loop.run_until_complete(line(text)) == text.upper()
    assert loop.run_until_complete(task) == "slept"
    assert fired == ["timer"]
    loop.run_until_complete(end())


def test_a_timer_that_was_due_during_the_pause(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_until_complete(asyncio.sleep(0))
    due = loop.create_future()
    loop.call_later(0.01, due.set_result, "due")
    earlier = loop.call_later(0.001, due.set_result, "cancelled")
    earlier.cancel()
    time.sleep(0.02)
    assert loop.run_until_complete(due) == "due"


def test_the_clock_goes_on_between_the_calls(loop: asyncio.AbstractEventLoop) -> None:
    async def now() -> float:
        await asyncio.sleep(0.001)
        return loop.time()

    times = [loop.time(), loop.run_until_complete(now()), loop.time(), loop.run_until_complete(now()), loop.time()]
    assert times == sorted(times)
    assert times[-1] - times[0] < GUARD
    assert abs(loop.time() - time.monotonic()) < GUARD


def test_nothing_runs_during_a_pause(loop: asyncio.AbstractEventLoop) -> None:
    ran: list[str] = []
    loop.run_until_complete(asyncio.sleep(0.001))
    loop.call_soon(ran.append, "callback")
    loop.call_soon_threadsafe(ran.append, "from a thread")
    time.sleep(0.01)
    assert ran == []
    loop.run_until_complete(asyncio.sleep(0))
    assert ran == ["callback", "from a thread"]


def test_tasks_cancelled_during_a_pause(loop: asyncio.AbstractEventLoop) -> None:
    task = loop.create_task(asyncio.sleep(GUARD))
    loop.run_until_complete(asyncio.sleep(0.001))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_what_is_done_during_a_pause_shows_in_the_next_call(loop: asyncio.AbstractEventLoop) -> None:
    """Data that is written, a reader that is added or removed, a transport and a server that are closed."""
    left, right = socket.socketpair()
    left.setblocking(False)
    got: list[Any] = []

    async def open_all() -> Any:
        server = await asyncio.start_server(echo_line, HOST, 0)
        return server, *(await asyncio.open_connection(*server.sockets[0].getsockname()))

    async def until(condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.sleep(0.001)

    server, reader, writer = loop.run_until_complete(open_all())
    writer.write(b"written\n" * 100_000)
    loop.add_reader(left, lambda: got.append(left.recv(10)))
    right.send(b"x")
    assert loop.run_until_complete(reader.readexactly(800_000)) == b"WRITTEN\n" * 100_000
    loop.run_until_complete(until(lambda: got))
    assert loop.remove_reader(left)
    right.send(b"y")
    writer.close()
    server.close()
    loop.run_until_complete(writer.wait_closed())
    loop.run_until_complete(server.wait_closed())
    assert got == [b"x"]
    with pytest.raises(ConnectionError):
        loop.run_until_complete(asyncio.open_connection(HOST, writer.get_extra_info("peername")[1]))
    left.close()
    right.close()


def test_a_thread_wakes_an_idle_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    future = loop.create_future()
    timer = threading.Timer(0.01, loop.call_soon_threadsafe, [future.set_result, "woken"])
    timer.start()
    assert loop.run_until_complete(future) == "woken"
    timer.join()


def test_two_event_loops_in_turn(make: Callable[[], asyncio.AbstractEventLoop]) -> None:
    first, second = make(), make()
    tasks = [loop.create_task(asyncio.sleep(0.005, loop)) for loop in (first, second)]
    for _ in range(3):
        for loop in (first, second):
            loop.run_until_complete(asyncio.sleep(0.001))
    assert first.run_until_complete(tasks[0]) is first
    assert second.run_until_complete(tasks[1]) is second
    first.close()
    second.close()


# Stopping


@pytest.mark.parametrize("wait", [0, 0.001])
def test_stop_ends_after_the_round(loop: asyncio.AbstractEventLoop, wait: float) -> None:
    ran: list[str] = []

    def stop() -> None:
        loop.call_soon(ran.append, "next round")
        loop.stop()

    def begin() -> None:
        loop.call_soon(stop)
        loop.call_soon(ran.append, "same round")

    loop.call_later(wait, begin)
    loop.run_forever()
    assert ran == ["same round"]
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert ran == ["same round", "next round"]


def test_stop_before_the_call_runs_one_round(loop: asyncio.AbstractEventLoop) -> None:
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        loop.call_soon(ran.append, "second")

    loop.call_soon(first)
    loop.stop()
    loop.run_forever()
    assert ran == ["first"]
    loop.stop()
    loop.run_forever()
    assert ran == ["first", "second"]


def test_a_thread_stops_an_idle_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    timer = threading.Timer(0.01, loop.call_soon_threadsafe, [loop.stop])
    timer.start()
    loop.run_forever()
    assert not loop.is_running()
    timer.join()


def test_stopped_before_the_future_is_done(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_later(0.001, loop.stop)
    future = loop.create_future()
    with pytest.raises(RuntimeError, match="Event loop stopped before Future completed"):
        loop.run_until_complete(future)
    loop.call_soon(future.set_result, 1)
    assert loop.run_until_complete(future) == 1


@needs_selector
def test_a_socket_is_served_in_the_round_of_a_stop(loop: asyncio.AbstractEventLoop) -> None:
    """What many use to look once: `call_soon(stop)`, `run_forever`."""
    left, right = socket.socketpair()
    got: list[bytes] = []
    loop.add_reader(left, lambda: got.append(left.recv(10)))
    right.send(b"x")
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert got == [b"x"]
    loop.remove_reader(left)
    left.close()
    right.close()


def test_what_may_not_be_done_while_running(loop: asyncio.AbstractEventLoop, make: Any) -> None:
    other = make()

    async def main() -> None:
        future = loop.create_future()
        assert loop.is_running()
        assert not other.is_running()
        with pytest.raises(RuntimeError, match="This event loop is already running"):
            loop.run_until_complete(future)
        with pytest.raises(RuntimeError, match="Cannot run the event loop while another loop is running"):
            other.run_forever()
        with pytest.raises(RuntimeError, match="Cannot close a running event loop"):
            loop.close()

    loop.run_until_complete(main())
    assert not loop.is_running()
    other.close()


def test_one_event_loop_in_two_threads_at_once(ours: EventLoop) -> None:
    """It is refused in the second one, and goes on in the first. asyncio 3.13.0 forgets then that it runs."""
    loop = ours
    failures: list[str] = []

    def elsewhere() -> None:
        future = loop.create_future()
        for call in (loop.run_forever, lambda: loop.run_until_complete(future), loop.close):
            try:
                call()
            except RuntimeError as exc:
                failures.append(str(exc))

    async def main() -> str:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0.001)
        thread.join()
        return "goes on"

    assert loop.run_until_complete(main()) == "goes on"
    running = "This event loop is already running"
    assert failures == [running, running, "Cannot close a running event loop"]


def test_after_close(make: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = make()
    loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    loop.close()
    assert loop.is_closed()
    future = loop.create_future()
    for call in (loop.run_forever, lambda: loop.run_until_complete(future), lambda: loop.call_soon(print)):
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            call()


# What leaves


@pytest.mark.differs(
    "`EventLoop`: a callback that raises `KeyboardInterrupt` or `SystemExit`",
    asyncio="raised at once",
    here="raised after the other callbacks of the iteration",
    why="everything that ends a call does so at the same place",
)
@pytest.mark.parametrize("wait", [0, 0.001])
@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_what_leaves_ends_the_call_and_not_the_loop(
    loop: asyncio.AbstractEventLoop, leaving: type[BaseException], wait: float
) -> None:
    def leave() -> None:
        raise leaving("out")

    async def leave_by_task() -> None:
        await asyncio.sleep(wait)
        raise leaving("out")

    async def wait_in_thread() -> None:
        await loop.run_in_executor(None, leave)

    loop.call_later(wait, leave)
    with pytest.raises(leaving, match="out"):
        loop.run_until_complete(asyncio.sleep(GUARD))
    for main in (leave_by_task, wait_in_thread):
        with pytest.raises(leaving, match="out"):
            loop.run_until_complete(main())
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    loop.run_until_complete(loop.shutdown_default_executor())


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "kind", ["soon", "thread", "reader", pytest.param("signal", marks=needs_signals), "done", "protocol"]
)
def test_what_leaves_a_callback_of_each_kind(
    loop: asyncio.AbstractEventLoop, kind: str, leaving: type[BaseException]
) -> None:
    """It leaves the call once, as itself, and the event loop goes on."""
    left, right = socket.socketpair()
    left.setblocking(False)
    transports: list[Any] = []

    def leave(*_: object) -> None:
        raise leaving(kind)

    class Leaves(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transports.append(transport)

        def data_received(self, data: bytes) -> None:
            raise leaving(kind)

    async def main() -> None:
        if kind == "soon":
            loop.call_soon(leave)
        elif kind == "thread":
            loop.call_soon_threadsafe(leave)
        elif kind == "reader":
            loop.add_reader(left, lambda: leave(left.recv(1)))
            right.send(b"x")
        elif kind == "signal":
            loop.add_signal_handler(signal.SIGUSR1, leave)
            os.kill(os.getpid(), signal.SIGUSR1)
        elif kind == "done":
            future = loop.create_future()
            future.add_done_callback(leave)
            future.set_result(None)
        else:
            await loop.create_connection(Leaves, sock=left)
            right.send(b"x")
        await asyncio.sleep(GUARD)

    if kind == "signal" and sys.platform == "win32":
        pytest.skip("there is no SIGUSR1")
    task = loop.create_task(main())
    with pytest.raises(leaving, match=kind):
        loop.run_until_complete(task)
    assert not loop.is_running()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    if kind == "reader":
        loop.remove_reader(left)
    if kind == "protocol":
        transports[0].abort()
    if kind == "signal":
        loop.remove_signal_handler(signal.SIGUSR1)
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    left.close()
    right.close()


def test_an_error_that_is_never_retrieved_is_reported_at_once(loop: asyncio.AbstractEventLoop) -> None:
    """No frame between the loop and a callback keeps what the callback has dropped."""
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reports.append(context))

    async def fail() -> None:
        raise ZeroDivisionError

    async def main() -> list[str]:
        gc.collect()
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        del task
        await asyncio.sleep(0)
        return [report["message"] for report in reports]

    gc.disable()
    try:
        assert loop.run_until_complete(main()) == ["Task exception was never retrieved"]
    finally:
        gc.enable()


# Ctrl-C

CTRL_C = """
import asyncio, os, signal, sys, threading, time
from transports_anyio import EventLoop

class EventLoopOnTrio(EventLoop):
    def _check_may_run(self):
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)

make = next(each for each in (asyncio.SelectorEventLoop, EventLoop, EventLoopOnTrio) if each.__name__ == sys.argv[1])

def press(after, times=1):
    def do():
        for _ in range(times):
            time.sleep(after)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=do, daemon=True).start()

def report(text):
    print(text, flush=True)

async def main():
    press(0.05)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        report("cancelled")
        await asyncio.sleep(0.001)
        report("cleaned up")
        raise
"""

IN_A_WAIT = """
with asyncio.Runner(loop_factory=make) as runner:
    try:
        runner.run(main())
    except KeyboardInterrupt:
        report("KeyboardInterrupt")
    report(runner.run(asyncio.sleep(0.001, "goes on")))
"""

IN_A_WAIT_WITHOUT_RUNNER = """
loop = make()
task = loop.create_task(main())
try:
    loop.run_until_complete(task)
except KeyboardInterrupt:
    report("KeyboardInterrupt")
task.cancel()
try:
    loop.run_until_complete(task)
except asyncio.CancelledError:
    report(loop.run_until_complete(asyncio.sleep(0.001, "goes on")))
loop.close()
"""

IN_A_CALLBACK = """
async def busy():
    try:
        await asyncio.sleep(0.01)
        press(0.05, times=2)
        while True:
            pass
    finally:
        report("left")
with asyncio.Runner(loop_factory=make) as runner:
    try:
        runner.run(busy())
    except KeyboardInterrupt:
        report("KeyboardInterrupt")
    report(runner.run(asyncio.sleep(0.001, "goes on")))
"""

HANDLER_OF_THE_LOOP = """
async def wait():
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, event.set)
    press(0.05)
    await event.wait()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    return "handled"
with asyncio.Runner(loop_factory=make) as runner:
    report(runner.run(wait()))
    report(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(IN_A_WAIT, "cancelled, cleaned up, KeyboardInterrupt, goes on", id="in a wait"),
        pytest.param(
            IN_A_WAIT_WITHOUT_RUNNER,
            "KeyboardInterrupt, cancelled, cleaned up, goes on",
            id="in a wait, without a runner",
        ),
        pytest.param(IN_A_CALLBACK, "left, KeyboardInterrupt, goes on", id="in a callback that does not end"),
        pytest.param(HANDLER_OF_THE_LOOP, "handled, True", id="with a handler of the event loop"),
    ],
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner is new in Python 3.11")
@needs_signals
def test_ctrl_c(make: Any, program: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C + program, make.__name__],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert done.stdout.splitlines() == expected.split(", "), done.stderr
    assert done.returncode == 0


def test_ctrl_c_when_something_leaves_already(ours: EventLoop) -> None:
    """One of the two is raised, with the other one as its context, and nothing is left for the next call."""

    def leave() -> None:
        raise SystemExit("before")

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ours.call_soon(leave)
        ours.call_soon(signal.raise_signal, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            ours.run_forever()
        assert isinstance(caught.value.__context__, SystemExit)
        assert ours.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    finally:
        signal.signal(signal.SIGINT, handler)


@needs_signals
def test_a_handler_of_ctrl_c_that_is_set_during_a_call_stays(loop: asyncio.AbstractEventLoop) -> None:
    def handler(*_: object) -> None: ...

    before = signal.getsignal(signal.SIGINT)
    try:
        loop.call_soon(signal.signal, signal.SIGINT, handler)
        loop.run_until_complete(asyncio.sleep(0.001))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@needs_signals
@pytest.mark.parametrize("error", [TimeoutError, SystemExit])
def test_what_the_handler_of_another_signal_raises_leaves_an_idle_wait(
    loop: asyncio.AbstractEventLoop, error: type[BaseException]
) -> None:
    """Python calls it in the middle of the wait."""

    def handler(*_: object) -> None:
        raise error("out")

    before = signal.signal(signal.SIGALRM, handler)
    task = loop.create_task(asyncio.sleep(GUARD))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(error, match="out"):
            loop.run_until_complete(task)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not loop.is_running()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"


STORM = """
import asyncio, os, signal, sys, threading
from transports_anyio import EventLoop

class EventLoopOnTrio(EventLoop):
    def _check_may_run(self):
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)

times = int(sys.argv[2])
loop = (EventLoopOnTrio if sys.argv[1] == "with trio" else EventLoop)()
raised = handled = 0
stop = threading.Event()

def press():
    while not stop.wait(0.0007):
        os.kill(os.getpid(), signal.SIGINT)

def handler(*_):
    global handled
    handled += 1
    if loop.is_running():
        raise KeyboardInterrupt

seen = 0
async def work():
    global seen
    event = asyncio.Event()
    for _ in range(20):
        loop.call_soon(event.set)
        await event.wait()
        event.clear()
        await asyncio.sleep(0.0002)
        seen += 1

signal.signal(signal.SIGINT, handler)
task = loop.create_task(work())
thread = threading.Thread(target=press)
thread.start()
while raised < times or seen < times:
    try:
        while raised < times or seen < times:
            if task.done():
                if not task.cancelled():
                    task.exception()
                task = loop.create_task(work())
            loop.run_until_complete(asyncio.wait([task], timeout=0.01))
    except KeyboardInterrupt:
        raised += 1
stop.set()
thread.join()
signal.signal(signal.SIGINT, signal.SIG_IGN)
for each in asyncio.all_tasks(loop):
    each.cancel()
loop.run_until_complete(asyncio.sleep(0.01))
loop.close()
print("whole")
"""


@pytest.mark.differs(
    "`EventLoop`: Ctrl-C while the event loop's own code runs",
    asyncio="raises there",
    here="the signal handler runs as the next callback",
    why="an event loop that is interrupted half-way is broken",
)
@needs_signals
@pytest.mark.parametrize("times", [150, pytest.param(1000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("trio", ["with trio", "without trio"])
def test_a_storm_of_ctrl_c_leaves_the_event_loop_whole(trio: str, times: int) -> None:
    """Raised between any two lines of ours, it would break it sooner or later."""
    program = [sys.executable, "-W", "ignore", "-c", STORM, trio, str(times)]
    done = subprocess.run(program, check=False, capture_output=True, text=True, timeout=2 * GUARD)
    assert done.stdout == "whole\n", done.stderr


# Closing, and not closing


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.calls.append("connection_made")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")


@pytest.mark.differs(
    "`EventLoop`: transports that are open at `close`",
    asyncio="stay open until they are collected, with a `ResourceWarning`",
    here="aborted, with the same `ResourceWarning`; no callback is called",
    why="otherwise their file descriptors stay open",
)
def test_close_from_another_thread_warns_and_calls_nothing(make: Any) -> None:
    """As asyncio's: it ran in a thread that has ended, with transports, timers and tasks that are left."""
    loop = make()
    recorder = Recorder()
    held: list[Any] = []

    async def open_all() -> None:
        server = await loop.create_server(Recorder, HOST, 0)
        held.append(await loop.create_connection(lambda: recorder, *server.sockets[0].getsockname()))
        held.append(server)
        loop.call_later(0.01, recorder.calls.append, "timer")

    thread = threading.Thread(target=loop.run_until_complete, args=[open_all()])
    thread.start()
    thread.join()
    loop.call_soon(recorder.calls.append, "callback")
    time.sleep(0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.close()
        held.clear()
        for _ in range(3):
            gc.collect()
    messages = [str(warning.message) for warning in caught if "transport" in str(warning.message)]
    assert messages
    assert all("unclosed transport <" in message for message in messages)
    assert all(warning.category is ResourceWarning for warning in caught)
    assert recorder.calls == ["connection_made"]


class RecorderOfAll(Recorder, asyncio.DatagramProtocol, asyncio.SubprocessProtocol):  # type: ignore[misc]
    def process_exited(self) -> None:
        self.calls.append("process_exited")

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append("pipe_connection_lost")


@needs_pipes
def test_close_ends_transports_of_each_kind() -> None:
    loop = EventLoop()
    recorders: list[RecorderOfAll] = []

    def make_protocol() -> RecorderOfAll:
        recorders.append(RecorderOfAll())
        return recorders[-1]

    async def open_all() -> Any:
        await loop.create_datagram_endpoint(make_protocol, (HOST, 0))
        reader, writer = os.pipe()
        await loop.connect_read_pipe(make_protocol, os.fdopen(reader, "rb", 0))
        await loop.connect_write_pipe(make_protocol, os.fdopen(writer, "wb", 0))
        server = await loop.create_server(make_protocol, HOST, 0)
        await loop.create_connection(make_protocol, *server.sockets[0].getsockname())
        child, _ = await loop.subprocess_exec(make_protocol, sys.executable, "-c", "input()")
        return child.get_extra_info("subprocess")

    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    child = loop.run_until_complete(open_all())
    with pytest.warns(ResourceWarning, match="unclosed transport <") as caught:
        loop.close()
    assert len(caught) >= len(recorders)
    assert all(set(recorder.calls) <= {"connection_made"} for recorder in recorders)
    gc.collect()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert child.wait(GUARD) != 0
    assert not trio.lowlevel.in_trio_run()


def test_an_unclosed_event_loop_warns(make: Any) -> None:
    loop = make()
    loop.run_until_complete(asyncio.sleep(0.001))
    gc.collect()
    with pytest.warns(ResourceWarning, match="unclosed event loop <"):
        del loop
        gc.collect()


def test_an_unclosed_event_loop_that_has_used_trio_warns() -> None:
    """Trio's hooks for asynchronous generators keep neither the event loop nor the trio run."""
    loop = EventLoop()
    loop.run_until_complete(from_asyncio.run(trio.sleep, 0))
    gc.collect()
    with pytest.warns(ResourceWarning, match="unclosed event loop <"):
        del loop
        gc.collect()


def test_an_unclosed_event_loop_does_not_keep_the_process(make: Any) -> None:
    if make is EventLoopOnTrio:
        pytest.skip("another test: with trio tasks under way")
    name = "EventLoop" if make is EventLoop else "SelectorEventLoop"
    module = "transports_anyio" if make is EventLoop else "asyncio"
    program = f"""
import asyncio
from {module} import {name}
loop = {name}()
task = loop.create_task(asyncio.sleep(60))
loop.run_until_complete(asyncio.start_server(print, "{HOST}", 0))
loop.run_until_complete(asyncio.sleep(0.001))
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=GUARD)
    assert done.stdout == "end\n"
    assert done.returncode == 0, done.stderr


def test_the_default_executor_takes_no_more_after_close(make: Any) -> None:
    loop = make()
    loop.run_until_complete(loop.run_in_executor(None, int))
    threads = loop._default_executor._threads  # asyncio's has the same name
    loop.close()
    for thread in threads:
        thread.join(GUARD)
        assert not thread.is_alive()


@needs_selector
def test_a_selector_that_is_lost_ends_the_call_and_the_clean_ups_run() -> None:
    """The user has closed its file descriptor."""
    loop = new_event_loop()

    async def main() -> None:
        await asyncio.sleep(0.01)
        os.close(loop._core.poller.selector.fileno())  # type: ignore[attr-defined]
        try:
            await asyncio.sleep(10 * GUARD)
        finally:
            await asyncio.sleep(0.001)
            await loop.run_in_executor(None, events.append, "thread")
            events.append("cleaned up")

    events: list[str] = []
    asyncio.set_event_loop(None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.run_until_complete(main())
    (task,) = asyncio.all_tasks(loop)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
    assert events == ["thread", "cleaned up"]


def test_no_descriptor_is_left() -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("nothing tells which descriptors are open")

    def once() -> None:
        loop = EventLoop()
        loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()

    once()
    before = set(os.listdir("/proc/self/fd"))
    once()
    assert set(os.listdir("/proc/self/fd")) == before


# The thread's state


def state() -> tuple[Any, ...]:
    return (
        asyncio._get_running_loop(),
        library.name,
        sys.get_asyncgen_hooks(),
        signal.getsignal(signal.SIGINT),
        trio.lowlevel.in_trio_run(),
    )


@pytest.mark.parametrize("wait", [0, 0.001])
def test_the_state_of_the_thread_is_as_before(ours: EventLoop, wait: float) -> None:
    def first(_: Any) -> None: ...

    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(first, first)
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    left, right = socket.socketpair()
    left.setblocking(False)
    signal.set_wakeup_fd(left.fileno())
    try:
        before = state()
        ours.run_until_complete(asyncio.sleep(wait))
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            ours.run_until_complete(fails_after(wait))
        assert state() == before
        assert signal.set_wakeup_fd(-1) == left.fileno()
    finally:
        signal.set_wakeup_fd(wakeup_fd)
        sys.set_asyncgen_hooks(*hooks)
        left.close()
        right.close()


async def fails_after(wait: float) -> None:
    await asyncio.sleep(wait)
    raise ZeroDivisionError


def test_asynchronous_generators_belong_to_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    ended: list[str] = []

    async def numbers() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            ended.append("ended")

    async def begin() -> Any:
        generator = numbers()
        await generator.__anext__()
        return generator

    generator = loop.run_until_complete(begin())
    loop.run_until_complete(generator.__anext__())
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert ended == ["ended"]


# fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_fork_has_loops_of_its_own(make: Any) -> None:
    """Between the calls, and with an event loop that the child makes."""
    loop = make()
    loop.run_until_complete(asyncio.sleep(0.001))
    child = os.fork()
    if child == 0:
        try:
            own = make()
            good = own.run_until_complete(asyncio.sleep(0.001, True)) and not own.is_running()
            own.close()
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop.run_until_complete(asyncio.sleep(0.001, True))
    loop.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_in_a_running_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """The child has no running event loop."""

    async def main() -> int:
        await asyncio.sleep(0.001)
        child = os.fork()
        if child == 0:
            os._exit(0 if asyncio._get_running_loop() is None else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222

    assert loop.run_until_complete(main()) == 0


@pytest.mark.differs(
    "`EventLoop`: a child that is forked inside a call that has used trio",
    asyncio="may run a new event loop",
    here="may run asyncio's own; another `EventLoop` raises `RuntimeError`",
    why="its thread still counts as running trio",
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_fork_inside_a_call_cannot_run_trio(ours: EventLoop) -> None:
    async def main() -> int:
        await from_asyncio.run(trio.sleep, 0.001)
        child = os.fork()
        if child == 0:
            plain = asyncio.SelectorEventLoop()
            good = plain.run_until_complete(asyncio.sleep(0.001, True))
            plain.close()
            try:
                EventLoop().run_until_complete(asyncio.sleep(0.001))
            except RuntimeError as exc:
                os._exit(0 if good and "trio runs in this thread already" in str(exc) else 1)
            os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222

    assert ours.run_until_complete(main()) == 0


# trio


def test_trio_runs_only_after_the_first_call_of_backend_code(ours: EventLoop) -> None:
    async def main() -> list[bool]:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x\n")
        assert await reader.readline() == b"X\n"
        running = [trio.lowlevel.in_trio_run()]
        await from_asyncio.run(trio.sleep, 0)
        running.append(trio.lowlevel.in_trio_run())
        await asyncio.sleep(0.001)
        writer.write(b"y\n")
        assert await reader.readline() == b"Y\n"
        writer.close()
        await writer.wait_closed()
        return running

    server = ours.run_until_complete(asyncio.start_server(echo_line, HOST, 0))
    for _ in range(2):
        assert ours.run_until_complete(main()) == [False, True]
        assert not trio.lowlevel.in_trio_run()
    server.close()
    ours.run_until_complete(server.wait_closed())


@pytest.mark.parametrize("wait", [0, 0.001])
def test_a_selector_that_fails_ends_the_call(make: Any, wait: float) -> None:
    """As in any run of the event loop: the call raises, and the next one has a new selector."""
    ours_only(make)
    loop = make()
    loop.call_later(wait, loop._poller.selector.close)
    with pytest.raises(ValueError, match=r"on closed|closed file"):
        loop.run_until_complete(asyncio.sleep(GUARD))
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


def test_trio_from_the_first_round(ours: EventLoop) -> None:
    """Where no wait has started trio yet."""

    async def main() -> Any:
        task = from_asyncio.run_sync(trio.lowlevel.current_task)
        assert asyncio.get_running_loop() is ours
        assert library.name == "asyncio"
        assert await from_asyncio.run(trio.sleep, 0) is None
        return task

    assert ours.run_until_complete(main()) is not None
    with pytest.raises(ZeroDivisionError):
        ours.run_until_complete(from_asyncio.run(fails_on_trio))


async def fails_on_trio() -> None:
    await trio.sleep(0)
    raise ZeroDivisionError


def test_a_crossing_in_both_directions(ours: EventLoop) -> None:
    async def on_trio() -> str:
        with trio.move_on_after(0.001):
            await to_asyncio.run(asyncio.sleep, GUARD)
        return await to_asyncio.run(asyncio.sleep, 0, "from asyncio")

    assert ours.run_until_complete(from_asyncio.run(on_trio)) == "from asyncio"


def test_trio_tasks_live_between_the_calls(ours: EventLoop) -> None:
    event = trio.Event()
    steps: list[str] = []

    async def wait() -> str:
        steps.append("waiting")
        await event.wait()
        return "done"

    async def start() -> Any:
        task = asyncio.ensure_future(from_asyncio.run(wait))
        while not steps:
            await asyncio.sleep(0.001)
        return task

    async def finish(task: Any) -> Any:
        from_asyncio.run_sync(event.set)
        return await task

    task = ours.run_until_complete(start())
    assert trio.lowlevel.in_trio_run()
    assert sys.get_asyncgen_hooks() == (None, None)
    timer = ours.call_later(0.001, steps.append, "timer")
    assert ours.run_until_complete(asyncio.sleep(0.01, "another call")) == "another call"
    assert steps == ["waiting", "timer"]
    timer.cancel()
    assert ours.run_until_complete(finish(task)) == "done"
    assert not trio.lowlevel.in_trio_run()


def test_a_pause_with_trio_tasks_under_way(ours: EventLoop) -> None:
    """Callbacks, timers, wake-ups of a thread and cancellations are remembered until the next call."""
    steps: list[str] = []
    task = ours.create_task(from_asyncio.run(trio.sleep_forever))
    far = ours.call_later(GUARD, steps.append, "far")
    ours.run_until_complete(asyncio.sleep(0.001))
    assert trio.lowlevel.in_trio_run()
    ours.call_later(0.001, steps.append, "timer")
    ours.call_soon(steps.append, "callback")
    thread = threading.Thread(target=ours.call_soon_threadsafe, args=[steps.append, "thread"])
    thread.start()
    thread.join()
    time.sleep(0.01)
    assert steps == []
    ours.run_until_complete(asyncio.sleep(0))
    ours.run_until_complete(asyncio.sleep(0.002))
    assert steps == ["callback", "thread", "timer"]
    far.cancel()
    timer = threading.Timer(0.01, ours.call_soon_threadsafe, [task.cancel])
    timer.start()
    with pytest.raises(asyncio.CancelledError):
        ours.run_until_complete(task)
    timer.join()
    assert not trio.lowlevel.in_trio_run()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner is new in Python 3.11")
def test_a_runner_that_is_closed_cancels_tasks_that_wait_for_trio() -> None:
    ended: list[str] = []

    async def on_trio() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.001)
            ended.append("trio")

    async def wait() -> None:
        try:
            await from_asyncio.run(on_trio)
        finally:
            await asyncio.sleep(0.001)
            ended.append("asyncio")

    async def start() -> Any:
        task = asyncio.create_task(wait())
        await asyncio.sleep(0.001)
        return task

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(start())
        assert trio.lowlevel.in_trio_run()
    assert ended == ["trio", "asyncio"]
    assert not trio.lowlevel.in_trio_run()


def test_asynchronous_generators_of_trio_tasks_belong_to_trio(ours: EventLoop) -> None:
    """trio ends one that was dropped, in a trio task; and the event loop one that asyncio code has dropped."""
    ended: list[str] = []

    async def numbers(sleep: Callable[[float], Any], name: str) -> Any:
        try:
            while True:
                yield 1
        finally:
            if name == "trio":
                ended.append(f"trio {trio.lowlevel.in_trio_task()}")
            else:
                await sleep(0)
                ended.append(name)

    async def on_trio() -> None:
        async for _ in numbers(trio.sleep, "trio"):
            break
        gc.collect()
        with trio.fail_after(GUARD):
            while not ended:
                await trio.sleep(0.001)

    async def main() -> None:
        await from_asyncio.run(on_trio)
        async for _ in numbers(asyncio.sleep, "asyncio"):
            break
        gc.collect()
        end = time.monotonic() + GUARD
        while len(ended) < 2 and time.monotonic() < end:
            await asyncio.sleep(0.001)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # trio's, for a generator that was dropped.
        ours.run_until_complete(main())
    assert ended == ["trio True", "asyncio"]


def test_a_task_that_waits_for_trio_is_cancelled_during_a_pause(ours: EventLoop) -> None:
    task = ours.create_task(from_asyncio.run(trio.sleep_forever))
    ours.run_until_complete(asyncio.sleep(0.001))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        ours.run_until_complete(task)
    assert not trio.lowlevel.in_trio_run()


def test_close_cancels_trio_tasks_and_calls_nothing_of_asyncios() -> None:
    loop = EventLoop()
    ended: list[str] = []

    async def on_trio() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append("trio")

    async def wait() -> None:
        try:
            await from_asyncio.run(on_trio)
        finally:
            ended.append("asyncio")

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    assert ended == ["trio"]
    assert not trio.lowlevel.in_trio_run()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # as asyncio, which says so


def test_close_inside_another_event_loop() -> None:
    """The clean-up of trio tasks is backend code: no event loop is running there."""
    loop = EventLoop()
    running: list[Any] = []

    async def on_trio() -> None:
        try:
            await trio.sleep_forever()
        finally:
            running.extend((asyncio._get_running_loop(), library.name))

    async def close() -> Any:
        loop.close()
        return asyncio._get_running_loop(), library.name

    task = loop.create_task(from_asyncio.run(on_trio))
    loop.run_until_complete(asyncio.sleep(0.001))
    other = asyncio.SelectorEventLoop()
    assert other.run_until_complete(close()) == (other, None)
    other.close()
    assert running == [None, "trio"]
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # as asyncio, which says so


UNCLOSED = """
import asyncio, trio
from transports_anyio import EventLoop, from_asyncio

loop = EventLoop()
task = loop.create_task(from_asyncio.run(trio.sleep_forever))
loop.run_until_complete(asyncio.sleep(0.001))
assert trio.lowlevel.in_trio_run()
print("end")
"""


def test_an_unclosed_event_loop_with_trio_tasks_does_not_keep_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", UNCLOSED], check=False, capture_output=True, text=True, timeout=GUARD)
    assert done.stdout == "end\n"
    assert done.returncode == 0, done.stderr


@pytest.mark.differs(
    "`EventLoop`: between two calls, while its trio tasks are under way",
    asyncio="any event loop may run",
    here=(
        "in the same thread no other `EventLoop` and no `trio.run`, and in another thread neither running nor "
        "closing it: `RuntimeError`"
    ),
    why="trio runs once at a time in a thread",
)
def test_what_trio_tasks_under_way_forbid() -> None:
    loop, other = EventLoop(), EventLoop()
    task = loop.create_task(from_asyncio.run(trio.sleep_forever))
    loop.run_until_complete(asyncio.sleep(0.001))
    with pytest.raises(RuntimeError, match="trio runs in this thread already"):
        other.run_until_complete(asyncio.sleep(0.001))
    with pytest.raises(RuntimeError):
        trio.run(trio.sleep, 0)
    failures: list[str] = []

    def elsewhere() -> None:
        for call in (loop.run_forever, loop.close):
            try:
                call()
            except RuntimeError as exc:
                failures.append(str(exc))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(failures) == 2
    assert all("trio tasks of the event loop are under way in another thread" in failure for failure in failures)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    assert other.run_until_complete(asyncio.sleep(0.001, True))
    loop.close()
    other.close()


def test_inside_a_trio_program() -> None:
    loop = EventLoop()

    async def main() -> None:
        with pytest.raises(RuntimeError, match="open_event_loop"):
            loop.run_until_complete(loop.create_future())

    trio.run(main)
    loop.close()


def test_one_event_loop_in_several_threads_in_turn(make: Any) -> None:
    loop = make()
    results: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(
            target=lambda: results.append(loop.run_until_complete(asyncio.sleep(0.001, threading.get_ident())))
        )
        thread.start()
        thread.join()
    results.append(loop.run_until_complete(asyncio.sleep(0.001, "here")))
    assert len(results) == 4
    loop.close()


@pytest.mark.parametrize("debug", [False, True])
def test_debug_mode(loop: asyncio.AbstractEventLoop, debug: bool) -> None:
    loop.set_debug(debug)
    loop.call_soon(int)
    loop.run_until_complete(asyncio.sleep(0.001))
    errors: list[str] = []

    def elsewhere() -> None:
        try:
            loop.call_soon(int)
        except RuntimeError as exc:
            errors.append(str(exc))

    async def main() -> None:
        await asyncio.to_thread(elsewhere)

    loop.run_until_complete(main())
    assert len(errors) == debug
    loop.run_until_complete(loop.shutdown_default_executor())


def test_where_a_task_waits_for_each_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the tasks end with each call, and the next one starts them anew."""
    monkeypatch.setattr("transports_anyio._poller.make_system_selector", lambda: None)
    loop = EventLoop()

    async def line(text: bytes) -> bytes:
        writer.write(text)
        return await reader.readline()

    async def end() -> None:
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()

    server = loop.run_until_complete(asyncio.start_server(echo_line, HOST, 0))
    reader, writer = loop.run_until_complete(asyncio.open_connection(*server.sockets[0].getsockname()))
    for text in (b"one\n", b"two\n", b"three\n"):
        assert loop.run_until_complete(asyncio.wait_for(line(text), GUARD)) == text.upper()
        assert not trio.lowlevel.in_trio_run()
    loop.run_until_complete(end())
    loop.close()
