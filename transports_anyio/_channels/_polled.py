"""What every channel with a file descriptor in the poller has.

Holds: the callbacks and the events that a channel waits for.
May know: the poller and selectors.
"""

from __future__ import annotations

from collections.abc import Callable

from .._poller import Poller
from .._selector import BATCHES_WITHOUT_BULK, READ, WRITE, Registration

# What moves much data goes on to do so: the end of a large message may be small, and another one follows.
BULK_TURNS = 4


class Polled(Registration):
    """A file descriptor registered in the poller, with two callbacks."""

    __slots__ = ("_poller",)

    def __init__(self, poller: Poller, fd: int) -> None:
        super().__init__(fd)
        self._poller = poller
        poller.register(self)

    def note_bulk(self) -> None:
        self.bulk_turns = BULK_TURNS
        self._poller.selector.bulk_batches = BATCHES_WITHOUT_BULK

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self.read_ready = read_ready
        self.write_ready = write_ready

    def _set_interest(self, interest: int) -> None:
        if interest != self.interest:
            self._poller.set_interest(self, interest)

    def set_reading(self, reading: bool) -> None:
        self._set_interest(self.interest | READ if reading else self.interest & ~READ)

    def set_writing(self, writing: bool) -> None:
        self._set_interest(self.interest | WRITE if writing else self.interest & ~WRITE)
