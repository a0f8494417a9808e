"""Resolve hosts and ports, as users write them, to the addresses that sockets take.

Holds: the checks of hosts and ports, and name resolution.
May know: `anyio`, `socket`.
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

# A plain `int`: combining the flags of the enumeration costs as much as the look-up.
NUMERIC = int(socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)


def local_parts(local_addr: Any) -> tuple[Any, ...]:
    """Return the host and port of a local address, and its flow information and scope id if it has them.

    Raises `TypeError` or `ValueError` for anything else.
    """
    if isinstance(local_addr, (str, bytes)):
        raise TypeError(f"local_addr must be a (host, port) tuple, got {local_addr!r}")
    host, port, *scope = local_addr
    if len(scope) > 2:
        raise TypeError(f"local_addr must be a (host, port) tuple, got {local_addr!r}")
    return host, port, *scope


def checked(host: Host, port: Port) -> tuple[str | bytes | None, str | int | None]:
    """Return `host` and `port` as resolvers take them.

    Raises `OverflowError` for a port out of range, and `ValueError` for a NUL character.
    """
    if isinstance(port, bytes):
        port = port.decode("latin-1")  # Not ASCII only: the resolver rejects what is not a service.
    for text in (host, port):
        if (isinstance(text, str) and "\0" in text) or (isinstance(text, bytes) and b"\0" in text):
            # The C library stops reading at it, and would connect to another host.
            raise ValueError(f"embedded null character in {text!r}")
    if isinstance(port, (int, str)):
        try:
            port = int(port)  # A plain `int`: `getaddrinfo` rejects the members of an enumeration.
        except ValueError:
            pass  # The name of a service.
        else:
            if not 0 <= port <= HIGHEST_PORT:
                # The C library would take it modulo 65536.
                raise OverflowError(f"port must be 0-{HIGHEST_PORT}, got {port}")
    if isinstance(host, str) and host.isascii():
        host = host.encode("ascii")  # AnyIO encodes a `str` as an internationalised name, and leaves bytes alone.
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
    """Return the addresses of `host` and `port`. A numeric address is resolved without a thread.

    `scope` is the flow information and the scope id of an IPv6 address; both are used if `host` is numeric.

    Raises:
    - `socket.gaierror`: the name cannot be resolved
    - `OverflowError`: the port is out of range
    - `ValueError`: a name contains a NUL character
    """
    host, port = checked(host, port)
    try:
        found = numeric(host, port, family=family, kind=kind, proto=proto, flags=flags)
    except socket.gaierror as exc:
        # A name, which the resolver may know. But a protocol that does not match the type is an error for every host:
        # uvloop would use the protocol that matches.
        if exc.errno == getattr(socket, "EAI_SOCKTYPE", None):
            raise
        # An IPv6 address with a scope that the system does not know; uvloop's resolver would ignore the scope.
        has_scope = isinstance(host, bytes) and b"%" in host
        if has_scope and not isinstance(port, str):
            raise
    else:
        return [
            (f, t, p, (*address[:2], *scope) if scope and f == socket.AF_INET6 else address)
            for f, t, p, address in found
        ]
    if has_scope:  # Only the service is a name.
        numbers_only = flags & socket.AI_NUMERICSERV
        (*_, address), *_ = await anyio.getaddrinfo(None, port, type=kind, proto=proto, flags=numbers_only)
        return await resolve(host, address[1], *scope, family=family, kind=kind, proto=proto, flags=flags)
    resolved = await anyio.getaddrinfo(host, port, family=family, type=kind, proto=proto, flags=flags)
    if not resolved:  # AnyIO omits IPv6 addresses if Python was built without IPv6.
        raise OSError(f"getaddrinfo({host!r}) returned an empty list")
    # AnyIO omits the flow information, and appends the scope id to the address, where sockets do not look for it.
    return [info for f, t, p, _, address in resolved for info in numeric(*address[:2], family=f, kind=t, proto=p)]


def numeric(
    host: Host, port: str | int | None, *, family: int, kind: int, proto: int, flags: int = 0
) -> list[AddressInfo]:
    """Return the addresses of a numeric host, or of no host. Never blocks. Raises `socket.gaierror` for a name."""
    found = socket.getaddrinfo(host, port, family, kind, proto, flags | NUMERIC)
    return [(f, t, p, address) for f, t, p, _, address in found]
