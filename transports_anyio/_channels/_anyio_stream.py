"""Any AnyIO byte stream, through one task that receives and one that sends."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketAttribute
from anyio.streams.tls import TLSAttribute

from .._errors import logger
from ._contract import Channel

if TYPE_CHECKING:
    from typing_extensions import Buffer

AnyByteStream = ByteReceiveStream | ByteSendStream

# How much one turn may receive or send: enough for a large stream's throughput, little enough to take turns.
CHUNK_SIZE = 64 * 1024

# How long, in seconds, a stream may take to close in an orderly way (a TLS stream waits for the peer's close_notify):
# asyncio's default `ssl_shutdown_timeout`.
CLOSE_TIMEOUT = 30.0


def as_os_error(exc: Exception) -> OSError:
    """Return what asyncio would say for an error of an AnyIO stream, with the cause attached."""
    if isinstance(exc, OSError):
        return exc
    cause: BaseException | None = exc.__cause__ or exc.__context__
    error: OSError
    if isinstance(exc, anyio.BrokenResourceError) and isinstance(cause, OSError):
        error = type(cause)(*cause.args)
    elif isinstance(exc, anyio.ClosedResourceError):
        error = ConnectionAbortedError(errno.ECONNABORTED, "the stream was closed by somebody else")
    elif isinstance(exc, anyio.BrokenResourceError):
        error = ConnectionResetError(errno.ECONNRESET, "the stream is broken")
    else:
        error = OSError(errno.EIO, f"the stream failed: {exc!r}")
    error.__cause__ = exc
    return error


class AnyIOStreamChannel(Channel):
    """Moves the bytes of an AnyIO stream; `run` is its life and belongs in a task.

    A send that is under way keeps its bytes in the transport's buffer: they are offered once, sent by the task, and
    taken when they are offered again.
    """

    __slots__ = (
        "_aborted",
        "_closing",
        "_failure_in_sending",
        "_offered",
        "_read_ready",
        "_reading",
        "_received",
        "_scope",
        "_sent",
        "_stream",
        "_write_ready",
        "_writing",
        "can_write_eof",
    )

    def __init__(self, stream: AnyByteStream) -> None:
        self._stream = stream
        self._reading: anyio.Event | bool = False  # An event while the receiving task waits to be let go.
        self._writing: anyio.Event | bool = False
        self._received: bytes | OSError | None = None
        self._offered: bytes | None = None
        self._sent: int | OSError = 0
        self._closing = False
        self._aborted = False
        self._scope = anyio.CancelScope()
        self.can_write_eof = hasattr(stream, "send_eof") and TLSAttribute.ssl_object not in stream.extra_attributes

    def open(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    # The transport's side: synchronous.

    def set_reading(self, reading: bool) -> None:
        if isinstance(self._reading, anyio.Event):
            if not reading:
                return  # The task waits already.
            self._reading.set()
        self._reading = reading

    def set_writing(self, writing: bool) -> None:
        if isinstance(self._writing, anyio.Event):
            if not writing:
                return  # The task waits already.
            self._writing.set()
        self._writing = writing

    def receive(self) -> bytes:
        received, self._received = self._received, None
        if received is None:
            raise BlockingIOError
        if isinstance(received, OSError):
            raise received
        return received

    def receive_into(self, buffer: Buffer) -> int:
        data = self.receive()
        with memoryview(buffer).cast("B") as view:
            count = min(len(view), len(data))
            view[:count] = data[:count]
        if count < len(data):
            self._received = data[count:]
        return count

    def send(self, data: bytes | bytearray | memoryview) -> int:
        return self._offer(data[:CHUNK_SIZE])

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        offered: list[bytes | memoryview] = []
        size = 0
        for chunk in chunks:
            offered.append(chunk[: CHUNK_SIZE - size])
            size += len(offered[-1])
            if size == CHUNK_SIZE:
                break
        return self._offer(b"".join(offered))

    def _offer(self, data: bytes | bytearray | memoryview) -> int:
        sent, self._sent = self._sent, 0
        if isinstance(sent, OSError):
            raise sent
        if sent:
            return sent
        if self._offered is None:
            self._offered = bytes(data)
        raise BlockingIOError

    def send_eof(self) -> None:
        self._offered = b""
        self.set_writing(True)

    def close(self, *, aborted: bool) -> None:
        self._closing = True
        self._aborted = aborted
        if self._offered == b"" and not aborted:
            return  # The end of the stream is being told; `_send` ends the task after it.
        self._scope.cancel()

    def extra_info(self) -> dict[str, Any]:
        info = {}
        for name, attribute in (
            ("peername", SocketAttribute.remote_address),
            ("sockname", SocketAttribute.local_address),
            ("socket", SocketAttribute.raw_socket),
            ("ssl_object", TLSAttribute.ssl_object),
            ("peercert", TLSAttribute.peer_certificate),
            ("cipher", TLSAttribute.cipher),
        ):
            if attribute in self._stream.extra_attributes:
                info[name] = self._stream.extra(attribute)
        return info

    # The tasks.

    async def run(self) -> None:
        """Receive and send until `close`; then close the stream."""
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    if isinstance(self._stream, ByteReceiveStream):
                        tasks.start_soon(self._receive)
                    if isinstance(self._stream, ByteSendStream):
                        tasks.start_soon(self._send)
        finally:
            await self._close_stream()

    async def _close_stream(self) -> None:
        if self._closing and not self._aborted:
            try:
                with anyio.move_on_after(CLOSE_TIMEOUT):
                    await self._stream.aclose()
                    return
            except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
                # The connection has ended for the protocol; that the peer did not stay for the farewell is no news.
                logger.debug("closing %r: %r", self._stream, exc)
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self._stream)

    async def _receive(self) -> None:
        stream = self._stream
        assert isinstance(stream, ByteReceiveStream)
        while True:
            if self._received is None:
                try:
                    self._received = await stream.receive(CHUNK_SIZE)
                except anyio.EndOfStream:
                    self._received = b""
                except Exception as exc:
                    self._received = as_os_error(exc)
            ended = not self._received or isinstance(self._received, OSError)
            while self._received is not None:
                if not self._reading:
                    self._reading = event = anyio.Event()
                    await event.wait()
                self._read_ready()
                # A protocol whose buffer is small, or that paused, takes the rest later.
            if ended:
                return

    async def _send(self) -> None:
        stream = self._stream
        assert isinstance(stream, ByteSendStream)
        while True:
            if not self._writing:
                self._writing = event = anyio.Event()
                await event.wait()
            offered = self._offered
            if offered is None:
                self._write_ready()
                continue
            try:
                if offered:
                    await stream.send(offered)
                    self._sent = len(offered)
                else:
                    await stream.send_eof()  # type: ignore[attr-defined]  # only where `can_write_eof`
            except Exception as exc:
                self._sent = as_os_error(exc)
            self._offered = None
            if offered or isinstance(self._sent, OSError):
                self._write_ready()
            else:
                self._writing = False
                if self._closing:
                    self._scope.cancel()
