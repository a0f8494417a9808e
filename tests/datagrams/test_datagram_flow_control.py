"""Datagram endpoints: datagrams that wait to be sent, and what becomes of them at the end."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from datagram_helpers import Endpoint, Endpoints, clogged_unix_peer, receive, udp_peer
from network import needs_unix
from support import HOST, Stack, capture_log, collect_contexts, leaves, settle, turns, until

pytestmark = pytest.mark.anyio


@needs_unix
@pytest.mark.ours_only("asyncio 3.13.0 never subtracts the size of the header", before=(3, 14, 10))
async def test_unsent_datagrams_wait_in_order(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            sent = [struct.pack("<I", number) * 256 for number in range(500)]
            mutable = bytearray()
            for data in sent:
                mutable[:] = data
                transport.sendto(mutable)
            assert transport.get_write_buffer_size() > 0
            assert protocol.flow == ["pause"]
            received = [(await receive(peer))[0] for _ in sent]
            assert received == sent
            await until(lambda: protocol.flow == ["pause", "resume"])
            assert transport.get_write_buffer_size() == 0


@needs_unix
async def test_new_datagrams_queue_after_waiting_ones(stack: Stack, tmp_path: Path) -> None:
    """The receiver has space again, and the transport has not run yet."""
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, _ = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            numbers = 0
            while transport.get_write_buffer_size() == 0:
                transport.sendto(struct.pack("<I", numbers))
                numbers += 1
            received = [peer.recv(4) for _ in range(numbers - 1)]
            transport.sendto(struct.pack("<I", numbers))
            received += [(await receive(peer))[0] for _ in range(2)]
            assert received == [struct.pack("<I", number) for number in range(numbers + 1)]


@needs_unix
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_nothing_is_received_after_close(stack: Stack, tmp_path: Path, end: str) -> None:
    """Neither a datagram that has already arrived, nor one that arrives while `close` flushes."""
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            ours = str(tmp_path / "ours")
            options = {"family": socket.AF_UNIX, "local_addr": ours, "remote_addr": peer.getsockname()}
            transport, protocol = await endpoints.make(**options)
            await turns()  # asyncio begins to receive in one of its own.
            while transport.get_write_buffer_size() == 0:
                transport.sendto(b"x")
            peer.sendto(b"too late", ours)
            getattr(transport, end)()
            await settle(group)
            if end == "close":
                assert protocol.lost == []
                peer.sendto(b"later still", ours)
                await turns()
                while not protocol.lost:
                    await receive(peer)
                    await turns(1)
            await until(lambda: protocol.lost)
            assert protocol.received == []


@needs_unix
@pytest.mark.differs(
    "the buffer size of a datagram transport",
    asyncio="until 3.14 the header is added but never subtracted",
    here="added and subtracted",
    why="otherwise a paused protocol is never resumed",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_d2_buffer_size_counts_headers_when_adding_and_removing(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            transport.set_write_buffer_limits(high=100, low=0)
            assert transport.get_write_buffer_limits() == (0, 100)
            filled = 0
            while transport.get_write_buffer_size() == 0:
                transport.sendto(b"12")
                filled += 1
            assert transport.get_write_buffer_size() == 10
            for _ in range(9):
                transport.sendto(b"12")
            assert transport.get_write_buffer_size() == 100
            assert protocol.flow == []
            transport.sendto(b"")
            assert transport.get_write_buffer_size() == 108
            assert protocol.flow == ["pause"]
            for _ in range(filled + 10):
                await receive(peer)
            await until(lambda: protocol.flow == ["pause", "resume"])
            assert transport.get_write_buffer_size() == 0


@needs_unix
async def test_w13_close_sends_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            for number in range(300):
                transport.sendto(struct.pack("<I", number))
            transport.close()
            assert transport.is_closing()
            assert protocol.lost == []
            received = [(await receive(peer))[0] for _ in range(300)]
            assert received == [struct.pack("<I", number) for number in range(300)]
            await until(lambda: protocol.lost)
            assert protocol.lost == [None]


@needs_unix
@pytest.mark.differs(
    "`get_write_buffer_size` of a datagram transport after `abort`",
    asyncio="until 3.15 still counts the datagrams that were dropped",
    here="0",
    why="nothing is buffered any more",
)
@pytest.mark.ours_only(before=(3, 15))
async def test_abort_drops_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    with clogged_unix_peer(tmp_path) as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=peer.getsockname())
            for _ in range(300):
                transport.sendto(b"x")
            transport.abort()
            assert protocol.lost == []
            await until(lambda: protocol.lost)
            assert protocol.lost == [None]
            assert transport.get_write_buffer_size() == 0


@needs_unix
@pytest.mark.ours_only("asyncio has no group")
async def test_leaving_the_block_by_an_exception_drops_waiting_datagrams(stack: Stack, tmp_path: Path) -> None:
    protocol = Endpoint()
    with clogged_unix_peer(tmp_path) as peer:
        with pytest.raises(BaseException) as caught:
            async with stack.open() as group:
                transport, _ = await group.create_datagram_endpoint(
                    lambda: protocol, family=socket.AF_UNIX, remote_addr=peer.getsockname()
                )
                for _ in range(300):
                    transport.sendto(b"x")
                raise LookupError
        assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
    assert protocol.lost == [None]


async def test_d5_close_in_connection_made_right_after_sendto(stack: Stack) -> None:
    class Hasty(Endpoint):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.sendto(b"in haste")
            transport.close()

    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            _, protocol = await endpoints.make(Hasty(), remote_addr=peer.getsockname())
            assert (await receive(peer))[0] == b"in haste"
            await until(lambda: protocol.lost)
            assert protocol.lost == [None]
            assert protocol.errors == []
            assert contexts == []


async def test_sending_after_the_end_is_dropped_with_a_warning_from_the_fifth_on(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(remote_addr=peer.getsockname())
            transport.close()
            await until(lambda: protocol.lost)
            with capture_log(stack) as records:
                for _ in range(4):
                    transport.sendto(b"x")
                before = len(records)
                for _ in range(3):
                    transport.sendto(b"x")
            assert before == 0
            assert len(records) in (2, 3)  # asyncio counts `close` as one
            with pytest.raises(BlockingIOError):
                peer.recv(1)


@pytest.mark.differs(
    "`sendto` with an address after `close`, without `remote_addr`",
    asyncio="sent in the iteration of the `close`; later `AttributeError`",
    here="dropped",
    why="as with `remote_addr`",
)
@pytest.mark.ours_only
async def test_sending_to_an_address_after_the_close_is_dropped(stack: Stack) -> None:
    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            contexts = collect_contexts(group)
            transport, protocol = await endpoints.make(local_addr=(HOST, 0))
            transport.close()
            transport.sendto(b"in the same turn", peer.getsockname())
            await until(lambda: protocol.lost)
            transport.sendto(b"later", peer.getsockname())
            with pytest.raises(BlockingIOError):
                peer.recv(1)
            assert protocol.lost == [None]
            assert protocol.errors == contexts == []
