"""AnyIO's datagram sockets, through one task that receives and one that sends."""

from __future__ import annotations

import errno
from typing import Any

from anyio.abc import ConnectedUDPSocket, ConnectedUNIXDatagramSocket, SocketAttribute, UDPSocket, UNIXDatagramSocket

from ._anyio import AnyIOChannel, as_os_error
from ._datagram import ChannelEnded, DatagramChannel
from ._socket import SocketView

AnyDatagramSocket = UDPSocket | ConnectedUDPSocket | UNIXDatagramSocket | ConnectedUNIXDatagramSocket


class AnyIODatagramChannel(AnyIOChannel, DatagramChannel):
    """Moves the datagrams of one of AnyIO's sockets."""

    __slots__ = ("_connected", "_socket", "remote_address")

    def __init__(self, datagram_socket: AnyDatagramSocket) -> None:
        if not isinstance(
            datagram_socket, (UDPSocket, ConnectedUDPSocket, UNIXDatagramSocket, ConnectedUNIXDatagramSocket)
        ):
            raise TypeError(f"one of AnyIO's datagram sockets was expected, got {datagram_socket!r}")
        super().__init__(datagram_socket)
        self._socket: Any = datagram_socket
        self._connected = isinstance(datagram_socket, (ConnectedUDPSocket, ConnectedUNIXDatagramSocket))
        self.remote_address = datagram_socket.extra(SocketAttribute.remote_address) if self._connected else None

    def receive(self) -> tuple[bytes, Any]:
        datagram: tuple[bytes, Any] | ChannelEnded = self._take_received()
        if isinstance(datagram, ChannelEnded):
            raise datagram
        return datagram

    def send(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if self._take_sent():
            return  # The datagram that is offered again has gone.
        if self._offered is None:
            self._offered = (bytes(data), address)
        raise BlockingIOError

    def extra_info(self) -> dict[str, Any]:
        return {
            "socket": SocketView(self._socket.extra(SocketAttribute.raw_socket)),
            "sockname": self._socket.extra(SocketAttribute.local_address),
            "peername": self.remote_address,
        }

    async def _receive_next(self) -> tuple[bytes, Any] | ChannelEnded:
        try:
            received = await self._socket.receive()
        except Exception as exc:
            error = exc if isinstance(exc, OSError) else exc.__cause__
            if isinstance(error, OSError) and error.errno != errno.EBADF:
                raise  # It concerns one datagram: nobody listened at the peer's port, say.
            # It would be the same the next time, and perhaps at once: another task receives from the socket, say.
            return ChannelEnded(as_os_error(exc))
        return (received, self.remote_address) if self._connected else received

    async def _send_offered(self, offered: tuple[bytes, Any]) -> int:
        data, address = offered
        if self._connected:
            await self._socket.send(data)
        elif isinstance(address, tuple):
            await self._socket.sendto(data, *address)
        else:
            await self._socket.sendto(data, address)
        return 1  # One datagram, which may be empty.

    def _send_failure(self, exc: BaseException) -> Exception:
        # An address that is none, as from a bare socket: it is the caller's mistake, and no matter of the network.
        return exc if isinstance(exc, (TypeError, ValueError, OverflowError)) else super()._send_failure(exc)

    def _ends(self, received: Any) -> bool:
        return isinstance(received, ChannelEnded)
