"""The poller: readiness of many descriptors for the price of one wait.

Holds: how to wait for whatever comes first, and how to be woken.
May know: AnyIO's `wait_readable` and `wait_writable`. Knows nothing of channels, transports or groups.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from ._selector import READ, WRITE, Failed, Registration, Selector, selected
from ._waiters import InterruptSafeEvent

# What is due within so many seconds is due: no sum of two times is more exact than that (asyncio's figure on Linux).
RESOLUTION = 1e-9


def call(function: Callable[..., object], *args: object) -> None:
    """Call `function(*args)`."""
    function(*args)


class Turns(Protocol):
    """Whose turn it is when something is ready: the group."""

    #: Whether tasks have been started since the last turn began, which come before the next one.
    tasks_started: bool

    def turn(self) -> float:
        """Take what is ready, and run what is due.

        Return when the next turn has to be taken even if nothing is ready: minus infinity for at once.
        """
        ...


class Poller(ABC):
    """Readiness of descriptors, taken in batches by `dispatch`, and the loop that gives its owner its turns."""

    #: Calls the callbacks of every descriptor that is ready now, once, and returns how many there were. What a callback
    #: raises is passed to the argument.
    dispatch: Callable[[Failed], int]

    #: Whether tasks notice what is ready, so that `dispatch` does not know it before they have run.
    needs_tasks = False

    #: Whom every descriptor belongs to: see `claim`.
    registrations: dict[int, Registration]

    #: What a program of asyncio's knows as its event loop; nobody here uses it. `None` where there is none.
    loop: AbstractEventLoop | None = None

    def __init__(self) -> None:
        #: The clock, in seconds.
        self.time: Callable[[], float] = anyio.current_time
        #: Whether a `wake` is needed for the next turn.
        self.waiting = False
        #: Calls what needs the backend: asyncio code may be running, on trio, when an interest changes.
        self.as_backend: Callable[..., object] = call

    def owner(self, fd: int) -> Registration | None:
        """Return what `descriptor` belongs to, unless that gives way."""
        registration = self.registrations.get(fd)
        return None if registration is None or registration.gives_way else registration

    def register(self, registration: Registration) -> None:
        """Let a descriptor belong to `watch`, until `release`."""
        before = self.registrations.get(registration.fd)
        if before is not None and before.gives_way:
            self.unregister(before)
        self.registrations[registration.fd] = registration

    def unregister(self, registration: Registration) -> None:
        """Take out a descriptor, which is about to be closed: a copy in a forked child would go on reporting it."""
        if registration.interest:
            self.set_interest(registration, 0)
        if self.registrations.get(registration.fd) is registration:
            del self.registrations[registration.fd]

    @abstractmethod
    def set_interest(self, registration: Registration, interest: int) -> None:
        """Change what `watch` waits for to `interest`, another mask of `READ`, `WRITE` and `HANGUP` than it has.

        `read_ready` and `write_ready` are called in every batch, as long as its descriptor is ready. Raises `OSError`
        when the system watches as many as it may.
        """

    @abstractmethod
    async def run(self, turns: Turns) -> None:
        """Take turns until cancelled; raises what a turn raises."""

    @property
    def is_ready(self) -> bool:
        """Whether something is ready without a wait."""
        return False

    @abstractmethod
    def wait_until(self, deadline: float) -> None:
        """Take the next turn at `deadline` rather than when the wait began with; only while `waiting`."""

    @abstractmethod
    def wake(self) -> None:
        """Take the next turn at once, from the thread that takes turns."""

    @abstractmethod
    def wake_threadsafe(self) -> None:
        """Take the next turn at once, from any thread. Raises `RuntimeError` when the poller is closed."""

    def renew(self) -> None:  # noqa: B027  # there may be nothing
        """Make good what has failed, for the next `run`."""

    def close(self) -> None:  # noqa: B027  # there may be nothing
        """Give everything back."""


class WaitingPoller(Poller):
    """A poller that waits in a task, through AnyIO: what every backend can do."""

    def __init__(self) -> None:
        super().__init__()
        self._scope: anyio.CancelScope | None = None  # Around a wait that has a deadline.
        # A socket pair rather than a pipe: it is non-blocking and wakes a selector on every platform.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._wake_sent = False  # A byte is under way, or about to be: one is enough for any number of threads.
        self._waker = Registration(self._receiver.fileno())
        self.register(self._waker)
        self._waker.read_ready = self._woken
        self.set_interest(self._waker, READ)

    async def run(self, turns: Turns) -> None:
        deadline = -inf
        while True:
            if deadline == -inf or self.is_ready or (deadline != inf and deadline <= self.time()):
                await anyio.lowlevel.checkpoint()
            else:
                self.waiting = True
                try:
                    if deadline == inf:
                        await self._wait()
                    else:
                        with anyio.CancelScope(deadline=deadline) as self._scope:
                            await self._wait()
                finally:
                    self.waiting = False
                    self._scope = None
            if turns.tasks_started:
                # trio runs what is ready in any order: a second pause is the first to end behind them for certain.
                await anyio.lowlevel.checkpoint()
            deadline = turns.turn()

    @abstractmethod
    async def _wait(self) -> None:
        """Wait until a descriptor is ready."""

    def wait_until(self, deadline: float) -> None:
        if self._scope is None:
            self.wake()
        else:
            self._scope.deadline = deadline

    def wake(self) -> None:
        if self.waiting:
            self.waiting = False
            self.wake_threadsafe()

    def wake_threadsafe(self) -> None:
        if self._wake_sent:
            return
        try:
            self._wake_sent = True
            self._sender.send(b"\0")
        except OSError as exc:
            self._wake_sent = False
            raise RuntimeError("the poller is closed") from exc
        except BaseException:  # `KeyboardInterrupt`: the next one has to send.
            self._wake_sent = False
            raise

    def _woken(self) -> None:
        try:
            self._receiver.recv(4096)
        except BlockingIOError:
            pass  # A stale readiness report; the wake-up has already been taken.
        self._wake_sent = False  # After it is received: before that, a new one would be received with it, and be lost.

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


class ListPoller(Poller):
    """A poller whose descriptors are in the system's own list."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self.dispatch = selector.dispatch
        self.registrations = selector.registrations
        try:
            super().__init__()
        except BaseException:  # No descriptors for the socket pair of a waiting poller.
            selector.close()
            raise

    def set_interest(self, registration: Registration, interest: int) -> None:
        self._selector.set_interest(registration, interest)
        if self._selector.always_ready:
            self.wake()  # No wait would end for them.

    @property
    def is_ready(self) -> bool:
        return bool(self._selector.always_ready)

    def close(self) -> None:
        self._selector.close()
        super().close()


