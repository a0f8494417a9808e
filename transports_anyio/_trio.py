"""What trio offers and AnyIO does not: its clock, its protection from Ctrl-C, tasks that another task wakes.

Holds: the driver for trio, and what an event loop needs of trio.
May know: `asyncio`, `os`, `outcome`, `trio`, `_clock`, `_driver`, `_selector`.

No other module imports trio, and this one is imported only while trio runs. It uses public functions only.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from math import inf
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import trio
from outcome import Outcome  # trio's own dependency, for the values of `reschedule`.
from trio import sleep
from trio.lowlevel import (
    Abort,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    disable_ki_protection,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ._clock import monotonic
from ._driver import RESOLUTION, DrivenScheduler, TaskDriver, check_stack, first_steps
from ._selector import SystemSelector

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

ResultT = TypeVar("ResultT")

__all__ = [
    "Abort",
    "Guest",
    "Scope",
    "Spawner",
    "TrioDriver",
    "check_thread",
    "checkpoint",
    "checkpoint_if_cancelled",
    "clock",
    "current_task",
    "protect",
    "sleep",
    "wait_in",
    "wait_task_rescheduled",
    "wake_task",
]

Scope = trio.CancelScope
Cancelled = trio.Cancelled


def clock() -> Callable[[], float]:
    """Return the clock of this run as a function. Unlike `trio.current_time`, it need not look the clock up."""
    return trio.lowlevel.current_clock().current_time


def protect(*functions: Callable[..., object]) -> None:
    """Protect `functions`, and what they call, from `KeyboardInterrupt`. It goes to trio's main task instead."""
    for function in functions:
        assert isinstance(function, FunctionType)
        enable_ki_protection(function)


def check_thread() -> None:
    """Raise an error that helps in another thread than trio's, where trio's own error says nothing of threads."""
    if not trio.lowlevel.in_trio_run():
        raise RuntimeError(
            "a task that waits can be woken in its own thread only: use call_soon_threadsafe() in this one"
        ) from None


class Nothing(Outcome[None]):
    """The value `None`, for any number of waits: trio would make an `outcome.Value` for each, which costs more."""

    __slots__ = ()

    def unwrap(self) -> None:
        return None

    def send(self, gen: Generator[ResultT, None, object]) -> ResultT:
        return gen.send(None)

    async def asend(self, agen: AsyncGenerator[ResultT, None]) -> ResultT:
        return await agen.asend(None)


NOTHING = Nothing()


# How many frames trio's `reschedule` needs, but in guest mode. A `RecursionError` there would leave a task half awake.
FRAMES_OF_RESCHEDULE = 3


@enable_ki_protection
def wake_task(task: trio.lowlevel.Task) -> None:
    """Wake `task`, which waits in `wait_task_rescheduled`. It waits on if this raises."""
    check_stack(FRAMES_OF_RESCHEDULE)
    reschedule(task, NOTHING)


