"""The channel of a stream socket, and what several modules do with sockets.

Holds: receiving and sending over a non-blocking socket, its error queue, `os.sendfile`, extra info.
May know: the poller and the operating system's sockets.
"""

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

# The most that is received without a copy, in bytes: 64 KiB and the framing of a message. More is received into a
# buffer and copied: for 128 KiB the C library may map and unmap memory in each call.
DIRECT_SIZE = 68 * 1024

# A receive this small, in bytes, ends bulk mode.
BULK_ENDS = 16 * 1024

# How many bytes are joined where the system has no `sendmsg`: sending each small chunk on its own would cost more.
JOINED_AT_ONCE = 64 * 1024

# The most buffers that one `sendmsg` takes (POSIX `IOV_MAX`); 16 is the least that POSIX allows.
GATHER_LIMIT = 16
if sys.platform != "win32":
    with suppress(OSError, ValueError):
        GATHER_LIMIT = os.sysconf("SC_IOV_MAX")

# The control messages that `take_error_queue` looks for, by level and type: IP_RECVERR and IPV6_RECVERR of
# <linux/in.h> and <linux/in6.h>, with the first two fields of `struct sock_extended_err` of <linux/errqueue.h>, whose
# origins 2 and 3 are ICMP and ICMPv6.
EXTENDED_ERRORS = {(socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)}
EXTENDED_ERROR = struct.Struct("=IB")
NETWORK_ORIGINS = {2, 3}
# Errors of `os.sendfile` that concern the socket, not the file: it would block, or the connection is broken, by ICMP
# for example (tcp(7), ip(7)). The socket reports the latter once.
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

# The most for the control messages of one entry, in bytes: there may be timestamps beside the error.
ERROR_MESSAGE_SIZE = 512


def transport_socket(sock: Any) -> TransportSocket:
    """Return `sock` as asyncio shows it to users: without the methods that receive, send and close.

    AnyIO may have got such an object from an asyncio transport already.
    """
    return sock if isinstance(sock, TransportSocket) else TransportSocket(sock)


def names_of(sock: socket.socket, peername: Any = None) -> tuple[Any, Any]:
    """Return the addresses of `sock` and of its peer. `peername` is the latter, if it is known already."""
    return name_or_none(sock.getsockname), name_or_none(sock.getpeername) if peername is None else peername


def describe_socket(sock: socket.socket, names: tuple[Any, Any]) -> dict[str, Any]:
    """Return the extra info of a transport over `sock`, whose addresses are `names`."""
    sockname, peername = names
    return {"socket": TransportSocket(sock), "sockname": sockname, "peername": peername}


def name_or_none(look_up: Callable[[], Any]) -> Any:
    try:
        return look_up()
    except OSError:
        return None  # As asyncio: there is no peer, or it has left (ENOTCONN).


def has_error_queue(sock: socket.socket) -> bool:
    """Return whether `sock` has an error queue. Other sockets ignore `MSG_ERRQUEUE`, so that data would be lost."""
    family = sock.family
    if family in (socket.AF_INET, socket.AF_INET6):
        return sock.type == socket.SOCK_RAW or (sock.type, sock.proto) in PROTOCOLS_WITH_ERROR_QUEUE
    return sys.platform == "linux" and family == socket.AF_PACKET


