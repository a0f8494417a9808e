"""A TCP proxy that changes nothing: bytes, ends, resets and the pace of either side go through.

    python examples/tcp_proxy.py --backend trio --port 8888 example.org 80

Whoever sends faster than the other side reads is made to wait: `pause_writing` of one connection is `pause_reading`
of the other, so that the kernel's window closes, all the way back to the sender. What waits here is bounded by the
high-water mark and by what one receive brings.
"""

from __future__ import annotations

import socket
import struct

import _backend

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup, current_group


class Side(Protocol):
    """One of the two connections; what it receives belongs to the other."""

    transport: Transport
    other: Side

    def __init__(self) -> None:
        self.ended = False  # No more comes from the peer.
        self.peak = 0  # How many bytes for the peer have waited at most when its pace was too slow.

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        if self.other.ended:
            self.other.transport.close()
            return False  # Close this one too. Both flush what they still have.
        self.other.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        self.peak = max(self.peak, self.transport.get_write_buffer_size())
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None:
            self.other.transport.close()
        else:
            self.other.reset()

    def reset(self) -> None:
        """End the connection so that the peer learns of a failure, and takes it for no orderly end."""
        if not self.transport.is_closing():
            # With no time to linger, closing a socket sends a reset (SO_LINGER in tcp(7) and socket(7)).
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()


class Upstream(Side):
    """The connection that the proxy makes, for a client who waits."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.other = client

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.other.other = self
        if self.other.transport.is_closing():  # Not everybody waits.
            self.transport.close()
        else:
            self.other.transport.resume_reading()


class Client(Side):
    """A connection that the proxy has accepted. It is not read before there is somebody to read for."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self.host = host
        self.port = port

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        current_group().start_soon(self.connect)

    async def connect(self) -> None:
        try:
            await current_group().create_connection(lambda: Upstream(self), self.host, self.port)
        except OSError as exc:
            print(f"cannot reach {self.host}:{self.port}: {exc}", flush=True)
            self.reset()

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "other"):
            super().connection_lost(exc)


async def main(host: str, port: int, to_host: str, to_port: int) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(lambda: Client(to_host, to_port), host, port)
        for sock in server.sockets:
            print(f"passing {sock.getsockname()} on to {to_host}:{to_port}; Ctrl-C ends it", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    parser = _backend.make_parser("Pass TCP connections on to another server.")
    parser.add_argument("to_host", help="address of the server behind")
    parser.add_argument("to_port", type=int, help="port of the server behind")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.to_host, options.to_port)