class TrioDriver(TaskDriver):
    """Runs iterations in two tasks: one waits for the selector, the other one is the alarm.

    A call from another thread by mistake has an effect, as on asyncio: `close` must not do half of its work.

    Only a cancellation wakes a task that waits for a file descriptor, and that takes a scope for each wait. The alarm
    is woken directly, and keeps its scope while it waits. The deadline of the scope is moved for an earlier time only:
    when the alarm goes off, it waits again if a later time is wanted by then.
    """

    def __init__(self, selector: SystemSelector, time: Callable[[], float]) -> None:
        super().__init__(selector, time)
        self._system_selector = selector
        self._running = False  # One of the tasks runs iterations.
        self._failure: BaseException | None = None
        self._parked: trio.lowlevel.Task | None = None  # The alarm, while it waits.
        self._alarm_at = -inf  # The deadline of the alarm's scope; minus infinity if it does not wait.
        self._alarm_scope = trio.CancelScope()

    async def run(self, scheduler: DrivenScheduler) -> None:
        async def alarm() -> None:
            await self._run(self._alarm, scheduler, nursery)

        if trio.lowlevel.currently_ki_protected():
            enable_ki_protection(alarm)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(alarm, name="transports_anyio: alarm")
                await self._run(self._watch, scheduler, nursery)
        finally:
            self.waiting = False
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure  # Also when the tasks were cancelled in the same iteration.

    async def _run(
        self,
        task: Callable[[DrivenScheduler], Awaitable[None]],
        scheduler: DrivenScheduler,
        nursery: trio.Nursery,
    ) -> None:
        """Run one of the two tasks. What it raises ends both, and `run` raises it as itself, not in a group."""
        try:
            await task(scheduler)
        except trio.Cancelled:
            raise
        except BaseException as exc:
            self._failure = self._failure or exc
            nursery.cancel_scope.cancel()

    async def _watch(self, scheduler: DrivenScheduler) -> None:
        """Run iterations when a file descriptor is ready."""
        await checkpoint()
        while True:
            await self._run_iterations(scheduler)
            await trio.lowlevel.wait_readable(self._system_selector.fileno())

    async def _alarm(self, scheduler: DrivenScheduler) -> None:
        """Run iterations after a wake-up, and at the deadline."""
        task = current_task()
        while True:
            self._alarm_at = self.deadline
            with trio.CancelScope(deadline=self._on_backend(self._alarm_at)) as self._alarm_scope:
                self._parked = task
                if self.deadline >= self._alarm_at:  # If not, a finalizer has called `wake` between these lines.
                    await wait_task_rescheduled(self._abort_alarm)
            self._parked = None
            self._alarm_at = -inf
            if self.waiting:
                now = self.clock.time() + RESOLUTION
                if self.deadline <= now:
                    self.deadline = scheduler.next_deadline()
                if self.deadline > now:
                    continue  # A later time is wanted by now: the timer was cancelled or moved.
            await self._run_iterations(scheduler)

    def _abort_alarm(self, _: object) -> Abort:
        self._parked = None
        return Abort.SUCCEEDED

    async def _run_iterations(self, scheduler: DrivenScheduler) -> None:
        """Run iterations until there is something to wait for, unless the other task does so already."""
        if self._running:
            return
        self._running = True
        self.waiting = False
        self.deadline = inf
        try:
            while True:
                if scheduler.tasks_started:
                    await first_steps(scheduler)
                deadline = scheduler.run_once()
                if not self._selector.always_ready and (deadline == inf or deadline > self.clock.time()):
                    break
                if not scheduler.tasks_started:
                    await checkpoint()
        finally:
            self._running = False
        self.waiting = True
        self.wait_until(deadline)

    def wait_until(self, deadline: float) -> None:
        if deadline < self._alarm_at:
            check_stack()
            if not trio.lowlevel.in_trio_run():
                self.wake_threadsafe()
                return
            self._alarm_scope.deadline = self._on_backend(deadline)
            self._alarm_at = deadline
        self.deadline = deadline

    @enable_ki_protection
    def wake(self) -> None:
        if self.waiting:
            if self._parked is not None:
                try:
                    wake_task(self._parked)  # First: at the recursion limit it raises: nothing changes.
                except RuntimeError:
                    if trio.lowlevel.in_trio_run():
                        raise
                    self.wake_threadsafe()
                    return
                self._parked = None
            else:
                self.deadline = -inf  # The alarm is about to run, or about to wait for the first time.
            self.waiting = False


@enable_ki_protection
async def wait_in(waiting: dict[Any, Callable[[Any], None]]) -> None:
    """Wait in `waiting`, under this task and with the function that wakes it. The waking code removes it first."""
    task = current_task()
    waiting[task] = wake_task

    def abort(_: object) -> Abort:
        del waiting[task]
        return Abort.SUCCEEDED

    try:
        await wait_task_rescheduled(abort)
    except BaseException:  # Perhaps at the recursion limit, before the wait: nobody may wake this task later.
        waiting.pop(task, None)
        raise


