"""A UDP server that sends every datagram back, on the backend of your choice.

    python examples/udp_echo_server.py --backend trio

Talk to it with udp_echo_client.py or with `nc -u 127.0.0.1 8888`.
"""

from __future__ import annotations

from typing import Any

import _backend

from transports_anyio import BaseTransport, DatagramProtocol, DatagramTransport, TransportGroup


class EchoServer(DatagramProtocol):
    transport: DatagramTransport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, DatagramTransport)
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        print(f"received {data!r} from {addr}", flush=True)
        self.transport.sendto(data, addr)


async def main(host: str, port: int) -> None:
    async with TransportGroup() as group:
        transport, _ = await group.create_datagram_endpoint(EchoServer, local_addr=(host, port))
        print(f"echoing on {transport.get_extra_info('sockname')}; Ctrl-C ends it", flush=True)
        await group.wait_closed()


if __name__ == "__main__":
    options = _backend.make_parser("Send every datagram back.").parse_args()
    _backend.run(options.backend, main, options.host, options.port)
