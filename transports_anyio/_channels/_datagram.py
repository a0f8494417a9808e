"""A non-blocking datagram socket of ours, in the group's poller; and what a datagram transport asks of a channel."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from .._poller import Poller
from ._polled import Polled
from ._receive_buffers import buffers
from ._socket import describe_socket


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
    def open(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
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

    @abstractmethod
    def close(self, *, aborted: bool) -> None:
        """Give everything back."""

    @abstractmethod
    def extra_info(self) -> dict[str, Any]:
        """What `get_extra_info` of the transport knows."""


class DatagramSocketChannel(Polled, DatagramChannel):
    """Moves the datagrams of a non-blocking socket that the channel owns."""

    __slots__ = ("_buffer", "_info", "_receive_into", "_socket", "send")

    # The socket's own method: a call less for each datagram.
    send: Callable[[bytes | bytearray | memoryview, Any], object]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, poller: Poller, sock: socket.socket) -> None:
        super().__init__(poller, sock.fileno())
        self._socket = sock
        self._info = describe_socket(sock)
        # Looked up once, and not for each datagram: of this thread, which is the group's.
        self._buffer = buffers.received
        self._receive_into = sock.recvfrom_into
        # A connected socket refuses an address on some systems (EISCONN), even its peer's. The peer of a UNIX socket
        # may have an empty name: that of a socket pair has.
        connected = self._info["peername"] is not None
        self.send = (lambda data, address: sock.send(data)) if connected else sock.sendto

    def receive(self) -> tuple[bytes, Any]:
        buffer = self._buffer
        size, address = self._receive_into(buffer)
        return buffer[:size].tobytes(), address

    def close(self, *, aborted: bool) -> None:
        self._poller.release(self)
        self._socket.close()

    def extra_info(self) -> dict[str, Any]:
        return self._info
