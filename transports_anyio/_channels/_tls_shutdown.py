"""The last phase of a TLS connection: both ends send `close_notify`, then the channel below shuts down.

Holds: the shutdown with and without TLS, and its time-out.
May know: the TLS engine.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._receive_buffers import RECEIVE_SIZE, buffers

if TYPE_CHECKING:
    from ._tls_engine import TLSEngine

# How many bytes a peer may still send after our `close_notify` before the connection ends without the peer's.
# What is in flight when we close should fit; an endless download should not be read to the end.
DISCARD_LIMIT = 1024 * 1024


class PlainShutdown:
    """The shutdown of a connection that is closed during its handshake, without `close_notify`.

    What is unsent is sent first. The handshake's time-out still applies.
    """

    __slots__ = ("_done", "_engine", "_eof")

    def __init__(self, engine: TLSEngine, done: Callable[[Exception | None, bool], None]) -> None:
        self._engine = engine
        self._done: Callable[[Exception | None, bool], None] | None = done
        self._eof = False  # The peer has sent `close_notify`, or left.

    def begin(self) -> bool:
        """Begin, as `StreamChannel.shutdown` does."""
        self._engine.inner.set_callbacks(self._readable, self._writable)
        return not self._engine.unsent and self._shut_inner_down()  # Writing is watched already if something is unsent.

    def abandon(self) -> None:
        """Do not call `done` any more."""
        self._done = None

    def _readable(self) -> None: ...

    def _writable(self) -> None:
        try:
            over = self._advance()
        except Exception as exc:  # An `OSError`, or what a context of another kind raises.
            self._end(exc)
            return
        if over:
            self._shut_inner_down_or_fail()

    def _advance(self) -> bool:
        """Do what can be done now. Return whether only the channel below remains to be shut down."""
        engine = self._engine
        engine.flush()
        engine.inner.set_writing(bool(engine.unsent))
        return not engine.unsent

    def _shut_inner_down(self) -> bool:
        """Shut down the channel below, which may be TLS too. Return whether that is complete."""
        self._engine.cancel_timeout()
        return self._engine.inner.shutdown(self._inner_finished)

    def _shut_inner_down_or_fail(self) -> None:
        if self._done is None:
            return  # `abandon` was called.
        try:
            over = self._shut_inner_down()
        except Exception as exc:
            self._end(exc)
            return
        if over:
            self._end(None)

    def _inner_finished(self, exc: Exception | None, eof: bool) -> None:
        self._end(exc)

    def _end(self, exc: Exception | None) -> None:
        self._engine.cancel_timeout()
        self._engine.stop_io()
        done, self._done = self._done, None
        if done is not None:
            done(exc, self._eof and exc is None)


class TLSShutdown(PlainShutdown):
    """The TLS shutdown of a connection. Data that still arrives is dropped, up to a limit.

    eof: whether the transport has received the end of the stream already.
    info: extra info, which a `close_notify` is noted in.
    """

    __slots__ = ("_discarded", "_info")

    def __init__(
        self, engine: TLSEngine, done: Callable[[Exception | None, bool], None], info: dict[str, Any], *, eof: bool
    ) -> None:
        super().__init__(engine, done)
        self._info = info
        self._eof = eof
        self._discarded = 0

    def begin(self) -> bool:
        engine = self._engine
        engine.inner.set_callbacks(self._readable, self._writable)
        if not self._advance():
            engine.start_timeout(engine.options.shutdown_timeout, self._timed_out)
            return False
        engine.stop_io()
        # Not at once: a task that has read to the end may call asyncio's `StreamWriter.drain`, which raises after
        # `connection_lost`. asyncio's transports take as many iterations.
        call_internal = engine.scheduler.call_internal
        call_internal(call_internal, self._shut_inner_down_or_fail)
        return False

    def _readable(self) -> None:
        try:
            count = self._engine.receive()
        except (BlockingIOError, InterruptedError):
            return
        except Exception as exc:  # As in `_writable`.
            self._end(exc)
            return
        if not count:
            self._eof = True
            self._engine.inner.set_reading(False)
        self._writable()

    def _advance(self) -> bool:
        engine = self._engine
        self._discard()
        try:
            engine.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        else:
            self._eof = self._info["close_notify"] = True
        try:
            engine.flush()
        except ConnectionError:
            if not self._eof:
                raise
            engine.unsent = b""  # The peer has left, so it does not need our `close_notify`.
        engine.inner.set_writing(bool(engine.unsent))
        # What follows the end is not TLS and is not read.
        engine.inner.set_reading(not self._eof and engine.may_receive())
        return (self._eof or self._discarded > DISCARD_LIMIT) and not engine.unsent

    def _discard(self) -> None:
        """Drop what has arrived: in `unwrap`, OpenSSL would treat data as an error."""
        plaintext = buffers.decrypted
        try:
            while count := self._engine.read(RECEIVE_SIZE, plaintext):
                self._discarded += count
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass

    def _timed_out(self) -> None:
        self._end(TimeoutError(f"the TLS shutdown took longer than {self._engine.options.shutdown_timeout} seconds"))
