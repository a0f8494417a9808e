"""Scheduling: timers that are moved, by `reschedule` and `reschedule_at`."""

from __future__ import annotations

import gc
import random
from typing import Any

import anyio
import pytest
from network import needs_selector
from scheduling_helpers import CountingGroup
from support import turns, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("method", ["reschedule", "reschedule_at"])
@pytest.mark.parametrize(("before", "after"), [(0.2, 0.25), (3600, 0.06), (0.06, 0.06)])
async def test_a_moved_timer_runs_once_at_its_new_time(
    anyio_backend: Any, before: float, after: float, method: str
) -> None:
    fired: list[float] = []
    async with TransportGroup() as group:
        timer = group.call_later(before, lambda: fired.append(group.time()))
        await turns()  # The group waits for it.
        now = group.time()
        if method == "reschedule":
            timer.reschedule(after)
            assert now + after <= timer.when() <= group.time() + after
        else:
            timer.reschedule_at(now + after)
            assert timer.when() == now + after
        assert not timer.cancelled()
        assert group.statistics().pending_timers == 1
        await until(lambda: fired)
        await anyio.sleep(0.01)
        assert group.statistics().pending_timers == 0
    assert len(fired) == 1
    assert fired[0] >= timer.when() - 1e-6


async def test_timers_that_are_moved_at_random_run_in_the_order_of_their_times(anyio_backend: Any) -> None:
    """As if each were cancelled and made again: those of the same time in the order of the last moves."""
    choose = random.Random(5)
    order: list[int] = []
    expected: dict[int, tuple[float, int]] = {}
    async with TransportGroup() as group:
        now = group.time()
        timers = {}
        for step in range(3000):
            number = choose.randrange(200)
            when = now + choose.randrange(100, 120) / 1000
            if number not in expected:
                timers[number] = group.call_at(when, order.append, number)
                expected[number] = when, step
            elif choose.random() < 0.2:
                timers.pop(number).cancel()
                del expected[number]
            else:
                timers[number].reschedule_at(when)
                expected[number] = when, step
            assert group.statistics().pending_timers == len(expected)
        assert all(timers[number].when() == when for number, (when, _) in expected.items())
        await until(lambda: len(order) == len(expected))
        assert group.statistics().pending_timers == 0
    assert order == sorted(expected, key=expected.__getitem__)


@pytest.mark.parametrize("later", [True, False])
async def test_a_timer_that_is_moved_to_the_time_of_others_runs_after_them(anyio_backend: Any, later: bool) -> None:
    order: list[str] = []
    async with TransportGroup() as group:
        when = group.time() + 0.02
        moved = group.call_at(when - 0.01 if later else when + 10, order.append, "moved")
        same = group.call_at(when, order.append, "moved to the same time")
        group.call_at(when, order.append, "made")
        moved.reschedule_at(when)
        same.reschedule_at(when)
        await until(lambda: len(order) == 3)
    assert order == ["made", "moved", "moved to the same time"]


async def test_a_callback_may_move_and_cancel_timers_that_are_due_with_it(anyio_backend: Any) -> None:
    order: list[str] = []
    async with TransportGroup() as group:

        def first() -> None:
            order.append("first")
            later.reschedule(0.02)
            at_once.reschedule_at(now)
            cancelled.cancel()
            with pytest.raises(RuntimeError, match="was cancelled"):
                cancelled.reschedule(1)

        now = group.time()
        group.call_at(now, first)
        later = group.call_at(now, order.append, "later")
        at_once = group.call_at(now, order.append, "at once")
        cancelled = group.call_at(now, order.append, "cancelled")
        group.call_at(now, order.append, "last")
        await until(lambda: "later" in order)
        await anyio.sleep(0.01)
        assert group.statistics().pending_timers == 0
    assert order == ["first", "last", "at once", "later"]


@pytest.mark.leaves_timers
async def test_a_timer_that_is_not_pending_cannot_be_moved(anyio_backend: Any) -> None:
    raised: list[str] = []

    def callback() -> None:
        with pytest.raises(RuntimeError) as caught:
            timers[0].reschedule(1)
        raised.append(str(caught.value))

    async with TransportGroup() as group:
        timers = [group.call_later(0, callback)]
        await until(lambda: raised)
        assert "has run" in raised[0]
        with pytest.raises(RuntimeError, match="has run"):
            timers[0].reschedule(1)
        cancelled = group.call_later(3600, print)
        cancelled.cancel()
        for move in (cancelled.reschedule, cancelled.reschedule_at):
            with pytest.raises(RuntimeError, match="was cancelled"):
                move(1)
        pending = group.call_later(3600, print)
        when = pending.when()
        for wrong, error in (("soon", TypeError), (None, TypeError), (float("nan"), ValueError)):
            for wrong_move in (pending.reschedule, pending.reschedule_at):
                with pytest.raises(error):
                    wrong_move(wrong)  # type: ignore[arg-type]
                assert pending.when() == when
        assert group.statistics().pending_timers == 1
    with pytest.raises(RuntimeError, match="group has ended"):
        pending.reschedule(1)


async def test_a_timer_can_be_moved_to_infinity_and_back(anyio_backend: Any) -> None:
    fired: list[int] = []
    async with TransportGroup() as group:
        timer = group.call_later(0.3, fired.append, 1)
        await turns()
        timer.reschedule(float("inf"))
        assert timer.when() == float("inf")
        await anyio.sleep(0.4)
        assert fired == []
        timer.reschedule(0.01)
        await until(lambda: fired)


@needs_selector
async def test_a_moved_time_out_costs_no_iterations(anyio_backend: Any) -> None:
    """Neither the moves, nor the time that the group waited for before, nor what is left of earlier times."""
    fired: list[int] = []
    async with CountingGroup() as group:
        timer = group.call_later(0.4, fired.append, 1)
        others = [group.call_later(0.3 + 0.01 * number, print) for number in range(30)]
        await turns()  # The group waits for the first one.
        group.iterations = 0
        for other in others:
            other.reschedule(3600)
        until_then = group.time() + 0.7
        while group.time() < until_then:
            timer.reschedule(0.5)
            await anyio.sleep(0.005)
        assert group.iterations == 0
        assert not fired
        await until(lambda: fired)
        assert group.iterations <= 1
        for other in others:
            other.cancel()


async def test_timers_that_are_moved_earlier_again_and_again_leave_nothing(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        first = group.call_later(1800, print)
        timer = group.call_later(3600, print)
        gc.collect()
        before = len(gc.get_objects())
        for number in range(20_000):
            timer.reschedule(3600 if number % 2 else 2400)
        gc.collect()
        assert len(gc.get_objects()) - before < 2000
        assert group.statistics().pending_timers == 2
        first.cancel()
        timer.cancel()
        assert group.statistics().pending_timers == 0


@pytest.mark.leaves_timers
async def test_a_moved_timer_is_compared_by_its_new_time(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        when = group.time() + 3600
        moved, other = group.call_at(when, print), group.call_at(when + 2, print)
        assert moved < other
        moved.reschedule_at(when + 2)
        assert moved == other
        assert hash(moved) == hash(other)
        moved.reschedule_at(when + 3)
        assert moved > other
