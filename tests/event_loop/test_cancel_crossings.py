"""A cancellation of backend code that asyncio code has to be told of: deep chains, and errors."""

from __future__ import annotations

import asyncio
import functools
import sys

import anyio
import pytest
from support import GUARD

from transports_anyio import from_asyncio, open_event_loop, to_asyncio


def in_a_run_of_its_own(test):
    """Run an async test by `anyio.run`, which a `trio.TrioInternalError` ends; AnyIO's plugin would wait for ever."""

    @functools.wraps(test)
    def run(anyio_backend, **params):
        name, options = anyio_backend
        anyio.run(functools.partial(test, anyio_backend, **params), backend=name, backend_options=options)

    return run


@in_a_run_of_its_own
async def test_a_chain_of_crossings_that_is_deeper_than_the_stack_is_cancelled(anyio_backend):
    """Each of them is cancelled in a callback of its own, not inside of the one before."""
    depth = sys.getrecursionlimit() // 2
    events = []

    async def down(remaining):
        await (to_asyncio.run(up, remaining - 1) if remaining else wait())

    async def up(remaining):
        await from_asyncio.run(down, remaining)

    async def wait():
        events.append("waiting")
        try:
            await anyio.sleep(GUARD)
        finally:
            events.append("cancelled")

    with anyio.fail_after(GUARD):
        async with open_event_loop():
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(down, depth)
                    while not events:
                        await anyio.sleep(0.001)
                    scope.cancel()
            assert scope.cancelled_caught
    assert events == ["waiting", "cancelled"]


class Refuses(asyncio.Future[object]):
    """A future that an asyncio task waits for, which cannot be cancelled."""

    def cancel(self, *args, **options):
        raise ZeroDivisionError


@in_a_run_of_its_own
async def test_a_cancellation_that_fails_in_asyncio_is_reported(anyio_backend):
    """The backend goes on, and so does the wait."""
    reports = []
    results = []

    async def wait():
        loop = asyncio.get_running_loop()
        future = Refuses(loop=loop)
        loop.call_soon(scope.cancel)
        loop.call_later(0.01, future.set_result, "result")
        return await future

    with anyio.fail_after(GUARD):
        async with open_event_loop() as loop:
            if anyio_backend[0] != "trio":
                pytest.skip("there the backend calls `cancel`, in tasks of its own")
            loop.set_exception_handler(lambda _, context: reports.append(context["exception"]))
            with anyio.CancelScope() as scope:
                results.append(await to_asyncio.run(wait))
                await anyio.sleep(GUARD)
            assert scope.cancelled_caught
    assert results == ["result"]
    assert [type(report) for report in reports] == [ZeroDivisionError]


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
@in_a_run_of_its_own
async def test_what_leaves_asyncio_code_when_it_is_cancelled_leaves_the_block(anyio_backend, leaving):
    if anyio_backend[0] != "trio":
        pytest.skip("there the backend calls `cancel`, in tasks of its own")

    class Leaves(asyncio.Future[object]):
        def cancel(self, *args, **options):
            if not left:
                left.append(True)
                raise leaving("out")
            return super().cancel(*args, **options)

    left = []

    async def wait():
        loop = asyncio.get_running_loop()
        loop.call_soon(scope.cancel)
        future = Leaves(loop=loop)
        loop.call_later(0.01, future.set_result, None)
        await future

    with pytest.raises(leaving, match="out"), anyio.fail_after(GUARD):
        async with open_event_loop():
            with anyio.CancelScope() as scope:
                await to_asyncio.run(wait)
            await anyio.sleep(GUARD)


@in_a_run_of_its_own
async def test_asyncio_code_is_running_when_it_is_cancelled(anyio_backend):
    loops = []

    class Asks(asyncio.Future[object]):
        def cancel(self, *args, **options):
            loops.append(asyncio.get_running_loop())
            return super().cancel(*args, **options)

    async def wait():
        loop.call_soon(scope.cancel)
        await Asks(loop=loop)

    async with open_event_loop() as loop:
        with anyio.CancelScope() as scope:
            await to_asyncio.run(wait)
    assert scope.cancelled_caught
    assert set(loops) == {loop}
