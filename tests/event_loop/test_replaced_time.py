"""A `loop.time` that other code has replaced, which is how tests control time: timers go by it, as asyncio's do."""

from __future__ import annotations

import asyncio
import sys
import time
from unittest import mock

import pytest
from support import GUARD

from transports_anyio import EventLoop, TransportGroup, from_asyncio

#: How far the replaced clock is from the real one, in seconds. Less than `GUARD`: its timer goes by the clock, too.
OFFSETS = [-1e6, 1.0]


def shifted(offset):
    return lambda: time.monotonic() + offset


@pytest.fixture(params=OFFSETS)
def offset(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["", "tasks"])
def waits_in_tasks(request, monkeypatch):
    """Wait for each file descriptor in a task, as on Windows: by another driver."""
    if request.param:
        monkeypatch.setattr("transports_anyio._poller.make_system_selector", lambda: None)


async def check_timers():
    loop = asyncio.get_running_loop()
    start, real_start = loop.time(), time.monotonic()
    order = []
    loop.call_later(0.02, order.append, "later")
    loop.call_at(start + 0.01, order.append, "at")
    handle = loop.call_later(1000, order.append, "never")
    assert handle.when() == pytest.approx(start + 1000, abs=1)
    await asyncio.sleep(0.05)
    assert order == ["at", "later"]
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(loop.create_future(), 0.01)
    handle.cancel()
    assert 0.05 <= loop.time() - start < GUARD
    assert 0.05 <= time.monotonic() - real_start < GUARD


def skip_uvloop(run):
    if run.is_uvloop:
        pytest.skip("uvloop has a clock of its own")


def test_timers_go_by_it(run, offset, waits_in_tasks):
    skip_uvloop(run)

    async def main():
        loop = asyncio.get_running_loop()
        with mock.patch.object(loop, "time", shifted(offset)):
            await check_timers()
        await check_timers()

    run(main)


def test_a_timer_is_due_when_the_clock_has_jumped(run):
    skip_uvloop(run)

    async def main():
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = []
        with mock.patch.object(loop, "time") as clock:
            clock.return_value = now
            loop.call_later(1, due.append, "one")
            loop.call_later(2, due.append, "two")
            await asyncio.sleep(0)
            assert due == []
            clock.return_value = now + 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert due == ["one"]

    run(main)


def test_a_clock_that_stands_holds_up_timers_only(run):
    skip_uvloop(run)

    async def main():
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        due = []
        with mock.patch.object(loop, "time", return_value=loop.time()):
            loop.call_later(0.001, due.append, None)
            await loop.run_in_executor(None, time.sleep, 0.02)
            loop.call_soon(done.set_result, None)
            await done
            assert due == []
        await asyncio.sleep(0.01)
        assert due == [None]

    run(main)


class ShiftedLoop(EventLoop):
    def time(self):
        return super().time() + 1e6


def run_on(loop, main):
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_a_subclass_of_the_event_loop_may_replace_it(waits_in_tasks):
    async def main():
        assert asyncio.get_running_loop().time() == pytest.approx(time.monotonic() + 1e6, abs=GUARD)
        await check_timers()

    pytest.importorskip("trio")
    run_on(ShiftedLoop(), main)


@pytest.mark.differs(
    "`EventLoop`: `time.monotonic` is replaced in every module, which freezegun does",
    asyncio="timers go by it: they stand still",
    here="timers go by the real clock",
    why="a test with another date does not hang",
)
@pytest.mark.parametrize("around", [False, True])
def test_a_clock_that_stands_in_every_module(monkeypatch, around):
    trio = pytest.importorskip("trio")

    def stop_the_clock():
        real, stands = time.monotonic, time.monotonic()
        for module in list(sys.modules.values()):
            for name, value in list(vars(module).items()):
                if value is real:
                    monkeypatch.setattr(module, name, lambda: stands)

    async def main():
        if not around:
            stop_the_clock()
        before = time.monotonic()
        await asyncio.sleep(0.01)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.sleep(GUARD), 0.01)
        # A crossing that does not wait, and a task that never does, still let trio's tasks run.
        slept = asyncio.ensure_future(from_asyncio.run(trio.sleep, 0.01))
        while not slept.done():
            await from_asyncio.run(trio.lowlevel.checkpoint_if_cancelled)
        slept = asyncio.ensure_future(from_asyncio.run(trio.sleep, 0.01))
        while not slept.done():
            await asyncio.sleep(0)
        assert time.monotonic() == before
        monkeypatch.undo()

    loop = EventLoop()
    if around:
        stop_the_clock()
    run_on(loop, main)


def test_timers_of_a_group_go_by_it(run, offset, waits_in_tasks):
    """On asyncio a group has the clock of the event loop."""
    skip_uvloop(run)

    async def main():
        loop = asyncio.get_running_loop()
        async with TransportGroup() as group:
            with mock.patch.object(loop, "time", shifted(offset)):
                assert group.time() == pytest.approx(time.monotonic() + offset, abs=GUARD)
                start = time.monotonic()
                future = group.create_future()
                group.call_later(0.02, future.set_result, None)
                await future
                assert 0.02 <= time.monotonic() - start < GUARD

    run(main)
