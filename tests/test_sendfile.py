"""`sendfile`: what is sent, in which order, the file's position afterwards, and every way to end.

Two ways to send: `os.sendfile` on a plain socket, and blocks that are read in a thread, for files without a
descriptor and for transports that are no sockets.
"""

from __future__ import annotations

import asyncio
import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import io
import lzma
import os
import select
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import anyio.lowlevel
import pytest
import trustme
from anyio.abc import SocketStream
from anyio.streams.tls import TLSStream
from network import HOST, cancelled_after, needs_pipes, needs_sendfile, needs_unix, run_program
from support import (
    GUARD,
    Peer,
    Recorder,
    Stack,
    collect_contexts,
    connected,
    fill,
    listening,
    pattern,
    peer_process,
    raises_inside,
    settle,
    turns,
    until,
)

from transports_anyio import Protocol, TransportGroup, current_group
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio

SMALL_CONTENT = pattern(1000)
LARGE_CONTENT = pattern(8 << 20)


@pytest.fixture
def server_context(certificate_authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate_authority.issue_cert("localhost").configure_cert(context)
    return context


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


# -- what is sent -----------------------------------------------------------------------------------------------------


@files
@pytest.mark.parametrize(
    ("offset", "count", "expected"),
    [
        (0, None, SMALL_CONTENT),
        (100, None, SMALL_CONTENT[100:]),
        (0, 10, SMALL_CONTENT[:10]),
        (990, 10, SMALL_CONTENT[990:]),
        (100, 1, SMALL_CONTENT[100:101]),
        (100, 5000, SMALL_CONTENT[100:]),
        (1000, None, b""),
        (5000, None, b""),
        (5000, 10, b""),
    ],
)
async def test_offset_and_count(stack: Stack, make_file: Any, offset: int, count: int | None, expected: bytes) -> None:
    if make_file is on_disk and not expected:
        stack.needs_python(3, 14, 10, why="a file of which nothing was sent stays where it was")
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with make_file(SMALL_CONTENT) as file:
            if make_file is on_disk:
                file.seek(7)  # Whatever its position.
            assert await send(group, transport, file, offset, count) == len(expected)
            assert file.tell() == offset + len(expected)
        transport.close()
        assert await peer.receive_all() == expected


@files
async def test_an_empty_file(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _):
        with make_file(b"") as file:
            assert await send(group, transport, file) == 0
            assert file.tell() == 0


@files
@pytest.mark.parametrize("buffering", [0, -1], ids=["raw", "buffered"])
async def test_a_large_file(stack: Stack, make_file: Any, buffering: int, tmp_path: Path) -> None:
    content = LARGE_CONTENT
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        path = tmp_path / "file"
        path.write_bytes(content)
        with path.open("rb", buffering) if make_file is on_disk else io.BytesIO(content) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                assert await peer.receive_exactly(len(content)) == content
            assert sending.result == len(content)
            assert file.tell() == len(content)
            assert file.read() == b""
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"
        assert "pause_writing" not in protocol.names


@pytest.mark.differs(
    "a file that the program has read from before",
    asyncio="its buffer and its position disagree",
    here="they agree",
    why="the position says how much was sent",
)
@pytest.mark.ours_only
async def test_a_file_that_was_read_before(stack: Stack) -> None:
    """The position of a buffered file differs from that of its file descriptor, because it has read ahead."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with tempfile.NamedTemporaryFile() as named:
            named.write(SMALL_CONTENT)
            named.flush()
            with open(named.name, "rb") as file:
                assert file.read(1) == SMALL_CONTENT[:1]
                assert await send(group, transport, file, 10, 20) == 20
                assert file.tell() == 30
                assert file.read(5) == SMALL_CONTENT[30:35]
        assert await peer.receive_exactly(20) == SMALL_CONTENT[10:30]


@pytest.mark.differs(
    "`offset=0`, with a file that has to be read",
    asyncio="until 3.14 starts at the file's current position",
    here="starts at the beginning",
    why="as `os.sendfile` ([CPython 150107](https://github.com/python/cpython/issues/150107))",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_f1_offset_0_is_the_beginning_for_the_fallback(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with in_memory(SMALL_CONTENT) as file:
            file.seek(500)
            assert await send(group, transport, file, 0) == 1000
        assert await peer.receive_exactly(1000) == SMALL_CONTENT


@files
@pytest.mark.parametrize("count", [1, 16383, 16385, 256 * 1024 - 1, 256 * 1024 + 1, 1_000_003])
async def test_f2_exactly_count(stack: Stack, make_file: Any, count: int) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with make_file(LARGE_CONTENT) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file, 5, count)
                assert await peer.receive_exactly(count) == LARGE_CONTENT[5 : 5 + count]
            assert sending.result == count
            assert file.tell() == 5 + count
        transport.close()
        assert await peer.receive() == b""


class Descriptor:
    """A file that is nothing but its descriptor."""

    def __init__(self, file: BinaryIO) -> None:
        self.fileno = file.fileno


@needs_sendfile
async def test_a_file_that_is_only_a_descriptor(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with on_disk(SMALL_CONTENT) as file:
            assert await send(group, transport, Descriptor(file), 10, 100) == 100
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 110
        assert await peer.receive_exactly(100) == SMALL_CONTENT[10:110]


@pytest.mark.differs(
    "`sendfile` of a file without positions (a pipe)",
    asyncio="sent, then an error",
    here="sent",
    why="there is no position to restore",
)
@pytest.mark.ours_only
async def test_a_pipe(stack: Stack) -> None:
    """`os.sendfile` refuses a pipe, and a pipe has no position."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        receiver, sender = os.pipe()
        with open(receiver, "rb") as file:
            with open(sender, "wb") as other:
                other.write(SMALL_CONTENT)
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await send(group, transport, file, fallback=False)
            assert await send(group, transport, file) == len(SMALL_CONTENT)
            with pytest.raises(OSError):
                await send(group, transport, file, 10)
        assert await peer.receive_exactly(1000) == SMALL_CONTENT


@pytest.mark.differs(
    "a file that reports a size of 0 (`/proc`)",
    asyncio="nothing is sent",
    here="its content is sent",
    why="a file ends where reading ends",
)
@pytest.mark.ours_only
@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="there is no /proc")
async def test_a_file_with_more_data_than_its_size(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open("/proc/version", "rb") as file:
            assert os.fstat(file.fileno()).st_size == 0
            sent = await send(group, transport, file)
            file.seek(0)
            assert await peer.receive_exactly(sent) == file.read()


# -- order ------------------------------------------------------------------------------------------------------------


@files
async def test_the_file_is_sent_in_order_with_writes(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        written = fill(transport, at_least=200_000)
        with make_file(LARGE_CONTENT[:300_000]) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                assert await peer.receive_exactly(written) == bytes(written)
                assert await peer.receive_exactly(300_000) == LARGE_CONTENT[:300_000]
        assert sending.result == 300_000
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"
        assert protocol.names == ["connection_made", "pause_writing", "resume_writing"]


@pytest.mark.differs(
    "`resume_writing` during `sendfile`",
    asyncio="on plain sockets as soon as the buffer is empty",
    here="after the file",
    why="`write` is refused until then",
)
@files
@pytest.mark.ours_only
async def test_resume_writing_waits(stack: Stack, make_file: Any) -> None:
    """A protocol that goes on writing as soon as it may."""
    async with stack.open() as group:
        protocol = Recorder(on_resume_writing=lambda p: p.transport.write(b"the end"))
        async with connected(group, protocol, small=True) as (transport, _, peer):
            written = fill(transport, at_least=200_000)
            with make_file(LARGE_CONTENT[:300_000]) as file:
                sending = Sending()
                async with anyio.create_task_group() as tasks:
                    stack.expected_tasks = 1
                    tasks.start_soon(sending.run, group, transport, file)
                    await peer.receive_exactly(written)
                    transport.set_write_buffer_limits(high=0)
                    assert await peer.receive_exactly(300_000) == LARGE_CONTENT[:300_000]
            assert await peer.receive_exactly(7) == b"the end"
            assert sending.result == 300_000


@pytest.mark.differs(
    "`write` while a file is read block by block",
    asyncio="written in between",
    here="`RuntimeError`, as on plain sockets",
    why="nothing is reordered",
)
@files
@pytest.mark.ours_only
async def test_writing_is_refused_during_sendfile(stack: Stack, make_file: Any) -> None:
    async with clogged(stack, make_file) as (group, transport, _, peer, file, sending):
        for write in (lambda: transport.write(b"x"), lambda: transport.writelines([b"x"])):
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                write()
        with pytest.raises(RuntimeError, match="sendfile is in progress"):
            await group.sendfile(transport, file)
        with pytest.raises(TypeError):
            transport.write("x")
        assert await peer.receive_exactly(len(LARGE_CONTENT)) == LARGE_CONTENT
        await sending.wait()
        assert sending.result == len(LARGE_CONTENT)
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"


@pytest.mark.differs(
    "`write_eof` during `sendfile`",
    asyncio="breaks the `sendfile`",
    here="takes effect after the file",
    why="it means: after everything",
)
@files
@pytest.mark.ours_only
async def test_write_eof_waits(stack: Stack, make_file: Any) -> None:
    async with clogged(stack, make_file) as (_, transport, protocol, peer, _, sending):
        transport.write_eof()
        assert await peer.receive_all() == LARGE_CONTENT
        await sending.wait()
        assert sending.result == len(LARGE_CONTENT)
        with pytest.raises(RuntimeError, match="after write_eof"):
            transport.write(b"x")
        peer.close()
        await protocol.wait_for("connection_lost")


async def test_nothing_is_received_during_sendfile(stack: Stack) -> None:
    async with clogged(stack) as (group, transport, protocol, peer, _, sending):
        assert not transport.is_reading()
        await peer.send(b"hello")
        await settle(group)
        assert protocol.received == b""
        assert await peer.receive_exactly(len(LARGE_CONTENT)) == LARGE_CONTENT
        assert await protocol.wait_received(5) == b"hello"
        await sending.wait()
        assert transport.is_reading()


@files
async def test_reading_stays_paused_after_sendfile(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        with make_file(SMALL_CONTENT) as file:
            await send(group, transport, file)
        assert not transport.is_reading()
        await peer.send(b"hello")
        await settle(group)
        assert protocol.received == b""
        transport.resume_reading()
        assert await protocol.wait_received(5) == b"hello"


@files
async def test_after_the_end_of_file(stack: Stack, make_file: Any) -> None:
    """The peer has finished, and still listens."""
    protocol = Recorder(on_eof_received=lambda p: True)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        peer.shutdown()
        await protocol.wait_for("eof_received")
        with make_file(SMALL_CONTENT) as file:
            assert await send(group, transport, file) == len(SMALL_CONTENT)
        assert await peer.receive_exactly(len(SMALL_CONTENT)) == SMALL_CONTENT
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "eof_received", "connection_lost"]


# -- bad calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"count": 0}, ValueError),
        ({"count": -1}, ValueError),
        ({"count": 1.5}, TypeError),
        ({"count": "1"}, TypeError),
        ({"offset": -1}, ValueError),
        ({"offset": None}, TypeError),
        ({"offset": 1.0}, TypeError),
    ],
    ids=str,
)
async def test_bad_arguments(stack: Stack, options: dict[str, Any], expected: type[Exception]) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with on_disk(SMALL_CONTENT) as file:
            name = next(iter(options))
            with pytest.raises(expected, match=f"{name} must be a"):
                await group.sendfile(transport, file, **options)
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"


