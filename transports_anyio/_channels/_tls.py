"""TLS over any channel.

OpenSSL works on two memory buffers; the channel below moves the ciphertext. A connection passes through three phases,
each with callbacks of its own at the channel below: the handshake, the exchange of data, and the farewell, in which
both ends send `close_notify`.

Memory buffers, and not a descriptor in OpenSSL's hands, because then OpenSSL reads only what it was fed:

- It can say `close_notify` while data of the peer is on its way. `SSL_shutdown` on a descriptor would read that data
  and break the connection ("application data after close notify").
- A connection that was cut is known from one that was closed, whatever the options of the context
  (`SSL_OP_IGNORE_UNEXPECTED_EOF`, which Python sets, makes them look the same).
- One `recv` takes many records, where OpenSSL would call `read` twice for each.
- The same code runs over sockets, streams, and TLS itself.
"""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from .._errors import logger
from ._contract import Channel
from ._receive_buffers import RECEIVE_SIZE, buffers

if TYPE_CHECKING:
    from typing_extensions import Buffer

# How much plaintext is encrypted before the ciphertext is sent. It bounds what waits, twice, behind a peer that does
# not read. Both sizes also bound what the memory buffers of a connection keep allocated once they were that full.
ENCRYPT_SIZE = 128 * 1024

# How often in a row one readiness event may call a protocol whose buffer is smaller than what was received.
READS_IN_A_ROW = 16

# How much a peer may still send after our `close_notify` before the connection ends without waiting for its own.
# What is on its way when we close should fit; a download without end should not be read to the end.
DISCARD_LIMIT = 1024 * 1024


# How much may wait for a peer that does not read before nothing more is received from it: what it sends may make
# OpenSSL answer (key updates), without end. What `send` leaves waiting is less.
ANSWERS_LIMIT = 4 * ENCRYPT_SIZE


def _ignore() -> None: ...


@dataclass(frozen=True)
class TLSOptions:
    """How one end of a connection speaks TLS; the time-outs are seconds."""

    context: ssl.SSLContext
    server_side: bool
    server_hostname: str | None
    handshake_timeout: float
    shutdown_timeout: float


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """Who calls back later, in the group's next turn or after a time; and who calls the user's code."""

    def user_call(self) -> Callable[..., Any]: ...
    def call_internal(self, callback: Callable[..., object], *args: Any) -> None: ...
    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Cancellable: ...


