"""The stream transport: one state machine for every byte channel.

Callbacks of a protocol, in order: `connection_made [data_received* | (get_buffer buffer_updated?)*] [eof_received]
connection_lost`, with `pause_writing [resume_writing]` pairs anywhere between the first and the last.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.lowlevel

from .. import abc
from .._errors import log_debug, logger
from .._waiters import InterruptSafeEvent
from ._base import SPARE_FRAMES, ChannelTransport, noop
from ._flow_control import WriteBuffer, are_large, as_bytes_view, copied_rest

if TYPE_CHECKING:
    from typing import NoReturn

    from .._callbacks import CallbackContext
    from .._channels._abc import Channel

    ChannelT = TypeVar("ChannelT", bound=Channel)


class SendfileOperation:
    """What a transport keeps in mind while a file is sent over it."""

    __slots__ = ("error", "progress", "was_reading")

    def __init__(self, *, was_reading: bool) -> None:
        self.was_reading = was_reading
        self.progress = (
            InterruptSafeEvent()
        )  # Everything buffered is sent and the channel writable, or the transport closing.
        self.error: BaseException | None = None  # Why the connection was lost.


class StreamTransport(ChannelTransport, abc.Transport):
    """A connection, as asyncio's documentation describes `asyncio.Transport`.

    Made by the endpoint functions of a `TransportGroup`. Every method is synchronous and never blocks, and none of
    them calls `connection_lost`, `data_received` or `eof_received` before it returns; `write`, `writelines` and
    `set_write_buffer_limits` may call `pause_writing` or `resume_writing`.

    Source: https://docs.python.org/3/library/asyncio-protocol.html#transports
    """

    __slots__ = (
        "_buffered_protocol",
        "_eof_received",
        "_eof_written",
        "_file",
        "_flushed",
        "_reading_paused",
        "_successor",
        "_upgrading",
        "_writes_dropped",
        "_writing_refused",
    )

    _buffer: WriteBuffer
    _channel: Channel

    def __init__(
        self,
        callback_context: CallbackContext,
        channel: Channel,
        protocol: Any,
        on_lost: Callable[[StreamTransport], None],
    ) -> None:
        super().__init__(callback_context, channel, WriteBuffer(), protocol, on_lost)
        self._flushed = False  # The flush of `close` is over, or the connection is lost.
        self._writes_dropped = False  # What is written now would not be sent.
        self._reading_paused = False
        self._eof_received = False
        self._eof_written = False
        self._file: SendfileOperation | None = None
        self._upgrading = False  # Since `start_tls`; there is no way back.
        # On a stream that only receives, after `write_eof` or `start_tls`, and while a file is under way.
        self._writing_refused = not channel.can_send
        self._successor: StreamTransport | None = None  # Who has taken over the connection, after `start_tls`.

    def start(self) -> None:
        """Tell the protocol of its connection, then begin to read; raises `OSError` when that is not possible."""
        log_debug(
            self._callback_context.group, "%r: connection made, with a %s", self, type(self._protocol).__qualname__
        )
        try:
            self._call(self._protocol.connection_made, self)
        except BaseException as exc:
            self._callback_failed(exc, "connection_made")
        if not self._closing and not self._reading_paused:
            self._await_input()

    def _await_input(self) -> None:
        try:
            self._channel.set_reading(True)
        except OSError as exc:  # The system watches as many descriptors as it may.
            self._broken(exc, "wait")
            raise

    # Base

    def _use_protocol(self, protocol: Any) -> None:
        super()._use_protocol(protocol)
        self._buffered_protocol = isinstance(protocol, asyncio.BufferedProtocol)

    def close(self) -> None:
        """Stop reading, flush what is buffered, then end with `connection_lost(None)`.

        A peer that never reads makes the flush wait for ever: `abort`, or leaving the group by a cancellation,
        ends it.
        """
        if self._successor is not None:
            self._successor.close()
        if self._closing:
            return
        log_debug(self._callback_context.group, "%r: closing", self)
        self._closing = True
        self._writes_dropped = self._channel.drops_after_close
        if self._file is not None:
            self._file.progress.set()
        if self._buffer.size:
            self._channel.set_reading(False)
        else:
            self._finish()

    def abort(self) -> None:
        """Drop what is buffered and end with `connection_lost(None)`."""
        if self._successor is not None:
            self._successor.abort()
        self._lose(None, aborted=True)

    # Reading

    def is_reading(self) -> bool:
        """Whether the transport is neither closing nor paused."""
        return not self._closing and not self._reading_paused

    def is_eof_received(self) -> bool:
        """Whether the peer's end of file has come: `eof_received` is not called any more, nor is `data_received`."""
        return self._eof_received

    def pause_reading(self) -> None:
        """Receive nothing until `resume_reading`. Does nothing when paused or closing."""
        if self.is_reading():
            self._reading_paused = True
            self._channel.set_reading(False)

    def resume_reading(self) -> None:
        """Receive again. Does nothing when not paused, or closing."""
        if self._reading_paused and not self._closing:
            self._reading_paused = False
            if not self._eof_received:
                try:
                    self._await_input()
                except OSError:
                    pass  # `connection_lost` is told.

    def _read_ready(self) -> None:
        if self._buffered_protocol:
            if self._call(self._read_into_protocol):
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
        try:
            self._call(self._protocol.data_received, data)
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
        if self._closing or self._reading_paused:
            return False  # `get_buffer` changed its mind: nothing has been taken from the channel.
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
        try:
            self._protocol.buffer_updated(count)
        except BaseException as exc:
            self._callback_failed(exc, "buffer_updated")
        return False

    def _end_of_file(self) -> None:
        log_debug(self._callback_context.group, "%r: end of file received", self)
        self._eof_received = True
        # An ended stream stays readable for ever, so it leaves the poller whatever the protocol answers.
        self._channel.set_reading(False)
        try:
            keep_open = self._call(self._protocol.eof_received)
        except BaseException as exc:
            self._callback_failed(exc, "eof_received")
            return
        if keep_open and self._channel.can_write_eof:
            return
        if keep_open and self._channel.is_two_way and not self._closing:
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
        if self._writing_refused:
            self._refuse_writing("write")
        if not view:
            return
        if self._writes_dropped:
            self._drop_write()
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
            self._buffer.append(chunk)
            self._update_flow()
        except BaseException as exc:
            # Nothing may follow a message of which only a part was sent.
            if isinstance(exc, RecursionError):
                sys.setrecursionlimit(sys.getrecursionlimit() + SPARE_FRAMES)
            self._write_failed(exc, "write")

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the chunks of `list_of_data` in order, as one write. Raises as `write` does."""
        if self._writing_refused:
            self._refuse_writing("writelines")
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
        if self._writes_dropped:
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
            for chunk in rest:
                self._buffer.append(chunk)
            self._update_flow()
        except BaseException as exc:
            if isinstance(exc, RecursionError):
                sys.setrecursionlimit(sys.getrecursionlimit() + SPARE_FRAMES)
            self._write_failed(exc, "write")

    def _refuse_writing(self, name: str) -> NoReturn:
        if not self._channel.can_send:
            raise NotImplementedError(f"this end only reads: it cannot {name}")
        if self._successor is not None:
            raise RuntimeError(f"Cannot call {name}() after start_tls(): it returned a new transport")
        if self._upgrading:
            raise RuntimeError(f"unable to {name}; start_tls is in progress")
        if self._eof_written:
            raise RuntimeError(f"Cannot call {name}() after write_eof()")
        raise RuntimeError(f"unable to {name}; sendfile is in progress")

    def write_eof(self) -> None:
        """Flush, then shut down the sending side; reading goes on. Does nothing when closing or called before.

        Raises `NotImplementedError` when `can_write_eof` is false.
        """
        if not self.can_write_eof():
            msg = "this transport cannot close its sending side alone"
            raise NotImplementedError(msg)
        if self._closing or self._eof_written:
            return
        self._eof_written = self._writing_refused = True
        if not self._buffer.size and self._file is None:
            self._send_eof()

    def can_write_eof(self) -> bool:
        """Whether `write_eof` is supported."""
        return self._channel.can_write_eof

    def _update_flow(self, *, from_channel: bool = False) -> None:
        # During an upgrade the bytes that have paused the protocol wait in the channel.
        if self._file is None and not (self._upgrading and self._buffer.paused):
            super()._update_flow(from_channel=from_channel)

    def _write_ready(self) -> None:
        buffer = self._buffer
        try:
            if buffer.chunks and len(buffer.chunks) == 1:
                sent = self._channel.send(buffer.chunks[0])
            elif buffer.chunks or self._file is None:  # With no chunks, a channel may have a failure to tell.
                sent = self._channel.send_many(buffer.chunks)
            else:
                sent = 0  # It is `until_writable` that wants to know.
            buffer.take(sent)
        except (BlockingIOError, InterruptedError):
            return
        except BaseException as exc:
            self._broken(exc, "write")
            return
        self._bytes_sent += sent
        self._update_flow(from_channel=True)
        # `resume_writing` may have written more, closed or aborted.
        if not buffer.size and not self._lost:
            self._channel.set_writing(False)
            if self._closing:
                self._finish()
            elif self._file is not None:
                self._file.progress.set()
            elif self._eof_written:
                self._send_eof()

    def _send_eof(self) -> None:
        log_debug(self._callback_context.group, "%r: end of file sent", self)
        try:
            self._channel.send_eof()
        except Exception as exc:
            self._broken(exc, "shutdown")

    # Sending a file, for one task at a time: `begin_sendfile`, then the others in any order, then `end_sendfile`.

    @property
    def can_send(self) -> bool:
        """Whether there is anything to write to."""
        return self._channel.can_send

    @property
    def can_send_file(self) -> bool:
        """Whether the channel can send from a file by itself."""
        return self._channel.can_send_file

    def begin_sendfile(self) -> None:
        """Until `end_sendfile`, refuse `write`, read nothing, and tell the protocol nothing of the buffer.

        Raises `RuntimeError` after `write_eof`, and while another file or `start_tls` is under way.
        """
        if self._writing_refused or self._upgrading:
            self._refuse_writing("sendfile")
        self._file = SendfileOperation(was_reading=self.is_reading())
        self._writing_refused = True
        self.pause_reading()

    async def flush(self) -> None:
        """Wait until nothing is buffered. Raises `ConnectionError` when the transport is closing."""
        await anyio.lowlevel.checkpoint()
        self._require_open()
        if self._buffer.size:
            await self.until_writable()

    async def until_writable(self) -> None:
        """Wait until nothing is buffered and something could be sent. Raises as `flush` does."""
        file = self._require_open()
        file.progress = InterruptSafeEvent()
        self._await_output()
        await file.progress.wait()
        self._require_open()

    def _require_open(self) -> SendfileOperation:
        file = self._file
        assert file is not None
        if self._closing:
            if isinstance(file.error, OSError):
                raise file.error
            raise ConnectionError("the connection was closed while a file was sent") from file.error
        return file

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send from a file, past the buffer, and return how many bytes went, 0 at its end.

        Raises `FileError` for what the file cannot do, and `OSError`.
        """
        try:
            sent = self._channel.send_file(fd, offset, count)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError as exc:
            self._broken(exc, "sendfile")
            raise
        self._bytes_sent += sent
        return sent

    def send_block(self, data: bytes) -> None:
        """Send `data`, or buffer what cannot be sent yet. Raises as `flush` does, `TypeError` for what is not bytes."""
        self._require_open()
        self._buffer.append(as_bytes_view(data))
        self._await_output()
        self._write_ready()

    def _await_output(self) -> None:
        try:
            self._channel.set_writing(True)
        except OSError as exc:  # As in `_await_input`.
            self._broken(exc, "wait")
            raise

    def end_sendfile(self) -> None:
        """Let the transport and its protocol go on."""
        file = self._file
        assert file is not None
        self._file = file.error = None  # Its traceback may have the frame that asked: no cycle.
        self._writing_refused = self._eof_written
        if self._lost:
            return
        if not self._buffer.size:
            self._channel.set_writing(False)
            if self._eof_written:
                self._send_eof()
        self._update_flow()
        if file.was_reading:
            self.resume_reading()

    # Encryption in mid-stream. The connection passes from this transport to a new one.

    def interpose(self, wrap: Callable[[Channel, bytes], ChannelT], protocol: Any) -> ChannelT:
        """Put a channel over the present one, and give every later callback to `protocol`.

        `wrap` makes it of the present channel and of what that has not sent yet. What is written from now on waits for
        the new channel. Raises `TypeError` for a one-way channel, `RuntimeError` when closing, after `write_eof` and
        during `sendfile` or another upgrade, and what `wrap` raises: the transport then goes on as before.
        """
        if not self._channel.is_two_way:
            raise TypeError(f"transport {self!r} is not supported by start_tls()")
        self.refuse_after_upgrade("start_tls")
        if self._closing:
            raise RuntimeError("Transport is closing")
        if self._writing_refused or self._upgrading:
            self._refuse_writing("start_tls")
        channel = wrap(self._channel, b"".join(self._buffer.chunks))
        log_debug(self._callback_context.group, "%r: upgrading to TLS", self)
        # A protocol that was paused stays so until the new transport has begun: the bytes still wait.
        self._buffer.clear()
        self._upgrading = True
        self._channel = channel
        channel.set_callbacks(self._read_ready, self._write_ready)
        self._use_protocol(protocol)
        return channel

    def belongs_to(self, group: object) -> bool:
        """Whether `group` owns the transport."""
        return self._callback_context.group is group

    def refuse_after_upgrade(self, name: str) -> None:
        """Raise `RuntimeError` when `start_tls` has passed the connection on: what is asked for is the new one's."""
        if self._successor is not None:
            self._refuse_writing(name)

    def break_off(self, exc: Exception) -> None:
        """End with `connection_lost(exc)`: the new channel did not come about."""
        self._lose(exc, aborted=True)

    def succeed(self) -> StreamTransport | None:
        """Return a transport that goes on with this one's connection, paused; `None` when it is lost already.

        This one can only end it from now on.
        """
        if self._lost:
            return None
        successor = StreamTransport(self._callback_context, self._channel, self._protocol, self._successor_lost)
        successor._reading_paused = True
        self._channel.set_reading(False)  # `resume_reading` may have been called since.
        successor._buffer = self._buffer
        successor._paused_protocol = self._paused_protocol
        successor._use_protocol(self._protocol)  # Which may have to be told of a pause.
        self._successor = successor
        self._closing = self._lost = self._writing_refused = True
        return successor

    def _successor_lost(self, _: StreamTransport) -> None:
        self._protocol = self._paused_protocol = None
        on_lost, self._on_lost = self._on_lost, noop  # No cycle with a transport that was upgraded before this one.
        on_lost(self)

    def resume_after_upgrade(self) -> None:
        """Read, and write what was written during the upgrade."""
        if self._lost:
            return  # Since the handshake, and the protocol may know already.
        self._update_flow()
        if self._buffer.size:
            try:
                self._await_output()
            except OSError:
                return  # `connection_lost` has it.
        self.resume_reading()

    # The end: every way out goes through `_lose`, and `connection_lost` is called in one place.

    def _finish(self) -> None:
        """End in order, now that everything is flushed."""
        if self._flushed:
            return
        self._flushed = self._writes_dropped = True
        try:
            over = self._channel.shutdown(self._finished)
        except BaseException as exc:
            self._broken(exc, "close")
            return
        if over:
            self._lose(None)

    def _finished(self, exc: Exception | None, eof: bool) -> None:
        # asyncio tells the protocol of an end of file that comes during the farewell of TLS.
        if eof and not self._eof_received and not self._lost:
            self._eof_received = True
            try:
                self._call(self._protocol.eof_received)
            except BaseException as error:
                self._callback_failed(error, "eof_received")
                return
        if exc is not None:
            self._broken(exc, "close")
        else:
            self._lose(None)

    def _broken(self, exc: BaseException, doing: str) -> None:
        if self._callback_context.leaves(exc):
            raise exc
        # As asyncio: a connection that breaks is the protocol's business, and nothing else is.
        log_debug(self._callback_context.group, "%r: %s failed: %r", self, doing, exc)
        self._lose(exc, aborted=True)
        if not isinstance(exc, OSError):
            self._callback_context.report(f"Fatal {doing} error on stream transport", exc, self, self._protocol)

    def _lose(self, exc: BaseException | None, *, aborted: bool = False) -> None:
        if not self._lost:
            self._flushed = self._writes_dropped = True
            if self._file is not None:
                self._file.error = exc
                self._file.progress.set()
        super()._lose(exc, aborted=aborted)

    def traffic(self) -> tuple[int, int, int]:
        """Return how many bytes were received and sent, and how many wait."""
        own = super().traffic()
        if self._successor is None:
            return own
        received, sent, buffered = self._successor.traffic()
        return own[0] + received, own[1] + sent, buffered

    def _describe(self) -> list[str]:
        parts = super()._describe()
        tls = self._info.get("ssl_object")
        if tls is not None:
            parts.append(f"tls={tls.version()}")
        flags = {
            "reading paused": self._reading_paused,
            "eof received": self._eof_received,
            "eof written": self._eof_written,
            "sending a file": self._file is not None,
        }
        return parts + [name for name, holds in flags.items() if holds]

    def _state(self) -> str:
        return super()._state() if self._successor is None else "upgraded"
