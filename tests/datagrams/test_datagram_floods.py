"""Datagram endpoints: bursts and floods."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any

import anyio
import pytest
from datagram_helpers import Endpoint, Endpoints, receive, udp_peer
from network import needs_unix
from support import HOST, PeerProcess, Stack, peer_process, until

pytestmark = pytest.mark.anyio


@needs_unix
async def test_d7_ten_thousand_datagrams_in_a_burst(stack: Stack, tmp_path: Path) -> None:
    """Over UNIX, where nothing is dropped: all arrive, in order."""
    count = 10_000
    async with stack.open() as group, Endpoints(group) as endpoints:
        _, receiver = await endpoints.make(family=socket.AF_UNIX, local_addr=str(tmp_path / "receiver"))
        sender, protocol = await endpoints.make(family=socket.AF_UNIX, remote_addr=str(tmp_path / "receiver"))
        for number in range(count):
            sender.sendto(struct.pack("<I", number))
        await until(lambda: len(receiver.received) == count)
        assert receiver.data == [struct.pack("<I", number) for number in range(count)]
        assert protocol.errors == []


async def test_r5_a_flood_does_not_starve_other_endpoints(stack: Stack) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        flooded, flood = await endpoints.make(local_addr=(HOST, 0))
        other, quiet = await endpoints.make(Endpoint(echo=True), local_addr=(HOST, 0))
        timer: list[int] = []
        async with peer_process("udp_flood", flooded.get_extra_info("sockname")[1]) as process:
            assert isinstance(process, PeerProcess)
            assert await process.line() == "flooding"
            await until(lambda: len(flood.received) > 100)
            with udp_peer() as peer:
                peer.sendto(b"and I?", other.get_extra_info("sockname"))
                assert (await receive(peer))[0] == b"and I?"
            group.call_later(0.01, timer.append, 1)
            await until(lambda: timer)
            assert quiet.data == [b"and I?"]


class Restless(Endpoint):
    """An endpoint that sends itself a datagram for each that it receives."""

    def __init__(self, *, at_most: int, burn: float = 0) -> None:
        super().__init__()
        self.count = 0
        self.at_most = at_most
        self.burn = burn

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.count += 1
        end = time.perf_counter() + self.burn
        while time.perf_counter() < end:
            pass
        if self.count < self.at_most:
            self.transport.sendto(data, addr)


async def test_an_always_ready_endpoint_does_not_starve_timers(stack: Stack) -> None:
    """Counted, not measured: a timer of some milliseconds, against datagrams that take a second."""
    at_most = 200_000
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(Restless(at_most=at_most), local_addr=(HOST, 0))
        at: list[int] = []

        def due() -> None:
            at.append(protocol.count)
            transport.abort()

        transport.sendto(b"x", transport.get_extra_info("sockname"))
        group.call_later(0.01, due)
        await until(lambda: protocol.lost)
        assert at
        assert at[0] < at_most / 2


async def test_slow_callbacks_do_not_starve_tasks(stack: Stack) -> None:
    """Each callback takes a millisecond, so an iteration must be bounded by time, not by a count. Counted, not
    measured."""
    at_most = 3_000
    counts = []
    async with stack.open() as group, Endpoints(group) as endpoints:
        transport, protocol = await endpoints.make(Restless(at_most=at_most, burn=0.001), local_addr=(HOST, 0))
        transport.sendto(b"x", transport.get_extra_info("sockname"))
        await until(lambda: protocol.count)
        for _ in range(5):
            before = protocol.count
            await anyio.sleep(0.01)
            counts.append(protocol.count - before)
        transport.abort()
        assert max(counts) < 250, counts


async def test_closing_in_the_middle_of_a_batch_ends_it(stack: Stack) -> None:
    class Once(Endpoint):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            super().datagram_received(data, addr)
            self.transport.close()

    with udp_peer() as peer:
        async with stack.open() as group, Endpoints(group) as endpoints:
            transport, protocol = await endpoints.make(Once(), local_addr=(HOST, 0))
            address = transport.get_extra_info("sockname")
            for number in range(5):
                peer.sendto(str(number).encode(), address)
            await until(lambda: protocol.lost)
            assert protocol.data == [b"0"]
