"""Callbacks for file descriptors of the user's: `add_reader` and `add_writer`.

Needs from the event loop: its group's poller, and handles. Knows no transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._poller import Poller
from .._selector import READ, WRITE, Registration

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")


class Callbacks(Registration):
    """A file descriptor of the user's, and the handle of each direction that has a callback."""

    __slots__ = ("file", "handles")

    ready_if_refused = False
    gives_way = True  # To a transport, as in asyncio.

    def __init__(self, number: int, file: FileDescriptorLike) -> None:
        super().__init__(number)
        self.file = file
        self.handles: dict[int, asyncio.Handle] = {}

    def cancel(self, event: int) -> bool:
        """Cancel the callback of a direction, and return whether there was one."""
        handle = self.handles.pop(event, None)
        if handle is None:
            return False
        handle.cancel()
        return True


def descriptor_of(file: FileDescriptorLike) -> int:
    """Return the file descriptor of `file`, or -1 if it is closed. Raises asyncio's `ValueError` for what has none."""
    if isinstance(file, int):
        return file
    try:
        return int(file.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {file!r}") from None


class Readers(asyncio.AbstractEventLoop):
    """Readers and writers of an event loop, in the poller of its group."""

    if TYPE_CHECKING:
        # What the event loop has to have beside its public methods.
        _poller: Poller

        def _make_handle(self, callback: Callable[..., object], args: tuple[Any, ...]) -> asyncio.Handle: ...
        def _run_handle(self, handle: Any) -> None: ...

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[Unpack[Ts]], Any], *args: Unpack[Ts]) -> None:
        """Call `callback(*args)` in every event loop iteration in which `fd` can be read.

        It replaces the callback that `fd` has. Raises `RuntimeError` when a transport uses `fd`, `ValueError` for what
        is no file descriptor and has none, and `OSError` when the system cannot watch it (`PermissionError` for a file
        on a disk).

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.add_reader
        """
        self._ensure_fd_no_transport(fd)
        self._add_reader(fd, callback, *args)

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        """Remove the callback of `add_reader`, and return whether there was one. Raises as `add_reader` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.remove_reader
        """
        self._ensure_fd_no_transport(fd)
        return self._remove_reader(fd)

    def add_writer(self, fd: FileDescriptorLike, callback: Callable[[Unpack[Ts]], Any], *args: Unpack[Ts]) -> None:
        """Call `callback(*args)` in every event loop iteration in which `fd` can be written to, as `add_reader` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.add_writer
        """
        self._ensure_fd_no_transport(fd)
        self._add_writer(fd, callback, *args)

    def remove_writer(self, fd: FileDescriptorLike) -> bool:
        """Remove the callback of `add_writer`, as `remove_reader` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.remove_writer
        """
        self._ensure_fd_no_transport(fd)
        return self._remove_writer(fd)

    # What the `sock_*` methods use. asyncio's event loops have it too.

    def _ensure_fd_no_transport(self, fd: FileDescriptorLike) -> None:
        registration = self._poller.owner(descriptor_of(fd))
        if registration is not None:
            raise RuntimeError(f"File descriptor {fd!r} is used by transport {registration!r}")

    def _add_reader(self, fd: FileDescriptorLike, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        handle = self._make_handle(callback, args)
        registration = self._registration(fd, READ, handle)
        registration.read_ready = lambda: self._run_handle(handle)
        return handle

    def _add_writer(self, fd: FileDescriptorLike, callback: Callable[..., object], *args: Any) -> asyncio.Handle:
        handle = self._make_handle(callback, args)
        registration = self._registration(fd, WRITE, handle)
        registration.write_ready = lambda: self._run_handle(handle)
        return handle

    def _remove_reader(self, fd: FileDescriptorLike) -> bool:
        return self._unwatch(fd, READ)

    def _remove_writer(self, fd: FileDescriptorLike) -> bool:
        return self._unwatch(fd, WRITE)

    def _registration(self, fd: FileDescriptorLike, event: int, handle: asyncio.Handle) -> Callbacks:
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        poller = self._poller
        registration = self._callbacks_of(fd)
        if registration is None:
            registration = Callbacks(descriptor_of(fd), fd)
            poller.register(registration)
        registration.cancel(event)
        interest = registration.interest | event
        try:
            # Anew, because the file may have been closed: another one may have the number by now.
            if registration.interest:
                poller.set_interest(registration, 0)
            poller.set_interest(registration, interest)
        except BaseException:
            self._drop(registration)
            raise
        registration.file = fd
        registration.handles[event] = handle
        return registration

    def _unwatch(self, fd: FileDescriptorLike, event: int) -> bool:
        if self.is_closed():
            return False
        registration = self._callbacks_of(fd)
        if registration is None or not registration.cancel(event):
            return False
        if not registration.handles:
            self._poller.unregister(registration)
            return True
        try:
            self._poller.set_interest(registration, registration.interest & ~event)
        except OSError:  # It has been closed: nothing will be reported, but the other callback can be removed, too.
            self._poller.set_interest(registration, 0)
        return True

    def _callbacks_of(self, fd: FileDescriptorLike) -> Callbacks | None:
        registrations = self._poller.registrations
        number = descriptor_of(fd)
        if number >= 0:
            registration = registrations.get(number)
            return registration if isinstance(registration, Callbacks) else None
        for registration in registrations.values():  # A closed file no longer knows its file descriptor.
            if isinstance(registration, Callbacks) and registration.file is fd:
                return registration
        raise ValueError(f"Invalid file descriptor: {number}")

    def _drop(self, registration: Callbacks) -> None:
        for event in (READ, WRITE):
            registration.cancel(event)
        self._poller.unregister(registration)

    def _remove_readers(self) -> None:
        """Take out every file descriptor: the event loop ends."""
        for registration in tuple(self._poller.registrations.values()):
            if isinstance(registration, Callbacks):
                self._drop(registration)
