"""Entry points that take a loop factory: uvicorn's, aiohttp's, asyncio's, unittest's, pytest-asyncio's, AnyIO's.

Each has our event loop on trio, and code that reaches trio from it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import aiohttp.web
import pytest
import trio
from peers import GUARD, HOST, curl

from transports_anyio import EventLoop, from_asyncio

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _on_trio_only(backend: Any) -> None:
    if backend.name != "trio":
        pytest.skip("the factory is for trio; asyncio and uvloop have theirs")


UVICORN_APP = """
from contextlib import asynccontextmanager
import trio
from fastapi import FastAPI
from transports_anyio import from_asyncio

@asynccontextmanager
async def lifespan(app):
    print("start-up", flush=True)
    yield
    await from_asyncio.run(trio.sleep, 0)
    print("shut-down", flush=True)

app = FastAPI(lifespan=lifespan)

async def on_trio():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 0.01)
    with trio.move_on_after(0.01):
        await trio.sleep_forever()
    return trio.lowlevel.current_task().name

@app.get("/trio")
async def by_trio():
    return {"task": await from_asyncio.run(on_trio)}

@app.get("/slow")
async def slow():
    print("request", flush=True)
    await from_asyncio.run(trio.sleep, 0.3)
    return "whole answer"
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_uvicorn_with_our_loop(tmp_path: Path, number: signal.Signals) -> None:
    """`uvicorn --loop` serves FastAPI on trio; after a signal a request that has begun is answered, then it ends."""
    (tmp_path / "served.py").write_text(UVICORN_APP)
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        argv = [sys.executable, "-m", "uvicorn", "served:app", "--loop", "transports_anyio:new_event_loop"]
        argv += ["--fd", str(listener.fileno()), "--app-dir", str(tmp_path)]
        server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=[listener.fileno()])
    with server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "start-up\n"
            with socket.create_connection((HOST, port), timeout=GUARD) as client:
                client.sendall(b"GET /trio HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert b"on_trio" in client.makefile("rb").read()
            with socket.create_connection((HOST, port), timeout=GUARD) as client:
                client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                while "request" not in (line := server.stdout.readline()):
                    assert line
                server.send_signal(number)
                assert b"whole answer" in client.makefile("rb").read()
            rest = server.stdout.read()
            assert "shut-down" in rest
            # As with uvicorn's own loops: the signal has its usual effect in the end.
            assert server.wait(GUARD) in {0, 1, -number, 128 + number}
        finally:
            server.kill()


def test_aiohttp_run_app_with_our_loop() -> None:
    """`run_app(loop=…)` serves until SIGINT, cleans up, and closes the loop."""
    log: list[str] = []

    async def handler(request: aiohttp.web.Request) -> aiohttp.web.Response:
        await from_asyncio.run(trio.sleep, 0.001)
        return aiohttp.web.Response(text=(await request.text()).upper())

    async def use(app: aiohttp.web.Application) -> None:
        async def talk() -> None:
            try:
                log.append(await curl("--data", "hello", f"http://{HOST}:{port}/"))
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        talking = asyncio.create_task(talk())
        app.on_cleanup.append(lambda _: talking)

    async def clean(app: aiohttp.web.Application) -> None:
        await from_asyncio.run(trio.sleep, 0)
        log.append("cleaned up")

    app = aiohttp.web.Application()
    app.router.add_post("/", handler)
    app.on_startup.append(use)
    app.on_cleanup.append(clean)
    loop = EventLoop()
    with socket.create_server((HOST, 0)) as sock:
        port = sock.getsockname()[1]
        aiohttp.web.run_app(app, sock=sock, loop=loop, print=None, access_log=None)
    assert log == ["HELLO", "cleaned up"]
    assert loop.is_closed()


def test_runner_with_a_server_between_its_calls() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            await from_asyncio.run(trio.sleep, 0)
            writer.write(line.upper())
        writer.close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes) -> bytes:
        writer.write(line)
        return await reader.readline()

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        server = runner.run(asyncio.start_server(echo, HOST, 0))
        reader, writer = runner.run(asyncio.open_connection(*server.sockets[0].getsockname()))
        for line in [b"one\n", b"two\n"]:
            assert runner.run(talk(reader, writer, line)) == line.upper()
            trio.run(trio.sleep, 0)  # trio is free between the calls.

        async def end() -> None:
            writer.close()
            await writer.wait_closed()
            server.close()
            await server.wait_closed()

        runner.run(end())


