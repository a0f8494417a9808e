"""The first phase of a TLS connection: the handshake. Nothing reaches a transport, which mostly does not exist yet."""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._errors import logger

if TYPE_CHECKING:
    from ._tls_wire import Wire


# How long, in seconds, the alert of a peer that has left may take through the tasks of a stream below.
TIME_FOR_AN_ALERT = 0.5


class Handshake:
    """One handshake over `wire`, which has it to itself meanwhile."""

    __slots__ = ("_begin_exchange", "_call", "_cut_off", "_done", "_stopped", "_verdict", "_wire")

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._call = wire.scheduler.user_call()  # A server name callback is the user's, and may ask for its context.
        self._done: Callable[[Exception | None], None] | None = None
        self._verdict: Exception | None = None  # Why the handshake failed, while the peer is being told.
        self._cut_off: Exception | None = None  # That the peer has left, while what it said before is awaited.
        self._stopped = False  # The wire is somebody else's.

    def begin(self, begin_exchange: Callable[[dict[str, Any]], None], done: Callable[[Exception | None], None]) -> None:
        """Call `begin_exchange` with what is known of the connection, then `done`; or only `done`, with an error."""
        self._begin_exchange = begin_exchange
        self._done = done
        wire = self._wire
        wire.limit(wire.options.handshake_timeout, self._timed_out)
        wire.inner.open(self._readable, self._writable)
        try:
            wire.inner.set_reading(True)
        except OSError as exc:  # The system watches as many descriptors as it may.
            self._fail(exc)
            return
        self._advance()

    def stop(self) -> None:
        """Give the wire away. `done` is still called, by `end` or when the time is over."""
        self._stopped = True
        self._wire.inner.set_reading(False)

    def end(self, exc: Exception | None) -> None:
        """Call `done`, unless that has happened."""
        self._stopped = True
        self._verdict = self._cut_off = None  # Their tracebacks have frames of ours: no cycle.
        done, self._done = self._done, None
        if done is None:
            return
        self._wire.lift_limit()
        if logger.isEnabledFor(logging.DEBUG):
            self._log(exc)
        done(exc)

    def _readable(self) -> None:
        try:
            count = self._wire.receive()
        except (BlockingIOError, InterruptedError):
            return
        except Exception as exc:  # An `OSError`, or what a context of another kind raises in the TLS below.
            self._fail(self._cut_off or exc)
            return
        if not count:
            gone = ConnectionResetError(errno.ECONNRESET, "the peer left during the TLS handshake")
            self._fail(self._cut_off or gone)
            return
        self._advance()

    def _advance(self) -> None:
        tls = self._wire.tls
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
            self._verdict = exc  # The peer is told.
            self._wire.inner.set_reading(False)
        else:
            self._begin_exchange(info)
            self.end(None)
            return
        if not self._stopped:  # A server name callback may have closed the connection.
            self._writable()

    def _writable(self) -> None:
        wire = self._wire
        if self._cut_off is None:
            try:
                wire.flush()
                wire.inner.set_writing(bool(wire.unsent))
            except (BrokenPipeError, ConnectionResetError) as exc:
                self._await_alert(exc)
            except Exception as exc:
                self._fail(self._verdict or exc)
                return
        if self._verdict is not None and (self._cut_off is not None or not wire.unsent):
            self._fail(self._verdict)

    def _await_alert(self, exc: Exception) -> None:
        """Go on receiving from a peer that has left: it may have said why."""
        self._cut_off = exc
        self._wire.inner.set_writing(False)
        self._wire.lift_limit()
        self._wire.limit(TIME_FOR_AN_ALERT, self._timed_out)

    def _timed_out(self) -> None:
        seconds = self._wire.options.handshake_timeout
        self._fail(
            self._verdict
            or self._cut_off
            or ConnectionAbortedError(errno.ECONNABORTED, f"the TLS handshake took longer than {seconds} seconds")
        )

    def _fail(self, exc: Exception) -> None:
        # Linux tells a sender of the peer's leaving by EPIPE and a receiver by ECONNRESET: here it is one thing.
        if isinstance(exc, BrokenPipeError):
            reset = ConnectionResetError(errno.ECONNRESET, "the peer left")
            reset.__cause__ = exc
            exc = reset
        self._wire.rest()
        self.end(exc)

    def _log(self, exc: Exception | None) -> None:
        try:
            peername = self._wire.inner.extra_info().get("peername")
        except Exception:  # Of a stream that looks it up when it is asked, and whose peer has left.
            peername = None
        if exc is not None:
            logger.debug("TLS handshake with %r failed: %r", peername, exc)
        else:
            tls = self._wire.tls
            cipher = tls.cipher()
            logger.debug("TLS handshake with %r done: %s, %s", peername, tls.version(), cipher and cipher[0])
