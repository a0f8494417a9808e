"""A child process, as its transport sees it.

Holds: the interface of a child, and the times and return codes that every kind of child uses.
May know: nothing.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

# The return code of a killed child: minus SIGKILL, or what `Popen.kill` has Windows set.
KILLED = 1 if sys.platform == "win32" else -9

# How long, in seconds, a killed child may take to end. Most take less than a millisecond, but there is no bound: a
# system call may hang in a driver, a tracer may be stopped.
TIME_TO_END = 5.0

STILL_RUNNING = "process %s was killed but still runs after %s seconds: the system will reap it"

Exited = Callable[[int], None]


class Child(ABC):
    """A child process. Its end is reported once, and it is reaped then, so its PID is valid until its end is known."""

    pid: int
    #: The object that users know: `subprocess.Popen`, or AnyIO's process.
    process: Any
    returncode: int | None = None

    #: Whether `exited` is called only while `run` runs in a task; valid after `watch`.
    needs_task: bool

    @abstractmethod
    def watch(self, exited: Exited) -> None:
        """Call `exited` with the return code, negative for a signal, when the child has ended."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether the child has ended, even if `exited` has not been called yet."""

    @abstractmethod
    def send_signal(self, signal: int) -> None:
        """Send a signal. Call this only while `has_ended` is false."""

    @abstractmethod
    def kill(self) -> None:
        """Kill the child in the way of the platform. Call this only while `has_ended` is false."""

    @abstractmethod
    def kill_and_reap(self) -> int | None:
        """Kill the child and return its return code; `exited` is not called any more.

        A task reaps the child; the group waits for it, at most `TIME_TO_END`. Returns `None` if we may not kill the
        child because it runs as another user.
        """

    @abstractmethod
    async def run(self, report: Callable[[Exception], None]) -> None:
        """Wait for the end of the child, and `report` errors of closing it."""

    def close(self) -> None:  # noqa: B027  # some kinds of child have nothing to release
        """Release all resources; called after `connection_lost`."""
