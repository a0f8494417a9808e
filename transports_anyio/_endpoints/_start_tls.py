"""TLS in mid-stream: `start_tls`."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from .._callbacks import check_given_protocol
from .._channels._tls import TLSChannel
from .._transports._stream import StreamTransport
from ._base import Endpoints, check_cancelled, check_open
from ._tls import require_context, upgrade_options

if TYPE_CHECKING:
    from asyncio import BaseTransport

    from .._channels._abc import StreamChannel
    from ..abc import Transport


class StartTLSEndpoints(Endpoints):
    """`start_tls`."""

    async def start_tls(
        self,
        transport: BaseTransport,
        protocol: Any,
        sslcontext: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        received: bytes | bytearray | memoryview = b"",
    ) -> Transport:
        """Encrypt the connection of `transport` from here on and return its new transport, for `protocol`.

        - `transport`: any stream transport of this library, over TLS too (TLS in TLS). What was written to it before is
          sent before the handshake, in the clear. What its protocol has not received yet belongs to the handshake.
        - `sslcontext`: the settings; that of a server (`server_side` true) needs a certificate.
        - `server_hostname`: the name that a client verifies. `None` or `""` leaves the name in the certificate
          unchecked, which the context has to allow.
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: in seconds, 60 and 30 by default.
        - `received`: bytes of the handshake that the old protocol has received with its last data (not in asyncio).

        A protocol that answers in the clear, and does not call this in a task that it starts at once, has to call
        `pause_reading` until then. `connection_made` is not called again. Nothing is received from the new transport
        before this returns, and it is not paused. Afterwards `transport` can only `close` or `abort` the connection;
        `write` raises `RuntimeError`.

        Raises, with the connection unchanged:

        - `TypeError` for another kind of transport, protocol or context,
        - `ValueError` for options that contradict each other,
        - `RuntimeError` when the transport is another group's, is closing, has sent its end of file, has been upgraded,
          or is busy with `sendfile` or another `start_tls`.

        Raises, after the connection was aborted and with `connection_lost` of `protocol` called (a cancellation aborts
        it too):

        - `ssl.SSLError` when the ends do not agree,
        - `ConnectionResetError` when the peer leaves,
        - `ConnectionAbortedError` when the handshake takes too long or the transport is closed during it. A `close`
          sends first what was written, encrypted; if the handshake fails it is dropped.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.start_tls
        """
        await check_open(self._core, "start_tls")
        require_context(sslcontext)
        if not isinstance(transport, StreamTransport):
            raise TypeError(f"transport {transport!r} is not supported by start_tls()")
        options = upgrade_options(
            sslcontext,
            server_side=server_side,
            server_hostname=server_hostname,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
        check_given_protocol(protocol, "start_tls")
        if not isinstance(received, (bytes, bytearray, memoryview)):
            raise TypeError(f"received must be a bytes-like object, not {type(received).__name__!r}")
        if transport._group is not self:
            raise RuntimeError(f"transport {transport!r} belongs to another group")

        def make_channel(plain: StreamChannel, unsent: bytes) -> TLSChannel:
            return TLSChannel(plain, options, self._core, unsent=unsent, received=bytes(received))

        upgrade = transport._begin_upgrade(make_channel, protocol)
        try:
            return await upgrade.wait(transport)
        except Exception:
            await check_cancelled(self._core)
            raise