@pytest.mark.differs(
    "`sendfile` of a text file without a `mode` (`StringIO`)",
    asyncio="`AttributeError`",
    here="`ValueError`",
    why="as for text files with one",
)
async def test_text_mode(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    async with stack.open() as group, connected(group) as (transport, _, _):
        with open(tmp_path / "file") as file:
            with pytest.raises(ValueError, match="binary mode"):
                await group.sendfile(transport, file)
        if not stack.is_oracle:  # Which looks for `readinto`.
            with pytest.raises(ValueError, match="binary mode"):
                await group.sendfile(transport, io.StringIO("text"))


@pytest.mark.ours_only("asyncio calls `readinto`, which returns the bytes or is missing")
async def test_a_text_file_without_an_encoding_attribute(stack: Stack) -> None:
    """Only the caller gets the error."""
    async with stack.open() as group, connected(group) as (transport, _, peer):
        contexts = collect_contexts(group)
        with pytest.raises(TypeError, match="bytes-like"):
            await group.sendfile(transport, codecs.getreader("utf-8")(io.BytesIO(b"text")))
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"
    assert contexts == []


async def test_a_closed_file(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with on_disk(SMALL_CONTENT) as file:
            pass
        with pytest.raises(ValueError, match="closed file"):
            await group.sendfile(transport, file)
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"


async def test_a_file_that_cannot_be_read(stack: Stack, tmp_path: Path) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open(tmp_path / "file", "wb") as file:
            file.write(SMALL_CONTENT)
            file.flush()
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await group.sendfile(transport, file, fallback=False)
            with pytest.raises((OSError, AttributeError)):
                await group.sendfile(transport, file)
        transport.write(b"alive")
        assert await peer.receive_exactly(5) == b"alive"


class Failing(io.BytesIO):
    """A file on a failing disk."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        if self.tell() == 300_000:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(min(size, 300_000 - self.tell()))

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


async def test_a_file_that_fails_in_the_middle(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        file = Failing(LARGE_CONTENT)
        sending = Sending()
        async with anyio.create_task_group() as tasks:
            stack.expected_tasks = 1
            tasks.start_soon(sending.run, group, transport, file)
            await peer.receive_exactly(300_000)
            await sending.wait()
        assert isinstance(sending.error, OSError)
        assert sending.error.errno == errno.EIO
        assert file.tell() == 300_000
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


class Slow(io.BytesIO):
    """A file whose first block takes long to read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.asked = threading.Event()
        self.go_on = threading.Event()

    def read(self, size: int | None = -1) -> bytes:
        self.asked.set()
        assert self.go_on.wait(GUARD)
        return super().read(size)


@pytest.mark.ours_only("asyncio never returns")
async def test_a_block_that_was_read_but_not_sent(stack: Stack) -> None:
    """Nothing of it is sent, so the file's position is before the block."""
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        file = Slow(SMALL_CONTENT)
        sending = Sending()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sending.run, group, transport, file, 100)
            await until(file.asked.is_set)
            transport.abort()
            await protocol.wait_for("connection_lost")
            file.go_on.set()
            await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        assert file.tell() == 100


async def test_a_closing_transport(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        transport.close()
        with on_disk(SMALL_CONTENT) as file:
            with pytest.raises(RuntimeError, match="Transport is closing"):
                await group.sendfile(transport, file)
            await protocol.wait_for("connection_lost")
            with pytest.raises(RuntimeError, match="Transport is closing"):
                await group.sendfile(transport, file)


@pytest.mark.differs(
    "`sendfile` after `write_eof`",
    asyncio="`SendfileNotAvailableError` or `RuntimeError`",
    here="`RuntimeError`",
    why="as `write`",
)
@pytest.mark.ours_only
async def test_after_write_eof(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, _, _):
        transport.write_eof()
        with on_disk(SMALL_CONTENT) as file, pytest.raises(RuntimeError, match="after write_eof"):
            await group.sendfile(transport, file)


class ForeignTransport(asyncio.WriteTransport):
    def is_closing(self) -> bool:
        return False


async def test_transports_that_cannot_send_files(stack: Stack) -> None:
    async with stack.open() as group:
        with on_disk(SMALL_CONTENT) as file:
            with pytest.raises(RuntimeError, match="sendfile is not supported for transport"):
                await group.sendfile(ForeignTransport(), file)


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


# -- the data of the fd and the data that the file reads ---------------------------------------------------------------


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


# -- ways to end ------------------------------------------------------------------------------------------------------


@pytest.mark.differs("`close`, `abort` or a reset during `sendfile`")
@files
@pytest.mark.ours_only
async def test_f3_the_peer_resets_in_the_middle(stack: Stack, make_file: Any) -> None:
    async with clogged(stack, make_file) as (group, transport, protocol, peer, _, sending):
        contexts = collect_contexts(group)
        peer.reset()
        await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionError)
        assert transport.is_closing()
        assert contexts == []


@pytest.mark.ours_only("asyncio reports it from a callback, or never returns")
async def test_f3_the_peer_resets_before_the_file_is_sent(stack: Stack) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        fill(transport, at_least=200_000)
        with on_disk(SMALL_CONTENT) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                await turns()
                peer.reset()
                await sending.wait()
            assert isinstance(sending.error, ConnectionError)
            assert file.tell() == 0
        await protocol.wait_for("connection_lost")
        assert contexts == []


@needs_sendfile
@files
@pytest.mark.ours_only("asyncio reports it from a callback, or never returns")
async def test_f3_an_unnoticed_reset_before_sendfile(stack: Stack, make_file: Any) -> None:
    """Not even the file's first byte is sent, and the fall-back is not used either."""
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        peer.reset()
        with make_file(LARGE_CONTENT) as file:
            with pytest.raises(ConnectionError) as caught:
                await send(group, transport, file, fallback=make_file is not on_disk)
            assert file.tell() == 0 or make_file is not on_disk
        await protocol.wait_for("connection_lost")
        assert protocol.exception is caught.value


@pytest.mark.differs(
    "`close`, `abort` or a reset during `sendfile`",
    asyncio="an error in a callback, or the caller waits without end",
    here="the caller gets a `ConnectionError`",
    why="an awaited call must end",
)
@files
@pytest.mark.ours_only
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_ending_the_transport_in_the_middle(stack: Stack, make_file: Any, how: str) -> None:
    async with clogged(stack, make_file) as (group, transport, protocol, peer, file, sending):
        contexts = collect_contexts(group)
        getattr(transport, how)()
        await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        data = await peer.receive_all()
        assert LARGE_CONTENT.startswith(data)
        assert len(data) < len(LARGE_CONTENT)
        if make_file is on_disk and hasattr(os, "sendfile"):
            assert file.tell() == len(data)
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert contexts == []


@pytest.mark.ours_only("asyncio raises InvalidStateError in a callback")
async def test_close_still_flushes_what_was_written_before(stack: Stack) -> None:
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        written = fill(transport, at_least=200_000)
        with on_disk(SMALL_CONTENT) as file:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                await turns()
                transport.close()
                await sending.wait()
        assert isinstance(sending.error, ConnectionError)
        assert await peer.receive_all() == bytes(written)
        await protocol.wait_for("connection_lost")


@files
@pytest.mark.ours_only("asyncio has no group")
async def test_the_group_ends_in_the_middle(stack: Stack, make_file: Any) -> None:
    sending = Sending()
    async with anyio.create_task_group() as tasks:
        with make_file(LARGE_CONTENT) as file:
            with raises_inside(ZeroDivisionError):
                async with TransportGroup() as group, connected(group, small=True) as (transport, protocol, _):
                    tasks.start_soon(sending.run, group, transport, file)
                    await stuck(transport)
                    raise ZeroDivisionError
            await sending.wait()
    assert isinstance(sending.error, ConnectionError)
    assert protocol.lost


@pytest.mark.differs(
    "a cancelled `sendfile`",
    asyncio="the file's position does not say how much was sent",
    here="the position is after the last byte sent",
    why="the program can go on from there",
)
@files
@pytest.mark.ours_only
async def test_cancelled_in_the_middle(stack: Stack, make_file: Any) -> None:
    """The file's position says how much was sent, and the transport goes on after it."""
    async with clogged(stack, make_file) as (_, transport, protocol, peer, file, sending):
        sending.scope.cancel()
        await sending.wait()
        assert sending.error is None
        sent = file.tell()
        assert 0 < sent < len(LARGE_CONTENT)
        transport.write(b"the end")
        assert await peer.receive_exactly(sent + 7) == LARGE_CONTENT[:sent] + b"the end"
        assert transport.is_reading()
        await peer.send(b"hello")
        assert await protocol.wait_received(5) == b"hello"


@pytest.mark.ours_only("asyncio cannot send a pipe")
async def test_cancelled_while_a_pipe_has_nothing_to_read(stack: Stack) -> None:
    """The thread that reads from it is abandoned."""
    receiver, sender = os.pipe()
    async with stack.open() as group, connected(group) as (transport, _, peer):
        with open(receiver, "rb", 0) as file, open(sender, "wb", 0) as other:
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                tasks.start_soon(sending.run, group, transport, file)
                other.write(b"what there is")
                assert await peer.receive_exactly(13) == b"what there is"
                sending.scope.cancel()
                await sending.wait()
            transport.write(b"alive")
            assert await peer.receive_exactly(5) == b"alive"


@pytest.mark.differs("a cancelled `sendfile`")
@files
@pytest.mark.ours_only
async def test_cancelled_at_every_checkpoint(stack: Stack, make_file: Any) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        for checkpoints in range(12):
            with make_file(SMALL_CONTENT) as file:
                file.seek(0)
                async with cancelled_after(checkpoints):
                    await group.sendfile(transport, file)
                sent = file.tell()
            transport.write(b"!")
            assert await peer.receive_exactly(sent + 1) == SMALL_CONTENT[:sent] + b"!"


# -- other transports -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def over_a_stream(group: TransportGroup, wrap: Callable[[SocketStream], Any]) -> AsyncIterator[Any]:
    """A transport over an AnyIO stream: it has no socket of ours to send from."""
    with listening() as listener:
        stream = await anyio.connect_tcp(*listener.getsockname()[:2])
        with Peer(listener.accept()[0]) as peer:
            transport, protocol = await group.connect_stream(Recorder, wrap(stream))
            yield transport, protocol, peer


@files
@pytest.mark.ours_only("asyncio has no connect_stream")
async def test_over_an_anyio_stream(stack: Stack, make_file: Any) -> None:
    async with TransportGroup() as group, over_a_stream(group, lambda s: s) as (transport, protocol, peer):
        with make_file(LARGE_CONTENT) as file:
            with pytest.raises(RuntimeError, match="fallback is disabled"):
                await group.sendfile(transport, file, fallback=False)
            file.seek(500)
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sending.run, group, transport, file, 0, 1_000_003)
                assert await peer.receive_exactly(1_000_003) == LARGE_CONTENT[:1_000_003]
            assert sending.result == 1_000_003
            assert file.tell() == 1_000_003
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"
        assert "pause_writing" not in protocol.names


