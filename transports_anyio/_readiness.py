"""The system's own list of descriptors and of what each waits for.

Holds: a list for Linux, and one for every other platform that has such a list.
May know: `select`, `selectors`. Knows nothing of waiting, turns, or what the descriptors are.

An epoll or kqueue descriptor is itself readable when anything registered in it is ready. So to wait for all of them
costs the same for any number, and the whole batch is taken with one call that does not wait.
"""

from __future__ import annotations

import errno
import select
import selectors
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

READ: int = selectors.EVENT_READ
WRITE: int = selectors.EVENT_WRITE
#: That the other end has hung up, and input does not matter. Where the system cannot tell these apart it is as `READ`.
HANGUP: int = 4

# What a batch calls with a watch and what one of its callbacks has raised; it returns, or raises to end the batch.
Failed: TypeAlias = "Callable[[Watch, BaseException], None]"

# What calls `read_ready`.
INPUT = READ | HANGUP

# What the system says of a descriptor that need not be watched: it is always ready (`/dev/null`, for example), or
# somebody has closed it behind our back, which whoever reads or writes next will learn.
UNWATCHED = {errno.EPERM, errno.EBADF, errno.ENOENT}


class Watch:
    """A descriptor, what it waits for, and whom to call when it is ready."""

    __slots__ = ("descriptor", "interest", "read_ready", "write_ready")

    #: Whether it counts as always ready if the system refuses to watch it. If not, that is an error.
    ready_if_refused = True

    #: Whether the next owner of the descriptor takes it over.
    gives_way = False

    read_ready: Callable[[], object]
    write_ready: Callable[[], object]

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int = descriptor
        self.interest: int = 0  # A mask of `READ`, `WRITE` and `HANGUP`, which only a poller changes.

    def error_ready(self) -> bool:
        """Take what keeps the descriptor ready and is met by neither reading nor writing: see `take_error_queue`.

        Return whether there was anything. If the connection has an error besides, that is reported again.
        """
        return False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of file descriptor {self.descriptor}>"

    def tell(self, mask: int) -> None:
        """Call whom it concerns that the descriptor is ready for what is in `mask`."""
        # The interest is looked at again for each half: a callback of this batch may have changed it.
        if mask & READ and self.interest & INPUT:
            self.read_ready()
        if mask & self.interest & WRITE:
            self.write_ready()

    def tell_or_fail(self, mask: int, failed: Failed) -> None:
        """As `tell`; what a callback raises is passed to `failed`."""
        try:
            self.tell(mask)
        except BaseException as exc:
            failed(self, exc)


def selected(interest: int) -> int:
    """Return what a selector, which knows of no hang-ups, is asked for instead of `interest`."""
    return interest & WRITE | (READ if interest & INPUT else 0)


