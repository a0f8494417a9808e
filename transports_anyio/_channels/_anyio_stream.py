"""A channel over an AnyIO byte stream.

Holds: the channel, and the one for the output of a process on asyncio.
May know: `_abc`, `_anyio`, `_socket`, `_errors`, `anyio`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from anyio.abc import AsyncResource, ByteReceiveStream, ByteSendStream, SocketAttribute
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

from .._errors import logger
from ._abc import StreamChannel, joined
from ._anyio import AnyIOChannel, typed_attributes
from ._socket import transport_socket

if TYPE_CHECKING:
    from typing_extensions import Buffer

AnyByteStream = ByteReceiveStream | ByteSendStream

# The most bytes to receive or send at once: enough for the throughput of bulk data, and fair to other connections.
CHUNK_SIZE = 64 * 1024

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
        "_info",
        "can_receive",
        "can_send",
        "can_write_eof",
        "drops_after_close",
        "is_two_way",
        "stream",
    )

    def __init__(self, stream: AnyByteStream, clock: Callable[[], float]) -> None:
        super().__init__(stream, clock)
        self.stream: Any = stream
        self.can_receive = isinstance(stream, ByteReceiveStream)
        self.can_send = isinstance(stream, ByteSendStream)
        self.is_two_way = self.can_receive and self.can_send
        self._info = typed_attributes(stream, EXTRA_INFO)
        if "socket" in self._info:
            self._info["socket"] = transport_socket(self._info["socket"])
        # The attributes of a TLS stream that has ended may be unavailable.
        self.drops_after_close = "ssl_object" in self._info or isinstance(stream, TLSStream)
        self.can_write_eof = hasattr(stream, "send_eof") and not self.drops_after_close

    def receive(self) -> bytes:
        return bytes(self._take_received())

    def receive_into(self, buffer: Buffer) -> int:
        data = self._take_received()
        with memoryview(buffer).cast("B") as view:
            count = min(len(view), len(data))
            view[:count] = data[:count]
        if count < len(data):
            self._received = memoryview(data)[count:]  # The rest is not copied.
        return count

    def send(self, data: bytes | bytearray | memoryview) -> int:
        return self._offer(data[:CHUNK_SIZE])

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        return self._offer(joined(chunks, CHUNK_SIZE))

    def _offer(self, data: bytes | bytearray | memoryview) -> int:
        sent = self._take_sent()
        if sent:
            return sent
        if self._offered is None:
            self._offered = bytes(data)
        raise BlockingIOError

    def send_eof(self) -> None:
        self._offered = b""
        self.set_writing(True)

    def _eof_pending(self) -> bool:
        return bool(self._offered == b"")

    def _parts(self) -> Iterable[AsyncResource]:
        # `StapledByteStream.aclose` closes one part after the other: a forceful close is cancelled after the first.
        if type(self.stream) is StapledByteStream:
            return self.stream.send_stream, self.stream.receive_stream
        return super()._parts()

    def extra_info(self) -> Mapping[str, Any]:
        return self._info

    async def _receive_next(self) -> bytes:
        try:
            while True:
                data: bytes = await self.stream.receive(CHUNK_SIZE)
                if data:  # AnyIO lets streams return empty chunks, which are to be ignored.
                    return data
                await anyio.lowlevel.checkpoint()  # The stream may return empty chunks without ever waiting.
        except anyio.EndOfStream:
            return b""

    async def _send_offered(self, offered: bytes) -> int:
        if offered:
            await self.stream.send(offered)
        else:
            await self.stream.send_eof()
        return len(offered)

    def _ends(self, received: bytes | OSError) -> bool:
        return not received or isinstance(received, OSError)


class DiscardingChannel(AnyIOStreamChannel):
    """Moves the output of an AnyIO process on asyncio, where closing the stream does not close its file descriptor.

    AnyIO closes the file descriptor with the process. Until then, or until the end of the stream, output is received
    and dropped; otherwise the process would block once the pipe is full.
    """

    __slots__ = ()

    async def _close_resource(self) -> None:
        try:
            while await self._receive_next():
                pass
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            logger.debug("discarding from %r: %r", self.stream, exc)
        finally:
            await super()._close_resource()
