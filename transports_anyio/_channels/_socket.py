"""A non-blocking stream socket of ours, in the group's poller."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

from .._poller import Poller
from ._abc import FileError, StreamChannel, joined
from ._polled import Polled
from ._receive_buffers import RECEIVE_SIZE, buffers

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What is received without a copy, in bytes: 64 KiB with what frames them. For more there is a buffer to copy from, for
# the C library may map memory for 128 KiB in each call, and take it back.
DIRECT_SIZE = 68 * 1024

# With how few bytes at once the expectation of more than `DIRECT_SIZE` ends.
BULK_ENDS = 16 * 1024

# How many bytes are joined where the system does not gather: a turn for each small chunk would cost more.
JOINED_AT_ONCE = 64 * 1024

# The most buffers that one `sendmsg` takes (POSIX `IOV_MAX`); 16 is the least that POSIX allows.
GATHER_LIMIT = 16
if sys.platform != "win32":
    with suppress(OSError, ValueError):
        GATHER_LIMIT = os.sysconf("SC_IOV_MAX")

# What `take_error_queue` looks for in a control message, by level and type: IP_RECVERR and IPV6_RECVERR of
# <linux/in.h> and <linux/in6.h>, with the first two fields of `struct sock_extended_err` of <linux/errqueue.h>, whose
# origins 2 and 3 are ICMP and ICMPv6.
EXTENDED_ERRORS = {(socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)}
EXTENDED_ERROR = struct.Struct("=IB")
NETWORK_ORIGINS = {2, 3}
# Errors of `os.sendfile` that are the socket's and not the file's: "not now", and what ends a connection, by ICMP for
# example (tcp(7), ip(7)). The socket reports that once.
OF_A_CONNECTION = (BlockingIOError, InterruptedError, ConnectionError, TimeoutError)
ERRNOS_OF_A_CONNECTION = frozenset(
    getattr(errno, name)
    for name in ("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENOPROTOOPT", "EPROTO")
    if hasattr(errno, name)
)


# Internet protocols whose sockets have an error queue, by the type and protocol of a socket: TCP, UDP and ping.
PROTOCOLS_WITH_ERROR_QUEUE = {
    (socket.SOCK_STREAM, 0),
    (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    (socket.SOCK_DGRAM, 0),
    (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    (socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    (socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6),
}

# Room for the control messages of one entry, in bytes: timestamps come beside the error.
ERROR_MESSAGE_SIZE = 512


def transport_socket(sock: Any) -> TransportSocket:
    """Return what users see of a transport's socket: all of asyncio's functions on it, and none that receives or sends.

    AnyIO may have one of an asyncio transport already.
    """
    return sock if isinstance(sock, TransportSocket) else TransportSocket(sock)


def describe_socket(sock: socket.socket, peername: Any = None) -> dict[str, Any]:
    """Return the extra info of every transport over a socket; `peername` is its peer's, where that is known already."""
    return {
        "socket": TransportSocket(sock),
        "sockname": name_or_none(sock.getsockname),
        "peername": name_or_none(sock.getpeername) if peername is None else peername,
    }


def name_or_none(look_up: Callable[[], Any]) -> Any:
    try:
        return look_up()
    except OSError:
        return None  # As asyncio: there is no peer, or it has already gone (ENOTCONN).


def has_error_queue(sock: socket.socket) -> bool:
    """Whether `sock` has an error queue: any other takes `MSG_ERRQUEUE` for an ordinary call, which would lose data."""
    family = sock.family
    if family in (socket.AF_INET, socket.AF_INET6):
        return sock.type == socket.SOCK_RAW or (sock.type, sock.proto) in PROTOCOLS_WITH_ERROR_QUEUE
    return sys.platform == "linux" and family == socket.AF_PACKET