@disable_ki_protection
async def _unprotected(async_function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
    return await async_function(*args)


class Spawner:
    """Starts trio tasks for an event loop, lets them wait for its futures, and runs its end."""

    _nursery: trio.Nursery

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[Any], trio.lowlevel.Task] = {}  # Which task waits for which future.
        #: Trio tasks are being ended, and no callback of the event loop runs before they have ended.
        self.ending = False

    async def enter(self, stack: AsyncExitStack) -> None:
        """Open the nursery. When `stack` is left, it waits for the tasks."""
        self._nursery = await stack.enter_async_context(trio.open_nursery())

    async def serve(self, opened: Callable[[trio.Nursery], object]) -> None:
        """Accept tasks until `end`; call `opened` first."""
        async with trio.open_nursery() as self._nursery:
            self.ending = False
            opened(self._nursery)
            await trio.sleep_forever()

    @property
    def tasks(self) -> int:
        """How many tasks run."""
        return len(self._nursery.child_tasks)

    def end(self) -> None:
        """Cancel all tasks, and end `serve` after them. Their waits for futures are given up: see `wait_for`."""
        self.ending = True
        self._nursery.cancel_scope.cancel()
        for future in tuple(self._waiting):
            self._wake(future)

    def check(self) -> None:
        """Raise `RuntimeError` if no asyncio code may run because the trio tasks are being ended."""
        if self.ending:
            raise RuntimeError("the event loop runs no asyncio code any more: its trio tasks end")

    @enable_ki_protection
    async def wait_for(
        self,
        future: asyncio.Future[Any],
        cancel: Callable[[], object],
        call_soon: Callable[..., object],
    ) -> Callable[[], NoReturn] | None:
        """Wait until `future` is done. If this task is cancelled before that, let `call_soon` call `cancel` once.

        Continue to wait then, and return a function that raises the cancellation: `trio.Cancelled`, or
        `KeyboardInterrupt` in the main task.

        `end` ends the wait, because no callback will make the future done: with the cancellation, or `RuntimeError`
        where this task is shielded from it.
        """
        task = current_task()
        raise_cancellation: Callable[[], NoReturn] | None = None

        def cancel_once() -> None:
            if not future.done():
                cancel()

        def abort(raise_it: Callable[[], NoReturn]) -> Abort:
            nonlocal raise_cancellation
            raise_cancellation = raise_it
            # Not at once: trio could not go on after an exception here. `cancel` calls code of the user's, and each of
            # several crossings inside one another would take more of the stack.
            if not self.ending:
                call_soon(cancel_once, context=task.context)
            return Abort.FAILED

        if not self.ending:
            self._waiting[future] = task
            future.add_done_callback(self._wake, context=task.context)
            await wait_task_rescheduled(abort)
        if not future.done():
            future.remove_done_callback(self._wake)
            await checkpoint_if_cancelled()
            self.check()
        return raise_cancellation

    def _wake(self, future: asyncio.Future[Any]) -> None:
        task = self._waiting.get(future)
        if task is not None:  # If not, `end` was first.
            wake_task(task)
            del self._waiting[future]

    def start(self, async_function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a task."""
        self._nursery.start_soon(async_function, *args, name=f"transports_anyio: {async_function.__qualname__}")

    @enable_ki_protection
    async def finish(
        self, async_function: Callable[..., Awaitable[object]], *args: object
    ) -> Callable[[], NoReturn] | None:
        """Await `async_function(first, flushing, *rest)`, protected from cancellations and Ctrl-C.

        `flushing` is a scope that is cancelled when this task is cancelled. Return a function that raises the
        cancellation then.
        """
        task = current_task()
        raise_cancellation: Callable[[], NoReturn] | None = None
        flushing = trio.CancelScope()

        async def run() -> None:
            try:
                with trio.CancelScope(shield=True):
                    await async_function(args[0], flushing, *args[1:])
            finally:
                wake_task(task)

        def abort(raise_it: Callable[[], NoReturn]) -> Abort:
            nonlocal raise_cancellation
            raise_cancellation = raise_it
            flushing.cancel()
            return Abort.FAILED

        # In a task of its own: Ctrl-C raises `KeyboardInterrupt` in the main task only.
        self._nursery.start_soon(enable_ki_protection(run), name="transports_anyio: end of an event loop")
        await wait_task_rescheduled(abort)
        return raise_cancellation

    def spawn(
        self,
        async_function: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        scope: trio.CancelScope,
        settle: Callable[[BaseException | None, Any], None],
    ) -> None:
        """Start a task that awaits `async_function(*args)` inside `scope`.

        After its end, outside the scope, `settle` is called with the exception and the result, one of which is `None`.
        A cancellation is passed as `asyncio.CancelledError`.
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
        except trio.Cancelled:  # The event loop ends.
            settle(asyncio.CancelledError(), None)
            raise
        except BaseException as exc:
            settle(exc, None)
        else:
            settle(asyncio.CancelledError() if scope.cancelled_caught else None, result)
        finally:
            del settle, args  # Break a cycle: the traceback of the exception has this frame.


class GuestClock(trio.abc.Clock):
    """asyncio's clock, which is the same before, between and after the runs."""

    def start_clock(self) -> None:
        """Do nothing: it always runs."""

    def current_time(self) -> float:
        return monotonic()

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - monotonic()


class Guest:
    """A trio run that goes on only in `run`, in the thread that calls it: trio's guest mode, by its public API.

    trio adds each of its iterations to a list. When it has to wait, it does so in a thread of its own, which is what
    makes an idle wait dearer than in `trio.run`.

    Source: https://trio.readthedocs.io/en/stable/reference-lowlevel.html#using-guest-mode-to-run-trio-on-top-of-other-event-loops
    """

    def __init__(self) -> None:
        self._iterations: deque[Callable[[], object]] = deque()
        self._wait = threading.Lock()  # Released when there is an iteration.
        self._wait.acquire()
        #: trio's, for asynchronous generators. A plain tuple, because the garbage collector does not look into what
        #: `sys.get_asyncgen_hooks` returns, and trio's hooks lead to all that trio knows.
        self.hooks: tuple[Any, Any] = (None, None)
        self._outcome: Any = None
        self._pid = 0
        #: The thread that the run belongs to, 0 while there is no run.
        self.thread = 0
        #: Whether trio's code may be called: `run` is on the stack.
        self.inside = False

    def start(self, async_function: Callable[[], Awaitable[object]]) -> None:
        """Start a run of `async_function`. Raises `RuntimeError` where another run is in progress in this thread."""
        self.check_thread()
        hooks = sys.get_asyncgen_hooks()
        # trio would keep those that are set, and call them. They may be those of the event loop: another such cycle.
        sys.set_asyncgen_hooks(None, None)
        try:
            trio.lowlevel.start_guest_run(
                async_function,
                run_sync_soon_threadsafe=self._add_iteration,
                done_callback=self._done,
                host_uses_signal_set_wakeup_fd=True,
                clock=GuestClock(),
            )
            first, last = sys.get_asyncgen_hooks()
            self.hooks = (first, last)
        finally:
            sys.set_asyncgen_hooks(*hooks)
        self.thread = threading.get_ident()
        self._pid = os.getpid()

    def _add_iteration(self, iteration: Callable[[], object]) -> None:
        self._iterations.append(iteration)
        if self._wait.locked():
            with suppress(RuntimeError):  # Another thread has released it.
                self._wait.release()

    def check_thread(self) -> None:
        """Raise `RuntimeError` where another run is in progress in this thread."""
        if trio.lowlevel.in_trio_run():
            raise RuntimeError(
                "trio runs in this thread already, and it can run only once at a time: in a trio program use "
                "transports_anyio.open_event_loop(); an event loop that is paused while trio tasks of its own are "
                "under way has to be closed, or run until these have ended, before another one runs in its thread"
            )

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
        iterations = self._iterations
        try:
            while self.thread and not until():
                # Python calls a signal handler after the wait that the signal ends. If it raises, nothing may be lost:
                # so the wait does not return the iteration.
                while not iterations:
                    self._wait.acquire()
                iterations.popleft()()
        finally:
            self.inside = inside
            sys.set_asyncgen_hooks(*before)
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            outcome.unwrap()
