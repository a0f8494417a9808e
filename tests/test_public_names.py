"""What users hold has asyncio's public names and the documented ones, and no others."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest
from network import needs_pipes
from support import HOST

from transports_anyio import DatagramProtocol, Protocol, Server, SubprocessProtocol, TransportGroup

pytestmark = pytest.mark.anyio

#: Documented, and not asyncio's.
OF_ALL = {"start_soon", "drain", "wait_closed"}
OF_WRITING = OF_ALL | {
    "is_writing_paused",
    "get_write_buffer_size",
    "get_write_buffer_limits",
    "set_write_buffer_limits",
}
OF_STREAMS = OF_WRITING | {"is_eof_received"}

#: What `Server` has beside the methods of asyncio's.
OF_SERVERS = {"shutdown", "statistics"}

#: What `TransportGroup` has beside the methods of asyncio's event loop.
OF_GROUPS = {
    "cancel_scope",
    "connect_datagram_socket",
    "connect_process",
    "connect_stream",
    "is_closing",
    "shutdown",
    "start_soon",
    "statistics",
    "wait_closed",
}

# asyncio has these since Python 3.13.
OF_SERVERS |= set() if sys.version_info >= (3, 13) else {"abort_clients", "close_clients"}


def public_names(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def check(thing: object, counterpart: type, more: set[str]) -> None:
    assert public_names(thing) - public_names(counterpart) - more == set()
    for name in more | public_names(counterpart):
        documented = getattr(type(thing), name, None)
        assert documented is None or documented.__doc__, name


async def test_stream_transports(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Protocol, HOST, 0)
        transport, _ = await group.create_connection(Protocol, *server.sockets[0].getsockname())
        check(transport, asyncio.Transport, OF_STREAMS)
        check(server, asyncio.Server, OF_SERVERS)
        server.close()
        transport.close()


@needs_pipes
async def test_pipe_transports(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        reading, writing = os.pipe()
        reader, _ = await group.connect_read_pipe(Protocol, os.fdopen(reading, "rb", 0))
        writer, _ = await group.connect_write_pipe(Protocol, os.fdopen(writing, "wb", 0))
        check(reader, asyncio.Transport, OF_STREAMS)
        check(writer, asyncio.Transport, OF_STREAMS)
        writer.close()


async def test_datagram_transports(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, _ = await group.create_datagram_endpoint(DatagramProtocol, local_addr=(HOST, 0))
        check(transport, asyncio.DatagramTransport, OF_WRITING)
        transport.close()


@needs_pipes
async def test_subprocess_transports(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(SubprocessProtocol, sys.executable, "-c", "")
        check(transport, asyncio.SubprocessTransport, OF_ALL | {"is_writing_paused", "shutdown"})
        transport.close()


async def test_groups_and_servers(anyio_backend: Any) -> None:
    assert public_names(TransportGroup) - public_names(asyncio.AbstractEventLoop) == OF_GROUPS
    assert public_names(Server) - public_names(asyncio.Server) == OF_SERVERS
