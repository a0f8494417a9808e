"""Use a protocol on a socket that exists already; asyncio's documentation does the same with `loop.create_connection`.

    python examples/existing_socket.py --backend trio

The program has both ends of a socket pair. One gets a transport, so the group owns it and closes it. The other stays a
bare socket. It stands for the peer: a library, a parent process or systemd, which made the pair.
"""

from __future__ import annotations

import socket

import _backend

from transports_anyio import BaseTransport, Future, Protocol, Transport, TransportGroup


class OneMessage(Protocol):
    """Wait for one message, answer it, and close."""

    transport: Transport

    def __init__(self, on_con_lost: Future[None]) -> None:
        self.message = b""
        self.on_con_lost = on_con_lost

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.message = data
        self.transport.write(b"thank you")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_con_lost.set_result(None)


async def converse(message: bytes) -> tuple[bytes, bytes]:
    """Return what the protocol received, and what it answered."""
    ours, theirs = socket.socketpair()
    with theirs:
        async with TransportGroup() as group:
            on_con_lost = group.create_future()
            _, protocol = await group.create_connection(lambda: OneMessage(on_con_lost), sock=ours)
            theirs.send(message)
            await on_con_lost
            return protocol.message, theirs.recv(100)


async def main(message: str) -> None:
    received, answer = await converse(message.encode())
    print(f"received  {received.decode()!r}")
    print(f"answered  {answer.decode()!r}")


if __name__ == "__main__":
    parser = _backend.make_parser("Send a message through a socket that exists already.")
    parser.add_argument("message", nargs="?", default="Hello, is this an echo?", help="what to send")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.message)
