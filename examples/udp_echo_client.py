"""Send a datagram to udp_echo_server.py and print what comes back, on the backend of your choice.

python examples/udp_echo_client.py --backend uvloop "is this an echo?"
"""

from __future__ import annotations

from typing import Any

import _backend
import anyio

from transports_anyio import BaseTransport, DatagramProtocol, DatagramTransport, Future, TransportGroup


class EchoClient(DatagramProtocol):
    def __init__(self, message: str, on_con_lost: Future[None]) -> None:
        self.message = message
        self.on_con_lost = on_con_lost

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, DatagramTransport)
        self.transport = transport
        print(f"sent      {self.message!r}")
        transport.sendto(self.message.encode())

    def datagram_received(self, data: bytes, addr: Any) -> None:
        print(f"received  {data.decode(errors='replace')!r}")
        self.transport.close()

    def error_received(self, exc: Exception) -> None:
        print(f"no answer: {exc}")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        print("closed")
        self.on_con_lost.set_result(None)


async def main(host: str, port: int, message: str) -> None:
    async with TransportGroup() as group:
        on_con_lost = group.create_future()
        await group.create_datagram_endpoint(lambda: EchoClient(message, on_con_lost), remote_addr=(host, port))
        with anyio.move_on_after(5):
            await on_con_lost


if __name__ == "__main__":
    parser = _backend.make_parser("Send a datagram and print the echo.")
    parser.add_argument("message", nargs="?", default="Hello, is this an echo?", help="what to send")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.message)
