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
Failed: TypeAlias = "Callable[[Registration, BaseException], None]"

# What calls `read_ready`.
INPUT = READ | HANGUP

# What the system says of a descriptor that need not be watched: it is always ready (`/dev/null`, for example), or
# somebody has closed it behind our back, which whoever reads or writes next will learn.
UNWATCHED = {errno.EPERM, errno.EBADF, errno.ENOENT}


class Registration:
    """A descriptor, what it waits for, and whom to call when it is ready."""

    __slots__ = ("fd", "interest", "read_ready", "write_ready")

    #: Whether it counts as always ready if the system refuses to watch it. If not, that is an error.
    ready_if_refused = True

    #: Whether the next owner of the descriptor takes it over.
    gives_way = False

    read_ready: Callable[[], object]
    write_ready: Callable[[], object]

    def __init__(self, fd: int) -> None:
        self.fd: int = fd
        self.interest: int = 0  # A mask of `READ`, `WRITE` and `HANGUP`, which only a poller changes.

    def error_ready(self) -> bool:
        """Take what keeps the descriptor ready and is met by neither reading nor writing: see `take_error_queue`.

        Return whether there was anything. If the connection has an error besides, that is reported again.
        """
        return False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of file descriptor {self.fd}>"

    def notify(self, mask: int) -> None:
        """Call whom it concerns that the descriptor is ready for what is in `mask`."""
        # The interest is looked at again for each half: a callback of this batch may have changed it.
        if mask & READ and self.interest & INPUT:
            self.read_ready()
        if mask & self.interest & WRITE:
            self.write_ready()

    def tell_or_fail(self, mask: int, failed: Failed) -> None:
        """As `tell`; what a callback raises is passed to `failed`."""
        try:
            self.notify(mask)
        except BaseException as exc:
            failed(self, exc)


def selected(interest: int) -> int:
    """Return what a selector, which knows of no hang-ups, is asked for instead of `interest`."""
    return interest & WRITE | (READ if interest & INPUT else 0)


