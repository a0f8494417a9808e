"""The examples that need other people's libraries, as programs of their own, on every backend."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peers import GUARD, HOST, PostgreSQL, free_port, listens, run, service

EXAMPLES = Path(__file__).parents[1] / "examples"


def command(example: str, *arguments: object) -> list[str]:
    return [sys.executable, "-u", str(EXAMPLES / f"{example}.py"), *map(str, arguments)]


def output(*argv: str) -> list[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=GUARD, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_asgi_on_trio(backend: Any) -> None:
    port = free_port()
    argv = command("asgi_on_trio", "--backend", backend.name, "--port", port)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    guard = threading.Timer(GUARD, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on http://{HOST}:{port}\n"
        url = f"http://{HOST}:{port}/wait?seconds=0.01"
        # The program prints its line first, and listens a moment later.
        curl = ["curl", "--silent", "--show-error", "--retry-connrefused", "--retry", "20", "--retry-delay", "1"]
        assert run(*curl, url) == b'{"finished":["a","b","c"]}'
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate()
        assert (process.returncode, said, errors) == (0, "", "")
    finally:
        guard.cancel()
        guard.join()
        process.kill()
        process.communicate()


@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that accepts connections and says nothing."""
    with socket.create_server((HOST, 0)) as sock:
        yield f"http://{HOST}:{sock.getsockname()[1]}"


def test_aiohttp_client(backend: Any, tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello")
    (tmp_path / "large").write_bytes(bytes(1_000_000))
    port = free_port()
    argv = [sys.executable, "-m", "http.server", str(port), "--bind", HOST, "--directory", str(tmp_path)]
    with service(argv, lambda: listens(port)), silent_server() as silent:
        base = f"http://{HOST}:{port}"
        urls = [f"{base}/hello", f"{base}/large", f"{base}/absent", silent, f"http://{HOST}:{free_port()}"]
        said = output(*command("aiohttp_client", "--backend", backend.name, "--patience", "2", *urls))
    assert sorted(line.partition(", ")[0] if "404" in line else line for line in said) == sorted(
        [
            f"{urls[0]}: 200, 5 bytes",
            f"{urls[1]}: 200, 1000000 bytes",
            f"{urls[2]}: 404",
            f"{urls[3]}: nothing within 2.0 s",
            f"{urls[4]}: ClientConnectorError",
        ]
    )


def test_asyncpg_pool(backend: Any, postgresql: PostgreSQL) -> None:
    said = output(*command("asyncpg_pool", "--backend", backend.name, postgresql.dsn))
    assert said == ["squares [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]", "gave up", "total 42"]


@pytest.mark.parametrize("example", ["aiohttp_client", "asgi_on_trio", "asyncpg_pool"])
def test_help(example: str, backend: Any) -> None:
    said = output(*command(example, "--help"))
    assert said[0].startswith("usage: ")
    assert any("--backend {asyncio,uvloop,trio}" in line for line in said)
