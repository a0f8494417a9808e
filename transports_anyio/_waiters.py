"""Tasks that wait for a change.

Holds: a condition without a lock, for many tasks and for one; an event; the outcome of an operation that ends in a
callback; the deadline of a shutdown.
May know: `_trio`, which is imported when a task of trio's waits; `anyio`, `asyncio`.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop  # pyright: ignore[reportPrivateUsage]
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import anyio.lowlevel

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# Each waiting task makes what wakes it by itself, for the backend that runs this task, and removes it when it stops
# waiting. One event for all of them has two problems. A `KeyboardInterrupt` at the start of a wait leaves the task in
# trio's list for that event, and setting the event then breaks trio (`trio.Event.wait` is not protected against it).
# And tasks of two kinds may wait at once: asyncio tasks and trio tasks, where an asyncio event loop runs on trio.


# What Ctrl-C must not interrupt on trio.
uninterruptible_functions: list[Callable[..., Any]] = []


def uninterruptible(function: FunctionT) -> FunctionT:
    """Let no `KeyboardInterrupt` into the middle of `function` on trio. It ends a wait in it as a cancellation does."""
    uninterruptible_functions.append(function)
    return function


# `_trio`, once a group or an event loop has opened on trio. Not `functools.cache`: it is needed for each message.
loaded: Any = None


def trio_functions() -> Any:
    """Return `_trio`. The first call, when a group or an event loop opens, protects what is `uninterruptible`."""
    global loaded  # noqa: PLW0603
    if loaded is None:
        from . import _trio

        _trio.protect(*uninterruptible_functions)
        loaded = _trio
    return loaded


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop if an asyncio task calls, `None` for a task of trio's."""
    loop = _get_running_loop()
    # With a current task, because the event loop may also be one that trio runs in as a guest.
    return loop if loop is not None and asyncio.current_task(loop) is not None else None


def wake_future(future: asyncio.Future[None]) -> None:
    """End the wait for `future`, unless that has ended already."""
    try:
        future.set_result(None)
    except asyncio.InvalidStateError:
        pass  # Its task was cancelled in the same iteration, or by a signal just now: to look first is not enough.


class Waiters:
    """The tasks that wait for the next change. There is no memory: `notify` wakes only those that wait already."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[Any, Callable[[Any], None]] = {}  # What to wake, in order, and how.

    def wait(self) -> Awaitable[None]:
        """Wait for the next `notify`."""
        loop = asyncio_loop()
        if loop is None:
            return trio_functions().wait_in(self._waiting)  # type: ignore[no-any-return]
        return self._wait_for(loop.create_future())  # It costs half as much as an event of AnyIO's.

    async def _wait_for(self, future: asyncio.Future[None]) -> None:
        self._waiting[future] = wake_future
        try:
            await future
        finally:
            self._waiting.pop(future, None)

    @uninterruptible  # A `KeyboardInterrupt` in the middle of it would leave tasks waiting.
    def notify(self) -> None:
        """Wake every task that waits."""
        waiting = self._waiting
        if not waiting:
            return
        for waiter, wake in tuple(waiting.items()):
            try:
                wake(waiter)  # First: if it raises, at the recursion limit for example, the task goes on waiting.
            except RuntimeError:
                check_thread(wake)
                raise
            del waiting[waiter]


class Waiter:
    """As `Waiters`, for one task at a time, which costs less.

    Only what is `uninterruptible` may wait, and in the end it sets `waiting` to `None`: perhaps there was no wait,
    because the stack had no room for it.
    """

    __slots__ = ("_wake", "waiting")

    def __init__(self) -> None:
        #: What to wake.
        self.waiting: Any = None
        self._wake: Callable[[Any], None] = wake_future

    def wait(self) -> Awaitable[object]:
        """Wait for the next `notify`. To be awaited at once."""
        loop = _get_running_loop() and asyncio_loop()  # The first saves the call on trio.
        if loop is not None:
            self.waiting = future = loop.create_future()
            self._wake = wake_future
            return future
        trio = loaded or trio_functions()
        self.waiting = trio.current_task()
        self._wake = trio.wake_task
        return trio.wait_task_rescheduled(self._forget)  # type: ignore[no-any-return]

    def _forget(self, _: object) -> Any:
        """Let trio interrupt the wait."""
        self.waiting = None
        return trio_functions().Abort.SUCCEEDED

    @uninterruptible
    def notify(self) -> None:
        """Wake the task that waits."""
        if self.waiting is not None:
            try:
                self._wake(self.waiting)
            except RuntimeError:
                check_thread(self._wake)
                raise
            self.waiting = None


def check_thread(wake: Callable[[Any], None]) -> None:
    """Raise an error that helps if `wake` has failed because this is another thread than trio's."""
    if wake is not wake_future:
        trio_functions().check_thread()


def checkpoint_if_cancelled() -> Awaitable[None]:
    """As `anyio.lowlevel.checkpoint_if_cancelled`, which on trio costs several times as much."""
    if _get_running_loop() is None or asyncio_loop() is None:  # As in `Waiter.wait`.
        return (loaded or trio_functions()).checkpoint_if_cancelled()  # type: ignore[no-any-return]
    return anyio.lowlevel.checkpoint_if_cancelled()


class InterruptSafeEvent:
    """An event like `anyio.Event`, for a task that Ctrl-C may interrupt while it waits."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters = Waiters()

    def set(self) -> None:
        """Set the event, and wake every task that waits for it."""
        self._is_set = True
        self._waiters.notify()

    async def wait(self) -> None:
        """Wait until the event is set."""
        if self._is_set:
            await anyio.lowlevel.checkpoint()
        else:
            await self._waiters.wait()


class Outcome:
    """The end of an operation that ends in a callback: `set` is the callback, a task waits in `wait`."""

    __slots__ = ("_event", "_exception")

    def __init__(self) -> None:
        self._event = InterruptSafeEvent()
        self._exception: Exception | None = None

    def set(self, exc: Exception | None) -> None:
        """End the wait, which raises `exc` unless it is `None`."""
        self._exception = exc
        self._event.set()

    async def wait(self) -> None:
        """Wait for the end of the operation. Raises its exception."""
        await self._event.wait()
        exc, self._exception = self._exception, None
        try:
            if exc is not None:
                raise exc
        finally:
            del exc  # Break a cycle: its traceback has this frame.


def check_shutdown_timeout(timeout: float | None) -> float | None:
    """Return the time-out of a shutdown.

    Raises `TypeError` or `ValueError` unless it is a number from 0 on, or `None`.
    """
    if timeout is None:
        return None
    if not timeout >= 0:  # NaN is refused, too.
        raise ValueError(f"timeout should be a number of seconds from 0 on, or None, got {timeout!r}")
    return float(timeout)


async def wait_or_abort(
    timeout: float | None, wait_closed: Callable[[], Awaitable[None]], abort: Callable[[], object]
) -> None:
    """Wait for `wait_closed()`, and call `abort` first if that takes longer than `timeout` seconds."""
    with anyio.move_on_after(timeout):
        await anyio.lowlevel.checkpoint()  # If there is no time at all, it ends here: not in a wait, a little later.
        await wait_closed()
        return
    abort()
    await wait_closed()
