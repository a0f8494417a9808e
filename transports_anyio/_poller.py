"""The poller: readiness of many descriptors for the price of one wait.

Holds: which descriptor waits for what, and whom to call.
May know: AnyIO's `wait_readable` and `wait_writable`, `selectors`. Knows nothing of channels, transports or groups.
"""

from __future__ import annotations

import selectors
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf
from typing import Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

ReadyCallback = Callable[[int], None]


class Turns(Protocol):
    """Whose turn it is when something is ready: the group."""

    def turn(self) -> None:
        """Take what is ready, and run what is due."""
        ...

    def next_turn(self) -> float:
        """When a turn has to be taken even if nothing is ready: minus infinity for at once."""
        ...


class Poller(ABC):
    """Readiness of descriptors, taken in batches by `dispatch`, and the loop that gives its owner its turns."""

    def __init__(self) -> None:
        #: The clock, in seconds.
        self.time: Callable[[], float] = anyio.current_time
        #: Whether a `wake` is needed for the next turn.
        self.waiting = False

    @abstractmethod
    def set_interest(self, descriptor: int, before: int, interest: int, ready: ReadyCallback) -> None:
        """Change what `descriptor` waits for from `before` to `interest`, each a mask of `READ` and `WRITE`.

        `ready` is called with the mask of what it is ready for, in every batch. A descriptor has to be taken out, with
        an interest of 0, before it is closed.
        """

    @abstractmethod
    async def run(self, turns: Turns) -> None:
        """Take turns until cancelled; raises what a turn raises."""

    @abstractmethod
    def dispatch(self) -> int:
        """Call everybody who is ready now, once, and return how many that were."""

    @property
    def is_ready(self) -> bool:
        """Whether something is ready without a wait."""
        return False

    @abstractmethod
    def wake(self) -> None:
        """Take the next turn at once, from the thread that takes turns."""

    @abstractmethod
    def wake_threadsafe(self) -> None:
        """Take the next turn at once, from any thread. Raises `RuntimeError` when the poller is closed."""

    def close(self) -> None:  # noqa: B027  # there may be nothing
        """Give everything back."""


class WaitingPoller(Poller):
    """A poller that waits in a task, through AnyIO: what every backend can do."""

    def __init__(self) -> None:
        super().__init__()
        # A socket pair rather than a pipe: it is non-blocking and wakes a selector on every platform.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self.set_interest(self._receiver.fileno(), 0, READ, self._woken)

    async def run(self, turns: Turns) -> None:
        while True:
            deadline = turns.next_turn()
            if deadline == -inf or self.is_ready or (deadline != inf and deadline <= self.time()):
                await anyio.lowlevel.checkpoint()
            else:
                self.waiting = True
                try:
                    if deadline == inf:
                        await self._wait()
                    else:
                        with anyio.CancelScope(deadline=deadline):
                            await self._wait()
                finally:
                    self.waiting = False
            turns.turn()

    @abstractmethod
    async def _wait(self) -> None:
        """Wait until a descriptor is ready."""

    def wake(self) -> None:
        if self.waiting:
            self.waiting = False
            self.wake_threadsafe()

    def wake_threadsafe(self) -> None:
        try:
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # The pair is full of wake-ups that nobody has read: the next wait returns at once.
        except OSError as exc:
            raise RuntimeError("the poller is closed") from exc

    def _woken(self, mask: int) -> None:
        try:
            self._receiver.recv(4096)
        except BlockingIOError:
            pass  # A stale readiness report; the wake-up has already been taken.

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


