"""The inside of an event loop that runs only while it is called, and pauses between the calls.

Holds: when trio runs for it. Transports, servers, callbacks and timers are our own, and need no trio as long as there
are no trio tasks: the thread itself waits for the selector. So a trio run begins with the first call of backend code,
and ends with the call of the event loop. Only if trio tasks are under way then does it stay, and pause like the event
loop. Where a selector cannot be waited for (Windows), trio's tasks wait for each file descriptor, from the first wait
on.
"""

# The event loop's own modules know what it hides from users.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import sys
import warnings
from asyncio import _get_running_loop
from collections.abc import Callable, Coroutine
from math import inf
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from .._core import LAST_ITERATIONS
from .._driver import TaskDriver
from .._selector import SystemSelector
from ._core import LoopCore, nothing_is_ready
from ._interrupts import Interrupts
from ._sides import library

if TYPE_CHECKING:
    from .._poller import Poller
    from ._factory import EventLoop

T = TypeVar("T")


class Silent(asyncio.Protocol):
    """Stands in for the protocols of transports that end after their event loop: sockets, pipes, children."""

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        pass

    def process_exited(self) -> None:
        pass


#: The running event loop, sniffio's name and the hooks for asynchronous generators during a pause.
OUTSIDE = (None, None, (None, None))


def never() -> bool:
    return False


class Calls:
    """What is known of the calls of an event loop, and of the trio run. In an object of its own: see `Core`."""

    __slots__ = ("guest", "interrupts", "kept", "new_scope", "paused", "serving", "spawner", "stopping", "was_waiting")

    interrupts: Interrupts

    def __init__(self, guest: Any, spawner: Any, new_scope: Callable[[], Any]) -> None:
        self.guest = guest
        self.spawner = spawner
        self.new_scope = new_scope
        self.paused = True
        self.stopping = False  # The pause comes after this iteration.
        self.serving = False  # The trio run takes tasks.
        self.kept = False  # The trio run stays during the pause.
        self.was_waiting = False  # The driver, when trio last went on.

    def need_trio(self) -> bool:
        """Whether trio tasks are under way."""
        tasks: int = self.spawner.tasks
        return tasks > 1  # One runs the scheduler.


