"""The system's own list of descriptors and of what each waits for.

Holds: a list for Linux, and one for every other platform that has such a list.
May know: `select`, `selectors`. Knows nothing of waiting, turns, or what the descriptors are.

An epoll or kqueue descriptor is itself readable when anything registered in it is ready. So to wait for all of them
costs the same for any number, and the whole batch is taken with one call that does not wait.
"""

from __future__ import annotations

import select
import selectors
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress

READ: int = selectors.EVENT_READ
WRITE: int = selectors.EVENT_WRITE


class Watch:
    """A descriptor, what it waits for, and whom to call when it is ready."""

    __slots__ = ("descriptor", "interest", "read_ready", "write_ready")

    read_ready: Callable[[], object]
    write_ready: Callable[[], object]

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int = descriptor
        self.interest: int = 0  # A mask of `READ` and `WRITE`, which only a poller changes.

    def tell(self, mask: int) -> None:
        """Call whom it concerns that the descriptor is ready for what is in `mask`."""
        # The interest is looked at again for each half: a callback of this batch may have changed it.
        if mask & self.interest & READ:
            self.read_ready()
        if mask & self.interest & WRITE:
            self.write_ready()


def in_use(watch: Watch) -> RuntimeError:
    return RuntimeError(f"file descriptor {watch.descriptor} is used by another transport of the group already")


class ReadinessList(ABC):
    """Descriptors that stay registered, and are told by the batch.

    Errors and hang-ups are reported whatever the interest, so a descriptor with nothing to wait for is taken out
    instead of staying in with an empty interest.
    """

    def __init__(self) -> None:
        #: Whom the system refuses to register, because they are always ready: `/dev/null`, for example.
        self.always_ready: set[Watch] = set()

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor of the list, which is readable when anybody in it is ready."""

    @abstractmethod
    def add(self, watch: Watch, interest: int) -> None:
        """Register a descriptor.

        Raises `PermissionError` for one that is always ready, and `RuntimeError`, as asyncio does, for one that is
        registered already: it has been handed to two transports.
        """

    @abstractmethod
    def change(self, watch: Watch, interest: int) -> None:
        """Change what a descriptor is registered for."""

    @abstractmethod
    def remove(self, watch: Watch) -> None:
        """Take out a descriptor."""

    def set_interest(self, watch: Watch, interest: int) -> None:
        """Register `watch` for another interest than it has, or take it out."""
        if watch in self.always_ready:
            if not interest:
                self.always_ready.discard(watch)
        elif not interest:
            self.remove(watch)
        elif watch.interest:
            self.change(watch, interest)
        else:
            try:
                self.add(watch, interest)
            except PermissionError:
                self.always_ready.add(watch)
        watch.interest = interest

    @abstractmethod
    def take(self) -> int:
        """Call everybody who is ready now, once, and return how many the system has reported."""

    def tell_always_ready(self) -> None:
        """Call everybody whom the system does not report."""
        for watch in tuple(self.always_ready):
            watch.tell(watch.interest)

    @abstractmethod
    def close(self) -> None:
        """Give the list back."""


class SelectorList(ReadinessList):
    """What `selectors` has for this platform: kqueue on BSD and macOS."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = selectors.DefaultSelector()
        # Every selector that can be waited for has it; `SelectSelector` and `PollSelector` have not.
        self._descriptor: int = self._selector.fileno()  # type: ignore[attr-defined,unused-ignore]

    def fileno(self) -> int:
        return self._descriptor

    def add(self, watch: Watch, interest: int) -> None:
        try:
            self._selector.register(watch.descriptor, interest, watch.tell)
        except KeyError:
            raise in_use(watch) from None

    def change(self, watch: Watch, interest: int) -> None:
        self._selector.modify(watch.descriptor, interest, watch.tell)

    def remove(self, watch: Watch) -> None:
        self._selector.unregister(watch.descriptor)

    def take(self) -> int:
        batch = self._selector.select(0)
        for key, mask in batch:
            key.data(mask)
        if self.always_ready:
            self.tell_always_ready()
        return len(batch)

    def close(self) -> None:
        self._selector.close()


if sys.platform == "linux":
    # What epoll is asked for, by what a descriptor waits for.
    EVENTS = (0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT)

    # An error or a hang-up is for whoever waits: the next call tells what it is.
    READABLE = ~select.EPOLLOUT
    WRITABLE = ~select.EPOLLIN

    # The most that one call reports. The rest comes first the next time.
    BATCH_SIZE = 256

    class EpollList(ReadinessList):
        """epoll, called directly: through `selectors` a descriptor costs a third more to take, a quarter to add."""

        def __init__(self) -> None:
            super().__init__()
            self._epoll = select.epoll()
            self._watches: dict[int, Watch] = {}

        def fileno(self) -> int:
            return self._epoll.fileno()

        def add(self, watch: Watch, interest: int) -> None:
            try:
                self._epoll.register(watch.descriptor, EVENTS[interest])
            except FileExistsError:
                raise in_use(watch) from None
            self._watches[watch.descriptor] = watch

        def change(self, watch: Watch, interest: int) -> None:
            self._epoll.modify(watch.descriptor, EVENTS[interest])

        def remove(self, watch: Watch) -> None:
            del self._watches[watch.descriptor]
            with suppress(OSError):  # Somebody has closed the descriptor behind our back, and so taken it out.
                self._epoll.unregister(watch.descriptor)

        def take(self) -> int:
            watches = self._watches
            batch = self._epoll.poll(0, BATCH_SIZE)
            for descriptor, events in batch:
                watch = watches.get(descriptor)  # None after a callback of this batch has taken it out.
                if watch is None:
                    continue
                # As `Watch.tell`, without the cost of a call.
                if events & READABLE and watch.interest & READ:
                    watch.read_ready()
                if events & WRITABLE and watch.interest & WRITE:
                    watch.write_ready()
            if self.always_ready:
                self.tell_always_ready()
            return len(batch)

        def close(self) -> None:
            self._epoll.close()


def make_readiness_list() -> ReadinessList | None:
    """Return the list that this platform has, if it has one that can be waited for (Windows has none)."""
    if sys.platform == "linux":
        return EpollList()
    return SelectorList() if hasattr(selectors.DefaultSelector, "fileno") else None
