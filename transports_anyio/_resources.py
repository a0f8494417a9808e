"""What a group owns, and ends with itself: transports, and the TLS handshakes that come before some of them.

May know: the TLS channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ._channels._tls import TLSChannel


class Resource(Protocol):
    """What a group owns: a transport of any kind."""

    def close(self) -> None: ...
    def abort(self) -> None: ...
    def _traffic(self) -> tuple[int, int, int]: ...
    def is_writing_paused(self) -> bool: ...


class PendingHandshake:
    """A TLS handshake under way, which the group owns until it is over; whoever began it hears of the outcome."""

    __slots__ = ("_add_resource", "_channel", "_over", "_remove_resource", "aborted", "failure")

    def __init__(
        self, channel: TLSChannel, add_resource: Callable[[Resource], None], remove_resource: Callable[[Resource], None]
    ) -> None:
        self._channel = channel
        self._add_resource = add_resource
        self._remove_resource = remove_resource
        self.aborted: bool = False  # By this side.
        self.failure: Exception | None = None

    def begin(self, over: Callable[[], None]) -> None:
        """Call `over` once, perhaps before this returns. The channel is closed after a failure."""
        self._over = over
        self._add_resource(self)
        self._channel.handshake(self._done)

    def _done(self, exc: Exception | None) -> None:
        self._remove_resource(self)
        self.failure = exc
        if exc is not None:
            self._channel.close(aborted=True)
        over = self._over
        del self._over  # It may well refer to this object: no cycle.
        over()

    def _traffic(self) -> tuple[int, int, int]:
        return 0, 0, 0  # Of the protocol's bytes there are none yet.

    def is_writing_paused(self) -> bool:
        return False

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self.aborted = True
        self._channel.close(aborted=True)
