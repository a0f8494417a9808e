"""The stream transport, over any channel that moves bytes.

Holds: reading, writing, end of file and `close`.
May know: callbacks, errors, flow control, states, the interface of channels, and the operations `sendfile` and
`start_tls`, which are in modules of their own.

Callbacks of a protocol, in order: `connection_made [data_received* | (get_buffer buffer_updated?)*] [eof_received]
connection_lost`, with `pause_writing [resume_writing]` pairs anywhere between the first and the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .. import abc
from .._errors import log_debug, logger
from ._base import CLOSING, LOST, OPEN, SHUTTING_DOWN, UPGRADED, ChannelTransport
from ._flow_control import WriteBuffer, are_large, as_bytes_view, copied_rest
from ._sendfile import SendfileOperation
from ._upgrade import TLSUpgrade

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .._callbacks import CallbackContext
    from .._channels._abc import StreamChannel
    from .._channels._tls import TLSChannel
    from ._tasks import ConnectionTasks

# What is more than this, in bytes, takes so long that other connections should not wait for several of it.
BULK_SIZE = 96 * 1024


class StreamTransport(ChannelTransport, abc.Transport):
    """A connection, as asyncio's documentation describes `asyncio.Transport`.

    The endpoint functions of a `TransportGroup` create it. Every method is synchronous and never blocks, and none of
    them calls `connection_lost`, `data_received` or `eof_received` before it returns; `write`, `writelines` and
    `set_write_buffer_limits` may call `pause_writing` or `resume_writing`.

    Source: https://docs.python.org/3/library/asyncio-protocol.html#transports
    """

    __slots__ = (
        "_buffered_protocol",
        "_eof_received",
        "_eof_written",
        "_reading_paused",
        "_sendfile",
        "_upgrade",
    )

    _kind = "stream"
    _buffer: WriteBuffer
    _channel: StreamChannel

    def __init__(
        self,
        callback_context: CallbackContext,
        channel: StreamChannel,
        protocol: Any,
        on_lost: Callable[[StreamTransport], None],
    ) -> None:
        self._reading_paused = False
        self._eof_received = False
        self._eof_written = False
        self._sendfile: SendfileOperation | None = None
        self._upgrade: TLSUpgrade | None = None  # From `start_tls` on.
        super().__init__(callback_context, channel, WriteBuffer(), protocol, on_lost)

    # What the base asks for

    def _use_protocol(self, protocol: Any) -> None:
        super()._use_protocol(protocol)
        self._buffered_protocol = isinstance(protocol, asyncio.BufferedProtocol)

    def _can_receive(self) -> bool:
        return self._channel.is_two_way or not self._channel.can_send

    def _is_reading_paused(self) -> bool:
        return self._reading_paused

    def _update_write_blocked(self) -> None:
        self._write_blocked = (
            self._eof_written
            or self._sendfile is not None
            or self._state >= SHUTTING_DOWN
            or (self._state is CLOSING and self._channel.drops_after_close)
            or not self._channel.can_send
            or self._write_error is not None
        )

    def _extra_info(self) -> Mapping[str, Any]:
        # After `start_tls` the channel is the new transport's.
        channel = self._channel if self._upgrade is None else self._upgrade.plain
        return channel.extra_info()

    # Closing

    def close(self) -> None:
        """Stop reading, send what is buffered, then end with `connection_lost(None)`.

        It waits for a peer that does not read, without a time limit: `abort`, or leaving the group by a cancellation,
        ends that.
        """
        if self._upgraded is not None:
            self._upgraded.close()
        self._end_failed_write()
        if self._state is not OPEN:
            return
        self._advance(CLOSING, "closing")
        if self._sendfile is not None:
            self._sendfile.on_closing()
        if self._buffer.size:
            self._channel.set_reading(False)
        else:
            self._shut_down()

    def abort(self) -> None:
        """Drop what is buffered and end with `connection_lost(None)`."""
        if self._upgraded is not None:
            self._upgraded.abort()
        self._lose(None, aborted=True)

    def _shut_down(self) -> None:
        """End the connection in order, now that everything is sent."""
        if self._state is not CLOSING:
            return
        self._advance(SHUTTING_DOWN, "everything is sent")
        try:
            over = self._channel.shutdown(self._shutdown_done)
        except BaseException as exc:
            self._broken(exc, "close")
            return
        if over:
            self._lose(None)

    def _shutdown_done(self, exc: Exception | None, eof: bool) -> None:
        # As asyncio, call `eof_received` for an end of file that comes during the TLS shutdown.
        if eof and not self._eof_received and self._state < LOST:
            self._eof_received = True
            try:
                self._context.run(self._protocol.eof_received)
            except BaseException as error:
                self._callback_failed(error, "eof_received")
                return
        if exc is not None:
            self._broken(exc, "close")
        else:
            self._lose(None)

    def _lose(self, exc: BaseException | None, *, aborted: bool = False) -> None:
        if self._sendfile is not None and self._state < LOST:
            self._sendfile.on_closing(exc)
        super()._lose(exc, aborted=aborted)

    # Reading

    def is_reading(self) -> bool:
        """Return whether the transport is neither closing nor paused."""
        return not self._reading_paused and not self.is_closing()

    def is_eof_received(self) -> bool:
        """Return whether the peer's end of file has come: neither `data_received` nor `eof_received` will be called."""
        return self._eof_received

    def pause_reading(self) -> None:
        """Receive nothing until `resume_reading`. Does nothing when paused or closing."""
        if self.is_reading():
            self._reading_paused = True
            self._channel.set_reading(False)

    def resume_reading(self) -> None:
        """Receive again. Does nothing when not paused, or closing."""
        if self._reading_paused and not self.is_closing():
            self._reading_paused = False
            if not self._eof_received:
                try:
                    self._watch_input()
                except OSError:
                    pass  # `connection_lost` gets it.

    def _read_ready(self) -> None:
        if self._buffered_protocol:
            if self._context.run(self._read_into_protocol):
                self._end_of_file()
            return
        try:
            data = self._channel.receive()
        except (BlockingIOError, InterruptedError):
            return
        except BaseException as exc:
            self._broken(exc, "read")
            return
        if not data:
            self._end_of_file()
            return
        self._bytes_received += len(data)
        if len(data) > BULK_SIZE:
            self._channel.note_bulk()
        try:
            self._context.run(self._protocol.data_received, data)
        except BaseException as exc:
            self._callback_failed(exc, "data_received")

    def _read_into_protocol(self) -> bool:
        """Fill the protocol's buffer, in the connection's context; return whether the stream has ended instead.

        One stay in the context for both callbacks: to enter it costs as much as a short callback.
        """
        try:
            buffer = self._protocol.get_buffer(-1)
            if not len(buffer):
                msg = "get_buffer() returned an empty buffer"
                raise RuntimeError(msg)
        except BaseException as exc:
            self._callback_failed(exc, "get_buffer")
            return False
        if self._reading_paused or self._state is not OPEN or not self._buffered_protocol:
            return False  # `get_buffer()` has paused or closed the transport, or set a protocol of the other kind.
        try:
            count = self._channel.receive_into(buffer)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            self._broken(exc, "read")
            return False
        except BaseException as exc:  # What cannot be received into: a read-only buffer, or one that is not contiguous.
            self._callback_failed(exc, "get_buffer")
            return False
        if not count:
            return True
        self._bytes_received += count
        if count > BULK_SIZE:
            self._channel.note_bulk()
        try:
            self._protocol.buffer_updated(count)
        except BaseException as exc:
            self._callback_failed(exc, "buffer_updated")
        return False

    def _end_of_file(self) -> None:
        log_debug(self._callback_context.group, "%r: end of file received", self)
        self._eof_received = True
        # At its end a stream stays readable, so it leaves the poller whether or not the protocol keeps it open.
        self._channel.set_reading(False)
        try:
            keep_open = self._context.run(self._protocol.eof_received)
        except BaseException as exc:
            self._callback_failed(exc, "eof_received")
            return
        if keep_open and self._channel.can_write_eof:
            return
        if keep_open and self._channel.is_two_way and self._state is OPEN:
            logger.warning("%r: returning true from eof_received() has no effect without write_eof()", self)
        self.close()

    # Writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data`, as much as possible at once, and buffer the rest.

        The caller may change the buffer afterwards. After the connection is lost the data is dropped, over TLS and
        pipes after `close` already, with a warning in the log from the fifth time on. An error while sending ends the
        connection; `connection_lost` gets it. A `MemoryError` is raised if nothing of `data` has been taken.

        Raises `TypeError` for anything that is not bytes-like; `RuntimeError` after `write_eof`, while `sendfile` is
        under way, and once `start_tls` has returned a new transport; `NotImplementedError` on an end that only reads.
        """
        view: bytes | memoryview
        if type(data) is bytes or (type(data) is memoryview and data.ndim == data.itemsize == 1 and data.contiguous):
            view = data  # Nearly always, and the rest would cost more than it.
        elif isinstance(data, (bytes, bytearray, memoryview)):
            view = as_bytes_view(data)
        else:
            msg = f"data argument must be a bytes, bytearray, or memoryview object, not {type(data).__name__!r}"
            raise TypeError(msg)
        if self._write_blocked:
            self._check_write("write")
            if view:
                self._drop_write()
            return
        if not view:
            return
        # Only the bytes of a `bytes` object cannot be changed by the caller afterwards. Where other data waits the copy
        # comes first: if there is no memory for it, nothing of it has been taken.
        chunk = None if not self._buffer.size else view if type(data) is bytes else bytes(view)
        try:
            if chunk is None:
                try:
                    sent = self._channel.send(view)
                    if sent == len(view):
                        self._bytes_sent += sent
                        return
                except (BlockingIOError, InterruptedError):
                    sent = 0
                self._bytes_sent += sent
                if sent:
                    view = memoryview(view)[sent:]
                chunk = view if type(data) is bytes else bytes(view)
                self._channel.set_writing(True)
                self._channel.note_bulk()  # The system's buffer is full.
            self._buffer.append(chunk)
            self._update_flow()
        except BaseException as exc:
            # Nothing may follow a message of which only a part was sent. No call comes before these assignments: at the
            # recursion limit it would fail.
            self._write_error = exc
            self._write_blocked = True
            self._end_failed_write()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the chunks of `list_of_data` in order, as one write. Raises as `write` does."""
        if self._write_blocked:
            self._check_write("writelines")
        chunks = list(list_of_data)
        if are_large(chunks):
            self._write_many(chunks)
            return
        try:
            data = b"".join(chunks)
        except (TypeError, BufferError):  # A view that is not contiguous; anything else raises again.
            data = b"".join(map(as_bytes_view, chunks))
        self.write(data)

    def _write_many(self, chunks: list[bytes | bytearray | memoryview]) -> None:
        """Write `chunks` without joining them."""
        views = [view for view in map(as_bytes_view, chunks) if view]
        if not views:
            return
        if self._write_blocked:
            self._drop_write()
            return
        rest = copied_rest(views, 0) if self._buffer.size else None  # As in `write`.
        try:
            if rest is None:
                try:
                    sent = self._channel.send_many(views)
                    self._bytes_sent += sent
                except (BlockingIOError, InterruptedError):
                    sent = 0
                rest = copied_rest(views, sent)
                if not rest:
                    return
                self._channel.set_writing(True)
                self._channel.note_bulk()
            for chunk in rest:
                self._buffer.append(chunk)
            self._update_flow()
        except BaseException as exc:
            # As in `write`.
            self._write_error = exc
            self._write_blocked = True
            self._end_failed_write()

    def _check_write(self, name: str) -> None:
        """Raise the error of a call of `name`, unless what it writes is sent, buffered or dropped."""
        if not self._channel.can_send:
            raise NotImplementedError(f"this end only reads: it cannot {name}")
        self._check_not_upgraded(name)
        if self._eof_written:
            raise RuntimeError(f"Cannot call {name}() after write_eof()")
        if self._sendfile is not None:
            raise RuntimeError(f"unable to {name}; sendfile is in progress")

    def _check_free(self, name: str) -> None:
        """Raise the error of a call of `name` if something excludes another operation: `start_tls`, for example."""
        self._check_write(name)
        if self._upgrade is not None:
            raise RuntimeError(f"unable to {name}; start_tls is in progress")

    def write_eof(self) -> None:
        """Send what is buffered, then shut down the sending side; reading goes on.

        Does nothing when closing, or when called before. Raises `NotImplementedError` when `can_write_eof` is false.
        """
        if not self.can_write_eof():
            msg = "this transport cannot close its sending side alone"
            raise NotImplementedError(msg)
        if self._eof_written or self.is_closing():
            return
        self._eof_written = True
        self._update_write_blocked()
        if not self._buffer.size and self._sendfile is None:
            self._send_eof()

    def can_write_eof(self) -> bool:
        """Return whether `write_eof` is supported."""
        return self._channel.can_write_eof

    def _send_eof(self) -> None:
        log_debug(self._callback_context.group, "%r: end of file sent", self)
        try:
            self._channel.send_eof()
        except Exception as exc:
            self._broken(exc, "shutdown")

    def _update_flow(self, *, from_channel: bool = False) -> None:
        # During a TLS handshake the bytes that have paused the protocol wait in the channel.
        if self._sendfile is None and not (self._upgrade is not None and self._buffer.paused):
            super()._update_flow(from_channel=from_channel)

    def _write_ready(self) -> None:
        if self._write_error is not None:
            self._end_failed_write()
            return
        buffer = self._buffer
        try:
            if buffer.chunks and len(buffer.chunks) == 1:
                sent = self._channel.send(buffer.chunks[0])
            elif (
                buffer.chunks or self._sendfile is None
            ):  # Without chunks the channel may still have an error to raise.
                sent = self._channel.send_many(buffer.chunks)
            else:
                sent = 0  # `SendfileOperation.until_writable` waits for this.
            buffer.take(sent)
        except (BlockingIOError, InterruptedError):
            return
        except BaseException as exc:
            self._broken(exc, "write")
            return
        self._bytes_sent += sent
        if sent > BULK_SIZE:
            self._channel.note_bulk()
        self._update_flow(from_channel=True)
        # `resume_writing` may have written more, closed or aborted.
        if not buffer.size and self._state < LOST:
            self._channel.set_writing(False)
            if self._state is not OPEN:
                self._shut_down()
            elif self._sendfile is not None:
                self._sendfile.on_writable()
            elif self._eof_written:
                self._send_eof()

    def _watch_output(self) -> None:
        try:
            self._channel.set_writing(True)
        except OSError as exc:  # As in `_watch_input`.
            self._broken(exc, "wait")
            raise

    # sendfile, by one task at a time

    def _begin_sendfile(self) -> SendfileOperation:
        """Refuse `write` and receive nothing until `_end_sendfile`.

        Raises `RuntimeError` after `write_eof`, and during another `sendfile` or `start_tls`.
        """
        self._check_free("sendfile")
        self._sendfile = operation = SendfileOperation(self)
        self._update_write_blocked()
        self.pause_reading()
        return operation

    def _end_sendfile(self, *, was_reading: bool) -> None:
        self._sendfile = None
        self._update_write_blocked()
        if self._state >= LOST:
            return
        if not self._buffer.size:
            self._channel.set_writing(False)
            if self._eof_written:
                self._send_eof()
        self._update_flow()
        if was_reading:
            self.resume_reading()

    # start_tls: the connection passes from this transport to a new one

    @property
    def _upgraded(self) -> StreamTransport | None:
        """The transport that has the connection after `start_tls`."""
        return None if self._upgrade is None else self._upgrade.upgraded

    def _get_tasks(self) -> ConnectionTasks:
        return super()._get_tasks() if self._upgraded is None else self._upgraded._get_tasks()

    def _check_not_upgraded(self, name: str) -> None:
        """Raise `RuntimeError` if `name` has to be called for the new transport."""
        if self._upgraded is not None:
            raise RuntimeError(f"Cannot call {name}() after start_tls(): it returned a new transport")

    def _begin_upgrade(self, make_channel: Callable[[StreamChannel, bytes], TLSChannel], protocol: Any) -> TLSUpgrade:
        """Put a TLS channel over the present one, start its handshake, and pass all later callbacks to `protocol`.

        `make_channel` is called with the present channel and what it has not sent yet. What is written from now on is
        sent by the TLS channel.

        Raises `TypeError` for a one-way channel, `RuntimeError` when closing, after `write_eof` and during `sendfile`
        or another upgrade, and what `make_channel` raises: nothing has changed then.
        """
        if not self._channel.is_two_way:
            raise TypeError(f"transport {self!r} is not supported by start_tls()")
        self._check_not_upgraded("start_tls")
        if self.is_closing():
            raise RuntimeError("Transport is closing")
        self._check_free("start_tls")
        channel = make_channel(self._channel, b"".join(self._buffer.chunks))
        log_debug(self._callback_context.group, "%r: upgrading to TLS", self)
        # A protocol that was paused stays so until the new transport starts: the bytes still wait, in the channel.
        self._buffer.clear()
        self._upgrade = upgrade = TLSUpgrade(self._channel)
        self._channel = channel
        channel.set_callbacks(self._read_ready, self._write_ready)
        self._use_protocol(protocol)
        upgrade.start_handshake(self, channel)
        return upgrade

    def _fail_upgrade(self, exc: Exception) -> None:
        """End with `connection_lost(exc)`: the handshake has failed."""
        self._lose(exc, aborted=True)

    def _finish_upgrade(self) -> StreamTransport | None:
        """Return a new transport for the connection, paused; `None` if the connection is ending without TLS.

        From now on this transport can only end the connection.
        """
        if self._state >= SHUTTING_DOWN:
            return None
        upgraded = StreamTransport(self._callback_context, self._channel, self._protocol, self._upgraded_lost)
        upgraded._reading_paused = True
        self._channel.set_reading(False)  # `resume_reading` may have been called during the handshake.
        upgraded._buffer = self._buffer
        upgraded._paused_protocol = self._paused_protocol
        tasks, self._tasks = self._tasks, None
        if tasks is not None:
            upgraded._tasks = tasks
            tasks.transport = upgraded
        upgraded._use_protocol(self._protocol)  # It may have to be paused.
        self._advance(UPGRADED, "upgraded to TLS")
        return upgraded

    def _upgraded_lost(self, _: StreamTransport) -> None:
        self._finish_loss()

    def _resume_after_upgrade(self) -> None:
        """Read, and send what was written during the handshake."""
        if self._state >= LOST:
            return  # Since the handshake; `connection_lost` may have been called.
        self._update_flow()
        if self._buffer.size:
            try:
                self._watch_output()
            except OSError:
                return  # `connection_lost` gets it.
        self.resume_reading()

    # For the group and `repr`

    def _shutdown_requested(self) -> None:
        if self._upgraded is None:
            super()._shutdown_requested()
        else:
            self._upgraded._shutdown_requested()

    def _traffic(self) -> tuple[int, int, int]:
        received, sent, buffered = super()._traffic()
        if self._upgraded is None:
            return received, sent, buffered
        more_received, more_sent, buffered = self._upgraded._traffic()
        return received + more_received, sent + more_sent, buffered

    def _describe(self) -> list[str]:
        parts = super()._describe()
        tls = self._extra_info().get("ssl_object")
        if tls is not None:
            parts.append(f"tls={tls.version()}")
        flags = {
            "reading paused": self._reading_paused,
            "eof received": self._eof_received,
            "eof written": self._eof_written,
            "sending a file": self._sendfile is not None,
        }
        return parts + [name for name, holds in flags.items() if holds]
