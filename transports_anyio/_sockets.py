"""Prepare sockets for a channel: check, bind and connect them, with errors that name the address.

Holds: these functions.
May know: `_errors`, `_poller`, `anyio`, `os`, `socket`, `ssl`.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from ssl import SSLSocket
from typing import Any

import anyio.lowlevel

from ._errors import logger
from ._poller import Poller

# The errors of `connect` while the connection is being made. `EAGAIN` is not one: for a UNIX socket it means that
# the backlog of the server is full (connect(2)). On Windows EWOULDBLOCK is another number.
CONNECTING = {errno.EINPROGRESS, errno.EALREADY, errno.EINTR, errno.EWOULDBLOCK} - {errno.EAGAIN}


def refuse_tls_socket(sock: object) -> None:
    """Raise `TypeError` for an `SSLSocket`, which a transport cannot use without blocking."""
    if isinstance(sock, SSLSocket):
        raise TypeError("Socket cannot be of type SSLSocket")


def check_stream_socket(sock: socket.socket, family: int | None = None) -> None:
    """Raise `ValueError` for a socket that is not a stream socket, or not of `family`."""
    if sock.type != socket.SOCK_STREAM or family not in (None, sock.family):
        raise ValueError(f"A {'' if family is None else 'UNIX Domain '}Stream Socket was expected, got {sock!r}")


def set_option(sock: socket.socket, name: str) -> None:
    """Enable the socket option `name`. Raises `ValueError` if the platform does not have it."""
    try:
        option = getattr(socket, name)
        sock.setsockopt(socket.SOL_SOCKET, option, 1)
    except (AttributeError, OSError) as exc:
        raise ValueError(f"{name} is not supported by this platform") from exc


def bind(sock: socket.socket, address: Any) -> None:
    """Bind `sock`; a UNIX socket replaces one that exists at its path. Raises an `OSError` that names the address."""
    if isinstance(address, (str, bytes)) and is_file(address):
        remove_stale(address)
    try:
        sock.bind(address)
    except OSError as exc:
        raise address_error("error while attempting to bind on address", address, exc) from None


async def connect(poller: Poller, sock: socket.socket, address: Any) -> None:
    """Make `sock` non-blocking and connect it. Raises an `OSError` that names the address.

    Always contains a checkpoint.
    """
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code in CONNECTING:
            await poller.driver.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            await anyio.lowlevel.checkpoint()
        if code:
            raise OSError(code, os.strerror(code))
    except OSError as exc:
        raise address_error("Connect call failed", address, exc) from exc


def is_file(path: str | bytes) -> bool:
    """Return whether `path` is a file: neither an abstract name nor empty, which lets the system choose such a name."""
    return bool(path) and path[0] not in (0, "\0")


def remove_stale(path: str | bytes) -> None:
    """Remove the socket at `path`, if one exists."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        # `bind` reports it if it matters.
        logger.error("cannot check or remove a stale UNIX socket at %r: %r", path, exc)


def address_error(doing: str, address: Any, exc: OSError) -> OSError:
    """Return an error like `exc` whose message says what failed, and for which address."""
    if exc.errno is None:  # Raised by Python itself: the path is too long, for example.
        return OSError(f"{doing} {address!r}: {exc}")
    reason = os.strerror(exc.errno)
    return OSError(exc.errno, f"{doing} {address!r}: {reason[:1].lower()}{reason[1:]}")
