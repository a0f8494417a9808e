"""Send a message to tcp_echo_server.py and print what comes back, on the backend of your choice.

python examples/tcp_echo_client.py --backend uvloop "is this an echo?"
"""

from __future__ import annotations

import _backend

from transports_anyio import BaseTransport, Future, Protocol, Transport, TransportGroup


class Caller(Protocol):
    """Send one message and an end of file, and collect the answer until the server closes."""

    def __init__(self, message: str, on_con_lost: Future[Exception | None]) -> None:
        self.message = message
        self.answer = bytearray()
        self.on_con_lost = on_con_lost

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        transport.write(self.message.encode())
        transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self.answer += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_con_lost.set_result(exc)


async def main(host: str, port: int, message: str) -> None:
    async with TransportGroup() as group:
        on_con_lost = group.create_future()
        _, caller = await group.create_connection(lambda: Caller(message, on_con_lost), host, port)
        print(f"sent      {message!r}")
        error = await on_con_lost
        print(f"received  {caller.answer.decode(errors='replace')!r}")
        print("closed" + (f": {error!r}" if error else ""))


if __name__ == "__main__":
    parser = _backend.make_parser("Send a message over TCP and print the echo.")
    parser.add_argument("message", nargs="?", default="Hello, is this an echo?", help="what to send")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.message)