def take_error_queue(sock: socket.socket) -> list[OSError] | None:
    """Empty the system's error queue of `sock`. Return the network errors in it, `None` when there is nothing.

    Linux reports a socket as ready as long as something is in this queue, and the queue takes room from what arrives.
    No other call empties it. `IP_RECVERR` puts network errors there; `SO_TIMESTAMPING` and `MSG_ZEROCOPY` put
    notifications there, which are dropped.

    Source: https://man7.org/linux/man-pages/man7/ip.7.html, https://man7.org/linux/man-pages/man2/recv.2.html
    """
    if sys.platform != "linux" or not has_error_queue(sock):
        return None
    errors: list[OSError] = []
    count = 0
    while True:
        try:
            _, messages, _, _ = sock.recvmsg(0, ERROR_MESSAGE_SIZE, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except OSError:  # It is empty, or the socket has none.
            return errors if count else None
        count += 1
        for level, kind, data in messages:
            if (level, kind) in EXTENDED_ERRORS and len(data) >= EXTENDED_ERROR.size:
                code, origin = EXTENDED_ERROR.unpack_from(data)
                if origin in NETWORK_ORIGINS:  # A local error has been raised by the call that met it.
                    errors.append(OSError(code, os.strerror(code)))


def is_tcp(sock: socket.socket) -> bool:
    """Whether it is a TCP socket."""
    return (
        sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type == socket.SOCK_STREAM
        and sock.proto in (0, socket.IPPROTO_TCP)
    )


def set_nodelay(sock: socket.socket) -> None:
    """Turn Nagle's algorithm off on a TCP socket, as asyncio does: small writes do not wait for an ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def failing_as(exc: OSError) -> Callable[..., Any]:
    """Return a function that raises what `exc` is, whatever it is called with."""
    error = exc.args  # Not `exc` itself, whose traceback holds the channel that is to hold the function.

    def fail(*_: object) -> NoReturn:
        raise OSError(*error)  # Python makes it a `ConnectionResetError` and so on.

    return fail


def send_from_file(to: int, fd: int, offset: int, count: int) -> int:
    """Call `os.sendfile` for the socket `to`. Raises as `StreamChannel.send_file` does."""
    if not hasattr(os, "sendfile"):
        raise FileError(OSError(errno.ENOSYS, "os.sendfile() is not available"))
    try:
        sent: int = os.sendfile(to, fd, offset, count)
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:  # What macOS says of a connection that has broken.
            raise ConnectionResetError(exc.errno, exc.strerror) from exc
        if isinstance(exc, OF_A_CONNECTION) or exc.errno in ERRNOS_OF_A_CONNECTION:
            raise
        raise FileError(exc) from exc
    return sent


class SocketChannel(Polled, StreamChannel):
    """Moves the bytes of a connected, non-blocking stream socket that the channel owns."""

    __slots__ = ("_buffer", "_bulk", "_info", "_receive", "_socket", "receive_into", "send")

    can_send_file = True
    # The socket's own methods: a call less for each message.
    receive_into: Callable[[Buffer], int]  # pyright: ignore[reportIncompatibleMethodOverride]
    send: Callable[[bytes | bytearray | memoryview], int]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, poller: Poller, sock: socket.socket, peername: Any = None) -> None:
        """`peername` is what `accept` told, which is still true when the peer has already gone."""
        super().__init__(poller, sock.fileno())
        self._socket = sock
        # Now, and not when somebody asks: the peer may be gone after the handshake of TLS.
        self._info = describe_socket(sock, peername)
        # Looked up once, and not for each message: of this thread, which is the group's.
        self._buffer = buffers.received
        self._bulk = False  # Whether more is expected than `DIRECT_SIZE`.
        self._receive = sock.recv
        self.receive_into = sock.recv_into
        self.send = sock.send

    def receive(self) -> bytes:
        if self._bulk:
            buffer = self._buffer
            count = self.receive_into(buffer)
            self._bulk = count > BULK_ENDS
            return buffer[:count].tobytes()
        data = self._receive(DIRECT_SIZE)
        return data if len(data) < DIRECT_SIZE else self._with_rest(data)

    def _with_rest(self, data: bytes) -> bytes:
        """Return `data` with what has arrived behind it: in pieces, it would cost more wherever it goes."""
        rest = self._buffer[: RECEIVE_SIZE - DIRECT_SIZE]
        try:
            count = self.receive_into(rest)
        except (BlockingIOError, InterruptedError):
            return data
        except OSError as exc:
            # The system tells it once, and `data` comes first.
            self._receive = self.receive_into = failing_as(exc)
            return data
        self._bulk = True
        return b"".join((data, rest[:count]))

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        try:
            gather = self._socket.sendmsg  # type: ignore[attr-defined,unused-ignore]
        except AttributeError:  # Windows.
            return self.send(joined(chunks, JOINED_AT_ONCE))
        count: int = gather(islice(chunks, GATHER_LIMIT))
        return count

    def send_file(self, fd: int, offset: int, count: int) -> int:
        return send_from_file(self.fd, fd, offset, count)

    def send_eof(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def error_ready(self) -> bool:
        # What concerns a connection is raised by its next call: the queue of a stream has notifications only.
        return take_error_queue(self._socket) is not None

    def close(self, *, aborted: bool) -> None:
        self._poller.unregister(self)
        self._socket.close()

    def extra_info(self) -> Mapping[str, Any]:
        return self._info
