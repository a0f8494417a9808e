"""Callbacks in order and in time.

Holds: the queue of what runs in the group's next turn, and the timers.
May know: the clock. Knows nothing of transports.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from contextvars import Context
from math import inf
from typing import Any


class Handle:
    """A callback that a group will run in its next turn; as `asyncio.Handle`."""

    __slots__ = ("_args", "_callback", "_cancelled", "_context")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args: tuple[Any, ...] = args
        self._context = context
        self._cancelled = False

    def cancel(self) -> None:
        """Do not run the callback. Does nothing when it has run, or was cancelled before."""
        self._cancelled = True
        # What the callback holds must not live until its time would have come.
        self._callback = None
        self._args = ()

    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def run(self) -> None:
        """Call the callback in its context; whatever it raises is the caller's to report."""
        if self._callback is not None:
            self._context.run(self._callback, *self._args)

    def _describe(self) -> str:
        if self._cancelled:
            return "cancelled"
        name = getattr(self._callback, "__qualname__", None) or repr(self._callback)
        return f"{name}({', '.join(map(repr, self._args))})"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._describe()}>"


class TimerHandle(Handle):
    """A callback that a group will run at a time; as `asyncio.TimerHandle`."""

    __slots__ = ("_scheduled", "_timers", "_when")

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
        timers: Timers,
    ) -> None:
        super().__init__(callback, args, context)
        self._when = when
        self._timers = timers
        self._scheduled = True

    def when(self) -> float:
        """The time at which the callback is due, in seconds of `TransportGroup.time`."""
        return self._when

    def cancel(self) -> None:
        """Do not run the callback. Does nothing when it has run, or was cancelled before."""
        if not self._cancelled:
            super().cancel()
            if self._scheduled:
                self._timers.note_cancelled()

    def unschedule(self) -> None:
        """Take note that the timers have let go of the handle."""
        self._scheduled = False

    def _describe(self) -> str:
        return f"when={self._when:.3f} {super()._describe()}"


# Cancelled timers stay in the heap until they come up or until they are both this many and the greater part of it:
# every timer is then removed at most once for each time it was pushed, which keeps a re-armed time-out logarithmic.
CANCELLED_TO_REMOVE = 100


class Timers:
    """Timers by time, then by submission."""

    __slots__ = ("_cancelled", "_heap", "_submitted")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TimerHandle]] = []
        self._submitted = 0
        self._cancelled = 0

    def __len__(self) -> int:
        """How many timers are pending."""
        return len(self._heap) - self._cancelled

    def push(self, handle: TimerHandle) -> None:
        self._submitted += 1
        heapq.heappush(self._heap, (handle.when(), self._submitted, handle))

    def note_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > CANCELLED_TO_REMOVE and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[2].cancelled()]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next_deadline(self) -> float:
        """The time of the first pending timer, infinity if there is none."""
        heap = self._heap
        while heap and heap[0][2].cancelled():
            heapq.heappop(heap)[2].unschedule()
            self._cancelled -= 1
        return heap[0][0] if heap else inf

    def take_due(self, now: float, into: deque[Handle]) -> None:
        """Move every timer that is due at `now` to the queue `into`."""
        while self.next_deadline() <= now:
            handle = heapq.heappop(self._heap)[2]
            handle.unschedule()
            into.append(handle)

    def clear(self) -> None:
        self._heap.clear()
        self._cancelled = 0
