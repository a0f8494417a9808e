"""What every channel over an AnyIO object has: a task that receives, a task that sends, and errors as asyncio's."""

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

# How long, in seconds, a stream may take to close in an orderly way (a TLS stream waits for the peer's close_notify):
# asyncio's default `ssl_shutdown_timeout`.
CLOSE_TIMEOUT = 30.0


def is_failure(exc: BaseException | None) -> TypeGuard[OSError]:
    """Whether `exc` can be passed on to a transport, which takes two kinds of `OSError` for "not now"."""
    return isinstance(exc, OSError) and not isinstance(exc, (BlockingIOError, InterruptedError))


def as_os_error(exc: BaseException) -> OSError:
    """Return what asyncio would say for an error of an AnyIO stream, with the cause attached."""
    if is_failure(exc):
        return exc
    cause: BaseException | None = exc.__cause__ or exc.__context__
    error: OSError
    if isinstance(exc, anyio.BrokenResourceError) and is_failure(cause):
        try:
            error = type(cause)(*cause.args)
        except Exception:  # A user's own, that takes something else.
            error = OSError(*cause.args)
    elif isinstance(exc, anyio.ClosedResourceError):
        error = ConnectionAbortedError(errno.ECONNABORTED, "the stream was closed by somebody else")
    elif isinstance(exc, anyio.BrokenResourceError):
        error = ConnectionResetError(errno.ECONNRESET, "the stream is broken")
    else:
        error = OSError(errno.EIO, f"the stream failed: {safe_repr(exc)}")
    error.__cause__ = exc
    return error


def typed_attributes(resource: TypedAttributeProvider, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the typed attributes that are `wanted` and available, by name.

    Never raises: an object that is closed, or whose peer has reset the connection, may not know its attributes any more
    (AnyIO raises `OSError` on asyncio, `AttributeError` on uvloop). Its next receive reports what has happened to it.
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
    """The tasks of a channel; `run` is its life and belongs in a task.

    `_receive_next` and `_send_offered` move one thing at a time. A send that is under way keeps its bytes in the
    transport's buffer: they are offered once, sent by the task, and taken when they are offered again.
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

    #: Which tasks there are.
    can_receive = True
    can_send = True

    def __init__(self, resource: AsyncResource, clock: Callable[[], float]) -> None:
        self._resource = resource
        self._clock = clock  # The backend's.
        self._reading: anyio.Event | bool = False  # An event while the receiving task waits to be let go.
        self._writing: anyio.Event | bool = False
        self._received: Any = None  # What no one has taken yet: data, or an `OSError`.
        self._offered: Any = None
        self._sent: int | Exception = 0
        self._closing = False
        self._aborted = False
        self._scope: anyio.CancelScope | None = None  # Around the tasks, which make it: it is the backend's.

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    # The transport's side: synchronous.

    def set_reading(self, reading: bool) -> None:
        if isinstance(self._reading, anyio.Event):
            if not reading:
                return  # The task waits already.
            self._reading.set()
        self._reading = reading

    def set_writing(self, writing: bool) -> None:
        if isinstance(self._writing, anyio.Event):
            if not writing:
                return  # The task waits already.
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
        """Return how much of what was offered has been sent since the last call."""
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
            scope.deadline = self._clock() + CLOSE_TIMEOUT  # `_send` ends the task after it, or this does.
        else:
            scope.cancel()

    def _eof_pending(self) -> bool:
        """Whether the sending task has yet to send the last thing, which an orderly end waits for."""
        return False

    # The tasks.

    @abstractmethod
    async def _receive_next(self) -> Any:
        """Wait for something, and return it."""

    @abstractmethod
    async def _send_offered(self, offered: Any) -> int:
        """Send what was offered, and return its size."""

    def _send_failure(self, exc: BaseException) -> Exception:
        """Return what the transport is told when nothing could be sent."""
        return as_os_error(exc)

    @abstractmethod
    def _ends(self, received: Any) -> bool:
        """Whether nothing comes after `received`."""

    async def run(self, report: Callable[[Exception], None]) -> None:
        """Receive and send until `close`; then close the AnyIO object, and `report` that it fails in its own way."""
        try:
            with anyio.CancelScope() as self._scope:
                if self._closing:  # Before this task had its turn.
                    self._end(self._scope)
                async with anyio.create_task_group() as tasks:
                    if self.can_receive:
                        tasks.start_soon(self._receive)
                    if self.can_send:
                        tasks.start_soon(self._send)
        finally:
            try:
                await self._close_resource()
            except Exception as exc:  # A user's own; the transport has ended, and no other has to.
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
        """What has to be closed one by one, because an interrupted close of the whole would leave some of it open."""
        return (self._resource,)

    async def _close_by(self, close: Callable[[], Awaitable[None]]) -> bool:
        try:
            await close()
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            # The connection has ended for the protocol; that the peer did not stay for the farewell is no news. A
            # forceful close, too, says so when a farewell was broken off before.
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
                while not self._reading:  # It may be turned off again before this task has its turn.
                    self._reading = event = anyio.Event()
                    await event.wait()
                self._read_ready()
                # A protocol whose buffer is small, or that paused, takes the rest later.

    async def _send(self) -> None:
        while True:
            # The transport does not wait for the farewell, and may have ended before this task has its turn.
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
                if self._writing:  # Or else the connection was lost in the meantime, and its buffer with it.
                    self._write_ready()
            else:  # The end of the stream, which nobody waits for.
                self._writing = False
            if self._closing and self._scope is not None:  # That was the farewell, whether it has worked or not.
                self._scope.cancel()
