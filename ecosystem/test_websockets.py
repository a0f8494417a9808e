"""websockets: server and client, with their blocking counterparts and with each other."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import websockets.sync.client
import websockets.sync.server
from peers import GUARD, HOST, Tls
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError


async def shout(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message.upper())


def url_of(server: Any, scheme: str = "ws") -> str:
    return f"{scheme}://{HOST}:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("encrypted", [False, True])
async def test_server_with_a_blocking_client(encrypted: bool, tls: Tls) -> None:
    def client(url: str) -> None:
        with websockets.sync.client.connect(url, ssl=tls.client if encrypted else None) as connection:
            for size in (0, 1, 70_000, 900_000):
                connection.send("x" * size)
                assert connection.recv(GUARD) == "X" * size
            assert connection.ping().wait(GUARD)
            # In fragments.
            connection.send(iter(["a", "b", "c"]))
            assert connection.recv(GUARD) == "ABC"

    async with serve(shout, HOST, 0, ssl=tls.server if encrypted else None) as server:
        await asyncio.to_thread(client, url_of(server, "wss" if encrypted else "ws"))


@pytest.mark.parametrize("encrypted", [False, True])
async def test_client_with_a_blocking_server(encrypted: bool, tls: Tls) -> None:
    def handler(connection: websockets.sync.server.ServerConnection) -> None:
        for message in connection:
            connection.send(message.upper())
        seen.append(connection.close_code)

    seen: list[Any] = []
    server = websockets.sync.server.serve(handler, HOST, 0, ssl=tls.server if encrypted else None)
    thread = asyncio.create_task(asyncio.to_thread(server.serve_forever))
    url = f"{'wss' if encrypted else 'ws'}://{HOST}:{server.socket.getsockname()[1]}"
    try:
        async with connect(url, ssl=tls.client if encrypted else None) as connection:
            for size in (0, 1, 70_000, 900_000):
                await connection.send("x" * size)
                assert await connection.recv() == "X" * size
            latency = await (await connection.ping())
            assert latency >= 0  # uvloop counts milliseconds.
            await connection.close(1001)
    finally:  # Otherwise the event loop waits for the thread when the test fails.
        server.shutdown()
    await thread
    while not seen:
        await asyncio.sleep(0.001)
    assert seen == [1001]


async def test_both_sides() -> None:
    async with serve(shout, HOST, 0, ping_interval=0.02) as server:

        async def talk(number: int) -> None:
            async with connect(url_of(server), ping_interval=0.02) as connection:
                for each in range(20):
                    await connection.send(f"message {number} {each}")
                    assert await connection.recv() == f"MESSAGE {number} {each}"
                    await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(talk(number))


async def test_broadcast() -> None:
    here: set[ServerConnection] = set()

    async def handler(connection: ServerConnection) -> None:
        here.add(connection)
        await connection.wait_closed()
        here.remove(connection)

    async with serve(handler, HOST, 0) as server:
        clients = [await connect(url_of(server)) for _ in range(10)]
        while len(here) < 10:
            await asyncio.sleep(0)
        broadcast(here, "news")
        assert [await client.recv() for client in clients] == ["news"] * 10
        await asyncio.gather(*(client.close() for client in clients))
        while here:
            await asyncio.sleep(0)


async def test_time_outs_and_rude_ends() -> None:
    ends: asyncio.Queue[Any] = asyncio.Queue()

    async def handler(connection: ServerConnection) -> None:
        try:
            await connection.recv()
        except ConnectionClosed as closed:
            await ends.put(closed)

    async with serve(handler, HOST, 0) as server:
        async with connect(url_of(server)) as connection:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await connection.recv()
            # Cancelling recv() lost nothing: the connection is as it was.
            await (await connection.ping())
            connection.transport.abort()
            with pytest.raises(ConnectionClosedError):
                await connection.recv()
        assert isinstance(await ends.get(), ConnectionClosedError)

        client = await connect(url_of(server))
        server.close(code=1012)
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.rcvd.code == 1012
        await client.wait_closed()


async def test_a_server_that_does_not_answer_the_handshake() -> None:
    async def answer_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer_nothing, HOST, 0) as silent:
        with pytest.raises(TimeoutError):
            await connect(url_of(silent), open_timeout=0.05)
