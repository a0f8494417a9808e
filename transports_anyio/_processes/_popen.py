"""A child process that `subprocess.Popen` has started.

Holds: how its end is noticed, and how it is signalled and reaped.
May know: `_capabilities`, `_child`, `_exit_status`, `_errors`, `_poller`, `_selector`, `anyio`, `os`, `signal`,
`subprocess`.
"""

from __future__ import annotations

import os
import signal as signals
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import anyio.to_thread

from .. import _capabilities
from .._errors import logger
from .._poller import Poller
from .._selector import READ, Registration
from ._child import KILLED, STILL_RUNNING, TIME_TO_END, Child, Exited
from ._exit_status import UNKNOWN_STATUS, is_child, poll_exit_status

# How often, in seconds, to check whether a child has ended, if neither a file descriptor nor a thread waits for it.
POLL_INTERVAL = 0.05

# How long, in seconds, to wait for the status from another thread that has reaped the child.
TIME_TO_SET_STATUS = 0.1

StartTask = Callable[[Callable[[], Coroutine[Any, Any, None]]], object]


class PopenChild(Child):
    """A child that `subprocess.Popen` has started.

    A file descriptor in the poller reports its end (`os.pidfd_open`, Linux 5.3). Without one, a thread waits for the
    end without reaping, so the PID cannot be reused before we notice. Without `os.waitid` (macOS before Python 3.13)
    the thread reaps the child. If no thread can be started, a task polls.
    """

    def __init__(
        self,
        poller: Poller,
        popen: subprocess.Popen[Any],
        call: Callable[[Callable[[], None]], None],
        start_task: StartTask,
    ) -> None:
        """`call` runs a callback from a task; `start_task` starts a task that the group waits for."""
        self._call = call
        self.process = popen
        self.pid = popen.pid
        self._popen = popen
        self._poller = poller
        self._start_task = start_task
        self._killed = False  # By `kill_and_reap`, and a task is reaping it.
        self._registration: Registration | None = None
        self._exited: Exited | None = None
        self._waiting: anyio.CancelScope | None = None  # Created by the task it surrounds.
        self._is_watched = True
        self.needs_task = False
        self._reaped_by_popen = False  # Another thread has reaped it, but has not set the status yet.
        if not _capabilities.polls_files:
            self._wait_in_thread("the system cannot poll a file descriptor for it")
            return
        try:
            self._registration = Registration(os.pidfd_open(popen.pid))  # type: ignore[attr-defined,unused-ignore]
            poller.register(self._registration)
        except (AttributeError, OSError) as exc:
            # The platform, Python, kernel or sandbox does not have it, or there are no file descriptors left.
            self._wait_in_thread(exc)

    def _wait_in_thread(self, why: object) -> None:
        logger.debug("a thread waits for process %s: %s", self.pid, why)
        self.needs_task = True

    def watch(self, exited: Exited) -> None:
        self._exited = exited
        if self._registration is not None:
            self._registration.read_ready = self._end_reported
            try:
                self._poller.set_interest(self._registration, READ)
            except OSError as exc:  # The selector is full (ENOSPC, ENOMEM).
                self._close()
                self._wait_in_thread(exc)

    def _end_reported(self) -> None:
        """Called when the file descriptor of the child is readable: the child has ended."""
        if self.has_ended():
            self._notify_exited()
        else:
            # We cannot reap it before its tracer has done so. The file descriptor stays readable until then.
            self._close()
            self._wait_in_thread(BlockingIOError("its tracer has not reaped it yet"))
            self._start_task(self._run)

    async def run(self, report: Callable[[Exception], None]) -> None:
        await self._run()

    async def _run(self) -> None:
        """Wait in a thread. The wait also ends if other code reaps the child."""
        wait = self._wait_without_reaping if hasattr(os, "waitid") else self._popen.wait
        pause = 0.001
        # Shielded: after a cancellation of the group, shielded tasks may still wait for `process_exited`.
        with anyio.CancelScope(shield=True) as self._waiting:
            if not self._is_watched:  # The child was killed before this task ran.
                self._waiting.cancel()
            try:
                # A limiter of its own: children must not use up AnyIO's threads. The thread ends with the child.
                await anyio.to_thread.run_sync(wait, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
            except RuntimeError as exc:  # The system cannot start a thread.
                logger.debug("process %s is polled: %r", self.pid, exc)
                pause = POLL_INTERVAL
            while not self.has_ended():  # noqa: ASYNC110  # there is no event to wait for
                # After the thread: another thread has reaped it through `popen`, and is about to set the status.
                await anyio.sleep(pause)
            self._call(self._notify_exited)

    def _notify_exited(self) -> None:
        if self.has_ended() and self._exited is not None:
            exited, self._exited = self._exited, None
            self._close()
            assert self.returncode is not None
            exited(self.returncode)

    def has_ended(self) -> bool:
        if self._popen.returncode is None:
            if hasattr(os, "waitid"):
                self._reap()
            else:
                self._popen.poll()
        self.returncode = self._popen.returncode
        return self.returncode is not None

    def _reap(self) -> None:
        # `Popen.poll` alone would return 0 if other code has reaped the child: a handler of SIGCHLD, for example.
        try:
            status = poll_exit_status(self.pid)
        except ChildProcessError:
            if self._was_reaped_by_popen():
                return
            logger.warning(
                "the exit status of process %s is unknown, because other code has reaped it: using %s",
                self.pid,
                UNKNOWN_STATUS,
            )
            status = UNKNOWN_STATUS
        if status is not None:
            self._popen.poll()
            self._popen.returncode = status

    def _was_reaped_by_popen(self) -> bool:
        """Return whether another thread, waiting through `popen`, has reaped this reaped child."""
        if self._popen.returncode is None:
            status = self._popen.poll()
            if status is None:  # A thread holds the lock of `popen`: it has reaped it, and is about to set the status.
                self._reaped_by_popen = True
            elif status == 0:
                # `poll` returns 0 for a child that other code has reaped. Or the thread has just set the status to 0.
                return self._reaped_by_popen
        return True

    def send_signal(self, signal: int) -> None:
        if sys.platform == "linux" and self._registration is not None:
            # A pidfd refers to this process even if the PID is reused, and sending by it does not reap.
            try:
                signals.pidfd_send_signal(self._registration.fd, signal)
            except ProcessLookupError:
                raise
            except OSError:
                pass  # A sandbox forbids it. Any other error is raised again by `os.kill`.
            else:
                return
        if hasattr(os, "waitid"):
            # Not by `popen`: it polls first, and would report 0 for a child that other code has reaped.
            if not is_child(self.pid):
                raise ProcessLookupError("the process has been reaped")
            os.kill(self.pid, signal)
        else:
            self._popen.send_signal(signal)

    def kill(self) -> None:
        if sys.platform == "win32":
            self._popen.kill()
        else:
            self.send_signal(signals.SIGKILL)

    def kill_and_reap(self) -> int | None:
        self._exited = None
        self._is_watched = False
        if self._waiting is not None:
            self._waiting.cancel()
        try:
            if not self.has_ended():
                self.kill()
                if not self.has_ended():
                    self._reap_later()
                    return KILLED  # No other status is possible.
        except ProcessLookupError:
            # Other code has just reaped it: perhaps another thread, which has not set the status yet.
            if not self.has_ended():
                self.returncode = self._status_of_another_thread()
        except PermissionError:
            return None
        finally:
            self._close()
        return self.returncode

    def _status_of_another_thread(self) -> int:
        try:
            return self._popen.wait(TIME_TO_SET_STATUS)
        except subprocess.TimeoutExpired:
            return UNKNOWN_STATUS

    def _reap_later(self) -> None:
        if not self._killed:
            self._killed = True
            self._start_task(self._reap_killed)

    async def _reap_killed(self) -> None:
        await self.reaped()
        if self.returncode is None:
            logger.warning(STILL_RUNNING, self.pid, TIME_TO_END)

    async def reaped(self) -> None:
        """Wait until a child that `kill_and_reap` has killed is reaped, at most `TIME_TO_END`."""
        pause = 0.0005
        with anyio.move_on_after(TIME_TO_END, shield=True):
            while self._killed and not self.has_ended():
                await anyio.sleep(pause)
                pause = min(2 * pause, POLL_INTERVAL)

    def _wait_without_reaping(self) -> None:
        try:
            poll_exit_status(self.pid, wait=True)
        except ChildProcessError:
            pass  # Other code has reaped it; `has_ended` notices that.

    def _close(self) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            self._poller.unregister(registration)
            os.close(registration.fd)
