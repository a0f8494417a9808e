"""A `start_tls` in progress, and its outcome.

Holds: the states and steps of passing a connection from one transport to another.
May know: the interface of channels, states, waiting.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from .._waiters import InterruptSafeEvent
from ._state import check_transition

if TYPE_CHECKING:
    from .._channels._abc import StreamChannel
    from .._channels._tls import TLSChannel
    from ._stream import StreamTransport


class UpgradeState(Enum):
    """The life of an upgrade."""

    HANDSHAKE = "handshake"
    UPGRADED = "upgraded"  # A new transport has the connection.
    FAILED = "failed"  # The connection is lost.


#: Every legal transition, with what causes it.
TRANSITIONS: Mapping[UpgradeState, Mapping[UpgradeState, str]] = {
    UpgradeState.HANDSHAKE: {
        UpgradeState.UPGRADED: "the handshake has succeeded",
        UpgradeState.FAILED: "the handshake has failed, or the connection was lost",
    },
    UpgradeState.UPGRADED: {},
    UpgradeState.FAILED: {},
}


class TLSUpgrade:
    """The passing of a connection from one transport to a new one, which encrypts it."""

    __slots__ = ("_failure", "_over", "plain", "state", "upgraded")

    def __init__(self, plain: StreamChannel) -> None:
        self.state = UpgradeState.HANDSHAKE
        #: The channel that was encrypted: the old transport's extra info is still that of this one.
        self.plain = plain
        #: The new transport, once there is one.
        self.upgraded: StreamTransport | None = None
        self._over = InterruptSafeEvent()
        self._failure: Exception | None = None

    def start_handshake(self, transport: StreamTransport, channel: TLSChannel) -> None:
        """Start the handshake of `channel`, which `transport` has from now on."""
        if transport.is_eof_received():
            self._done(transport, ConnectionResetError(errno.ECONNRESET, "the peer has ended the stream already"))
        else:
            channel.handshake(partial(self._done, transport))

    def _done(self, transport: StreamTransport, exc: Exception | None) -> None:
        closed = transport.is_closing()
        if exc is None:
            self.upgraded = transport._finish_upgrade()
        else:
            transport._fail_upgrade(exc)
        self._advance(UpgradeState.FAILED if self.upgraded is None else UpgradeState.UPGRADED)
        if exc is None and closed:
            exc = ConnectionAbortedError(errno.ECONNABORTED, "the transport was closed during the handshake")
            if self.upgraded is not None:  # What was written before the `close` is sent, encrypted.
                self.upgraded._resume_after_upgrade()
                self.upgraded.close()
        self._failure = exc
        self._over.set()

    def _advance(self, to: UpgradeState) -> None:
        """Change the state. An illegal transition raises and changes nothing."""
        check_transition(TRANSITIONS, self.state, to)
        self.state = to

    async def wait(self, transport: StreamTransport) -> StreamTransport:
        """Wait for the new transport of `transport`'s connection, which a cancellation aborts.

        Raises `ssl.SSLError` when the ends do not agree, `ConnectionResetError` when the peer leaves, and
        `ConnectionAbortedError` when the handshake takes too long or `transport` is closed.
        """
        try:
            await self._over.wait()
        except BaseException:
            self._failure = None
            transport.abort()
            raise
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            failure = None  # Its traceback has this frame: no reference cycle.
        upgraded = self.upgraded
        assert upgraded is not None
        upgraded._resume_after_upgrade()
        return upgraded
