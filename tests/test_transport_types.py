"""The transports that endpoint functions return have the types of `transports_anyio.abc`, at run time too."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest
from datagram_helpers import Endpoint
from network import needs_pipes
from support import HOST, Recorder, connected

from transports_anyio import SubprocessProtocol, TransportGroup, abc

pytestmark = pytest.mark.anyio


async def test_a_stream_transport(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group) as (transport, _, _):
        assert isinstance(transport, abc.Transport)
        assert isinstance(transport, abc.ReadTransport)
        assert isinstance(transport, abc.WriteTransport)
        assert isinstance(transport, asyncio.Transport)
        assert not transport.is_writing_paused()
        assert not transport.is_eof_received()


async def test_a_datagram_transport(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, _ = await group.create_datagram_endpoint(Endpoint, local_addr=(HOST, 0))
        assert isinstance(transport, abc.DatagramTransport)
        assert isinstance(transport, asyncio.DatagramTransport)
        assert not isinstance(transport, abc.Transport)
        transport.set_write_buffer_limits(high=8, low=4)
        assert transport.get_write_buffer_limits() == (4, 8)
        assert transport.get_write_buffer_size() == 0
        assert not transport.is_writing_paused()


@needs_pipes
async def test_transports_of_pipes_and_children(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb", 0) as read_file, os.fdopen(writing, "wb", 0) as write_file:
            reader, _ = await group.connect_read_pipe(Recorder, read_file)
            writer, _ = await group.connect_write_pipe(Recorder, write_file)
            assert isinstance(reader, abc.ReadTransport)
            assert isinstance(writer, abc.WriteTransport)
            child, _ = await group.subprocess_exec(SubprocessProtocol, "cat")
            assert isinstance(child, abc.SubprocessTransport)
            assert isinstance(child.get_pipe_transport(0), abc.WriteTransport)
            assert isinstance(child.get_pipe_transport(1), abc.ReadTransport)
            for transport in (reader, writer, child):
                transport.close()
            await group.wait_closed()


async def test_the_transport_of_an_accepted_socket(anyio_backend: Any) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with TransportGroup() as group:
            transport, _ = await group.connect_accepted_socket(Recorder, ours)
            assert isinstance(transport, abc.Transport)
