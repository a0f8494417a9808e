"""What is done to a socket before a channel has it: made ready, bound, connected; errors name the address.

May know: AnyIO's `wait_writable`, the operating system. Knows nothing of who wants the socket.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from ssl import SSLSocket
from typing import Any

import anyio
import anyio.lowlevel

from ._errors import logger

# What a socket says that goes on connecting by itself. That is not what a UNIX socket means with `EAGAIN`, but that the
# backlog of the server is full (connect(2)). Windows has a number for each.
UNDER_WAY = {errno.EINPROGRESS, errno.EALREADY, errno.EINTR, errno.EWOULDBLOCK} - {errno.EAGAIN}


def refuse_tls_socket(sock: object) -> None:
    """Raise `TypeError` for a TLS socket, as which a transport could not use it without blocking."""
    if isinstance(sock, SSLSocket):
        raise TypeError("Socket cannot be of type SSLSocket")


def check_stream_socket(sock: socket.socket, family: int | None = None) -> None:
    """Raise `ValueError` for a socket that is no stream socket (of `family`)."""
    if sock.type != socket.SOCK_STREAM or family not in (None, sock.family):
        raise ValueError(f"A {'' if family is None else 'UNIX Domain '}Stream Socket was expected, got {sock!r}")


def set_option(sock: socket.socket, name: str) -> None:
    """Turn on the socket option called `name`. Raises `ValueError` where it does not exist."""
    try:
        option = getattr(socket, name)
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
    except (AttributeError, OSError) as exc:
        raise ValueError(f"{name} is not supported by this platform") from exc


def bind(sock: socket.socket, address: Any) -> None:
    """Bind `sock`; a UNIX socket takes the place of one that was there. Raises an `OSError` that names the address."""
    if isinstance(address, (str, bytes)) and is_file(address):
        remove_stale(address)
    try:
        sock.bind(address)
    except OSError as exc:
        raise address_error("error while attempting to bind on address", address, exc) from None


async def connect(sock: socket.socket, address: Any) -> None:
    """Make `sock` non-blocking and connect it. Raises an `OSError` that names the address.

    Other tasks have their turn, whether there is anything to wait for or not.
    """
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code in UNDER_WAY:
            await anyio.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            await anyio.lowlevel.checkpoint()
        if code:
            raise OSError(code, os.strerror(code))
    except OSError as exc:
        raise address_error("Connect call failed", address, exc) from exc


def is_file(path: str | bytes) -> bool:
    """Whether `path` is neither an abstract name nor empty, which leaves the choice of such a name to the system."""
    return bool(path) and path[0] not in (0, "\0")


def remove_stale(path: str | bytes) -> None:
    """Remove the socket at `path`, if there is one."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        # Whether this matters, `bind` will tell.
        logger.error("cannot check or remove a stale UNIX socket at %r: %r", path, exc)


def address_error(doing: str, address: Any, exc: OSError) -> OSError:
    """Return `exc` with what failed and the address in its message."""
    if exc.errno is None:  # Python's own, of a path that is too long for example.
        return OSError(f"{doing} {address!r}: {exc}")
    reason = os.strerror(exc.errno)
    return OSError(exc.errno, f"{doing} {address!r}: {reason[:1].lower()}{reason[1:]}")
