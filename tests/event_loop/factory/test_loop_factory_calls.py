"""`EventLoop`: its calls, what lives between them, and stopping."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from loop_factory_helpers import echo_line
from network import needs_selector, needs_signals
from support import GUARD, HOST

from transports_anyio import EventLoop

trio = pytest.importorskip("trio")


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


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, EventLoop])
def test_closed_while_another_thread_wakes_it(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """What the other thread has scheduled has run: its call succeeds, although there is nothing to wake any more."""

    def run() -> None:
        loop.call_soon(spin)
        loop.run_forever()
        loop.close()

    def spin() -> None:  # The event loop needs no waking.
        running.set()
        loop.call_soon(spin)

    def trace(frame: FrameType, *_: object) -> None:
        if frame.f_code.co_name in ("wake_threadsafe", "_write_to_self"):
            thread.join(GUARD)

    loop = new_loop()
    running = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    assert running.wait(GUARD)
    sys.settrace(trace)
    try:
        loop.call_soon_threadsafe(loop.stop)
    finally:
        sys.settrace(None)
    assert loop.is_closed()


@needs_signals
def test_woken_from_a_thread_after_many_signals(loop: asyncio.AbstractEventLoop) -> None:
    """More than the buffer of what wakes the event loop has room for, while a callback runs."""

    async def main() -> None:
        for _ in range(5000):
            signal.raise_signal(signal.SIGUSR1)
        woken = loop.create_future()
        await asyncio.gather(loop.run_in_executor(None, loop.call_soon_threadsafe, woken.set_result, None), woken)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        loop.run_until_complete(main())
    finally:
        signal.signal(signal.SIGUSR1, before)


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
