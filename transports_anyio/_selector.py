"""Selectors: they report which of many file descriptors are ready.

Holds: what is registered for a file descriptor, the contract of selectors, and the selectors of the operating systems.
May know: `anyio`, `select`, `selectors`.

An epoll or kqueue file descriptor is itself readable when a file descriptor registered in it is ready. So one wait is
enough for any number of them, and one call that does not block returns all that are ready.
"""

from __future__ import annotations

import errno
import select
import selectors
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import TypeAlias

import anyio

READ: int = selectors.EVENT_READ
WRITE: int = selectors.EVENT_WRITE
#: The peer has hung up, and input does not matter. Systems that cannot tell the two apart report input as well.
HANGUP: int = 4

# `dispatch` calls it with a registration and the exception that one of its callbacks raised. If it raises, too, the
# rest of the batch is dropped.
Failed: TypeAlias = "Callable[[Registration, BaseException], None]"

# Of the file descriptors that move much data, a batch serves an eighth of those that are ready, and at least one: with
# a thousand of them, to look at all for each one would cost more than to serve it.
TURNS = 8

# How many batches without such a file descriptor end the search for them, which costs each event a little.
BATCHES_WITHOUT_BULK = 64

# The interests for which `read_ready` is called.
INPUT = READ | HANGUP

# The errors for a file descriptor that cannot be watched: it is always ready (`/dev/null`, for example), or the user
# has closed it, and the next call that uses it will raise.
UNWATCHED = {errno.EPERM, errno.EBADF, errno.ENOENT}


class Registration:
    """A file descriptor, the events it waits for, and the callbacks for them."""

    __slots__ = ("bulk_turns", "fd", "interest", "last_turn", "read_ready", "write_ready")

    #: Whether the file descriptor counts as always ready if the system refuses to watch it. If not, that is an error.
    ready_if_refused = True

    #: Whether the next registration of the same file descriptor replaces this one.
    gives_way = False

    read_ready: Callable[[], object]
    write_ready: Callable[[], object]

    def __init__(self, fd: int) -> None:
        self.fd: int = fd
        self.interest: int = 0  # A mask of `READ`, `WRITE` and `HANGUP`. Only selectors change it.
        #: How many of its next events wait for those of others: it has moved much data. See `SystemSelector.in_turn`.
        self.bulk_turns: int = 0
        self.last_turn: int = 0  # The number of its last turn.

    def error_ready(self) -> bool:
        """Take what keeps the file descriptor ready, but is neither read nor written, such as an error queue.

        Return whether there was anything. An error of the connection itself is reported again.
        """
        return False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of file descriptor {self.fd}>"

    def notify(self, mask: int) -> None:
        """Call the callbacks for the events in `mask`."""
        # The interest is looked up again for each event: a callback of the same batch may have changed it.
        if mask & READ and self.interest & INPUT:
            self.read_ready()
        if mask & self.interest & WRITE:
            self.write_ready()

    def notify_or_fail(self, mask: int, failed: Failed) -> None:
        """Call the callbacks for the events in `mask`, and pass to `failed` what they raise."""
        try:
            self.notify(mask)
        except BaseException as exc:
            failed(self, exc)


def selected(interest: int) -> int:
    """Return `interest` for a selector that knows no hang-ups: input stands for them."""
    return interest & WRITE | (READ if interest & INPUT else 0)


def call(function: Callable[..., object], *args: object) -> None:
    """Call `function(*args)`."""
    function(*args)


class Selector(ABC):
    """Registered file descriptors, whose callbacks `dispatch` calls in batches."""

    #: Whether tasks notice that a file descriptor is ready, so that `dispatch` knows it only after they have run.
    needs_tasks = False

    #: How many of the next batches to look through for registrations that have moved much data.
    bulk_batches = 0

    def __init__(self) -> None:
        #: The registration of each file descriptor, whatever it waits for. If the user closes a file descriptor that is
        #: registered, the system may reuse its number: the last registration of the number is the valid one.
        self.registrations: dict[int, Registration] = {}
        #: Registrations whose file descriptors the system does not watch: they count as ready.
        self.always_ready: set[Registration] = set()
        #: Calls functions that need the backend. On trio, asyncio code may run when an interest changes.
        self.as_backend: Callable[..., object] = call

    @abstractmethod
    def set_interest(self, registration: Registration, interest: int) -> None:
        """Wait for the events of `interest`, which differs from the present interest, or for none if it is 0.

        Raises `OSError` when the system watches as many file descriptors as it can.
        """

    @abstractmethod
    def dispatch(self, failed: Failed) -> int:
        """Call the callbacks of each file descriptor that is ready now, once; return how many were ready.

        What a callback raises is passed to `failed`, and the rest of the batch is still called.
        """

    @abstractmethod
    async def wait(self) -> None:
        """Wait until a file descriptor is ready."""

    def running(self) -> AbstractAsyncContextManager[object]:
        """Return the context in which `wait` may be called."""
        return nullcontext()

    def reopen(self) -> None:  # noqa: B027  # a selector of tasks cannot fail
        """Replace what the system has for this selector, after an error. It watches the same file descriptors.

        Raises `OSError` when there is no file descriptor for it. It watches nothing then, until another call succeeds.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the resources of the selector."""


