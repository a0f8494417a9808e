"""What trio has to do for us that AnyIO does not offer: its clock, its protection from Ctrl-C, tasks that wait.

The one module that imports trio, its public functions only. It is imported when trio runs, and not before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import FunctionType
from typing import Any, NoReturn

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled, disable_ki_protection, enable_ki_protection

__all__ = ["Scope", "Spawner", "checkpoint", "checkpoint_if_cancelled", "clock", "protect", "wait_for", "wait_in"]

Scope = trio.CancelScope
Cancelled = trio.Cancelled


def clock() -> Callable[[], float]:
    """Return what tells the time of this run, and need not look for it each time, as `trio.current_time` does."""
    return trio.lowlevel.current_clock().current_time


def protect(*functions: Callable[..., object]) -> None:
    """Let no `KeyboardInterrupt` come between two lines of `functions`, nor of what they call."""
    for function in functions:
        assert isinstance(function, FunctionType)
        enable_ki_protection(function)


@enable_ki_protection
async def wait_in(waiting: dict[Any, Callable[[Any], None]]) -> None:
    """Put this task into `waiting`, with what wakes it, and wait. Whoever wakes it takes it out first."""
    task = trio.lowlevel.current_task()
    waiting[task] = trio.lowlevel.reschedule

    def abort(_: object) -> trio.lowlevel.Abort:
        del waiting[task]
        return trio.lowlevel.Abort.SUCCEEDED

    await trio.lowlevel.wait_task_rescheduled(abort)


@enable_ki_protection
async def wait_for(future: asyncio.Future[Any], cancel: Callable[[], object]) -> Callable[[], NoReturn] | None:
    """Wait until `future` is done, whatever happens; call `cancel` once if this task is cancelled before that.

    Return what raises the cancellation, if there was one: `Cancelled`, or the `KeyboardInterrupt` of the main task.
    """
    task = trio.lowlevel.current_task()
    raise_cancellation: Callable[[], NoReturn] | None = None

    def done(_: object) -> None:
        trio.lowlevel.reschedule(task)

    def abort(raise_it: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
        nonlocal raise_cancellation
        raise_cancellation = raise_it
        cancel()
        return trio.lowlevel.Abort.FAILED

    future.add_done_callback(done, context=task.context)
    await trio.lowlevel.wait_task_rescheduled(abort)
    return raise_cancellation


@disable_ki_protection
async def _unprotected(async_function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
    return await async_function(*args)


class Spawner:
    """Starts tasks of trio's whose result is the result of a future of asyncio's."""

    _nursery: trio.Nursery

    async def enter(self, stack: AsyncExitStack) -> None:
        """Accept tasks, until `stack` is left, which waits for them."""
        self._nursery = await stack.enter_async_context(trio.open_nursery())

    def start(self, async_function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a task."""
        self._nursery.start_soon(async_function, *args, name=f"transports_anyio: {async_function.__qualname__}")

    @enable_ki_protection
    async def finish(
        self, async_function: Callable[..., Awaitable[object]], *args: object
    ) -> Callable[[], NoReturn] | None:
        """Await `async_function(first, flushing, *rest)`, which nothing cancels, and no Ctrl-C interrupts.

        `flushing` is a scope that is cancelled if this task is. Return what raises the cancellation then.
        """
        task = trio.lowlevel.current_task()
        raise_cancellation: Callable[[], NoReturn] | None = None
        flushing = trio.CancelScope()

        async def run() -> None:
            try:
                with trio.CancelScope(shield=True):
                    await async_function(args[0], flushing, *args[1:])
            finally:
                trio.lowlevel.reschedule(task)

        def abort(raise_it: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            nonlocal raise_cancellation
            raise_cancellation = raise_it
            flushing.cancel()
            return trio.lowlevel.Abort.FAILED

        # A task of its own, because only the main task is given what Ctrl-C raises.
        self._nursery.start_soon(enable_ki_protection(run), name="transports_anyio: end of an event loop")
        await trio.lowlevel.wait_task_rescheduled(abort)
        return raise_cancellation

    def spawn(
        self,
        async_function: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        scope: trio.CancelScope,
        settle: Callable[[BaseException | None, Any], None],
    ) -> None:
        """Start a task that awaits `async_function(*args)` inside `scope`.

        `settle` is called after its end, outside the scope: with what it has raised, or `None` and what it has
        returned. A cancellation is `CancelledError` of asyncio's.
        """
        self._nursery.start_soon(self._run, async_function, args, scope, settle, name=async_function)

    @staticmethod
    @enable_ki_protection
    async def _run(
        async_function: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        scope: trio.CancelScope,
        settle: Callable[[BaseException | None, Any], None],
    ) -> None:
        result = None
        try:
            with scope:
                result = await _unprotected(async_function, args)
        except trio.Cancelled:  # Of the event loop itself.
            settle(asyncio.CancelledError(), None)
            raise
        except BaseException as exc:
            settle(exc, None)
        else:
            settle(asyncio.CancelledError() if scope.cancelled_caught else None, result)
        finally:
            del settle, args  # What was raised has this frame, and has been passed to `settle`: no cycle.