@pytest.mark.ours_only("asyncio has no connect_stream")
@pytest.mark.parametrize("how", ["cancel", "close", "abort", "reset"])
async def test_ending_in_the_middle_over_an_anyio_stream(stack: Stack, how: str) -> None:
    async with TransportGroup() as group, over_a_stream(group, lambda s: s) as (transport, protocol, peer):
        sending = Sending()
        async with anyio.create_task_group() as tasks:
            with on_disk(LARGE_CONTENT * 4) as file:
                tasks.start_soon(sending.run, group, transport, file)
                start = await peer.receive_exactly(1000)
                await until(transport.get_write_buffer_size)
                if how == "cancel":
                    sending.scope.cancel()
                elif how == "reset":
                    peer.reset()
                else:
                    getattr(transport, how)()
                await sending.wait()
                if how == "cancel":
                    sent = file.tell()
                    transport.write(b"the end")
                    data = await peer.receive_exactly(sent + 7 - 1000)
                    assert start + data == (LARGE_CONTENT * 4)[:sent] + b"the end"
                else:
                    assert isinstance(sending.error, ConnectionError)
                    if how != "reset":
                        await peer.gone()
                    await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio has no connect_stream")
async def test_f1_f2_over_an_anyio_tls_stream(
    stack: Stack, certificate_authority: trustme.CA, server_context: ssl.SSLContext
) -> None:
    client_context = ssl.create_default_context()
    certificate_authority.configure_trust(client_context)
    received = bytearray()

    async def receive(stream: SocketStream) -> None:
        async with await TLSStream.wrap(stream, ssl_context=server_context, standard_compatible=False) as tls:
            while len(received) < 1_000_003 + 7:
                received.extend(await tls.receive())

    with listening() as listener:
        async with anyio.create_task_group() as tasks:
            stream = await anyio.connect_tcp(*listener.getsockname()[:2])
            accepted = listener.accept()[0]
            tasks.start_soon(receive, await SocketStream.from_socket(accepted))
            tls = await TLSStream.wrap(
                stream, hostname="localhost", ssl_context=client_context, standard_compatible=False
            )
            async with TransportGroup() as group:
                transport, protocol = await group.connect_stream(Recorder, tls)
                with on_disk(LARGE_CONTENT) as file:
                    file.seek(500)  # Whatever its position.
                    assert await send(group, transport, file, 0, 1_000_003) == 1_000_003
                    assert file.tell() == 1_000_003
                transport.write(b"the end")
                await protocol.wait_for("connection_lost")
    assert received == LARGE_CONTENT[:1_000_003] + b"the end"


