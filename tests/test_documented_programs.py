"""The programs of asyncio's documentation, in our words: only the name of what makes the connection is another.

Each runs on asyncio's own event loop and on groups.

Source: https://docs.python.org/3/library/asyncio-protocol.html#examples
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import anyio
import pytest
from network import needs_pipes
from support import GUARD, HOST, Stack

pytestmark = pytest.mark.anyio


class EchoServer(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


class EchoClient(asyncio.Protocol):
    """Sends a message, and ends a future when its connection is lost."""

    def __init__(self, message: str, on_con_lost: Any) -> None:
        self.message = message
        self.on_con_lost = on_con_lost
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        transport.write(self.message.encode())

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_con_lost.set_result(True)


async def test_a_tcp_client(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(EchoServer, HOST, 0)
        on_con_lost = group.create_future()
        transport, protocol = await group.create_connection(
            lambda: EchoClient("Hello World!", on_con_lost), *server.sockets[0].getsockname()
        )
        try:
            with anyio.fail_after(GUARD):
                await on_con_lost
        finally:
            transport.close()
        assert protocol.received == b"Hello World!"
        server.close()


class UDPEchoServer(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class UDPEchoClient(asyncio.DatagramProtocol):
    """Sends one datagram, and closes with the answer."""

    def __init__(self, message: str, on_con_lost: Any) -> None:
        self.message = message
        self.on_con_lost = on_con_lost
        self.received: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.sendto(self.message.encode())

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append(data.decode())
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_con_lost.set_result(True)


async def test_a_udp_client(stack: Stack) -> None:
    async with stack.open() as group:
        server, _ = await group.create_datagram_endpoint(UDPEchoServer, local_addr=(HOST, 0))
        on_con_lost = group.create_future()
        transport, protocol = await group.create_datagram_endpoint(
            lambda: UDPEchoClient("Hello World!", on_con_lost), remote_addr=server.get_extra_info("sockname")
        )
        try:
            with anyio.fail_after(GUARD):
                await on_con_lost
        finally:
            transport.close()
        assert protocol.received == ["Hello World!"]
        server.close()


class OneMessage(asyncio.Protocol):
    """Waits for data on a socket that exists already, then closes."""

    def __init__(self, on_con_lost: Any) -> None:
        self.on_con_lost = on_con_lost
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received = data
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_con_lost.set_result(True)


async def test_a_connected_socket(stack: Stack) -> None:
    async with stack.open() as group:
        ours, theirs = socket.socketpair()
        on_con_lost = group.create_future()
        transport, protocol = await group.create_connection(lambda: OneMessage(on_con_lost), sock=ours)
        group.call_soon(theirs.send, b"abc")
        try:
            with anyio.fail_after(GUARD):
                await on_con_lost
        finally:
            transport.close()
            theirs.close()
        assert protocol.received == b"abc"


class DateProtocol(asyncio.SubprocessProtocol):
    """Collects what a child prints, and ends a future when the child has ended and its pipes are closed."""

    def __init__(self, exit_future: Any) -> None:
        self.exit_future = exit_future
        self.output = bytearray()
        self.pipe_closed = False
        self.exited = False

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output.extend(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.pipe_closed = True
        self.end_if_complete()

    def process_exited(self) -> None:
        self.exited = True
        self.end_if_complete()

    def end_if_complete(self) -> None:
        if self.pipe_closed and self.exited:
            self.exit_future.set_result(True)


@needs_pipes
async def test_a_child_process(stack: Stack) -> None:
    code = "import datetime; print(datetime.date(2024, 2, 29))"
    async with stack.open() as group:
        exit_future = group.create_future()
        transport, protocol = await group.subprocess_exec(
            lambda: DateProtocol(exit_future), sys.executable, "-c", code, stdin=None, stderr=None
        )
        with anyio.fail_after(GUARD):
            await exit_future
        transport.close()
        assert bytes(protocol.output).split() == [b"2024-02-29"]
