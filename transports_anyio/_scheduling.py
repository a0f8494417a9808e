"""Callbacks in order and in time.

Holds: the handles of callbacks, and the timers by the time at which they are due.
May know: nothing but the callbacks; clocks and turns are the group's.
"""

from __future__ import annotations

import contextvars
import heapq
from collections.abc import Callable
from math import inf
from reprlib import repr as short_repr  # Bounded, and never raises: callbacks and arguments are the user's.
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from ._callbacks import GivenContext

#: Where a callback runs.
Context: TypeAlias = "contextvars.Context | GivenContext"


class Handle:
    """A callback that a group will run in its next turn; as `asyncio.Handle`.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#callback-handles
    """

    __slots__ = ("__weakref__", "_args", "_callback", "_context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        # `None` once cancelled: what a callback holds must not live until its time would have come.
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._context = context

    def cancel(self) -> None:
        """Do not run the callback. Does nothing when it has run, or was cancelled before."""
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
        """Run the callback in its context, unless it was cancelled; what it raises is the caller's to report."""
        args = self._args  # First: another thread that cancels takes the callback away before them.
        callback = self._callback
        if callback is not None:
            self._context.run(callback, *args)

    def _describe(self) -> str:
        if self._callback is None:
            return "cancelled"
        try:
            name = self._callback.__qualname__
        except Exception:  # It has none, or is a stand-in for something that cannot be had now.
            name = short_repr(self._callback)
        return f"{name}({', '.join(map(short_repr, self._args))})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._describe()}>"


class ThreadSafeHandle(Handle):
    """A callback that another thread may cancel: when `cancel` returns, it has run to its end, or will never run."""

    __slots__ = ("_lock",)

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        super().__init__(callback, args, context)
        self._lock = RLock()  # The callback itself may cancel it.

    def cancel(self) -> None:
        """Do not run the callback; wait for its end when it runs in another thread at the moment."""
        with self._lock:
            super().cancel()

    def __call__(self) -> None:
        with self._lock:
            super().__call__()


#: When it is due, the how-manieth it was, and the timer: `None` once that was cancelled.
Entry = list[Any]

# Cancelled timers stay in the heap until they come up or until they are both this many and the greater part of it:
# every timer is then removed at most once for each time it was pushed, which keeps a re-armed time-out logarithmic.
CANCELLED_TO_REMOVE = 100


class Timers:
    """Timers by time, then by submission."""

    __slots__ = ("_cancelled", "_first_cancelled", "_submitted", "heap")

    def __init__(self, first_cancelled: Callable[[], None]) -> None:
        """`first_cancelled` is called when the timer that would have been due first has been cancelled."""
        self._first_cancelled = first_cancelled
        self.heap: list[Entry] = []
        self._submitted = 0
        self._cancelled = 0

    def __len__(self) -> int:
        """How many timers are pending."""
        return len(self.heap) - self._cancelled

    def push(self, when: float, handle: Callable[[], object]) -> Entry:
        """Add `handle`, and return what `cancel` takes."""
        self._submitted += 1
        entry = [when, self._submitted, handle]
        heapq.heappush(self.heap, entry)
        return entry

    def cancel(self, entry: Entry) -> None:
        if entry[2] is None:
            return  # It has run, or was cancelled before.
        entry[2] = None
        self._cancelled += 1
        first = entry is self.heap[0]
        if self._cancelled > CANCELLED_TO_REMOVE and self._cancelled * 2 > len(self.heap):
            self.heap = [entry for entry in self.heap if entry[2] is not None]
            heapq.heapify(self.heap)
            self._cancelled = 0
        if first:
            self._first_cancelled()

    def next_deadline(self) -> float:
        """The time of the first pending timer, infinity if there is none."""
        heap = self.heap
        while heap and heap[0][2] is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        return cast("float", heap[0][0]) if heap else inf

    def take_due(self, now: float) -> list[Callable[[], object]]:
        """Take out every timer that is due at `now`."""
        due = []
        while self.next_deadline() <= now:
            entry = heapq.heappop(self.heap)
            due.append(entry[2])
            entry[2] = None
        return due

    def clear(self) -> None:
        for entry in self.heap:
            entry[2] = None  # Nothing that a handle could still cancel.
        self.heap.clear()
        self._cancelled = 0


class TimerHandle(Handle):
    """A callback that a group will run at a time; as `asyncio.TimerHandle`."""

    __slots__ = ("_entry", "_timers")

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context, timers: Timers
    ) -> None:
        # Not through the base's: servers make and cancel one of these for every message.
        self._callback = callback
        self._args = args
        self._context = context
        self._timers = timers
        self._entry = timers.push(when, self)

    def when(self) -> float:
        """The time at which the callback is due, in seconds of `TransportGroup.time`."""
        return cast("float", self._entry[0])

    def cancel(self) -> None:
        """Do not run the callback. Does nothing when it has run, or was cancelled before."""
        self._callback = None
        self._args = ()
        self._timers.cancel(self._entry)

    # As asyncio: by time; equal are two of the same time that do the same.

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
