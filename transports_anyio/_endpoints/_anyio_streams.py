"""AnyIO byte streams: `connect_stream`.

Holds: the endpoint function.
May know: `_base`, `_tls`, `_channels`, `_transports`, `_types`, `abc`, `anyio`, `ssl`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio.lowlevel
from anyio.abc import ByteReceiveStream, ByteSendStream

from .._channels._anyio_stream import AnyByteStream, AnyIOStreamChannel
from .._channels._tls import TLSChannel
from .._transports._stream import StreamTransport
from .._types import StreamProtocolT
from ._base import Endpoints, check_open
from ._tls import stream_options

if TYPE_CHECKING:
    import ssl as ssl_module

    from .._channels._abc import StreamChannel
    from ..abc import Transport


class AnyIOStreamEndpoints(Endpoints):
    """`connect_stream`."""

    async def connect_stream(
        self,
        protocol_factory: Callable[[], StreamProtocolT],
        stream: AnyByteStream,
        *,
        ssl: ssl_module.SSLContext | bool | None = None,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Transport, StreamProtocolT]:
        """Make a protocol for `stream` and return `(transport, protocol)`.

        `connection_made` runs before this returns. An error of the stream reaches `connection_lost` as an `OSError`,
        with the AnyIO exception as its cause. A stream that has ended is accepted: the protocol gets the data that was
        received, then `connection_lost`; extra info may be missing.

        - `protocol_factory`: makes the protocol
        - `stream`: an AnyIO `ByteStream`, `ByteReceiveStream` or `ByteSendStream`. The transport owns it from now on
          and closes it. Extra info comes from its typed attributes.
        - `ssl`: a context, or `True` for `ssl.create_default_context()` (clients only); encrypts the connection. The
          stream has to be a `ByteStream`.
        - `server_side`: whether this is the server's end of TLS
        - `server_hostname`: the name that the server's certificate must have; required for a client with `ssl`. With
          `""` the name is not checked; the context has to allow that.
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: seconds, 60 and 30 by default

        Raises, and leaves the stream to the caller unless a handshake has begun, which closes it:

        - `RuntimeError`: the group is not open, or another transport uses the stream
        - `TypeError`, `ValueError`: the arguments are invalid or contradict each other
        - `ssl.SSLError`: the context is for the other side, or the peers do not agree on TLS
        - `ConnectionResetError`: the peer closed the connection during the handshake
        - `ConnectionAbortedError`: the handshake timed out
        - whatever `protocol_factory` raises

        Source: https://anyio.readthedocs.io/en/stable/streams.html
        """
        await check_open(self._core, "connect_stream", protocol_factory)
        tls = stream_options(
            ssl,
            server_side=server_side,
            server_hostname=server_hostname,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
        if not isinstance(stream, (ByteReceiveStream, ByteSendStream)):
            raise TypeError(f"a ByteStream, ByteReceiveStream or ByteSendStream was expected, got {stream!r}")
        plain = AnyIOStreamChannel(stream, self._core)
        if tls is not None and not plain.is_two_way:
            raise TypeError(f"TLS needs a ByteStream, which sends and receives, got {stream!r}")
        await anyio.lowlevel.checkpoint()
        await check_open(self._core)
        self._require_unused(stream)
        channel: StreamChannel = plain
        if tls is not None:
            channel = encrypted = TLSChannel(plain, tls, self._core)
            self._run_for(stream, plain.run)
            await self._shake_hands(encrypted)
        transport, protocol = self._core.make_transport(StreamTransport, protocol_factory, channel)
        if tls is None:
            self._run_for(stream, plain.run)
        transport._start()
        return transport, protocol
