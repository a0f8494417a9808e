"""The base of channels over AnyIO objects: a task receives, a task sends, and errors become asyncio's.

Holds: the two tasks, and the translation of AnyIO's errors and typed attributes.
May know: `_errors`, `anyio`.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

import anyio
from anyio import TypedAttributeProvider
from anyio.abc import AsyncResource

from .._errors import logger, safe_repr, should_propagate

# How long, in seconds, the orderly close of a stream may take (a TLS stream waits for the peer's close_notify). It is
# asyncio's default `ssl_shutdown_timeout`.
CLOSE_TIMEOUT = 30.0


def is_failure(exc: BaseException | None) -> TypeGuard[OSError]:
    """Return whether a transport takes `exc` for an error. It takes two kinds of `OSError` for "try again later"."""
    return isinstance(exc, OSError) and not isinstance(exc, (BlockingIOError, InterruptedError))


def as_os_error(exc: BaseException) -> OSError:
    """Return the `OSError` that stands for an error of an AnyIO stream, with that error as its cause."""
    if is_failure(exc):
        return exc
    cause: BaseException | None = exc.__cause__ or exc.__context__
    error: OSError
    if isinstance(exc, anyio.BrokenResourceError) and is_failure(cause):
        try:
            error = type(cause)(*cause.args)
        except Exception:  # A class of the user's with other parameters.
            error = OSError(*cause.args)
    elif isinstance(exc, anyio.ClosedResourceError):
        error = ConnectionAbortedError(errno.ECONNABORTED, "other code closed the stream")
    elif isinstance(exc, anyio.BrokenResourceError):
        error = ConnectionResetError(errno.ECONNRESET, "the stream is broken")
    else:
        error = OSError(errno.EIO, f"the stream failed: {safe_repr(exc)}")
    error.__cause__ = exc
    return error


def typed_attributes(resource: TypedAttributeProvider, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the `wanted` typed attributes that are available, by name.

    Never raises: the attributes of an object that is closed, or whose peer has reset the connection, may be unavailable
    (AnyIO raises `OSError` on asyncio, `AttributeError` on uvloop). The next receive raises the error of the object.
    """
    try:
        available = resource.extra_attributes
    except Exception as exc:
        logger.debug("the typed attributes of a %s cannot be read: %r", type(resource).__qualname__, exc)
        return {}
    values: dict[str, Any] = {}
    for name, attribute in wanted.items():
        if attribute in available:
            try:
                values[name] = available[attribute]()
            except Exception as exc:
                logger.debug("%s of a %s cannot be read: %r", name, type(resource).__qualname__, exc)
    return values


