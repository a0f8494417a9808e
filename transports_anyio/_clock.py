"""The time: what timers go by, and how long something takes.

Holds: the contract of clocks, the clock of a backend, and a clock that nothing stops.
May know: nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

# How long something takes. Not `time.monotonic` itself: freezegun finds that in every module, and lets it stand still.
monotonic = partial(time.monotonic)


class Clock(Protocol):
    """What has the time, in seconds: an event loop, or `BackendClock`.

    `time` is looked up for each call. Code that replaces `loop.time`, a test for example, expects that timers go by it.
    """

    def time(self) -> float: ...


class BackendClock:
    """The clock of a backend that has no event loop."""

    def __init__(self, time: Callable[[], float]) -> None:
        self.time: Callable[[], float] = time
