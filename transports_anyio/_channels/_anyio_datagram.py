"""A channel over one of AnyIO's datagram sockets.

Holds: the channel.
May know: `_abc`, `_anyio`, `_datagram`, `_socket`, `anyio`.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Mapping
from operator import index
from typing import Any

import anyio
import anyio.lowlevel
from anyio.abc import ConnectedUDPSocket, ConnectedUNIXDatagramSocket, SocketAttribute, UDPSocket, UNIXDatagramSocket

from ._abc import ADDRESS_ERRORS, ChannelEnded, DatagramChannel, pause_after
from ._anyio import AnyIOChannel, Owner, as_os_error, is_failure, typed_attributes
from ._datagram import truncated
from ._socket import transport_socket

# The highest port of UDP and TCP.
HIGHEST_PORT = 65535

AnyDatagramSocket = UDPSocket | ConnectedUDPSocket | UNIXDatagramSocket | ConnectedUNIXDatagramSocket

# The typed attribute of the socket behind each extra info of the transport.
EXTRA_INFO: dict[str, Any] = {
    "socket": SocketAttribute.raw_socket,
    "sockname": SocketAttribute.local_address,
    "peername": SocketAttribute.remote_address,
}


# How many bytes of a datagram AnyIO receives. It drops the rest without an error.
DATAGRAM_SIZE = 65536


class AnyIODatagramChannel(AnyIOChannel, DatagramChannel):
    """Moves the datagrams of one of AnyIO's sockets."""

    __slots__ = ("_connected", "_info", "_is_unix", "_raw_socket", "_sender", "_socket", "remote_address")

    receives_at_once = 1  # There is never more than one.

    def __init__(self, datagram_socket: AnyDatagramSocket, owner: Owner) -> None:
        if not isinstance(
            datagram_socket, (UDPSocket, ConnectedUDPSocket, UNIXDatagramSocket, ConnectedUNIXDatagramSocket)
        ):
            raise TypeError(f"one of AnyIO's datagram sockets was expected, got {datagram_socket!r}")
        super().__init__(datagram_socket, owner)
        self._socket: Any = datagram_socket
        self._connected = isinstance(datagram_socket, (ConnectedUDPSocket, ConnectedUNIXDatagramSocket))
        self._is_unix = isinstance(datagram_socket, (UNIXDatagramSocket, ConnectedUNIXDatagramSocket))
        self._info: dict[str, Any] = dict.fromkeys(EXTRA_INFO) | typed_attributes(datagram_socket, EXTRA_INFO)
        self._raw_socket: Any = self._info["socket"]
        if self._raw_socket is not None:
            self._info["socket"] = transport_socket(self._raw_socket)
        # AnyIO does not report every connected socket as connected: one made from a connected socket, for example.
        self.remote_address = self._info["peername"]
        self._sender: Any = None  # The sender of the last datagram.

    def receive(self) -> tuple[bytes, Any]:
        datagram: tuple[bytes, Any] | ChannelEnded = self._take_received()
        if isinstance(datagram, ChannelEnded):
            raise datagram
        return datagram

    def send(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if self._take_sent():
            return  # The offered datagram has been sent.
        if self._offered is None:
            is_answer = address is not None and address == self._sender
            if not is_answer and self.remote_address is None:
                self._check_address(address)
            self._offered = (bytes(data), address)
            # A UNIX socket may wait for its receiver for long.
            if is_answer and self._receiver_sends and not self._sending and not self._is_unix:
                self._taken = True
                return
        raise BlockingIOError

    def _check_address(self, address: Any) -> None:
        """Raise a socket's error for an invalid address. On asyncio, AnyIO's socket would be closed by it."""
        if self._is_unix:
            if not isinstance(address, (str, bytes)):
                raise TypeError(f"the path of a UNIX socket was expected, got {address!r}")
            return
        if not (isinstance(address, tuple) and len(address) == 2 and isinstance(address[0], str)):
            raise TypeError(f"a host and a port were expected, got {address!r}")
        port = index(address[1])
        if not 0 <= port <= HIGHEST_PORT:
            raise OverflowError(f"port must be 0-{HIGHEST_PORT}, got {port}")

    def extra_info(self) -> Mapping[str, Any]:
        return self._info

    def _receive_item(self) -> Awaitable[Any]:
        receiving: Awaitable[Any] = self._socket.receive()
        return receiving

    def _as_received(self, item: Any) -> tuple[bytes, Any]:
        datagram: tuple[bytes, Any] = (item, self.remote_address) if self._connected else item
        if len(datagram[0]) >= DATAGRAM_SIZE:
            raise truncated(DATAGRAM_SIZE)
        self._sender = datagram[1]
        return datagram

    def _receive_failure(self, exc: BaseException) -> OSError | ChannelEnded:
        error = exc if isinstance(exc, OSError) else exc.__cause__
        if isinstance(error, OSError) and error.errno != errno.EBADF:
            return as_os_error(exc)  # An error of one datagram: the peer's port is closed, for example.
        # The next receive would fail again, perhaps at once: another task receives from the socket, for example.
        return ChannelEnded(as_os_error(exc))

    def _send_item(self, item: tuple[bytes, Any]) -> Awaitable[None]:
        data, address = item
        sending: Awaitable[None]
        if self._connected:
            sending = self._socket.send(data)
        elif self._is_unix:
            sending = self._send_to_unix(data, address)
        else:
            sending = self._socket.sendto(data, *address)
        return sending

    def _size_of(self, item: tuple[bytes, Any]) -> int:
        return 1  # One datagram, which may be empty.

    async def _send_to_unix(self, data: bytes, address: Any) -> None:
        # AnyIO's method would spin: Linux reports the socket as writable even if its receiver's queue is full.
        await anyio.lowlevel.checkpoint()
        count = 0
        while True:
            try:
                if self.remote_address is None:
                    self._raw_socket.sendto(data, address)
                else:
                    self._raw_socket.send(data)  # The peer may have no name.
            except BlockingIOError:
                count += 1
                await anyio.sleep(pause_after(count))
            else:
                return

    def _send_failure(self, exc: BaseException) -> Exception:
        return exc if isinstance(exc, ADDRESS_ERRORS) else super()._send_failure(exc)

    def _report_sent(self, error: Exception) -> None:
        self._received = error if is_failure(error) else as_os_error(error)
        self._read_ready()

    def _ends(self, failure: OSError | ChannelEnded) -> bool:
        return isinstance(failure, ChannelEnded)
