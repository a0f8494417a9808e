"""Ask a child process for the date: asyncio's documentation has the same with `loop.subprocess_exec`.

python examples/subprocess_date.py --backend trio
"""

from __future__ import annotations

import sys

import _backend

from transports_anyio import Future, SubprocessProtocol, TransportGroup


class DateProtocol(SubprocessProtocol):
    def __init__(self, exit_future: Future[None]) -> None:
        self.output = bytearray()
        self.exit_future = exit_future

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.output += data

    def connection_lost(self, exc: Exception | None) -> None:
        # The process has exited, and all of its pipes are closed: the output is complete.
        self.exit_future.set_result(None)


async def get_date() -> str:
    async with TransportGroup() as group:
        code = "import datetime; print(datetime.datetime.now())"
        exit_future = group.create_future()
        _, date = await group.subprocess_exec(
            lambda: DateProtocol(exit_future), sys.executable, "-c", code, stdin=None, stderr=None
        )
        await exit_future
        return date.output.decode("ascii").rstrip()


async def main() -> None:
    print(f"Current date: {await get_date()}")


if __name__ == "__main__":
    options = _backend.make_parser("Ask a child for the date.").parse_args()
    _backend.run(options.backend, main)
