"""The TCP proxy of the examples: each side sees what the other side does."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from support import GUARD, HOST, SMALL, Peer, Stack, listening, pattern, until

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from tcp_proxy import Client

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("the protocol asks for its group, which asyncio does not have"),
]

MIB = 1024 * 1024


@asynccontextmanager
async def passing(group: Any, *, receive_buffer: int | None = None) -> AsyncIterator[tuple[Peer, Peer, Client]]:
    """Yield the client, the server, and the proxy's protocol for the client."""
    made: list[Client] = []

    def factory() -> Client:
        made.append(Client(*listener.getsockname()))
        return made[-1]

    with listening(receive_buffer=receive_buffer) as listener:
        server = await group.create_server(factory, HOST, 0)
        with Peer.connect(server.sockets[0].getsockname()) as client:
            listener.settimeout(GUARD)
            await until(lambda: made and hasattr(made[0], "other"))
            with Peer(listener.accept()[0]) as behind:
                yield client, behind, made[0]


async def test_both_ways_and_half_close(stack: Stack) -> None:
    async with stack.open() as group, passing(group) as (client, behind, _):
        await client.send(b"question")
        assert await behind.receive_exactly(8) == b"question"
        client.shutdown()
        assert await behind.receive() == b""
        # The other direction is still open, for as long as it takes.
        await behind.send(b"answer")
        assert await client.receive_exactly(6) == b"answer"
        behind.shutdown()
        assert await client.receive() == b""
        await group.wait_closed()


async def test_half_close_from_the_server(stack: Stack) -> None:
    async with stack.open() as group, passing(group) as (client, behind, _):
        await behind.send(b"greeting")
        behind.shutdown()
        assert await client.receive_all() == b"greeting"
        await client.send(b"still here")
        assert await behind.receive_exactly(10) == b"still here"
        client.shutdown()
        assert await behind.receive() == b""
        await group.wait_closed()


@pytest.mark.parametrize("direction", ["to the server", "to the client"])
async def test_a_fast_sender_waits_for_a_slow_reader(stack: Stack, direction: str) -> None:
    data = pattern(24 * MIB)
    async with stack.open() as group, passing(group, receive_buffer=SMALL) as (client, behind, side):
        sender, reader = (client, behind) if direction == "to the server" else (behind, client)
        source, target = (side, side.other) if direction == "to the server" else (side.other, side)

        # Without a reader, the sender stops when the proxy no longer reads and the kernel's buffers are full.
        sent = 0
        with anyio.fail_after(GUARD):
            while True:
                try:
                    sent += sender.socket.send(data[sent : sent + MIB])
                except BlockingIOError:
                    if not source.transport.is_reading():
                        break
                    await anyio.sleep(0.001)
        assert sent < len(data)
        # The buffer holds at most the watermark and one receive.
        assert target.transport.get_write_buffer_size() <= 64 * 1024 + 256 * 1024
        assert source.transport.get_write_buffer_size() == 0

        async def send_the_rest() -> None:
            await sender.send(data[sent:])
            sender.shutdown()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_the_rest)
            received = await reader.receive_all()
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
        assert 64 * 1024 < target.peak <= 64 * 1024 + 256 * 1024


@pytest.mark.parametrize("from_client", [True, False], ids=["client", "server"])
async def test_a_reset_is_passed_on(stack: Stack, from_client: bool) -> None:
    async with stack.open() as group, passing(group) as (client, behind, _):
        one, other = (client, behind) if from_client else (behind, client)
        await one.send(b"x")
        assert await other.receive() == b"x"
        one.reset()
        with pytest.raises(ConnectionResetError):
            await other.receive()
        await group.wait_closed()


@pytest.mark.parametrize("from_client", [True, False], ids=["client", "server"])
async def test_a_reset_after_the_end_of_the_other_side(stack: Stack, from_client: bool) -> None:
    async with stack.open() as group, passing(group) as (client, behind, _):
        one, other = (client, behind) if from_client else (behind, client)
        other.shutdown()
        assert await one.receive() == b""
        one.reset()
        with pytest.raises(ConnectionResetError):
            await other.receive()
        await group.wait_closed()


async def test_the_target_refuses_connections(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    with listening() as listener:
        address = listener.getsockname()
    async with stack.open() as group:
        server = await group.create_server(lambda: Client(*address), HOST, 0)
        with Peer.connect(server.sockets[0].getsockname()) as client:
            await client.send(b"anybody?")
            with pytest.raises(ConnectionResetError):
                await client.receive()
        await group.wait_closed()
    assert f"cannot reach {HOST}:{address[1]}" in capsys.readouterr().out