def take_error_queue(sock: socket.socket) -> list[OSError] | None:
    """Empty the system's error queue of `sock`. Return the network errors in it, `None` when there is nothing.

    Linux reports a socket as ready while something is in this queue, and the queue uses the memory of what arrives. No
    other call empties it. `IP_RECVERR` puts network errors there; `SO_TIMESTAMPING` and `MSG_ZEROCOPY` put
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
        except OSError:  # The queue is empty or does not exist.
            return errors if count else None
        count += 1
        for level, kind, data in messages:
            if (level, kind) in EXTENDED_ERRORS and len(data) >= EXTENDED_ERROR.size:
                code, origin = EXTENDED_ERROR.unpack_from(data)
                if origin in NETWORK_ORIGINS:  # A local error was raised by the call that caused it.
                    errors.append(OSError(code, os.strerror(code)))


def is_tcp(sock: socket.socket) -> bool:
    """Return whether a stream socket is a TCP socket."""
    proto = sock.proto  # First: `family` makes a member of an enumeration.
    return proto == socket.IPPROTO_TCP or (proto == 0 and sock.family in (socket.AF_INET, socket.AF_INET6))


def set_nodelay(sock: socket.socket) -> None:
    """Disable Nagle's algorithm on a TCP socket, as asyncio does: small writes do not wait for an ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def failing_as(exc: OSError) -> Callable[..., Any]:
    """Return a function that raises a copy of `exc`, and takes any arguments."""
    error = (
        exc.args
    )  # Not `exc` itself: its traceback refers to the channel, and the channel will refer to the function.

    def fail(*_: object) -> NoReturn:
        raise OSError(*error)  # `OSError` chooses the subclass, such as `ConnectionResetError`.

    return fail


def send_from_file(to: int, fd: int, offset: int, count: int) -> int:
    """Call `os.sendfile` for the socket `to`. Raises as `StreamChannel.send_file` does."""
    if not hasattr(os, "sendfile"):
        raise FileError(OSError(errno.ENOSYS, "os.sendfile() is not available"))
    try:
        sent: int = os.sendfile(to, fd, offset, count)
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:  # macOS, for a broken connection.
            raise ConnectionResetError(exc.errno, exc.strerror) from exc
        if isinstance(exc, OF_A_CONNECTION) or exc.errno in ERRNOS_OF_A_CONNECTION:
            raise
        raise FileError(exc) from exc
    return sent


class SocketChannel(Polled, StreamChannel):
    """Moves the bytes of a connected, non-blocking stream socket that the channel owns."""

    __slots__ = ("_buffer", "_bulk", "_info", "_names", "_socket", "receive_into", "send")

    can_send_file = True
    # The socket's own methods, which save a call for each message.
    receive_into: Callable[[Buffer], int]  # pyright: ignore[reportIncompatibleMethodOverride]
    send: Callable[[bytes | bytearray | memoryview], int]  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, poller: Poller, sock: socket.socket, peername: Any = None) -> None:
        """`peername` is the address that `accept` returned: the system forgets it when the peer leaves."""
        super().__init__(poller, sock.fileno())
        self._socket = sock
        # Looked up now: after a TLS handshake the peer may have left.
        self._names = names_of(sock, peername)
        self._info: dict[str, Any] | None = None  # Made when it is asked for: it is as large as the transport.
        # Looked up once, not for each message. It is this thread's, and the group stays in this thread.
        self._buffer = buffers.received
        self._bulk = False  # Whether more than `DIRECT_SIZE` is expected.
        self.receive_into = sock.recv_into
        self.send = sock.send

    def receive(self) -> bytes:
        if self._bulk:
            buffer = self._buffer
            count = self.receive_into(buffer)
            self._bulk = count > BULK_ENDS
            return buffer[:count].tobytes()
        data = self._socket.recv(DIRECT_SIZE)
        return data if len(data) < DIRECT_SIZE else self._with_rest(data)

    def _with_rest(self, data: bytes) -> bytes:
        """Return `data` and what has arrived after it, as one: two pieces would cost the receiver more."""
        rest = self._buffer[: RECEIVE_SIZE - DIRECT_SIZE]
        try:
            count = self.receive_into(rest)
        except (BlockingIOError, InterruptedError):
            return data
        except OSError as exc:
            # The system reports an error once, and `data` comes first: the next receive raises it.
            self.receive_into = failing_as(exc)
            count = 0
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
        # A connection's errors are raised by its next call. The error queue of a stream has notifications only.
        return take_error_queue(self._socket) is not None

    def close(self, *, aborted: bool) -> None:
        self._poller.unregister(self)
        self._socket.close()

    def extra_info(self) -> Mapping[str, Any]:
        if self._info is None:
            self._info = describe_socket(self._socket, self._names)
        return self._info
