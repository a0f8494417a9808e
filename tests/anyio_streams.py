"""Pairs of bare AnyIO streams, connected with each other in memory, over TCP, over UNIX sockets or by TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import trustme
from anyio.abc import ByteReceiveStream, ByteSendStream, ByteStream, SocketStream, UNIXSocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSStream
from support import GUARD, HOST


class MemoryReceiver(ByteReceiveStream):
    """A user's stream over a memory object stream, with a limit on the size of each piece."""

    def __init__(self, items: MemoryObjectReceiveStream[bytes]) -> None:
        self.buffered = BufferedByteReceiveStream(items)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        return await self.buffered.receive(max_bytes)

    async def aclose(self) -> None:
        await self.buffered.aclose()


class MemorySender(ByteSendStream):
    def __init__(self, items: MemoryObjectSendStream[bytes]) -> None:
        self.items = items
        self.closed = 0

    async def send(self, item: bytes) -> None:
        await self.items.send(item)

    async def aclose(self) -> None:
        self.closed += 1
        await self.items.aclose()


def one_way(capacity: int = 0) -> tuple[MemorySender, MemoryReceiver]:
    sender, receiver = anyio.create_memory_object_stream[bytes](capacity)
    return MemorySender(sender), MemoryReceiver(receiver)


def memory_streams() -> tuple[StapledByteStream, StapledByteStream]:
    """Two ends that the caller closes."""
    to_b, from_a = one_way()
    to_a, from_b = one_way()
    return StapledByteStream(to_b, from_b), StapledByteStream(to_a, from_a)


@asynccontextmanager
async def memory_pair() -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    a, b = memory_streams()
    async with a, b:
        yield a, b


@asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        a = await anyio.connect_tcp(*listener.getsockname())
        accepted, _ = listener.accept()
    b = await SocketStream.from_socket(accepted)
    async with a, b:
        yield a, b


@asynccontextmanager
async def unix_pair() -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    a, b = [await UNIXSocketStream.from_socket(sock) for sock in socket.socketpair()]
    async with a, b:
        yield a, b


@asynccontextmanager
async def tls_pair(authority: trustme.CA) -> AsyncIterator[tuple[ByteStream, ByteStream]]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    wrapped: list[ByteStream] = []

    async def accept(stream: ByteStream) -> None:
        wrapped.append(await TLSStream.wrap(stream, server_side=True, ssl_context=server))

    async with tcp_pair() as (plain_a, plain_b):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(accept, plain_b)
            a = await TLSStream.wrap(plain_a, hostname="localhost", ssl_context=client)
        yield a, wrapped[0]


async def receive_exactly(stream: ByteReceiveStream, size: int) -> bytes:
    data = bytearray()
    with anyio.fail_after(GUARD):
        while len(data) < size:
            data += await stream.receive(min(65536, size - len(data)))
    return bytes(data)


async def receive_all(stream: ByteReceiveStream) -> bytes:
    data = bytearray()
    with anyio.fail_after(GUARD), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            data += await stream.receive()
    return bytes(data)
