"""A child process: how its end is noticed, and how it is signalled and reaped."""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from signal import Signals
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread

from .._errors import logger
from .._poller import READ, Poller

# What asyncio says of a child that somebody else has reaped.
UNKNOWN_STATUS = 255

Exited = Callable[[int], None]


class Child(ABC):
    """A child process, whose end is told once; it is reaped then, and never before it is known here."""

    pid: int
    handle: Any
    returncode: int | None = None

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
    def kill_for_good(self) -> int | None:
        """Kill and reap the child, and return its return code; `exited` is not called any more.

        `None` when it may not be killed: it runs as somebody else.
        """

    @property
    @abstractmethod
    def needs_task(self) -> bool:
        """Whether `run` has to be run in a task for `exited` to be called."""

    @abstractmethod
    async def run(self) -> None:
        """Wait for the end of the child."""


class PopenChild(Child):
    """A child that `subprocess.Popen` has made.

    Its end is noticed through a descriptor in the poller (`os.pidfd_open`, Linux 5.3), or through a thread that waits
    without reaping, where there is none. So its number cannot belong to a stranger before we know of its end.
    """

    def __init__(self, poller: Poller, popen: subprocess.Popen[Any]) -> None:
        self.handle = popen
        self.pid = popen.pid
        self._popen = popen
        self._poller = poller
        self._descriptor = -1
        self._exited: Exited | None = None
        try:
            self._descriptor = os.pidfd_open(popen.pid)
        except (AttributeError, OSError) as exc:
            # Not this platform, a kernel or a sandbox without it, or no descriptors left.
            logger.debug("a thread waits for process %s: %r", popen.pid, exc)

    @property
    def needs_task(self) -> bool:
        return self._descriptor < 0

    def watch(self, exited: Exited) -> None:
        self._exited = exited
        if self._descriptor >= 0:
            self._poller.set_interest(self._descriptor, 0, READ, lambda mask: self._tell())

    async def run(self) -> None:
        """Wait in a thread. A child that is reaped elsewhere ends the wait as well."""

        def wait() -> None:
            try:
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                pass  # Somebody else has reaped it, which `has_ended` finds too.

        # Children must not take the threads of everybody else, and a thread ends with its child.
        await anyio.to_thread.run_sync(wait, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        self._tell()

    def _tell(self) -> None:
        if self.has_ended() and self._exited is not None:
            exited, self._exited = self._exited, None
            self._close()
            assert self.returncode is not None
            exited(self.returncode)

    def has_ended(self) -> bool:
        if self.returncode is None:
            status_is_lost = False
            if self._popen.returncode is None:
                try:
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:
                    status_is_lost = True
            self.returncode = self._popen.poll()
            if status_is_lost and self.returncode is not None:
                logger.warning("process %s was reaped by somebody else: return code %s", self.pid, UNKNOWN_STATUS)
                self.returncode = self._popen.returncode = UNKNOWN_STATUS
        return self.returncode is not None

    def send_signal(self, signal: int) -> None:
        self._popen.send_signal(signal)

    def kill_for_good(self) -> int | None:
        self._exited = None
        self._close()
        if not self.has_ended():
            try:
                self._popen.kill()
            except PermissionError:
                return None
            self.returncode = self._popen.wait()
        return self.returncode

    def _close(self) -> None:
        if self._descriptor >= 0:
            self._poller.set_interest(self._descriptor, READ, 0, lambda mask: None)
            os.close(self._descriptor)
            self._descriptor = -1


class AnyIOChild(Child):
    """A child that AnyIO has made."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self.handle = process
        self.pid = process.pid
        self._process = process
        self._exited: Exited | None = None
        self._cancelled = anyio.CancelScope()

    @property
    def needs_task(self) -> bool:
        return True

    def watch(self, exited: Exited) -> None:
        self._exited = exited

    async def run(self) -> None:
        try:
            with self._cancelled:
                await self._process.wait()
        finally:
            if self._process.returncode is None:
                with anyio.CancelScope(shield=True):
                    await self._process.wait()  # It has been killed.
        self.returncode = self._process.returncode
        if self._exited is not None:
            assert self.returncode is not None
            self._exited(self.returncode)

    def has_ended(self) -> bool:
        return self._process.returncode is not None

    def send_signal(self, signal: int) -> None:
        self._process.send_signal(Signals(signal))

    def kill_for_good(self) -> int | None:
        self._exited = None
        if self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass  # It has ended; the task is about to learn it.
            self._cancelled.cancel()
            return -9  # The task reaps it; nothing else can have happened to it.
        return self._process.returncode
