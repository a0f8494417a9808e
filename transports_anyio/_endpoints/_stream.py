"""Transports over any AnyIO byte stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio.lowlevel

from .._channels._anyio_stream import AnyByteStream, AnyIOStreamChannel
from ._base import Endpoints, ProtocolT

if TYPE_CHECKING:
    from asyncio import Transport


class StreamEndpoints(Endpoints):
    """`connect_stream`."""

    async def connect_stream(
        self, protocol_factory: Callable[[], ProtocolT], stream: AnyByteStream
    ) -> tuple[Transport, ProtocolT]:
        """Give `stream` a protocol and return `(transport, protocol)`.

        `stream` is any AnyIO `ByteStream`, `ByteReceiveStream` or `ByteSendStream`; the transport owns it from now
        on and closes it. Extra info comes from the stream's typed attributes. An error of the stream reaches
        `connection_lost` as an `OSError` with the AnyIO exception as its cause.

        Raises `RuntimeError` when the group is not open, and whatever `protocol_factory` raises; the stream is then
        left to the caller.
        """
        self._require_open()
        await anyio.lowlevel.checkpoint()
        self._require_open()
        channel = AnyIOStreamChannel(stream)
        transport, protocol = self._make_transport(protocol_factory, channel)
        self._task_group.start_soon(channel.run, name=f"transports_anyio: {stream!r}")
        transport.start()
        return transport, protocol
