"""Every example runs on every backend, as a program of its own, and real programs talk to it."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from support import GUARD, HOST

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parents[1] / "examples"


def name_of(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    name, options = anyio_backend
    return "uvloop" if options.get("use_uvloop") else name


def unused_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def command(example: str, *arguments: object) -> list[str]:
    return [sys.executable, "-u", str(EXAMPLES / f"{example}.py"), *map(str, arguments)]


@asynccontextmanager
async def serving(example: str, backend: str, port: int) -> AsyncIterator[anyio.abc.Process]:
    """Run an example that serves until Ctrl-C, which it has to take without a word."""
    process = await anyio.open_process(command(example, "--backend", backend, "--port", port))
    try:
        assert process.stdout is not None
        with anyio.fail_after(4 * GUARD):
            announcement = await process.stdout.receive()
        assert str(port) in announcement.decode()
        yield process
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        errors = b"".join([chunk async for chunk in process.stderr])
        assert await process.wait() == 0, errors.decode()
        assert errors == b""
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.aclose()


async def output(*arguments: str, text: bytes = b"") -> str:
    with anyio.fail_after(4 * GUARD):
        return (await anyio.run_process(arguments, input=text, stderr=None)).stdout.decode()


async def test_tcp_echo(anyio_backend: Any) -> None:
    backend = name_of(anyio_backend)
    port = unused_port()
    async with serving("tcp_echo_server", backend, port):
        said = await output(*command("tcp_echo_client", "--backend", backend, "--port", port, "Is this on?"))
        assert said.splitlines() == ["sent      'Is this on?'", "received  'Is this on?'", "closed"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl_talks_to_the_echo_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("tcp_echo_server", name_of(anyio_backend), port):
        # It goes on when its input has ended, so it is ended by us.
        curl = await anyio.open_process(["curl", "-sSN", f"telnet://{HOST}:{port}"])
        try:
            assert curl.stdin is not None
            assert curl.stdout is not None
            await curl.stdin.send(b"hello from curl\n")
            with anyio.fail_after(4 * GUARD):
                assert await curl.stdout.receive() == b"hello from curl\n"
        finally:
            with anyio.CancelScope(shield=True):
                curl.kill()
                await curl.aclose()


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc")
async def test_nc_talks_to_the_echo_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("tcp_echo_server", name_of(anyio_backend), port):
        assert await output("nc", "-N", HOST, str(port), text=b"hello from nc\n") == "hello from nc\n"


async def test_udp_echo(anyio_backend: Any) -> None:
    backend = name_of(anyio_backend)
    port = unused_port(socket.SOCK_DGRAM)
    async with serving("udp_echo_server", backend, port):
        said = await output(*command("udp_echo_client", "--backend", backend, "--port", port, "Is this on?"))
        assert said.splitlines() == ["sent      'Is this on?'", "received  'Is this on?'", "closed"]


async def test_a_client_without_a_server(anyio_backend: Any) -> None:
    """Nobody listens, and the system says so (ICMP)."""
    port = unused_port(socket.SOCK_DGRAM)
    said = await output(*command("udp_echo_client", "--backend", name_of(anyio_backend), "--port", port))
    assert "nobody there" in said


async def test_the_date(anyio_backend: Any) -> None:
    said = await output(*command("subprocess_date", "--backend", name_of(anyio_backend)))
    assert said.startswith("Current date: 20")


async def test_a_filter(anyio_backend: Any, tmp_path: Path) -> None:
    lines = b"".join(b"%d\n" % (number * 7919 % 10_000) for number in range(10_000))
    (tmp_path / "source").write_bytes(lines)
    paths = [str(tmp_path / "source"), str(tmp_path / "target")]
    await output(*command("filter_file", "--backend", name_of(anyio_backend), *paths, "sort", "-n"))
    assert (tmp_path / "target").read_bytes() == b"".join(b"%d\n" % number for number in range(10_000))


async def test_the_line_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("line_server", name_of(anyio_backend), port):
        async with await anyio.connect_tcp(HOST, port) as stream:
            await stream.send(b"login anna\nquit\n")
            heard = b"".join([chunk async for chunk in stream]).decode()
        assert heard.splitlines() == ["please login", "welcome anna", "goodbye"]


def test_the_tour() -> None:
    """It visits every backend by itself."""
    result = subprocess.run(command("tour"), capture_output=True, text=True, timeout=8 * GUARD, check=True)
    assert result.stdout.splitlines()[-1].endswith("equal")
