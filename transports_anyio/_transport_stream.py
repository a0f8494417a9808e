"""A transport as an AnyIO object, for async code: the inverse of `connect_stream` and `connect_datagram_socket`.

Holds: the AnyIO objects, and the protocols below them.
May know: `_transports`, `_waiters`, `anyio`, `asyncio`, `socket`, `ssl`.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream, SocketAttribute, UnreliableObjectStream
from anyio.streams.tls import TLSAttribute

from ._transports._base import ChannelTransport
from ._transports._datagram import DatagramTransport
from ._transports._stream import StreamTransport
from ._transports._subprocess import PipeProtocol
from ._waiters import Waiter, checkpoint_if_cancelled, uninterruptible

T = TypeVar("T")

# Reading pauses when so many bytes have arrived that `receive` has not returned yet, and goes on when it has returned
# them all: each change costs a system call.
RECEIVE_LIMIT = 256 * 1024

# How many datagrams are kept for `receive`. What arrives beyond that is dropped, as in the system's own buffers.
DATAGRAM_LIMIT = 256

# After so many calls that need not wait, one lets other tasks run. AnyIO's own streams let them run in every call, and
# that costs more than the call itself.
CALLS_WITHOUT_PAUSE = 16


class Bridge(asyncio.BaseProtocol):
    """The protocol below an AnyIO object: remembers what has happened to its transport, and wakes tasks that wait."""

    def __init__(self, transport: ChannelTransport) -> None:
        self.readable = Waiter()
        self.writable = Waiter()
        self.lost = transport.get_protocol() is None  # `connection_lost` has been delivered.
        self.error: Exception | None = None  # Why.
        # Not `lost`: a protocol that is set in `connection_lost` does not get it any more.
        self.ended = transport._is_lost()  # No more will arrive, or the AnyIO object is closed.
        self.unwritable = self.ended  # No more can be sent.
        self.writing_paused = transport.is_writing_paused()
        before = transport.get_protocol()
        # The pipe of a child: the child's protocol goes on to hear of the pipe's state, though not of its data.
        self.child = before if isinstance(before, PipeProtocol) else None

    def pause_writing(self) -> None:
        if not self.writing_paused:  # Or it was paused before this was its protocol, and the child knows.
            self.writing_paused = True
            if self.child is not None:
                self.child.pause_writing()

    def resume_writing(self) -> None:
        self.writing_paused = False
        self.writable.notify()
        if self.child is not None:
            self.child.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.error = exc
        self.end()
        if self.child is not None:
            self.child.connection_lost(exc)

    def end(self) -> None:
        """Let no task wait any more."""
        self.ended = self.unwritable = True
        self.readable.notify()
        self.writable.notify()


class StreamBridge(Bridge, asyncio.Protocol):
    """Keeps the bytes that arrive, and pauses reading when there are many."""

    def __init__(self, transport: StreamTransport, received: bytes) -> None:
        super().__init__(transport)
        self.transport = transport
        self.can_receive = transport._can_receive()
        self.eof = transport.is_eof_received()
        self.ended = self.ended or self.eof
        self.chunks: deque[bytes | memoryview] = deque([received] if received else ())
        self.size = len(received)
        self.reading_paused = False

    def data_received(self, data: bytes) -> None:
        self.chunks.append(data)
        self.size += len(data)
        if self.size >= RECEIVE_LIMIT:
            self.reading_paused = True
            self.transport.pause_reading()
        self.readable.notify()

    def eof_received(self) -> bool:
        self.eof = self.ended = True
        self.readable.notify()
        return self.transport.can_write_eof()  # Sending goes on if only one direction can end.

    def take(self, max_bytes: int) -> bytes:
        """Return the first bytes that have arrived, at most `max_bytes`."""
        chunk = self.chunks[0]
        if len(chunk) > max_bytes:
            view = memoryview(chunk)
            chunk, self.chunks[0] = view[:max_bytes], view[max_bytes:]  # Views: the rest is not copied.
        else:
            self.chunks.popleft()
        self.size -= len(chunk)
        if self.reading_paused and not self.size:
            self.reading_paused = False
            self.transport.resume_reading()
        return chunk if type(chunk) is bytes else bytes(chunk)

    def drop(self) -> None:
        """Forget everything that has arrived."""
        self.chunks.clear()
        self.size = 0


class DatagramBridge(Bridge, asyncio.DatagramProtocol):
    """Keeps the datagrams that arrive, and the last error."""

    def __init__(self, transport: DatagramTransport) -> None:
        super().__init__(transport)
        self.datagrams: deque[tuple[bytes, Any]] = deque()
        self.reported: Exception | None = None

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if len(self.datagrams) < DATAGRAM_LIMIT:
            self.datagrams.append((data, addr))
            self.readable.notify()

    def error_received(self, exc: Exception) -> None:
        self.reported = exc
        self.readable.notify()


TransportT = TypeVar("TransportT", bound=ChannelTransport)
BridgeT = TypeVar("BridgeT", bound=Bridge)


class _TransportObject(Generic[TransportT, BridgeT]):
    """What the AnyIO objects over transports have in common."""

    _transport: TransportT
    _bridge: BridgeT

    def __init__(self) -> None:
        self._receiving = False
        self._sending = False
        self._closed = False
        self._calls_without_pause = 0

    def _pause(self) -> Awaitable[None]:
        """Do what every call of AnyIO's does: raise a cancellation, and let other tasks run, though not every time."""
        if self._calls_without_pause < CALLS_WITHOUT_PAUSE:
            self._calls_without_pause += 1
            return checkpoint_if_cancelled()
        self._calls_without_pause = 0
        return anyio.lowlevel.checkpoint()

    @uninterruptible
    async def _while_paused(self) -> None:
        """Wait while writing is paused and something can still be sent."""
        bridge = self._bridge
        try:
            while bridge.writing_paused and not bridge.unwritable:
                self._calls_without_pause = 0
                await bridge.writable.wait()
        finally:
            bridge.writable.waiting = None

    def _refuse_sending(self) -> NoReturn:
        if self._closed or not self._transport.is_closing():  # What is open has sent its end of file.
            raise anyio.ClosedResourceError
        raise anyio.BrokenResourceError from self._bridge.error

    async def aclose(self) -> None:
        """Close the transport: send what is buffered, and wait until the connection is lost.

        When this is cancelled, what is still buffered is dropped: so does `anyio.aclose_forcefully`.
        """
        self._closed = True
        self._bridge.end()
        self._transport.close()
        try:
            await self._transport.wait_closed()
        except BaseException:
            self._transport.abort()
            raise

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """AnyIO's `SocketAttribute` and `TLSAttribute`, as far as they are known."""
        return attributes_of(self._transport.get_extra_info)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._transport!r}>"


