"""The inside of an event loop: a group's core, whose iterations run with the event loop set as the running one.

Holds: the two sides and the way from one to the other. *asyncio code* runs while the event loop is set as running: in
iterations, and in `call`. *Backend code* runs in the backend's own tasks, and in `as_backend`.
"""

# The event loop's own modules know what it hides from users.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import sys
from asyncio import _get_running_loop, _set_running_loop
from collections.abc import Callable
from contextvars import Context, copy_context
from math import inf
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from .._callbacks import CallbackContext
from .._core import Core
from .._errors import NotOpenError
from ._sides import library

if TYPE_CHECKING:
    from .._poller import Poller
    from ._loop import EventLoop

T = TypeVar("T")


class LoopCallbackContext(CallbackContext):
    """The way from a connection into asyncio code, which knows no group."""

    __slots__ = ("_core",)

    def __init__(self, core: LoopCore) -> None:
        self._core = core
        self.group = core.group
        self.call_soon = core.call_internal
        self.leaves = core.leaves
        self.context = copy_context()
        self.run = self.context.run

    def run_nested(self, callback: Callable[..., object], *args: object) -> None:
        if _get_running_loop() is self.group:
            callback(*args)
        else:  # Backend code calls a method of the transport.
            self._core.call(callback, *args)


class LoopCore(Core):
    """The scheduler of an event loop, with all that it owns."""

    goes_on = True  # A task takes several steps for most things, and a round through the backend costs more than those.

    def __init__(self, loop: EventLoop) -> None:
        super().__init__(loop)
        self._loop = loop
        #: What has come out of a callback or task to end the program, the first of it.
        self.leaving: BaseException | None = None
        #: Ends the block of the event loop.
        self.end_block: Callable[[], object] = bool
        self._running = False  # An iteration or a call is running.

    # The two sides

    def _enter(self) -> tuple[Any, ...]:
        """Set the event loop as running; return what `_leave` restores."""
        before = (_get_running_loop(), library.name, sys.get_asyncgen_hooks())
        _set_running_loop(self._loop)
        library.name = "asyncio"
        sys.set_asyncgen_hooks(self._loop._asyncgen_begun, self._loop._asyncgen_dropped)  # noqa: SLF001
        return before

    def _leave(self, before: tuple[Any, ...]) -> None:
        loop, name, hooks = before
        sys.set_asyncgen_hooks(*hooks)
        library.name = name
        _set_running_loop(loop)

    def as_backend(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called by asyncio code, as backend code."""
        if not self._running:
            return function(*args)
        before = (_get_running_loop(), library.name, sys.get_asyncgen_hooks())
        self._leave(self._outside)
        try:
            return function(*args)
        finally:
            self._leave(before)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called by backend code, as asyncio code.

        Then run what is ready, as long as that is quickly done: no other task has to be woken for it.
        """
        before = self._enter()
        if self._running:  # Backend code that asyncio code has called.
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
            del function, args  # The traceback of an exception that a task keeps has this frame behind it: no cycle.
            self._run_on()
            self._running = False
            self._leave(before)
            if waiting:
                self._go_on_waiting()

    def _go_on_waiting(self) -> None:
        """Let the driver wait as before, for what there is now."""
        driver = self.driver
        driver.waiting = True
        if self.ready or self.poller.selector.always_ready:
            driver.wake()
        elif self.timers.heap:
            driver.wait_until(self.timers.next_deadline())

    def _run_on(self) -> None:
        """Run what is ready. If that makes something ready, run an iteration, which includes I/O."""
        if self.ready:
            self._run_ready()
            if self.ready:
                self._run_once()

    def run_callback(self, callback: Callable[[], object]) -> None:
        """Run a callback; what it raises is reported."""
        self._run_callback(callback)

    def _start_scheduler(self) -> None:
        # Not by AnyIO, whose own lines would not be protected from Ctrl-C.
        self._loop._spawner.start(self._run_scheduler)  # noqa: SLF001

    async def _run_scheduler(self) -> None:
        with self.scheduler_scope:
            while True:
                try:
                    await self.driver.run(self)
                except Exception as exc:
                    self.leave_by(exc)  # The scheduler continues, for the clean-ups.

    def run_once(self) -> float:
        before = self._outside = self._enter()
        self._running = True
        try:
            return self._run_once()
        finally:
            self._running = False
            self._leave(before)

    def _run_once(self) -> float:
        try:
            return super().run_once()
        except BaseException as exc:  # What a protocol's callback raises to leave, or a failure of the poller.
            self.leave_by(exc)
            return -inf

    # Errors

    def leaves(self, exc: BaseException | None) -> bool:
        return isinstance(exc, (KeyboardInterrupt, SystemExit))

    def leave_by(self, exc: BaseException) -> None:
        """End the block of the event loop, and raise `exc` then."""
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
            traceback = callback._source_traceback  # noqa: SLF001  # asyncio's loops do so, too
            if traceback:
                context["source_traceback"] = traceback
        self._loop.call_exception_handler(context)

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

    # What a group does in another way

    def callback_context(self) -> CallbackContext:
        return LoopCallbackContext(self)

    def context_for(self, callback: object, given: Context | None) -> Context:
        return copy_context() if given is None else given