class PausingCore(LoopCore):
    """What an event loop owns, and when its iterations run."""

    _loop: EventLoop

    def __init__(self, loop: EventLoop) -> None:
        super().__init__(loop)
        self.end_block = self.stop
        self._outside = OUTSIDE
        trio = loop._trio
        self.calls = Calls(trio.Guest(), loop._spawner, trio.Scope)

    def open_poller(self, poller: Poller) -> None:
        super().open_poller(poller)
        assert isinstance(poller.driver, TaskDriver)
        self.calls.interrupts = Interrupts(self, poller.driver.wakeup_fd)

    # Running and pausing

    def stop(self) -> None:
        """Pause after this iteration, or the next one if none is under way."""
        self.calls.stopping = True
        self.tasks_started = True  # So that nothing more belongs to this iteration.
        self.driver.wake()

    def run(self) -> None:
        """Run iterations until `stop`; then raise what a callback has raised to leave."""
        self.calls.guest.check()
        self.thread = get_ident()
        self._loop._track_origins(self._loop.get_debug())
        try:
            with self.calls.interrupts:
                self._run()
                if self.leaving is not None:
                    raise self.leaving
        finally:
            self._loop._track_origins(False)
            self.thread = 0
            self.leaving = None  # Also if something else leaves: Ctrl-C, when `interrupts` ends.

    def _run(self) -> None:
        calls = self.calls
        guest = calls.guest
        calls.paused = calls.kept = False
        if calls.stopping:  # Since before: it is for the first iteration.
            self.ready.appendleft(self.stop)
        try:
            self._run_without_trio()
            if not calls.paused:
                if not guest.thread:
                    guest.start(self._serve)
                elif calls.was_waiting:
                    calls.was_waiting = False
                    self._go_on_waiting()
                guest.run(lambda: calls.kept)
        finally:
            calls.paused = True
            calls.stopping = False
            self._rest()

    def _run_without_trio(self) -> None:
        """Run iterations until the pause, or until trio runs, or has to run."""
        calls = self.calls
        guest = calls.guest
        selector = self.poller.selector
        if not isinstance(selector, SystemSelector):
            self.run_once()  # Perhaps there is nothing to wait for.
            return
        if self.dispatch is nothing_is_ready and not guest.thread:
            selector.reopen()  # Raises if there is still no file descriptor for it.
            self.dispatch = selector.dispatch
        deadline = -inf
        while True:
            try:
                if deadline != -inf and not selector.always_ready:
                    selector.block(None if deadline == inf else max(deadline - self.clock.time(), 0))
                deadline = self.run_once()
            except Exception as exc:  # The selector has failed. A last iteration does without it.
                self.leave_by(exc)
                self.dispatch = nothing_is_ready
                deadline = -inf
            if calls.paused or guest.thread:
                return
            guest.check_thread()

    def _rest(self) -> None:
        """End the trio run, unless it is needed, or leave it alone from now on."""
        calls = self.calls
        if calls.serving and not calls.need_trio():
            self.end_trio()
        self._outside_trio()
        self._outside = OUTSIDE  # Keeps no hooks of trio's: see `Guest.hooks`.

    def _outside_trio(self) -> None:
        """Remember whether the driver waits: until trio goes on, there is nothing to wake, and no deadline to move."""
        calls = self.calls
        driver = self.driver
        calls.was_waiting = calls.guest.thread != 0 and (calls.was_waiting or driver.waiting or driver.in_wait)
        driver.waiting = False

    def _pause_if_stopping(self) -> None:
        calls = self.calls
        if calls.stopping and not calls.paused:
            calls.paused = True
            if calls.serving and not calls.need_trio():
                calls.spawner.end()  # At once, so that trio does not begin to wait.
            else:
                calls.kept = True

    def run_once(self) -> float:
        if self.calls.paused or self._running:  # During a pause, or a callback that needs trio, trio runs without us.
            return inf
        deadline = super().run_once()
        if self.calls.stopping:
            self._pause_if_stopping()
        return deadline

    def _run_on(self) -> None:
        calls = self.calls
        if not calls.paused:
            if self.ready:
                self._run_ready()
                if self.ready and not calls.stopping:
                    self._run_iteration()
            self._pause_if_stopping()

    def abandon(self) -> None:
        """Close servers and abort transports at once, with a warning for each. No code of the user's is called."""
        for transport in tuple(self.transports):
            if isinstance(transport, asyncio.BaseTransport):
                warnings.warn(f"unclosed transport {transport!r}", ResourceWarning, source=transport, stacklevel=3)
                transport.set_protocol(Silent())
        self.abort_transports()
        for _ in range(LAST_ITERATIONS):
            callbacks: list[Any] = list(self.ready)
            self.ready.clear()
            for callback in callbacks:
                if not isinstance(callback, asyncio.Handle):  # Ours: what closes the descriptors.
                    self._run_callback(callback)
            if not self.ready:
                break

    # The trio run

    def start_internal_task(self, async_function: Callable[[], Coroutine[Any, Any, None]], name: object = None) -> None:
        self.need_trio()
        super().start_internal_task(async_function, name)

    async def _serve(self) -> None:
        try:
            await self.calls.spawner.serve(self._begin_serving)
        finally:
            self.calls.serving = False

    def _begin_serving(self, tasks: Any) -> None:
        self.task_group = tasks
        self.scheduler_scope = self.calls.new_scope()
        self._start_scheduler()
        self.calls.serving = True

    def end_trio(self) -> None:
        """Cancel the tasks of the trio run, if there is one, and wait for their end. No callback of asyncio's runs."""
        self.calls.guest.check()
        if self.calls.guest.thread:
            self.calls.spawner.end()
            self._inside_trio(never)

    def need_trio(self) -> None:
        """Let trio take tasks: it may not run yet."""
        if not self.calls.serving:
            self._inside_trio(lambda: self.calls.serving)

    def _inside_trio(self, until: Callable[[], object]) -> None:
        """Let trio run, with no event loop set as running, until `until` is true or the run has ended."""
        guest = self.calls.guest
        guest.check()
        before = (_get_running_loop(), library.name, sys.get_asyncgen_hooks())
        outside = self._outside
        self._leave((None, None, before[2]))
        try:
            if not guest.thread:
                guest.start(self._serve)
            self._outside = (None, "trio", guest.hooks)
            guest.run(until)
        finally:
            self._outside_trio()
            self._outside = outside
            self._leave(before)

    def as_backend(self, function: Callable[..., T], *args: Any) -> T:
        if self.calls.guest.inside:
            return super().as_backend(function, *args)
        # Between two iterations of trio, where there is no task: in one of its own.
        self.need_trio()
        results: list[T] = []
        failures: list[BaseException] = []

        async def run() -> None:
            try:
                results.append(function(*args))
            except BaseException as exc:
                failures.append(exc)

        self.calls.spawner.start(run)
        self._inside_trio(lambda: results or failures)
        if self.calls.paused:
            self._rest()
        if failures:
            try:
                raise failures[0]
            finally:
                failures.clear()  # Its traceback has this frame: no cycle.
        return results[0]