class TLSChannel(Channel):
    """Moves the plaintext of a TLS connection over `inner`, which it owns.

    `handshake` comes first, before or after a transport has opened the channel: until it has succeeded, nothing
    is received and nothing sent.

    `unsent` is what is to be sent before the handshake, in the clear; `received` is ciphertext that has arrived
    already. Raises `ValueError` for options that OpenSSL refuses; `inner` is then left to the caller.
    """

    __slots__ = (
        "_blocked",
        "_call",
        "_ciphertext",
        "_closed",
        "_discarded",
        "_eof",
        "_eof_reported",
        "_failure",
        "_held",
        "_incoming",
        "_info",
        "_inner",
        "_more",
        "_on_finished",
        "_on_handshake",
        "_options",
        "_outgoing",
        "_plaintext",
        "_read",
        "_read_ready",
        "_reading",
        "_scheduled",
        "_scheduler",
        "_timer",
        "_tls",
        "_unsent",
        "_verdict",
        "_write_needs_read",
        "_write_ready",
        "_writing",
    )

    can_write_eof = False

    def __init__(
        self, inner: Channel, options: TLSOptions, scheduler: Scheduler, *, unsent: bytes = b"", received: bytes = b""
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = options.context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=options.server_side,
            server_hostname=options.server_hostname,
        )
        # With a buffer, `read` returns a number.
        self._read = cast("Callable[[int, memoryview], int]", self._tls.read)
        self._call: Callable[..., Any] | None = scheduler.user_call()  # For the handshake, which may ask for a context.
        self._inner = inner
        self._options = options
        self._scheduler = scheduler
        self._unsent: bytes | memoryview = unsent
        if received:
            self._incoming.write(received)
        self._info: dict[str, Any] = {}
        # Looked up once, and not for each message: of this thread, which is the group's.
        self._ciphertext = buffers.received
        self._plaintext = buffers.decrypted
        self._reading = False
        self._writing = False
        self._scheduled = False
        self._more = False  # Something may be had without receiving: records in memory, `close_notify`, a failure.
        self._blocked = True  # `send` has something to do before it may encrypt.
        self._held = 0  # So many bytes of plaintext are encrypted, but not yet reported as sent.
        self._write_needs_read = False  # OpenSSL cannot write before it has read (renegotiation in TLS 1.2).
        self._failure: Exception | None = None  # Met outside of `send` and `receive`, which will raise it.
        self._discarded = 0
        self._closed = False
        self._on_handshake: Callable[[Exception | None], None] | None = None
        self._on_finished: Callable[[Exception | None, bool], None] | None = None
        self._verdict: Exception | None = None  # Why the handshake failed, while the peer is being told.
        self._eof = False  # The peer has sent `close_notify`, or left.
        self._eof_reported = False
        self._timer: Cancellable | None = None

    # The first phase.

    def handshake(self, done: Callable[[Exception | None], None]) -> None:
        """Begin the handshake; `done` is called once, perhaps before this returns, with what went wrong.

        That is an `ssl.SSLError`, `ConnectionAbortedError` when it took too long or the channel was closed, or
        `ConnectionResetError` when the peer has left. The caller closes the channel.
        """
        self._on_handshake = done
        self._timer = self._scheduler.call_later(self._options.handshake_timeout, self._handshake_timed_out)
        self._inner.open(self._handshake_readable, self._handshake_writable)
        try:
            self._inner.set_reading(True)
        except OSError as exc:  # The system watches as many descriptors as it may.
            self._end_handshake(exc)
            return
        self._advance_handshake()

    def _handshake_readable(self) -> None:
        try:
            count = self._receive_ciphertext()
        except (BlockingIOError, InterruptedError):
            return
        except Exception as exc:  # An `OSError`, or what a context of another kind raises in the TLS below.
            self._end_handshake(exc)
            return
        if not count:
            self._end_handshake(ConnectionResetError(errno.ECONNRESET, "the peer left during the TLS handshake"))
            return
        self._advance_handshake()

    def _handshake_writable(self) -> None:
        self._flush_or_fail()
        if self._on_finished is not None:
            if self._failure is not None:
                self._finished(self._failure)
            elif not self._unsent:
                self._farewell_over()
        elif self._verdict is not None:
            if not self._unsent:
                self._end_handshake(self._verdict)
        elif self._failure is not None:
            self._end_handshake(self._last_words() or self._failure)

    def _last_words(self) -> Exception | None:
        """Return the alert of a peer that has left, if it sent one before."""
        try:
            self._receive_ciphertext()
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as exc:
            return exc
        except OSError:  # Nothing is there to be read, or the same failure again.
            return None
        except Exception as exc:  # As in `_advance_handshake`.
            return exc
        return None

    def _advance_handshake(self) -> None:
        tls = self._tls
        assert self._call is not None
        try:
            self._call(tls.do_handshake)
            self._info.update(
                peercert=tls.getpeercert(), cipher=tls.cipher(), compression=tls.compression(), ssl_object=tls
            )
        except ssl.SSLWantReadError:
            pass
        except Exception as exc:  # `ssl.SSLError`, what a context of another kind raises, an unreadable certificate.
            self._verdict = exc  # The peer is told.
            self._inner.set_reading(False)
        else:
            self._flush_or_fail()
            self._begin_exchange()
            return
        if self._on_finished is None:  # Or else a server name callback has closed, and the channel below takes leave.
            self._handshake_writable()

    def _handshake_timed_out(self) -> None:
        self._end_handshake(
            self._verdict
            or ConnectionAbortedError(
                errno.ECONNABORTED, f"the TLS handshake took longer than {self._options.handshake_timeout} seconds"
            )
        )

    def _end_handshake(self, exc: Exception) -> None:
        # Linux tells a sender of the peer's leaving by EPIPE and a receiver by ECONNRESET: here it is one thing.
        if isinstance(exc, BrokenPipeError):
            reset = ConnectionResetError(errno.ECONNRESET, "the peer left")
            reset.__cause__ = exc
            exc = reset
        self._inner.set_reading(False)
        self._inner.set_writing(False)
        self._handshake_over(exc)

    def _handshake_over(self, exc: Exception | None) -> None:
        self._cancel_timer()
        done, self._on_handshake = self._on_handshake, None
        if done is None:
            return  # It was over already.
        if logger.isEnabledFor(logging.DEBUG):
            try:
                peername = self._inner.extra_info().get("peername")
            except Exception:  # Of a stream that looks it up when it is asked, and whose peer has left.
                peername = None
            if exc is not None:
                logger.debug("TLS handshake with %r failed: %r", peername, exc)
            else:
                cipher = self._tls.cipher()
                logger.debug("TLS handshake with %r done: %s, %s", peername, self._tls.version(), cipher and cipher[0])
        done(exc)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # The second phase.

    def _begin_exchange(self) -> None:
        self._info["close_notify"] = False
        self._call = None
        self._blocked = bool(self._unsent) or self._failure is not None
        # Data may have come with the last message of the handshake.
        self._more = self._incoming.pending > 0 or self._failure is not None
        self._inner.open(self._readable, self._writable)
        self._update_interest()
        self._handshake_over(None)

    def open(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    def _in_exchange(self) -> bool:
        return self._on_handshake is None and self._on_finished is None and not self._closed

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        if self._in_exchange():
            self._update_interest()
            if reading and self._more:
                self._read_again()

    def set_writing(self, writing: bool) -> None:
        self._writing = writing
        if self._in_exchange():
            self._update_interest()

    def _update_interest(self) -> None:
        wanted = self._reading and len(self._unsent) <= ANSWERS_LIMIT
        self._inner.set_reading(wanted or self._write_needs_read)
        self._inner.set_writing(bool(self._unsent) or (self._writing and not self._write_needs_read))

    def _read_again(self) -> None:
        """Have what is in memory read in the next turn: no selector knows of it."""
        if not self._scheduled:
            self._scheduled = True
            self._scheduler.call_internal(self._scheduled_read)

    def _scheduled_read(self) -> None:
        self._scheduled = False
        if self._more:
            self._read_what_is_there()

    def _readable(self) -> None:
        if self._write_needs_read:
            self._receive_for_writing()
        if self._reading:
            self._read_ready()
            if self._more:
                self._read_what_is_there()

    def _receive_for_writing(self) -> None:
        """Give OpenSSL what it has to read before it can write; the protocol may have paused reading."""
        self._write_needs_read = False
        if not self._more:
            try:
                count = self._receive_ciphertext()
            except (BlockingIOError, InterruptedError):
                pass
            except Exception as exc:
                self._fail(exc)
            else:
                self._more = True
                if not count:
                    self._fail(self._peer_left())
        self._update_interest()

    def _peer_left(self) -> OSError:
        return ConnectionResetError(errno.ECONNRESET, "the peer left during a TLS renegotiation")

    def _read_what_is_there(self) -> None:
        # `_reading` and `_more` are looked at each time: the protocol may pause, close or give a larger buffer.
        for _ in range(READS_IN_A_ROW):
            if not (self._reading and self._more):
                return
            self._read_ready()
        if self._reading and self._more:
            self._read_again()

    def _writable(self) -> None:
        if self._unsent:
            self._flush_or_fail()
        if self._writing and not self._unsent:
            self._write_ready()

    def receive(self) -> bytes:
        plaintext = self._plaintext
        count = self._receive(plaintext)
        return plaintext[:count].tobytes()

    def receive_into(self, buffer: Buffer) -> int:
        if type(buffer) is memoryview and buffer.ndim == buffer.itemsize == 1:
            return self._receive(buffer)
        with memoryview(buffer) as view, view.cast("B") as plaintext:
            return self._receive(plaintext)

    def _receive_ciphertext(self) -> int:
        """Give OpenSSL what the channel below has, and return how much that was, 0 at the end."""
        ciphertext = self._ciphertext
        count = self._inner.receive_into(ciphertext)
        self._incoming.write(ciphertext[:count])
        return count

    def _receive(self, into: memoryview) -> int:
        """Fill `into` with what is in memory, or else arrives, and note whether there may be more."""
        if not self._more:
            if not self._receive_ciphertext():
                self._eof = self._eof_reported = True  # The peer has left without `close_notify`.
                return 0
        elif self._failure is not None:
            return self._receive_last(into)
        read = self._read
        incoming = self._incoming
        size = len(into)
        taken = 0
        self._more = True
        try:
            while taken < size:
                count = read(size - taken, into[taken:] if taken else into)
                if not count:
                    self._eof = self._info["close_notify"] = True
                    self._eof_reported = not taken
                    return taken
                taken += count
                # A read that leaves room has taken its record whole.
                if not incoming.pending and (taken < size or not self._tls.pending()):
                    self._more = False
                    break
        except ssl.SSLWantReadError:
            self._more = False
        except ssl.SSLError as exc:
            self._flush_or_fail()  # The peer is told why.
            if not taken:
                raise
            self._fail(exc)
            return taken
        if self._outgoing.pending:  # An answer of OpenSSL's own, to a key update for example.
            self._flush_or_fail()
        if not taken:
            raise BlockingIOError
        return taken

    def _receive_last(self, into: memoryview) -> int:
        """Fill `into` with what the peer has sent although sending to it failed; raise what OpenSSL could not read.

        A peer that has left need not have missed anything but an answer of OpenSSL's own, session tickets for example.
        If it has missed more, whoever sends next learns of the failure.
        """
        assert self._failure is not None
        if isinstance(self._failure, ssl.SSLError):
            raise self._failure
        while True:
            try:
                count = self._read(len(into), into)
            except ssl.SSLWantReadError:
                pass
            else:
                if not count:
                    self._eof = self._eof_reported = self._info["close_notify"] = True
                return count
            try:
                if not self._receive_ciphertext():
                    self._eof = self._eof_reported = True
                    return 0
            except (BlockingIOError, InterruptedError):
                self._more = False  # A stream is received from piece by piece: the rest and the end are yet to come.
                raise

    def send(self, data: bytes | bytearray | memoryview) -> int:
        taken = self._catch_up() if self._blocked else 0
        size = len(data)
        while taken < size:
            chunk = data if size <= ENCRYPT_SIZE and not taken else memoryview(data)[taken : taken + ENCRYPT_SIZE]
            try:
                count = self._tls.write(chunk)
            except ssl.SSLWantReadError:
                if self._eof:  # What OpenSSL waits for will not come.
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
                self._unsent = memoryview(ciphertext)[sent:]
                self._held = count
                self._blocked = True
                self._update_interest()
                break
            taken += count
        if size and not taken:
            raise BlockingIOError
        return taken

    def _catch_up(self) -> int:
        """Return how much of what is offered has been sent since it was offered first."""
        if self._failure is not None:
            raise self._failure
        if self._unsent or not self._in_exchange():
            raise BlockingIOError
        self._blocked = False
        held, self._held = self._held, 0
        return held

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        gathered: list[bytes | memoryview] = []
        size = 0
        for chunk in chunks:
            gathered.append(chunk)
            size += len(chunk)
            if size >= ENCRYPT_SIZE:
                break
        return self.send(b"".join(gathered))

    def _flush(self) -> None:
        """Send what is encrypted, as far as it goes now."""
        if self._outgoing.pending:
            ciphertext = self._outgoing.read()
            self._unsent = b"".join((self._unsent, ciphertext)) if self._unsent else ciphertext
        while self._unsent:
            try:
                sent = self._inner.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                break
            self._unsent = memoryview(self._unsent)[sent:]

    def _flush_or_fail(self) -> None:
        """Send what is encrypted; a failure is kept for whoever receives or sends next.

        What the peer has sent before it left, an alert perhaps, is still there to be read.
        """
        try:
            self._flush()
        except Exception as exc:
            self._fail(exc)
        self._blocked = self._blocked or bool(self._unsent)
        if self._in_exchange():
            self._update_interest()
            if self._failure is not None and self._reading:
                self._read_again()
        else:
            self._inner.set_writing(bool(self._unsent))

    def _fail(self, exc: Exception) -> None:
        self._failure = exc
        self._unsent = b""
        self._more = self._blocked = True

    def send_eof(self) -> None:
        raise NotImplementedError  # `can_write_eof` is false: TLS 1.2 has no half-closed state.

    # The third phase.

    def finish(self, done: Callable[[Exception | None, bool], None]) -> bool:
        if self._on_handshake is not None:
            return self._finish_handshake(done)
        if not self._in_exchange():
            return True
        self._reading = self._writing = False  # What is still in memory is nobody's to read any more.
        self._inner.open(self._farewell_readable, self._farewell_writable)
        try:
            over = self._advance_farewell()
        except Exception:
            self._unsent = b""
            raise
        self._on_finished = done
        if not over:
            self._timer = self._scheduler.call_later(self._options.shutdown_timeout, self._farewell_timed_out)
        elif not self._eof_reported:
            self._inner.set_reading(False)
            self._inner.set_writing(False)
            self._scheduler.call_internal(self._farewell_over)  # The caller must not hear of it before this returns.
        elif self._inner.finish(self._finished_below):
            self._on_finished = None
            return True
        return False

    def _finish_handshake(self, done: Callable[[Exception | None, bool], None]) -> bool:
        """Send what is to be sent in the clear before the handshake; only the channel below takes leave of anybody."""
        self._inner.set_reading(False)
        if not self._unsent:
            self._cancel_timer()
            if self._inner.finish(self._finished_below):
                return True
        self._on_finished = done
        return False

    def _farewell_readable(self) -> None:
        try:
            count = self._receive_ciphertext()
        except (BlockingIOError, InterruptedError):
            return
        except Exception as exc:  # As in `_handshake_readable`.
            self._finished(exc)
            return
        if not count:
            self._eof = True
            self._inner.set_reading(False)
        self._farewell_writable()

    def _farewell_writable(self) -> None:
        try:
            over = self._advance_farewell()
        except Exception as exc:  # An `OSError`, or what a context of another kind raises.
            self._finished(exc)
            return
        if over:
            self._farewell_over()

    def _advance_farewell(self) -> bool:
        """Say `close_notify` and look for the peer's; return whether there is nothing to wait for any more."""
        try:
            # Before OpenSSL is told, because it takes data that is there by then for an error.
            while count := self._read(RECEIVE_SIZE, self._plaintext):
                self._discarded += count
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        else:
            self._eof = self._info["close_notify"] = True
        try:
            self._flush()
        except ConnectionError:
            if not self._eof:
                raise
            self._unsent = b""  # The peer has left and misses nothing but our farewell.
        self._inner.set_writing(bool(self._unsent))
        # What comes behind the end is no TLS, and nobody would take it out of memory.
        self._inner.set_reading(not self._eof and len(self._unsent) <= ANSWERS_LIMIT)
        return (self._eof or self._discarded > DISCARD_LIMIT) and not self._unsent

    def _farewell_timed_out(self) -> None:
        self._finished(TimeoutError(f"the TLS shutdown took longer than {self._options.shutdown_timeout} seconds"))

    def _farewell_over(self) -> None:
        """Let the channel below take leave in its turn: it may be TLS too."""
        if self._on_finished is None:
            return  # Closed meanwhile.
        self._cancel_timer()
        try:
            over = self._inner.finish(self._finished_below)
        except Exception as exc:
            self._finished(exc)
            return
        if over:
            self._finished(None)

    def _finished_below(self, exc: Exception | None, eof: bool) -> None:
        self._finished(exc)

    def _finished(self, exc: Exception | None) -> None:
        self._cancel_timer()
        # Nothing is waited for any more: of a failure below, readiness would be reported over and over.
        self._unsent = b""
        self._inner.set_reading(False)
        self._inner.set_writing(False)
        done, self._on_finished = self._on_finished, None
        if done is not None:
            done(exc, self._eof and exc is None)

    def close(self, *, aborted: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._cancel_timer()
        self._on_finished = None
        self._inner.set_reading(False)
        self._inner.set_writing(False)
        self._inner.close(aborted=aborted)
        self._handshake_over(
            ConnectionAbortedError(errno.ECONNABORTED, "the connection was closed during its TLS handshake")
        )
        # No cycles: a server may see many connections fail, and OpenSSL's memory is not the collector's to weigh.
        self._inner.open(_ignore, _ignore)
        self.open(_ignore, _ignore)
        self._failure = self._verdict = None

    def extra_info(self) -> dict[str, Any]:
        # The transport keeps this very dictionary, and so learns what becomes known later.
        self._info = {**self._inner.extra_info(), "sslcontext": self._options.context, **self._info}
        return self._info
