"""A child process that AnyIO has started.

Holds: how its end is noticed, and how it is signalled and reaped.
May know: `_child`, `_clock`, `_exit_status`, `_errors`, `_waiters`, `anyio`, `signal`.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Callable
from math import inf
from typing import cast

import anyio
import anyio.abc
import anyio.lowlevel

from .._clock import Clock
from .._errors import logger
from .._waiters import InterruptSafeEvent
from ._child import KILLED, STILL_RUNNING, TIME_TO_END, Child, Exited
from ._exit_status import UNKNOWN_STATUS, is_child, poll_exit_status

# How long, in seconds, a backend may take to notice the end of a child that is already reaped.
TIME_TO_NOTICE = 1.0


class AnyIOChild(Child):
    """A child that `anyio.open_process` has started, or any other AnyIO process."""

    def __init__(self, process: anyio.abc.Process, clock: Clock) -> None:
        self._clock = clock  # The clock of the backend, not of an event loop on it.
        self.process = process
        self.pid = process.pid
        self._process = process
        self._exited: Exited | None = None
        self.needs_task = True
        self._waiting: anyio.CancelScope | None = None  # Created by the task it surrounds.
        self._deadline = inf  # Of `_waiting`.
        self._close_requested = InterruptSafeEvent()
        # A user's own class may stand for a process that is not a child of this process.
        self._is_ours = is_child(self.pid)

    def watch(self, exited: Exited) -> None:
        self._exited = exited

    async def run(self, report: Callable[[Exception], None]) -> None:
        # Shielded, so that the process is reaped even after a cancellation.
        with anyio.CancelScope(shield=True, deadline=self._deadline) as self._waiting:
            await self._process.wait()
            self._waiting.deadline = inf
            self.returncode = self._process.returncode
            if self._exited is not None:
                assert self.returncode is not None
                self._exited(self.returncode)
            await self._close_requested.wait()
            # On asyncio only this closes the file descriptor of an output that a grandchild holds; the event loop does
            # so in a later iteration, hence the checkpoint.
            try:
                await self._process.aclose()
            except Exception as exc:  # Of a user's own class.
                report(exc)
            await anyio.lowlevel.checkpoint()
        if self._waiting.deadline != inf and self._status() is None:
            logger.warning(STILL_RUNNING, self.pid, TIME_TO_END)

    def close(self) -> None:
        self._close_requested.set()

    def has_ended(self) -> bool:
        return self._status() is not None

    def _status(self) -> int | None:
        if self._process.returncode is None and self._is_ours:
            try:
                return poll_exit_status(self.pid)  # The backend may not have noticed its end yet.
            except ChildProcessError:
                # A thread of the backend has reaped it, and the backend has not noticed yet (asyncio before 3.12).
                return UNKNOWN_STATUS
        return self._process.returncode

    def send_signal(self, signal: int) -> None:
        # Any number, as in asyncio: 0 and the real-time signals are not members of the enumeration.
        self._process.send_signal(cast("signals.Signals", signal))

    def kill(self) -> None:
        self._process.kill()

    def kill_and_reap(self) -> int | None:
        self._exited = None
        status = self._status()
        if status is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass  # It has ended; the task is about to notice.
            except PermissionError:
                self._end_at(-inf)
                return None
            self._end_at(self._clock.time() + TIME_TO_END)
            status = KILLED  # The task reaps it. No other status is possible.
        elif self._process.returncode is None and not is_child(self.pid):
            # A thread of the backend has reaped it, and the backend is about to notice (asyncio before 3.12). Or other
            # code has reaped it, which the backend may never notice (uvloop).
            self._end_at(self._clock.time() + TIME_TO_NOTICE)
        return status

    def _end_at(self, deadline: float) -> None:
        self._deadline = deadline
        if self._waiting is not None:
            self._waiting.deadline = deadline
