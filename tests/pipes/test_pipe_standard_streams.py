"""Pipes: our own standard streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import run_main

pytestmark = pytest.mark.anyio

FILTER = """
import sys, os, anyio
from transports_anyio import *

class Upper(Protocol):
    def __init__(self): self.done = anyio.Event()
    def data_received(self, data): self.out.write(data.upper())
    def connection_lost(self, exc): self.done.set()

async def main():
    async with TransportGroup() as group:
        out, _ = await group.connect_write_pipe(Protocol, sys.stdout)
        upper = Upper()
        upper.out = out
        await group.connect_read_pipe(lambda: upper, sys.stdin)
        await upper.done.wait()
    assert [os.get_blocking(fd) for fd in range(3)] == [True] * 3
    print("usable")
"""


@pytest.mark.differs(
    "standard input, output and error, when their transport ends",
    asyncio="closed",
    here="left open, and blocking again if they were",
    why="other code, and other processes, share them",
)
async def test_standard_streams_work_and_are_left_usable(anyio_backend: Any) -> None:
    result = await run_main(FILTER, anyio_backend, input=b"hello\n", stderr=None)
    assert result.stdout == b"HELLO\nusable\n"


PEAK = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_the_memory_of_a_filter_is_bounded(anyio_backend: Any, tmp_path: Path) -> None:
    """64 MiB through the filter example, gzip in the middle: back-pressure in both directions."""
    name, options = anyio_backend
    backend = "uvloop" if options.get("use_uvloop") else name
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20) * 64)
    example = str(Path(__file__).parents[2] / "examples" / "filter_file.py")
    command = [sys.executable, "-c", PEAK, example, "--backend", backend, str(source), str(tmp_path / "target"), "gzip"]
    result = await anyio.run_process([*command, "-1"], stderr=None)
    assert int(result.stdout) < 96 * 1024, "KiB: the file would not fit"
    unpacked = await anyio.run_process(["gzip", "-dc", str(tmp_path / "target")], stdout=subprocess.PIPE)
    assert unpacked.stdout == source.read_bytes()
