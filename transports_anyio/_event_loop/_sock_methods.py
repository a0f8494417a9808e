"""Sockets that belong to the caller: the event loop's `sock_*` methods.

Holds: a mixin class of the event loop. It needs readers and writers, futures, and executors.
May know: `asyncio`, `os`, `socket`, `ssl`, `_channels`, `_endpoints`, `_sockets`, `_waiters`.

Each method tries its system call first, and waits only if the socket is not ready. The wait ends when the socket is
ready, and the task itself makes the system call then. So a task that is cancelled in between has received nothing, and
nothing is lost.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from ssl import SSLSocket
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from .._channels._socket import send_from_file
from .._endpoints._addresses import checked, numeric
from .._endpoints._sendfile import BLOCK_SIZE, can_seek, check_arguments, send_by_system
from .._sockets import CONNECTING, address_error
from .._waiters import wake_future

if TYPE_CHECKING:
    from typing_extensions import Buffer

ResultT = TypeVar("ResultT")


class AddCallback(Protocol):
    """`_add_reader` or `_add_writer` of an event loop."""

    def __call__(self, fd: int, callback: Callable[..., object], /, *args: Any) -> asyncio.Handle: ...


class Waiting:
    """The futures that wait for one direction of one file descriptor."""

    __slots__ = ("futures", "handle")

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[None]] = []
        self.handle: asyncio.Handle | None = None


class Direction:
    """Waits until a socket can be read from, or until it can be written to."""

    def __init__(
        self,
        create_future: Callable[[], asyncio.Future[None]],
        refuse_transports: Callable[[int], None],
        add: AddCallback,
        remove: Callable[[int], object],
    ) -> None:
        self._create_future = create_future
        self._refuse_transports = refuse_transports
        self._add = add
        self._remove = remove
        self._waiting: dict[int, Waiting] = {}

    async def wait(self, sock: socket.socket) -> None:
        """Wait until `sock` is ready. Several tasks may wait for the same socket; each of them tries again then."""
        fd = sock.fileno()
        self._refuse_transports(fd)
        future = self._create_future()
        waiting = self._waiting.setdefault(fd, Waiting())
        waiting.futures.append(future)
        try:
            # Even if others wait: they may wait for a closed socket that had the same file descriptor.
            waiting.handle = self._add(fd, self._ready, fd)
            await future
        finally:
            if self._waiting.get(fd) is waiting:
                waiting.futures.remove(future)
                if not waiting.futures:
                    del self._waiting[fd]
                    # A cancelled handle has been replaced, by an `add_reader` of the user's for example.
                    if waiting.handle is not None and not waiting.handle.cancelled():
                        self._remove(fd)

    def _ready(self, fd: int) -> None:
        self._remove(fd)  # Until the tasks have run it would be reported again and again.
        for future in self._waiting.pop(fd).futures:
            wake_future(future)


class SendingSocket:
    """A socket that sends from files, for `send_by_system`."""

    def __init__(self, sock: socket.socket, writable: Direction) -> None:
        self._sock = sock
        self._writable = writable

    async def flush(self) -> None:
        """Nothing is buffered."""

    async def until_writable(self) -> None:
        await self._writable.wait(self._sock)

    def send_file(self, fd: int, offset: int, count: int) -> int:
        return send_from_file(self._sock.fileno(), fd, offset, count)


class SockMethods(asyncio.AbstractEventLoop):
    """The `sock_*` methods of an event loop."""

    if TYPE_CHECKING:
        # The mixin class needs these of the event loop. asyncio's event loops have them, too.
        def _ensure_fd_no_transport(self, fd: Any) -> None: ...
        def _add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> asyncio.Handle: ...
        def _add_writer(self, fd: Any, callback: Callable[..., object], *args: Any) -> asyncio.Handle: ...
        def _remove_reader(self, fd: Any) -> bool: ...
        def _remove_writer(self, fd: Any) -> bool: ...

    def __init__(self) -> None:
        super().__init__()
        check = self._ensure_fd_no_transport
        self._readable = Direction(self.create_future, check, self._add_reader, self._remove_reader)
        self._writable = Direction(self.create_future, check, self._add_writer, self._remove_writer)

    def _check_socket(self, sock: socket.socket) -> None:
        if isinstance(sock, SSLSocket):
            raise TypeError("Socket cannot be of type SSLSocket")
        if self.get_debug() and sock.gettimeout() != 0:
            raise ValueError("the socket must be non-blocking")

    async def _when_ready(self, direction: Direction, sock: socket.socket, operation: Callable[[], ResultT]) -> ResultT:
        """Wait until `operation` does not block, and return its result.

        It looks the method of the socket up each time, as asyncio does: the method may be replaced during the wait.
        """
        while True:
            try:
                return operation()
            except (BlockingIOError, InterruptedError):
                await direction.wait(sock)

    async def sock_recv(self, sock: socket.socket, nbytes: int) -> bytes:
        """Receive up to `nbytes` bytes. Returns `b""` when the peer has closed its side.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_recv
        """
        self._check_socket(sock)
        return await self._when_ready(self._readable, sock, lambda: sock.recv(nbytes))

    async def sock_recv_into(self, sock: socket.socket, buf: Buffer) -> int:
        """Receive into `buf`, and return the number of bytes.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_recv_into
        """
        self._check_socket(sock)
        return await self._when_ready(self._readable, sock, lambda: sock.recv_into(buf))

    async def sock_recvfrom(self, sock: socket.socket, bufsize: int) -> tuple[bytes, Any]:
        """Receive a datagram of up to `bufsize` bytes, and return it with the sender's address.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_recvfrom
        """
        self._check_socket(sock)
        return await self._when_ready(self._readable, sock, lambda: sock.recvfrom(bufsize))

    async def sock_recvfrom_into(self, sock: socket.socket, buf: Buffer, nbytes: int = 0) -> tuple[int, Any]:
        """Receive a datagram of up to `nbytes` bytes into `buf` (0: its size). Return its size and its sender.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_recvfrom_into
        """
        self._check_socket(sock)
        return await self._when_ready(self._readable, sock, lambda: sock.recvfrom_into(buf, nbytes))

    async def sock_sendall(self, sock: socket.socket, data: Buffer) -> None:
        """Send all of `data`. After an error or a cancellation it is unknown how much was sent.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_sendall
        """
        self._check_socket(sock)
        with memoryview(data) as view, view.cast("B") as rest:
            sent = await self._send(sock, rest)
            while sent < len(rest):
                sent += await self._send(sock, rest[sent:])

    async def _send(self, sock: socket.socket, data: memoryview) -> int:
        return await self._when_ready(self._writable, sock, lambda: sock.send(data))

    async def sock_sendto(self, sock: socket.socket, data: Buffer, address: Any) -> int:
        """Send a datagram to `address`, and return its size.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_sendto
        """
        self._check_socket(sock)
        return await self._when_ready(self._writable, sock, lambda: sock.sendto(data, 0, address))

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connect to `address`. For internet sockets it may have the names of a host and a service.

        Raises an `OSError` that names the address; `BlockingIOError` if the backlog of a UNIX server is full.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_connect
        """
        self._check_socket(sock)
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            address = await self._resolved(sock, address)
        code = sock.connect_ex(address)
        if code in CONNECTING:
            await self._writable.wait(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise address_error("Connect call failed", address, OSError(code, os.strerror(code)))

    async def _resolved(self, sock: socket.socket, address: Any) -> Any:
        """Return `address` with an IP address and a port number instead of names."""
        host, port, *scope = address
        try:
            (*_, found), *_ = numeric(*checked(host, port), family=sock.family, kind=sock.type, proto=sock.proto)
        except socket.gaierror:
            resolved = await self.getaddrinfo(host, port, family=sock.family, type=sock.type, proto=sock.proto)
            if not resolved:
                raise OSError(f"getaddrinfo({host!r}) returned an empty list") from None
            return resolved[0][4]
        return (*found[:2], *scope) if scope else found

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, Any]:
        """Accept a connection. Return its socket, which is non-blocking, and the address of the peer.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_accept
        """
        self._check_socket(sock)
        accepted, address = await self._when_ready(self._readable, sock, lambda: sock.accept())  # noqa: PLW0108  # see there
        accepted.setblocking(False)
        return accepted, address

    async def sock_sendfile(
        self,
        sock: socket.socket,
        file: IO[bytes],
        offset: int = 0,
        count: int | None = None,
        *,
        fallback: bool | None = True,
    ) -> int:
        """Send `count` bytes of `file`, or all of it, from `offset` on. Return the number of bytes sent.

        Afterwards the position of the file is behind the last byte sent. If the system cannot send the file, it is read
        in a thread; without `fallback`, `asyncio.SendfileNotAvailableError` is raised then.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.sock_sendfile
        """
        self._check_socket(sock)
        check_arguments(file, offset, count)
        if sock.type != socket.SOCK_STREAM:
            raise ValueError("only SOCK_STREAM type sockets are supported")
        try:
            return await self._send_by_system(sock, file, offset, count)
        except asyncio.SendfileNotAvailableError:
            if not fallback:
                raise
        return await self._send_by_reading(sock, file, offset, count)

    async def _send_by_system(self, sock: socket.socket, file: IO[bytes], offset: int, count: int | None) -> int:
        if not hasattr(os, "sendfile"):
            raise asyncio.SendfileNotAvailableError("os.sendfile() is not available")
        return await send_by_system(SendingSocket(sock, self._writable), file, offset, count)

    async def _send_by_reading(self, sock: socket.socket, file: IO[bytes], offset: int, count: int | None) -> int:
        seekable = can_seek(file)
        if offset or seekable:
            file.seek(offset)
        sent = 0
        try:
            while count is None or sent < count:
                size = BLOCK_SIZE if count is None else min(count - sent, BLOCK_SIZE)
                block = memoryview(await self._read_in_thread(file, size, wait=seekable))
                if not block:
                    break
                while block:
                    size = await self._send(sock, block)
                    sent += size
                    block = block[size:]
            return sent
        finally:
            if seekable:
                file.seek(offset + sent)

    async def _read_in_thread(self, file: IO[bytes], size: int, *, wait: bool) -> bytes:
        reading = self.run_in_executor(None, file.read, size)
        try:
            await asyncio.wait([reading])
        except asyncio.CancelledError:
            if wait:  # Reading a file ends soon, and must not move its position later. Reading a pipe may never end.
                await asyncio.wait([reading])
                reading.exception()
            raise
        return reading.result()