@needs_unix
@needs_sendfile
async def test_over_a_unix_socket(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        transport, protocol = await group.create_unix_connection(Recorder, sock=ours)
        with Peer(theirs) as peer, on_disk(SMALL_CONTENT) as file:
            assert await send(group, transport, file, fallback=False) == len(SMALL_CONTENT)
            assert await peer.receive_exactly(1000) == SMALL_CONTENT
        await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`sendfile` over a pipe or a child's standard input",
    asyncio="`RuntimeError`",
    here="sent, block by block",
    why="as over any other stream",
)
@files
@pytest.mark.ours_only
@needs_pipes
async def test_over_a_pipe(stack: Stack, make_file: Any) -> None:
    read, write = os.pipe()
    async with stack.open() as group:
        reader, received = await group.connect_read_pipe(Recorder, open(read, "rb", 0))
        writer, protocol = await group.connect_write_pipe(Recorder, open(write, "wb", 0))
        with make_file(LARGE_CONTENT) as file:
            with pytest.raises(RuntimeError, match="not supported"):
                await group.sendfile(writer, file, fallback=False)
            with pytest.raises(RuntimeError, match="not supported"):
                await group.sendfile(reader, file)
            writer.write(b"before")
            assert await send(group, writer, file) == len(LARGE_CONTENT)
            assert file.tell() == len(LARGE_CONTENT)
            writer.write(b"after")
        writer.close()
        await received.wait_for("connection_lost")
        assert received.received == b"before" + LARGE_CONTENT + b"after"
        await protocol.wait_for("connection_lost")