class WaitingListPoller(ListPoller, WaitingPoller):
    """A list of the system's that a task waits for."""

    async def _wait(self) -> None:
        await anyio.wait_readable(self._selector.fileno())

    def renew(self) -> None:
        """Register every file descriptor in a new selector."""
        before = self._selector
        with suppress(OSError):  # First: if something else has closed it, the new one may get its number.
            before.close()
        self._selector = selector = type(before)()
        self.dispatch = selector.dispatch
        self.registrations = selector.registrations
        selector.registrations.update(before.registrations)
        selector.always_ready.update(before.always_ready)
        for registration in before.registrations.values():
            interest, registration.interest = registration.interest, 0
            with suppress(OSError):  # It has been closed, too.
                selector.set_interest(registration, interest)


class _Tasks:
    """What waits for one descriptor in a `TaskPoller`: the task's mark for each direction that has one."""

    __slots__ = ("marks", "registration")

    def __init__(self, registration: Registration) -> None:
        self.registration = registration
        self.marks: dict[int, object] = {}


class TaskPoller(WaitingPoller):
    """A waiting task for each descriptor and direction: for platforms whose selector cannot be waited for (Windows).

    A task ends with the first readiness it sees, and is started anew by the `dispatch` that reports it: readiness is
    a state, so nothing is missed in between. A task whose mark is no longer there has nothing to say.
    """

    needs_tasks = True

    def __init__(self) -> None:
        self.registrations = {}
        self._waiting: dict[int, _Tasks] = {}
        self._due: list[tuple[_Tasks, int, object]] = []
        self._something = InterruptSafeEvent()
        self._tasks: TaskGroup | None = None
        self.dispatch = self._dispatch
        super().__init__()

    def set_interest(self, registration: Registration, interest: int) -> None:
        before, registration.interest = registration.interest, interest
        fd = registration.fd
        if self.registrations.get(fd) is not registration:
            return  # The number belongs to somebody else by now.
        tasks = self._waiting.get(fd)
        if tasks is None:
            tasks = self._waiting[fd] = _Tasks(registration)
        if before & ~interest:
            # Wakes every task that waits for the descriptor, at once: it may be closed and its number used again before
            # a cancelled task would have run. What is left of the interest gets a new task.
            tasks.marks.clear()
            try:
                self.as_backend(anyio.notify_closing, fd)
            except OSError:  # Somebody has closed it behind our back. The other direction may wait as well.
                self.as_backend(anyio.notify_closing, fd)
        if interest:
            self._start(tasks)
        else:
            del self._waiting[fd]

    async def run(self, turns: Turns) -> None:
        async with anyio.create_task_group() as task_group:
            self._tasks = task_group
            try:
                for tasks in self._waiting.values():
                    self._start(tasks)
                await super().run(turns)
            finally:
                self._tasks = None  # It takes no more tasks, and interests go on changing until the end.

    def _start(self, tasks: _Tasks) -> None:
        if self._tasks is None:
            return  # `run` will, unless it is over.
        for event in (READ, WRITE):
            if event & selected(tasks.registration.interest) and event not in tasks.marks:
                tasks.marks[event] = mark = object()
                self.as_backend(self._tasks.start_soon, self._wait_for, tasks, event, mark)

    async def _wait_for(self, tasks: _Tasks, event: int, mark: object) -> None:
        if tasks.marks.get(event) is not mark:
            return  # Taken out before this task's first turn; the number may belong to somebody else.
        try:
            await (anyio.wait_readable if event == READ else anyio.wait_writable)(tasks.registration.fd)
        except anyio.ClosedResourceError:
            return  # The interest has changed: `set_interest` has seen to what is left of it.
        except OSError:
            pass  # Somebody has closed it behind our back, which whoever reads or writes next will learn.
        self._due.append((tasks, event, mark))
        self._something.set()

    async def _wait(self) -> None:
        await self._something.wait()

    def _dispatch(self, failed: Failed) -> int:
        due, self._due = self._due, []
        self._something = InterruptSafeEvent()
        for tasks, event, mark in due:
            if tasks.marks.get(event) is mark:
                del tasks.marks[event]
                tasks.registration.tell_or_fail(event, failed)
                if self._waiting.get(tasks.registration.fd) is tasks:
                    self._start(tasks)
        return len(due)
