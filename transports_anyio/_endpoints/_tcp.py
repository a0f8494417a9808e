"""TCP: `create_connection`, `create_server`, and `connect_accepted_socket` for any stream socket.

Holds: the endpoint functions, and how the sockets of a server are bound.
May know: `_addresses`, `_base`, `_happy_eyeballs`, `_tls`, `_errors`, `_server`, `_sockets`, `_types`, `abc`, `anyio`,
`os`, `socket`, `ssl`.
"""

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
from .._server import Server, check_limits
from .._sockets import bind, check_stream_socket, refuse_tls_socket, set_option
from .._types import AnyProtocol, StreamProtocolT
from ._addresses import AddressInfo, Host, Port, local_parts, resolve
from ._base import CancellationFirst, Endpoints, check_open
from ._happy_eyeballs import connect_to_any, interleave as interleaved
from ._tls import client_options, server_options

if TYPE_CHECKING:
    from ..abc import Transport

# The system cannot make a socket of this kind.
UNSUPPORTED = {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EPROTOTYPE}

# How often to choose another port, if the one that the system chose for the first address is in use on another.
PORT_ATTEMPTS = 20


class TCPEndpoints(Endpoints):
    """`create_connection`, `create_server` and `connect_accepted_socket`."""

    async def create_connection(
        self,
        protocol_factory: Callable[[], StreamProtocolT],
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
    ) -> tuple[Transport, StreamProtocolT]:
        """Connect to `host` and `port` over TCP and return `(transport, protocol)`.

        `connection_made` runs before this returns.

        - `protocol_factory`: makes the protocol
        - `host`: a name or an address. All of its addresses are tried until one accepts.
        - `port`: a number or the name of a service
        - `ssl`: a context, or `True` for `ssl.create_default_context()`; encrypts the connection
        - `family`, `proto`, `flags`: passed to the resolver, `socket.getaddrinfo`
        - `sock`: a connected stream socket, used instead of `host` and `port`. The group owns it from now on: it makes
          the socket non-blocking, and closes it on every error.
        - `local_addr`: the `(host, port)` to connect from
        - `server_hostname`: the name that the peer's certificate must have, by default `host`. With `""` the name is
          not checked; the context has to allow that.
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: seconds, 60 and 30 by default
        - `happy_eyeballs_delay`: seconds after which the next address is tried beside the previous one, as RFC 8305
          describes (it recommends 0.25). `None` tries one address after the other.
        - `interleave`: how many addresses of the first family are tried before the families alternate; 0 keeps the
          resolver's order. By default 1 with `happy_eyeballs_delay`, and 0 without it.
        - `all_errors`: raise the errors of all addresses as an `ExceptionGroup`

        Raises, and leaves no connection open:

        - `RuntimeError`: the group is not open
        - `ValueError`, `TypeError`: the arguments are invalid or contradict each other
        - `OverflowError`: the port is out of range
        - `socket.gaierror`: the name cannot be resolved
        - `OSError`: no address accepts; the message names every address
        - `ssl.SSLError`: the peers do not agree on TLS (the certificate is not trusted, for example)
        - `ConnectionResetError`: the peer closed the connection during the handshake
        - `ConnectionAbortedError`: the handshake timed out
        - whatever `protocol_factory` raises

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_connection
        """
        poller = await check_open(self._core, "create_connection", protocol_factory)
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
            await self._adopt(sock)
            return await self._connect_socket(protocol_factory, sock, tls)
        if host is None and port is None:
            raise ValueError("host and port was not specified and no sock specified")
        await anyio.lowlevel.checkpoint_if_cancelled()  # `connect` is the other half of the checkpoint.
        async with CancellationFirst(self._core):
            addresses = await resolve(host, port, family=family, proto=proto, flags=flags)
            local_addresses = None
            if local_addr is not None:
                local_addresses = await resolve(*local_parts(local_addr), family=family, proto=proto, flags=flags)
            if interleave is None:
                interleave = 0 if happy_eyeballs_delay is None else 1
            if interleave:
                addresses = interleaved(addresses, interleave)
            sock = await connect_to_any(
                poller, addresses, local_addresses, delay=happy_eyeballs_delay, all_errors=all_errors
            )
        return await self._connect_socket(protocol_factory, sock, tls)

    async def create_server(
        self,
        protocol_factory: Callable[[], AnyProtocol],
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
        max_connections: int | None = None,
        max_handshakes: int | None = None,
    ) -> Server:
        """Listen on `host` and `port` over TCP and return the `Server`.

        - `protocol_factory`: makes the protocol of each connection. What it raises, and the error of a handshake, end
          that connection and go to the exception handler.
        - `host`: a name or an address, or several of them; `None` or `""` for all interfaces. An address that this
          machine does not have is skipped if another address can be bound.
        - `port`: a number or the name of a service. With 0 the system chooses a port, the same for every address.
        - `family`, `flags`: passed to the resolver, `socket.getaddrinfo`. IPv6 sockets accept no IPv4 connections.
        - `sock`: a bound stream socket, used instead of `host` and `port`. The server owns it from now on.
        - `backlog`: how many connections may wait to be accepted
        - `ssl`: a context with the server's certificate; encrypts every connection
        - `reuse_address`: allow to bind while connections of a previous server linger; by default true on POSIX
        - `reuse_port`: allow other sockets, also those of other processes, to listen on the same port
        - `keep_alive`: let the system probe idle connections
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: seconds, 60 and 30 by default
        - `start_serving`: accept connections at once. If false, `Server.start_serving` or `Server.serve_forever` begins
          to accept.
        - `max_connections`: how many accepted connections may be open, those in their TLS handshake included (not in
          asyncio). When so many are, the server stops accepting until one has gone: further clients wait in the
          backlog. No limit by default.
        - `max_handshakes`: how many accepted connections may be in their TLS handshake, in the same way (not in
          asyncio). A silent client takes such a place for `ssl_handshake_timeout`.

        Raises, and leaves no socket open:

        - `RuntimeError`: the group is not open
        - `ValueError`, `TypeError`: the arguments are invalid or contradict each other, or the platform has no
          `reuse_port`
        - `OverflowError`: the port is out of range
        - `socket.gaierror`: a name cannot be resolved
        - `OSError`: an address cannot be bound; the message names it

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_server
        """
        await check_open(self._core, "create_server", protocol_factory)
        tls = server_options(ssl, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout)
        check_limits(max_connections, max_handshakes, tls=tls is not None)
        if sock is not None:
            refuse_tls_socket(sock)
            if host is not None or port is not None:
                raise ValueError("host/port and sock can not be specified at the same time")
            check_stream_socket(sock)
            await self._adopt(sock)
            sockets = [sock]
        else:
            if host is None and port is None:
                raise ValueError("Neither host/port nor sock were specified")
            await anyio.lowlevel.checkpoint()
            hosts = [host or None] if host is None or isinstance(host, (str, bytes)) else host
            addresses: dict[AddressInfo, None] = {}  # Without duplicates, in order.
            async with CancellationFirst(self._core):
                for name in hosts:
                    addresses.update(dict.fromkeys(await resolve(name, port, family=family, flags=flags)))
            await check_open(self._core)
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
        return Server(
            self._core,
            protocol_factory,
            sockets,
            backlog,
            tls,
            start_serving=start_serving,
            max_connections=max_connections,
            max_handshakes=max_handshakes,
        )

    async def connect_accepted_socket(
        self,
        protocol_factory: Callable[[], StreamProtocolT],
        sock: socket.socket,
        *,
        ssl: SSLContext | bool | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Transport, StreamProtocolT]:
        """Make a protocol for a connection that other code has accepted, and return `(transport, protocol)`.

        This is for servers with their own accept loop, and for sockets that systemd, inetd or a parent process pass on.
        `connection_made` runs before this returns.

        - `protocol_factory`: makes the protocol
        - `sock`: a connected stream socket of any family. The group owns it from now on: it makes the socket
          non-blocking, and closes it on every error.
        - `ssl`: a context with the server's certificate; encrypts the connection
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: seconds, 60 and 30 by default

        Raises:
        - `RuntimeError`: the group is not open
        - `ValueError`, `TypeError`: the arguments are invalid
        - `ssl.SSLError`: the peers do not agree on TLS
        - `ConnectionResetError`: the peer closed the connection during the handshake
        - `ConnectionAbortedError`: the handshake timed out
        - whatever `protocol_factory` raises

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.connect_accepted_socket
        """
        await check_open(self._core, "connect_accepted_socket", protocol_factory)
        check_stream_socket(sock)
        if ssl is True:
            raise ValueError("the server's end of TLS needs an SSLContext with a certificate")
        tls = server_options(
            ssl or None, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout
        )
        refuse_tls_socket(sock)
        await self._adopt(sock)
        return await self._connect_socket(protocol_factory, sock, tls)


def bind_all(addresses: Sequence[AddressInfo], options: Sequence[str]) -> list[socket.socket]:
    """Return sockets bound to the addresses; port 0 means the same free port for all. An error closes all of them."""
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
    raise AssertionError  # Unreachable: the last attempt returns or raises.


def bound(info: AddressInfo, options: Sequence[str]) -> socket.socket | None:
    """Return a non-blocking socket bound to an address, or `None` if this machine does not have the address."""
    family, kind, proto, address = info
    try:
        sock = socket.socket(family, kind, proto)
    except OSError as exc:
        if exc.errno in UNSUPPORTED:
            logger.debug("create_server() skips %r: %s", address, exc)
            return None
        raise
    try:
        sock.setblocking(False)
        for option in options:
            set_option(sock, option)
        if family == socket.AF_INET6:
            # The IPv4 wildcard address gets its own socket, on the same port.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bind(sock, address)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, OSError) and exc.errno == errno.EADDRNOTAVAIL:
            # The name may have addresses of a family that is disabled on this machine.
            logger.debug("create_server() skips an address: %s", exc)
            return None
        raise
    return sock
