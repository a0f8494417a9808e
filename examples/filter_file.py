"""Stream a large file through a program, with back-pressure in both directions and constant memory.

    python examples/filter_file.py --backend trio access.log access.log.gz gzip -9

Data is written to the program only as fast as it reads, and read from it only as fast as the result can be written.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import _backend
import anyio
import anyio.to_thread

from transports_anyio import BaseTransport, SubprocessProtocol, SubprocessTransport, TransportGroup

if TYPE_CHECKING:
    from transports_anyio import ReadTransport, WriteTransport

PIECE = 256 * 1024


class Filter(SubprocessProtocol):
    """Turn the callbacks of a child process into events that tasks can wait for."""

    stdin: WriteTransport
    stdout: ReadTransport

    def __init__(self) -> None:
        self.can_write = anyio.Event()
        self.can_write.set()
        self.received: list[bytes] = []
        self.news = anyio.Event()
        self.ended = False
        self.returncode: int | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, SubprocessTransport)
        self.transport = transport
        self.stdin = transport.get_pipe_transport(0)  # type: ignore[assignment]
        self.stdout = transport.get_pipe_transport(1)  # type: ignore[assignment]

    def pause_writing(self) -> None:
        self.can_write = anyio.Event()

    def resume_writing(self) -> None:
        self.can_write.set()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.received.append(data)
        if sum(map(len, self.received)) >= PIECE:
            self.stdout.pause_reading()
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.returncode = self.transport.get_returncode()
        self.ended = True
        self.news.set()
        self.can_write.set()


async def feed(child: Filter, source: BinaryIO) -> None:
    while piece := await anyio.to_thread.run_sync(source.read, PIECE):
        await child.can_write.wait()
        child.stdin.write(piece)
    child.stdin.write_eof()


async def filter_file(command: list[str], source: BinaryIO, target: BinaryIO) -> int | None:
    async with TransportGroup() as group:
        _, child = await group.subprocess_exec(Filter, *command, stderr=None)
        group.start_soon(feed, child, source)
        while child.received or not child.ended:
            if not child.received:
                child.news = anyio.Event()
                await child.news.wait()
            pieces, child.received = child.received, []
            child.stdout.resume_reading()
            await anyio.to_thread.run_sync(target.writelines, pieces)
        return child.returncode


async def main(source: str, target: str, command: list[str]) -> None:
    with Path(source).open("rb") as file, Path(target).open("wb") as result:  # noqa: ASYNC230
        returncode = await filter_file(command, file, result)
    if returncode:
        raise subprocess.CalledProcessError(returncode, command)


if __name__ == "__main__":
    parser = _backend.make_parser("Stream a file through a program.")
    parser.add_argument("source", help="the file to read")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("command", nargs="...", help="the program and its arguments")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.source, options.target, options.command)
