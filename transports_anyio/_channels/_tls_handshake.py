"""The first phase of a TLS connection: the handshake.

Holds: one handshake, its time-out and its errors. The transport mostly does not exist yet.
May know: the TLS engine, errors.
"""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._errors import logger

if TYPE_CHECKING:
    from ._tls_engine import TLSEngine


# How long, in seconds, to wait for the alert of a peer that has left: an AnyIO stream below receives in a task.
TIME_FOR_AN_ALERT = 0.5


class Handshake:
    """One handshake. Until it ends, nothing else uses the engine."""

    __slots__ = ("_call", "_connected", "_done", "_engine", "_handshake_error", "_peer_error", "_stopped")

    def __init__(self, engine: TLSEngine) -> None:
        self._engine = engine
        self._call = (
            engine.scheduler.new_user_call()
        )  # A server name callback is the user's, and may ask for its context.
        self._done: Callable[[Exception | None], None] | None = None
        self._handshake_error: Exception | None = None  # Why the handshake failed; the alert is still being sent.
        self._peer_error: Exception | None = None  # The peer has left; its alert may still arrive.
        self._stopped = False  # A TLS shutdown uses the engine now.

    def begin(self, connected: Callable[[dict[str, Any]], None], done: Callable[[Exception | None], None]) -> None:
        """Call `connected` with the extra info of the connection, then `done(None)`; or only `done`, with an error."""
        self._connected = connected
        self._done = done
        engine = self._engine
        engine.start_timeout(engine.options.handshake_timeout, self._timed_out)
        engine.inner.set_callbacks(self._readable, self._writable)
        try:
            engine.inner.set_reading(True)
        except OSError as exc:  # The system watches as many descriptors as it may.
            self._fail(exc)
            return
        self._advance()

    def stop(self) -> None:
        """Stop using the engine. `done` is still called, by `end` or at the time-out."""
        self._stopped = True
        self._engine.inner.set_reading(False)

    def end(self, exc: Exception | None) -> None:
        """Call `done`, unless it has been called."""
        self._stopped = True
        self._handshake_error = self._peer_error = (
            None  # Their tracebacks have frames of this object: no reference cycle.
        )
        done, self._done = self._done, None
        if done is None:
            return
        self._engine.cancel_timeout()
        if logger.isEnabledFor(logging.DEBUG):
            self._log(exc)
        done(exc)

    def _readable(self) -> None:
        try:
            count = self._engine.receive()
        except (BlockingIOError, InterruptedError):
            return
        except Exception as exc:  # An `OSError`, or what a context of another kind raises in the TLS below.
            self._fail(self._peer_error or exc)
            return
        if not count:
            gone = ConnectionResetError(errno.ECONNRESET, "the peer left during the TLS handshake")
            self._fail(self._peer_error or gone)
            return
        self._advance()

    def _advance(self) -> None:
        tls = self._engine.tls
        try:
            self._call(tls.do_handshake)
            info = {
                "peercert": tls.getpeercert(),
                "cipher": tls.cipher(),
                "compression": tls.compression(),
                "ssl_object": tls,
            }
        except ssl.SSLWantReadError:
            pass
        except Exception as exc:  # `ssl.SSLError`, what a context of another kind raises, an unreadable certificate.
            self._handshake_error = exc  # OpenSSL has an alert for the peer, which is sent first.
            self._engine.inner.set_reading(False)
        else:
            self._connected(info)
            self.end(None)
            return
        if not self._stopped:  # A server name callback may have closed the connection.
            self._writable()

    def _writable(self) -> None:
        engine = self._engine
        if self._peer_error is None:
            try:
                engine.flush()
                engine.inner.set_writing(bool(engine.unsent))
            except (BrokenPipeError, ConnectionResetError) as exc:
                self._await_alert(exc)
            except Exception as exc:
                self._fail(self._handshake_error or exc)
                return
        if self._handshake_error is not None and (self._peer_error is not None or not engine.unsent):
            self._fail(self._handshake_error)

    def _await_alert(self, exc: Exception) -> None:
        """Go on receiving from a peer that has left: its alert may say why."""
        self._peer_error = exc
        self._engine.inner.set_writing(False)
        self._engine.cancel_timeout()
        self._engine.start_timeout(TIME_FOR_AN_ALERT, self._timed_out)

    def _timed_out(self) -> None:
        seconds = self._engine.options.handshake_timeout
        self._fail(
            self._handshake_error
            or self._peer_error
            or ConnectionAbortedError(errno.ECONNABORTED, f"the TLS handshake took longer than {seconds} seconds")
        )

    def _fail(self, exc: Exception) -> None:
        # On Linux a lost peer is EPIPE when sending and ECONNRESET when receiving. Report ECONNRESET for both.
        if isinstance(exc, BrokenPipeError):
            reset = ConnectionResetError(errno.ECONNRESET, "the peer left")
            reset.__cause__ = exc
            exc = reset
        self._engine.stop_io()
        self.end(exc)

    def _log(self, exc: Exception | None) -> None:
        try:
            peername = self._engine.inner.extra_info().get("peername")
        except Exception:  # Of a stream that looks it up when it is asked, and whose peer has left.
            peername = None
        if exc is not None:
            logger.debug("TLS handshake with %r failed: %r", peername, exc)
        else:
            tls = self._engine.tls
            cipher = tls.cipher()
            logger.debug("TLS handshake with %r done: %s, %s", peername, tls.version(), cipher and cipher[0])
