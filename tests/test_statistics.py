"""`TransportGroup.statistics`, and the `repr` of what a group has."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from support import Recorder, connected, fill, until

from transports_anyio import DatagramProtocol, SubprocessProtocol, TransportGroup

pytestmark = pytest.mark.anyio


async def test_statistics(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        empty = group.statistics()
        assert empty.open_transports == {}
        assert (empty.bytes_received, empty.bytes_sent, empty.bytes_buffered, empty.pending_timers) == (0, 0, 0, 0)
        server = await group.create_server(Recorder, "127.0.0.1", 0)
        endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, ("127.0.0.1", 0))
        timer = group.call_later(3600, print)
        async with connected(group) as (transport, protocol, peer):
            await peer.send(b"four")
            await protocol.wait_received(4)
            transport.write(b"seven!!")
            assert await peer.receive_exactly(7) == b"seven!!"
            now = group.statistics()
            assert now.open_transports == {"StreamTransport": 1, "DatagramTransport": 1}
            assert now.open_servers == 1
            assert now.pending_timers == 1
            assert (now.bytes_received, now.bytes_sent, now.bytes_buffered) == (4, 7, 0)
            written = fill(transport)
            buffered = transport.get_write_buffer_size()
            assert group.statistics().bytes_buffered == buffered
            assert group.statistics().bytes_sent == 7 + written - buffered
            transport.abort()
        await until(lambda: protocol.lost)
        timer.cancel()
        endpoint.sendto(b"12345", endpoint.get_extra_info("sockname"))
        await until(lambda: group.statistics().bytes_received == 9)
        endpoint.close()
        server.close()
        await group.wait_closed()
        after = group.statistics()
        assert after.open_transports == {}
        assert (after.bytes_received, after.bytes_sent) == (9, 7 + written - buffered + 5)
        assert after.open_servers == after.pending_timers == after.bytes_buffered == 0


async def test_children_count_what_goes_over_their_pipes(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(SubprocessProtocol, "cat")
        transport.get_pipe_transport(0).write(b"hello")
        await until(lambda: group.statistics().bytes_received == 5)
        assert group.statistics().bytes_sent == 5
        assert group.statistics().open_transports == {"SubprocessTransport": 1}


async def test_a_repr_tells_the_state(anyio_backend: Any) -> None:
    group = TransportGroup()
    assert "new" in repr(group)
    async with group:
        assert "open" in repr(group)
        async with connected(group) as (transport, protocol, peer):
            text = repr(transport)
            assert text.startswith("<StreamTransport open")
            assert repr(peer.socket.getsockname()) in text
            assert "buffered=0" in text
            transport.pause_reading()
            fill(transport, 1 << 17)
            assert "reading paused" in repr(transport)
            assert "writing paused" in repr(transport)
            assert f"buffered={transport.get_write_buffer_size()}" in repr(transport)
            transport.abort()
            await until(lambda: protocol.lost)
            assert "closed" in repr(transport)
        server = await group.create_server(Recorder, "127.0.0.1", 0)
        assert repr(server).startswith("<Server serving on [('127.0.0.1',")
        server.close()
        assert "closed" in repr(server)
        endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, family=socket.AF_INET)
        assert repr(endpoint).startswith("<DatagramTransport open")
    assert "closed" in repr(group)
