"""Helpers for the tests of `sendfile`: files, and one that is sent in a task of its own."""

from __future__ import annotations

import io
import select
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, BinaryIO

import anyio
import anyio.lowlevel
import pytest
from support import GUARD, Recorder, Stack, connected, pattern, until

SMALL_CONTENT = pattern(1000)
LARGE_CONTENT = pattern(8 << 20)


@contextmanager
def on_disk(content: bytes) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        yield file


@contextmanager
def in_memory(content: bytes) -> Iterator[BinaryIO]:
    with io.BytesIO(content) as file:
        yield file


#: A file that `os.sendfile` can send, and one that must be read.
files = pytest.mark.parametrize("make_file", [on_disk, in_memory])


async def send(group: Any, transport: Any, file: Any, *args: Any, **options: Any) -> int:
    with anyio.fail_after(2 * GUARD):
        sent: int = await group.sendfile(transport, file, *args, **options)
        return sent


class Sending:
    """A `sendfile` in a task of its own, concurrent with the test."""

    def __init__(self) -> None:
        self.result: int | None = None
        self.error: BaseException | None = None
        self.finished = anyio.Event()
        self.scope = anyio.CancelScope()

    async def run(self, group: Any, transport: Any, *args: Any, **options: Any) -> None:
        try:
            with self.scope:
                self.result = await group.sendfile(transport, *args, **options)
        except Exception as exc:
            self.error = exc
        finally:
            self.finished.set()

    async def wait(self) -> None:
        with anyio.fail_after(2 * GUARD):
            await self.finished.wait()


@asynccontextmanager
async def clogged(stack: Stack, make_file: Any = on_disk, **hooks: Any) -> AsyncIterator[Any]:
    """A `sendfile` that has filled the kernel's buffers: `(group, transport, protocol, peer, file, sending)`."""
    stack.expected_tasks = 1
    async with anyio.create_task_group() as tasks, stack.open() as group:
        with make_file(LARGE_CONTENT) as file:
            async with connected(group, Recorder(**hooks), small=True) as (transport, protocol, peer):
                sending = Sending()
                tasks.start_soon(sending.run, group, transport, file)
                await stuck(transport)
                yield group, transport, protocol, peer, file, sending
                if not sending.finished.is_set():
                    sending.scope.cancel()
                await sending.wait()


async def stuck(transport: Any) -> None:
    """Wait until a sendfile has begun and the kernel's buffers are full."""
    with pytest.raises(RuntimeError, match="sendfile is in progress"):
        with anyio.fail_after(GUARD):
            while True:
                await anyio.lowlevel.checkpoint()
                transport.write(b"")
    sock = transport.get_extra_info("socket")
    await until(lambda: not select.select([], [sock], [], 0)[1])
