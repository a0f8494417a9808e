"""TCP: `create_connection` and `create_server`."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import anyio.lowlevel

from .._server import Server
from ._base import Endpoints, ProtocolT

if TYPE_CHECKING:
    from asyncio import Transport

AddressInfo: TypeAlias = "tuple[int, int, int, Any]"
Port: TypeAlias = "str | bytes | int | None"

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup


def refuse_unsupported(function: str, arguments: dict[str, Any]) -> None:
    """Raise `NotImplementedError` for an argument of asyncio's that is not supported, given with any value."""
    if arguments:
        msg = f"{function}() does not support {', '.join(sorted(arguments))}"
        raise NotImplementedError(msg)


async def resolve(
    host: str | bytes | None, port: Port, *, family: int = 0, proto: int = 0, flags: int = 0
) -> list[AddressInfo]:
    """Return the stream addresses of `host` and `port`; a numeric address needs no thread."""
    if isinstance(host, bytes):
        host = host.decode("ascii")
    if isinstance(port, bytes):
        port = port.decode("ascii")
    number = 0 if port in (None, "") else int(port) if isinstance(port, int) or str(port).isdecimal() else None
    if host and number is not None and family in (0, socket.AF_INET, socket.AF_INET6) and "%" not in host:
        try:
            version = ip_address(host).version
        except ValueError:
            pass  # A name, which the resolver knows.
        else:
            found = socket.AF_INET if version == 4 else socket.AF_INET6
            address = (host, number) if version == 4 else (host, number, 0, 0)
            if family in (0, found):
                return [(found, socket.SOCK_STREAM, proto or socket.IPPROTO_TCP, address)]
    found_addresses = await anyio.getaddrinfo(
        host or None, port, family=family, type=socket.SOCK_STREAM, proto=proto, flags=flags
    )
    if not found_addresses:
        msg = f"getaddrinfo({host!r}) returned an empty list"
        raise OSError(msg)
    return [(f, kind, protocol, address) for f, kind, protocol, _, address in found_addresses]


async def connect(info: AddressInfo) -> socket.socket:
    """Return a non-blocking socket connected to one address."""
    family, kind, proto, address = info
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
    except OSError as exc:
        sock.close()
        msg = f"Connect call failed {address}: {os.strerror(exc.errno) if exc.errno else exc}"
        raise OSError(exc.errno, msg) from exc
    except BaseException:
        sock.close()
        raise
    return sock


async def connect_to_any(addresses: list[AddressInfo], *, all_errors: bool) -> socket.socket:
    """Return a socket connected to the first address that accepts."""
    errors: list[OSError] = []
    for info in addresses:
        try:
            return await connect(info)
        except OSError as exc:
            errors.append(exc)
    if all_errors:
        raise ExceptionGroup("create_connection failed", errors)
    if len({str(error) for error in errors}) == 1:
        raise errors[0]
    msg = f"Multiple exceptions: {', '.join(map(str, errors))}"
    raise OSError(msg)


def listen(info: AddressInfo, *, reuse_address: bool, reuse_port: bool) -> socket.socket:
    """Return a non-blocking socket bound to one address."""
    family, kind, proto, address = info
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        if reuse_address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            if not hasattr(socket, "SO_REUSEPORT"):
                msg = "reuse_port is not supported by the socket module"
                raise ValueError(msg)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            # The IPv4 wildcard gets a socket of its own, so this one must not take its port as well.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind(address)
        except OSError as exc:
            reason = os.strerror(exc.errno).lower() if exc.errno else str(exc)
            msg = f"error while attempting to bind on address {address!r}: {reason}"
            raise OSError(exc.errno, msg) from None
    except BaseException:
        sock.close()
        raise
    return sock


