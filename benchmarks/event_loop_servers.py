"""The servers of bench_event_loop.py: `python event_loop_servers.py PEER PROGRAM` prints its port and serves."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from servers import (
    BODY,
    HOST,
    Echo,
    announce,
    bound,
    end_with_standard_input,
    hello,
    serve_hypercorn,
    serve_uvicorn,
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TRIO_APPLICATION = "uvicorn, application on trio"


async def hello_from_trio(scope: Any, receive: Receive, send: Send) -> None:
    """An ASGI application that needs trio."""
    import trio

    with trio.fail_after(10 if scope["type"] == "http" else math.inf):
        await trio.lowlevel.checkpoint()
        await hello(scope, receive, send)


async def trio_application(scope: Any, receive: Receive, send: Send) -> None:
    """`hello_from_trio` for an asyncio server."""
    from transports_anyio import from_asyncio, to_asyncio

    run = to_asyncio.run
    await from_asyncio.run(hello_from_trio, scope, partial(run, receive), partial(run, send))


# -- asyncio programs ------------------------------------------------------------------------------------------------


async def serve_aiohttp() -> None:
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        return web.Response(text=BODY.decode())

    application = web.Application()
    application.router.add_get("/", handle)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    sock = bound()
    await web.SockSite(runner, sock).start()
    announce(sock.getsockname()[1])
    await asyncio.Event().wait()


async def serve_websockets() -> None:
    from websockets.asyncio.server import serve
    from websockets.exceptions import ConnectionClosedError

    async def echo(connection: Any) -> None:
        with contextlib.suppress(ConnectionClosedError):  # The load generator does not close connections in order.
            async for message in connection:
                await connection.send(message)

    sock = bound()
    async with serve(echo, sock=sock, compression=None):
        announce(sock.getsockname()[1])
        await asyncio.Event().wait()


async def serve_lines() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, HOST, 0, backlog=1024)
    announce(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


class TaskEcho(Echo):
    """A task and a future for each message."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        task = self.loop.create_task(self.answer(data))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, data: bytes) -> None:
        future = self.loop.create_future()
        self.loop.call_soon(future.set_result, None)
        await future
        self.transport.write(data)


async def serve_protocol(protocol: type[asyncio.Protocol]) -> None:
    server = await asyncio.get_running_loop().create_server(protocol, HOST, 0, backlog=1024)
    announce(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


PROGRAMS: dict[str, Callable[[], Awaitable[object]]] = {
    "uvicorn httptools": lambda: serve_uvicorn("httptools", hello),
    "uvicorn h11": lambda: serve_uvicorn("h11", hello),
    TRIO_APPLICATION: lambda: serve_uvicorn("httptools", trio_application),
    "aiohttp": serve_aiohttp,
    "websockets": serve_websockets,
    "lines": serve_lines,
    "tasks": lambda: serve_protocol(TaskEcho),
    "protocol": lambda: serve_protocol(Echo),
}


async def program(name: str) -> None:
    await PROGRAMS[name]()


# -- peers -----------------------------------------------------------------------------------------------------------


def on_uvloop(name: str) -> None:
    import uvloop

    uvloop.run(program(name))


def on_trio(name: str) -> None:
    from transports_anyio import run_asyncio

    run_asyncio(program, name, backend="trio")


def by_factory(name: str) -> None:
    from transports_anyio import EventLoop

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(program(name))


def by_factory_with_trio(name: str) -> None:
    """As above, and trio runs from the beginning on."""
    from transports_anyio import EventLoop, from_asyncio

    async def main() -> None:
        from_asyncio.run_sync(int)
        await program(name)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(main())


def on_trio_asyncio(name: str) -> None:
    import trio_asyncio

    trio_asyncio.run(trio_asyncio.aio_as_trio(program), name)


def in_a_group(name: str) -> None:
    import anyio

    from transports_anyio import TransportGroup

    async def serve() -> None:
        async with TransportGroup() as group:
            server = await group.create_server(Echo, HOST, 0, backlog=1024)
            announce(server.sockets[0].getsockname()[1])
            await anyio.sleep_forever()

    anyio.run(serve, backend="trio")


def hypercorn(name: str) -> None:
    import trio

    trio.run(serve_hypercorn, hello_from_trio if name == TRIO_APPLICATION else hello)


def anycorn(name: str) -> None:
    import anyio
    from anycorn import Config, serve

    sock = bound()
    config = Config()
    config.keep_alive_max_requests = 1 << 60
    config.bind = [f"fd://{sock.fileno()}"]
    announce(sock.getsockname()[1])
    application: Any = hello_from_trio if name == TRIO_APPLICATION else hello
    anyio.run(partial(serve, application, config), backend="trio")


PEERS: dict[str, Callable[[str], object]] = {
    "asyncio": lambda name: asyncio.run(program(name)),
    "uvloop": on_uvloop,
    "ours/trio": on_trio,
    "factory": by_factory,
    "factory, trio runs": by_factory_with_trio,
    "trio-asyncio": on_trio_asyncio,
    "plain group": in_a_group,
    "hypercorn": hypercorn,
    "anycorn": anycorn,
}

if __name__ == "__main__":
    end_with_standard_input()
    PEERS[sys.argv[1]](sys.argv[2])
