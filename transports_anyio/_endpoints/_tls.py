"""The TLS parameters of endpoint functions.

Holds: the checks of these parameters, and the options of a TLS channel made from them.
May know: `_channels`, `ssl`.

Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_connection
"""

from __future__ import annotations

import ssl

from .._channels._tls_engine import TLSOptions

# Seconds; asyncio's defaults.
HANDSHAKE_TIMEOUT = 60.0
SHUTDOWN_TIMEOUT = 30.0


def client_options(
    context: ssl.SSLContext | bool | None,
    *,
    host: str | bytes | None,
    server_hostname: str | None,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> TLSOptions | None:
    """Return the options of a client, or `None` without a `context`.

    The certificate is checked for `server_hostname`, or for `host` if that is `None`; with `""` the name is not
    checked, which the context has to allow. Raises `ValueError` if the parameters contradict each other.
    """
    if not context:
        if server_hostname is not None:
            raise ValueError("server_hostname is only meaningful with ssl")
        _refuse_timeouts(handshake_timeout, shutdown_timeout)
        return None
    if server_hostname is None:
        if not host:
            raise ValueError("You must set server_hostname when using ssl without a host")
        server_hostname = host.decode("ascii") if isinstance(host, bytes) else host
    if isinstance(context, bool):
        context = ssl.create_default_context()
        if not server_hostname:
            context.check_hostname = False
    return TLSOptions(context, False, server_hostname or None, *_checked_timeouts(handshake_timeout, shutdown_timeout))


def server_options(
    context: ssl.SSLContext | None, *, handshake_timeout: float | None, shutdown_timeout: float | None
) -> TLSOptions | None:
    """Return the options of a server, or `None` without a `context`.

    Raises `TypeError` for a `bool`: a server needs a context with a certificate.
    """
    if isinstance(context, bool):
        raise TypeError("ssl argument must be an SSLContext or None")
    if context is None:
        _refuse_timeouts(handshake_timeout, shutdown_timeout)
        return None
    return TLSOptions(context, True, None, *_checked_timeouts(handshake_timeout, shutdown_timeout))


def stream_options(
    context: ssl.SSLContext | bool | None,
    *,
    server_side: bool,
    server_hostname: str | None,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> TLSOptions | None:
    """Return the options of a client or server whose host is unknown, or `None` without a `context`.

    Raises what `client_options` and `server_options` raise.
    """
    timeouts = {"handshake_timeout": handshake_timeout, "shutdown_timeout": shutdown_timeout}
    if not server_side:
        return client_options(context, host=None, server_hostname=server_hostname, **timeouts)
    if server_hostname is not None:
        raise ValueError("server_hostname is only meaningful for a client")
    if not context or isinstance(context, bool):
        raise TypeError(f"a server needs an SSLContext, got ssl={context!r}")
    return server_options(context, **timeouts)


def require_context(context: object) -> None:
    """Raise `TypeError` unless `context` is an `SSLContext`."""
    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"sslcontext is expected to be an instance of ssl.SSLContext, got {context!r}")


def upgrade_options(
    context: ssl.SSLContext,
    *,
    server_side: bool,
    server_hostname: str | None,
    handshake_timeout: float | None,
    shutdown_timeout: float | None,
) -> TLSOptions:
    """Return the options of a client or server whose connection is already open.

    A server does not check a name, so it ignores `server_hostname`.
    """
    name = None if server_side else server_hostname or None
    return TLSOptions(context, server_side, name, *_checked_timeouts(handshake_timeout, shutdown_timeout))


def _refuse_timeouts(handshake_timeout: float | None, shutdown_timeout: float | None) -> None:
    if handshake_timeout is not None:
        raise ValueError("ssl_handshake_timeout is only meaningful with ssl")
    if shutdown_timeout is not None:
        raise ValueError("ssl_shutdown_timeout is only meaningful with ssl")


def _checked_timeouts(handshake_timeout: float | None, shutdown_timeout: float | None) -> tuple[float, float]:
    handshake_timeout = HANDSHAKE_TIMEOUT if handshake_timeout is None else handshake_timeout
    shutdown_timeout = SHUTDOWN_TIMEOUT if shutdown_timeout is None else shutdown_timeout
    if not handshake_timeout > 0:  # NaN is refused, too.
        raise ValueError(f"ssl_handshake_timeout should be a positive number, got {handshake_timeout}")
    if not shutdown_timeout > 0:
        raise ValueError(f"ssl_shutdown_timeout should be a positive number, got {shutdown_timeout}")
    # A number that cannot be added to a `float`, such as a `Decimal`, would fail later, when a client is accepted.
    return float(handshake_timeout), float(shutdown_timeout)
