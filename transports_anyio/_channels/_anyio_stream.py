"""A channel over an AnyIO byte stream.

Holds: the channel, and the one for the output of a process on asyncio.
May know: `_abc`, `_anyio`, `_receive_buffers`, `_socket`, `_errors`, `anyio`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import AsyncResource, ByteReceiveStream, ByteSendStream, SocketAttribute
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

from .._errors import logger
from ._abc import StreamChannel, copy_into, joined
from ._anyio import AnyIOChannel, Owner, as_os_error, typed_attributes
from ._receive_buffers import keep_freed_memory
from ._socket import transport_socket

if TYPE_CHECKING:
    from typing_extensions import Buffer

AnyByteStream = ByteReceiveStream | ByteSendStream

# The most bytes to receive or send at once: enough for the throughput of bulk data, and fair to other connections.
CHUNK_SIZE = 64 * 1024

# The most bytes to receive after a whole chunk has come, and to send at once then: this halves the cost of bulk data.
# To ask for them in vain costs much on trio, where memory of this size comes from the system each time. After that,
# they are not asked for until so many whole chunks have come.
BULK_SIZE = 256 * 1024
CHUNKS_BEFORE_BULK = 16

# The typed attribute of the stream behind each extra info of the transport.
EXTRA_INFO: dict[str, Any] = {
    "peername": SocketAttribute.remote_address,
    "sockname": SocketAttribute.local_address,
    "socket": SocketAttribute.raw_socket,
    "ssl_object": TLSAttribute.ssl_object,
    "peercert": TLSAttribute.peer_certificate,
    "cipher": TLSAttribute.cipher,
}


class AnyIOStreamChannel(AnyIOChannel, StreamChannel):
    """Moves the bytes of an AnyIO stream."""

    __slots__ = (
        "_chunks_before_bulk",
        "_info",
        "_size",
        "can_receive",
        "can_send",
        "can_write_eof",
        "drops_after_close",
        "is_two_way",
        "stream",
    )

    def __init__(self, stream: AnyByteStream, owner: Owner) -> None:
        self.can_receive = isinstance(stream, ByteReceiveStream)
        self.can_send = isinstance(stream, ByteSendStream)
        super().__init__(stream, owner)
        self.stream: Any = stream
        self._size = CHUNK_SIZE  # How many bytes to receive next, at most.
        self._chunks_before_bulk = 1
        self.is_two_way = self.can_receive and self.can_send
        self._info = typed_attributes(stream, EXTRA_INFO)
        keep_freed_memory()
        if "socket" in self._info:
            self._info["socket"] = transport_socket(self._info["socket"])
        # The attributes of a TLS stream that has ended may be unavailable.
        self.drops_after_close = "ssl_object" in self._info or isinstance(stream, TLSStream)
        self.can_write_eof = hasattr(stream, "send_eof") and not self.drops_after_close

    def receive(self) -> bytes:
        return bytes(self._take_received())

    def receive_into(self, buffer: Buffer) -> int:
        data = self._take_received()
        count = copy_into(buffer, data)
        if count < len(data):
            self._received = memoryview(data)[count:]  # The rest is not copied.
        return count

    def send(self, data: bytes | bytearray | memoryview) -> int:
        if self._receiver_sends and not self._sending and self._offered is None and len(data) <= self._size:
            if self._sent:
                self._take_sent()  # The error of an earlier send.
            self._offered = bytes(data)
            self._taken = True
            return len(data)
        return self._offer(data[:CHUNK_SIZE])

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        data = joined(chunks, CHUNK_SIZE)
        return self._offer(data) if data else self._take_sent()

    def _offer(self, data: bytes | bytearray | memoryview) -> int:
        sent = self._take_sent()
        if sent:
            return sent
        if self._offered is None:
            self._offered = bytes(data)
        raise BlockingIOError

    def send_eof(self) -> None:
        self._eof = True
        self._send_soon()

    def shutdown(self, done: Callable[[Exception | None, bool], None]) -> bool:
        self._take_sent()  # An error of what counts as sent.
        if self._taken:
            self._done = done
        return not self._taken

    def _report_sent(self, error: Exception) -> None:
        self._sent = error
        self._write_ready()

    def _parts(self) -> Iterable[AsyncResource]:
        # `StapledByteStream.aclose` closes one part after the other: a forceful close is cancelled after the first.
        if type(self.stream) is StapledByteStream:
            return self.stream.send_stream, self.stream.receive_stream
        return super()._parts()

    def extra_info(self) -> Mapping[str, Any]:
        return self._info

    def _receive_item(self) -> Awaitable[bytes]:
        receiving: Awaitable[bytes] = self.stream.receive(self._size)
        return receiving

    def _as_received(self, item: bytes) -> bytes | None:
        if len(item) >= CHUNK_SIZE or self._size == BULK_SIZE:
            self._set_size(len(item))
        return item or None  # AnyIO lets streams return empty chunks, which are to be ignored.

    def _set_size(self, received: int) -> None:
        """Set how many bytes to receive next, after a whole chunk has come or more was asked for."""
        if self._size == BULK_SIZE:
            if received <= CHUNK_SIZE:
                self._size = CHUNK_SIZE
                self._chunks_before_bulk = CHUNKS_BEFORE_BULK
        else:
            self._chunks_before_bulk -= 1
            if self._chunks_before_bulk <= 0:
                self._size = BULK_SIZE

    def _receive_failure(self, exc: BaseException) -> bytes | OSError:
        return b"" if isinstance(exc, anyio.EndOfStream) else as_os_error(exc)

    def _send_item(self, item: bytes) -> Awaitable[None]:
        sending: Awaitable[None] = self.stream.send(item)
        return sending

    def _size_of(self, item: bytes) -> int:
        return len(item)

    def _send_eof(self) -> Awaitable[None]:
        sending: Awaitable[None] = self.stream.send_eof()
        return sending

    def _ends(self, failure: bytes | OSError) -> bool:
        return True


class DiscardingChannel(AnyIOStreamChannel):
    """Moves the output of an AnyIO process on asyncio, where closing the stream does not close its file descriptor.

    AnyIO closes the file descriptor with the process. Until then, or until the end of the stream, output is received
    and dropped; otherwise the process would block once the pipe is full.
    """

    __slots__ = ()

    async def _close_resource(self) -> None:
        try:
            while True:
                await self.stream.receive()
        except anyio.EndOfStream:
            pass
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            logger.debug("discarding from %r: %r", self.stream, exc)
        finally:
            await super()._close_resource()
