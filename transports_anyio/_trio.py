"""What trio has to do for us that AnyIO does not offer: its clock, its protection from Ctrl-C, tasks that wait.

The one module that imports trio, its public functions only. It is imported when trio runs, and not before.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from queue import SimpleQueue
from time import monotonic
from types import FunctionType
from typing import Any, NoReturn

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled, disable_ki_protection, enable_ki_protection

__all__ = [
    "Guest",
    "Scope",
    "Spawner",
    "checkpoint",
    "checkpoint_if_cancelled",
    "clock",
    "protect",
    "wait_for",
    "wait_in",
]

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

    async def serve(self, opened: Callable[[trio.Nursery], object]) -> None:
        """Accept tasks until `end`; call `opened` first."""
        async with trio.open_nursery() as self._nursery:
            opened(self._nursery)
            await trio.sleep_forever()

    @property
    def tasks(self) -> int:
        """How many tasks run."""
        return len(self._nursery.child_tasks)

    def end(self) -> None:
        """Cancel all tasks, and end `serve` after them."""
        self._nursery.cancel_scope.cancel()

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


class Clock(trio.abc.Clock):
    """asyncio's clock, which is the same before, between and after the runs."""

    def start_clock(self) -> None:
        """Do nothing: it always runs."""

    def current_time(self) -> float:
        return monotonic()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - monotonic()


class Guest:
    """A trio run that goes on only in `run`, in the thread that calls it: trio's guest mode, by its public API.

    Each iteration of trio comes through a queue. When trio has to wait, it does so in a thread of its own, which is
    what makes an idle wait dearer than in `trio.run`.

    Source: https://trio.readthedocs.io/en/stable/reference-lowlevel.html#using-guest-mode-to-run-trio-on-top-of-other-event-loops
    """

    def __init__(self) -> None:
        self._iterations: SimpleQueue[Callable[[], object]] = SimpleQueue()
        #: trio's, for asynchronous generators.
        self.hooks: Any = sys.get_asyncgen_hooks()
        self._outcome: Any = None
        self._pid = 0
        #: The thread that the run belongs to, 0 while there is no run.
        self.thread = 0
        #: Whether trio's code may be called: `run` is on the stack.
        self.inside = False

    def start(self, async_function: Callable[[], Awaitable[object]]) -> None:
        """Start a run of `async_function`. Raises `RuntimeError` where another run is in progress in this thread."""
        if trio.lowlevel.in_trio_run():
            raise RuntimeError(
                "trio runs in this thread already, and it can run only once at a time: in a trio program use "
                "transports_anyio.open_event_loop(); an event loop that is paused while trio tasks of its own are "
                "under way has to be closed, or run until these have ended, before another one runs in its thread"
            )
        hooks = sys.get_asyncgen_hooks()
        trio.lowlevel.start_guest_run(
            async_function,
            run_sync_soon_threadsafe=self._iterations.put,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
            clock=Clock(),
        )
        self.hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(*hooks)
        self.thread = threading.get_ident()
        self._pid = os.getpid()

    def _done(self, outcome: Any) -> None:
        self._outcome = outcome
        self.thread = 0

    def check(self) -> None:
        """Raise `RuntimeError` if there is a run that cannot go on in this thread."""
        if not self.thread:
            return
        if self._pid != os.getpid():
            raise RuntimeError("trio tasks of the event loop were under way at a fork, and cannot go on in the child")
        if self.thread != threading.get_ident():
            raise RuntimeError(
                "trio tasks of the event loop are under way in another thread: run it there until they have ended"
            )

    def run(self, until: Callable[[], object]) -> None:
        """Let the run go on until it ends, or `until` is true after an iteration. Raises what the run has raised."""
        before, inside = sys.get_asyncgen_hooks(), self.inside
        sys.set_asyncgen_hooks(*self.hooks)
        self.inside = True
        get = self._iterations.get
        try:
            while self.thread and not until():
                get()()
        finally:
            self.inside = inside
            sys.set_asyncgen_hooks(*before)
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            outcome.unwrap()
