"""Signals while an event loop runs in the main thread, Ctrl-C above all.

The system may interrupt the thread in which trio waits, and Python's handlers run in the main thread: a byte to the
event loop's own wake-up socket ends the wait there (`signal.set_wakeup_fd`).

Python calls the handler of SIGINT between any two lines, and most handlers raise `KeyboardInterrupt`: asyncio.Runner's
at the second Ctrl-C, Python's own at the first. Raised between two lines of ours, or of trio's, it would leave them
half done. So it is the handler's turn there only when the next callback would have run.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._pausing import PausingCore

#: Their lines must not be interrupted.
PROTECTED = {"transports_anyio", "trio"}
#: The lines of these count as those of the code that has called them: the standard library, AnyIO, and what trio uses.
#: Methods that `attrs` makes have no module.
TRANSPARENT: set[object] = {
    *(sys.stdlib_module_names - {"__main__"}),
    *("anyio", "attr", "attrs", "exceptiongroup", "outcome", "sniffio", "sortedcontainers", ""),
}


def in_user_code(frame: FrameType | None) -> bool:
    """Whether the line that runs is the user's, or has been called by one."""
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in TRANSPARENT:
            return package not in PROTECTED
        frame = frame.f_back
    return False


class Interrupts:
    """Lets signals wake the event loop, and the handler of SIGINT run in the user's code or between two callbacks."""

    _handler: Callable[[int, FrameType | None], Any]

    def __init__(self, core: PausingCore, wakeup_fd: int) -> None:
        self._core = core
        self._fd = wakeup_fd
        self._pending = False
        self._active = False

    def __enter__(self) -> None:
        self._main_thread = threading.current_thread() is threading.main_thread()
        if self._main_thread:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):  # Neither the system's action nor one that was not set by Python.
                self._handler = handler
                self._active = True
                signal.signal(signal.SIGINT, self._received)
            # After it, because the handler before may raise: then `__exit__` would not restore this.
            self._fd_before = signal.set_wakeup_fd(self._fd, warn_on_full_buffer=False)

    def __exit__(self, *_: object) -> None:
        if self._main_thread:
            fd = signal.set_wakeup_fd(self._fd_before)
            if fd != self._fd:  # Another one that was set in the meantime stays.
                signal.set_wakeup_fd(fd)
        if self._active:
            self._active = False
            handler = signal.signal(signal.SIGINT, self._handler)
            if handler != self._received:  # Another one that was set in the meantime stays.
                signal.signal(signal.SIGINT, handler)
            self._deliver()

    def _received(self, _: int, frame: FrameType | None) -> None:
        self._pending = True  # Several become one, as everywhere between two lines.
        if in_user_code(frame):
            self._deliver(frame)
        elif self._active:
            self._core.ready.append(self._deliver)
            self._core.driver.wake_threadsafe()

    def _deliver(self, frame: FrameType | None = None) -> None:
        if self._pending:
            self._pending = False
            self._handler(signal.SIGINT, frame)