class ReadinessList(ABC):
    """Descriptors that stay registered, and are told by the batch.

    Errors and hang-ups are reported whatever the interest, so a descriptor with nothing to wait for is taken out
    instead of staying in with an empty interest.
    """

    def __init__(self) -> None:
        #: Whom every descriptor belongs to, whatever it waits for. Where somebody has closed one behind its owner's
        #: back, the system may give its number away once more: it belongs to the last one then.
        self.watches: dict[int, Watch] = {}
        #: Whom the system does not watch.
        self.always_ready: set[Watch] = set()

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor of the list, which is readable when anybody in it is ready."""

    @abstractmethod
    def add(self, descriptor: int, interest: int) -> None:
        """Register a descriptor. Raises `OSError` for one that need not be watched, and when the list is full."""

    @abstractmethod
    def change(self, descriptor: int, interest: int) -> None:
        """Change what a descriptor is registered for. Raises `OSError` as `add`."""

    @abstractmethod
    def remove(self, descriptor: int) -> None:
        """Take out a descriptor, which may be closed already."""

    def set_interest(self, watch: Watch, interest: int) -> None:
        """Register `watch` for another interest than it has, or take it out. Raises `OSError` when the list is full."""
        descriptor = watch.descriptor
        if watch in self.always_ready:
            if not interest:
                self.always_ready.discard(watch)
        elif self.watches.get(descriptor) is not watch:
            if interest:
                self.always_ready.add(watch)  # The number belongs to somebody else by now.
        elif not interest:
            self.remove(descriptor)
        else:
            try:
                (self.change if watch.interest else self.add)(descriptor, interest)
            except OSError as exc:
                if exc.errno not in UNWATCHED or not watch.ready_if_refused:
                    raise
                self.always_ready.add(watch)
        watch.interest = interest

    @abstractmethod
    def take(self, failed: Failed) -> int:
        """Call the callbacks of every descriptor that is ready now, once; return how many the system has reported.

        What a callback raises is passed to `failed`, and the others of the batch are still called.
        """

    def tell_always_ready(self, failed: Failed) -> None:
        """Call everybody whom the system does not report."""
        for watch in tuple(self.always_ready):
            watch.tell_or_fail(selected(watch.interest), failed)

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

    def add(self, descriptor: int, interest: int) -> None:
        with suppress(KeyError):  # What is left of one that somebody has closed behind its owner's back.
            self._selector.unregister(descriptor)
        self._selector.register(descriptor, selected(interest))

    def change(self, descriptor: int, interest: int) -> None:
        self._selector.modify(descriptor, selected(interest))

    def remove(self, descriptor: int) -> None:
        with suppress(KeyError):  # `modify` takes out what it cannot change.
            self._selector.unregister(descriptor)

    def take(self, failed: Failed) -> int:
        watches = self.watches
        batch = self._selector.select(0)  # All that is ready.
        for key, mask in batch:
            watch = watches.get(key.fd)  # None after a callback of this batch has closed it.
            if watch is not None:
                watch.tell_or_fail(mask, failed)
        if self.always_ready:
            self.tell_always_ready(failed)
        return len(batch)

    def close(self) -> None:
        self._selector.close()


if sys.platform == "linux":
    # What epoll is asked for, by what a descriptor waits for.
    EVENTS = tuple(
        (select.EPOLLIN if interest & READ else 0)
        | (select.EPOLLOUT if interest & WRITE else 0)
        | (select.EPOLLRDHUP if interest & HANGUP else 0)
        for interest in range(8)
    )

    # An error or a hang-up is for whoever waits: the next call tells what it is.
    READABLE = ~select.EPOLLOUT
    WRITABLE = ~select.EPOLLIN

    ERROR: int = select.EPOLLERR

    # How many descriptors a call is first asked for. It allocates memory for as many, so more only when they are ready.
    BATCH_SIZE = 256

    class EpollList(ReadinessList):
        """epoll, called directly: through `selectors` a descriptor costs a third more to take, a quarter to add."""

        def __init__(self) -> None:
            super().__init__()
            self._epoll = select.epoll()

        def fileno(self) -> int:
            return self._epoll.fileno()

        def add(self, descriptor: int, interest: int) -> None:
            self._epoll.register(descriptor, EVENTS[interest])

        def change(self, descriptor: int, interest: int) -> None:
            self._epoll.modify(descriptor, EVENTS[interest])

        def remove(self, descriptor: int) -> None:
            try:  # Not `suppress`: every connection that ends comes here, and it would cost about as much as the call.
                self._epoll.unregister(descriptor)
            except OSError:
                pass  # Whoever has closed the descriptor behind our back has taken it out.

        def take(self, failed: Failed) -> int:
            watches = self.watches
            batch = self._epoll.poll(0, BATCH_SIZE)
            if len(batch) == BATCH_SIZE < len(watches):
                # All that is ready belongs in one batch: timers come after it.
                batch = self._epoll.poll(0, len(watches))
            for descriptor, events in batch:
                watch = watches.get(descriptor)  # None after a callback of this batch has closed it.
                if watch is None:
                    continue
                try:
                    if events & ERROR and watch.error_ready():
                        events &= ~ERROR  # noqa: PLW2901  # another name would cost every event an assignment
                    # As `Watch.tell`, without the cost of a call.
                    if events & READABLE and watch.interest & INPUT:
                        watch.read_ready()
                    if events & WRITABLE and watch.interest & WRITE:
                        watch.write_ready()
                except BaseException as exc:
                    failed(watch, exc)
            if self.always_ready:
                self.tell_always_ready(failed)
            return len(batch)

        def close(self) -> None:
            self._epoll.close()


def make_readiness_list() -> ReadinessList | None:
    """Return the list that this platform has, if it has one that can be waited for (Windows has none)."""
    if sys.platform == "linux":
        return EpollList()
    return SelectorList() if hasattr(selectors.DefaultSelector, "fileno") else None
