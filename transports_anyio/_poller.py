"""The poller: readiness of many descriptors for the price of one wait.

Holds: which descriptor waits for what, and whom to call.
May know: AnyIO's `wait_readable` and `wait_writable`, `selectors`. Knows nothing of channels, transports or groups.
"""

from __future__ import annotations

import selectors
import socket
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from math import inf

import anyio
from anyio.abc import TaskGroup

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

ReadyCallback = Callable[[int], None]


class Poller(ABC):
    """Readiness of descriptors, taken in batches: `wait`, then `dispatch`.

    A poller is waited for by one task, from the inside of `run`.
    """

    __slots__ = ("_receiver", "_sender", "waiting")

    def __init__(self) -> None:
        # A socket pair rather than a pipe: it is non-blocking and wakes a selector on every platform.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        #: Whether the group's task is in `wait`.
        self.waiting = False
        self.set_interest(self._receiver.fileno(), 0, READ, self._woken)

    @abstractmethod
    def set_interest(self, descriptor: int, before: int, interest: int, ready: ReadyCallback) -> None:
        """Change what `descriptor` waits for from `before` to `interest`, each a mask of `READ` and `WRITE`.

        `ready` is called with the mask of what it is ready for, in every batch. A descriptor has to be taken out, with
        an interest of 0, before it is closed.
        """

    @abstractmethod
    async def run(self, turns: Callable[[], Awaitable[object]]) -> None:
        """Await `turns()`, with everything around it that `wait` needs."""

    async def wait(self, deadline: float = inf) -> None:
        """Wait until a descriptor is ready, `wake` is called or the clock reaches `deadline`."""
        self.waiting = True
        try:
            if deadline == inf:
                await self._wait()
            else:
                with anyio.CancelScope(deadline=deadline):
                    await self._wait()
        finally:
            self.waiting = False

    @abstractmethod
    async def _wait(self) -> None:
        """Wait until a descriptor is ready."""

    @abstractmethod
    def dispatch(self) -> None:
        """Call everybody who is ready now, once."""

    def wake(self) -> None:
        """End a `wait` of this thread; costs nothing while nobody waits."""
        if self.waiting:
            self.waiting = False
            self.wake_threadsafe()

    def wake_threadsafe(self) -> None:
        """End a `wait`, from any thread. Raises `OSError` when the poller is closed."""
        try:
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # The pair is full of wake-ups that nobody has read: the next wait returns at once.

    def _woken(self, mask: int) -> None:
        try:
            self._receiver.recv(4096)
        except BlockingIOError:
            pass  # A stale readiness report; the wake-up has already been taken.

    def close(self) -> None:
        self._receiver.close()
        self._sender.close()


class SelectorPoller(Poller):
    """One selector in which every descriptor stays registered, and which is itself waited for.

    An epoll or kqueue descriptor is readable when anything registered in it is ready, so a wait costs the same for any
    number of descriptors, and the whole batch is taken with `select(0)`.
    """

    __slots__ = ("_descriptor", "_selector")

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # Every selector that can be waited for has `fileno`; `SelectSelector` and `PollSelector` have not.
        self._descriptor: int = self._selector.fileno()  # type: ignore[attr-defined,unused-ignore]
        super().__init__()

    def set_interest(self, descriptor: int, before: int, interest: int, ready: ReadyCallback) -> None:
        # A selector reports errors and hang-ups whatever the interest, so a descriptor with nothing to wait for is
        # taken out instead of staying in with an empty interest.
        if not interest:
            self._selector.unregister(descriptor)
        elif before:
            self._selector.modify(descriptor, interest, ready)
        else:
            self._selector.register(descriptor, interest, ready)

    async def run(self, turns: Callable[[], Awaitable[object]]) -> None:
        await turns()

    async def _wait(self) -> None:
        await anyio.wait_readable(self._descriptor)

    def dispatch(self) -> None:
        for key, mask in self._selector.select(0):
            key.data(mask)

    def close(self) -> None:
        self._selector.close()
        super().close()


class _Watch:
    """What one descriptor waits for in a `TaskPoller`, and the task's mark for each direction that has one."""

    __slots__ = ("interest", "marks", "ready")

    def __init__(self) -> None:
        self.interest = 0
        self.marks: dict[int, object] = {}
        self.ready: ReadyCallback


class TaskPoller(Poller):
    """A waiting task for each descriptor and direction: for platforms whose selector cannot be waited for (Windows).

    A task ends with the first readiness it sees, and is started anew by the `dispatch` that reports it: readiness is
    a state, so nothing is missed in between. A task whose mark is no longer its watch's has nothing to say.
    """

    __slots__ = ("_due", "_something", "_tasks", "_watches")

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

    async def run(self, turns: Callable[[], Awaitable[object]]) -> None:
        async with anyio.create_task_group() as self._tasks:
            for descriptor, watch in self._watches.items():
                self._watch(descriptor, watch)
            await turns()
            self._tasks.cancel_scope.cancel()

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

    def dispatch(self) -> None:
        due, self._due = self._due, []
        self._something = anyio.Event()
        for descriptor, watch, event, mark in due:
            if watch.marks.get(event) is mark:
                del watch.marks[event]
                watch.ready(event)
                if self._watches.get(descriptor) is watch:
                    self._watch(descriptor, watch)


def make_poller() -> Poller:
    """Return the best poller that the platform has."""
    return SelectorPoller() if hasattr(selectors.DefaultSelector, "fileno") else TaskPoller()
