"""Handles and timers.

Holds: the handles of callbacks, and a heap of timers.
May know: `_callbacks`.
"""

from __future__ import annotations

import contextvars
import heapq
from collections.abc import Callable
from math import inf
from reprlib import repr as short_repr  # Short, and never raises, whatever the user's objects do.
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from ._callbacks import GivenContext

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


#: `[deadline, sequence number, handle]`; the handle is `None` once run or cancelled.
Entry = list[Any]

# Cancelled timers stay in the heap until they are due, or until there are more than this, and more than half of all.
# So removing them costs each timer at most one step, and setting a time-out again stays logarithmic.
CANCELLED_TO_REMOVE = 100


class Timers:
    """Timers in the order of their deadlines, and of their making for equal ones."""

    __slots__ = ("_cancelled", "_first_cancelled", "_submitted", "heap")

    def __init__(self, first_cancelled: Callable[[], None]) -> None:
        """`first_cancelled` is called when the timer with the earliest deadline is cancelled."""
        self._first_cancelled = first_cancelled
        self.heap: list[Entry] = []
        self._submitted = 0
        self._cancelled = 0

    def __len__(self) -> int:
        """Return how many timers are pending."""
        return len(self.heap) - self._cancelled

    def push(self, when: float, handle: Callable[[], object]) -> Entry:
        """Add `handle`, and return its entry, for `cancel`."""
        self._submitted += 1
        entry = [when, self._submitted, handle]
        heapq.heappush(self.heap, entry)
        return entry

    def cancel(self, entry: Entry) -> None:
        """Cancel a timer. Does nothing if it has run or was cancelled already."""
        if entry[2] is None:
            return
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
        """Return the deadline of the first pending timer, or infinity without one."""
        heap = self.heap
        while heap and heap[0][2] is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        return cast("float", heap[0][0]) if heap else inf

    def take_due(self, now: float) -> list[Callable[[], object]]:
        """Remove and return the timers that are due at `now`."""
        due = []
        while self.next_deadline() <= now:
            entry = heapq.heappop(self.heap)
            due.append(entry[2])
            entry[2] = None
        return due

    def clear(self) -> None:
        """Remove all timers."""
        for entry in self.heap:
            entry[2] = None  # `cancel` of its handle does nothing any more.
        self.heap.clear()
        self._cancelled = 0


class TimerHandle(Handle):
    """A callback that a group runs at a given time, like `asyncio.TimerHandle`."""

    __slots__ = ("_entry", "_timers")

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context, timers: Timers
    ) -> None:
        # Without `super()`, for speed: servers make and cancel a timer for every message.
        self._callback = callback
        self._args = args
        self._context = context
        self._timers = timers
        self._entry = timers.push(when, self)

    def when(self) -> float:
        """Return the time at which the callback is due, in seconds of `TransportGroup.time`."""
        return cast("float", self._entry[0])

    def cancel(self) -> None:
        """Cancel the callback. Does nothing if it has run or was cancelled already."""
        self._callback = None
        self._args = ()
        self._timers.cancel(self._entry)

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
