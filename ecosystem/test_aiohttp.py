"""aiohttp: server and client, each with a foreign peer and with each other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from peers import GUARD, HOST, Tls, curl

Handler = Callable[[web.Request], Any]


@asynccontextmanager
async def serving(*routes: web.RouteDef, ssl: Any = None, **options: Any) -> AsyncIterator[str]:
    """An aiohttp server; its URL."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, shutdown_timeout=1, **options)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, 0, ssl_context=ssl)
        await site.start()
        port = runner.addresses[0][1]
        yield f"http{'s' if ssl else ''}://{HOST}:{port}"
    finally:
        await runner.cleanup()


async def hello(request: web.Request) -> web.Response:
    return web.Response(text=f"hello {request.query.get('name', 'world')}")


async def echo(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    async for chunk in request.content.iter_any():
        await response.write(chunk)
    return response


async def websocket(request: web.Request) -> web.WebSocketResponse:
    response = web.WebSocketResponse(heartbeat=5)
    await response.prepare(request)
    async for message in response:
        if message.type == aiohttp.WSMsgType.TEXT:
            if message.data == "close":
                await response.close(code=4000, message=b"as asked")
            else:
                await response.send_str(message.data.upper())
        elif message.type == aiohttp.WSMsgType.BINARY:
            await response.send_bytes(message.data[::-1])
    return response


async def test_server_with_curl() -> None:
    async with serving(web.get("/", hello), web.put("/echo", echo)) as url:
        assert await curl(f"{url}/?name=curl") == "hello curl"
        assert "404" in await curl("-i", f"{url}/nowhere")
        body = "0123456789" * 100_000
        assert await curl("-T", "-", f"{url}/echo", data=body.encode()) == body


async def test_client_and_server() -> None:
    async with serving(web.get("/", hello), web.post("/echo", echo)) as url, aiohttp.ClientSession() as session:
        async with session.get(url, params={"name": "client"}) as response:
            assert response.status == 200
            assert await response.text() == "hello client"

        async def numbers() -> AsyncIterator[bytes]:
            for number in range(200):
                await asyncio.sleep(0)
                yield b"%d," % number * 100

        async with session.post(f"{url}/echo", data=numbers()) as response:
            got = b"".join([chunk async for chunk in response.content.iter_chunked(1000)])
        assert got == b"".join([b"%d," % number * 100 for number in range(200)])

        async def one(number: int) -> str:
            async with session.get(url, params={"name": number}) as response:
                return await response.text()

        assert await asyncio.gather(*map(one, range(200))) == [f"hello {number}" for number in range(200)]


async def test_tls(tls: Tls) -> None:
    async with serving(web.get("/", hello), web.post("/echo", echo), ssl=tls.server) as url:
        assert await curl("--cacert", tls.authority, url) == "hello world"
        connector = aiohttp.TCPConnector(ssl=tls.client)
        async with aiohttp.ClientSession(connector=connector) as session:
            body = bytes(range(256)) * 4000
            async with session.post(f"{url}/echo", data=body) as response:
                assert await response.read() == body
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(url)


async def test_websocket(tls: Tls) -> None:
    for context in (None, tls.server):
        async with (
            serving(web.get("/", websocket), ssl=context) as url,
            aiohttp.ClientSession() as session,
            session.ws_connect(url, ssl=tls.client, heartbeat=5) as connection,
        ):
            for size in (1, 10_000, 500_000):
                await connection.send_str("x" * size)
                assert await connection.receive_str() == "X" * size
            await connection.send_bytes(b"abc")
            assert await connection.receive_bytes() == b"cba"
            await connection.ping()
            await connection.send_str("close")
            closing = await connection.receive()
            assert (closing.type, closing.data, closing.extra) == (aiohttp.WSMsgType.CLOSE, 4000, "as asked")


async def test_time_outs() -> None:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        asked.set()
        try:
            await asyncio.sleep(GUARD)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return web.Response()

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        await asyncio.sleep(GUARD)
        return response

    routes = [web.get("/slow", slow), web.get("/half", half), web.get("/", hello)]
    async with serving(*routes, handler_cancellation=True) as url, aiohttp.ClientSession() as session:
        with pytest.raises(TimeoutError):
            await session.get(f"{url}/slow", timeout=aiohttp.ClientTimeout(total=0.05))
        # The server notices that the client has gone, and cancels the handler.
        await cancelled.wait()
        response = await session.get(f"{url}/half", timeout=aiohttp.ClientTimeout(sock_read=0.05))
        with pytest.raises(aiohttp.SocketTimeoutError):
            await response.read()
        asked.clear()
        cancelled.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await session.get(f"{url}/slow")
        await cancelled.wait()
        asked.clear()
        cancelled.clear()
        request = asyncio.create_task(session.get(f"{url}/slow"))
        await asked.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await cancelled.wait()
        async with session.get(url) as response:
            assert await response.text() == "hello world"


async def test_connecting_fails_or_takes_too_long() -> None:
    async with aiohttp.ClientSession() as session:
        with socket.socket() as bound:
            bound.bind((HOST, 0))
            port = bound.getsockname()[1]
            with pytest.raises(aiohttp.ClientConnectorError) as refused:
                await session.get(f"http://{HOST}:{port}")
            assert isinstance(refused.value.os_error, ConnectionRefusedError)
        with socket.create_server((HOST, 0)) as silent, pytest.raises(aiohttp.ServerTimeoutError):
            url = f"http://{HOST}:{silent.getsockname()[1]}"
            await session.get(url, timeout=aiohttp.ClientTimeout(sock_read=0.05))


async def test_file_responses(tmp_path: Path, tls: Tls) -> None:
    """Plain connections send files by the loop's sendfile, TLS connections piece by piece."""
    content = bytes(range(256)) * 20_000
    path = tmp_path / "file.bin"
    path.write_bytes(content)

    async def file(request: web.Request) -> web.FileResponse:
        return web.FileResponse(path)

    for context in (None, tls.server):
        async with serving(web.get("/", file), web.static("/static", tmp_path), ssl=context) as url:
            trust = ["--cacert", tls.authority]
            await curl(*trust, "-o", tmp_path / "whole", url)
            assert (tmp_path / "whole").read_bytes() == content
            await curl(*trust, "-o", tmp_path / "part", "-r", "1000-1999999", f"{url}/static/file.bin")
            assert (tmp_path / "part").read_bytes() == content[1000:2_000_000]
            connector = aiohttp.TCPConnector(ssl=tls.client)
            async with aiohttp.ClientSession(connector=connector) as session:
                # By one connection, one after the other.
                for _ in range(3):
                    async with session.get(url) as response:
                        assert await response.read() == content
                async with session.get(url) as response:
                    stamp = response.headers["Last-Modified"]
                    # Given up after the first bytes.
                    assert len(await response.content.read(10)) == 10
                async with session.get(url, headers={"If-Modified-Since": stamp}) as response:
                    assert response.status == 304


async def test_unix_socket(tmp_path: Path) -> None:
    app = web.Application()
    app.add_routes([web.get("/", hello)])
    runner = web.AppRunner(app)
    await runner.setup()
    path = str(tmp_path / "socket")
    await web.UnixSite(runner, path).start()
    assert await curl("--unix-socket", path, "http://x/?name=curl") == "hello curl"
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session,
        session.get("http://x/") as response,
    ):
        assert await response.text() == "hello world"
    await runner.cleanup()


async def test_shutdown_waits_for_a_handler() -> None:
    began = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        began.set()
        await asyncio.sleep(0.1)
        return web.Response(text="whole")

    async with serving(web.get("/", slow)) as url:
        request = asyncio.create_task(curl(url))
        await began.wait()
    assert await request == "whole"
