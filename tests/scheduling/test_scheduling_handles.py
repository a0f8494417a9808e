"""Scheduling: handles, and timers that are cancelled."""

from __future__ import annotations

import contextvars
import gc
import operator
import sys
import weakref
from types import FrameType
from typing import Any

import anyio.lowlevel
import pytest
from network import needs_selector
from scheduling_helpers import CountingGroup, every_scheduler, scheduler
from support import Stack, turns, until

from transports_anyio._handles import Handle

pytestmark = pytest.mark.anyio


# -- handles ----------------------------------------------------------------------------------------------


@every_scheduler
async def test_a_cancelled_callback_does_not_run(stack: Stack, name: str) -> None:
    calls: list[str] = []
    async with stack.open() as group:
        handle = scheduler(group, name)(calls.append, "cancelled")
        assert not handle.cancelled()
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
        scheduler(group, name)(calls.append, "last")
        await until(lambda: calls)
    assert calls == ["last"]


async def test_repr_of_handles(stack: Stack) -> None:
    def callback(*args: object) -> None: ...

    async with stack.open() as group:
        handle = group.call_soon(callback, 1)
        timer = group.call_later(3600, callback, 2)
        assert "callback" in repr(handle)
        assert "callback" in repr(timer)
        assert "when=" in repr(timer)
        timer.cancel()
        handle.cancel()
        assert "cancelled" in repr(handle)
        assert "cancelled" in repr(timer)


async def test_when_returns_the_time_of_a_timer(stack: Stack) -> None:
    async with stack.open() as group:
        when = group.time() + 3600
        timer = group.call_at(when, print)
        assert timer.when() == when
        timer.cancel()
        assert timer.when() == when
        before = group.time()
        timer = group.call_later(3600, print)
        assert before + 3600 <= timer.when() <= group.time() + 3600
        timer.cancel()


async def test_g7_timers_compare_as_asyncios(stack: Stack) -> None:
    """They are ordered by time, and equal if time, callback and arguments are."""
    calls: list[int] = []
    async with stack.open() as group:
        when = group.time() + 3600
        first = group.call_at(when, calls.append, 1)
        same = group.call_at(when, calls.append, 1)
        another = group.call_at(when, calls.append, 2)
        later = group.call_at(when + 1, calls.append, 1)
        soon = group.call_soon(calls.append, 1)
        assert first == same
        assert hash(first) == hash(same) == hash(when)
        assert first != another
        assert first != later
        assert first != soon
        assert first != when
        assert not first < another
        assert not first <= another
        assert first <= same
        assert first >= same
        assert first < later <= later
        assert later > first
        assert later >= same
        assert max(later, first) is later
        assert sorted([later, first]) == [first, later]
        assert len({first, same, another, later}) == 3
        for compare in (operator.lt, operator.le, operator.gt, operator.ge):
            with pytest.raises(TypeError):
                compare(first, when)
        same.cancel()
        assert first != same
        first.cancel()
        assert first == same
        for handle in (another, later):
            handle.cancel()


async def test_cancelling_a_timer_after_it_ran_is_harmless(stack: Stack) -> None:
    calls: list[int] = []
    async with stack.open() as group:
        timers = [group.call_later(0, calls.append, number) for number in range(3)]
        await until(lambda: len(calls) == 3)
        for timer in timers:
            timer.cancel()
        group.call_later(0, calls.append, 3)
        await until(lambda: len(calls) == 4)


async def test_cancelling_releases_the_callback_and_its_arguments(stack: Stack) -> None:
    class Thing: ...

    async with stack.open() as group:
        thing = Thing()
        reference = weakref.ref(thing)
        timer = group.call_later(3600, print, thing)
        del thing
        timer.cancel()
        gc.collect()
        assert reference() is None


def test_a_handle_that_is_cancelled_between_any_two_instructions() -> None:
    """By another thread, for example: the callback is called with its arguments, or not at all."""

    def called(instruction: int) -> list[object]:
        """Return the calls, if the handle is cancelled before this number of its own instructions has run."""
        calls: list[object] = []
        handle = Handle(lambda *args: calls.append(args), ("argument",), contextvars.copy_context())
        seen = 0

        def step(frame: FrameType, event: str, _: object) -> Any:
            nonlocal seen
            if frame.f_code is not Handle.__call__.__code__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if seen == instruction:
                    handle.cancel()
                seen += 1
            return step

        before = sys.gettrace()
        sys.settrace(step)
        try:
            handle()
        finally:
            sys.settrace(before)
        assert handle.cancelled() == (instruction < seen)
        return calls

    outcomes = [called(instruction) for instruction in range(100)]
    assert [] in outcomes
    assert [("argument",)] in outcomes
    assert all(outcome in ([], [("argument",)]) for outcome in outcomes)


# -- what many and cancelled timers cost ------------------------------------------------------------------


