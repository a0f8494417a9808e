"""The driver for trio: one task waits for file descriptors, another one for wake-ups and deadlines."""

from __future__ import annotations

import asyncio
from functools import partial
from math import inf

import pytest
from network import needs_selector
from support import until

from transports_anyio import TransportGroup, open_event_loop, to_asyncio
from transports_anyio._poller import make_poller

trio = pytest.importorskip("trio")
testing = pytest.importorskip("trio.testing")


def run_with_mock_clock(async_function):
    clock = testing.MockClock(autojump_threshold=0)
    trio.run(async_function, clock, clock=clock)


def times_of_iterations(core):
    """Return a list that gets the time of each iteration."""
    times = []
    run_once = core.run_once

    def record():
        times.append(core.clock.time())
        return run_once()

    core.run_once = record
    return times


@pytest.mark.parametrize("delays", [(5, 1), (1, 5), (3, 3), (5, 3, 1, 4, 2)])
def test_timers_that_are_set_while_it_waits_are_on_time(delays):
    async def main(clock):
        async with TransportGroup() as group:
            await trio.testing.wait_all_tasks_blocked()
            start = clock.current_time()
            called = []
            for delay in delays:
                group.call_later(delay, lambda: called.append(clock.current_time() - start))
                await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(10)
            assert called == pytest.approx(sorted(delays))

    run_with_mock_clock(main)


@needs_selector
def test_a_timer_that_was_cancelled_runs_no_iteration():
    async def main(clock):
        async with TransportGroup() as group:
            first = group.call_later(1, called.append, "first")
            group.call_later(2, called.append, "second")
            await trio.testing.wait_all_tasks_blocked()
            start = clock.current_time()
            times = times_of_iterations(group._core)
            first.cancel()
            await trio.sleep(3)
            assert [time - start for time in times] == pytest.approx([2])

    called: list[str] = []
    run_with_mock_clock(main)
    assert called == ["second"]


@needs_selector
def test_a_wake_up_in_the_same_thread_sends_nothing():
    async def main():
        async with TransportGroup() as group:
            await trio.testing.wait_all_tasks_blocked()
            driver = group._core.driver

            def send():
                raise AssertionError("a byte was sent")

            driver.wake_threadsafe = send
            for number in range(10):
                assert driver.waiting
                group.call_soon(called.append, number)
                assert not driver.waiting
                group.call_soon(called.append, number)  # There is one wake-up for both.
                await trio.testing.wait_all_tasks_blocked()
            del driver.wake_threadsafe

    called: list[int] = []
    trio.run(main)
    assert called == [number for number in range(10) for _ in range(2)]


def test_wake_ups_timers_and_readiness_at_the_same_time():
    """Whichever task runs the iteration, nothing is lost, and nothing runs twice."""

    async def main():
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        await asyncio.gather(*(talk(loop, *server.sockets[0].getsockname()) for _ in range(5)))
        server.close()

    async def echo(reader, writer):
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async def talk(loop, *address):
        reader, writer = await asyncio.open_connection(*address)
        for number in range(100):
            writer.write(b"%4d" % number)
            loop.call_later(0, called.append, number)
            loop.call_soon_threadsafe(called.append, number)
            await asyncio.sleep(0.0001 if number % 3 else 0)
            assert await reader.readexactly(4) == b"%4d" % number
        writer.close()
        await writer.wait_closed()

    async def beside():
        async with open_event_loop() as loop:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(to_asyncio.run, main)
                while nursery.child_tasks:
                    to_asyncio.run_sync(loop.call_soon, others.append, 0)
                    scheduled.append(0)
                    await trio.sleep(0.0001)
            await until(lambda: len(others) == len(scheduled))

    called: list[int] = []
    others: list[int] = []
    scheduled: list[int] = []
    trio.run(beside)
    assert sorted(called) == sorted([*range(100)] * 10)


def test_a_host_wakes_it_in_guest_mode():
    """Its callbacks run in the same thread, but not in a task of trio."""

    async def guest(loops, ended):
        async with TransportGroup() as group, open_event_loop() as loop:
            loops.set_result((group, loop))
            await ended.wait()

    async def host():
        loop = asyncio.get_running_loop()
        over, opened = loop.create_future(), loop.create_future()
        ended = trio.Event()
        trio.lowlevel.start_guest_run(
            partial(guest, opened, ended),
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=over.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        group, inner = await opened
        for _ in range(5):
            await asyncio.sleep(0.01)  # Both are idle.
            called = [asyncio.Event(), asyncio.Event(), asyncio.Event()]
            group.call_soon(called[0].set)
            inner.call_soon(called[1].set)
            inner.call_later(0.001, called[2].set)
            await asyncio.wait_for(asyncio.gather(*(each.wait() for each in called)), 10)
        loop.call_soon(ended.set)
        (await over).unwrap()

    asyncio.run(host())


def test_a_failure_of_either_task_comes_out_as_itself():
    class FailureError(Exception):
        pass

    def fail():
        raise FailureError

    async def main(provoke):
        async with TransportGroup() as group:
            await trio.testing.wait_all_tasks_blocked()
            core = group._core
            core.run_once = fail
            provoke(group)
            await trio.sleep_forever()

    for provoke in (
        lambda group: group._core.driver.wake(),
        lambda group: group._core.driver.wake_threadsafe(),
        lambda group: group.call_later(0.001, int),
    ):
        with pytest.raises(BaseException) as caught:
            trio.run(main, provoke)
        assert "FailureError" in repr(caught.value)


def test_a_wake_up_at_the_beginning(monkeypatch):
    """The other task may not have begun yet: trio may run tasks in any order, as it does for pytest-trio."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)

    class Scheduler:
        tasks_started = False
        iterations = 0

        def run_once(self):
            self.iterations += 1
            return inf

        def next_deadline(self):
            return inf

    async def wake(driver, scheduler):
        while not driver.waiting:
            await trio.lowlevel.checkpoint()
        before = scheduler.iterations
        driver.wake()
        with trio.fail_after(5):
            while scheduler.iterations == before:
                await trio.sleep(0.001)

    async def main():
        for _ in range(200):
            poller = make_poller()
            scheduler = Scheduler()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(poller.driver.run, scheduler)
                await wake(poller.driver, scheduler)
                nursery.cancel_scope.cancel()
            poller.close()

    trio.run(main)