class TransportStream(_TransportObject[StreamTransport, StreamBridge], ByteStream):
    """A stream transport as an AnyIO byte stream; the transport's protocol gets no more callbacks.

    For async code that takes a connection over from a protocol, and for libraries that take an AnyIO stream:
    `TLSStream.wrap`, `BufferedByteReceiveStream`, an HTTP client. `received` is what the protocol has been given and
    has not used; `receive` returns it first. A protocol may make one of its own transport in any callback, or a task
    at any time: in the middle of a connection, while writing is paused, after an end of file.

    It behaves as AnyIO's own streams do: `anyio.EndOfStream` when the peer has ended its stream,
    `anyio.BrokenResourceError` when the connection is lost, `anyio.ClosedResourceError` after `aclose`,
    `anyio.BusyResourceError` when two tasks receive, or send, at the same time. A cancelled `receive` loses no data.
    A call that need not wait checks for a cancellation, and lets other tasks run once in a while.

    The transport of a child's pipe can be given as well. The child's protocol gets no `pipe_data_received` of it any
    more, everything else as before.

    Raises `TypeError` for what is not a stream transport of this library, and for `received` that is not bytes-like;
    `RuntimeError` when `start_tls` has replaced the transport.

    Source: https://anyio.readthedocs.io/en/stable/api.html#anyio.abc.ByteStream
    """

    def __init__(self, transport: asyncio.BaseTransport, received: bytes | bytearray | memoryview = b"") -> None:
        if not isinstance(transport, StreamTransport):
            raise TypeError(f"a stream transport of a TransportGroup was expected, got {transport!r}")
        if not isinstance(received, (bytes, bytearray, memoryview)):
            raise TypeError(f"received must be a bytes-like object, not {type(received).__name__!r}")
        transport._check_not_upgraded("TransportStream")
        super().__init__()
        self._transport = transport
        self._bridge = bridge = StreamBridge(transport, bytes(received))
        if not bridge.lost:
            transport.set_protocol(bridge)
            transport.resume_reading()

    @property
    def transport(self) -> StreamTransport:
        """The transport; `start_tls` replaces it."""
        return self._transport

    @uninterruptible
    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return between 1 and `max_bytes` bytes; wait until there is at least one.

        Raises `anyio.EndOfStream`, `anyio.BrokenResourceError`, `anyio.ClosedResourceError` and
        `anyio.BusyResourceError` as the class says, `ValueError` when `max_bytes` is less than 1, and
        `NotImplementedError` on a transport that only writes.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        if self._receiving:
            raise anyio.BusyResourceError("reading from")
        self._receiving = True
        bridge = self._bridge
        try:
            if bridge.chunks or bridge.ended:
                await self._pause()
            elif not bridge.can_receive:
                raise NotImplementedError("this end only writes: it cannot receive")
            else:
                self._calls_without_pause = 0
                while not (bridge.chunks or bridge.ended):
                    await bridge.readable.wait()
            if self._closed:
                raise anyio.ClosedResourceError
            if bridge.chunks:
                return bridge.take(max_bytes)
            if bridge.eof:
                raise anyio.EndOfStream
            raise anyio.BrokenResourceError from bridge.error
        finally:
            self._receiving = False
            bridge.readable.waiting = None

    async def send(self, item: bytes) -> None:
        """Send `item`, and wait while the transport's buffer is above its high watermark.

        When this is cancelled, all of `item` or nothing has been given to the transport.

        Raises `anyio.BrokenResourceError`, `anyio.ClosedResourceError` and `anyio.BusyResourceError` as the class says,
        `anyio.ClosedResourceError` also after `send_eof`, `NotImplementedError` on a transport that only reads, and
        `TypeError` for what is not bytes-like.
        """
        if self._sending:
            raise anyio.BusyResourceError("writing to")
        self._sending = True
        try:
            bridge = self._bridge
            if bridge.writing_paused:
                await self._while_paused()
            else:
                await self._pause()
            if bridge.unwritable:
                self._refuse_sending()
            self._transport.write(item)
            if self._transport._write_blocked:  # It was dropped, or failed.
                self._refuse_sending()
            if bridge.writing_paused:
                await self._while_paused()
                if bridge.writing_paused:  # Not everything has been sent.
                    self._refuse_sending()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Send an end of file after everything that was sent; receiving goes on.

        Raises as `send` does, and `NotImplementedError` on a transport that cannot end one direction, such as TLS.
        """
        if self._sending:
            raise anyio.BusyResourceError("writing to")
        self._sending = True
        try:
            await anyio.lowlevel.checkpoint()
            if self._closed or self._transport.is_closing():
                self._refuse_sending()
            self._transport.write_eof()
            self._bridge.unwritable = True
        finally:
            self._sending = False

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        """Encrypt the connection from here on; this stream goes on with the new transport.

        What has arrived and `receive` has not returned yet belongs to the handshake. `ssl_context` (its `sslcontext`),
        `server_side`, `server_hostname`, `ssl_handshake_timeout` and `ssl_shutdown_timeout` are as for
        `TransportGroup.start_tls`, which says what else is raised. Raises `anyio.BusyResourceError` while a task
        receives or sends, `anyio.ClosedResourceError` and `anyio.BrokenResourceError` as `send` does.
        """
        if self._receiving or self._sending:
            raise anyio.BusyResourceError("reading from" if self._receiving else "writing to")
        if self._bridge.unwritable:
            self._refuse_sending()
        self._receiving = self._sending = True
        before = self._transport
        bridge = self._bridge
        try:
            # The bridge stays the protocol, so it sees every callback in between.
            self._transport = bridge.transport = await before._group.start_tls(
                before,
                bridge,
                ssl_context,
                server_side=server_side,
                server_hostname=server_hostname,
                ssl_handshake_timeout=ssl_handshake_timeout,
                ssl_shutdown_timeout=ssl_shutdown_timeout,
                received=b"".join(bridge.chunks),
            )
        finally:
            self._receiving = self._sending = False
            if self._transport is not before or before._is_lost():  # Otherwise the arguments were refused.
                bridge.drop()  # The handshake has had it.


class TransportDatagrams(
    _TransportObject[DatagramTransport, DatagramBridge], UnreliableObjectStream["tuple[bytes, Any]"]
):
    """A datagram transport as an AnyIO object, as `anyio.abc.UDPSocket`; its protocol gets no more callbacks.

    At most 256 datagrams are kept for `receive`; what arrives beyond that is dropped. An error that the system reports,
    such as a peer that is not there, is raised by the next `receive` as `anyio.BrokenResourceError`, and the endpoint
    stays open. Otherwise it raises what `TransportStream` raises.

    Raises `TypeError` for what is not a datagram transport of this library.

    Source: https://anyio.readthedocs.io/en/stable/api.html#anyio.abc.UDPSocket
    """

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, DatagramTransport):
            raise TypeError(f"a datagram transport of a TransportGroup was expected, got {transport!r}")
        super().__init__()
        self._transport = transport
        self._bridge = bridge = DatagramBridge(transport)
        if not bridge.lost:
            transport.set_protocol(bridge)

    @property
    def transport(self) -> DatagramTransport:
        """The transport."""
        return self._transport

    @uninterruptible
    async def receive(self) -> tuple[bytes, Any]:
        """Return the next datagram and the address of its sender; wait until there is one.

        Raises `anyio.BrokenResourceError` for an error of the system and when the endpoint is lost,
        `anyio.ClosedResourceError` after `aclose`, `anyio.BusyResourceError` when another task receives.
        """
        if self._receiving:
            raise anyio.BusyResourceError("reading from")
        self._receiving = True
        bridge = self._bridge
        try:
            if bridge.datagrams or bridge.reported or bridge.ended:
                await self._pause()
            else:
                self._calls_without_pause = 0
                while not (bridge.datagrams or bridge.reported or bridge.ended):
                    await bridge.readable.wait()
            if self._closed:
                raise anyio.ClosedResourceError
            if bridge.datagrams:
                return bridge.datagrams.popleft()
            error, bridge.reported = bridge.reported or bridge.error, None
            raise anyio.BrokenResourceError from error
        finally:
            self._receiving = False
            bridge.readable.waiting = None

    async def send(self, item: tuple[bytes, Any]) -> None:
        """Send the datagram `item[0]` to the address `item[1]`. As `sendto`."""
        await self.sendto(*item)

    async def sendto(self, data: bytes, addr: Any = None) -> None:
        """Send the datagram `data` to `addr`, which is left out where the endpoint has a remote address.

        Waits while the transport's buffer is above its high watermark. Raises what `DatagramTransport.sendto` raises,
        `anyio.ClosedResourceError` after `aclose`, `anyio.BrokenResourceError` when the endpoint is lost,
        `anyio.BusyResourceError` when another task sends.
        """
        if self._sending:
            raise anyio.BusyResourceError("writing to")
        self._sending = True
        try:
            if self._bridge.writing_paused:
                await self._while_paused()
            else:
                await self._pause()
            if self._bridge.unwritable:
                self._refuse_sending()
            self._transport.sendto(data, addr)
        finally:
            self._sending = False


def itself(value: T) -> T:
    return value


def without_flow(sockaddr: Any) -> Any:
    """Return a socket address as AnyIO has it: of IPv6 the host, with its scope, and the port."""
    if not isinstance(sockaddr, tuple) or len(sockaddr) != 4:
        return sockaddr
    host, port, _, scope = sockaddr
    return (f"{host}%{scope}" if scope and "%" not in host else host), port


def attributes_of(info: Callable[[str], Any]) -> dict[Any, Callable[[], Any]]:
    """Return AnyIO's typed attributes of a connection, of what `get_extra_info` knows."""
    attributes: dict[Any, Callable[[], Any]] = {}
    sock = info("socket")
    if sock is not None:
        attributes[SocketAttribute.family] = lambda: sock.family
        attributes[SocketAttribute.raw_socket] = lambda: sock
    is_ip = sock is None or sock.family in (socket.AF_INET, socket.AF_INET6)
    for name, address, port in (
        ("sockname", SocketAttribute.local_address, SocketAttribute.local_port),
        ("peername", SocketAttribute.remote_address, SocketAttribute.remote_port),
    ):
        sockaddr = without_flow(info(name))
        if sockaddr is not None:
            attributes[address] = partial(itself, sockaddr)
            if is_ip and isinstance(sockaddr, tuple):
                attributes[port] = partial(itself, sockaddr[1])
    tls = info("ssl_object")
    if tls is not None:
        known: list[tuple[Any, Callable[[], Any]]] = [
            (TLSAttribute.alpn_protocol, tls.selected_alpn_protocol),
            (TLSAttribute.channel_binding_tls_unique, tls.get_channel_binding),
            (TLSAttribute.cipher, tls.cipher),
            (TLSAttribute.peer_certificate, lambda: tls.getpeercert(binary_form=False)),
            (TLSAttribute.peer_certificate_binary, lambda: tls.getpeercert(binary_form=True)),
            (TLSAttribute.server_side, lambda: tls.server_side),
            (TLSAttribute.shared_ciphers, lambda: tls.shared_ciphers() if tls.server_side else None),
            (TLSAttribute.ssl_object, lambda: tls),
            # An end without a closing handshake is an end of stream: `get_extra_info("close_notify")` tells.
            (TLSAttribute.standard_compatible, lambda: False),
            (TLSAttribute.tls_version, tls.version),
        ]
        attributes.update(known)
    return attributes
