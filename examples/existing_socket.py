"""Give a socket that exists already a protocol; asyncio's documentation has the same for `loop.create_connection`.

    python examples/existing_socket.py --backend trio

Both ends of a pair of sockets are here. One gets a transport, and with it an owner: the group closes it. The other
stays a bare socket, and plays the part of a library, a parent process or systemd, which made the pair.
"""

from __future__ import annotations

import socket

import _backend
import anyio

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup


class OneMessage(Protocol):
    """Wait for the first that comes, thank for it, and hang up."""

    transport: Transport

    def __init__(self) -> None:
        self.message = b""
        self.finished = anyio.Event()

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.message = data
        self.transport.write(b"thank you")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.finished.set()


async def converse(message: bytes) -> tuple[bytes, bytes]:
    """Return what the protocol was told, and what came back."""
    ours, theirs = socket.socketpair()
    with theirs:
        async with TransportGroup() as group:
            _, protocol = await group.create_connection(OneMessage, sock=ours)
            theirs.send(message)
            await protocol.finished.wait()
            return protocol.message, theirs.recv(100)


async def main(message: str) -> None:
    told, answer = await converse(message.encode())
    print(f"received  {told.decode()!r}")
    print(f"answered  {answer.decode()!r}")


if __name__ == "__main__":
    parser = _backend.make_parser("Send a message through a socket that exists already.")
    parser.add_argument("message", nargs="?", default="Hello, is anybody there?", help="what to send")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.message)
