"""Helpers for the tests of datagrams: a protocol that records, peers, and endpoints that end with the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from support import GUARD, HOST, until

if TYPE_CHECKING:
    from typing_extensions import Self


class Endpoint(asyncio.DatagramProtocol):
    """Record datagrams, and answer if `echo` is set."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.transport: Any = None
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Any] = []
        self.flow: list[str] = []
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))
        if self.echo:
            self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.flow.append("pause")

    def resume_writing(self) -> None:
        self.flow.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    @property
    def data(self) -> list[bytes]:
        return [data for data, _ in self.received]


@contextmanager
def udp_peer(family: int = socket.AF_INET, host: str = HOST) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(socket.getaddrinfo(host, 0, family, socket.SOCK_DGRAM)[0][4])  # With its scope.
        sock.setblocking(False)
        yield sock


@contextmanager
def clogged_unix_peer(directory: Path) -> Iterator[socket.socket]:
    """A peer whose queue can be filled: UNIX datagrams wait, while UDP drops them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(directory / "peer"))
        sock.setblocking(False)
        yield sock


async def receive(sock: socket.socket, size: int = 65536) -> tuple[bytes, Any]:
    with anyio.fail_after(GUARD):
        while True:
            try:
                return sock.recvfrom(size)
            except BlockingIOError:
                await anyio.wait_readable(sock)


class Endpoints:
    """Make endpoints of a stack, and wait at the end until all are closed, on the oracle too."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.made: list[tuple[Any, Endpoint]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport, protocol in self.made:
            if not protocol.lost:  # asyncio's `abort` raises after the end
                transport.abort()
            await until(lambda protocol=protocol: protocol.lost)
            assert len(protocol.lost) == 1

    async def make(self, protocol: Any = None, **options: Any) -> tuple[Any, Any]:
        protocol = protocol or Endpoint()
        with anyio.fail_after(GUARD):
            transport, made = await self.group.create_datagram_endpoint(lambda: protocol, **options)
        assert made is protocol
        if isinstance(protocol, Endpoint):
            self.made.append((transport, protocol))
            await until(lambda: protocol.transport)
        return transport, protocol
