"""The datagram transport, over any channel that moves datagrams.

Holds: receiving, sending, and what an error of one datagram means.
May know: callbacks, errors, flow control, states, the events of selectors and the interface of channels.

Callbacks of a protocol, in order: `connection_made [datagram_received | error_received]* connection_lost`, with
`pause_writing [resume_writing]` pairs anywhere between the first and the last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import abc
from .._channels._abc import ADDRESS_ERRORS, ChannelEnded, pause_after
from .._errors import has_callback
from .._selector import READ, WRITE
from ._base import CLOSING, LOST, OPEN, ChannelTransport
from ._flow_control import DatagramBuffer, as_bytes_view

if TYPE_CHECKING:
    from .._callbacks import CallbackContext
    from .._channels._abc import DatagramChannel


class DatagramTransport(ChannelTransport, abc.DatagramTransport):
    """A datagram endpoint, as asyncio's documentation describes `asyncio.DatagramTransport`.

    `TransportGroup.create_datagram_endpoint` and `connect_datagram_socket` create it. Every method is synchronous and
    never blocks. `sendto` may call `pause_writing` and `error_received`, as in asyncio.

    An exception in a callback is reported, and the endpoint stays open: one peer's datagram must not end it for the
    others.

    Source: https://docs.python.org/3/library/asyncio-protocol.html#datagram-transports
    """

    __slots__ = ("_address", "_empty_reads", "_error_received_missed", "_failed_writes")

    _kind = "datagram"
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
        self._address = address  # That of the only peer, if the endpoint is connected.
        self._error_received_missed = False
        # How many times in a row the channel was reported ready and nothing could be received, or sent.
        self._empty_reads = 0
        self._failed_writes = 0

    def _callback_failed(self, exc: BaseException, name: str) -> None:
        self._report_callback(exc, name)

    def _task_failed(self, exc: BaseException, name: str) -> None:
        self._report_task(exc, name)

    def close(self) -> None:
        """Receive no more, send what is buffered, then end with `connection_lost(None)`."""
        self._end_failed_write()
        if self._state is not OPEN:
            return
        self._advance(CLOSING, "closing")
        self._channel.set_reading(False)
        if not self._buffer.datagrams:
            self._lose(None)

    def _read_ready(self) -> None:
        receive = self._channel.receive
        for number in range(self._channel.receives_at_once):
            try:
                data, address = receive()
            except BlockingIOError:
                if number:
                    self._empty_reads = 0
                elif not self._took_queued_errors():
                    self._empty_reads += 1
                    self._channel.pause(READ, pause_after(self._empty_reads))
                return
            except InterruptedError:
                return
            except OSError as exc:
                self._pass_error(exc, from_channel=True)
                return
            except ChannelEnded as exc:
                self._lose(exc.error, aborted=True)
                return
            except BaseException as exc:
                self._broken(exc, "read")
                return
            self._bytes_received += len(data)
            try:
                self._context.run(self._protocol.datagram_received, data, address)
            except BaseException as exc:
                self._report_callback(exc, "datagram_received")
            if self._state is not OPEN:
                return

    def _took_queued_errors(self) -> bool:
        """Pass the errors in the system's queue to the protocol. Return whether there was anything in the queue."""
        errors = self._channel.queued_errors()
        for error in errors or ():
            self._call_error_received(error, from_channel=True)
        return errors is not None

    def _pass_error(self, exc: OSError, *, from_channel: bool = False) -> None:
        """Pass the error of a call to the protocol, and those in the system's queue, which may hold it too."""
        queued = self._channel.queued_errors() or ()
        if all(each.errno != exc.errno for each in queued):
            self._call_error_received(exc, from_channel=from_channel)
        for each in queued:
            self._call_error_received(each, from_channel=from_channel)

    def _call_error_received(self, exc: OSError, *, from_channel: bool) -> None:
        if self._state >= LOST:
            return  # The error before this one has ended the endpoint.
        if not has_callback(self._protocol, "error_received"):
            # Reported once: a peer that does not exist would otherwise fill the log.
            if self._error_received_missed:
                return
            self._error_received_missed = True
        self._call_protocol("error_received", exc, from_channel=from_channel)

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send `data`, which may be empty, to `addr`: at once if possible, otherwise as soon as it is, in order.

        addr: needed unless the endpoint has a remote address; then it is `None` or that address.

        The caller may change the buffer afterwards. An error drops this datagram, and the endpoint stays open: an
        `OSError` is passed to `error_received`, also for a missing address, such as that of a UNIX sender without a
        name; an object that cannot be an address is reported to the exception handler. Once the connection is lost,
        which is at once if nothing is buffered at `close`, the data is dropped, with a warning in the log from the
        fifth time on.

        Raises `TypeError` for data that is not bytes-like and `ValueError` for an address that is not the remote one.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if type(data) is memoryview:
            data = as_bytes_view(data)
        if self._address is not None:
            if addr not in (None, self._address) and not self._is_remote(addr):
                raise ValueError(f"Invalid address: must be None or {self._address}")
            addr = self._address
        if self._write_blocked:
            self._drop_write()
            return
        # Behind other datagrams it is copied first: if there is no memory for the copy, nothing has happened.
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
            self._pass_error(exc)
        except ADDRESS_ERRORS as exc:
            self._drop_datagram(exc, addr)
        except BaseException as exc:
            # The channel may have taken the datagram. As in `StreamTransport.write`, no call comes before these.
            self._write_error = exc
            self._write_blocked = True
            self._end_failed_write()

    def _is_remote(self, addr: Any) -> bool:
        """Return whether `addr` is the remote address without its IPv6 flow information and scope."""
        return isinstance(addr, tuple) and isinstance(self._address, tuple) and addr == self._address[:2]

    def _write_ready(self) -> None:
        if self._write_error is not None:
            self._end_failed_write()
            return
        waiting = self._buffer.datagrams
        before = len(waiting)
        while waiting:
            data, addr = waiting[0]
            try:
                self._channel.send(data, addr)
            except BlockingIOError:
                if len(waiting) < before:
                    self._failed_writes = 0
                elif not self._took_queued_errors():
                    # Linux reports an unconnected UNIX socket as writable even if its receivers' queues are full.
                    self._failed_writes += 1
                    self._channel.pause(WRITE, pause_after(self._failed_writes))
                break
            except InterruptedError:
                break
            except OSError as exc:
                self._buffer.take()
                self._pass_error(exc, from_channel=True)
                break  # The others follow in the next turn.
            except ADDRESS_ERRORS as exc:
                self._buffer.take()
                self._drop_datagram(exc, addr, from_channel=True)
                break
            except BaseException as exc:
                self._broken(exc, "write")
                return
            self._bytes_sent += len(data)
            self._buffer.take()
        if self._state >= LOST:
            return  # `error_received` has aborted.
        self._update_flow(from_channel=True)
        # `resume_writing` may have sent more, closed or aborted.
        if not waiting and self._state < LOST:
            self._channel.set_writing(False)
            if self._state is CLOSING:
                self._lose(None)

    def _drop_datagram(self, exc: Exception, addr: Any, *, from_channel: bool = False) -> None:
        """Report a datagram that is dropped because the socket cannot send to its address.

        The address may come from a peer, whose datagram must not end the endpoint for the others.
        """
        if addr is None:  # The address of a sender without a name; only UNIX sockets may have none.
            error = OSError(errno.EDESTADDRREQ, os.strerror(errno.EDESTADDRREQ))
            self._call_error_received(error, from_channel=from_channel)
        else:
            message = f"A datagram to {addr!r} was dropped: the transport cannot send to this address"
            self._callback_context.report(message, exc, self, self._protocol)
