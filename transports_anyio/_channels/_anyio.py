"""The base of channels over AnyIO objects: tasks receive and send, and errors become asyncio's.

Holds: the tasks, the timer that notices slow sends, and the translation of AnyIO's errors and typed attributes.
May know: `_errors`, `_handles`, `_waiters`, `anyio`.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Protocol, TypeGuard

import anyio
import anyio.lowlevel
from anyio import TypedAttributeProvider
from anyio.abc import AsyncResource

from .._errors import logger, safe_repr, should_propagate
from .._handles import ABSENT, TimerScheduler
from .._waiters import InterruptSafeEvent

# How long, in seconds, the orderly close of a stream may take (a TLS stream waits for the peer's close_notify). It is
# asyncio's default `ssl_shutdown_timeout`.
CLOSE_TIMEOUT = 30.0

# After how many seconds a send is slow, so that another task goes on receiving. It is noticed after twice as long at
# the latest. An abort waits this long for a send that is under way: it may be a TLS alert.
SLOW_SEND = 0.005

# For how many seconds after a slow send the task that receives does not send. Otherwise each message of a peer that
# does not read would hold up receiving for `SLOW_SEND`.
BACK_OFF = 1.0


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


class SlowSends:
    """Notices the sends that take long, with one timer for all channels of a group. It runs only during sends."""

    __slots__ = ("_began", "_entry", "_number", "_scheduler", "_ticks", "_when")

    def __init__(self, scheduler: TimerScheduler) -> None:
        self._scheduler = scheduler
        self._began: dict[AnyIOChannel, int] = {}  # The number of ticks when the channel began to send.
        self._ticks = 0
        # As a timer.
        self._when = 0.0
        self._number = 0
        self._entry = ABSENT

    @property
    def is_pending(self) -> bool:
        """Whether the timer is one of the scheduler's."""
        return self._entry > 0

    def begin(self, channel: AnyIOChannel) -> None:
        """Call `send_is_slow` of `channel` unless `end` is called soon."""
        self._began[channel] = self._ticks
        if self._entry == ABSENT:
            self._start()

    def end(self, channel: AnyIOChannel) -> None:
        self._began.pop(channel, None)

    def _start(self) -> None:
        scheduler = self._scheduler
        self._when = scheduler.clock.time() + SLOW_SEND
        scheduler.timers.push(self)
        scheduler.wait_at_most_until(self._when)

    def __call__(self) -> None:
        began = self._began
        slow = [channel for channel, ticks in began.items() if ticks < self._ticks]
        self._ticks += 1
        for channel in slow:
            del began[channel]
            channel.send_is_slow()
        if began:
            self._start()


class Owner(Protocol):
    """What a channel needs of the group."""

    poller: Any
    slow_sends: SlowSends

    def start_internal_task(self, async_function: Callable[[], Coroutine[Any, Any, None]], name: object = None) -> None:
        """Start a task."""
        ...


