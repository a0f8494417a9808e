"""TCP: `create_connection`, `create_server`, and `connect_accepted_socket` for any stream socket."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from ssl import SSLContext
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from .._errors import logger
from .._server import Server
from .._sockets import bind, check_stream_socket, refuse_tls_socket, set_option
from ._addresses import AddressInfo, Host, Port, local_parts, resolve
from ._base import Endpoints, ProtocolT
from ._happy_eyeballs import connect_to_any, interleave as interleaved
from ._tls import client_options, server_options

if TYPE_CHECKING:
    from asyncio import Transport

# No socket of such a kind can be made here, however often one tries.
UNSUPPORTED = {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EPROTOTYPE}

# How often a port that the system chose for the first address may turn out to be taken on another.
PORT_ATTEMPTS = 20


class TCPEndpoints(Endpoints):
    """`create_connection`, `create_server` and `connect_accepted_socket`."""

    async def create_connection(
        self,
        protocol_factory: Callable[[], ProtocolT],
        host: Host = None,
        port: Port = None,
        *,
        ssl: SSLContext | bool | None = None,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        sock: socket.socket | None = None,
        local_addr: tuple[Any, ...] | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        happy_eyeballs_delay: float | None = None,
        interleave: int | None = None,
        all_errors: bool = False,
    ) -> tuple[Transport, ProtocolT]:
        """Connect to `host` and `port` over TCP and return `(transport, protocol)`.

        `connection_made` runs before this returns. `host` is a name or an address, `port` a number or the name of a
        service; `family`, `proto` and `flags` are the resolver's (`socket.getaddrinfo`). Every address that `host` has
        is tried: one after the other, or with `happy_eyeballs_delay` staggered by so many seconds (RFC 8305 recommends
        0.25). `interleave` lets the address families take turns after so many addresses of the first one; 0 keeps the
        resolver's order. It defaults to 1 with `happy_eyeballs_delay`, to 0 without. `local_addr` is the `(host, port)`
        to connect from.

        `sock` is a connected stream socket to use instead of `host` and `port`. It belongs to the group from now on,
        which makes it non-blocking, and closes it whatever happens.

        With `ssl`, a context or `True` for `ssl.create_default_context()`, the connection is encrypted, and the peer's
        certificate has to be for `server_hostname`: by default `host`; with `""` its name is not checked,
        which a context has to allow.
        `ssl_handshake_timeout` and `ssl_shutdown_timeout` are in seconds, 60 and 30 by default.

        Raises `RuntimeError` when the group is not open, `ValueError` and `TypeError` for arguments that do not go
        together, `OverflowError` for a port out of range, `socket.gaierror` when a name is not known, `OSError` that
        names every address when none accepts (an `ExceptionGroup` of them with `all_errors`), and whatever
        `protocol_factory` raises. With `ssl` also `ssl.SSLError` when the ends do not agree (the certificate is not
        trusted, say), `ConnectionResetError` when the peer leaves, and `ConnectionAbortedError` when the handshake
        takes too long. No connection is left open then.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_connection
        """
        tls = client_options(
            ssl,
            host=host,
            server_hostname=server_hostname,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
        if sock is not None:
            refuse_tls_socket(sock)
            if host is not None or port is not None:
                raise ValueError("host/port and sock can not be specified at the same time")
            check_stream_socket(sock)
            await self._take_over(sock)
            return await self._connect_socket(protocol_factory, sock, tls)
        if host is None and port is None:
            raise ValueError("host and port was not specified and no sock specified")
        await anyio.lowlevel.checkpoint_if_cancelled()  # The other half of a checkpoint comes with `connect`.
        addresses = await resolve(host, port, family=family, proto=proto, flags=flags)
        local_addresses = None
        if local_addr is not None:
            local_addresses = await resolve(*local_parts(local_addr), family=family, proto=proto, flags=flags)
        if interleave is None:
            interleave = 0 if happy_eyeballs_delay is None else 1
        if interleave:
            addresses = interleaved(addresses, interleave)
        sock = await connect_to_any(addresses, local_addresses, delay=happy_eyeballs_delay, all_errors=all_errors)
        return await self._connect_socket(protocol_factory, sock, tls)

    async def create_server(
        self,
        protocol_factory: Callable[[], Any],
        host: Host | Iterable[Host] = None,
        port: Port = None,
        *,
        family: int = socket.AF_UNSPEC,
        flags: int = socket.AI_PASSIVE,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: SSLContext | None = None,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        keep_alive: bool | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
    ) -> Server:
        """Listen on `host` and `port` over TCP and return the `Server`.

        `protocol_factory` is called for each client. `host` is a name or address, several of them, or `None` or `""`
        for all interfaces; `family` and `flags` are the resolver's (`socket.getaddrinfo`). With port 0 the system
        chooses, the same port for every address. IPv6 sockets take no IPv4 connections. `backlog` is how many
        connections may wait to be accepted. `reuse_address` defaults to true on POSIX, which allows to bind while old
        connections linger; `reuse_port` lets several sockets, also of other processes, share the port. `keep_alive`
        makes the system probe connections that are idle. Unless `start_serving` is true, clients have to wait for
        `Server.start_serving` or `Server.serve_forever`.

        `sock` is a bound stream socket to use instead of `host` and `port`. It belongs to the server from now on.

        With `ssl`, a context that has the server's certificate, every connection is encrypted. `ssl_handshake_timeout`
        and `ssl_shutdown_timeout` are in seconds, 60 and 30 by default.

        Raises `RuntimeError` when the group is not open, `ValueError` and `TypeError` for arguments that do not go
        together and for `reuse_port` where the platform lacks it, `OverflowError` for a port out of range,
        `socket.gaierror` when a name is not known, and `OSError` that names the address when one cannot be bound; all
        are closed then. An address that this machine does not have is left out, as long as there are others. A
        handshake that fails, and what `protocol_factory` raises, end that client's connection and go to the exception
        handler.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_server
        """
        tls = server_options(ssl, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout)
        if sock is not None:
            refuse_tls_socket(sock)
            if host is not None or port is not None:
                raise ValueError("host/port and sock can not be specified at the same time")
            check_stream_socket(sock)
            await self._take_over(sock)
            sockets = [sock]
        else:
            if host is None and port is None:
                raise ValueError("Neither host/port nor sock were specified")
            await anyio.lowlevel.checkpoint()
            hosts = [host or None] if host is None or isinstance(host, (str, bytes)) else host
            addresses: dict[AddressInfo, None] = {}  # Each once, in order.
            for name in hosts:
                addresses.update(dict.fromkeys(await resolve(name, port, family=family, flags=flags)))
            if reuse_address is None:
                reuse_address = os.name == "posix" and sys.platform != "cygwin"
            options = [
                option
                for option, wanted in (
                    ("SO_REUSEADDR", reuse_address),
                    ("SO_REUSEPORT", reuse_port),
                    ("SO_KEEPALIVE", keep_alive),
                )
                if wanted
            ]
            sockets = bind_all(list(addresses), options)
        return Server(self._core, protocol_factory, sockets, backlog, tls, start_serving=start_serving)

    async def connect_accepted_socket(
        self,
        protocol_factory: Callable[[], ProtocolT],
        sock: socket.socket,
        *,
        ssl: SSLContext | bool | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Transport, ProtocolT]:
        """Give a connection that was accepted elsewhere a protocol and return `(transport, protocol)`.

        For servers that accept by themselves, and for what systemd, inetd or a parent process hand over. `sock` is a
        connected stream socket of any family. It belongs to the group from now on, which makes it non-blocking, and
        closes it whatever happens. With `ssl`, a context that has the server's certificate, it is the server's end of
        TLS; `ssl_handshake_timeout` and `ssl_shutdown_timeout` are in seconds, 60 and 30 by default. `connection_made`
        runs before this returns.

        Raises `RuntimeError` when the group is not open, `ValueError` and `TypeError` for bad arguments, and whatever
        `protocol_factory` raises. With `ssl` also `ssl.SSLError` when the ends do not agree, `ConnectionResetError`
        when the peer leaves, and `ConnectionAbortedError` when the handshake takes too long.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.connect_accepted_socket
        """
        check_stream_socket(sock)
        if ssl is True:
            raise ValueError("the server's end of TLS needs an SSLContext with a certificate")
        tls = server_options(
            ssl or None, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout
        )
        refuse_tls_socket(sock)
        await self._take_over(sock)
        return await self._connect_socket(protocol_factory, sock, tls)


def bind_all(addresses: Sequence[AddressInfo], options: Sequence[str]) -> list[socket.socket]:
    """Bind every address, all on one port when the port is 0; on failure none stays open."""
    for attempt in range(PORT_ATTEMPTS):
        sockets: list[socket.socket] = []
        port = 0
        try:
            for family, kind, proto, address in addresses:
                wanted = (address[0], address[1] or port, *address[2:])
                sock = bound((family, kind, proto, wanted), options)
                if sock is not None:
                    sockets.append(sock)
                    port = port or sock.getsockname()[1]
        except BaseException as exc:
            for sock in sockets:
                sock.close()
            port_was_chosen = bool(sockets) and any(address[1] == 0 for _, _, _, address in addresses)
            again = port_was_chosen and isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
            if not again or attempt == PORT_ATTEMPTS - 1:
                raise
        else:
            if not sockets:
                raise OSError(
                    errno.EADDRNOTAVAIL,
                    f"could not bind on any address out of {[address for _, _, _, address in addresses]!r}",
                )
            return sockets
    raise AssertionError  # The last attempt returned or raised.


def bound(info: AddressInfo, options: Sequence[str]) -> socket.socket | None:
    """Return a non-blocking socket bound to one address, `None` when there is no such address on this machine."""
    family, kind, proto, address = info
    try:
        sock = socket.socket(family, kind, proto)
    except OSError as exc:
        if exc.errno in UNSUPPORTED:
            logger.debug("create_server() leaves out %r: %s", address, exc)
            return None
        raise
    try:
        sock.setblocking(False)
        for option in options:
            set_option(sock, option)
        if family == socket.AF_INET6:
            # The IPv4 wildcard gets a socket of its own, so this one must not take its port as well.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bind(sock, address)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, OSError) and exc.errno == errno.EADDRNOTAVAIL:
            # The name may well have addresses of a family that is turned off.
            logger.debug("create_server() leaves an address out: %s", exc)
            return None
        raise
    return sock
