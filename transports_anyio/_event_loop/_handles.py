"""asyncio's handles of callbacks and timers, in a form that the core can call.

Holds: subclasses of `asyncio.Handle` and `asyncio.TimerHandle`, for normal operation and for the debug mode.
May know: `asyncio`, `_handles`, `_logger`.

The plain ones have their own `__init__`: that of asyncio costs more than everything else that `call_soon` does. Those
of the debug mode use asyncio's, which records where a handle was made.
"""

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


def none_called(*_: object) -> None:
    """Stand for a callback `None`, which as an attribute of a handle says that it was cancelled."""
    raise TypeError("'NoneType' object is not callable")


class PlainHandle(asyncio.Handle):
    """What handles have outside of the debug mode."""

    __slots__ = ()

    # Class attributes instead of an attribute of each handle. A handle without a callback counts as cancelled.
    _repr = None
    _source_traceback = None
    _callback: Any
    _context: Context

    @property
    def _cancelled(self) -> bool:  # type: ignore[override]  # asyncio sets it, in what is overridden in derived classes
        return self._callback is None


class Handle(PlainHandle):
    """A callback in the queue. A call runs it."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object] | None,
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        self._callback = none_called if callback is None else callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context

    def cancel(self) -> None:
        """Do not run the callback. Does nothing if it has run, or was cancelled before."""
        self._callback = None
        self._args = ()

    def __call__(self) -> None:
        """Run the callback, unless it was cancelled; the caller reports what it raises."""
        args = self._args  # Before the callback: a thread that cancels clears the callback first.
        callback = self._callback
        if callback is not None:
            self._context.run(callback, *args)
        del self, callback, args  # Break a cycle: a task may keep an exception, whose traceback has this frame.


class ThreadSafeHandle(Handle):
    """A callback that another thread may cancel: when `cancel` returns, it has run to its end, or will never run."""

    __slots__ = ("_lock",)

    def __init__(
        self,
        callback: Callable[..., object] | None,
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


class TimerHandle(PlainHandle, asyncio.TimerHandle):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A callback at a time, in the core's timers. A call runs it."""

    __slots__ = ("_entry", "_number", "_timers")

    _scheduled = True
    # Of `Timer`.
    _when: float
    _number: int
    _entry: int

    def __init__(
        self,
        when: float,
        callback: Callable[..., object] | None,
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
        timers: Timers,
    ) -> None:
        self._callback = none_called if callback is None else callback
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
        del self  # Break a cycle, as in `Handle`.


def run_timed(handle: DebugHandle | DebugTimerHandle) -> None:
    """Run the callback of `handle`, unless it was cancelled, and log a warning if that takes too long."""
    if handle._callback is None:
        return
    loop = handle._loop
    before, loop._debug_handle = loop._debug_handle, handle
    start = loop.time()
    try:
        handle._context.run(handle._callback, *handle._args)
    finally:
        loop._debug_handle = before
        duration = loop.time() - start
        if duration >= loop.slow_callback_duration:
            logger.warning("Executing %s took %.3f seconds", safe_repr(handle), duration)
        del handle  # Break a cycle, as in `Handle`.


def safe_repr(handle: DebugHandle | DebugTimerHandle) -> str:
    """Return the text that stands for `handle` in the log: its task if it is the step of one, as in asyncio."""
    task = getattr(handle._callback, "__self__", None)
    return repr(task if isinstance(task, asyncio.Task) else handle)


def leave_out_own_lines(handle: Any) -> None:
    """Remove our own lines from the end of the stack that `handle` was made on."""
    stack = handle._source_traceback
    while stack and stack[-1].filename.startswith(OWN_FILES):
        del stack[-1]


class DebugHandle(asyncio.Handle):
    """A callback of the debug mode. It records where it was made, and logs if it takes long."""

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
    """A timer of the debug mode. It records where it was made, and logs if it takes long."""

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
