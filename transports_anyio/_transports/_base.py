"""What stream and datagram transports have in common: the protocol, flow control, and the end of the connection.

Holds: the transport's state and its one way to change, `_advance`; the one call of `connection_lost`.
May know: callbacks, errors, flow control, states, tasks and the interface of channels.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from logging import DEBUG
from typing import TYPE_CHECKING, Any, ClassVar

from .._callbacks import check_given_protocol
from .._errors import failed_callback, has_callback, log_debug, logger
from ._flow_control import DatagramBuffer, WriteBuffer, limits
from ._state import TRANSITIONS, State, check_transition
from ._tasks import ConnectionTasks, TaskOwner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .._callbacks import CallbackContext
    from .._channels._abc import Channel

# The number of writes to a lost connection from which on each is logged: asyncio's figure.
LOST_WRITES_BEFORE_WARNING = 5

# Module constants: looking up an enum's member costs more.
OPEN, CLOSING, SHUTTING_DOWN, LOST, UPGRADED, CLOSED = State

#: How `repr` names a state.
STATE_NAMES = {
    OPEN: "open",
    CLOSING: "closing",
    SHUTTING_DOWN: "closing",
    LOST: "closed",
    UPGRADED: "upgraded",
    CLOSED: "closed",
}


def noop(*_: object) -> None: ...


class ChannelTransport(TaskOwner, asyncio.BaseTransport):
    """A transport over one channel."""

    __slots__ = (
        "__dict__",  # asyncio's transports take attributes of the user's, too. It is created with the first one.
        "__weakref__",
        "_buffer",
        "_bytes_received",
        "_bytes_sent",
        "_callback_context",
        "_channel",
        "_context",
        "_on_lost",
        "_paused_protocol",
        "_protocol",
        "_state",
        "_tasks",
        "_write_blocked",
        "_write_error",
        "_writes_after_loss",
    )

    #: For the messages of errors.
    _kind: ClassVar[str]

    #: Narrower in each kind of transport.
    _buffer: Any
    _protocol: Any

    def __init__(
        self,
        callback_context: CallbackContext,
        channel: Channel,
        buffer: WriteBuffer | DatagramBuffer,
        protocol: Any,
        on_lost: Callable[[Any], None],
    ) -> None:
        # asyncio's `__init__` would only create a dictionary for extra info, which is the channel's.
        self._callback_context = callback_context
        self._context = callback_context.context
        self._channel: Any = channel
        self._on_lost = on_lost
        self._buffer = buffer
        self._state = OPEN
        # A write failed after some of it may have been sent: the connection ends with this error.
        self._write_error: BaseException | None = None
        self._writes_after_loss = 0
        self._bytes_received = 0
        self._bytes_sent = 0
        self._paused_protocol: Any = None  # The protocol whose `pause_writing` was called last, until it is resumed.
        self._tasks: ConnectionTasks | None = None
        self._update_write_blocked()
        self._use_protocol(protocol)
        channel.set_callbacks(self._read_ready, self._write_ready)

    # For the endpoint functions and the group

    def _start(self) -> None:
        """Call `connection_made`, then start reading. Raises `OSError` if the system cannot watch the channel."""
        log_debug(
            self._callback_context.group, "%r: connection made, with a %s", self, type(self._protocol).__qualname__
        )
        try:
            self._context.run(self._protocol.connection_made, self)
        except BaseException as exc:
            if self._callback_context.leaves(exc):
                self._lose(None, aborted=True)  # The caller gets the exception, and no transport.
            self._callback_failed(exc, "connection_made")
        if self._state is OPEN and not self._is_reading_paused():
            self._watch_input()

    def _is_reading_paused(self) -> bool:
        return False

    def _watch_input(self) -> None:
        """Start reading. Raises `OSError`, which `connection_lost` gets too, if the system cannot watch the channel."""
        try:
            self._channel.set_reading(True)
        except OSError as exc:  # ENOSPC: the system watches as many file descriptors as it may.
            self._broken(exc, "wait")
            raise

    def _abort(self) -> None:
        """End the connection at once: the end of the group calls this."""
        self.abort()

    def _request_shutdown(self) -> None:
        """Have the protocol end the connection if it has `shutdown_requested`, close the transport if not."""
        self._callback_context.call_soon(self._shutdown_requested)

    def _shutdown_requested(self) -> None:
        if self.is_closing():
            return
        if has_callback(self._protocol, "shutdown_requested"):
            self._call_protocol("shutdown_requested", from_channel=True)
        else:
            self.close()

    def _traffic(self) -> tuple[int, int, int]:
        """Return how many bytes were received, were sent, and are buffered."""
        return self._bytes_received, self._bytes_sent, self._buffer.size

    # Callbacks of the channel

    @abstractmethod
    def _read_ready(self) -> None:
        """Receive, and pass it to the protocol."""

    @abstractmethod
    def _write_ready(self) -> None:
        """Send what is buffered."""

    # State

    def _advance(self, to: State, why: str, *args: object) -> None:
        """Change the state, and log it with `why`. An illegal transition raises and changes nothing."""
        check_transition(TRANSITIONS, self._state, to)
        if logger.isEnabledFor(DEBUG):  # `log_debug` asks, too: a connection comes here four times.
            log_debug(self._callback_context.group, f"%r: {why}", self, *args)
        self._state = to
        if not self._write_blocked:  # It stays so: no later state permits more.
            self._update_write_blocked()

    def _update_write_blocked(self) -> None:
        """Set `_write_blocked`: whether writing has to check something before it may send."""
        self._write_blocked = self._state >= LOST or self._write_error is not None

    # Methods of every transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known under `name` (`socket`, `peername`, `sockname` …), or `default`."""
        return self._extra_info().get(name, default)

    def _extra_info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = self._channel.extra_info()
        return info

    def set_protocol(self, protocol: Any) -> None:
        """Make `protocol` the receiver of all later callbacks.

        Its `connection_made` is not called. If writing is paused, its `pause_writing` is called soon, and
        `resume_writing` when writing resumes. `is_writing_paused`, and `is_eof_received` of a stream, return what has
        happened before.

        Raises `TypeError` for an object that cannot be a protocol, such as a protocol class.

        Source: https://docs.python.org/3/library/asyncio-protocol.html#asyncio.BaseTransport.set_protocol
        """
        check_given_protocol(protocol, "set_protocol")
        self._use_protocol(protocol)

    def _use_protocol(self, protocol: Any) -> None:
        self._protocol = protocol
        if self._missed_pause:
            self._callback_context.call_soon(self._call_missed_pause)

    def get_protocol(self) -> Any:
        """Return the current protocol; `None` after its `connection_lost`, as in asyncio."""
        return self._protocol

    def is_closing(self) -> bool:
        """Return whether the transport is closing or closed."""
        return self._state is not OPEN or self._write_error is not None

    def abort(self) -> None:
        """Drop what is buffered and end with `connection_lost(None)`."""
        self._lose(None, aborted=True)

    def _force_close(self, exc: BaseException | None) -> None:
        """End with `connection_lost(exc)`: for `asyncio.sslproto`, which calls this."""
        self._lose(exc, aborted=True)

    # Flow control

    def get_write_buffer_size(self) -> int:
        """Return how many bytes are written but not yet sent."""
        size: int = self._buffer.size
        return size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the watermarks `(low, high)`, in bytes."""
        return self._buffer.low, self._buffer.high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the watermarks, in bytes, with immediate effect.

        `high` defaults to 64 KiB, or to four times `low`; `low` to a quarter of `high`. Raises `ValueError` unless
        `high >= low >= 0`.
        """
        self._buffer.low, self._buffer.high = limits(high, low)
        if self._state < LOST:
            self._update_flow()

    def is_writing_paused(self) -> bool:
        """Return whether writing is paused: `pause_writing` has been called or is about to be."""
        paused: bool = self._buffer.paused
        return paused

    def _update_flow(self, *, from_channel: bool = False) -> None:
        buffer = self._buffer
        if self._missed_pause and buffer.size <= buffer.low:
            self._call_flow("pause_writing", from_channel=from_channel)
            if self._state >= LOST or self._missed_pause:
                return
        name = buffer.crossed()
        if name is not None:
            self._call_flow(name, from_channel=from_channel)

    def _call_flow(self, name: str, *, from_channel: bool) -> None:
        self._paused_protocol = self._protocol if name == "pause_writing" else None
        log_debug(self._callback_context.group, "%r: %s()", self, name)
        if self._tasks is not None:
            self._tasks.changed.notify()
        self._call_protocol(name, from_channel=from_channel)

    @property
    def _missed_pause(self) -> bool:
        """Whether writing is paused and this protocol's `pause_writing` was not called: it was set later."""
        return self._buffer.paused and self._paused_protocol is not self._protocol

    def _call_missed_pause(self) -> None:
        if self._missed_pause and self._state < LOST:
            self._call_flow("pause_writing", from_channel=True)
            if self._state < LOST:
                self._update_flow(from_channel=True)

    def _call_protocol(self, name: str, *args: Any, from_channel: bool) -> None:
        """Call the callback `name`, from inside a method of the transport or from its channel."""
        # A method may be called in the connection's context, and a context cannot be entered twice.
        call = self._context.run if from_channel else self._callback_context.run_nested
        try:
            call(getattr(self._protocol, name), *args)
        except BaseException as exc:
            self._callback_failed(exc, name)

    # Errors

    def _drop_write(self) -> None:
        """Drop what was written to a connection that is lost, or that ends because a write has failed."""
        self._end_failed_write()
        self._writes_after_loss += 1
        if self._writes_after_loss >= LOST_WRITES_BEFORE_WARNING:
            logger.warning("%r: the connection is closed or lost, the data written to it is dropped", self)

    def _end_failed_write(self) -> None:
        """End the connection if a write has failed: an unknown part of it was sent, and nothing may follow it.

        The write calls this. If it could not, for a `RecursionError` or `MemoryError`, the next call or event does: the
        write sets `_write_error` and `_write_blocked` without calling a function.
        """
        exc = self._write_error
        if exc is None:
            return
        if self._callback_context.leaves(exc):
            self._lose(None, aborted=True)
            self._write_error = None  # It is raised once.
            raise exc
        if self._state < LOST:
            self._broken(exc, "write")
        else:  # A callback in the write has failed, and reporting that as well.
            self._callback_context.report(f"Fatal write error on {self._kind} transport", exc, self, self._protocol)
        self._write_error = None

    def _broken(self, exc: BaseException, doing: str) -> None:
        """End with `connection_lost(exc)`, or raise an exception that leaves through the group."""
        if self._callback_context.leaves(exc):
            raise exc
        # As asyncio: an `OSError` is only passed to `connection_lost`; other errors are reported too.
        log_debug(self._callback_context.group, "%r: %s failed: %r", self, doing, exc)
        self._lose(exc, aborted=True)
        if not isinstance(exc, OSError):
            self._callback_context.report(f"Fatal {doing} error on {self._kind} transport", exc, self, self._protocol)

    def _callback_failed(self, exc: BaseException, name: str) -> None:
        self._lose(exc if isinstance(exc, Exception) else None, aborted=True)
        self._report_callback(exc, name)

    def _task_failed(self, exc: BaseException, name: str) -> None:
        self._lose(exc if isinstance(exc, Exception) else None, aborted=True)
        self._report_task(exc, name)

    def _report_task(self, exc: BaseException, name: str) -> None:
        message = f"Fatal error: the task {name} of the connection failed."
        self._callback_context.report(message, exc, self, self._protocol)

    def _report_callback(self, exc: BaseException, name: str) -> None:
        if self._callback_context.leaves(exc):
            raise exc
        self._callback_context.report(failed_callback(self._protocol, name), exc, self, self._protocol)

    # The end of the connection

    def _lose(self, exc: BaseException | None, *, aborted: bool = False) -> None:
        """End the connection: schedule `connection_lost(exc)`, and stop sending and receiving."""
        before = self._state
        if before >= LOST:
            return
        try:
            if exc is None:
                self._advance(LOST, "aborted" if aborted else "connection lost")
            else:
                self._advance(LOST, "connection lost: %r", exc)
            # Before what else may raise: `connection_lost` has to be called.
            self._callback_context.call_soon(self._connection_lost, exc, aborted)
        except BaseException:  # At the recursion limit, for example: the next call tries again.
            self._state = before
            raise
        if self._tasks is not None:
            self._tasks.error = exc
        self._buffer.clear()
        self._channel.set_reading(False)
        self._channel.set_writing(False)

    def _connection_lost(self, exc: Exception | None, aborted: bool) -> None:
        try:
            if self._write_error is not None:
                self._end_failed_write()
            self._context.run(self._protocol.connection_lost, exc)
        except BaseException as error:
            self._report_callback(error, "connection_lost")
        finally:
            try:
                self._channel.close(aborted=aborted)
            finally:
                self._channel.set_callbacks(noop, noop)
                self._finish_loss()

    def _finish_loss(self) -> None:
        """Leave the group. No reference cycles: the protocol, which most likely refers to the transport, is dropped."""
        self._protocol = self._paused_protocol = self._write_error = None
        on_lost, self._on_lost = self._on_lost, noop
        try:
            self._advance(CLOSED, "closed")
        finally:
            self._end_tasks(partial(on_lost, self))

    def _is_lost(self) -> bool:
        return self._state >= LOST

    def _is_closed(self) -> bool:
        return self._state is CLOSED

    def _describe(self) -> list[str]:
        info = self._extra_info()
        parts = [type(self).__name__, STATE_NAMES[self._state]]
        parts += [f"{name}={info[name]!r}" for name in ("sockname", "peername", "pipe") if info.get(name)]
        parts.append(f"buffered={self._buffer.size}")
        if self._buffer.paused:
            parts.append("writing paused")
        return parts

    def __repr__(self) -> str:
        return f"<{' '.join(self._describe())}>"