class SelectorReadiness(Poller):
    """One selector in which every descriptor stays registered: how a poller finds out who is ready.

    An epoll or kqueue descriptor is readable when anything registered in it is ready, so to wait for it costs the same
    for any number of descriptors, and the whole batch is taken with `select(0)`.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # What is always ready (`/dev/null`), and epoll therefore refuses: its interest and whom to call.
        self._always_ready: dict[int, tuple[int, ReadyCallback]] = {}
        # Every selector that can be waited for has `fileno`; `SelectSelector` and `PollSelector` have not.
        self._descriptor: int = self._selector.fileno()  # type: ignore[attr-defined,unused-ignore]
        try:
            super().__init__()
        except BaseException:  # No descriptors for the socket pair of a waiting poller.
            self._selector.close()
            raise

    def set_interest(self, descriptor: int, before: int, interest: int, ready: ReadyCallback) -> None:
        # A selector reports errors and hang-ups whatever the interest, so a descriptor with nothing to wait for is
        # taken out instead of staying in with an empty interest.
        if self._always_ready.pop(descriptor, None) is not None:
            if interest:
                self._always_ready[descriptor] = (interest, ready)
        elif not interest:
            self._selector.unregister(descriptor)
        elif before:
            self._selector.modify(descriptor, interest, ready)
        else:
            try:
                self._selector.register(descriptor, interest, ready)
            except PermissionError:
                self._always_ready[descriptor] = (interest, ready)
                self.wake()

    @property
    def is_ready(self) -> bool:
        return bool(self._always_ready)

    def dispatch(self) -> int:
        batch = self._selector.select(0)
        for key, mask in batch:
            key.data(mask)
        if self._always_ready:
            for interest, ready in tuple(self._always_ready.values()):
                ready(interest)
        return len(batch)

    def close(self) -> None:
        self._selector.close()
        super().close()


class SelectorPoller(SelectorReadiness, WaitingPoller):
    """A selector that a task waits for."""

    async def _wait(self) -> None:
        await anyio.wait_readable(self._descriptor)


class _Watch:
    """What one descriptor waits for in a `TaskPoller`, and the task's mark for each direction that has one."""

    __slots__ = ("interest", "marks", "ready")

    def __init__(self) -> None:
        self.interest = 0
        self.marks: dict[int, object] = {}
        self.ready: ReadyCallback


class TaskPoller(WaitingPoller):
    """A waiting task for each descriptor and direction: for platforms whose selector cannot be waited for (Windows).

    A task ends with the first readiness it sees, and is started anew by the `dispatch` that reports it: readiness is
    a state, so nothing is missed in between. A task whose mark is no longer its watch's has nothing to say.
    """

    def __init__(self) -> None:
        self._watches: dict[int, _Watch] = {}
        self._due: list[tuple[int, _Watch, int, object]] = []
        self._something = anyio.Event()
        self._tasks: TaskGroup | None = None
        super().__init__()

    def set_interest(self, descriptor: int, before: int, interest: int, ready: ReadyCallback) -> None:
        watch = self._watches.setdefault(descriptor, _Watch())
        watch.interest = interest
        watch.ready = ready
        if before & ~interest:
            # Wakes every task that waits for the descriptor, at once: it may be closed and its number used again before
            # a cancelled task would have run. What is left of the interest gets a new task.
            watch.marks.clear()
            anyio.notify_closing(descriptor)
        if interest:
            self._watch(descriptor, watch)
        else:
            del self._watches[descriptor]

    async def run(self, turns: Turns) -> None:
        async with anyio.create_task_group() as self._tasks:
            for descriptor, watch in self._watches.items():
                self._watch(descriptor, watch)
            await super().run(turns)

    def _watch(self, descriptor: int, watch: _Watch) -> None:
        if self._tasks is None:
            return  # `run` will.
        for event in (READ, WRITE):
            if event & watch.interest and event not in watch.marks:
                watch.marks[event] = mark = object()
                self._tasks.start_soon(self._wait_for, descriptor, event, watch, mark)

    async def _wait_for(self, descriptor: int, event: int, watch: _Watch, mark: object) -> None:
        if watch.marks.get(event) is not mark:
            return  # Taken out before this task's first turn; the number may belong to somebody else.
        try:
            await (anyio.wait_readable if event == READ else anyio.wait_writable)(descriptor)
        except anyio.ClosedResourceError:
            return  # The interest has changed: `set_interest` has seen to what is left of it.
        self._due.append((descriptor, watch, event, mark))
        self._something.set()

    async def _wait(self) -> None:
        await self._something.wait()

    def dispatch(self) -> int:
        due, self._due = self._due, []
        self._something = anyio.Event()
        for descriptor, watch, event, mark in due:
            if watch.marks.get(event) is mark:
                del watch.marks[event]
                watch.ready(event)
                if self._watches.get(descriptor) is watch:
                    self._watch(descriptor, watch)
        return len(due)
