"""Hosts and ports, as users write them, made into addresses that sockets take.

May know: AnyIO's resolver. Knows nothing of connecting or listening.
"""

from __future__ import annotations

import socket
from typing import Any, TypeAlias

import anyio

Host: TypeAlias = "str | bytes | None"
Port: TypeAlias = "str | bytes | int | None"

#: Family, type, protocol and address of a socket.
AddressInfo: TypeAlias = "tuple[int, int, int, Any]"

HIGHEST_PORT = 65535

# As a plain number: to combine Python's flags costs as much as the look-up.
NUMERIC = int(socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)


def local_parts(local_addr: Any) -> tuple[Any, ...]:
    """Return host and port of a local address, and the scope that may follow; `TypeError`, `ValueError` for others."""
    if isinstance(local_addr, (str, bytes)):
        raise TypeError(f"local_addr must be a (host, port) tuple, got {local_addr!r}")
    host, port, *scope = local_addr
    if len(scope) > 2:
        raise TypeError(f"local_addr must be a (host, port) tuple, got {local_addr!r}")
    return host, port, *scope


def checked(host: Host, port: Port) -> tuple[str | bytes | None, str | int | None]:
    """Return `host` and `port` as resolvers take them.

    Raises `OverflowError` for a port out of range, `ValueError` for a NUL character.
    """
    if isinstance(port, bytes):
        port = port.decode("latin-1")  # As it is: what is not ASCII is no service, which the resolver knows best.
    for text in (host, port):
        if (isinstance(text, str) and "\0" in text) or (isinstance(text, bytes) and b"\0" in text):
            # The C library would not look beyond it, and connect to another host than the one that was named.
            raise ValueError(f"embedded null character in {text!r}")
    if isinstance(port, (int, str)):
        try:
            port = int(port)  # A plain one: `getaddrinfo` takes no member of an enumeration, for example.
        except ValueError:
            pass  # The name of a service.
        else:
            if not 0 <= port <= HIGHEST_PORT:
                # The C library would take it modulo 65536.
                raise OverflowError(f"port must be 0-{HIGHEST_PORT}, got {port}")
    if isinstance(host, str) and host.isascii():
        host = host.encode("ascii")  # Bytes pass AnyIO untouched, a `str` as an internationalised name.
    return host, port


async def resolve(
    host: Host,
    port: Port,
    *scope: int,
    family: int = 0,
    kind: int = socket.SOCK_STREAM,
    proto: int = 0,
    flags: int = 0,
) -> list[AddressInfo]:
    """Return the addresses of `host` and `port`; numbers need no thread.

    `scope` is what an IPv6 address may have behind its port, flow information and scope id: it counts for a numeric
    `host`. Raises `socket.gaierror` for what cannot be resolved, `OverflowError` for a port out of range, `ValueError`
    for a NUL.
    """
    host, port = checked(host, port)
    try:
        found = numeric(host, port, family=family, kind=kind, proto=proto, flags=flags)
    except socket.gaierror as exc:
        # A name, which the resolver knows or not; but no host has a protocol of another type. uvloop would take the one
        # that the type has.
        if exc.errno == getattr(socket, "EAI_SOCKTYPE", None):
            raise
        # An IPv6 address with a scope, which uvloop's resolver would leave out: the system does not know it.
        has_scope = isinstance(host, bytes) and b"%" in host
        if has_scope and not isinstance(port, str):
            raise
    else:
        return [
            (f, t, p, (*address[:2], *scope) if scope and f == socket.AF_INET6 else address)
            for f, t, p, address in found
        ]
    if has_scope:  # What is left to resolve is the service.
        numbers_only = flags & socket.AI_NUMERICSERV
        (*_, address), *_ = await anyio.getaddrinfo(None, port, type=kind, proto=proto, flags=numbers_only)
        return await resolve(host, address[1], *scope, family=family, kind=kind, proto=proto, flags=flags)
    resolved = await anyio.getaddrinfo(host, port, family=family, type=kind, proto=proto, flags=flags)
    if not resolved:  # AnyIO leaves IPv6 out where Python has been built without it.
        raise OSError(f"getaddrinfo({host!r}) returned an empty list")
    # AnyIO leaves out flow information and writes the scope id behind the address, where sockets do not look.
    return [info for f, t, p, _, address in resolved for info in numeric(*address[:2], family=f, kind=t, proto=p)]


def numeric(
    host: Host, port: str | int | None, *, family: int, kind: int, proto: int, flags: int = 0
) -> list[AddressInfo]:
    """Return the addresses of a number or of no host at all; never blocks. Raises `socket.gaierror` for a name."""
    found = socket.getaddrinfo(host, port, family, kind, proto, flags | NUMERIC)
    return [(f, t, p, address) for f, t, p, _, address in found]
