"""A TCP proxy that passes on bytes, ends of file, resets and back-pressure in both directions.

    python examples/tcp_proxy.py --backend trio --port 8888 example.org 80

When one side sends faster than the other reads, `pause_writing` of one connection calls `pause_reading` of the other:
the TCP window closes all the way back to the sender. The proxy buffers at most the high watermark and one receive.
"""

from __future__ import annotations

import socket
import struct

import _backend

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup, current_group


class Side(Protocol):
    """One of the two connections; it passes what it receives to the other."""

    transport: Transport
    other: Side

    def __init__(self) -> None:
        self.ended = False  # The peer has sent its end of file.
        self.peak = 0  # The most bytes that were buffered for the peer when writing was paused.

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def eof_received(self) -> bool:
        self.ended = True
        if self.other.ended:
            self.other.transport.close()
            return False  # Close this one too. Both flush their buffers.
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
        """Reset the connection, so that the peer sees a failure and not an orderly end."""
        if not self.transport.is_closing():
            # Closing a socket with a linger time of 0 sends a reset (SO_LINGER in tcp(7) and socket(7)).
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()


class Upstream(Side):
    """The connection that the proxy makes to the server."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.other = client

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.other.other = self
        if self.other.transport.is_closing():  # The client has gone.
            self.transport.close()
        else:
            self.other.transport.resume_reading()


class Client(Side):
    """A connection that the proxy has accepted. Reading starts when the connection to the server is made."""

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
    parser.add_argument("to_host", help="address of the other server")
    parser.add_argument("to_port", type=int, help="port of the other server")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.to_host, options.to_port)
