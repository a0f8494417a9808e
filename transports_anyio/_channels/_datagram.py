"""The channel of a datagram socket.

Holds: receiving and sending the datagrams of a non-blocking socket, and its error queue.
May know: the poller, selectors, sockets.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from .._poller import Poller
from .._selector import READ, WRITE
from ._abc import LONGEST_PAUSE, DatagramChannel
from ._polled import Polled
from ._receive_buffers import RECEIVE_SIZE, buffers
from ._socket import describe_socket, names_of, take_error_queue

if TYPE_CHECKING:
    from .._handles import TimerHandle


# The largest datagram that is received, in bytes: asyncio's figure. A larger one is dropped.
DATAGRAM_SIZE = RECEIVE_SIZE

# Families whose datagrams may be larger, and where Linux returns the size of the whole datagram (MSG_TRUNC of recv(2)).
# Some other families refuse the flag.
TELLING_SIZE = {"AF_UNIX", "AF_NETLINK", "AF_PACKET"} if sys.platform == "linux" else set()


def truncated(most: int) -> OSError:
    """Return the error for a datagram of more than `most` bytes: Windows raises the same."""
    return OSError(errno.EMSGSIZE, f"a datagram was dropped: it is longer than {most} bytes, the most that is received")


class DatagramSocketChannel(Polled, DatagramChannel):
    """Moves the datagrams of a non-blocking socket that the channel owns."""

    __slots__ = (
        "_buffer",
        "_call_later",
        "_info",
        "_pauses",
        "_receive_into",
        "_socket",
        "_truncated_size",
        "remote_address",
        "send",
    )

    # The socket's own method, which saves a call for each datagram.
    send: Callable[[bytes | bytearray | memoryview, Any], object]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, poller: Poller, sock: socket.socket, call_later: Callable[..., TimerHandle]) -> None:
        super().__init__(poller, sock.fileno())
        self._socket = sock
        self._call_later = call_later
        self._pauses: dict[int, TimerHandle] = {}
        self._info = describe_socket(sock, names_of(sock))
        # Looked up once, not for each datagram. It is this thread's, and the group stays in this thread.
        self._buffer = buffers.received
        self._receive_into: Callable[..., Any] = sock.recvfrom_into
        # A datagram that fills the buffer may be longer, where the system does not return its whole size.
        self._truncated_size = DATAGRAM_SIZE
        if getattr(sock.family, "name", None) in TELLING_SIZE:
            self._receive_into = partial(sock.recvfrom_into, flags=socket.MSG_TRUNC)
            self._truncated_size += 1
        if sock.family == getattr(socket, "AF_NETLINK", None):
            # The kernel is the peer of every netlink socket by default, but datagrams can be sent to others too.
            self.remote_address = None
            self.send = lambda data, address: sock.send(data) if address is None else sock.sendto(data, address)
        else:
            # The peer of a UNIX socket may have an empty name, as in a socket pair.
            self.remote_address = self._info["peername"]
            # A connected socket refuses an address on some systems (EISCONN), even its peer's.
            self.send = sock.sendto if self.remote_address is None else lambda data, address: sock.send(data)

    def set_reading(self, reading: bool) -> None:
        self._end_pause(READ)
        super().set_reading(reading)

    def set_writing(self, writing: bool) -> None:
        self._end_pause(WRITE)
        super().set_writing(writing)

    def receive(self) -> tuple[bytes, Any]:
        buffer = self._buffer
        size, address = self._receive_into(buffer)
        if size >= self._truncated_size:
            raise truncated(DATAGRAM_SIZE)
        return buffer[:size].tobytes(), address

    def queued_errors(self) -> list[OSError] | None:
        return take_error_queue(self._socket)

    def pause(self, event: int, delay: float) -> None:
        self._set_interest(self.interest & ~event)
        self._pauses[event] = self._call_later(delay, self._pause_over, event)

    def _pause_over(self, event: int) -> None:
        del self._pauses[event]
        try:
            self._set_interest(self.interest | event)
        except OSError:  # ENOSPC: the system watches as many file descriptors as it may.
            self.pause(event, LONGEST_PAUSE)

    def _end_pause(self, event: int) -> None:
        if self._pauses:
            timer = self._pauses.pop(event, None)
            if timer is not None:
                timer.cancel()

    def close(self, *, aborted: bool) -> None:
        self._poller.unregister(self)
        self._socket.close()

    def extra_info(self) -> Mapping[str, Any]:
        return self._info
