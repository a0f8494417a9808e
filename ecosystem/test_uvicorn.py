"""uvicorn: both HTTP implementations, each WebSocket implementation, FastAPI, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
import uvicorn
import websockets.sync.client
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, StreamingResponse
from peers import GUARD, HOST, Tls, curl

HTTP = ["h11", "httptools"]
SOURCE = Path(__file__)
CONTENT = SOURCE.read_bytes()
WEBSOCKETS = ["websockets", "websockets-sansio", "wsproto"]


@asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[int]:
    """uvicorn in a task, while it serves; its port."""
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=0, log_config=None, **options))
    serve = asyncio.create_task(server.serve())
    while not server.started:
        assert not serve.done(), serve
        await asyncio.sleep(0.001)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serve


async def echo(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """An ASGI application without a framework: what was sent, and where to."""
    assert scope["type"] == "http"
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]})
    for start in range(0, len(body), 50_000):
        await send({"type": "http.response.body", "body": body[start : start + 50_000], "more_body": True})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize("http", HTTP)
async def test_requests(http: str, tmp_path: Path) -> None:
    sent = os.urandom(3_000_000)
    (tmp_path / "sent").write_bytes(sent)
    async with serving(echo, http=http, lifespan="off") as port:
        url = f"http://{HOST}:{port}"
        assert await curl("--data", "hello", f"{url}/a") == "hello"
        # Two requests by the same connection, the second in chunks.
        back = await curl(
            "-D", "-", "-o", tmp_path / "one", "--data", "1", f"{url}/one",
            "--next", "-sS", "-D", "-", "-o", tmp_path / "back", "-H", "Expect: 100-continue", "-T", "-", f"{url}/two",
            data=sent,
        )  # fmt: skip
        assert "x-path: /one" in back
        assert "100 Continue" in back
        assert "x-path: /two" in back
        assert (tmp_path / "back").read_bytes() == sent
        assert await curl("-H", "Connection: close", "--data", "x" * 10_000, url) == "x" * 10_000


@pytest.mark.parametrize("http", HTTP)
async def test_tls(http: str, tls: Tls) -> None:
    options = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    async with serving(echo, http=http, lifespan="off", **options) as port:
        body = "x" * 200_000
        got = await curl("--cacert", tls.authority, "--data-binary", "@-", f"https://{HOST}:{port}", data=body.encode())
        assert got == body


async def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = uvicorn.Server(uvicorn.Config(echo, uds=str(path), log_config=None, lifespan="off"))
    serve = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    assert await curl("--unix-socket", path, "--data", "hello", "http://x/") == "hello"
    server.should_exit = True
    await serve


@pytest.mark.parametrize("http", HTTP)
async def test_a_client_that_goes_away_in_mid_request(http: str) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        message = await receive()
        while message["type"] == "http.request" and message["more_body"]:
            message = await receive()
        if message["type"] == "http.request":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await seen.put("streaming")
            message = await receive()
            # What is written to a client that has gone is dropped.
            await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
            await send({"type": "http.response.body"})
        await seen.put(message["type"])

    async with serving(app, http=http, lifespan="off") as port:
        with socket.create_connection((HOST, port)) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        assert await seen.get() == "http.disconnect"
        with socket.create_connection((HOST, port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await seen.get() == "streaming"
        assert await seen.get() == "http.disconnect"


async def test_cancelled_in_mid_request() -> None:
    began = asyncio.Event()
    ended: list[str] = []

    async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        began.set()
        try:
            await asyncio.sleep(GUARD)
        except asyncio.CancelledError:
            ended.append("cancelled")
            await asyncio.sleep(0)
            ended.append("cleaned up")
            raise

    config = uvicorn.Config(
        app, host=HOST, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1, timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    serve = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.001)
    port = server.servers[0].sockets[0].getsockname()[1]
    with socket.create_connection((HOST, port)) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await began.wait()
        server.should_exit = True
        await serve
        while len(ended) < 2:
            await asyncio.sleep(0)
    assert ended == ["cancelled", "cleaned up"]


# WebSocket and FastAPI

log: list[str] = []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    log.append("start-up")
    async with asyncio.TaskGroup() as group:
        ticker = group.create_task(asyncio.sleep(GUARD))
        yield {"greeting": "hello"}
        ticker.cancel()
    log.append("shut-down")


app = FastAPI(lifespan=lifespan)


async def resource() -> AsyncIterator[str]:
    log.append("resource opened")
    await asyncio.sleep(0)
    yield "resource"
    log.append("resource closed")


@app.get("/sync/{number}")
def in_a_thread(number: int) -> dict[str, int]:
    return {"square": number * number}


@app.get("/async")
async def in_the_loop(background: BackgroundTasks, what: Annotated[str, Depends(resource)]) -> dict[str, str]:
    background.add_task(log.append, "background")
    return {"got": await asyncio.to_thread(str.upper, what)}


@app.get("/stream")
async def stream() -> StreamingResponse:
    async def numbers() -> AsyncIterator[str]:
        for number in range(100):
            await asyncio.sleep(0)
            yield f"{number}\n"

    return StreamingResponse(numbers())


@app.get("/file")
async def file() -> FileResponse:
    return FileResponse(SOURCE)


@app.websocket("/echo")
async def websocket_echo(websocket: WebSocket) -> None:
    await websocket.accept(subprotocol="echo")
    try:
        while True:
            await websocket.send_text((await websocket.receive_text()).upper())
    except WebSocketDisconnect as disconnect:
        log.append(f"closed with {disconnect.code}")


@app.websocket("/bye")
async def websocket_bye(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_bytes(bytes(300_000))
    await websocket.close(code=4001, reason="bye")


@pytest.mark.parametrize("http", HTTP)
async def test_fastapi(http: str) -> None:
    log.clear()
    async with serving(app, http=http) as port:
        url = f"http://{HOST}:{port}"
        assert json.loads(await curl(f"{url}/sync/12")) == {"square": 144}
        assert json.loads(await curl(f"{url}/async")) == {"got": "RESOURCE"}
        assert await curl(f"{url}/stream") == "".join(f"{number}\n" for number in range(100))
        assert (await curl(f"{url}/file")).encode() == CONTENT
        assert "422" in await curl("-i", f"{url}/sync/text")
        assert log[0] == "start-up"
        assert sorted(log[1:]) == ["background", "resource closed", "resource opened"]
    assert log[-1] == "shut-down"


@pytest.mark.parametrize("http", HTTP)
@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_websocket(http: str, ws: str) -> None:
    log.clear()

    def client(port: int) -> None:
        url = f"ws://{HOST}:{port}"
        with websockets.sync.client.connect(f"{url}/echo", subprotocols=["echo"]) as connection:
            assert connection.subprotocol == "echo"
            for size in (1, 1000, 100_000):
                connection.send("x" * size)
                assert connection.recv(GUARD) == "X" * size
            assert connection.ping().wait(GUARD)
        with websockets.sync.client.connect(f"{url}/bye") as connection:
            assert connection.recv(GUARD) == bytes(300_000)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                connection.recv(GUARD)
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "bye")
        # This one is cut off.
        with websockets.sync.client.connect(f"{url}/echo", subprotocols=["echo"]) as connection:
            connection.send("x")
            assert connection.recv(GUARD) == "X"
            connection.socket.shutdown(socket.SHUT_RDWR)

    async with serving(app, http=http, ws=ws) as port:
        await asyncio.to_thread(client, port)
        while len(log) < 3:
            await asyncio.sleep(0.001)
    # What a connection that was cut off has for a code is the implementation's choice.
    assert log[2].removeprefix("closed with ") in ("1005", "1006")
    assert [*log[:2], *log[3:]] == ["start-up", "closed with 1000", "shut-down"]


@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_websockets_are_closed_when_the_server_ends(ws: str) -> None:
    log.clear()
    ready = asyncio.get_running_loop().create_future()

    def client(port: int) -> int:
        with websockets.sync.client.connect(f"ws://{HOST}:{port}/echo", subprotocols=["echo"]) as connection:
            connection.send("x")
            connection.recv(GUARD)
            loop.call_soon_threadsafe(ready.set_result, None)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                connection.recv(GUARD)
            return closed.value.rcvd.code

    loop = asyncio.get_running_loop()
    async with serving(app, ws=ws) as port:
        talk = asyncio.create_task(asyncio.to_thread(client, port))
        await ready
    assert await talk == 1012
    assert log == ["start-up", "closed with 1012", "shut-down"]


PROGRAM = """
import asyncio, sys
import uvicorn
from transports_anyio import run_asyncio

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            print(message["type"], flush=True)
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    print("request", flush=True)
    await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"whole answer"})

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print("port", self.servers[0].sockets[0].getsockname()[1], flush=True)

server = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_keep_alive=1))
backend, *options = sys.argv[1:]
try:
    run_asyncio(server.serve, backend=backend, backend_options={"use_uvloop": True} if options else None)
except KeyboardInterrupt:
    print("KeyboardInterrupt", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_graceful_shutdown(backend: Any, number: signal.Signals) -> None:
    """After the signal a request that has begun is answered, then the lifespan ends, then the process."""
    argv = [sys.executable, "-c", PROGRAM, backend.anyio_name, *(["uvloop"] if backend.name == "uvloop" else [])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "lifespan.startup\n"
            port = int(server.stdout.readline().removeprefix("port "))
            with socket.create_connection((HOST, port), timeout=GUARD) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert server.stdout.readline() == "request\n"
                server.send_signal(number)
                answer = client.makefile("rb").read()
            assert b"whole answer" in answer
            assert server.stdout.readline() == "lifespan.shutdown\n"
            rest = server.stdout.read()
            assert server.wait(GUARD) == (0 if number == signal.SIGINT else -signal.SIGTERM)
            assert rest == ("KeyboardInterrupt\n" if number == signal.SIGINT else "")
        finally:
            server.kill()
