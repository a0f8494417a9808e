"""Files: `sendfile`.

May know: stream transports, the operating system's files, AnyIO's threads.
"""

from __future__ import annotations

import io
import os
from asyncio import SendfileNotAvailableError
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Protocol

import anyio.to_thread

from .._channels._abc import FileError
from .._transports._sendfile import SendfileOperation
from .._transports._stream import StreamTransport
from ._base import Endpoints, check_cancelled, check_open

if TYPE_CHECKING:
    from asyncio import WriteTransport

# The most for one call of `os.sendfile`, in bytes: below the limits of every platform.
MOST_AT_ONCE = 1 << 30

# How much is read at a time where the system cannot send a file by itself: asyncio's figure for sockets.
BLOCK_SIZE = 256 * 1024

# The methods by which a file reads from its file descriptor.
READING = {name: getattr(io.FileIO, name) for name in ("read", "readall", "readinto")}


class FileEndpoints(Endpoints):
    """`sendfile`."""

    async def sendfile(
        self,
        transport: WriteTransport,
        file: BinaryIO,
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool = True,
    ) -> int:
        """Send `file` over `transport`, after what was written before, and return how many bytes were sent.

        - `offset`: where to begin, in bytes, independent of the file's position.
        - `count`: how many bytes to send at most; until the end of the file by default.
        - `fallback`: whether to read the file in a thread where the system cannot send it.

        What is sent is what `file.read()` returns. Over a plain socket, if the file descriptor holds the same, the
        system moves the bytes (`os.sendfile`). Otherwise, for a compressed file for example, blocks are read in a
        thread and written one by one. After a cancellation the transport still sends a block that was begun.

        Afterwards, also after an error or a cancellation, the file's position is after the last byte sent, or at
        `offset` if there was none. It is unchanged if the file is refused without `fallback`.

        While a file is sent, `write`, `writelines` and another `sendfile` raise `RuntimeError`, nothing is read from
        the transport, and `write_eof` and `resume_writing` wait.

        Raises:
        - `RuntimeError` when the transport is closing, after `write_eof` and `start_tls`, and for a transport that
          cannot send files,
        - `asyncio.SendfileNotAvailableError`, a `RuntimeError` too, without `fallback` where the system cannot send
          this file over this transport,
        - `ValueError` for a file in text mode, `ValueError` and `TypeError` for an invalid `offset` or `count`,
        - `ConnectionError`, or the `OSError` that `connection_lost` gets, when the transport is closed or breaks before
          the end,
        - and what reading the file raises.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sendfile
        """
        await check_open(self._core, "sendfile")
        if isinstance(transport, StreamTransport):
            transport._check_not_upgraded("sendfile")
        if transport.is_closing():
            raise RuntimeError("Transport is closing")
        if not isinstance(transport, StreamTransport) or not transport._channel.can_send:
            # A datagram transport, one that only reads, or one of another library.
            raise RuntimeError(f"sendfile is not supported for transport {transport!r}")
        check_arguments(file, offset, count)
        if not transport._channel.can_send_file and not fallback:
            raise SendfileNotAvailableError(
                f"fallback is disabled and native sendfile is not supported for transport {transport!r}"
            )
        operation = transport._begin_sendfile()
        try:
            if transport._channel.can_send_file:
                try:
                    return await send_by_system(operation, file, offset, count)
                except SendfileNotAvailableError:
                    if not fallback:
                        raise
            return await send_by_reading(operation, file, offset, count)
        except Exception:
            await check_cancelled(self._core)
            raise
        finally:
            operation.end()


def check_arguments(file: Any, offset: Any, count: Any) -> None:
    """Raise asyncio's `ValueError` or `TypeError` for what cannot be sent."""
    mode = getattr(file, "mode", "b")
    if isinstance(file, io.TextIOBase) or (isinstance(mode, str) and "b" not in mode):
        raise ValueError("file should be opened in binary mode")
    if count is not None:
        if not isinstance(count, int):
            raise TypeError(f"count must be a positive integer (got {count!r})")
        if count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")
    if not isinstance(offset, int):
        raise TypeError(f"offset must be a non-negative integer (got {offset!r})")
    if offset < 0:
        raise ValueError(f"offset must be a non-negative integer (got {offset!r})")


