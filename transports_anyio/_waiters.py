"""Tasks that wait for a change.

Holds: a condition without a lock, an event, and the outcome of an operation that ends in a callback.
May know: `anyio`.
"""

from __future__ import annotations

import anyio
import anyio.lowlevel

# Each task waits for an event of its own, which it removes when it leaves. If all waited for the same event, a
# `KeyboardInterrupt` at the beginning of a wait would leave the task in trio's list for that event, and setting the
# event would then break trio (`trio.Event.wait` is not protected against it).


class Waiters:
    """Tasks that wait for the next `notify`. A task that comes later waits for the one after it."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: set[anyio.Event] = set()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        event = anyio.Event()
        self._events.add(event)
        try:
            await event.wait()
        finally:
            self._events.discard(event)

    def notify(self) -> None:
        """Wake every task that waits."""
        for event in self._events:
            event.set()
        self._events.clear()


class InterruptSafeEvent:
    """An event like `anyio.Event`, for a task that Ctrl-C may interrupt while it waits."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters = Waiters()

    def set(self) -> None:
        """Set the event, and wake every task that waits for it."""
        self._is_set = True
        self._waiters.notify()

    async def wait(self) -> None:
        """Wait until the event is set."""
        if self._is_set:
            await anyio.lowlevel.checkpoint()
        else:
            await self._waiters.wait()


class Outcome:
    """The end of an operation that ends in a callback: `set` is the callback, a task waits in `wait`."""

    __slots__ = ("_event", "_exception")

    def __init__(self) -> None:
        self._event = InterruptSafeEvent()
        self._exception: Exception | None = None

    def set(self, exc: Exception | None) -> None:
        """End the wait, which raises `exc` unless it is `None`."""
        self._exception = exc
        self._event.set()

    async def wait(self) -> None:
        """Wait for the end of the operation. Raises its exception."""
        await self._event.wait()
        exc, self._exception = self._exception, None
        try:
            if exc is not None:
                raise exc
        finally:
            del exc  # Break a cycle: its traceback has this frame.
