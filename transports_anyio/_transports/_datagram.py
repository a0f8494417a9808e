"""The datagram transport: one state machine for every channel that moves datagrams.

Callbacks of a protocol, in order: `connection_made [datagram_received | error_received]* connection_lost`, with
`pause_writing [resume_writing]` pairs anywhere between the first and the last.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import abc
from .._channels._datagram import ADDRESS_ERRORS, ChannelEnded, rest_after
from .._errors import has_callback, log_debug
from .._selector import READ, WRITE
from ._base import SPARE_FRAMES, ChannelTransport
from ._flow_control import DatagramBuffer, as_bytes_view

if TYPE_CHECKING:
    from .._callbacks import CallbackContext
    from .._channels._datagram import DatagramChannel

# How many datagrams one readiness event may receive: a flood costs less, and everybody still gets a turn. Measured,
# in processor time for each datagram of a flood: 5.9 µs one by one, 3.8 by fours, 3.1 by sixteens, and no less by more.
RECEIVES_AT_ONCE = 16


class DatagramTransport(ChannelTransport, abc.DatagramTransport):
    """A datagram endpoint, as asyncio's documentation describes `asyncio.DatagramTransport`.

    Made by `TransportGroup.create_datagram_endpoint` and `connect_datagram_socket`. Every method is synchronous and
    never blocks. `sendto` may call `pause_writing` and `error_received`, as in asyncio.

    A callback that raises is reported, and the endpoint lives on: one peer's datagram must not end it for the others.

    Source: https://docs.python.org/3/library/asyncio-protocol.html#datagram-transports
    """

    __slots__ = ("_address", "_error_received_missed", "_vain_reads", "_vain_writes")

    _buffer: DatagramBuffer
    _channel: DatagramChannel

    def __init__(
        self,
        callback_context: CallbackContext,
        channel: DatagramChannel,
        protocol: Any,
        on_lost: Callable[[DatagramTransport], None],
        address: Any = None,
    ) -> None:
        super().__init__(callback_context, channel, DatagramBuffer(), protocol, on_lost)
        self._address = address  # The only one there is to send to, if any.
        self._error_received_missed = False
        # How many times in a row readiness was reported and nothing could be received, or sent.
        self._vain_reads = 0
        self._vain_writes = 0

    def start(self) -> None:
        """Tell the protocol of its endpoint, then begin to receive; raises `OSError` when that is not possible."""
        log_debug(
            self._callback_context.group, "%r: connection made, with a %s", self, type(self._protocol).__qualname__
        )
        try:
            self._call(self._protocol.connection_made, self)
        except BaseException as exc:
            if self._callback_context.leaves(exc):
                self.abort()  # It leaves through the caller, who gets no transport.
            self._report_callback(exc, "connection_made")
        if not self._closing:
            try:
                self._channel.set_reading(True)
            except OSError as exc:  # The system watches as many descriptors as it may.
                self._lose(exc, aborted=True)
                raise

    def _callback_failed(self, exc: BaseException, name: str) -> None:
        self._report_callback(exc, name)

    def close(self) -> None:
        """Receive no more, send what is buffered, then end with `connection_lost(None)`."""
        if self._closing:
            return
        log_debug(self._callback_context.group, "%r: closing", self)
        self._closing = True
        self._channel.set_reading(False)
        if not self._buffer.datagrams:
            self._lose(None)

    def _read_ready(self) -> None:
        receive = self._channel.receive
        for number in range(RECEIVES_AT_ONCE):
            try:
                data, address = receive()
            except BlockingIOError:
                if number:
                    self._vain_reads = 0
                elif not self._took_queued_errors():
                    self._vain_reads += 1
                    self._channel.rest(READ, rest_after(self._vain_reads))
                return
            except InterruptedError:
                return
            except OSError as exc:
                self._tell_error(exc, from_channel=True)
                return
            except ChannelEnded as exc:
                self._lose(exc.error, aborted=True)
                return
            except BaseException as exc:
                self._broken(exc, "read")
                return
            self._bytes_received += len(data)
            try:
                self._call(self._protocol.datagram_received, data, address)
            except BaseException as exc:
                self._report_callback(exc, "datagram_received")
            if self._closing:
                return

    def _took_queued_errors(self) -> bool:
        """Pass on the errors that wait in the system's queue; whether there was anything in it."""
        errors = self._channel.queued_errors()
        for error in errors or ():
            self._tell(error, from_channel=True)
        return errors is not None

    def _tell_error(self, exc: OSError, *, from_channel: bool = False) -> None:
        """Pass on what a call has raised: that is one of the errors in the queue, if there are any."""
        queued = self._channel.queued_errors() or ()
        if all(each.errno != exc.errno for each in queued):
            self._tell(exc, from_channel=from_channel)
        for each in queued:
            self._tell(each, from_channel=from_channel)

    def _tell(self, exc: OSError, *, from_channel: bool) -> None:
        if self._lost:
            return  # The error before this one has ended the endpoint.
        if not has_callback(self._protocol, "error_received"):
            # Reported once: a peer that is not there would otherwise fill the log.
            if self._error_received_missed:
                return
            self._error_received_missed = True
        self._call_protocol("error_received", exc, from_channel=from_channel)

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send `data`, which may be empty, to `addr`; at once if possible, otherwise in order as soon as it is.

        `addr` is needed unless the endpoint has a remote address: then it may be left out, and must be that otherwise.
        The caller may change the buffer afterwards. Whatever goes wrong costs this datagram, and the endpoint stays
        open: an `OSError` is passed to `error_received`, also for an address that is missing, such as that of a UNIX
        sender without a name; what cannot be an address is reported to the exception handler. Once the connection is
        lost, and that is at once when there is nothing to flush for `close`, the data is dropped, with a warning in
        the log from the fifth time on.

        Raises `TypeError` for data that is not bytes-like and `ValueError` for another address than the remote one.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if type(data) is memoryview:
            data = as_bytes_view(data)
        if self._address is not None:
            if addr not in (None, self._address) and not self._is_remote(addr):
                raise ValueError(f"Invalid address: must be None or {self._address}")
            addr = self._address
        if self._lost:
            self._drop_write()
            return
        # Where others wait the copy comes first: if there is no memory for it, nothing has happened.
        copy = bytes(data) if self._buffer.datagrams else None
        try:
            if copy is None:
                try:
                    self._channel.send(data, addr)
                except (BlockingIOError, InterruptedError):
                    self._channel.set_writing(True)
                    copy = bytes(data)
                else:
                    self._bytes_sent += len(data)
                    return
            self._buffer.append(copy, addr)
            self._update_flow()
        except OSError as exc:
            self._tell_error(exc)
        except ADDRESS_ERRORS as exc:
            self._refuse(exc, addr)
        except BaseException as exc:
            # A channel that could not send at once may have taken the datagram.
            if isinstance(exc, RecursionError):
                sys.setrecursionlimit(sys.getrecursionlimit() + SPARE_FRAMES)
            self._write_failed(exc, "write")

    def _is_remote(self, addr: Any) -> bool:
        """Whether `addr` is the remote address without its IPv6 flow information and scope."""
        return isinstance(addr, tuple) and isinstance(self._address, tuple) and addr == self._address[:2]

    def _write_ready(self) -> None:
        waiting = self._buffer.datagrams
        before = len(waiting)
        while waiting:
            data, addr = waiting[0]
            try:
                self._channel.send(data, addr)
            except BlockingIOError:
                if len(waiting) < before:
                    self._vain_writes = 0
                elif not self._took_queued_errors():
                    # Linux reports an unconnected UNIX socket as writable whether its receivers have room or not.
                    self._vain_writes += 1
                    self._channel.rest(WRITE, rest_after(self._vain_writes))
                break
            except InterruptedError:
                break
            except OSError as exc:
                self._buffer.take()
                self._tell_error(exc, from_channel=True)
                break  # The rest in the next turn.
            except ADDRESS_ERRORS as exc:
                self._buffer.take()
                self._refuse(exc, addr, from_channel=True)
                break
            except BaseException as exc:
                self._broken(exc, "write")
                return
            self._bytes_sent += len(data)
            self._buffer.take()
        if self._lost:
            return  # `error_received` has aborted.
        self._update_flow(from_channel=True)
        # `resume_writing` may have sent more, closed or aborted.
        if not waiting and not self._lost:
            self._channel.set_writing(False)
            if self._closing:
                self._lose(None)

    def _refuse(self, exc: Exception, addr: Any, *, from_channel: bool = False) -> None:
        """Drop a datagram whose address no such socket takes.

        The address may well come from a peer, whose datagram must not end the endpoint for the others.
        """
        if addr is None:  # That of a sender without a name, which only UNIX sockets can be.
            error = OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
            self._tell(error, from_channel=from_channel)
        else:
            message = f"A datagram to {addr!r} was dropped: the transport cannot send to this address"
            self._callback_context.report(message, exc, self, self._protocol)

    def _broken(self, exc: BaseException, doing: str) -> None:
        if self._callback_context.leaves(exc):
            raise exc
        self._lose(exc, aborted=True)
        self._callback_context.report(f"Fatal {doing} error on datagram transport", exc, self, self._protocol)
