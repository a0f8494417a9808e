"""UNIX domain sockets: `create_unix_connection` and `create_unix_server`.

Holds: the endpoint functions, and the files of bound sockets.
May know: `_base`, `_tls`, `_errors`, `_server`, `_sockets`, `_types`, `abc`, `anyio`, `os`, `socket`, `ssl`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from ssl import SSLContext
from typing import TYPE_CHECKING, TypeAlias

import anyio.lowlevel

from .._errors import logger
from .._server import Server, check_limits
from .._sockets import bind, check_stream_socket, connect, is_file, refuse_tls_socket
from .._types import AnyProtocol, StreamProtocolT
from ._base import Endpoints, check_open
from ._tls import client_options, server_options

if TYPE_CHECKING:
    from ..abc import Transport

Path: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"


class UNIXEndpoints(Endpoints):
    """`create_unix_connection` and `create_unix_server`."""

    async def create_unix_connection(
        self,
        protocol_factory: Callable[[], StreamProtocolT],
        path: Path | None = None,
        *,
        ssl: SSLContext | bool | None = None,
        sock: socket.socket | None = None,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> tuple[Transport, StreamProtocolT]:
        """Connect to the UNIX socket at `path` and return `(transport, protocol)`.

        `connection_made` runs before this returns. To learn who the peer is, call `getsockopt` of the `socket` extra
        info with the platform's option (`SO_PEERCRED` on Linux).

        - `protocol_factory`: makes the protocol
        - `path`: the path of a file, or an abstract name, which begins with a NUL character (Linux)
        - `ssl`: a context, or `True` for `ssl.create_default_context()`; encrypts the connection
        - `sock`: a connected UNIX stream socket, used instead of `path`. The group owns it from now on: it makes the
          socket non-blocking, and closes it on every error.
        - `server_hostname`: the name that the peer's certificate must have; required with `ssl`. With `""` the name is
          not checked; the context has to allow that.
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: seconds, 60 and 30 by default

        Raises, and leaves no connection open:

        - `RuntimeError`: the group is not open
        - `ValueError`, `TypeError`: the arguments are invalid or contradict each other
        - `OSError`: no server listens there; the message names the path. `BlockingIOError` if the server's backlog is
          full.
        - `NotImplementedError`: the platform has no UNIX sockets
        - `ssl.SSLError`: the peers do not agree on TLS
        - `ConnectionResetError`: the peer closed the connection during the handshake
        - `ConnectionAbortedError`: the handshake timed out
        - whatever `protocol_factory` raises

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_unix_connection
        """
        poller = await check_open(self._core, "create_unix_connection", protocol_factory)
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
            await self._adopt(sock)
            return await self._connect_socket(protocol_factory, sock, tls)
        if path is None:
            raise ValueError("no path and sock were specified")
        path = os.fspath(path)
        await anyio.lowlevel.checkpoint_if_cancelled()  # `connect` is the other half of the checkpoint.
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            await connect(poller, sock, path)
        except BaseException:
            sock.close()
            raise
        return await self._connect_socket(protocol_factory, sock, tls)

    async def create_unix_server(
        self,
        protocol_factory: Callable[[], AnyProtocol],
        path: Path | None = None,
        *,
        sock: socket.socket | None = None,
        backlog: int = 100,
        ssl: SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        start_serving: bool = True,
        max_connections: int | None = None,
        max_handshakes: int | None = None,
        cleanup_socket: bool = True,
    ) -> Server:
        """Listen on the UNIX socket at `path` and return the `Server`.

        - `protocol_factory`: makes the protocol of each connection. What it raises, and the error of a handshake, end
          that connection and go to the exception handler.
        - `path`: the path of a file, or an abstract name, which begins with a NUL character (Linux). A socket that
          exists at the path is replaced; any other file is an error.
        - `sock`: a bound UNIX stream socket, used instead of `path`. The server owns it from now on.
        - `backlog`: how many connections may wait to be accepted
        - `ssl`: a context with the server's certificate; encrypts every connection
        - `ssl_handshake_timeout`, `ssl_shutdown_timeout`: seconds, 60 and 30 by default
        - `start_serving`: accept connections at once. If false, `Server.start_serving` or `Server.serve_forever` begins
          to accept.
        - `max_connections`: how many accepted connections may be open, those in their TLS handshake included (not in
          asyncio). When so many are, the server stops accepting until one has gone: further clients wait in the
          backlog. No limit by default.
        - `max_handshakes`: how many accepted connections may be in their TLS handshake, in the same way (not in
          asyncio). A silent client takes such a place for `ssl_handshake_timeout`.
        - `cleanup_socket`: remove the file when the server is closed, unless another socket has replaced it

        Raises, and leaves no socket open:

        - `RuntimeError`: the group is not open
        - `ValueError`, `TypeError`: the arguments are invalid or contradict each other
        - `OSError`: the path cannot be bound; the message names it
        - `NotImplementedError`: the platform has no UNIX sockets

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_unix_server
        """
        await check_open(self._core, "create_unix_server", protocol_factory)
        family = unix_family()
        tls = server_options(ssl, handshake_timeout=ssl_handshake_timeout, shutdown_timeout=ssl_shutdown_timeout)
        check_limits(max_connections, max_handshakes, tls=tls is not None)
        if sock is not None:
            if path is not None:
                raise ValueError("path and sock can not be specified at the same time")
            check_stream_socket(sock, family)
            refuse_tls_socket(sock)
            await self._adopt(sock)
        else:
            if path is None:
                raise ValueError("path was not specified, and no sock specified")
            path = os.fspath(path)
            await anyio.lowlevel.checkpoint()
            await check_open(self._core)  # Before a socket file is replaced.
            sock = bound(path)
        cleanup = SocketFile(sock).remove if cleanup_socket else None
        return Server(
            self._core,
            protocol_factory,
            [sock],
            backlog,
            tls,
            start_serving=start_serving,
            max_connections=max_connections,
            max_handshakes=max_handshakes,
            on_close=cleanup,
        )


def unix_family() -> int:
    """Return `AF_UNIX`. Raises `NotImplementedError` if the platform does not have it."""
    if not hasattr(socket, "AF_UNIX"):
        raise NotImplementedError("this platform has no UNIX domain sockets")
    family: int = socket.AF_UNIX
    return family


def bound(path: str | bytes) -> socket.socket:
    """Return a non-blocking socket bound to `path`, which replaces a socket that existed there."""
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
    """The file of a bound UNIX socket. Its inode shows whether another socket has replaced it."""

    def __init__(self, sock: socket.socket) -> None:
        self._inode: tuple[int, int] | None = None
        name = sock.getsockname()
        if is_file(name):
            try:
                self._path = os.path.abspath(name)  # The working directory may change.
                self._inode = self._look()
            except OSError as exc:  # The file was removed, or cannot be reached.
                logger.debug("the UNIX socket at %r will not be removed: %r", name, exc)

    def _look(self) -> tuple[int, int]:
        status = os.stat(self._path)
        return status.st_dev, status.st_ino

    def remove(self) -> None:
        """Remove the file, unless another one has replaced it."""
        try:
            if self._inode is not None and self._look() == self._inode:
                os.remove(self._path)
        except FileNotFoundError:
            pass
        except OSError as exc:
            logger.error("cannot remove the UNIX socket at %r: %r", self._path, exc)
