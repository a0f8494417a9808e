"""The poller where an asyncio event loop runs, and the choice of a poller.

May know: asyncio's public event loop methods, and sniffio, by which AnyIO is told what runs. No other module knows it.

A wait through AnyIO registers our list in the loop's selector and takes it out again, and switches tasks, for every
batch: with one connection in lock-step that is for every message, and costs more than everything else together. So the
list stays registered in the loop, and the turn is taken in the loop's own callback.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

import anyio

from ._poller import RESOLUTION, ListPoller, Poller, TaskPoller, Turns, WaitingListPoller
from ._selector import Selector, make_selector

try:
    # How AnyIO finds out what runs, where it is installed (trio brings it). It knows asyncio by the current task, and
    # there is none in a callback of the loop, unless `anyio.run` has left word.
    from sniffio import thread_local as running  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    running: Any = None  # type: ignore[no-redef,unused-ignore]  # AnyIO asks for the running loop.

# How long to wait, in seconds, for the rest of a time that a loop has cut short: uvloop rounds to milliseconds.
ROUNDED_OFF = 0.001


class LoopPoller(ListPoller):
    """A list of descriptors that is registered in the running event loop, asyncio's or uvloop's."""

    def __init__(self, selector: Selector, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(selector)
        self._fd = selector.fileno()
        self.time = loop.time
        self._loop = loop
        self._turns: Turns | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = inf  # That of the loop's timer.
        self._wanted = inf
        self._moving = False
        self._scheduled = False
        self._woken = False
        self._failure: BaseException | None = None
        self._stopped = anyio.Event()

    async def run(self, turns: Turns) -> None:
        self._turns = turns
        self._loop.add_reader(self._fd, self._ready)
        self._turn()
        try:
            await self._stopped.wait()
        finally:
            self._stop()
        if self._failure is not None:
            raise self._failure

    def _turn(self) -> None:
        turns = self._turns
        if turns is None:
            return  # A wake-up that comes before the first turn, or after the last.
        self.waiting = False
        try:
            if running is None:
                deadline = turns.turn()
            else:
                before, running.name = running.name, "asyncio"
                try:
                    deadline = turns.turn()
                finally:
                    running.name = before
        except BaseException as exc:
            # Out of the task that awaits `run`, as on every backend, and not out of the loop's callback.
            self._failure = exc
            self._stop()
            self._stopped.set()
            return
        if deadline == -inf or self._selector.always_ready:
            self._schedule()
            return
        self.waiting = True
        self._wanted = deadline
        if deadline != self._deadline:
            self._set_timer(deadline)

    # One turn in each round of the loop, however many reasons there are.

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        self._turn()

    def _ready(self) -> None:
        turns = self._turns
        if turns is not None and turns.tasks_started:
            self._schedule()  # uvloop is quicker to call a reader than a task that has been started before.
        elif not self._scheduled:  # Or else one is about to come.
            self._turn()

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._deadline = deadline
        self._timer = None if deadline == inf else self._loop.call_at(deadline, self._timer_due)

    def _timer_due(self) -> None:
        if self.time() + RESOLUTION < self._deadline:
            # A loop that has rounded this off would also round off what is left, and come back at once, for all of it.
            self._timer = self._loop.call_later(ROUNDED_OFF, self._timer_due)
            return
        self._deadline = inf
        self._timer = None
        self._turn()

    def _stop(self) -> None:
        if self._turns is not None:
            self._turns = None
            self.waiting = False
            self._loop.remove_reader(self._fd)
            self._set_timer(inf)

    def wait_until(self, deadline: float) -> None:
        self._wanted = deadline
        # A task may set and cancel many timers in a row: the loop's own is moved once for all of them.
        if not self._moving:
            self._moving = True
            self._loop.call_soon(self._move_timer)

    def _move_timer(self) -> None:
        self._moving = False
        if self.waiting and self._wanted != self._deadline:
            self._set_timer(self._wanted)

    def wake(self) -> None:
        if self.waiting:
            self.waiting = False
            self._schedule()

    def wake_threadsafe(self) -> None:
        if self._woken:
            return  # By another call, and whatever this one was for will be seen in the same turn.
        self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._woken_turn)
        except BaseException:  # `RuntimeError` when the loop is closed.
            self._woken = False
            raise

    def _woken_turn(self) -> None:
        self._woken = False
        self._ready()


def make_poller() -> Poller:
    """Return the best poller that there is for what runs here."""
    try:
        # A current task, because a loop may also run beside another backend that drives this task (trio's guest mode).
        loop = asyncio.get_running_loop() if asyncio.current_task() is not None else None
    except RuntimeError:
        loop = None
    on_trio = getattr(running, "name", None) == "trio"
    selector = make_selector()
    poller: Poller
    if selector is None:
        poller = TaskPoller()
    elif loop is not None:
        poller = LoopPoller(selector, loop)
    elif on_trio:
        from ._trio import TrioPoller

        poller = TrioPoller(selector)
    else:
        poller = WaitingListPoller(selector)
    if on_trio:
        from ._trio import clock

        poller.time = clock()  # Not AnyIO's: asyncio code that calls means this clock, too.
    poller.loop = loop
    return poller
