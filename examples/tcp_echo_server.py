"""A TCP server that sends back what it receives, on the backend of your choice.

    python examples/tcp_echo_server.py --backend trio

Talk to it with tcp_echo_client.py, with `nc 127.0.0.1 8888` or with `curl telnet://127.0.0.1:8888`.
"""

from __future__ import annotations

import _backend

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup


class Echo(Protocol):
    """Send all data back, and read only as fast as the peer reads."""

    transport: Transport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    # No eof_received: after the peer's end of file, the transport sends the rest and closes.


class AnnouncedEcho(Echo):
    """The same, and print which clients come and go."""

    peer: object = None

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.peer = transport.get_extra_info("peername")
        print(f"{self.peer} is here", flush=True)

    def connection_lost(self, exc: Exception | None) -> None:
        print(f"{self.peer} is gone" + (f": {exc!r}" if exc else ""), flush=True)


async def main(host: str, port: int) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(AnnouncedEcho, host, port)
        for sock in server.sockets:
            print(f"echoing on {sock.getsockname()}; Ctrl-C ends it", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    options = _backend.make_parser("Send back whatever comes in over TCP.").parse_args()
    _backend.run(options.backend, main, options.host, options.port)
