"""Ask a child process for the date: asyncio's documentation has the same with `loop.subprocess_exec`.

python examples/subprocess_date.py --backend trio
"""

from __future__ import annotations

import sys

import _backend
import anyio

from transports_anyio import SubprocessProtocol, TransportGroup


class DateProtocol(SubprocessProtocol):
    def __init__(self) -> None:
        self.output = bytearray()
        self.finished = anyio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output += data

    def connection_lost(self, exc: Exception | None) -> None:
        # The process has exited, and all of its pipes are closed: the output is complete.
        self.finished.set()


async def get_date() -> str:
    async with TransportGroup() as group:
        code = "import datetime; print(datetime.datetime.now())"
        _, date = await group.subprocess_exec(DateProtocol, sys.executable, "-c", code, stdin=None, stderr=None)
        await date.finished.wait()
        return date.output.decode("ascii").rstrip()


async def main() -> None:
    print(f"Current date: {await get_date()}")


if __name__ == "__main__":
    options = _backend.make_parser("Ask a child for the date.").parse_args()
    _backend.run(options.backend, main)
