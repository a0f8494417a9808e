"""Makers of connections whose ends are `TransportStream`s: one for each kind of transport."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import anyio
from anyio_streams import memory_streams
from support import HOST
from tls_support import NAME, Certificates

from transports_anyio import Protocol, TransportGroup, TransportStream
from transports_anyio.testing import memory_connection

Ends: TypeAlias = tuple[TransportStream, TransportStream]
Maker: TypeAlias = Callable[[TransportGroup, Certificates], AbstractAsyncContextManager[Ends]]


class Handing(Protocol):
    """A protocol that hands its connection over as soon as it is made."""

    def __init__(self, streams: list[TransportStream]) -> None:
        self.streams = streams

    def connection_made(self, transport: Any) -> None:
        self.streams.append(TransportStream(transport))


async def connect(group: TransportGroup, server: Any, accepted: list[TransportStream], make_client: Any) -> Ends:
    transport, _ = await make_client()
    while not accepted:
        await anyio.sleep(0.001)
    server.close()
    return TransportStream(transport), accepted[0]


@asynccontextmanager
async def tcp(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    accepted: list[TransportStream] = []
    server = await group.create_server(lambda: Handing(accepted), HOST, 0)
    address = server.sockets[0].getsockname()
    yield await connect(group, server, accepted, lambda: group.create_connection(Protocol, *address))


@asynccontextmanager
async def tls(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    accepted: list[TransportStream] = []
    server = await group.create_server(lambda: Handing(accepted), HOST, 0, ssl=certificates.server())
    address = server.sockets[0].getsockname()
    options: dict[str, Any] = {"ssl": certificates.client(), "server_hostname": NAME}
    yield await connect(group, server, accepted, lambda: group.create_connection(Protocol, *address, **options))


@asynccontextmanager
async def started_tls(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    """TLS that both ends start in the middle, after some text in the clear."""
    async with tcp(group, certificates) as (client, server):
        await client.send(b"STARTTLS\r\n")
        assert await server.receive() == b"STARTTLS\r\n"
        await server.send(b"220\r\n")
        assert await client.receive() == b"220\r\n"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: server.start_tls(certificates.server(), server_side=True))
            await client.start_tls(certificates.client(), server_hostname=NAME)
        yield client, server


@asynccontextmanager
async def unix(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    accepted: list[TransportStream] = []
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "socket")
        server = await group.create_unix_server(lambda: Handing(accepted), path)
        yield await connect(group, server, accepted, lambda: group.create_unix_connection(Protocol, path))


@asynccontextmanager
async def socket_pair(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    a, b = socket.socketpair()
    first, _ = await group.create_connection(Protocol, sock=a)
    second, _ = await group.create_connection(Protocol, sock=b)
    yield TransportStream(first), TransportStream(second)


@asynccontextmanager
async def memory(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    (a, _), (b, _) = await memory_connection(group, Protocol, Protocol)
    yield TransportStream(a), TransportStream(b)


@asynccontextmanager
async def anyio_stream(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    """AnyIO's memory streams below transports below streams."""
    ours, theirs = memory_streams()
    a, _ = await group.connect_stream(Protocol, ours)
    b, _ = await group.connect_stream(Protocol, theirs)
    yield TransportStream(a), TransportStream(b)


@asynccontextmanager
async def pipe(group: TransportGroup, certificates: Certificates) -> AsyncIterator[Ends]:
    """A writing and a reading end."""
    reader, writer = os.pipe()
    writing, _ = await group.connect_write_pipe(Protocol, os.fdopen(writer, "wb", 0))
    reading, _ = await group.connect_read_pipe(Protocol, os.fdopen(reader, "rb", 0))
    yield TransportStream(writing), TransportStream(reading)


TWO_WAY: dict[str, Maker] = {
    "tcp": tcp, "tls": tls, "started_tls": started_tls, "socket_pair": socket_pair, "memory": memory,
    "anyio_stream": anyio_stream,
}  # fmt: skip
ONE_WAY: dict[str, Maker] = {}
if sys.platform != "win32":
    TWO_WAY["unix"] = unix
    ONE_WAY["pipe"] = pipe

#: Those whose ends can send an end of file and go on receiving.
HALF_CLOSING = [name for name in TWO_WAY if name not in ("tls", "started_tls")]
EVERY = {**TWO_WAY, **ONE_WAY}
