"""The interface of channels: what moves the bytes or datagrams of a transport.

Holds: the methods that transports call, and the errors that these raise.
May know: nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

    class SizedBuffer(Buffer, Sized, Protocol):
        """What `get_buffer` returns: `len` is at least 1, and its items may be larger than a byte."""


class Channel(ABC):
    """Moves data without blocking, and calls back when it could move more.

    Each channel translates errors to these: `BlockingIOError` when nothing can be moved now, another `OSError` for
    everything else.
    """

    __slots__ = ()

    @abstractmethod
    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        """Set the callbacks. They are called once `set_reading` or `set_writing` asks for it."""

    @abstractmethod
    def set_reading(self, reading: bool) -> None:
        """Start or stop calling `read_ready` whenever there is something to receive.

        Raises `OSError` when the system cannot watch the file descriptor.
        """

    def note_bulk(self) -> None:  # noqa: B027  # only what shares a thread with others has to
        """Let other connections go first the next time: much has been received, or sent."""

    @abstractmethod
    def set_writing(self, writing: bool) -> None:
        """Start or stop calling `write_ready` whenever something can be sent. Raises as `set_reading` does."""

    @abstractmethod
    def close(self, *, aborted: bool) -> None:
        """Release all resources. If `aborted`, skip the orderly shutdown."""

    @abstractmethod
    def extra_info(self) -> Mapping[str, Any]:
        """Return what `get_extra_info` of the transport knows now. It is still known after `close`."""


# Streams


class FileError(Exception):
    """A file cannot be sent, and the connection is as before. The cause is the `OSError` that says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class StreamChannel(Channel):
    """Moves bytes.

    An `OSError` other than `BlockingIOError` ends the connection. After a `send` that would block the same bytes are
    offered again, perhaps with more behind them.
    """

    __slots__ = ()

    is_two_way = True
    can_send = True
    can_write_eof = True
    can_send_file = False
    can_notice_hangup = False
    #: Whether what is written after `close` is dropped even while the rest is being sent, as in asyncio.
    drops_after_close = False

    @abstractmethod
    def receive(self) -> bytes:
        """Return what has arrived, at least one byte; `b""` at the end of the stream."""

    @abstractmethod
    def receive_into(self, buffer: SizedBuffer, /) -> int:
        """Receive into `buffer` and return the number of bytes; 0 at the end of the stream."""

    @abstractmethod
    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """Send from the start of `data` and return how many bytes were taken.

        They may be sent only after this has returned. If that fails, `write_ready` is called, and the next call raises
        the error.
        """

    @abstractmethod
    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        """Send from the start of `chunks`, as one, and return how many bytes were sent. `chunks` may be empty."""

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send up to `count` bytes of a file from `offset` on. Return how many were taken, 0 at the end of the file.

        Only where `can_send_file`. Raises `FileError` for a file that cannot be sent.
        """
        raise NotImplementedError

    @abstractmethod
    def send_eof(self) -> None:
        """Shut down the sending side."""

    def has_hung_up(self) -> bool:
        """Return whether the other end has stopped receiving. Only where `can_notice_hangup`."""
        raise NotImplementedError

    def shutdown(self, done: Callable[[Exception | None, bool], None]) -> bool:
        """Start an orderly shutdown, after everything was sent. Return whether it is complete.

        Otherwise `done` is called later, once: with the error if there was one, and whether the end of the stream was
        received. Neither `read_ready` nor `write_ready` is called from now on. `close` ends the shutdown at any time,
        and `done` is not called then.
        """
        return True


def joined(chunks: Iterable[bytes | memoryview], most: int) -> bytes | memoryview:
    """Return the first `most` bytes of `chunks` as one, for a channel that cannot send several chunks in one call."""
    some: list[bytes | memoryview] = []
    size = 0
    for chunk in chunks:
        some.append(chunk[: most - size])  # The whole chunk may be much larger, and would be copied each time.
        size += len(some[-1])
        if size == most:
            break
    return some[0] if len(some) == 1 else b"".join(some)


def copy_into(buffer: Buffer, data: bytes | memoryview) -> int:
    """Copy as much of `data` into `buffer` as there is room for. Return the number of bytes."""
    with memoryview(buffer).cast("B") as room:
        count = min(len(room), len(data))
        room[:count] = data[:count]
    return count


# Datagrams


#: What a `send` raises for an object that cannot be an address: a mistake of the caller, not an error of the network.
ADDRESS_ERRORS = (TypeError, ValueError, OverflowError)

# How long not to watch, in seconds, after the channel was reported ready and could move nothing. It doubles each time.
FIRST_PAUSE = 0.001
LONGEST_PAUSE = 0.05


def pause_after(count: int) -> float:
    """Return how long to pause, in seconds, after the channel was reported ready wrongly `count` times in a row."""
    return min(FIRST_PAUSE * (1 << min(count - 1, 16)), LONGEST_PAUSE)


class ChannelEnded(Exception):  # noqa: N818  # the end of a channel need not be an error
    """The channel will never move anything again. The cause is the `OSError` for `connection_lost`."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class DatagramChannel(Channel):
    """Moves datagrams.

    An `OSError` concerns one datagram, and `ChannelEnded` ends the endpoint.
    """

    __slots__ = ()

    #: How many datagrams one readiness event may receive: a flood costs less, and other connections do not wait long.
    #: Measured, in processor time for each datagram of a flood: 5.9 µs one by one, 3.8 by fours, 3.1 by sixteens, and
    #: no less by more.
    receives_at_once = 16

    @abstractmethod
    def receive(self) -> tuple[bytes, Any]:
        """Return a datagram and the address of its sender."""

    @abstractmethod
    def send(self, data: bytes | bytearray | memoryview, address: Any, /) -> object:
        """Send a datagram to `address`; to the peer of a connected channel if that is `None`.

        Raises one of `ADDRESS_ERRORS` for an object that cannot be an address.
        """

    def queued_errors(self) -> list[OSError] | None:
        """Empty the system's queue of errors. Return the errors in it; `None` if there was nothing in it."""
        return []

    def pause(self, event: int, delay: float) -> None:  # not needed where readiness is exact
        """Do not watch for `event`, `READ` or `WRITE`, for `delay` seconds: nothing could be moved.

        `set_reading` and `set_writing` end the pause.
        """
