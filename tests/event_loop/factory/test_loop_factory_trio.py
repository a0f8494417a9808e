"""`EventLoop`: backend code on trio, in its calls and under way between them."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from loop_factory_helpers import echo_line
from support import GUARD, HOST

from transports_anyio import EventLoop, from_asyncio, to_asyncio
from transports_anyio._event_loop._sides import library

trio = pytest.importorskip("trio")


# In a call


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


def test_callbacks_that_a_long_iteration_leaves_over_run() -> None:
    """Another call of backend code runs an iteration meanwhile, which receives what was to wake the loop."""

    async def busy() -> None:
        await asyncio.sleep(0)
        time.sleep(0.003)  # noqa: ASYNC251  # longer than an iteration lasts
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)

    async def at_once() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(to_asyncio.run, busy)

    async def main() -> None:
        for _ in range(10):
            await from_asyncio.run(at_once)
        ended.append(True)

    def run() -> None:
        loop = EventLoop()
        loop.run_until_complete(main())
        loop.close()

    ended: list[bool] = []
    thread = threading.Thread(target=run, daemon=True)  # If it hangs, the other tests go on.
    thread.start()
    thread.join(GUARD)
    assert ended


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


def test_inside_a_trio_program() -> None:
    loop = EventLoop()

    async def main() -> None:
        with pytest.raises(RuntimeError, match="open_event_loop"):
            loop.run_until_complete(loop.create_future())

    trio.run(main)
    loop.close()


# Between the calls


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


def test_a_task_that_waits_for_trio_is_cancelled_during_a_pause(ours: EventLoop) -> None:
    task = ours.create_task(from_asyncio.run(trio.sleep_forever))
    ours.run_until_complete(asyncio.sleep(0.001))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        ours.run_until_complete(task)
    assert not trio.lowlevel.in_trio_run()


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


# Closing, and not closing


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
