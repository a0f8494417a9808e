"""Handles and timers.

Holds: the handles of callbacks, and a heap of timers.
May know: `_callbacks`, `_clock`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from reprlib import repr as short_repr  # Short, and never raises, whatever the user's objects do.
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from ._callbacks import GivenContext
    from ._clock import Clock

#: The context that a callback runs in.
Context: TypeAlias = "contextvars.Context | GivenContext"


class Handle:
    """A callback that a group runs in the next iteration, like `asyncio.Handle`.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#callback-handles
    """

    __slots__ = ("__weakref__", "_args", "_callback", "_context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        # `None` once cancelled, so that a cancelled timer does not keep the callback alive until its deadline.
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._context = context

    def cancel(self) -> None:
        """Cancel the callback. Does nothing if it has run or was cancelled already."""
        self._callback = None
        self._args = ()

    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._callback is None

    def get_context(self) -> contextvars.Context:
        """Return the context in which the callback runs."""
        context = self._context
        return context if isinstance(context, contextvars.Context) else context.context

    def __call__(self) -> None:
        """Run the callback in its context, unless it was cancelled. The caller reports what it raises."""
        args = self._args  # Read first: `cancel` in another thread removes the callback before them.
        callback = self._callback
        if callback is not None:
            self._context.run(callback, *args)

    def _describe(self) -> str:
        if self._callback is None:
            return "cancelled"
        try:
            name = self._callback.__qualname__
        except Exception:  # It has no name, or is a proxy that raises.
            name = short_repr(self._callback)
        return f"{name}({', '.join(map(short_repr, self._args))})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._describe()}>"


class ThreadSafeHandle(Handle):
    """A handle that other threads may cancel. Once `cancel` returns, the callback has finished or never runs."""

    __slots__ = ("_lock",)

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        super().__init__(callback, args, context)
        self._lock = RLock()  # Reentrant, because the callback itself may cancel the handle.

    def cancel(self) -> None:
        """Cancel the callback. Waits for its end if it is running in another thread."""
        with self._lock:
            super().cancel()

    def __call__(self) -> None:
        with self._lock:
            super().__call__()


class Timer(Protocol):
    """What the timers need of a handle."""

    _when: float  # The deadline.
    _number: int  # The order among equal deadlines.
    _entry: int  # The number in its entry of the heap, or `ABSENT`, or `TAKEN`.

    def __call__(self) -> object: ...


#: `(deadline, number, handle)`. It counts only while its number is that of the handle's `_entry`.
Entry: TypeAlias = "tuple[float, int, Timer]"

#: Instead of the number of an entry: the timer has run or was cancelled, or it runs in this iteration.
ABSENT, TAKEN = 0, -1

# Entries that do not count stay in the heap until they are due, or until there are more than this, and more than half
# of all. So removing them costs each timer at most one step, and setting a time-out again stays logarithmic.
DEAD_TO_REMOVE = 100


class Timers:
    """Timers in the order of their deadlines, and of their making or moving for equal ones.

    A timer that is moved to a later deadline keeps its entry, which is replaced when it comes up. So the first entry
    has the earliest time at which a timer may be due; `next_deadline` looks for the exact one.
    """

    __slots__ = ("dead", "heap", "number")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self.number: int = 0  # The last one that was given to a timer.
        self.dead: int = 0  # How many entries do not count.

    def __len__(self) -> int:
        """Return how many timers are pending."""
        return len(self.heap) - self.dead

    def push(self, handle: Timer) -> None:
        """Add `handle`, which has its deadline already, behind those with the same one."""
        self.number = handle._number = handle._entry = number = self.number + 1
        heap = self.heap
        try:
            heappush(heap, (handle._when, number, handle))
        except RecursionError:
            # Before Python 3.12 a comparison may raise at the recursion limit. The entry is the last one then. Nothing
            # may be called here: it would raise, too.
            if heap and heap[-1][1] is number:
                del heap[-1]
            handle._entry = ABSENT
            raise

    def cancel(self, handle: Timer) -> None:
        """Remove `handle`. Does nothing if it has run or was cancelled already."""
        number = handle._entry
        handle._entry = ABSENT
        if number > 0:
            self.dead = dead = self.dead + 1
            if dead > DEAD_TO_REMOVE and dead * 2 > len(self.heap):
                self._remove_dead()

    def _remove_dead(self) -> None:
        heap = [entry for entry in self.heap if entry[1] == entry[2]._entry]
        heapify(heap)
        self.heap = heap
        self.dead = 0

    def move(self, handle: Timer, when: float) -> None:
        """Set the deadline of `handle`, which is pending. If this raises, the old one stays."""
        if handle._entry > 0 and when >= handle._when:
            handle._when = when
            self.number = handle._number = self.number + 1
        else:
            before = handle._when, handle._number, handle._entry
            handle._when = when
            try:
                self.push(handle)
            except RecursionError:
                handle._when, handle._number, handle._entry = before
                raise
            if before[2] > 0:
                self.dead = dead = self.dead + 1
                if dead > DEAD_TO_REMOVE and dead * 2 > len(self.heap):
                    self._remove_dead()

    def next_deadline(self) -> float:
        """Return the deadline of the first pending timer, or infinity without one."""
        heap = self.heap
        while heap:
            when, number, handle = heap[0]
            if handle._entry != number:
                heappop(heap)
                self.dead -= 1
            elif handle._number != number:  # It was moved.
                handle._entry = handle._number
                heapreplace(heap, (handle._when, handle._number, handle))
            else:
                return when
        return inf

    def take_due(self, now: float) -> list[Timer]:
        """Remove and return the timers that are due at `now`.

        The caller runs each of them that is still `TAKEN` then, and makes it `ABSENT` before.
        """
        due: list[Timer] = []
        while self.next_deadline() <= now:
            handle = heappop(self.heap)[2]
            handle._entry = TAKEN
            due.append(handle)
        return due

    def clear(self) -> None:
        """Remove all timers."""
        for _, _, handle in self.heap:
            handle._entry = ABSENT
        self.heap.clear()
        self.dead = 0


class TimerScheduler(Protocol):
    """What a timer's handle needs of the scheduler."""

    timers: Timers
    clock: Clock

    def wait_at_most_until(self, when: float) -> None:
        """Do not wait beyond the deadline of a moved timer."""
        ...

    def make_current(self, context: contextvars.Context) -> None:
        """Set the scheduler's group as the current one."""
        ...


