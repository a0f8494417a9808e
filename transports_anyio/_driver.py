"""Drivers: they wait for a selector and call the scheduler.

Holds: the contract of drivers, and the driver that waits in a task, which works on every backend.
May know: `anyio`, `socket`, `_clock`, `_selector`.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf
from typing import Protocol

import anyio
import anyio.lowlevel

from ._clock import BackendClock, Clock
from ._selector import READ, Registration, Selector

# Deadlines this close, in seconds, count as reached: sums of times are not more exact (asyncio's clock resolution on
# Linux).
RESOLUTION = 1e-9

# How many rounds of new tasks an iteration waits for: a program that starts one in each round must not hold it up.
ROUNDS_OF_FIRST_STEPS = 8

# How many frames a backend needs at most to change the deadline of a cancel scope.
FRAMES_OF_BACKEND = 20


def check_stack(frames: int = FRAMES_OF_BACKEND) -> None:
    """Raise `RecursionError` if less than `frames` more fit on the stack.

    For calls of a backend that change its state in several steps: in the middle of them the exception would break it.
    """
    if frames > 1:
        check_stack(frames - 1)


class DrivenScheduler(Protocol):
    """What a driver needs of the scheduler."""

    #: Whether tasks were started since the last iteration began, or `first_steps` did. They run before the next one.
    tasks_started: bool

    def run_once(self) -> float:
        """Run one iteration: scheduled callbacks, callbacks of ready file descriptors, and timers that are due.

        Return the deadline of the next iteration, which comes earlier if a file descriptor is ready. Minus infinity
        means at once, infinity means no deadline. It may be earlier than `next_deadline`.
        """
        ...

    def next_deadline(self) -> float:
        """Return the exact deadline. The driver asks when the one that it waits for has come."""
        ...


async def first_steps(scheduler: DrivenScheduler) -> None:
    """Let each task that was started take its first step, and those that are started meanwhile."""
    for _ in range(ROUNDS_OF_FIRST_STEPS):
        if not scheduler.tasks_started:
            break
        scheduler.tasks_started = False
        # trio runs ready tasks in random order: only a second checkpoint is sure to come after them.
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()


class Driver(ABC):
    """Runs an iteration when a file descriptor is ready, when the deadline has come, and after `wake`."""

    def __init__(self, clock: Clock) -> None:
        #: The clock of deadlines.
        self.clock: Clock = clock
        #: Whether it waits for the next iteration, so that `wake` is needed to begin it at once.
        self.waiting = False
        #: Whether its wait is still under way, although `wake` may have been called. Only for a driver that is woken by
        #: way of its selector: an iteration that others run meanwhile takes the wake-up away.
        self.in_wait = False
        #: When the wait ends. May be too early: the driver asks for the exact deadline then, and waits on.
        self.deadline = inf

    @abstractmethod
    async def run(self, scheduler: DrivenScheduler) -> None:
        """Run iterations until cancelled. Raises what `scheduler.run_once` raises."""

    @abstractmethod
    def wait_until(self, deadline: float) -> None:
        """Wait no longer than until `deadline`, which is before `self.deadline`. May only be called while `waiting`.

        If this raises, at the recursion limit for example, the wait ends when it would have ended.
        """

    @abstractmethod
    def wake(self) -> None:
        """Begin the next iteration at once. May only be called in the thread of the scheduler."""

    @abstractmethod
    def wake_threadsafe(self) -> None:
        """Begin the next iteration at once, from any thread. Raises `RuntimeError` if the driver is closed."""

    async def wait_writable(self, sock: socket.socket) -> None:
        """Wait until `sock`, which has no registration, can send. Always a checkpoint."""
        await anyio.wait_writable(sock)

    @abstractmethod
    def close(self) -> None:
        """Release the resources of the driver."""


class TaskDriver(Driver):
    """Waits in a task, through AnyIO."""

    def __init__(self, selector: Selector, time: Callable[[], float]) -> None:
        self._backend_clock = BackendClock(time)
        super().__init__(self._backend_clock)
        self._selector = selector
        self._scope: anyio.CancelScope | None = None  # Around a wait that has a deadline.
        # A socket pair rather than a pipe: it wakes a selector on every platform.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._wake_sent = False  # A byte is on its way. One is enough for any number of threads.
        waker = Registration(self._receiver.fileno())
        waker.read_ready = self._woken
        selector.registrations[waker.fd] = waker
        selector.set_interest(waker, READ)

    async def run(self, scheduler: DrivenScheduler) -> None:
        selector = self._selector
        deadline = -inf
        async with selector.running():
            while True:
                if deadline == -inf or selector.always_ready or (deadline != inf and deadline <= self.clock.time()):
                    if not scheduler.tasks_started:
                        await anyio.lowlevel.checkpoint()
                else:
                    self.deadline = deadline
                    self.waiting = self.in_wait = True
                    expired = False
                    try:
                        if deadline == inf:
                            await selector.wait()
                        else:
                            with anyio.CancelScope(deadline=self._on_backend(deadline)) as self._scope:
                                await selector.wait()
                            expired = self._scope.cancelled_caught
                    finally:
                        self.waiting = self.in_wait = False
                        self._scope = None
                    if expired:
                        deadline = scheduler.next_deadline()
                        if deadline > self.clock.time() + RESOLUTION:
                            continue  # The timer was cancelled or moved. A byte of `wake` ends the next wait.
                if scheduler.tasks_started:
                    await first_steps(scheduler)
                deadline = scheduler.run_once()

    @property
    def wakeup_fd(self) -> int:
        """For `signal.set_wakeup_fd`: a signal ends the wait, whichever thread the system interrupts for it."""
        return self._sender.fileno()

    def wait_until(self, deadline: float) -> None:
        if self._scope is None:
            self.wake()
        else:
            check_stack()
            self._scope.deadline = self._on_backend(deadline)
            self.deadline = deadline

    def _on_backend(self, deadline: float) -> float:
        """Return the time of the backend's clock at which to look whether `deadline` has come."""
        if self.clock.time is self._backend_clock.time:
            return deadline
        return self._backend_clock.time() + deadline - self.clock.time()

    def wake(self) -> None:
        if self.waiting:
            self.wake_threadsafe()
            self.waiting = False  # Not before: the call may raise, at the recursion limit for example.

    def wake_threadsafe(self) -> None:
        if self._wake_sent:
            return
        try:
            self._wake_sent = True
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # Signals have filled the buffer, by way of `wakeup_fd`: that ends the wait, too.
        except OSError as exc:
            self._wake_sent = False
            raise RuntimeError("the driver is closed") from exc
        except BaseException:  # `KeyboardInterrupt`: the byte may not be sent, so the next call sends one.
            self._wake_sent = False
            raise

    def _woken(self) -> None:
        try:
            self._receiver.recv(4096)
        except BlockingIOError:
            pass  # A late report: the byte has been received already.
        # Not before the byte is received: a new byte would be received with it, and be lost.
        self._wake_sent = False

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()
