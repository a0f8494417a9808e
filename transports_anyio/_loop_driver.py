"""The driver where an asyncio event loop runs: asyncio's own or uvloop.

Holds: a driver that runs the iterations in callbacks of the event loop.
May know: `asyncio`, `anyio`, `sniffio`, `socket`, `_driver`, `_selector`, `_waiters`.

A wait through AnyIO adds our selector to the loop's selector, removes it again, and switches tasks, for every batch.
With one request at a time, that costs more than everything else together. So the selector stays registered in the
loop, and the loop's own callback runs the iteration.
"""

from __future__ import annotations

import asyncio
import socket
from math import inf
from typing import Any

import anyio

from ._driver import RESOLUTION, ROUNDS_OF_FIRST_STEPS, DrivenScheduler, Driver
from ._selector import SystemSelector
from ._waiters import wake_future

# AnyIO asks sniffio which backend runs, if it is installed (trio brings it). sniffio recognizes asyncio by the current
# task, and callbacks of the loop have none, so iterations name the backend here.
running: Any
try:
    from sniffio import thread_local as running
except ImportError:
    running = None  # AnyIO looks for a running loop.

# How long to wait, in seconds, for the rest of a time that the loop has cut short: uvloop rounds to milliseconds.
ROUNDED_OFF = 0.001


class LoopDriver(Driver):
    """Keeps the selector registered in the running event loop, and runs iterations in the loop's callbacks."""

    def __init__(self, selector: SystemSelector, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._selector = selector
        self._fd = selector.fileno()
        self._loop = loop
        self._scheduler: DrivenScheduler | None = None
        self._timer: asyncio.TimerHandle | None = None
        # The loop's timer is set for `deadline`, but while it is being moved.
        self._moving = False
        self._scheduled = False
        self._rounds_for_first_steps = 0
        self._wake_sent = False
        self._failure: BaseException | None = None
        self._stopped = anyio.Event()

    async def run(self, scheduler: DrivenScheduler) -> None:
        self._scheduler = scheduler
        self._loop.add_reader(self._fd, self._ready)
        self._run_once()
        try:
            await self._stopped.wait()
        finally:
            self._stop()
        if self._failure is not None:
            raise self._failure

    def _run_once(self) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            return  # Woken before the first iteration, or after the last one.
        self.waiting = False
        try:
            if running is None:
                deadline = scheduler.run_once()
            else:
                before, running.name = running.name, "asyncio"
                try:
                    deadline = scheduler.run_once()
                finally:
                    running.name = before
        except BaseException as exc:
            # `run` raises it, as on every backend, instead of the loop's callback.
            self._failure = exc
            self._stop()
            self._stopped.set()
            return
        if deadline == -inf or self._selector.always_ready:
            self._schedule()
            return
        self.waiting = True
        if deadline < self.deadline:
            self._set_timer(deadline)

    # At most one iteration of ours in each iteration of the loop.

    def _schedule(self) -> None:
        if not self._scheduled:
            self._loop.call_soon(self._scheduled_run)
            self._scheduled = True  # Not before: the call may raise, at the recursion limit for example.
            if self._scheduler is not None:
                self._scheduler.tasks_started = False  # Their first steps come before it.

    def _scheduled_run(self) -> None:
        self._scheduled = False
        scheduler = self._scheduler
        if scheduler is not None and scheduler.tasks_started and self._rounds_for_first_steps < ROUNDS_OF_FIRST_STEPS:
            self._rounds_for_first_steps += 1
            self._schedule()  # Tasks were started since, by another task.
        else:
            self._rounds_for_first_steps = 0
            self._run_once()

    def _ready(self) -> None:
        scheduler = self._scheduler
        if scheduler is not None and scheduler.tasks_started:
            self._schedule()  # uvloop may call a reader before a task that was started earlier.
        elif not self._scheduled:
            self._run_once()

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.deadline = deadline
        self._timer = None if deadline == inf else self._loop.call_at(deadline, self._timer_due)

    def _timer_due(self) -> None:
        now = self._loop.time() + RESOLUTION
        if now < self.deadline:
            # uvloop rounds to milliseconds: a timer for the remainder would fire at once, again and again.
            self._timer = self._loop.call_later(ROUNDED_OFF, self._timer_due)
            return
        self._timer = None
        self.deadline = inf
        if self._scheduled or self._scheduler is None:
            return  # The iteration that is about to come serves the timers, too.
        deadline = self._scheduler.next_deadline()
        if now < deadline:  # The timer was cancelled or moved.
            self._set_timer(deadline)
        elif self._scheduler.tasks_started:
            self._schedule()
        else:
            self._run_once()

    def _stop(self) -> None:
        if self._scheduler is not None:
            self._scheduler = None
            self.waiting = False
            self._loop.remove_reader(self._fd)
            self._set_timer(inf)

    def wait_until(self, deadline: float) -> None:
        # A task may set and cancel many timers in a row: the loop's own timer is moved once for all of them.
        if not self._moving:
            self._loop.call_soon(self._move_timer)
            self._moving = True
        self.deadline = deadline

    def _move_timer(self) -> None:
        self._moving = False
        if self._scheduler is not None:
            self._set_timer(self.deadline)

    def wake(self) -> None:
        if self.waiting:
            self._schedule()
            self.waiting = False

    def wake_threadsafe(self) -> None:
        if self._wake_sent:
            return  # The iteration that an earlier call asked for serves this call, too.
        self._wake_sent = True
        try:
            self._loop.call_soon_threadsafe(self._woken)
        except BaseException:  # `RuntimeError` when the loop is closed.
            self._wake_sent = False
            raise

    def _woken(self) -> None:
        self._wake_sent = False
        self._ready()

    async def wait_writable(self, sock: socket.socket) -> None:
        # AnyIO's function waits for an iteration of the loop first, and costs twice as much.
        writable = self._loop.create_future()
        fd = sock.fileno()
        self._loop.add_writer(fd, wake_future, writable)
        try:
            await writable
        finally:
            self._loop.remove_writer(fd)

    def close(self) -> None:
        """Do nothing: `run` has removed everything from the loop."""
