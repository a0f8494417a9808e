"""The core of an event loop: a group's core whose iterations run with the event loop set as running.

Holds: how each call gets the right environment. There are two kinds of code. *Asyncio code* runs while the event loop
is set as running, which is in iterations and in `LoopCore.call`. *Backend code* runs in the tasks of the backend, and
in `LoopCore.as_backend`.
May know: `asyncio`, `_callbacks`, `_core`, `_errors`, `_handles`, `_loop`, `_poller`, `_selector`, `_sides`.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import _get_running_loop, _set_running_loop
from collections.abc import Callable
from contextvars import Context, copy_context
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from .._callbacks import CallbackContext
from .._core import Core
from .._errors import NotOpenError
from ._handles import Handle
from ._sides import library

if TYPE_CHECKING:
    from .._poller import Poller
    from .._selector import Failed
    from ._loop import EventLoop

T = TypeVar("T")

# How long to wait, in seconds, before a selector that could not be reopened is reopened again.
REOPEN_INTERVAL = 0.01


def nothing_is_ready(_: Failed) -> int:
    """Stand in for `Selector.dispatch` while the selector has failed."""
    return 0


class LoopCallbackContext(CallbackContext):
    """The callback context of a connection in an event loop: no group is current in it."""

    __slots__ = ()

    _scheduler: LoopCore  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, core: LoopCore) -> None:
        self._scheduler = core
        self.group = core.group
        self.context = copy_context()

    def run_nested(self, callback: Callable[..., object], *args: object) -> None:
        if _get_running_loop() is self.group:
            callback(*args)
        else:  # Backend code has called a method of the transport.
            self._scheduler.call(callback, *args)


class LoopCore(Core):
    """The scheduler of an event loop, with all that it owns."""

    task_starter = "asyncio.create_task()"
    goes_on = True  # Most work takes a task several steps, and an iteration of the backend costs more than these.

    def __init__(self, loop: EventLoop) -> None:
        super().__init__(loop)
        self._loop = loop
        #: The first `KeyboardInterrupt` or `SystemExit` of a callback or task, or the first failure of the selector.
        self.leaving: BaseException | None = None
        #: Cancels the block of `open_event_loop`.
        self.end_block: Callable[[], object] = bool
        self._running = False  # An iteration or a call is running.

    # Asyncio code and backend code

    def _enter(self) -> tuple[Any, ...]:
        """Begin to run asyncio code: set the event loop as running. Return what `_leave` restores."""
        before = (_get_running_loop(), library.name, sys.get_asyncgen_hooks())
        _set_running_loop(self._loop)
        library.name = "asyncio"
        sys.set_asyncgen_hooks(self._loop._asyncgen_begun, self._loop._asyncgen_dropped)
        return before

    def _leave(self, before: tuple[Any, ...]) -> None:
        loop, name, hooks = before
        sys.set_asyncgen_hooks(*hooks)
        library.name = name
        _set_running_loop(loop)

    def as_backend(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, run as backend code. Asyncio code calls this."""
        if not self._running:
            return function(*args)
        before = (_get_running_loop(), library.name, sys.get_asyncgen_hooks())
        self._leave(self._outside)
        try:
            return function(*args)
        finally:
            self._leave(before)

    def start_task(self, *_: object, **__: object) -> None:
        """Refuse a task of a connection: its code would not be asyncio's."""
        msg = "a transport of an event loop has no tasks of its own: call asyncio.create_task()"
        raise RuntimeError(msg)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, run as asyncio code. Backend code calls this.

        Then run the callbacks that are ready, so that the driver need not be woken for them.
        """
        before = self._enter()
        if self._running:  # Asyncio code has called backend code, which calls this.
            try:
                return function(*args)
            finally:
                self._leave(before)
        self._running = True
        self._outside = before
        driver = self.driver
        waiting, driver.waiting = driver.waiting, False
        try:
            return function(*args)
        finally:
            del function, args  # Break a cycle: a task may keep an exception, whose traceback has this frame.
            self._run_on()
            self._running = False
            self._leave(before)
            if waiting or driver.in_wait:
                self._go_on_waiting()

    def _go_on_waiting(self) -> None:
        """Let the driver wait as before, for what there is now."""
        driver = self.driver
        driver.waiting = True
        if self.ready or self.poller.selector.always_ready:
            driver.wake()
        elif self.timers.heap:
            self.wait_at_most_until(self.timers.heap[0][0])

    def _run_on(self) -> None:
        """Run the callbacks that are ready. If they schedule others, run an iteration, which includes I/O."""
        if self.ready:
            self._run_ready()
            if self.ready:
                self._run_iteration()

    def _run_iteration(self) -> None:
        """Run an iteration as part of a call."""
        try:
            super().run_once()
        except Exception as exc:  # The selector has failed, as it will in the next iteration.
            self.leave_by(exc)

    def _run_ready(self) -> None:
        # As `Scheduler._run_ready`, but most callbacks are plain handles, which need no call of their own here.
        ready = self.ready
        callback: Any = None
        function = args = None
        for _ in range(len(ready)):
            callback = ready.popleft()
            try:
                if type(callback) is Handle:
                    function = callback._callback
                    if function is not None:
                        args = callback._args
                        callback._context.run(function, *args)
                else:
                    callback()
            except BaseException as exc:
                self._callback_failed(callback, exc)
        del callback, function, args  # Break a cycle: a task may keep an exception, whose traceback has this frame.

    def run_callback(self, callback: Callable[[], object]) -> None:
        """Run a callback; what it raises is reported."""
        self._run_callback(callback)

    def _start_scheduler(self) -> None:
        # Not by AnyIO, whose own lines would not be protected from Ctrl-C.
        self._loop._spawner.start(self._run_scheduler)

    async def _run_scheduler(self) -> None:
        with self.scheduler_scope:
            while True:
                if self.dispatch is nothing_is_ready:
                    await self._reopen_selector()
                try:
                    await self.driver.run(self)
                except Exception as exc:  # The selector has failed. The iterations continue, for the clean-ups.
                    self.leave_by(exc)
                    self.dispatch = nothing_is_ready

    async def _reopen_selector(self) -> None:
        """Reopen the selector. While there is no file descriptor for it, run iterations without I/O.

        What ends in them may release one.
        """
        selector = self.poller.selector
        while True:
            try:
                selector.reopen()
            except OSError:
                self.run_once()
                await self._loop._trio.sleep(REOPEN_INTERVAL)
            else:
                self.dispatch = selector.dispatch
                return

    def run_once(self) -> float:
        before = self._outside = self._enter()
        self._running = True
        try:
            return super().run_once()
        finally:
            self._running = False
            self._leave(before)

    # Errors

    def leaves(self, exc: BaseException | None) -> bool:
        return isinstance(exc, (KeyboardInterrupt, SystemExit))

    def leave_by(self, exc: BaseException) -> None:
        """Cancel the block of `open_event_loop`, which raises `exc` when everything has ended."""
        if self.leaving is None:
            self.leaving = exc
        self.end_block()

    def _callback_failed(self, callback: Callable[[], object], exc: BaseException) -> None:
        if self.leaves(exc):
            self.leave_by(exc)
            return
        context: dict[str, Any] = {"message": f"Exception in callback {callback!r}", "exception": exc}
        if isinstance(callback, asyncio.Handle):
            context["handle"] = callback
            traceback = callback._source_traceback  # asyncio's loops do so, too
            if traceback:
                context["source_traceback"] = traceback
        self._loop.call_exception_handler(context)

    def report(self, exc: BaseException, message: str, **details: object) -> None:
        if self.leaves(exc):
            self.leave_by(exc)
        else:
            super().report(exc, message, **details)

    def report_handshake(self, context: dict[str, Any]) -> None:
        # As asyncio, which reports an `OSError`, such as `ssl.SSLError`, in debug mode only.
        if self._loop.get_debug() or not isinstance(context["exception"], OSError):
            super().report_handshake(context)

    def not_open(self, name: str = "") -> NotOpenError:
        return NotOpenError("Event loop is closed", self.group)

    def check_open(self, name: str = "", called_as: str = "") -> Poller:
        if not self.open:
            raise self.not_open(name)
        if get_ident() != self.thread:
            raise RuntimeError(
                f"{name}() was called in another thread than the event loop's: use asyncio.run_coroutine_threadsafe()"
            )
        return self.poller

    # Other differences from a group

    def callback_context(self) -> CallbackContext:
        return LoopCallbackContext(self)

    def make_current(self, context: Context) -> None:
        """Do nothing: there is no group."""
