"""What every channel on a descriptor of ours has: its interest in the group's poller."""

from __future__ import annotations

from collections.abc import Callable

from .._poller import READ, WRITE, Poller


class Polled:
    """A descriptor in the poller, with two callbacks."""

    __slots__ = ("_descriptor", "_interest", "_poller", "_read_ready", "_write_ready")

    def __init__(self, poller: Poller, descriptor: int) -> None:
        self._poller = poller
        self._descriptor = descriptor
        self._interest = 0

    def open(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    def _ready(self, mask: int) -> None:
        # The interest is looked at again for each half: a callback of this batch may have changed it.
        if mask & self._interest & READ:
            self._read_ready()
        if mask & self._interest & WRITE:
            self._write_ready()

    def _set_interest(self, interest: int) -> None:
        before = self._interest
        if interest != before:
            self._poller.set_interest(self._descriptor, before, interest, self._ready)
            self._interest = interest

    def set_reading(self, reading: bool) -> None:
        self._set_interest(self._interest | READ if reading else self._interest & ~READ)

    def set_writing(self, writing: bool) -> None:
        self._set_interest(self._interest | WRITE if writing else self._interest & ~WRITE)