class AnyIOChannel:
    """The tasks of a channel. `run`, itself run in a task, starts them and lasts until the channel is closed.

    `_receive_next` and `_send_offered` move one item at a time: a chunk of bytes or a datagram. During a send the item
    stays in the transport's buffer. The transport offers it, the task sends it, and when the transport offers it again,
    it counts as sent.
    """

    __slots__ = (
        "_aborted",
        "_clock",
        "_closing",
        "_offered",
        "_read_ready",
        "_reading",
        "_received",
        "_resource",
        "_scope",
        "_sent",
        "_write_ready",
        "_writing",
    )

    #: Which of the two tasks are needed.
    can_receive = True
    can_send = True

    def __init__(self, resource: AsyncResource, clock: Callable[[], float]) -> None:
        self._resource = resource
        self._clock = clock  # The clock of the backend, not of an event loop on it.
        self._reading: anyio.Event | bool = False  # An event while the receiving task is paused.
        self._writing: anyio.Event | bool = False
        self._received: Any = None  # An item that the transport has not taken yet, or an `OSError`.
        self._offered: Any = None
        self._sent: int | Exception = 0
        self._closing = False
        self._aborted = False
        self._scope: anyio.CancelScope | None = None  # Surrounds the tasks; created by `run`.

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    # Called by the transport

    def set_reading(self, reading: bool) -> None:
        if isinstance(self._reading, anyio.Event):
            if not reading:
                return  # The task is already paused.
            self._reading.set()
        self._reading = reading

    def set_writing(self, writing: bool) -> None:
        if isinstance(self._writing, anyio.Event):
            if not writing:
                return  # The task is already paused.
            self._writing.set()
        self._writing = writing

    def _take_received(self) -> Any:
        received, self._received = self._received, None
        if received is None:
            raise BlockingIOError
        if isinstance(received, OSError):
            raise received
        return received

    def _take_sent(self) -> int:
        """Return how much of the offered item has been sent since the last call."""
        sent, self._sent = self._sent, 0
        if isinstance(sent, Exception):
            raise sent
        return sent

    def close(self, *, aborted: bool) -> None:
        self._closing = True
        self._aborted = aborted
        if self._scope is not None:
            self._end(self._scope)

    def _end(self, scope: anyio.CancelScope) -> None:
        if self._eof_pending() and not self._aborted:
            # `_send` cancels the scope earlier, once the end of file is sent.
            scope.deadline = self._clock() + CLOSE_TIMEOUT
        else:
            scope.cancel()

    def _eof_pending(self) -> bool:
        """Return whether the end of file is still to be sent, which an orderly close waits for."""
        return False

    # The tasks

    @abstractmethod
    async def _receive_next(self) -> Any:
        """Wait for the next item, and return it."""

    @abstractmethod
    async def _send_offered(self, offered: Any) -> int:
        """Send the offered item, and return its size."""

    def _send_failure(self, exc: BaseException) -> Exception:
        """Return the error that the transport gets if a send has failed."""
        return as_os_error(exc)

    @abstractmethod
    def _ends(self, received: Any) -> bool:
        """Return whether `received` is the last item."""

    async def run(self, report: Callable[[Exception], None]) -> None:
        """Receive and send until `close`, then close the AnyIO object, and `report` an unexpected error of that."""
        try:
            with anyio.CancelScope() as self._scope:
                if self._closing:  # Before this task ran.
                    self._end(self._scope)
                async with anyio.create_task_group() as tasks:
                    if self.can_receive:
                        tasks.start_soon(self._receive)
                    if self.can_send:
                        tasks.start_soon(self._send)
        finally:
            try:
                await self._close_resource()
            except Exception as exc:  # Of a class of the user's. It must not end the group.
                report(exc)

    async def _close_resource(self) -> None:
        if self._closing and not self._aborted:
            with anyio.move_on_after(CLOSE_TIMEOUT):
                if await self._close_by(self._resource.aclose):
                    return
        with anyio.CancelScope(shield=True):
            for part in self._parts():
                await self._close_by(partial(anyio.aclose_forcefully, part))

    def _parts(self) -> Iterable[AsyncResource]:
        """Return the objects to close one by one: a cancelled close of the whole may leave some open."""
        return (self._resource,)

    async def _close_by(self, close: Callable[[], Awaitable[None]]) -> bool:
        try:
            await close()
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            # The connection is over; a failed shutdown is not worth reporting. A forceful close also raises, if an
            # orderly shutdown was interrupted before.
            logger.debug("closing %s: %s", safe_repr(self._resource), safe_repr(exc))
            return False
        return True

    async def _receive(self) -> None:
        ended = False
        while not ended:
            if self._received is None:
                try:
                    self._received = await self._receive_next()
                except BaseException as exc:
                    if should_propagate(exc):
                        raise
                    self._received = as_os_error(exc)
            ended = self._ends(self._received)
            while self._received is not None:
                while not self._reading:  # Reading may be paused again before this task runs.
                    self._reading = event = anyio.Event()
                    await event.wait()
                self._read_ready()
                # A protocol with a small buffer, or one that has paused, takes the rest later.

    async def _send(self) -> None:
        while True:
            # The transport does not wait for the end of file to be sent: it may have closed already.
            if not self._writing and not self._eof_pending():
                self._writing = event = anyio.Event()
                await event.wait()
            offered = self._offered
            if offered is None:
                self._write_ready()
                continue
            try:
                self._sent = await self._send_offered(offered)
            except BaseException as exc:
                if should_propagate(exc):
                    raise
                self._sent = self._send_failure(exc)
            self._offered = None
            if self._sent:
                if self._writing:  # Otherwise the connection has been lost, and its buffer is empty.
                    self._write_ready()
            else:  # The end of file was sent, which no buffer waits for.
                self._writing = False
            if self._closing and self._scope is not None:
                self._scope.cancel()  # The end of file was the last item, even if sending it failed.
