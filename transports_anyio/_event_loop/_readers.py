"""Callbacks for file descriptors of the user: `add_reader` and `add_writer`.

Holds: a mixin class of the event loop. It needs the poller of the event loop, and handles.
May know: `asyncio`, `_poller`, `_selector`.
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
    """A file descriptor of the user, with a handle for each direction that has a callback."""

    __slots__ = ("file", "handles")

    ready_if_refused = False
    gives_way = True  # A transport may take the file descriptor over, as in asyncio.

    def __init__(self, number: int, file: FileDescriptorLike) -> None:
        super().__init__(number)
        self.file = file
        self.handles: dict[int, asyncio.Handle] = {}

    def cancel(self, event: int) -> bool:
        """Cancel the callback of a direction. Return whether there was one."""
        handle = self.handles.pop(event, None)
        if handle is None:
            return False
        handle.cancel()
        return True


def descriptor_of(file: FileDescriptorLike) -> int:
    """Return the file descriptor of `file`, or -1 if it is closed. Raises `ValueError` if `file` is no file."""
    if isinstance(file, int):
        return file
    try:
        return int(file.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {file!r}") from None


class Readers(asyncio.AbstractEventLoop):
    """The readers and writers of an event loop."""

    if TYPE_CHECKING:
        # The mixin class needs these of the event loop.
        _poller: Poller

        def _make_handle(self, callback: Callable[..., object], args: tuple[Any, ...]) -> asyncio.Handle: ...
        def _run_handle(self, handle: Any) -> None: ...

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[Unpack[Ts]], Any], *args: Unpack[Ts]) -> None:
        """Call `callback(*args)` in every event loop iteration in which `fd` can be read.

        It replaces the earlier callback of `fd`. Raises `RuntimeError` if a transport or a server uses `fd`,
        `ValueError` if `fd` is neither a file descriptor nor a file, and `OSError` if the system cannot watch it
        (`PermissionError` for a file on a disk).

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

    # The `sock_*` methods use these. asyncio's event loops have them, too.

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
            # Registered anew: the file may have been closed, and another one may have got its number.
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
        except OSError:  # The user has closed it. The other callback can still be removed.
            self._poller.set_interest(registration, 0)
        return True

    def _callbacks_of(self, fd: FileDescriptorLike) -> Callbacks | None:
        registrations = self._poller.registrations
        number = descriptor_of(fd)
        if number >= 0:
            registration = registrations.get(number)
            return registration if isinstance(registration, Callbacks) else None
        for registration in registrations.values():  # A closed file does not know its file descriptor any more.
            if isinstance(registration, Callbacks) and registration.file is fd:
                return registration
        raise ValueError(f"Invalid file descriptor: {number}")

    def _drop(self, registration: Callbacks) -> None:
        for event in (READ, WRITE):
            registration.cancel(event)
        self._poller.unregister(registration)

    def _remove_readers(self) -> None:
        """Remove every reader and writer, at the end of the event loop."""
        for registration in tuple(self._poller.registrations.values()):
            if isinstance(registration, Callbacks):
                self._drop(registration)