class SystemSelector(Selector):
    """A selector of the operating system, which is itself a file descriptor.

    The system reports errors and hang-ups even for an empty interest, so a file descriptor without an interest is
    removed from it.
    """

    #: Whether `reopen` has failed, for lack of file descriptors for example.
    is_lost = False

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0  # How many turns `in_turn` has given.
        self.open()

    @abstractmethod
    def open(self) -> None:
        """Make an empty selector in the system."""

    def reopen(self) -> None:
        self.is_lost = True
        with suppress(OSError):  # Before `open`: if the user has closed it, the new one may get its number.
            self.close()
        self.open()
        self.is_lost = False
        for registration in self.registrations.values():
            interest, registration.interest = registration.interest, 0
            with suppress(OSError):  # The user has closed the file descriptor, too.
                self.set_interest(registration, interest)

    @abstractmethod
    def fileno(self) -> int:
        """Return the selector's file descriptor. It is readable when a registered one is ready."""

    @abstractmethod
    def add(self, fd: int, interest: int) -> None:
        """Watch a file descriptor. Raises `OSError` if it cannot be watched, and when the selector is full."""

    @abstractmethod
    def change(self, fd: int, interest: int) -> None:
        """Change the events a file descriptor is watched for. Raises `OSError` as `add` does."""

    @abstractmethod
    def remove(self, fd: int) -> None:
        """Stop watching a file descriptor, which may be closed already."""

    def set_interest(self, registration: Registration, interest: int) -> None:
        fd = registration.fd
        if registration in self.always_ready:
            if not interest:
                self.always_ready.discard(registration)
        elif self.registrations.get(fd) is not registration:
            if interest:
                self.always_ready.add(registration)  # The number was reused: its next call will raise.
        elif self.is_lost:
            pass  # `reopen` will watch the file descriptor.
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

    def notify_always_ready(self, failed: Failed) -> None:
        """Call the callbacks of the file descriptors that the system does not watch."""
        for registration in tuple(self.always_ready):
            registration.notify_or_fail(selected(registration.interest), failed)

    def in_turn(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return what to serve now of `ready`: pairs of a file descriptor and its events.

        Those that move much data come last and take turns: before the next of them, everything else that has become
        ready is served. So a small message waits for one large one, and not for a large one of each connection.
        """
        get = self.registrations.get
        served: list[tuple[int, int]] = []
        bulk: list[tuple[int, int, int]] = []  # The last turn of each first.
        for fd, events in ready:
            registration = get(fd)
            if registration is not None and registration.bulk_turns:
                bulk.append((registration.last_turn, fd, events))
            else:
                served.append((fd, events))
        if not bulk:
            self.bulk_batches -= 1
            return ready
        # The others stay ready, and the system reports them again.
        bulk.sort()
        for _, fd, events in bulk[: 1 + len(bulk) // TURNS]:
            registration = self.registrations[fd]
            registration.bulk_turns -= 1
            registration.last_turn = self._turn = self._turn + 1
            served.append((fd, events))
        return served

    async def wait(self) -> None:
        await anyio.wait_readable(self.fileno())

    @abstractmethod
    def block(self, seconds: float | None) -> None:
        """Let the thread wait until a file descriptor is ready, at most `seconds` (`None`: for as long as it takes)."""


class PlatformSelector(SystemSelector):
    """The selector that Python's `selectors` has for this platform: kqueue on BSD and macOS."""

    def open(self) -> None:
        self._platform_selector = selectors.DefaultSelector()
        # Only `SelectSelector` and `PollSelector`, which cannot be waited for, have no file descriptor.
        self._fd: int = self._platform_selector.fileno()  # type: ignore[attr-defined,unused-ignore]

    def fileno(self) -> int:
        return self._fd

    def add(self, fd: int, interest: int) -> None:
        with suppress(KeyError):  # Left over from a file descriptor that the user has closed.
            self._platform_selector.unregister(fd)
        self._platform_selector.register(fd, selected(interest))

    def change(self, fd: int, interest: int) -> None:
        self._platform_selector.modify(fd, selected(interest))

    def remove(self, fd: int) -> None:
        with suppress(KeyError):  # `modify` removes a file descriptor that it cannot change.
            self._platform_selector.unregister(fd)

    def dispatch(self, failed: Failed) -> int:
        registrations = self.registrations
        batch = [(key.fd, mask) for key, mask in self._platform_selector.select(0)]  # All that is ready.
        if self.bulk_batches and len(batch) > 1:
            batch = self.in_turn(batch)
        for fd, mask in batch:
            registration = registrations.get(fd)  # `None` if a callback of this batch has closed it.
            if registration is not None:
                registration.notify_or_fail(mask, failed)
        if self.always_ready:
            self.notify_always_ready(failed)
        return len(batch)

    def block(self, seconds: float | None) -> None:
        self._platform_selector.select(seconds)

    def close(self) -> None:
        with suppress(OSError):  # The user has closed its file descriptor.
            self._platform_selector.close()


# How many file descriptors one call of epoll asks for. The call allocates memory for all of them, so it asks for more
# only if as many are ready.
BATCH_SIZE = 256

if sys.platform == "linux":
    # epoll's events for each interest.
    EVENTS = tuple(
        (select.EPOLLIN if interest & READ else 0)
        | (select.EPOLLOUT if interest & WRITE else 0)
        | (select.EPOLLRDHUP if interest & HANGUP else 0)
        for interest in range(8)
    )

    # Errors and hang-ups are reported in both directions: the next call raises the error.
    READABLE = ~select.EPOLLOUT
    WRITABLE = ~select.EPOLLIN

    # An error alone. Where the connection has ended as well, the next call raises the error.
    ERROR: int = select.EPOLLERR
    ENDED: int = select.EPOLLHUP

    class EpollSelector(SystemSelector):
        """epoll without Python's `selectors`, which makes dispatching a third and adding a quarter dearer."""

        def open(self) -> None:
            self._epoll = select.epoll()

        def fileno(self) -> int:
            return self._epoll.fileno()

        def add(self, fd: int, interest: int) -> None:
            self._epoll.register(fd, EVENTS[interest])

        def change(self, fd: int, interest: int) -> None:
            self._epoll.modify(fd, EVENTS[interest])

        def remove(self, fd: int) -> None:
            try:  # `suppress` would cost about as much as the call, for each connection that ends.
                self._epoll.unregister(fd)
            except OSError:
                pass  # The user has closed the file descriptor, which also removes it.

        def dispatch(self, failed: Failed) -> int:
            registrations = self.registrations
            batch = self._epoll.poll(0, BATCH_SIZE)
            if len(batch) == BATCH_SIZE < len(registrations):
                # Timers run after the batch, so it needs all that is ready.
                batch = self._epoll.poll(0, len(registrations))
            if self.bulk_batches and len(batch) > 1:
                batch = self.in_turn(batch)
            for fd, events in batch:
                registration = registrations.get(fd)  # `None` if a callback of this batch has closed it.
                if registration is None:
                    continue
                try:
                    if events & ERROR and not events & ENDED and registration.error_ready():
                        events &= ~ERROR  # noqa: PLW2901  # another name would cost every event an assignment
                    # `Registration.notify` without the cost of a call.
                    if events & READABLE and registration.interest & INPUT:
                        registration.read_ready()
                    if events & WRITABLE and registration.interest & WRITE:
                        registration.write_ready()
                except BaseException as exc:
                    failed(registration, exc)
            if self.always_ready:
                self.notify_always_ready(failed)
            return len(batch)

        def block(self, seconds: float | None) -> None:
            self._epoll.poll(seconds, 1)

        def close(self) -> None:
            with suppress(OSError):  # The user has closed its file descriptor, which Python reports since 3.15.
                self._epoll.close()


def make_system_selector() -> SystemSelector | None:
    """Return the best selector of this platform, or `None` if it has none that can be waited for (Windows)."""
    if sys.platform == "linux":
        return EpollSelector()
    return PlatformSelector() if hasattr(selectors.DefaultSelector, "fileno") else None
