"""A server that did not make its sockets, run by a test: `python adopting.py BACKEND HOW [DESCRIPTOR]`."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import anyio

from transports_anyio import Protocol, Transport, TransportGroup

BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


class Echo(Protocol):
    transport: Transport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def main(how: str, fd: str = "0") -> None:
    async with TransportGroup() as group:
        if how in ("listener", "systemd"):
            if how == "systemd":
                assert os.environ["LISTEN_PID"] == str(os.getpid())
                assert os.environ["LISTEN_FDS"] == "1"
                fd = "3"
            server = await group.create_server(Echo, sock=socket.socket(fileno=int(fd)))
            await server.serve_forever()
            return
        sock = socket.socket(fileno=int(fd))
        if how == "received":
            _, (number,), _, _ = socket.recv_fds(sock, 1, 1)
            sock.close()
            sock = socket.socket(fileno=number)
        await group.connect_accepted_socket(Echo, sock)
        await group.wait_closed()


if __name__ == "__main__":
    backend, *arguments = sys.argv[1:]
    anyio.run(main, *arguments, **BACKENDS[backend])  # type: ignore[arg-type]
