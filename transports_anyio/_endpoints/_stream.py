"""Transports over any AnyIO byte stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream

from .._channels._anyio_stream import AnyByteStream, AnyIOStreamChannel
from .._channels._tls import TLSChannel
from .._transports._stream import StreamTransport
from ._base import Endpoints, ProtocolT
from ._tls import stream_options

if TYPE_CHECKING:
    import ssl as ssl_module
    from asyncio import Transport

    from .._channels._abc import Channel


class StreamEndpoints(Endpoints):
    """`connect_stream`."""

    async def connect_stream(
        self,
        protocol_factory: Callable[[], ProtocolT],
        stream: AnyByteStream,
        *,
        ssl: ssl_module.SSLContext | bool | None = None,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Transport, ProtocolT]:
        """Give `stream` a protocol and return `(transport, protocol)`.

        `stream` is any AnyIO `ByteStream`, `ByteReceiveStream` or `ByteSendStream`; the transport owns it from now
        on and closes it. Extra info comes from the stream's typed attributes. An error of the stream reaches
        `connection_lost` as an `OSError` with the AnyIO exception as its cause. A stream that has ended already is no
        error of the call: the protocol gets what has been received, then `connection_lost`; extra info may be missing.

        With `ssl` the bytes are encrypted, which takes a stream of both directions. A client (`server_side` false)
        gives a context or `True`, and the name to verify as `server_hostname`, or `""` for none, which the context has
        to allow; a server gives a context. `ssl_handshake_timeout` and `ssl_shutdown_timeout` are in seconds, 60 and 30
        by default.

        Raises `RuntimeError` when the group is not open and when another transport uses the stream, `TypeError` and
        `ValueError` for parameters that contradict each other, `ssl.SSLError` for a context of the other side, and
        whatever `protocol_factory` raises; the stream is then left to the caller. Raises `ssl.SSLError` when the ends
        do not agree on TLS, `ConnectionResetError` when the peer leaves, `ConnectionAbortedError` when the handshake
        takes too long; the stream is then closed, and also when the handshake is cancelled or `protocol_factory` raises
        after it.

        Source: https://anyio.readthedocs.io/en/stable/streams.html
        """
        tls = stream_options(
            ssl,
            server_side=server_side,
            server_hostname=server_hostname,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
        if not isinstance(stream, (ByteReceiveStream, ByteSendStream)):
            raise TypeError(f"a ByteStream, ByteReceiveStream or ByteSendStream was expected, got {stream!r}")
        plain = AnyIOStreamChannel(stream, self._core.time)
        if tls is not None and not plain.is_two_way:
            raise TypeError(f"TLS takes a stream of both directions, got {stream!r}")
        await anyio.lowlevel.checkpoint()
        self._core.check_open()
        self._require_unused(stream)
        channel: Channel = plain
        if tls is not None:
            channel = encrypted = TLSChannel(plain, tls, self._core)
            self._run_for(stream, plain.run)
            await self._shake_hands(encrypted)
        transport, protocol = self._core.make_transport(StreamTransport, protocol_factory, channel)
        if tls is None:
            self._run_for(stream, plain.run)
        transport.start()
        return transport, protocol
