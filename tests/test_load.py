"""Ten thousand connections at once on one group; and the short form of the soak."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from support import GUARD, HOST, open_descriptors
from tls_support import Output

from transports_anyio import Protocol, TransportGroup

pytestmark = [pytest.mark.anyio, pytest.mark.exhaustive]

TESTS = Path(__file__).parent
SOAK = TESTS.parent / "benchmarks" / "soak.py"

WANTED = 10_000
#: Fewer than that show nothing.
LEAST = 200


@pytest.fixture
def descriptors() -> Iterator[int]:
    """Return how many more file descriptors can be opened under the highest limit that we may set."""
    resource = pytest.importorskip("resource", reason="no limits of descriptors here")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
    yield max(soft, limit) - len(open_descriptors())
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Counting(Protocol):
    """An echo protocol that keeps only counts."""

    made = lost = failed = 0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        Counting.made += 1

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        Counting.lost += 1
        Counting.failed += exc is not None


async def test_ten_thousand_connections_at_once(anyio_backend: Any, descriptors: int) -> None:
    count = min(WANTED, descriptors - 100)
    if count < LEAST:
        pytest.skip("too few descriptors")
    Counting.made = Counting.lost = Counting.failed = 0
    with anyio.fail_after(4 * GUARD):
        async with TransportGroup() as group:
            server = await group.create_server(Counting, HOST, 0)
            port = server.sockets[0].getsockname()[1]
            command = [sys.executable, str(TESTS / "load_client.py"), str(port), str(count)]
            async with await anyio.open_process(command, stderr=None) as process:
                output = Output(process)
                assert await output.line() == "connected"
                assert group.statistics().open_transports == {"StreamTransport": count}
                assert Counting.made == count
                await output.say(b"\n")
                assert await output.line() == "echoed"
                server.close()
                server.close_clients()
                await group.wait_closed()
                assert await output.line() == "ended"
        assert group.statistics().bytes_received == group.statistics().bytes_sent == 8 * count
    assert (Counting.made, Counting.lost, Counting.failed) == (count, count, 0)


async def test_a_short_soak(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """Connections come and go, half of them ill-behaved, and memory stays flat."""
    name, options = anyio_backend
    backend = "uvloop" if options.get("use_uvloop") else name
    # This is hardly enough time to warm up, so a leak is looked for in the number of objects.
    command = [sys.executable, str(SOAK), "--seconds", "5", "--round", "0.6", "--resident", "16", "--backend", backend]
    environment = {**os.environ, "PYTHONPATH": str(SOAK.parents[1])}
    with anyio.fail_after(4 * GUARD):
        result = await anyio.run_process(command, env=environment, stderr=subprocess.STDOUT, check=False)
    assert result.returncode == 0, result.stdout.decode()
    assert b"flat" in result.stdout
