"""Callbacks of the event loop: asyncio's handles, which the core can call.

The plain ones have an `__init__` of their own, because asyncio's costs more than everything else that `call_soon` does.
Those of the debug mode are made by asyncio's, which keeps where they were made.
"""

# The event loop's own modules know what it hides from users.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from pathlib import Path
from threading import RLock
from typing import Any

from .._handles import Timers
from ._logger import logger

OWN_FILES = str(Path(__file__).parent)


class Handle(asyncio.Handle):
    """A callback in the queue. The same as asyncio's, but callable."""

    __slots__ = ()

    # Instead of an attribute of each: it is cancelled when its callback is gone.
    _repr = None
    _source_traceback = None
    _callback: Any
    _context: Context

    @property
    def _cancelled(self) -> bool:  # type: ignore[override]  # asyncio sets it, in what is overridden here
        return self._callback is None

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context

    def cancel(self) -> None:
        """Do not run the callback. Does nothing if it has run, or was cancelled before."""
        self._callback = None
        self._args = ()

    def __call__(self) -> None:
        """Run the callback, unless it was cancelled; the caller reports what it raises."""
        args = self._args  # First: another thread that cancels takes the callback away before them.
        callback = self._callback
        if callback is not None:
            self._context.run(callback, *args)
        del self, callback, args  # The traceback of an exception that a task keeps has this frame behind it: no cycle.


class ThreadSafeHandle(Handle):
    """A callback that another thread may cancel: when `cancel` returns, it has run to its end, or will never run."""

    __slots__ = ("_lock",)

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        super().__init__(callback, args, loop, context)
        self._lock = RLock()  # The callback itself may cancel it.

    def cancel(self) -> None:
        """Do not run the callback; wait for its end if it runs in another thread at the moment."""
        with self._lock:
            super().cancel()

    def __call__(self) -> None:
        with self._lock:
            super().__call__()


class TimerHandle(asyncio.TimerHandle):
    """A callback at a time. The same as asyncio's, but callable, and in the core's timers."""

    __slots__ = ("_entry", "_number", "_timers")

    # As for `Handle`.
    _repr = None
    _source_traceback = None
    _scheduled = True
    _callback: Any
    _context: Context
    # Of `Timer`.
    _when: float
    _number: int
    _entry: int

    @property
    def _cancelled(self) -> bool:  # type: ignore[override]  # asyncio sets it, in what is overridden here
        return self._callback is None

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
        timers: Timers,
    ) -> None:
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._when = when
        self._timers = timers
        timers.push(self)

    def cancel(self) -> None:
        """Do not run the callback. Does nothing if it has run, or was cancelled before."""
        self._callback = None
        self._args = ()
        self._timers.cancel(self)

    def __call__(self) -> None:
        """Run the callback, unless it was cancelled; the caller reports what it raises."""
        if self._callback is not None:
            self._context.run(self._callback, *self._args)
        del self  # The traceback of an exception that a task keeps has this frame behind it: no cycle.


def run_timed(handle: DebugHandle | DebugTimerHandle) -> None:
    """Run the callback of `handle`, unless it was cancelled, and log a warning if that takes too long."""
    if handle.cancelled():
        return
    loop = handle._loop  # noqa: SLF001
    start = loop.time()
    try:
        handle._context.run(handle._callback, *handle._args)  # noqa: SLF001
    finally:
        duration = loop.time() - start
        if duration >= loop.slow_callback_duration:
            logger.warning("Executing %s took %.3f seconds", safe_repr(handle), duration)
        del handle  # As in `__call__`: no cycle.


def safe_repr(handle: DebugHandle | DebugTimerHandle) -> str:
    """Return the task whose step `handle` is, or else the handle, as asyncio does."""
    task = getattr(handle._callback, "__self__", None)  # noqa: SLF001
    return repr(task if isinstance(task, asyncio.Task) else handle)


def leave_out_own_lines(handle: Any) -> None:
    """Let the stack that `handle` was made on end with the user's line."""
    stack = handle._source_traceback  # noqa: SLF001
    while stack and stack[-1].filename.startswith(OWN_FILES):
        del stack[-1]


class DebugHandle(asyncio.Handle):
    """A callback that knows where it was made, and whose duration is looked at. Another thread may cancel it."""

    __slots__ = ("_lock",)

    _callback: Any
    _context: Context
    _loop: Any

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        super().__init__(callback, args, loop, context)
        leave_out_own_lines(self)
        self._lock = RLock()

    def cancel(self) -> None:
        with self._lock:
            super().cancel()

    def __call__(self) -> None:
        with self._lock:
            try:
                run_timed(self)
            finally:
                del self


class DebugTimerHandle(asyncio.TimerHandle):
    """A callback at a time that knows where it was made, and whose duration is looked at."""

    __slots__ = ("_entry", "_number", "_timers")

    _callback: Any
    _context: Context
    _loop: Any
    # Of `Timer`.
    _when: float
    _number: int
    _entry: int

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
        timers: Timers,
    ) -> None:
        super().__init__(when, callback, args, loop, context)
        leave_out_own_lines(self)
        self._scheduled = True
        self._timers = timers
        timers.push(self)

    def cancel(self) -> None:
        self._timers.cancel(self)
        super().cancel()

    def __call__(self) -> None:
        try:
            run_timed(self)
        finally:
            del self