class AnyIOChannel:
    """The tasks of a channel. `run`, itself run in a task, lasts until the channel is closed.

    One task is enough most of the time: it receives, and before it waits for more it sends what the callback has
    written. A second one is started when something else writes while the first one waits, and when a send is slow: it
    receives then, and the first one goes on sending. From then on the two share the work.

    One item is moved at a time: a chunk of bytes or a datagram. An item that the receiving task sends next counts as
    sent at once (`_taken`), and its error is reported later, as with a socket. Every other item stays in the buffer of
    the transport, which offers it; a task sends it, and when the transport offers it again, it counts as sent.
    """

    __slots__ = (
        "_aborted",
        "_backs_off_until",
        "_closing",
        "_context",
        "_done",
        "_eof",
        "_has_sender",
        "_idle",
        "_offered",
        "_owner",
        "_read_ready",
        "_reading",
        "_received",
        "_receiver",
        "_receiver_sends",
        "_receiver_wanted",
        "_resource",
        "_scopes",
        "_second_ended",
        "_sending",
        "_sent",
        "_taken",
        "_write_ready",
        "_writing",
    )

    #: What the object can do.
    can_receive = True
    can_send = True

    def __init__(self, resource: AsyncResource, owner: Owner) -> None:
        self._resource = resource
        self._owner = owner
        # What the transport has asked for.
        self._reading: anyio.Event | bool = False  # An event while the receiving task is paused.
        self._writing = False
        self._eof = False  # The end of the stream is to be sent.
        self._done: Callable[[Exception | None, bool], None] | None = None  # For `shutdown`.
        self._closing = False
        self._aborted = False
        # What is being moved.
        self._received: Any = None  # An item that the transport has not taken yet, or an `OSError`.
        self._offered: Any = None
        self._taken = False  # The offered item counts as sent.
        self._sending = False  # A task sends, and goes on until nothing is left.
        self._sent: int | Exception = 0
        # The tasks.
        self._scopes: list[anyio.CancelScope] = []  # One around each.
        self._context: Context | None = None
        self._second_ended: InterruptSafeEvent | None = None
        self._idle: anyio.Event | None = None  # The sending task waits for it.
        self._has_sender = not self.can_receive  # One of the tasks sends.
        self._receiver_wanted = self.can_receive  # No task receives, the next one that looks is to do so.
        self._receiver = 0  # The number of the task that receives: how many have begun to receive.
        self._receiver_sends = self.can_receive  # The receiving task sends before it waits.
        self._backs_off_until = 0.0

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
        self._writing = writing
        if writing:
            self._send_soon()

    def _send_soon(self) -> None:
        """Have a task send what there is, unless one is going to look anyway."""
        if self._sending or self._receiver_sends:
            return
        self._wake_other()

    def _wake_other(self) -> None:
        """Have the task that does not receive look what there is to do. It is started if there is none."""
        if not self._has_sender:
            self._has_sender = True
            self._start_second()
        elif self._idle is not None:
            self._idle.set()
            self._idle = None

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
        self._done = None
        for scope in self._scopes:
            self._end(scope)

    def _end(self, scope: anyio.CancelScope) -> None:
        if self._sending or self._eof or self._offered is not None:
            # `_send_all` cancels the scope earlier, once everything is sent.
            scope.deadline = self._owner.poller.clock.time() + (SLOW_SEND if self._aborted else CLOSE_TIMEOUT)
        else:
            scope.cancel()

    # The tasks

    # The first three are no async functions, which would cost more for each message.

    @abstractmethod
    def _receive_item(self) -> Awaitable[Any]:
        """Return what waits for the next item."""

    @abstractmethod
    def _send_item(self, item: Any) -> Awaitable[None]:
        """Return what sends the item."""

    def _send_eof(self) -> Awaitable[None]:
        """Return what sends the end of the stream."""
        raise NotImplementedError

    @abstractmethod
    def _as_received(self, item: Any) -> Any:
        """Return an item as the transport gets it; `None` for one that it does not get. May raise `OSError`."""

    def _receive_failure(self, exc: BaseException) -> Any:
        """Return what the transport gets if a receive has failed."""
        return as_os_error(exc)

    @abstractmethod
    def _size_of(self, item: Any) -> int:
        """Return the size of an item that was sent."""

    def _send_failure(self, exc: BaseException) -> Exception:
        """Return the error that the transport gets if a send has failed."""
        return as_os_error(exc)

    @abstractmethod
    def _ends(self, failure: Any) -> bool:
        """Return whether nothing comes after what `_receive_failure` has returned."""

    @abstractmethod
    def _report_sent(self, error: Exception) -> None:
        """Report the error of an item that counts as sent already."""

    async def run(self, report: Callable[[Exception], None]) -> None:
        """Receive and send until `close`, then close the AnyIO object, and `report` an unexpected error of that."""
        self._context = copy_context()
        try:
            await self._run_task()
        finally:
            for scope in self._scopes:
                scope.cancel()
            if self._second_ended is not None:
                with anyio.CancelScope(shield=True):
                    await self._second_ended.wait()
            try:
                await self._close_resource()
            except Exception as exc:  # Of a class of the user's. It must not end the group.
                report(exc)

    def _start_second(self) -> None:
        assert self._context is not None  # `run` has begun: before, the receiving task is going to send.
        self._second_ended = InterruptSafeEvent()  # Not AnyIO's: asyncio code may call this, on trio.
        name = f"transports_anyio: {safe_repr(self._resource)}"
        self._context.run(self._owner.start_internal_task, self._run_second, name)

    async def _run_second(self) -> None:
        assert self._second_ended is not None
        try:
            await self._run_task()
        finally:
            self._second_ended.set()

    async def _run_task(self) -> None:
        with anyio.CancelScope() as scope:
            self._scopes.append(scope)
            if self._closing:  # Before this task ran.
                self._end(scope)
            while True:
                if self._receiver_wanted:
                    await self._receive()
                else:
                    await self._send()

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
        """Receive, and send what the callback has written. Return when another task has begun to receive."""
        self._receiver_wanted = False
        self._receiver = number = self._receiver + 1
        slow_sends = self._owner.slow_sends
        ended = False
        while True:
            if self._receiver_sends and not self._sending and self._has_something_to_send():
                if not ended:
                    slow_sends.begin(self)
                try:
                    await self._send_all()
                finally:
                    slow_sends.end(self)
                if self._receiver_wanted or self._receiver != number:
                    return
            self._receiver_sends = False
            if self._received is None:
                if ended:
                    break
                try:
                    self._received = self._as_received(await self._receive_item())
                except BaseException as exc:
                    if should_propagate(exc):
                        raise
                    self._received = self._receive_failure(exc)
                    ended = self._ends(self._received)
                if self._received is None:
                    await anyio.lowlevel.checkpoint()  # The stream may return empty chunks without ever waiting.
                    continue
            while not self._reading:  # Reading may be paused again before this task runs.
                self._reading = event = anyio.Event()
                await event.wait()
            self._receiver_sends = not self._backs_off_until or self._backed_off()
            self._read_ready()
            # A protocol with a small buffer, or one that has paused, takes the rest later.
        if self._has_sender:
            await anyio.sleep_forever()
        self._has_sender = True

    def _backed_off(self) -> bool:
        """Whether the receiving task may send again after a slow send."""
        if self._owner.poller.clock.time() < self._backs_off_until:
            return False
        self._backs_off_until = 0.0
        return True

    def send_is_slow(self) -> None:
        """Let another task receive, because the one that did so is still sending. `SlowSends` calls this."""
        self._backs_off_until = self._owner.poller.clock.time() + BACK_OFF
        self._receiver_sends = False
        self._receiver_wanted = True
        self._wake_other()

    async def _send(self) -> None:
        """Send what is written while the other task waits. Return when this task is to receive."""
        while not self._receiver_wanted:
            if self._sending or self._receiver_sends or not self._has_something_to_send():
                self._idle = event = anyio.Event()
                await event.wait()
            else:
                await self._send_all()

    def _has_something_to_send(self) -> bool:
        return self._offered is not None or self._writing or self._eof

    async def _send_all(self) -> None:
        """Send until nothing is left."""
        self._sending = True
        while True:
            offered = self._offered
            if offered is None:
                if self._writing:
                    self._write_ready()
                    continue
                if not self._eof:
                    break
            error: Exception | None = None
            try:
                if offered is not None:
                    await self._send_item(offered)
                else:
                    self._eof = False
                    await self._send_eof()
            except BaseException as exc:
                if should_propagate(exc):
                    raise
                error = self._send_failure(exc)
            self._offered = None
            if offered is not None and not self._taken:
                # The transport takes it when it offers the item again.
                self._sent = self._size_of(offered) if error is None else error
                continue
            self._taken = False
            if error is not None or self._done is not None:
                self._item_is_sent(error)
        self._sending = False
        if self._closing:
            for scope in self._scopes:
                scope.cancel()

    def _item_is_sent(self, error: Exception | None) -> None:
        """Note that what counts as sent is sent indeed, or has failed."""
        done, self._done = self._done, None
        if done is not None:
            done(error, False)
        elif error is not None:
            self._report_sent(error)
