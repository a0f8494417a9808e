"""A child process: how its end is noticed, and how it is signalled and reaped."""

from __future__ import annotations

import os
import signal as signals
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from math import inf
from typing import Any, cast

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from .._errors import logger
from .._poller import Poller
from .._selector import READ, Registration
from .._waiters import InterruptSafeEvent

# What asyncio says of a child that somebody else has reaped.
UNKNOWN_STATUS = 255

# The return code of a child that was killed: minus SIGKILL, for which some platforms have no name.
KILLED = -9

# How often, in seconds, to look whether a child has ended that neither a descriptor nor a thread waits for.
PAUSE_WITHOUT_THREAD = 0.05

# How long, in seconds, a child may take to end that was killed. Hardly any takes a millisecond; but nothing bounds it
# (a system call that hangs in a driver, a tracer that is stopped).
TIME_TO_END = 5.0

LEFT_ALONE = "process %s was killed and still runs after %s seconds: it is left to the system"

# How long, in seconds, another thread may take to set the status of a child that it has reaped.
TIME_TO_SET_STATUS = 0.1

# How long, in seconds, a backend may take to hear of the end of a child that is reaped already.
TIME_TO_HEAR = 1.0

Exited = Callable[[int], None]
StartTask = Callable[[Callable[[], Coroutine[Any, Any, None]]], object]


def poll_exit_status(pid: int, *, wait: bool = False) -> int | None:
    """Return how a child has ended, as its return code, and leave it to be reaped.

    `None` while it runs, unless it is waited for. Raises `ChildProcessError` when it has been reaped, or never was a
    child of ours.
    """
    if sys.platform == "win32":
        raise NotImplementedError
    assert hasattr(os, "waitid")
    options = os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)
    while True:
        found = os.waitid(os.P_PID, pid, options)
        if found is None:
            return None
        if found.si_code != os.CLD_STOPPED:
            status: int = found.si_status
            return status if found.si_code == os.CLD_EXITED else -status
        # macOS finds those that are stopped, too, as newer asyncio knows: this takes the news of it away.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)


def is_child(pid: int) -> bool:
    """Whether `pid` is a child of ours that is not reaped yet; false where nobody can look without reaping."""
    if not hasattr(os, "waitid"):
        return False
    try:
        poll_exit_status(pid)
    except ChildProcessError:
        return False
    return True


class Child(ABC):
    """A child process, whose end is told once; it is reaped then, and never before it is known here."""

    pid: int
    process: Any
    returncode: int | None = None

    #: Whether `run` has to be run in a task for `exited` to be called; known once it is watched.
    needs_task: bool

    @abstractmethod
    def watch(self, exited: Exited) -> None:
        """Call `exited` with the return code, negative for a signal, once the child has ended."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Whether the child has ended, even if nobody has been told yet."""

    @abstractmethod
    def send_signal(self, signal: int) -> None:
        """Send a signal. Only while `has_ended` is false."""

    @abstractmethod
    def kill(self) -> None:
        """Kill the child, which every platform has its own way to do. Only while `has_ended` is false."""

    @abstractmethod
    def kill_and_reap(self) -> int | None:
        """Kill the child and return its return code; `exited` is not called any more.

        It is reaped by a task, for which the group waits, `TIME_TO_END` at most. `None` when it may not be killed: it
        runs as somebody else.
        """

    @abstractmethod
    async def run(self, report: Callable[[Exception], None]) -> None:
        """Wait for the end of the child, and `report` what fails afterwards."""

    def close(self) -> None:  # noqa: B027  # there may be nothing
        """Give everything back: `connection_lost` has been told."""


