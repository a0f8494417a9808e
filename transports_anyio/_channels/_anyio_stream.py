"""Any AnyIO byte stream, through one task that receives and one that sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from anyio.abc import AsyncResource, ByteReceiveStream, ByteSendStream, SocketAttribute
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSAttribute

from ._anyio import AnyIOChannel
from ._contract import Channel, joined
from ._socket import SocketView

if TYPE_CHECKING:
    from typing_extensions import Buffer

AnyByteStream = ByteReceiveStream | ByteSendStream

# How much one turn may receive or send: enough for a large stream's throughput, little enough to take turns.
CHUNK_SIZE = 64 * 1024


class AnyIOStreamChannel(AnyIOChannel, Channel):
    """Moves the bytes of an AnyIO stream."""

    __slots__ = ("can_receive", "can_send", "can_write_eof", "drops_after_close", "is_two_way", "stream")

    def __init__(self, stream: AnyByteStream) -> None:
        super().__init__(stream)
        self.stream: Any = stream
        self.can_receive = isinstance(stream, ByteReceiveStream)
        self.can_send = isinstance(stream, ByteSendStream)
        self.is_two_way = self.can_receive and self.can_send
        self.drops_after_close = TLSAttribute.ssl_object in stream.extra_attributes
        self.can_write_eof = hasattr(stream, "send_eof") and not self.drops_after_close

    def receive(self) -> bytes:
        return bytes(self._take_received())

    def receive_into(self, buffer: Buffer) -> int:
        data = self._take_received()
        with memoryview(buffer).cast("B") as view:
            count = min(len(view), len(data))
            view[:count] = data[:count]
        if count < len(data):
            self._received = memoryview(data)[count:]  # What is left is not copied.
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

    def _says_farewell(self) -> bool:
        return bool(self._offered == b"")

    def _parts(self) -> Iterable[AsyncResource]:
        # `StapledByteStream.aclose` closes one after the other: a forceful one ends behind the first.
        if type(self.stream) is StapledByteStream:
            return self.stream.send_stream, self.stream.receive_stream
        return super()._parts()

    def extra_info(self) -> dict[str, Any]:
        info: dict[str, Any] = {}
        for name, attribute in (
            ("peername", SocketAttribute.remote_address),
            ("sockname", SocketAttribute.local_address),
            ("socket", SocketAttribute.raw_socket),
            ("ssl_object", TLSAttribute.ssl_object),
            ("peercert", TLSAttribute.peer_certificate),
            ("cipher", TLSAttribute.cipher),
        ):
            if attribute in self.stream.extra_attributes:
                info[name] = self.stream.extra(attribute)
        if "socket" in info:
            info["socket"] = SocketView(info["socket"])
        return info

    async def _receive_next(self) -> bytes:
        try:
            while True:
                data: bytes = await self.stream.receive(CHUNK_SIZE)
                if data:  # AnyIO asks users to ignore the empty ones of streams that return such.
                    return data
                await anyio.lowlevel.checkpoint()  # It may do nothing else, and not wait for that either.
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