class TCPEndpoints(Endpoints):
    """`create_connection` and `create_server`."""

    async def create_connection(
        self,
        protocol_factory: Callable[[], ProtocolT],
        host: str | bytes | None = None,
        port: Port = None,
        *,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        all_errors: bool = False,
        **not_supported: Any,
    ) -> tuple[Transport, ProtocolT]:
        """Connect to `host` and `port` over TCP and return `(transport, protocol)`.

        Every address that `host` has is tried in turn. `connection_made` runs before this returns.

        Raises `RuntimeError` when the group is not open, `OSError` when no address accepts (an `ExceptionGroup` of
        them with `all_errors`), `NotImplementedError` for a parameter of asyncio's that is not supported, and
        whatever `protocol_factory` raises.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_connection
        """
        refuse_unsupported("create_connection", not_supported)
        self._require_open()
        if host is None and port is None:
            msg = "host and port was not specified and no sock specified"
            raise ValueError(msg)
        await anyio.lowlevel.checkpoint()
        addresses = await resolve(host, port, family=family, proto=proto, flags=flags)
        sock = await connect_to_any(addresses, all_errors=all_errors)
        return await self._connect_socket(protocol_factory, sock)

    async def create_server(
        self,
        protocol_factory: Callable[[], Any],
        host: str | bytes | Sequence[str | bytes] | None = None,
        port: Port = None,
        *,
        family: int = 0,
        flags: int = socket.AI_PASSIVE,
        backlog: int = 100,
        reuse_address: bool | None = None,
        reuse_port: bool | None = None,
        start_serving: bool = True,
        **not_supported: Any,
    ) -> Server:
        """Listen on `host` and `port` over TCP and return the `Server`.

        `host` is a name or address, several of them, or `None` or `""` for all interfaces. With port 0 the system
        chooses, the same port for every address. `backlog` is how many connections may wait to be accepted.

        Raises `RuntimeError` when the group is not open, `OSError` that names the address when one cannot be bound
        (all are closed then), `NotImplementedError` for a parameter of asyncio's that is not supported.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_server
        """
        refuse_unsupported("create_server", not_supported)
        poller = self._require_open()
        if host is None and port is None:
            msg = "Neither host/port nor sock were specified"
            raise ValueError(msg)
        await anyio.lowlevel.checkpoint()
        hosts: Sequence[str | bytes | None] = (
            [None] if host is None or host in ("", b"") else [host] if isinstance(host, (str, bytes)) else host
        )
        addresses: dict[AddressInfo, None] = {}
        for name in hosts:
            addresses.update(dict.fromkeys(await resolve(name, port, family=family, flags=flags)))
        self._require_open()
        if reuse_address is None:
            reuse_address = os.name == "posix" and sys.platform != "cygwin"
        sockets = bind_all(list(addresses), reuse_address=reuse_address, reuse_port=bool(reuse_port))
        server = Server(self._as_group(), poller, sockets, protocol_factory, backlog)
        self._servers.add(server)
        if start_serving:
            try:
                server.listen()
            except BaseException:
                server.close()
                raise
        return server


# How often a port that the system chose for the first address may turn out to be taken on another.
PORT_ATTEMPTS = 20


def bind_all(addresses: list[AddressInfo], *, reuse_address: bool, reuse_port: bool) -> list[socket.socket]:
    """Bind every address, all on one port when the port is 0; on failure none stays open."""
    port_is_chosen = any(address[1] == 0 for _, _, _, address in addresses)
    for attempt in range(PORT_ATTEMPTS):
        sockets: list[socket.socket] = []
        port = None
        try:
            for family, kind, proto, address in addresses:
                wanted = address if port is None else (address[0], port, *address[2:])
                sockets.append(
                    listen((family, kind, proto, wanted), reuse_address=reuse_address, reuse_port=reuse_port)
                )
                if port_is_chosen:
                    port = sockets[0].getsockname()[1]
        except BaseException as exc:
            for sock in sockets:
                sock.close()
            again = port is not None and isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE
            if not again or attempt == PORT_ATTEMPTS - 1:
                raise
        else:
            return sockets
    raise AssertionError  # The last attempt returned or raised.
