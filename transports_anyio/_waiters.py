"""Tasks that wait for news.

May know: AnyIO's events.
"""

from __future__ import annotations

import anyio
import anyio.lowlevel

# Each task waits for an event of its own and takes it along when it leaves. With one event for all, a
# `KeyboardInterrupt` at the beginning of a wait would leave the task on trio's list for that event, and to set the
# event would then break trio (`trio.Event.wait` is not protected against it).


class Waiters:
    """Whoever waits for something to change. There is no memory: only a task that waits hears of it."""

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
    """As `anyio.Event`, for a task that may be interrupted in its wait."""

    __slots__ = ("_is_set", "_waiters")

    def __init__(self) -> None:
        self._is_set = False
        self._waiters = Waiters()

    def set(self) -> None:
        self._is_set = True
        self._waiters.notify()

    async def wait(self) -> None:
        if self._is_set:
            await anyio.lowlevel.checkpoint()
        else:
            await self._waiters.wait()
