"""UNIX domain sockets: `create_unix_connection` and `create_unix_server`."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from ssl import SSLContext
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio.lowlevel

from .._errors import logger
from .._server import Server
from .._sockets import bind, check_stream_socket, connect, is_file, refuse_tls_socket
from ._base import Endpoints, ProtocolT
from ._tls import client_options, server_options

if TYPE_CHECKING:
    from asyncio import Transport

Path: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"


class UNIXEndpoints(Endpoints):
    """`create_unix_connection` and `create_unix_server`."""

    async def create_unix_connection(
        self,
        protocol_factory: Callable[[], ProtocolT],
        path: Path | None = None,
        *,
        ssl: SSLContext | bool | None = None,
        sock: socket.socket | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Transport, ProtocolT]:
        """Connect to the UNIX socket at `path` and return `(transport, protocol)`.

        `path` is that of a file, or an abstract name, which begins with a NUL character (Linux). `connection_made`
        runs before this returns. `sock` is a connected UNIX stream socket to use instead; it belongs to the group
        from now on, which makes it non-blocking, and closes it whatever happens. Who is at the other end can be
        asked of the `socket` extra info, with `getsockopt` and the platform's option (`SO_PEERCRED` on Linux).

        With `ssl`, a context or `True` for `ssl.create_default_context()`, the connection is encrypted, and the peer's
        certificate has to be for `server_hostname`, which has to be given; with `""` its name is not checked,
        which a context has to allow.
        `ssl_handshake_timeout` and `ssl_shutdown_timeout` are in seconds, 60 and 30 by default.

        Raises `RuntimeError` when the group is not open, `ValueError` and `TypeError` for arguments that do not go
        together, `OSError` that names the path when nobody listens there (`BlockingIOError` when the server's
        backlog is full), `NotImplementedError` on a platform without such sockets, and whatever `protocol_factory`
        raises. With `ssl` also what `create_connection` raises for it.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_unix_connection
        """
        family = unix_family()
        tls = client_options(
            ssl,
            host=None,
            server_hostname=server_hostname,
            handshake_timeout=ssl_handshake_timeout,
            shutdown_timeout=ssl_shutdown_timeout,
        )
        if sock is not None:
            if path is not None:
                raise ValueError("path and sock can not be specified at the same time")
            check_stream_socket(sock, family)
            refuse_tls_socket(sock)
            await self._take_over(sock)
            return await self._connect_socket(protocol_factory, sock, tls)
        if path is None:
            raise ValueError("no path and sock were specified")
        path = os.fspath(path)
        await anyio.lowlevel.checkpoint_if_cancelled()  # The other half of a checkpoint comes with `connect`.
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            await connect(sock, path)
        except BaseException:
            sock.close()
            raise
        return await self._connect_socket(protocol_factory, sock, tls)

    async def create_unix_server(
        self,
        protocol_factory: Callable[[], Any],
        path: Path | None = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        cleanup_socket: bool = True,
    ) -> Server:
        """Listen on the UNIX socket at `path` and return the `Server`.

        `protocol_factory` is called for each client. `path` is that of a file, or an abstract name, which begins with
        a NUL character (Linux). A socket that is there already is replaced, any other file is an error. With
        `cleanup_socket` the file is removed when the server is closed, unless another one has taken its place.
        `backlog`, `start_serving`, `ssl`, `ssl_handshake_timeout` and `ssl_shutdown_timeout` are as for
        `create_server`. `sock` is a bound UNIX stream socket to use instead; it belongs to the server from now on.

        Raises `RuntimeError` when the group is not open, `ValueError` and `TypeError` for arguments that do not go
        together, `OSError` that names the path when it cannot be bound, and `NotImplementedError` on a platform
        without such sockets.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_unix_server
        """
        family = unix_family()
        tls = server_options(ssl, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout)
        if sock is not None:
            if path is not None:
                raise ValueError("path and sock can not be specified at the same time")
            check_stream_socket(sock, family)
            refuse_tls_socket(sock)
            await self._take_over(sock)
        else:
            if path is None:
                raise ValueError("path was not specified, and no sock specified")
            path = os.fspath(path)
            await anyio.lowlevel.checkpoint()
            self._core.check_open()  # Before anything is replaced.
            sock = bound(path)
        cleanup = SocketFile(sock).remove if cleanup_socket else None
        return Server(self._core, protocol_factory, [sock], backlog, tls, start_serving=start_serving, on_close=cleanup)


def unix_family() -> int:
    """Return `AF_UNIX`; raise `NotImplementedError` where there is none."""
    if not hasattr(socket, "AF_UNIX"):
        raise NotImplementedError("this platform has no UNIX domain sockets")
    family: int = socket.AF_UNIX
    return family


def bound(path: str | bytes) -> socket.socket:
    """Return a non-blocking socket bound to `path`, in place of one that was there."""
    sock = socket.socket(unix_family(), socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        bind(sock, path)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            raise OSError(exc.errno, f"Address {path!r} is already in use") from None
        raise
    return sock


class SocketFile:
    """The file of a bound UNIX socket, which only its inode tells from that of a successor."""

    def __init__(self, sock: socket.socket) -> None:
        self._inode: tuple[int, int] | None = None
        name = sock.getsockname()
        if is_file(name):
            try:
                self._path = os.path.abspath(name)  # The working directory may be another one by then.
                self._inode = self._look()
            except OSError as exc:  # Whoever handed the socket over has removed the file, or it is out of reach.
                logger.debug("the UNIX socket at %r will not be removed: %r", name, exc)

    def _look(self) -> tuple[int, int]:
        status = os.stat(self._path)
        return status.st_dev, status.st_ino

    def remove(self) -> None:
        """Remove the file, if it is still the same."""
        try:
            if self._inode is not None and self._look() == self._inode:
                os.remove(self._path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            logger.error("cannot remove the UNIX socket at %r: %r", self._path, exc)