class SendsFiles(Protocol):
    """What can send from files by the system: a stream transport, or a socket of the user's."""

    async def flush(self) -> None:
        """Wait until nothing is buffered."""

    async def until_writable(self) -> None:
        """Wait until something could be sent."""

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send from a file, and return how many bytes went, 0 at its end. Raises `OSError` and `FileError`."""
        ...


def can_seek(file: IO[bytes]) -> bool:
    """Whether `file` has positions."""
    seekable = getattr(file, "seekable", None)
    return hasattr(file, "seek") if seekable is None else seekable()


def descriptor_of(file: Any) -> int:
    """Return the file descriptor that holds what `file.read()` returns.

    Raises `SendfileNotAvailableError` if none does. A file of the `io` module has one, also behind a wrapper
    that passes `read` on, as those of `tempfile` do. The descriptor of any other file with a `read` of its own may hold
    something else: a `GzipFile` has that of the compressed file.
    """
    if hasattr(file, "read"):
        inner: Any = file.file if type(file).__module__ == "tempfile" and hasattr(file, "file") else file
        inner = getattr(inner.read, "__self__", None)  # What a method belongs to; a function to nothing.
        raw: Any = inner
        if isinstance(inner, (io.BufferedReader, io.BufferedRandom)):
            raw = inner.raw if type(inner).read in (io.BufferedReader.read, io.BufferedRandom.read) else None
        if not isinstance(raw, io.FileIO) or any(
            getattr(type(raw), name) != method for name, method in READING.items()
        ):
            raise SendfileNotAvailableError(f"{file!r} may read something else than its descriptor holds")
        inner.flush()  # What was written to the file belongs to what it reads.
        file = inner
    try:
        fd: int = file.fileno()
    except (AttributeError, io.UnsupportedOperation) as exc:
        raise SendfileNotAvailableError(f"{file!r} has no descriptor") from exc
    return fd


async def send_by_system(sender: SendsFiles, file: IO[bytes], offset: int, count: int | None) -> int:
    """Send with `os.sendfile`. Raises `SendfileNotAvailableError`, before anything was sent, when it refuses."""
    fd = descriptor_of(file)
    sent = 0
    refused = False
    try:
        while count is None or sent < count:
            await sender.flush()
            try:
                size = MOST_AT_ONCE if count is None else min(count - sent, MOST_AT_ONCE)
                more = sender.send_file(fd, offset + sent, size)
            except (BlockingIOError, InterruptedError):
                await sender.until_writable()
                continue
            except FileError as exc:
                if sent:
                    raise exc.error from None
                refused = True
                # A pipe, a terminal, a file system without it: which of them differs with the platform.
                raise SendfileNotAvailableError(f"os.sendfile() refuses {file!r}") from exc.error
            if not more:
                break
            sent += more
        return sent
    finally:
        if refused:
            pass  # It may have no positions.
        elif hasattr(file, "seek"):
            file.seek(offset + sent)
        else:
            os.lseek(fd, offset + sent, os.SEEK_SET)


async def send_by_reading(operation: SendfileOperation, file: BinaryIO, offset: int, count: int | None) -> int:
    """Read blocks in a thread, and send each before the next is read."""
    seekable = can_seek(file)
    if offset or seekable:
        file.seek(offset)
    sent = 0
    try:
        while count is None or sent < count:
            await operation.flush()
            size = BLOCK_SIZE if count is None else min(count - sent, BLOCK_SIZE)
            # A read of a pipe may never end: abandon it. A read of a file must not move its position later.
            block = await anyio.to_thread.run_sync(file.read, size, abandon_on_cancel=not seekable)
            if not block:
                break
            operation.send_block(block)
            sent += len(block)
        await operation.flush()
        return sent
    finally:
        if seekable:
            file.seek(offset + sent)  # A block may have been read after the transport has ended.
