"""`sendfile`, its two ways: `os.sendfile` on a plain socket, and blocks that are read in a thread, for files without a
descriptor of their data and for transports that are no sockets."""

from __future__ import annotations

import asyncio
import bz2
import contextlib
import gzip
import io
import lzma
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import needs_pipes, needs_sendfile
from sendfile_helpers import SMALL_CONTENT, in_memory, on_disk, send
from support import Recorder, Stack, connected

from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio


# -- the fallback -----------------------------------------------------------------------------------------------------


@needs_sendfile
async def test_without_the_fallback(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with in_memory(SMALL_CONTENT) as file:
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await group.sendfile(transport, file, fallback=False)
            assert file.tell() == 0
        with on_disk(SMALL_CONTENT) as file:
            assert await send(group, transport, file, fallback=False) == len(SMALL_CONTENT)
        assert await peer.receive_exactly(len(SMALL_CONTENT)) == SMALL_CONTENT


@needs_sendfile
async def test_a_system_without_sendfile(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        monkeypatch.delattr(os, "sendfile")
        with on_disk(SMALL_CONTENT) as file:
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await group.sendfile(transport, file, fallback=False)
            assert await send(group, transport, file, 10) == len(SMALL_CONTENT) - 10
        assert await peer.receive_exactly(990) == SMALL_CONTENT[10:]


# -- the data of the fd and the data that the file reads --------------------------------------------------------------


class UpperCase(io.FileIO):
    """A derived class that reads other data than its file descriptor has."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size).upper()

    def readall(self) -> bytes:
        return super().readall().upper()

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        view[:count] = bytes(view[:count]).upper()
        return count


class Delegating:
    """A wrapper that forwards everything except reading."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read(size)
        return data.upper()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def compressed_by(module: Any) -> Callable[[Path], Any]:
    def make(path: Path) -> Any:
        with module.open(path, "wb") as file:
            file.write(b"content\n" * 50_000)
        return module.open(path, "rb")

    return make


def read_through(wrap: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def make(path: Path) -> Any:
        path.write_bytes(b"content\n" * 50_000)
        return wrap(path)

    return make


#: Files whose descriptors do not hold what they read.
OTHER_FILES: dict[str, Callable[[Path], Any]] = {
    "gzip": compressed_by(gzip),
    "bz2": compressed_by(bz2),
    "lzma": compressed_by(lzma),
    "a reader of gzip": lambda path: io.BufferedReader(compressed_by(gzip)(path)),
    "a derived file": read_through(UpperCase),
    "a reader of a derived file": read_through(lambda path: io.BufferedReader(UpperCase(path))),
    "a wrapper": read_through(lambda path: Delegating(open(path, "rb"))),
}


@asynccontextmanager
async def over_tcp(group: Any, _: Any) -> AsyncIterator[tuple[Any, Callable[[], Any]]]:
    async with connected(group) as (transport, _, peer):
        yield transport, peer.receive_all


@asynccontextmanager
async def over_tls(group: Any, context: Any) -> AsyncIterator[tuple[Any, Callable[[], Any]]]:
    ours, theirs = socket.socketpair()
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    receiver = Recorder()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connect_tls, group, theirs, context, receiver)
        transport, _ = await group.create_connection(Recorder, sock=ours, ssl=client, server_hostname="localhost")

    async def receive() -> bytes:
        await receiver.wait_for("connection_lost")
        return bytes(receiver.received)

    yield transport, receive


async def connect_tls(group: Any, sock: socket.socket, context: Any, protocol: Any) -> None:
    await group.connect_accepted_socket(lambda: protocol, sock, ssl=context)


@pytest.mark.differs(
    "a file that decompresses (`gzip`, `bz2`, `lzma`)",
    asyncio="sends the compressed bytes on plain sockets, the decompressed ones over TLS",
    here="sends what reading the file returns, and what was written to it but not flushed",
    why="the peer gets the same over every transport",
)
@pytest.mark.parametrize("over", [over_tcp, over_tls])
@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.ours_only
async def test_f4_the_peer_gets_what_the_file_reads(
    stack: Stack, server_context: ssl.SSLContext, tmp_path: Path, kind: str, over: Any
) -> None:
    with contextlib.closing(OTHER_FILES[kind](tmp_path / "file")) as file:
        expected = file.read()
        assert expected.lower() == b"content\n" * 50_000
        async with stack.open() as group, over(group, server_context) as (transport, receive):
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await group.sendfile(transport, file, fallback=False)
            assert await send(group, transport, file) == len(expected)
            assert await send(group, transport, file, 10, 20) == 20
            transport.close()
            assert await receive() == expected + expected[10:30]


@pytest.mark.differs("a file that decompresses (`gzip`, `bz2`, `lzma`)")
@pytest.mark.parametrize("over", [over_tcp, over_tls])
@pytest.mark.ours_only
async def test_f4_unflushed_data_of_the_file(stack: Stack, server_context: ssl.SSLContext, over: Any) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        async with stack.open() as group, over(group, server_context) as (transport, receive):
            assert await send(group, transport, file) == 7
            transport.close()
            assert await receive() == b"content"


@needs_sendfile
@pytest.mark.parametrize(
    "open_file",
    [
        lambda path: open(path, "rb"),
        lambda path: open(path, "rb", buffering=0),
        lambda path: open(path, "r+b"),
        lambda path: os.fdopen(os.open(path, os.O_RDONLY), "rb"),
    ],
    ids=["buffered", "raw", "for both", "by descriptor"],
)
async def test_f4_files_that_the_system_sends(stack: Stack, tmp_path: Path, open_file: Any) -> None:
    (tmp_path / "file").write_bytes(SMALL_CONTENT)
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open_file(tmp_path / "file") as file:
            assert await send(group, transport, file, fallback=False) == len(SMALL_CONTENT)
        assert await peer.receive_exactly(len(SMALL_CONTENT)) == SMALL_CONTENT


@needs_sendfile
async def test_a_named_temporary_file_is_sent_by_the_system(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with tempfile.NamedTemporaryFile() as file:
            file.write(SMALL_CONTENT)
            file.flush()
            assert await send(group, transport, file, fallback=False) == len(SMALL_CONTENT)
        assert await peer.receive_exactly(len(SMALL_CONTENT)) == SMALL_CONTENT


@pytest.mark.differs(
    "`fallback=False` where the system cannot send the file",
    asyncio="`RuntimeError` on older Pythons",
    here="`SendfileNotAvailableError`, a `RuntimeError`",
    why="[CPython 152099](https://github.com/python/cpython/issues/152099)",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("over", ["tls", pytest.param("pipe", marks=needs_pipes), "memory"])
async def test_f4_no_system_call_and_no_fallback(stack: Stack, server_context: ssl.SSLContext, over: str) -> None:
    async with stack.open() as group:
        with on_disk(SMALL_CONTENT) as file:
            if over == "tls":
                async with over_tls(group, server_context) as (transport, _):
                    with pytest.raises(asyncio.SendfileNotAvailableError, match="native sendfile is not supported"):
                        await group.sendfile(transport, file, fallback=False)
            elif over == "pipe":
                reading, writing = os.pipe()
                with os.fdopen(reading, "rb", 0):
                    transport, _ = await group.connect_write_pipe(Recorder, os.fdopen(writing, "wb", 0))
                    with pytest.raises(asyncio.SendfileNotAvailableError, match="native sendfile is not supported"):
                        await group.sendfile(transport, file, fallback=False)
                    transport.abort()
            else:
                (transport, _), _ = await memory_connection(group, Recorder, Recorder)
                with pytest.raises(asyncio.SendfileNotAvailableError, match="native sendfile is not supported"):
                    await group.sendfile(transport, file, fallback=False)
            assert file.tell() == 0
