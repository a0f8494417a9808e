"""Other web servers, frameworks and clients: hypercorn, quart, sanic, tornado, httpx."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import hypercorn.asyncio
import pytest
import quart
import sanic
import sanic.response
import tornado.httpclient
import tornado.httpserver
import tornado.iostream
import tornado.web
import tornado.websocket
from hypercorn.config import Config
from peers import HOST, Tls, curl
from test_uvicorn import app as fastapi_app, echo, serving


def listener() -> socket.socket:
    return socket.create_server((HOST, 0))


async def test_hypercorn_and_quart(tls: Tls) -> None:
    """HTTP/1.1 and, over TLS, HTTP/2."""
    app = quart.Quart(__name__)

    @app.get("/hello/<name>")
    async def hello(name: str) -> str:
        await asyncio.sleep(0)
        return f"hello {name} by HTTP/{quart.request.http_version}"

    @app.post("/echo")
    async def echo_back() -> bytes:
        return await quart.request.get_data()

    @app.get("/thread")
    async def in_a_thread() -> str:
        return await asyncio.to_thread(str.upper, "thread")

    for certificates in ({}, {"certfile": str(tls.certificate), "keyfile": str(tls.key)}):
        with listener() as sock:
            port = sock.getsockname()[1]
            config = Config.from_mapping(bind=[f"fd://{sock.fileno()}"], graceful_timeout=1, **certificates)
            # It closes what it is given.
            config.bind = [f"fd://{sock.detach()}"]
            end = asyncio.Event()
            serve = asyncio.create_task(hypercorn.asyncio.serve(app, config, shutdown_trigger=end.wait))
            url = f"http{'s' if certificates else ''}://{HOST}:{port}"
            trust = ["--cacert", tls.authority]
            version = 2 if certificates else 1.1
            assert await curl(*trust, f"{url}/hello/curl") == f"hello curl by HTTP/{version}"
            assert await curl(*trust, f"{url}/thread") == "THREAD"
            body = "x" * 500_000
            assert await curl(*trust, "--data-binary", "@-", f"{url}/echo", data=body.encode()) == body
            end.set()
            await serve


async def test_sanic() -> None:
    app = sanic.Sanic("ecosystem")
    try:

        @app.get("/hello/<name>")
        async def hello(request: Any, name: str) -> Any:
            await asyncio.sleep(0)
            return sanic.response.json({"hello": name})

        @app.post("/stream", stream=True)
        async def stream(request: Any) -> None:
            response = await request.respond()
            while (chunk := await request.stream.read()) is not None:
                await response.send(chunk)
            await response.eof()

        # It would leave a socket that it opens itself.
        sock = listener()
        server = await app.create_server(sock=sock, return_asyncio_server=True, access_log=False)
        assert server is not None
        await server.startup()
        await server.start_serving()
        url = f"http://{HOST}:{server.server.sockets[0].getsockname()[1]}"
        assert json.loads(await curl(f"{url}/hello/curl")) == {"hello": "curl"}
        body = "0123456789" * 50_000
        assert await curl("-T", "-", "-X", "POST", f"{url}/stream", data=body.encode()) == body
        server.close()
        await server.wait_closed()
        sock.close()
    finally:
        sanic.Sanic.unregister_app(app)


async def test_tornado(tls: Tls) -> None:
    """Its sockets are its own: add_reader and add_writer."""

    class Hello(tornado.web.RequestHandler):
        async def get(self, name: str) -> None:
            await asyncio.sleep(0)
            self.write(f"hello {name}")

        async def post(self, name: str) -> None:
            self.write(self.request.body)

    class Shout(tornado.websocket.WebSocketHandler):
        async def on_message(self, message: Any) -> None:
            await self.write_message(message.upper())

    app = tornado.web.Application([("/hello/(.*)", Hello), ("/shout", Shout)])
    for context in (None, tls.server):
        with listener() as sock:
            server = tornado.httpserver.HTTPServer(app, ssl_options=context)
            sock.setblocking(False)
            server.add_socket(sock)
            url = f"http{'s' if context else ''}://{HOST}:{sock.getsockname()[1]}"
            assert await curl("--cacert", tls.authority, f"{url}/hello/curl") == "hello curl"
            client = tornado.httpclient.AsyncHTTPClient(force_instance=True)
            body = b"x" * 2_000_000
            request = tornado.httpclient.HTTPRequest(
                f"{url}/hello/x", method="POST", body=body, ca_certs=str(tls.authority)
            )
            assert (await client.fetch(request)).body == body
            connecting = tornado.httpclient.HTTPRequest(f"ws{url[4:]}/shout", ca_certs=str(tls.authority))
            connection = await tornado.websocket.websocket_connect(connecting)
            for size in (1, 100_000):
                await connection.write_message("x" * size)
                assert await connection.read_message() == "X" * size
            connection.close()
            assert await connection.read_message() is None
            client.close()
            server.stop()
            await server.close_all_connections()
    await asyncio.sleep(0.01)


async def test_httpx(tls: Tls) -> None:
    """An AnyIO library in asyncio code: what AnyIO takes for the backend is asyncio."""
    certificates = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    for options, scheme in (({}, "http"), (certificates, "https")):
        async with (
            serving(echo, lifespan="off", **options) as port,
            httpx.AsyncClient(verify=tls.client, base_url=f"{scheme}://{HOST}:{port}") as client,
        ):
            body = b"x" * 500_000
            response = await client.post("/path", content=body)
            assert (response.status_code, response.content) == (200, body)
            answers = await asyncio.gather(*(client.post("/", content=b"%d" % number) for number in range(50)))
            assert [answer.content for answer in answers] == [b"%d" % number for number in range(50)]
            async with client.stream("POST", "/", content=body) as streamed:
                assert len(b"".join([chunk async for chunk in streamed.aiter_raw()])) == len(body)
    with listener() as silent:
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.get(f"http://{HOST}:{silent.getsockname()[1]}", timeout=0.05)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.get(f"http://{HOST}:{silent.getsockname()[1]}")


async def test_httpx_calls_an_application_in_place() -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(fastapi_app), base_url="http://x") as client:
        assert (await client.get("/sync/5")).json() == {"square": 25}
        assert (await client.get("/async")).json() == {"got": "RESOURCE"}
