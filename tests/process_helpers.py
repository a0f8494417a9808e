"""Helpers for the tests of child processes: a recorder, and children that end with the test."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from support import (
    GUARD,
    open_descriptors,
    until,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class Child(asyncio.SubprocessProtocol):
    """Record the callbacks of a child, and check their order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.transport: Any = None
        self.output: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self.finished = anyio.Event()
        self.exited = anyio.Event()

    def record(self, name: str, *args: Any) -> None:
        assert name == "connection_made" or self.transport is not None, (name, self.calls)
        assert ("connection_lost", None) not in self.calls, (name, self.calls)
        self.calls.append((name, *args))

    def connection_made(self, transport: Any) -> None:
        self.record("connection_made")
        self.transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        assert data
        assert ("pipe_connection_lost", fd) not in self.calls
        self.record("pipe_data_received", fd)
        self.output[fd] += data

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.record("pipe_connection_lost", fd)
        self.lost_pipe(fd, exc)

    def lost_pipe(self, fd: int, exc: Exception | None) -> None: ...

    def process_exited(self) -> None:
        self.record("process_exited")
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.record("connection_lost", exc)
        self.finished.set()

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    async def end(self) -> None:
        with anyio.fail_after(4 * GUARD):
            await self.finished.wait()
        assert self.names().count("process_exited") == 1
        assert self.names().count("connection_lost") == 1
        assert self.names()[0] == "connection_made"
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
