"""asyncio libraries called from tasks of the backend, on trio from trio tasks, and the other way round."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anyio
import anyio.abc
import anyio.lowlevel
import asyncpg
import pytest
import redis.asyncio
import sniffio
import uvicorn
import websockets
from aiohttp import web
from peers import GUARD, HOST, PostgreSQL, Redis, curl

from transports_anyio import from_asyncio, open_event_loop, to_asyncio


def test_an_asyncpg_pool_for_many_tasks(backend: Any, postgresql: PostgreSQL) -> None:
    async def main() -> None:
        answers: dict[int, int] = {}
        async with (
            open_event_loop(),
            to_asyncio.wrap_async_context_manager(
                to_asyncio.run_sync(lambda: asyncpg.create_pool(postgresql.dsn, min_size=2, max_size=4))
            ) as pool,
        ):

            async def query(number: int) -> None:
                answers[number] = await to_asyncio.run(pool.fetchval, "select $1::int * 2", number)

            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(query, number)
            for _ in range(5):
                with anyio.move_on_after(0.05) as scope:
                    await to_asyncio.run(pool.execute, "select pg_sleep(30)")
                assert scope.cancelled_caught
            with pytest.raises(asyncpg.DivisionByZeroError):
                await to_asyncio.run(pool.fetchval, "select 1/0")

            async def transfer(connection: Any) -> int:
                async with connection.transaction():
                    await connection.execute("create temporary table t on commit drop as select 1 as n")
                    result: int = await connection.fetchval("select sum(n) from t")
                    return result

            async with to_asyncio.wrap_async_context_manager(pool.acquire()) as connection:
                assert await to_asyncio.run(transfer, connection) == 1
        assert answers == {number: number * 2 for number in range(100)}

    backend.run(main)


async def _slow(request: web.Request) -> web.Response:
    await asyncio.sleep(float(request.query["seconds"]))
    return web.Response(text="slept")


@asynccontextmanager
async def aiohttp_server() -> Any:
    app = web.Application()
    app.add_routes([web.get("/", _slow)])
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    try:
        yield f"http://{HOST}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_an_aiohttp_session_for_many_tasks(backend: Any) -> None:
    async def main() -> None:
        texts: list[str] = []
        given_up: list[int] = []
        async with (
            open_event_loop(),
            to_asyncio.wrap_async_context_manager(aiohttp_server()) as url,
            to_asyncio.wrap_async_context_manager(to_asyncio.run_sync(aiohttp.ClientSession)) as session,
        ):

            async def fetch(seconds: float) -> str:
                async with session.get(url, params={"seconds": seconds}) as response:
                    text: str = await response.text()
                    return text

            async def one(number: int) -> None:
                with anyio.move_on_after(0.1 if number % 2 else GUARD) as scope:
                    texts.append(await to_asyncio.run(fetch, GUARD if number % 2 else 0.01))
                if scope.cancelled_caught:
                    given_up.append(number)

            async with anyio.create_task_group() as tasks:
                for number in range(40):
                    tasks.start_soon(one, number)
            # A deadline that is over before the request begins, and one that passes while it connects.
            for seconds in (0, 0.0001, 0.001):
                with anyio.move_on_after(seconds) as scope:
                    await to_asyncio.run(fetch, GUARD)
                assert scope.cancelled_caught
            assert await to_asyncio.run(fetch, 0) == "slept"
            # Everything at once, from outside.
            with anyio.move_on_after(0.05):
                async with anyio.create_task_group() as tasks:
                    for _ in range(20):
                        tasks.start_soon(to_asyncio.run, fetch, GUARD)
            assert await to_asyncio.run(fetch, 0) == "slept"
        assert texts == ["slept"] * 20
        assert sorted(given_up) == list(range(1, 40, 2))

    backend.run(main)


def test_other_clients(backend: Any, redis_server: Redis) -> None:
    async def shout(connection: Any) -> None:
        async for message in connection:
            await connection.send(message.upper())

    async def main() -> None:
        async with open_event_loop():
            client = to_asyncio.run_sync(lambda: redis.asyncio.Redis(host=HOST, port=redis_server.port))
            assert await to_asyncio.run(client.set, "crossing", "value")
            assert await to_asyncio.run(client.get, "crossing") == b"value"
            with anyio.move_on_after(0.05) as scope:
                await to_asyncio.run(client.blpop, "nothing-comes")
            assert scope.cancelled_caught
            assert await to_asyncio.run(client.get, "crossing") == b"value"
            await to_asyncio.run(client.aclose)
            serve = to_asyncio.run_sync(websockets.serve, shout, HOST, 0)
            async with to_asyncio.wrap_async_context_manager(serve) as server:
                url = f"ws://{HOST}:{server.sockets[0].getsockname()[1]}"
                connection = await to_asyncio.run(websockets.connect, url)
                await to_asyncio.run(connection.send, "hello")
                assert await to_asyncio.run(connection.recv) == "HELLO"
                with anyio.move_on_after(0.02) as scope:
                    await to_asyncio.run(connection.recv)
                assert scope.cancelled_caught
                await to_asyncio.run(connection.close)

    backend.run(main)


# A whole application of the backend's behind uvicorn

Receive = Callable[[], Any]
Send = Callable[[Any], Any]


class Native:
    """An ASGI application that is called on the backend: on trio in trio tasks."""

    def __init__(self, app: Callable[[Any, Receive, Send], Any]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        async def native_receive() -> Any:
            return await to_asyncio.run(receive)

        async def native_send(message: Any) -> None:
            await to_asyncio.run(send, message)

        await from_asyncio.run(self.app, scope, native_receive, native_send)


def test_a_native_application_behind_uvicorn(backend: Any) -> None:
    library = "trio" if backend.name == "trio" else "asyncio"
    log: list[str] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        assert sniffio.current_async_library() == library
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                log.append("start-up")
                await send({"type": "lifespan.startup.complete"})
            log.append("shut-down")
            await send({"type": "lifespan.shutdown.complete"})
            return
        parts: list[str] = []

        async def work(name: str) -> None:
            await anyio.sleep(0.001)
            parts.append(name)

        async with anyio.create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(work, name)
        if scope["path"] == "/forever":
            # Until the client has gone.
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                assert (await receive())["type"] == "http.request"
                log.append("waiting")
                assert (await receive())["type"] == "http.disconnect"
                log.append("disconnected")
                tasks.cancel_scope.cancel()
            return
        body = await anyio.to_thread.run_sync(json.dumps, sorted(parts))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b" whole"})

    async def main() -> None:
        async with open_event_loop():
            config = uvicorn.Config(Native(app), host=HOST, port=0, log_config=None, timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(to_asyncio.run, server.serve)
                while not server.started:
                    await anyio.sleep(0.001)
                url = f"http://{HOST}:{server.servers[0].sockets[0].getsockname()[1]}"
                for _ in range(5):
                    assert await to_asyncio.run(curl, url) == '["a", "b", "c"] whole'
                async with await anyio.connect_tcp(HOST, int(url.rpartition(":")[2])) as stream:
                    await stream.send(b"GET /forever HTTP/1.1\r\nHost: x\r\n\r\n")
                    while "waiting" not in log:
                        await anyio.sleep(0.001)
                while "disconnected" not in log:
                    await anyio.sleep(0.001)
                server.should_exit = True
        assert log == ["start-up", "waiting", "disconnected", "shut-down"]

    backend.run(main)


def test_an_asyncio_server_calls_the_backend(backend: Any) -> None:
    """Streams between the two sides, and a service that belongs to the backend."""

    async def main() -> None:
        async with open_event_loop(), anyio.create_task_group() as tasks:
            send, receive = anyio.create_memory_object_stream[tuple[int, Any]](10)

            async def worker() -> None:
                async with receive:
                    async for number, future in receive:
                        await anyio.lowlevel.checkpoint()
                        to_asyncio.run_sync(future.set_result, number * number)

            tasks.start_soon(worker)

            async def handle(request: web.Request) -> web.Response:
                future = asyncio.get_running_loop().create_future()
                await send.send((int(request.query["n"]), future))
                return web.Response(text=str(await future))

            async def serve() -> None:
                app = web.Application()
                app.add_routes([web.get("/", handle)])
                runner = web.AppRunner(app, shutdown_timeout=1)
                await runner.setup()
                await web.TCPSite(runner, HOST, 0).start()
                address = runner.addresses[0]
                try:
                    await asyncio.gather(*(curl(f"http://{address[0]}:{address[1]}/?n={n}") for n in range(3)))
                    answers = [await curl(f"http://{address[0]}:{address[1]}/?n={n}") for n in range(5)]
                    assert answers == ["0", "1", "4", "9", "16"]
                finally:
                    await runner.cleanup()

            await to_asyncio.run(serve)
            send.close()

    backend.run(main)