# -- other programs ---------------------------------------------------------------------------------------------------


@files
async def test_a_slow_process(stack: Stack, make_file: Any) -> None:
    """The peer reads nothing until it gets a line."""
    if stack.is_oracle and make_file is in_memory:
        pytest.skip("the oracle does not show that its fallback is under way")
    async with stack.open() as group:
        connection: list[Recorder] = []

        def factory() -> Recorder:
            connection.append(Recorder())
            return connection[-1]

        server = await group.create_server(factory, HOST, 0)
        async with peer_process("late_reader", server.sockets[0].getsockname()[1]) as process:
            assert await process.line() == "connected"
            await until(lambda: connection and connection[0].transport)
            transport = connection[0].transport
            transport.write(b"header")
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                with make_file(LARGE_CONTENT) as file:
                    tasks.start_soon(sending.run, group, transport, file)
                    await stuck(transport)
                    await process.say("now")
                    await sending.wait()
            transport.close()
            digest = hashlib.sha256(b"header" + LARGE_CONTENT).hexdigest()
            assert await process.line() == f"{6 + len(LARGE_CONTENT)} {digest}"
        server.close()


@pytest.mark.ours_only("asyncio has no current_group")
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl_downloads_a_file(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(LARGE_CONTENT)

    class Files(Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data.endswith(b"\r\n\r\n"):
                current_group().start_soon(self.answer)

        async def answer(self) -> None:
            with open(tmp_path / "file", "rb") as file:
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LARGE_CONTENT))
                await current_group().sendfile(self.transport, file)

    async with TransportGroup() as group:
        server = await group.create_server(Files, HOST, 0)
        host, port = server.sockets[0].getsockname()
        # Twice over one connection: after a file the transport reads again.
        url = f"http://{host}:{port}/"
        downloaded = await run_program("curl", "-sS", "--noproxy", "*", url, url)
        assert downloaded == LARGE_CONTENT * 2
        server.close()