class TimerHandle(Handle):
    """A callback that a group runs at a given time, like `asyncio.TimerHandle`."""

    __slots__ = ("_entry", "_number", "_scheduler", "_when")

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
        scheduler: TimerScheduler,
    ) -> None:
        # Without `super()` and `push`, for speed: servers make and cancel a timer for every message.
        self._callback = callback
        self._args = args
        self._context = context
        self._scheduler = scheduler
        self._when = when
        timers = scheduler.timers
        timers.number = self._number = self._entry = number = timers.number + 1
        heap = timers.heap
        try:
            heappush(heap, (when, number, self))
        except RecursionError:  # As in `Timers.push`, of which it is a copy, because a call costs too much here.
            if heap and heap[-1][1] is number:
                del heap[-1]
            self._entry = ABSENT
            raise

    def when(self) -> float:
        """Return the time at which the callback is due, in seconds of `TransportGroup.time`."""
        return self._when

    def __call__(self) -> None:
        context = self._context
        if isinstance(context, contextvars.Context):
            self._scheduler.make_current(context)
        super().__call__()

    def cancel(self) -> None:
        """Cancel the callback. Does nothing if it has run or was cancelled already."""
        self._callback = None
        self._args = ()
        self._scheduler.timers.cancel(self)

    def reschedule(self, delay: float) -> None:
        """Move the timer: the callback is due in `delay` seconds from now, and not at its earlier time.

        It is as if the timer were cancelled and made again, also for the order among timers of the same time, but a
        move to a later time costs much less: an idle time-out can be moved for every message. `when` returns the new
        time at once. Handles are compared and hashed by their time, so do not move one that is in a set.

        Raises `RuntimeError` if the callback has begun to run, or was cancelled, or if its group has ended; `TypeError`
        if `delay` is not a number, and `ValueError` if it is NaN.
        """
        scheduler = self._scheduler
        when = scheduler.clock.time() + delay
        if self._entry > 0 and self._when <= when < inf:  # The usual case of `move`, for speed.
            self._when = when
            timers = scheduler.timers
            timers.number = self._number = timers.number + 1
        else:
            self.reschedule_at(when)

    def reschedule_at(self, when: float) -> None:
        """Move the timer to `when`, in seconds of `TransportGroup.time`; otherwise like `reschedule`."""
        if not -inf <= when <= inf:
            raise ValueError(f"a time was expected, got {when!r}")
        when = float(when)  # `OverflowError` for an integer that is too large.
        if self._entry == ABSENT:
            reason = "was cancelled" if self._callback is None else "has run, or its group has ended"
            raise RuntimeError(f"the timer cannot be moved, because it {reason}: make a new one with call_later()")
        self._scheduler.wait_at_most_until(when)  # First: if it raises, the timer is not moved.
        self._scheduler.timers.move(self, when)

    # As in asyncio: ordered by time; equal if time, callback and arguments are equal.

    def __hash__(self) -> int:
        return hash(self.when())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TimerHandle):
            return NotImplemented
        return (
            self.when() == other.when()
            and self._callback == other._callback
            and self._args == other._args
            and self.cancelled() == other.cancelled()
        )

    def __lt__(self, other: object) -> bool:
        return self.when() < other.when() if isinstance(other, TimerHandle) else NotImplemented

    def __le__(self, other: object) -> bool:
        return self < other or self == other if isinstance(other, TimerHandle) else NotImplemented

    def __gt__(self, other: object) -> bool:
        return self.when() > other.when() if isinstance(other, TimerHandle) else NotImplemented

    def __ge__(self, other: object) -> bool:
        return self > other or self == other if isinstance(other, TimerHandle) else NotImplemented

    def _describe(self) -> str:
        return f"when={self.when():.3f} {super()._describe()}"
