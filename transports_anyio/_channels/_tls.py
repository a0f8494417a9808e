"""TLS over any channel.

OpenSSL works on two memory buffers, and the channel below moves the ciphertext. A connection has three phases, each
with callbacks of its own at the channel below:

- the handshake, in `_tls_handshake`,
- the exchange of data, in this module, and
- the TLS shutdown, in which both ends send `close_notify`, in `_tls_shutdown`.

The phases share the `TLSEngine`, in `_tls_engine`.

Holds: the phase of a connection, and the exchange of data.
May know: the interface of channels, the phases, OpenSSL.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from ._abc import StreamChannel, joined
from ._receive_buffers import buffers
from ._tls_engine import ENCRYPT_SIZE, Scheduler, TLSEngine, TLSOptions
from ._tls_handshake import Handshake
from ._tls_shutdown import PlainShutdown, TLSShutdown

if TYPE_CHECKING:
    from ._abc import SizedBuffer

# How many times one readiness event may call a protocol whose buffer is smaller than what was received.
READS_IN_A_ROW = 16

# OpenSSL reads at most as many bytes as the buffer holds, so its size need not be computed.
AS_MUCH_AS_FITS = 2**30


class Phase(Enum):
    """The phases of a connection."""

    HANDSHAKE = auto()  # From the start; until `close` if it fails.
    CONNECTED = auto()  # The only phase in which the transport receives and sends.
    SHUTDOWN = auto()
    CLOSED = auto()


# Module constants: looking up an enum's member costs more.
HANDSHAKE, CONNECTED, SHUTDOWN, CLOSED = Phase


def noop() -> None: ...


class TLSChannel(StreamChannel):
    """Moves the plaintext of a TLS connection over `inner`, which it owns.

    `handshake` has to be called first, before or after a transport has set its callbacks: until it has succeeded,
    nothing is received or sent.

    `unsent` is sent before the handshake, in the clear. `received` is ciphertext that has arrived already. Raises
    `ValueError` for options that OpenSSL refuses; the caller then still owns `inner`.
    """

    __slots__ = (
        "_blocked",
        "_engine",
        "_eof",
        "_failure",
        "_handshake",
        "_has_pending",
        "_incoming",
        "_info",
        "_inner",
        "_outgoing",
        "_phase",
        "_plaintext",
        "_plaintext_in_flight",
        "_read",
        "_read_ready",
        "_reading",
        "_receive_ciphertext",
        "_scheduled",
        "_shutdown",
        "_tls",
        "_write_needs_read",
        "_write_ready",
        "_writing",
    )

    can_write_eof = False
    drops_after_close = True

    def __init__(
        self,
        inner: StreamChannel,
        options: TLSOptions,
        scheduler: Scheduler,
        *,
        unsent: bytes = b"",
        received: bytes = b"",
    ) -> None:
        self._engine = engine = TLSEngine(inner, options, scheduler, unsent)
        if received:
            engine.incoming.write(received)
        # Looked up once, not for each message.
        self._inner = inner
        self._tls = engine.tls
        self._read = engine.read
        self._incoming = engine.incoming
        self._outgoing = engine.outgoing
        self._receive_ciphertext = engine.receive
        self._plaintext = buffers.decrypted  # This thread's: the group stays in it.
        self._info: dict[str, Any] = {}
        self._phase = HANDSHAKE
        self._handshake: Handshake | None = Handshake(engine)  # Until it is over.
        self._shutdown: PlainShutdown | None = None
        # What the transport asked for.
        self._reading = False
        self._writing = False
        # For `receive`.
        self._has_pending = (
            False  # OpenSSL may return something without receiving: records in memory, `close_notify`, an error.
        )
        self._scheduled = False  # A read of that is scheduled for the next turn.
        self._eof = False  # The transport has received the end of the stream.
        # For `send`.
        self._blocked = True  # `send` has to call `_catch_up` first.
        self._plaintext_in_flight = 0  # Bytes that are encrypted but not yet reported as sent.
        self._write_needs_read = False  # OpenSSL cannot write before it has read (renegotiation in TLS 1.2).
        self._failure: Exception | None = (
            None  # An error outside of `send` and `receive`: `send` raises it, `receive` after the last data.
        )

    # The handshake

    def handshake(self, done: Callable[[Exception | None], None]) -> None:
        """Begin the handshake. `done` is called once, perhaps before this returns, with the error or `None`.

        The error is an `ssl.SSLError`, a `ConnectionAbortedError` when the handshake took too long or the channel was
        closed, or a `ConnectionResetError` when the peer has left. The caller closes the channel.
        """
        assert self._handshake is not None
        self._handshake.begin(self._connected, done)

    # The exchange of data

    def _connected(self, info: dict[str, Any]) -> None:
        self._phase = CONNECTED
        self._handshake = None
        self._info.update(info, close_notify=False)
        self._blocked = False
        self._has_pending = self._incoming.pending > 0  # Data may have come with the last message of the handshake.
        self._inner.set_callbacks(self._readable, self._writable)
        self._flush_or_fail()  # The last message of this side.

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        if self._phase is CONNECTED:
            self._update_interest()
            if reading and self._has_pending:
                self._read_again()

    def set_writing(self, writing: bool) -> None:
        self._writing = writing
        if self._phase is CONNECTED:
            self._update_interest()

    def note_bulk(self) -> None:
        self._inner.note_bulk()

    def _update_interest(self) -> None:
        engine = self._engine
        try:
            self._inner.set_reading((self._reading and engine.may_receive()) or self._write_needs_read)
            self._inner.set_writing(bool(engine.unsent) or (self._writing and not self._write_needs_read))
        except OSError as exc:  # ENOSPC: the system watches as many file descriptors as it may. Do not ask again.
            self._reading = self._writing = False
            self._fail(exc)
            raise

    def _read_again(self) -> None:
        """Schedule a read of what is in memory for the next turn: no selector reports it."""
        if not self._scheduled:
            self._scheduled = True
            self._engine.scheduler.call_internal(self._scheduled_read)

    def _scheduled_read(self) -> None:
        self._scheduled = False
        if self._has_pending:
            self._read_what_is_there()

    def _readable(self) -> None:
        if self._write_needs_read:
            self._receive_for_writing()
        if self._reading:
            self._read_ready()
            if self._has_pending:
                self._read_what_is_there()

    def _receive_for_writing(self) -> None:
        """Receive what OpenSSL has to read before it can write, even if the protocol has paused reading."""
        self._write_needs_read = False
        if not self._has_pending:
            try:
                count = self._receive_ciphertext()
            except (BlockingIOError, InterruptedError):
                pass
            except Exception as exc:
                self._fail(exc)
            else:
                if count:
                    self._has_pending = True
                else:
                    self._fail(self._peer_left())
        self._update_interest()

    def _peer_left(self) -> OSError:
        return ConnectionResetError(errno.ECONNRESET, "the peer left during a TLS renegotiation")

    def _read_what_is_there(self) -> None:
        # Checked each time: the protocol may pause, close or provide a larger buffer.
        for _ in range(READS_IN_A_ROW):
            if not (self._reading and self._has_pending):
                return
            self._read_ready()
        if self._reading and self._has_pending:
            self._read_again()

    def _writable(self) -> None:
        if self._engine.unsent:
            self._flush_or_fail()
            if not self._writing:
                return
        if not self._engine.unsent:
            self._write_ready()  # If writing was not asked for, an earlier `send` has failed.

    def receive(self) -> bytes:
        plaintext = self._plaintext
        count = self.receive_into(plaintext)
        return plaintext[:count].tobytes()

    def receive_into(self, buffer: SizedBuffer) -> int:
        """Fill `buffer` with what is in memory or has arrived, and note whether there may be more."""
        if not self._has_pending:
            if not self._receive_ciphertext():
                if self._failure is not None:
                    raise self._failure  # The system has reported the error to a send, and does not report it twice.
                self._eof = True  # The peer has left without `close_notify`.
                return 0
        elif self._failure is not None and isinstance(self._failure, ssl.SSLError):
            raise self._failure  # OpenSSL cannot read on. If only sending fails, receiving goes on to the end.
        self._has_pending = True
        try:
            taken = self._read(AS_MUCH_AS_FITS, buffer)
        except ssl.SSLWantReadError:
            self._has_pending = False
            taken = -1
        except ssl.SSLError:
            self._flush_or_fail()  # Send the alert, which tells the peer why.
            raise
        else:
            if not taken:
                self._info["close_notify"] = True
                self._eof = True
                return 0
            # A read that does not fill the buffer has read its whole record. An item of the buffer is at least a byte.
            if not self._incoming.pending and (taken < len(buffer) or not self._tls.pending()):
                self._has_pending = False
            else:
                taken = self._read_on(buffer, taken)
        if self._outgoing.pending:  # An answer of OpenSSL's own, to a key update for example.
            self._flush_or_fail()
        if taken < 0:
            raise BlockingIOError
        return taken

    def _read_on(self, buffer: SizedBuffer, taken: int) -> int:
        """Fill the rest of `buffer` with what else is in memory, and return how many bytes it holds then."""
        read = self._read
        try:
            with memoryview(buffer) as view, view.cast("B") as plaintext:
                size = len(plaintext)
                while taken < size:
                    with plaintext[taken:] as stop_io:
                        count = read(AS_MUCH_AS_FITS, stop_io)
                    if not count:
                        self._info["close_notify"] = True
                        break
                    taken += count
                    if not self._incoming.pending and (taken < size or not self._tls.pending()):
                        self._has_pending = False
                        break
        except ssl.SSLWantReadError:
            self._has_pending = False
        except ssl.SSLError as exc:
            self._flush_or_fail()
            self._fail(exc)
        return taken

    def send(self, data: bytes | bytearray | memoryview) -> int:
        taken = self._catch_up() if self._blocked else 0
        size = len(data)
        while taken < size:
            chunk = data if size <= ENCRYPT_SIZE and not taken else memoryview(data)[taken : taken + ENCRYPT_SIZE]
            try:
                count = self._tls.write(chunk)
            except ssl.SSLWantReadError:
                if self._eof:  # OpenSSL waits for a peer that has left.
                    raise self._peer_left() from None
                self._write_needs_read = True
                self._flush_or_fail()
                break
            ciphertext = self._outgoing.read()
            try:
                sent = self._inner.send(ciphertext)
            except (BlockingIOError, InterruptedError):
                sent = 0
            if sent < len(ciphertext):
                # The plaintext is reported as sent when its ciphertext is, so that the transport counts it.
                self._engine.unsent = memoryview(ciphertext)[sent:]
                self._plaintext_in_flight = count
                self._blocked = True
                self._update_interest()
                break
            taken += count
        if size and not taken:
            raise BlockingIOError
        return taken

    def _catch_up(self) -> int:
        """Return how many bytes of the data that is offered again have been sent in between."""
        if self._failure is not None:
            raise self._failure
        if self._engine.unsent or self._phase is not CONNECTED:
            raise BlockingIOError
        self._blocked = False
        held, self._plaintext_in_flight = self._plaintext_in_flight, 0
        return held

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        data = joined(chunks, ENCRYPT_SIZE)
        return self.send(data) if data else self._inner.send_many(())

    def _flush_or_fail(self) -> None:
        """Send what is encrypted. An error is kept for the next `send`, and for `receive` after the last data.

        What could not be sent may be a message of OpenSSL's own, such as session tickets, and data or an alert of the
        peer may still be there to be received.
        """
        try:
            self._engine.flush()
        except Exception as exc:
            self._fail(exc)
        if self._engine.unsent:
            self._blocked = True
        self._update_interest()

    def _fail(self, exc: Exception) -> None:
        # Keep the first error, which says what happened: after a reset every send fails with EPIPE.
        if self._failure is None or isinstance(exc, ssl.SSLError):
            self._failure = exc
        self._engine.unsent = b""
        self._blocked = True

    def send_eof(self) -> None:
        raise NotImplementedError  # `can_write_eof` is false: TLS 1.2 has no half-closed state.

    # The TLS shutdown

    def shutdown(self, done: Callable[[Exception | None, bool], None]) -> bool:
        if self._failure is not None and not self._eof:
            raise self._failure
        self._phase = SHUTDOWN
        if self._handshake is not None:
            self._handshake.stop()
            self._shutdown = shutdown = PlainShutdown(self._engine, done)
        else:
            self._shutdown = shutdown = TLSShutdown(self._engine, done, self._info, eof=self._eof)
        self._reading = self._writing = False  # What is still in memory is dropped.
        try:
            return shutdown.begin()
        except Exception:
            self._engine.stop_io()
            raise

    def close(self, *, aborted: bool) -> None:
        if self._phase is CLOSED:
            return
        self._phase = CLOSED
        self._engine.cancel_timeout()
        if self._shutdown is not None:
            self._shutdown.abandon()
        self._engine.stop_io()
        self._inner.close(aborted=aborted)
        if self._handshake is not None:
            self._handshake.end(
                ConnectionAbortedError(errno.ECONNABORTED, "the connection was closed during its TLS handshake")
            )
        # Break reference cycles: the garbage collector does not see OpenSSL's memory, and many connections may fail.
        self._inner.set_callbacks(noop, noop)
        self.set_callbacks(noop, noop)
        self._failure = self._handshake = self._shutdown = None

    def extra_info(self) -> Mapping[str, Any]:
        return {**self._inner.extra_info(), "sslcontext": self._engine.options.context, **self._info}