def test_unittest_with_our_loop() -> None:
    class OnTrio(unittest.IsolatedAsyncioTestCase):
        loop_factory = EventLoop

        async def asyncSetUp(self) -> None:
            self.lines: asyncio.Queue[bytes] = asyncio.Queue()

            async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self.lines.put(await reader.readline())
                writer.close()

            self.server = await asyncio.start_server(receive, HOST, 0)

        async def asyncTearDown(self) -> None:
            self.server.close()
            await self.server.wait_closed()

        async def test_line(self) -> None:
            _, writer = await asyncio.open_connection(*self.server.sockets[0].getsockname())
            writer.write(b"hello\n")
            self.assertEqual(await self.lines.get(), b"hello\n")
            writer.close()
            await writer.wait_closed()
            await from_asyncio.run(trio.sleep, 0)

    if sys.version_info < (3, 13):  # The attribute is new in 3.13.
        OnTrio._setupAsyncioRunner = lambda self: setattr(  # type: ignore[attr-defined]
            self, "_asyncioRunner", asyncio.Runner(debug=True, loop_factory=EventLoop)
        )
    result = unittest.TestResult()
    OnTrio("test_line").run(result)
    assert result.testsRun == 1
    assert result.errors == result.failures == []


PYTEST_ASYNCIO = """
import asyncio
import pytest_asyncio, pytest, trio
from transports_anyio import EventLoop, from_asyncio

in_session = pytest.mark.asyncio(loop_scope="session")

@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server():
    async def echo(reader, writer):
        while line := await reader.readline():
            await from_asyncio.run(trio.sleep, 0)
            writer.write(line.upper())
        writer.close()
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        yield server

@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def connection(server):
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    yield reader, writer
    writer.close()
    await writer.wait_closed()

@in_session
@pytest.mark.parametrize("line", [b"one\\n", b"two\\n", b"three\\n"])
async def test_line(connection, line):
    reader, writer = connection
    writer.write(line)
    assert await reader.readline() == line.upper()
    assert isinstance(asyncio.get_running_loop(), EventLoop)

def test_between():
    trio.run(trio.sleep, 0)

@in_session
async def test_after(connection):
    await from_asyncio.run(trio.sleep, 0.01)
"""

PYTEST_ASYNCIO_FACTORY = """
from transports_anyio import EventLoop

def pytest_asyncio_loop_factories(config, item):
    return {"trio": EventLoop}
"""

ANYIO = """
import asyncio
import anyio, pytest, trio
from transports_anyio import EventLoop, from_asyncio

pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio", {"loop_factory": EventLoop}

@pytest.fixture(scope="module")
async def stream():
    async def serve(client):
        async with client:
            async for chunk in client:
                await client.send(chunk.upper())
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            yield stream
        tasks.cancel_scope.cancel()

@pytest.mark.parametrize("chunk", [b"one", b"two"])
async def test_chunk(stream, chunk):
    await stream.send(chunk)
    assert await stream.receive() == chunk.upper()
    assert isinstance(asyncio.get_running_loop(), EventLoop)

async def test_trio(stream):
    await from_asyncio.run(trio.sleep, 0.01)
    with anyio.move_on_after(0.01):
        await anyio.sleep_forever()
    assert await anyio.to_thread.run_sync(lambda: anyio.from_thread.run_sync(asyncio.get_running_loop)) is not None
"""


@pytest.mark.parametrize(
    ("suite", "options", "passed"),
    [
        pytest.param(
            PYTEST_ASYNCIO,
            ["-p", "pytest_asyncio.plugin", "-o", "asyncio_default_fixture_loop_scope=session"],
            5,
            id="pytest-asyncio",
        ),
        pytest.param(ANYIO, ["-p", "anyio"], 3, id="AnyIO's plugin"),
    ],
)
def test_pytest_with_our_loop(tmp_path: Path, suite: str, options: list[str], passed: int) -> None:
    """A suite with a server that lives as long as its session, or module."""
    (tmp_path / "test_it.py").write_text(suite)
    (tmp_path / "conftest.py").write_text(PYTEST_ASYNCIO_FACTORY if suite is PYTEST_ASYNCIO else "")
    argv = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-W", "ignore:.*policy", *options, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=2 * GUARD, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout
