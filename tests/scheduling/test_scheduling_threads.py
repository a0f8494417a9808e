"""Scheduling: `call_soon_threadsafe`, in other threads and in signal handlers."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from network import needs_signals
from scheduling_helpers import CountingGroup
from support import GUARD, Stack, turns, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


async def test_a_thread_wakes_a_group_whose_tasks_all_wait(stack: Stack) -> None:
    """It does so more than once."""
    threads: list[int] = []
    async with stack.open() as group:
        for _ in range(3):
            done = anyio.Event()

            def callback(done: anyio.Event = done) -> None:
                threads.append(threading.get_ident())
                done.set()

            thread = threading.Thread(target=group.call_soon_threadsafe, args=[callback])
            with anyio.fail_after(GUARD):
                await anyio.sleep(0.02)
                thread.start()
                await done.wait()
            thread.join()
    assert threads == [threading.get_ident()] * 3


async def test_call_soon_threadsafe_in_a_row_causes_one_iteration(anyio_backend: Any) -> None:
    calls: list[int] = []
    async with CountingGroup() as group:
        await turns()
        group.iterations = 0
        for number in range(1000):
            group.call_soon_threadsafe(calls.append, number)
        await until(lambda: len(calls) == 1000)
        await turns()
        assert group.iterations <= 2
    assert calls == list(range(1000))


@pytest.mark.differs(
    "`cancel` of a handle of `call_soon_threadsafe`, in another thread",
    asyncio="until 3.14 returns at once, while the callback may still run",
    here="waits until the callback has ended, as 3.14 does",
    why="after `cancel`, the caller may free what the callback uses",
)
@pytest.mark.ours_only(before=(3, 14))
async def test_cancel_in_another_thread_waits_for_a_callback_that_runs(stack: Stack) -> None:
    begun = threading.Event()
    order: list[str] = []

    def callback() -> None:
        handle.cancel()  # In its own thread it does not wait.
        begun.set()
        time.sleep(0.05)  # Gives the other thread time to fail.
        order.append("ran")

    def cancel() -> None:
        begun.wait(GUARD)
        handle.cancel()
        order.append("cancelled")

    thread = threading.Thread(target=cancel)
    async with stack.open() as group:
        thread.start()
        handle = group.call_soon_threadsafe(callback)
        await until(lambda: len(order) == 2)
        thread.join()
        assert order == ["ran", "cancelled"]
        handle = group.call_soon_threadsafe(order.append, "never")
        thread = threading.Thread(target=handle.cancel)
        thread.start()
        thread.join()  # Before the group runs an iteration.
        await turns()
        assert handle.cancelled()
        assert len(order) == 2


async def test_many_threads_at_once(stack: Stack) -> None:
    calls: list[tuple[int, int]] = []
    async with stack.open() as group:

        def work(me: int) -> None:
            for number in range(500):
                group.call_soon_threadsafe(calls.append, (me, number))

        async with anyio.create_task_group() as tasks:
            for me in range(8):
                tasks.start_soon(anyio.to_thread.run_sync, work, me)
        await until(lambda: len(calls) == 8 * 500)
    for me in range(8):
        assert [number for who, number in calls if who == me] == list(range(500))


@pytest.mark.differs(
    "`call_soon_threadsafe` just before the group ends",
    asyncio="may never run",
    here="either runs before the block is left, or raises `RuntimeError` and never runs",
    why="nothing that was scheduled is lost, or runs twice",
)
async def test_what_a_thread_has_handed_over_runs_however_close_to_the_end(anyio_backend: Any) -> None:
    """If the call returns a handle, the callback runs; if it raises, the callback does not."""
    for _ in range(50):
        ran: list[int] = []
        accepted: list[int] = []
        running = threading.Event()

        def work(ran: list[int] = ran, accepted: list[int] = accepted, running: threading.Event = running) -> None:
            for number in range(1_000_000):
                try:
                    group.call_soon_threadsafe(ran.append, number)
                except RuntimeError:
                    return
                accepted.append(number)
                running.set()

        async with TransportGroup() as group:
            thread = threading.Thread(target=work)
            thread.start()
            running.wait(GUARD)
        thread.join()
        assert ran == accepted


@needs_signals
async def test_call_soon_threadsafe_in_a_signal_handler(anyio_backend: Any) -> None:
    """It runs in the group's own thread, possibly during another `call_soon_threadsafe`."""
    calls: list[str] = []
    async with TransportGroup() as group:
        before = signal.signal(signal.SIGALRM, lambda *_: group.call_soon_threadsafe(calls.append, "signal"))
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        try:
            while calls.count("signal") < 100:
                for _ in range(1000):
                    group.call_soon_threadsafe(calls.append, "task")
                await anyio.lowlevel.checkpoint()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert len(calls) - calls.count("signal") >= 1000


async def test_call_soon_threadsafe_after_the_end_raises(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        pass
    errors: list[BaseException] = []

    def work() -> None:
        try:
            group.call_soon_threadsafe(print)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (error,) = errors
    assert "not open" in str(error)
