"""Helpers for the tests of child processes: a recorder, and children that end with the test."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from support import (
    GUARD,
    SubprocessRecorder,
    open_descriptors,
    until,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class Child(SubprocessRecorder):
    """Record the callbacks of a child, with events for its exit and its end."""

    def __init__(self) -> None:
        super().__init__()
        self.finished = anyio.Event()
        self.exited = anyio.Event()

    @property
    def output(self) -> dict[int, bytearray]:
        """The output and the error output of the child."""
        return {1: bytearray(), 2: bytearray(), **self.received}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        assert data
        super().pipe_data_received(fd, data)

    def process_exited(self) -> None:
        self.exited.set()
        super().process_exited()

    def connection_lost(self, exc: Exception | None) -> None:
        self.finished.set()
        super().connection_lost(exc)

    def lost_pipes(self) -> list[int]:
        """The file descriptors of the `pipe_connection_lost` callbacks, in order."""
        return [call[1] for call in self.calls if call[0] == "pipe_connection_lost"]

    async def end(self) -> None:
        with anyio.fail_after(4 * GUARD):
            await self.finished.wait()
        assert self.count("process_exited") == 1
        assert self.count("connection_lost") == 1
        assert self.names[0] == "connection_made"
        self.transport.close()  # asyncio warns of one that was never closed, even of a child that has ended


class Children:
    """Spawn the children of a test, and wait for them at its end, on the oracle too."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.made: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for protocol in self.made:
            protocol.transport.close()
            await protocol.end()
            with pytest.raises(ProcessLookupError):
                os.kill(protocol.transport.get_pid(), 0)

    async def exec(self, *args: Any, protocol: Any = None, **options: Any) -> tuple[Any, Any]:
        protocol = protocol or Child()
        transport, made = await self.group.subprocess_exec(lambda: protocol, *args, **options)
        assert made is protocol
        self.made.append(protocol)
        await until(lambda: protocol.transport)
        return transport, protocol

    async def python(self, program: str, **options: Any) -> tuple[Any, Any]:
        return await self.exec(sys.executable, "-c", program, **options)


def program(directory: Path, text: str, mode: int = 0o755) -> None:
    """Write a program named `which` into a directory of its own."""
    directory.mkdir()
    (directory / "which").write_text(text)
    (directory / "which").chmod(mode)


def own_descriptors() -> dict[int, str]:
    # uvloop keeps one file descriptor in reserve from its first stream on.
    return {fd: what for fd, what in open_descriptors().items() if what != os.devnull}


def gone(pid: int) -> bool:
    """Return whether no child of ours has this PID, not even a zombie."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return True
    return False
