"""A non-blocking datagram socket of ours, in the group's poller; and what a datagram transport asks of a channel."""

from __future__ import annotations

import errno
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .._poller import Poller
from .._selector import READ, WRITE
from ._polled import Polled
from ._receive_buffers import RECEIVE_SIZE, buffers
from ._socket import describe_socket, take_error_queue

if TYPE_CHECKING:
    from .._handles import TimerHandle


# The largest datagram that is received whole, in bytes: asyncio's figure. The rest of a larger one is lost.
DATAGRAM_SIZE = RECEIVE_SIZE

# Families whose datagrams may be larger, and where Linux returns the size of the whole datagram (MSG_TRUNC of recv(2)).
# Some other families refuse the flag.
TELLING_SIZE = {"AF_UNIX", "AF_NETLINK", "AF_PACKET"} if sys.platform == "linux" else set()

# For how long, in seconds, readiness is not looked at that was reported in vain: twice as long each time in a row.
FIRST_REST = 0.001
LONGEST_REST = 0.05


def rest_after(count: int) -> float:
    """Return for how long to rest when readiness has been reported in vain so many times in a row, in seconds."""
    return min(FIRST_REST * (1 << min(count - 1, 16)), LONGEST_REST)


def truncated(most: int) -> OSError:
    """Return the error of a datagram of which no more than `most` bytes were received: Windows raises the same."""
    return OSError(errno.EMSGSIZE, f"a datagram was dropped that is longer than the {most} bytes that are received")


# What a socket raises for an object that cannot be an address: the caller's mistake, and not the network's.
ADDRESS_ERRORS = (TypeError, ValueError, OverflowError)


class ChannelEnded(Exception):  # noqa: N818  # the end of a channel need not be an error
    """The channel will never move anything again; the cause is the `OSError` to tell of."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class DatagramChannel(ABC):
    """Moves datagrams without blocking, and says when it could move more.

    A call that cannot move anything now raises `BlockingIOError`. An `OSError` concerns one datagram, `ChannelEnded`
    all of them.
    """

    __slots__ = ()

    @abstractmethod
    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        """Remember whom to call; nothing is called before an interest is set."""

    @abstractmethod
    def set_reading(self, reading: bool) -> None:
        """Call `read_ready` whenever there is something to receive, or stop doing so."""

    @abstractmethod
    def set_writing(self, writing: bool) -> None:
        """Call `write_ready` whenever something can be sent, or stop doing so."""

    @abstractmethod
    def receive(self) -> tuple[bytes, Any]:
        """Return a datagram and where it came from."""

    @abstractmethod
    def send(self, data: bytes | bytearray | memoryview, address: Any, /) -> object:
        """Send a datagram, to the peer of a connected channel when `address` is `None`."""

    def queued_errors(self) -> list[OSError] | None:
        """Take the errors that the system keeps in a queue, `None` when there is nothing in it."""
        return []

    def rest(self, event: int, delay: float) -> None:  # noqa: B027  # an AnyIO channel's readiness is exact
        """Do not watch for `event`, `READ` or `WRITE`, for `delay` seconds: it was reported, and nothing could be done.

        `set_reading` and `set_writing` end it.
        """

    @abstractmethod
    def close(self, *, aborted: bool) -> None:
        """Give everything back."""

    @abstractmethod
    def extra_info(self) -> dict[str, Any]:
        """What `get_extra_info` of the transport knows."""


class DatagramSocketChannel(Polled, DatagramChannel):
    """Moves the datagrams of a non-blocking socket that the channel owns."""

    __slots__ = (
        "_buffer",
        "_call_later",
        "_info",
        "_receive_into",
        "_rests",
        "_socket",
        "_truncated_size",
        "remote_address",
        "send",
    )

    # The socket's own method: a call less for each datagram.
    send: Callable[[bytes | bytearray | memoryview, Any], object]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, poller: Poller, sock: socket.socket, call_later: Callable[..., TimerHandle]) -> None:
        super().__init__(poller, sock.fileno())
        self._socket = sock
        self._call_later = call_later
        self._rests: dict[int, TimerHandle] = {}
        self._info = describe_socket(sock)
        # Looked up once, and not for each datagram: of this thread, which is the group's.
        self._buffer = buffers.received
        self._receive_into: Callable[..., Any] = sock.recvfrom_into
        # A datagram that fills the buffer may be longer, where the system does not return its whole size.
        self._truncated_size = DATAGRAM_SIZE
        if getattr(sock.family, "name", None) in TELLING_SIZE:
            self._receive_into = partial(sock.recvfrom_into, flags=socket.MSG_TRUNC)
            self._truncated_size += 1
        if sock.family == getattr(socket, "AF_NETLINK", None):
            # The kernel is the peer of every netlink socket by default, and others can be sent to all the same.
            self.remote_address = None
            self.send = lambda data, address: sock.send(data) if address is None else sock.sendto(data, address)
        else:
            # The peer of a UNIX socket may have an empty name: that of a socket pair has.
            self.remote_address = self._info["peername"]
            # A connected socket refuses an address on some systems (EISCONN), even its peer's.
            self.send = sock.sendto if self.remote_address is None else lambda data, address: sock.send(data)

    def set_reading(self, reading: bool) -> None:
        self._end_rest(READ)
        super().set_reading(reading)

    def set_writing(self, writing: bool) -> None:
        self._end_rest(WRITE)
        super().set_writing(writing)

    def receive(self) -> tuple[bytes, Any]:
        buffer = self._buffer
        size, address = self._receive_into(buffer)
        if size >= self._truncated_size:
            raise truncated(DATAGRAM_SIZE)
        return buffer[:size].tobytes(), address

    def queued_errors(self) -> list[OSError] | None:
        return take_error_queue(self._socket)

    def rest(self, event: int, delay: float) -> None:
        self._set_interest(self.interest & ~event)
        self._rests[event] = self._call_later(delay, self._rested, event)

    def _rested(self, event: int) -> None:
        del self._rests[event]
        try:
            self._set_interest(self.interest | event)
        except OSError:  # The system watches as many descriptors as it may.
            self.rest(event, LONGEST_REST)

    def _end_rest(self, event: int) -> None:
        if self._rests:
            timer = self._rests.pop(event, None)
            if timer is not None:
                timer.cancel()

    def close(self, *, aborted: bool) -> None:
        self._poller.unregister(self)
        self._socket.close()

    def extra_info(self) -> dict[str, Any]:
        return self._info