class PopenChild(Child):
    """A child that `subprocess.Popen` has made.

    Its end is noticed through a descriptor in the poller (`os.pidfd_open`, Linux 5.3), or through a thread that waits
    without reaping, where there is none. So its number cannot belong to a stranger before we know of its end. Where
    nothing waits without reaping either (no `os.waitid`: macOS before Python 3.13), the thread reaps. Where there is no
    thread to be had, it is looked at now and then.

    `start_task` starts a task that the group waits for.
    """

    def __init__(
        self,
        poller: Poller,
        popen: subprocess.Popen[Any],
        call: Callable[[Callable[[], None]], None],
        start_task: StartTask,
    ) -> None:
        """`call` calls what tells of the end, from a task."""
        self._call = call
        self.process = popen
        self.pid = popen.pid
        self._popen = popen
        self._poller = poller
        self._start_task = start_task
        self._killed = False  # For good, and not reaped yet when it was.
        self._registration: Registration | None = None
        self._exited: Exited | None = None
        self._waiting: anyio.CancelScope | None = None  # Around the task, which makes it: it is the backend's.
        self._waited_for = True
        self.needs_task = False
        self._reaped_by_popen = False  # By another thread, when it has yet to tell.
        try:
            self._registration = Registration(os.pidfd_open(popen.pid))  # type: ignore[attr-defined,unused-ignore]
            poller.register(self._registration)
        except (AttributeError, OSError) as exc:
            # Not this platform or this Python, a kernel or a sandbox without it, or no descriptors left.
            self._wait_in_thread(exc)

    def _wait_in_thread(self, why: Exception) -> None:
        logger.debug("a thread waits for process %s: %r", self.pid, why)
        self.needs_task = True

    def watch(self, exited: Exited) -> None:
        self._exited = exited
        if self._registration is not None:
            self._registration.read_ready = self._told
            try:
                self._poller.set_interest(self._registration, READ)
            except OSError as exc:  # The list is full (ENOSPC, ENOMEM).
                self._close()
                self._wait_in_thread(exc)

    def _told(self) -> None:
        """The descriptor says that the child has ended."""
        if self.has_ended():
            self._notify_exited()
        else:
            # A tracer has yet to look at it, and until then it is not for us to reap. The descriptor stays readable.
            self._close()
            self._wait_in_thread(BlockingIOError("its tracer holds its end back"))
            self._start_task(self._run)

    async def run(self, report: Callable[[Exception], None]) -> None:
        await self._run()

    async def _run(self) -> None:
        """Wait in a thread. A child that is reaped elsewhere ends the wait as well."""
        wait = self._wait_without_reaping if hasattr(os, "waitid") else self._popen.wait
        pause = 0.001
        # It waits as long as the child is watched, whatever is cancelled: a task that is shielded may still need to
        # know, as it does with a descriptor.
        with anyio.CancelScope(shield=True) as self._waiting:
            if not self._waited_for:  # The child was killed before this task had its turn.
                self._waiting.cancel()
            try:
                # Children must not take the threads of everybody else, and a thread ends with its child.
                await anyio.to_thread.run_sync(wait, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
            except RuntimeError as exc:  # The system starts no more threads, which ends nobody's connections.
                logger.debug("process %s is looked at now and then: %r", self.pid, exc)
                pause = PAUSE_WITHOUT_THREAD
            while not self.has_ended():  # noqa: ASYNC110  # nobody tells
                # Or else another thread has reaped it through `popen`, and is about to say so.
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
        # Not left to `poll` alone, which says 0 when somebody else was faster: a handler of SIGCHLD, say.
        try:
            status = poll_exit_status(self.pid)
        except ChildProcessError:
            if self._is_popens():
                return
            logger.warning("process %s was reaped by somebody else: return code %s", self.pid, UNKNOWN_STATUS)
            status = UNKNOWN_STATUS
        if status is not None:
            self._popen.poll()
            self._popen.returncode = status

    def _is_popens(self) -> bool:
        """Whether a child that has been reaped was so by another thread that waits for it through `popen`."""
        if self._popen.returncode is None:
            status = self._popen.poll()
            if status is None:  # Neither told nor to be had: the thread has reaped it, and is about to tell.
                self._reaped_by_popen = True
            elif status == 0:
                # What `poll` makes of a child that is nobody's; or the thread has told in this very moment.
                return self._reaped_by_popen
        return True

    def send_signal(self, signal: int) -> None:
        if sys.platform == "linux" and self._registration is not None:
            # It means this child for ever, whoever has its number; and nobody is reaped on the way.
            try:
                signals.pidfd_send_signal(self._registration.fd, signal)
            except ProcessLookupError:
                raise
            except OSError:
                pass  # A sandbox without it. Whatever else is wrong is wrong with the number too.
            else:
                return
        if hasattr(os, "waitid"):
            # Not by `popen`, which would look once more, and take a status that was stolen meanwhile for success.
            if not is_child(self.pid):
                raise ProcessLookupError("the process has been reaped")
            os.kill(self.pid, signal)
        else:
            self._popen.send_signal(signal)

    def kill(self) -> None:
        if sys.platform == "win32":
            raise NotImplementedError
        self.send_signal(signals.SIGKILL)

    def kill_and_reap(self) -> int | None:
        self._exited = None
        self._waited_for = False
        if self._waiting is not None:
            self._waiting.cancel()
        try:
            if not self.has_ended():
                self.kill()
                if not self.has_ended():
                    self._reap_later()
                    return KILLED  # Nothing else can have happened to it.
        except ProcessLookupError:
            # It was reaped elsewhere in this very moment: by another thread, perhaps, which has yet to set the status.
            if not self.has_ended():
                self.returncode = self._wait_for_another_thread()
        except PermissionError:
            return None
        finally:
            self._close()
        return self.returncode

    def _wait_for_another_thread(self) -> int:
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
            logger.warning(LEFT_ALONE, self.pid, TIME_TO_END)

    async def reaped(self) -> None:
        """Return when a child that was killed for good is reaped, or has not ended for `TIME_TO_END`."""
        pause = 0.0005
        with anyio.move_on_after(TIME_TO_END, shield=True):
            while self._killed and not self.has_ended():  # nobody tells
                await anyio.sleep(pause)
                pause = min(2 * pause, PAUSE_WITHOUT_THREAD)

    def _wait_without_reaping(self) -> None:
        try:
            poll_exit_status(self.pid, wait=True)
        except ChildProcessError:
            pass  # Somebody else has reaped it, which `has_ended` finds too.

    def _close(self) -> None:
        registration, self._registration = self._registration, None
        if registration is not None:
            self._poller.unregister(registration)
            os.close(registration.fd)


class AnyIOChild(Child):
    """A child that AnyIO has made."""

    def __init__(self, process: anyio.abc.Process, clock: Callable[[], float]) -> None:
        self._clock = clock  # The backend's.
        self.process = process
        self.pid = process.pid
        self._process = process
        self._exited: Exited | None = None
        self.needs_task = True
        self._waiting: anyio.CancelScope | None = None  # Around the task, which makes it: it is the backend's.
        self._deadline = inf  # Of the scope.
        self._close_requested = InterruptSafeEvent()
        # Anybody may implement AnyIO's interface, for a process that is no child of ours.
        self._is_ours = is_child(self.pid)

    def watch(self, exited: Exited) -> None:
        self._exited = exited

    async def run(self, report: Callable[[Exception], None]) -> None:
        # It lasts as long as the process: whatever is cancelled, the process is reaped.
        with anyio.CancelScope(shield=True, deadline=self._deadline) as self._waiting:
            await self._process.wait()
            self._waiting.deadline = inf
            self.returncode = self._process.returncode
            if self._exited is not None:
                assert self.returncode is not None
                self._exited(self.returncode)
            await self._close_requested.wait()
            # On asyncio nothing else closes the descriptor of an output that a grandchild holds, and it does so in a
            # later turn.
            try:
                await self._process.aclose()
            except Exception as exc:  # A user's own.
                report(exc)
            await anyio.lowlevel.checkpoint()
        if self._waiting.deadline != inf and self._status() is None:
            logger.warning(LEFT_ALONE, self.pid, TIME_TO_END)

    def close(self) -> None:
        self._close_requested.set()

    def has_ended(self) -> bool:
        return self._status() is not None

    def _status(self) -> int | None:
        if self._process.returncode is None and self._is_ours:
            try:
                return poll_exit_status(self.pid)  # A backend may not have noticed yet.
            except ChildProcessError:
                # A thread of the backend's has reaped it, and the backend has yet to hear of it (asyncio before 3.12).
                return UNKNOWN_STATUS
        return self._process.returncode

    def send_signal(self, signal: int) -> None:
        # Any number, as everywhere: 0, or a real-time signal, is no member of the enumeration.
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
                pass  # It has ended; the task is about to learn it.
            except PermissionError:
                self._end_at(-inf)
                return None
            self._end_at(self._clock() + TIME_TO_END)
            status = KILLED  # The task reaps it; nothing else can have happened to it.
        elif self._process.returncode is None and not is_child(self.pid):
            # A thread of the backend's has reaped it, and is about to say so (asyncio before 3.12); or a stranger has,
            # of which the backend may never hear (uvloop).
            self._end_at(self._clock() + TIME_TO_HEAR)
        return status

    def _end_at(self, deadline: float) -> None:
        self._deadline = deadline
        if self._waiting is not None:
            self._waiting.deadline = deadline