class Selector(ABC):
    """Descriptors that stay registered, and are told by the batch.

    Errors and hang-ups are reported whatever the interest, so a descriptor with nothing to wait for is taken out
    instead of staying in with an empty interest.
    """

    def __init__(self) -> None:
        #: Whom every descriptor belongs to, whatever it waits for. Where somebody has closed one behind its owner's
        #: back, the system may give its number away once more: it belongs to the last one then.
        self.registrations: dict[int, Registration] = {}
        #: Whom the system does not watch.
        self.always_ready: set[Registration] = set()

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor of the list, which is readable when anybody in it is ready."""

    @abstractmethod
    def add(self, fd: int, interest: int) -> None:
        """Register a descriptor. Raises `OSError` for one that need not be watched, and when the list is full."""

    @abstractmethod
    def change(self, fd: int, interest: int) -> None:
        """Change what a descriptor is registered for. Raises `OSError` as `add`."""

    @abstractmethod
    def remove(self, fd: int) -> None:
        """Take out a descriptor, which may be closed already."""

    def set_interest(self, registration: Registration, interest: int) -> None:
        """Register `watch` for another interest than it has, or take it out. Raises `OSError` when the list is full."""
        fd = registration.fd
        if registration in self.always_ready:
            if not interest:
                self.always_ready.discard(registration)
        elif self.registrations.get(fd) is not registration:
            if interest:
                self.always_ready.add(registration)  # The number belongs to somebody else by now.
        elif not interest:
            self.remove(fd)
        else:
            try:
                (self.change if registration.interest else self.add)(fd, interest)
            except OSError as exc:
                if exc.errno not in UNWATCHED or not registration.ready_if_refused:
                    raise
                self.always_ready.add(registration)
        registration.interest = interest

    @abstractmethod
    def dispatch(self, failed: Failed) -> int:
        """Call the callbacks of every descriptor that is ready now, once; return how many the system has reported.

        What a callback raises is passed to `failed`, and the others of the batch are still called.
        """

    def notify_always_ready(self, failed: Failed) -> None:
        """Call everybody whom the system does not report."""
        for registration in tuple(self.always_ready):
            registration.tell_or_fail(selected(registration.interest), failed)

    @abstractmethod
    def close(self) -> None:
        """Give the list back."""


class PlatformSelector(Selector):
    """What `selectors` has for this platform: kqueue on BSD and macOS."""

    def __init__(self) -> None:
        super().__init__()
        self._platform_selector = selectors.DefaultSelector()
        # Every selector that can be waited for has it; `SelectSelector` and `PollSelector` have not.
        self._fd: int = self._platform_selector.fileno()  # type: ignore[attr-defined,unused-ignore]

    def fileno(self) -> int:
        return self._fd

    def add(self, fd: int, interest: int) -> None:
        with suppress(KeyError):  # What is left of one that somebody has closed behind its owner's back.
            self._platform_selector.unregister(fd)
        self._platform_selector.register(fd, selected(interest))

    def change(self, fd: int, interest: int) -> None:
        self._platform_selector.modify(fd, selected(interest))

    def remove(self, fd: int) -> None:
        with suppress(KeyError):  # `modify` takes out what it cannot change.
            self._platform_selector.unregister(fd)

    def dispatch(self, failed: Failed) -> int:
        registrations = self.registrations
        batch = self._platform_selector.select(0)  # All that is ready.
        for key, mask in batch:
            registration = registrations.get(key.fd)  # None after a callback of this batch has closed it.
            if registration is not None:
                registration.tell_or_fail(mask, failed)
        if self.always_ready:
            self.notify_always_ready(failed)
        return len(batch)

    def close(self) -> None:
        self._platform_selector.close()


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

    class EpollSelector(Selector):
        """epoll, called directly: through `selectors` a descriptor costs a third more to take, a quarter to add."""

        def __init__(self) -> None:
            super().__init__()
            self._epoll = select.epoll()

        def fileno(self) -> int:
            return self._epoll.fileno()

        def add(self, fd: int, interest: int) -> None:
            self._epoll.register(fd, EVENTS[interest])

        def change(self, fd: int, interest: int) -> None:
            self._epoll.modify(fd, EVENTS[interest])

        def remove(self, fd: int) -> None:
            try:  # Not `suppress`: every connection that ends comes here, and it would cost about as much as the call.
                self._epoll.unregister(fd)
            except OSError:
                pass  # Whoever has closed the descriptor behind our back has taken it out.

        def dispatch(self, failed: Failed) -> int:
            registrations = self.registrations
            batch = self._epoll.poll(0, BATCH_SIZE)
            if len(batch) == BATCH_SIZE < len(registrations):
                # All that is ready belongs in one batch: timers come after it.
                batch = self._epoll.poll(0, len(registrations))
            for fd, events in batch:
                registration = registrations.get(fd)  # None after a callback of this batch has closed it.
                if registration is None:
                    continue
                try:
                    if events & ERROR and registration.error_ready():
                        events &= ~ERROR  # noqa: PLW2901  # another name would cost every event an assignment
                    # As `Watch.tell`, without the cost of a call.
                    if events & READABLE and registration.interest & INPUT:
                        registration.read_ready()
                    if events & WRITABLE and registration.interest & WRITE:
                        registration.write_ready()
                except BaseException as exc:
                    failed(registration, exc)
            if self.always_ready:
                self.notify_always_ready(failed)
            return len(batch)

        def close(self) -> None:
            self._epoll.close()


def make_selector() -> Selector | None:
    """Return the list that this platform has, if it has one that can be waited for (Windows has none)."""
    if sys.platform == "linux":
        return EpollSelector()
    return PlatformSelector() if hasattr(selectors.DefaultSelector, "fileno") else None