async def test_a_hundred_thousand_timers(stack: Stack) -> None:
    fired: list[int] = []
    async with stack.open() as group:
        far = group.time() + 3600
        timers = [group.call_at(far + (number * 7919) % 100_000, fired.append, number) for number in range(100_000)]
        group.call_later(0, fired.append, -1)
        await until(lambda: fired)
        for timer in timers:
            timer.cancel()
        group.call_later(0, fired.append, -2)
        await until(lambda: len(fired) == 2)
    assert fired == [-1, -2]


async def test_rearming_a_timer_frees_the_cancelled_ones(stack: Stack) -> None:
    class Thing: ...

    alive: weakref.WeakSet[Thing] = weakref.WeakSet()

    def callback(_: Thing) -> None: ...

    async with stack.open() as group:
        timer = group.call_later(3600, print)
        for _ in range(5000):
            timer.cancel()
            thing = Thing()
            alive.add(thing)
            timer = group.call_later(3600, callback, thing)
        del thing
        gc.collect()
        assert len(alive) == 1
        timer.cancel()


async def test_remaining_timers_run_in_order_after_many_were_cancelled(stack: Stack) -> None:
    order: list[int] = []
    async with stack.open() as group:
        now = group.time()
        # In no order, and cancelled in another one.
        timers = {number: group.call_at(now + number / 20_000, order.append, number) for number in scattered(600)}
        kept = range(0, 600, 4)
        for number in reversed(scattered(600)):
            if number not in kept:
                timers[number].cancel()
        await until(lambda: len(order) == len(kept))
    assert order == list(kept)


def scattered(size: int) -> list[int]:
    """Return the numbers below `size`, which 7 must not divide, in mixed order."""
    return [number * 7 % size for number in range(size)]


async def test_rearming_a_timer_later_than_another_frees_the_cancelled_ones(stack: Stack) -> None:
    """The cancelled ones never become the first timer while the other one is pending."""
    async with stack.open() as group:
        first = group.call_later(1800, print)
        gc.collect()
        before = len(gc.get_objects())
        for number in range(20_000):
            group.call_later(3600, print).cancel()
            if not number % 100:
                await anyio.lowlevel.checkpoint()  # asyncio removes cancelled timers in its iterations.
        gc.collect()
        assert len(gc.get_objects()) - before < 2000
        first.cancel()


@pytest.mark.parametrize("where", ["a callback", "a task"])
@needs_selector
async def test_a_cancelled_timer_costs_no_wake_up(anyio_backend: Any, where: str) -> None:
    """It was cancelled in an iteration, or while the group was waiting for it."""
    timers: list[Any] = []
    fired: list[int] = []

    def arm() -> None:
        timers.extend(group.call_later(0.001 * number, fired.append, 0) for number in range(1, 40))

    def cancel() -> None:
        for timer in timers:
            timer.cancel()

    async with CountingGroup() as group:
        await turns()
        group.call_later(0.2, fired.append, 1)
        await turns()
        if where == "a callback":
            group.call_soon(lambda: (arm(), cancel()))
            await until(lambda: timers)
        else:
            arm()
            cancel()
        group.iterations = 0
        await until(lambda: fired)
        assert group.iterations <= 1  # For the last timer.
    assert fired == [1]


@needs_selector
async def test_a_timer_that_was_waited_for_and_is_cancelled_costs_no_wake_up(anyio_backend: Any) -> None:
    fired: list[int] = []
    async with CountingGroup() as group:
        timer = group.call_later(0.05, print)
        await turns()  # The group waits for it.
        timer.cancel()
        await turns()
        group.iterations = 0
        group.call_later(0.2, fired.append, 1)
        await until(lambda: fired)
        assert group.iterations <= 1


async def test_a_task_that_rearms_a_time_out_causes_no_iterations(anyio_backend: Any) -> None:
    async with CountingGroup() as group:
        timer = group.call_later(3600, print)
        await turns()
        group.iterations = 0
        for _ in range(100):
            timer.cancel()
            timer = group.call_later(3600, print)
            await anyio.lowlevel.checkpoint()
        await turns()
        assert group.iterations == 0
        timer.cancel()


@needs_selector
async def test_a_time_between_the_ticks_of_the_loops_clock_causes_one_iteration(anyio_backend: Any) -> None:
    """uvloop counts in milliseconds, rounded."""
    fired: list[float] = []
    async with CountingGroup() as group:
        await turns()
        group.iterations = 0
        for number in range(1, 31):
            when = group.time() + 0.002 + number * 0.00013
            group.call_at(when, lambda when=when: fired.append(group.time() - when))
            await until(lambda number=number: len(fired) == number)  # type: ignore[misc]
        # The first one may wake a group that waits without a deadline.
        assert group.iterations <= 2 * 30
        assert min(fired) >= -1e-6
