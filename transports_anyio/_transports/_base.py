"""What every transport is, whatever it moves: its protocol, its watermarks, and its end.

Every way out goes through `_lose`, and `connection_lost` is called in one place.
"""

from __future__ import annotations

import asyncio
import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from .._callbacks import check_given_protocol
from .._errors import failed_callback, log_debug, logger
from ._flow_control import DatagramBuffer, WriteBuffer, limits

if TYPE_CHECKING:
    from .._callbacks import CallbackContext

# From this many writes after the connection was lost on, each is logged: asyncio's figure.
LOST_WRITES_BEFORE_WARNING = 5

# How many frames beyond the recursion limit there are for the end of a connection on which a write has failed by that
# limit: for the error to be reported and logged.
SPARE_FRAMES = 200


def noop(*_: object) -> None: ...


def take_spare_frames_back() -> None:
    sys.setrecursionlimit(sys.getrecursionlimit() - SPARE_FRAMES)


class AnyChannel(Protocol):
    """What every transport asks of its channel, of whatever kind."""

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None: ...
    def set_reading(self, reading: bool) -> None: ...
    def set_writing(self, writing: bool) -> None: ...
    def close(self, *, aborted: bool) -> None: ...
    def extra_info(self) -> dict[str, Any]: ...


class ChannelTransport(asyncio.BaseTransport):
    """A transport over one channel."""

    __slots__ = (
        "__dict__",  # The user's: asyncio's transports take attributes, too. It is made with the first one.
        "__weakref__",
        "_buffer",
        "_bytes_received",
        "_bytes_sent",
        "_call",
        "_callback_context",
        "_channel",
        "_closing",
        "_info",
        "_lost",
        "_on_lost",
        "_paused_protocol",
        "_protocol",
        "_writes_after_loss",
    )

    #: Narrower in each kind of transport.
    _buffer: Any
    _protocol: Any

    def __init__(
        self,
        callback_context: CallbackContext,
        channel: AnyChannel,
        buffer: WriteBuffer | DatagramBuffer,
        protocol: Any,
        on_lost: Callable[[Any], None],
    ) -> None:
        # asyncio's initialiser would only make a dictionary for extra info, which is the channel's to know.
        self._callback_context = callback_context
        self._call = callback_context.run
        self._channel: Any = channel
        self._on_lost = on_lost
        self._buffer = buffer
        self._info: dict[str, Any] = channel.extra_info()
        self._closing = False  # No more is read: `close`, `abort`, end of file or an error.
        self._lost = False  # `connection_lost` is scheduled or delivered.
        self._writes_after_loss = 0
        self._bytes_received = 0
        self._bytes_sent = 0
        self._paused_protocol: Any = None  # Which was paused last, until it is resumed.
        self._use_protocol(protocol)
        channel.set_callbacks(self._read_ready, self._write_ready)

    @abstractmethod
    def _read_ready(self) -> None:
        """Take what has arrived to the protocol."""

    @abstractmethod
    def _write_ready(self) -> None:
        """Send what is buffered."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known under `name` (`socket`, `peername`, `sockname` …), or `default`."""
        return self._info.get(name, default)

    def set_protocol(self, protocol: Any) -> None:
        """Give every later callback to `protocol`.

        Its `connection_made` is not called. If writing is paused, its `pause_writing` is, soon, and `resume_writing` as
        ever. `is_writing_paused`, and `is_eof_received` of a stream, tell it what has been so far.

        Raises `TypeError` for what can never be a protocol, such as a protocol class.

        Source: https://docs.python.org/3/library/asyncio-protocol.html#asyncio.BaseTransport.set_protocol
        """
        check_given_protocol(protocol, "set_protocol")
        self._use_protocol(protocol)

    def _use_protocol(self, protocol: Any) -> None:
        self._protocol = protocol
        if self._pause_is_news:
            self._callback_context.call_soon(self._tell_of_pause)

    def get_protocol(self) -> Any:
        """Return the current protocol; `None` after its `connection_lost`, as asyncio."""
        return self._protocol

    def is_closing(self) -> bool:
        """Whether the transport is closing or closed."""
        return self._closing

    def abort(self) -> None:
        """Drop what is buffered and end with `connection_lost(None)`."""
        self._lose(None, aborted=True)

    def _force_close(self, exc: BaseException | None) -> None:
        """End with `connection_lost(exc)`: for `asyncio.sslproto`, which calls this."""
        self._lose(exc, aborted=True)

    # The buffer

    def get_write_buffer_size(self) -> int:
        """Return how many bytes are written but not yet sent."""
        size: int = self._buffer.size
        return size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the watermarks `(low, high)`, in bytes."""
        return self._buffer.low, self._buffer.high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the watermarks, in bytes; it takes effect at once.

        `high` defaults to 64 KiB, or to four times `low`; `low` to a quarter of `high`. Raises `ValueError` unless
        `high >= low >= 0`.
        """
        self._buffer.low, self._buffer.high = limits(high, low)
        if not self._lost:
            self._update_flow()

    def traffic(self) -> tuple[int, int, int]:
        """Return how many bytes were received and sent, and how many wait."""
        return self._bytes_received, self._bytes_sent, self._buffer.size

    def is_writing_paused(self) -> bool:
        """Whether writing is paused: `pause_writing` has come, or is about to, and `resume_writing` will follow."""
        paused: bool = self._buffer.paused
        return paused

    def _update_flow(self, *, from_channel: bool = False) -> None:
        buffer = self._buffer
        if self._pause_is_news and buffer.size <= buffer.low:
            self._flow("pause_writing", from_channel=from_channel)
            if self._lost or self._pause_is_news:
                return
        name = buffer.crossed()
        if name is not None:
            self._flow(name, from_channel=from_channel)

    def _flow(self, name: str, *, from_channel: bool) -> None:
        self._paused_protocol = self._protocol if name == "pause_writing" else None
        log_debug(self._callback_context.group, "%r: %s()", self, name)
        self._call_protocol(name, from_channel=from_channel)

    @property
    def _pause_is_news(self) -> bool:
        """Whether writing was paused when the protocol was set, so that it has had no `pause_writing`."""
        return self._buffer.paused and self._paused_protocol is not self._protocol

    def _tell_of_pause(self) -> None:
        if self._pause_is_news and not self._lost:
            self._flow("pause_writing", from_channel=True)
            if not self._lost:
                self._update_flow(from_channel=True)

    def _call_protocol(self, name: str, *args: Any, from_channel: bool) -> None:
        """Make a callback that may come from inside a method of the transport, or from its channel."""
        # The caller of a method may be in the connection's context already, and a context cannot be entered twice.
        call = self._call if from_channel else self._callback_context.run_nested
        try:
            call(getattr(self._protocol, name), *args)
        except BaseException as exc:
            self._callback_failed(exc, name)

    def _drop_write(self) -> None:
        self._writes_after_loss += 1
        if self._writes_after_loss >= LOST_WRITES_BEFORE_WARNING:
            logger.warning("%r: the connection is closed or lost, the data written to it is dropped", self)

    def _write_failed(self, exc: BaseException, doing: str) -> None:
        """End the connection: it is not known how much was sent.

        For a `RecursionError` the caller has raised the recursion limit by `SPARE_FRAMES`, without calling a function.
        """
        if isinstance(exc, RecursionError):
            # Not here: the limit cannot be lowered to where it is reached.
            self._callback_context.call_soon(take_spare_frames_back)
        if self._callback_context.leaves(exc):
            self._lose(None, aborted=True)
        self._broken(exc, doing)

    @abstractmethod
    def _broken(self, exc: BaseException, doing: str) -> None:
        """End with `connection_lost(exc)`, or raise what leaves through the group."""

    # The end

    def _callback_failed(self, exc: BaseException, name: str) -> None:
        self._lose(exc if isinstance(exc, Exception) else None, aborted=True)
        self._report_callback(exc, name)

    def _report_callback(self, exc: BaseException, name: str) -> None:
        if self._callback_context.leaves(exc):
            raise exc
        self._callback_context.report(failed_callback(self._protocol, name), exc, self, self._protocol)

    def _lose(self, exc: BaseException | None, *, aborted: bool = False) -> None:
        if self._lost:
            return
        if exc is not None:
            log_debug(self._callback_context.group, "%r: lost by %r", self, exc)
        else:
            log_debug(self._callback_context.group, "%r: %s", self, "aborted" if aborted else "lost, all is flushed")
        self._lost = self._closing = True
        # Before all that may be interrupted: nobody else will do it.
        self._callback_context.call_soon(self._connection_lost, exc, aborted)
        self._buffer.clear()
        self._channel.set_reading(False)
        self._channel.set_writing(False)

    def _connection_lost(self, exc: Exception | None, aborted: bool) -> None:
        try:
            self._call(self._protocol.connection_lost, exc)
        except BaseException as error:
            self._report_callback(error, "connection_lost")
        finally:
            on_lost, self._on_lost = self._on_lost, noop
            try:
                self._channel.close(aborted=aborted)
            finally:
                # No cycles: the protocol, which most likely keeps the transport, goes with the last one to hold it.
                self._protocol = self._paused_protocol = None
                self._channel.set_callbacks(noop, noop)
                on_lost(self)

    def _state(self) -> str:
        return "closed" if self._lost else "closing" if self._closing else "open"

    def _describe(self) -> list[str]:
        parts = [type(self).__name__, self._state()]
        parts += [f"{name}={self._info[name]!r}" for name in ("sockname", "peername", "pipe") if self._info.get(name)]
        parts.append(f"buffered={self._buffer.size}")
        if self._buffer.paused:
            parts.append("writing paused")
        return parts

    def __repr__(self) -> str:
        return f"<{' '.join(self._describe())}>"
