"""What a group owns, and ends when it ends.

Holds: the contract of what a group owns, and pending TLS handshakes.
May know: `_channels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ._channels._tls import TLSChannel


class Resource(Protocol):
    """A transport of any kind."""

    def close(self) -> None: ...
    def _abort(self) -> None: ...
    def _request_shutdown(self) -> None: ...
    def _traffic(self) -> tuple[int, int, int]: ...
    def is_writing_paused(self) -> bool: ...


class PendingHandshake:
    """A TLS handshake in progress, whose connection has no transport yet."""

    __slots__ = ("_channel", "_done", "_members", "aborted")

    def __init__(
        self,
        channel: TLSChannel,
        members: Iterable[set[PendingHandshake]],
        done: Callable[[PendingHandshake, Exception | None], None],
    ) -> None:
        self._channel = channel
        self._members = tuple(members)
        self._done = done
        self.aborted: bool = False  # By this side.

    def begin(self) -> None:
        """Begin the handshake. `done` is called once, perhaps before this returns."""
        for each in self._members:
            each.add(self)
        self._channel.handshake(self._over)

    def _over(self, exc: Exception | None) -> None:
        for each in self._members:
            each.discard(self)
        if exc is not None:
            self._channel.close(aborted=True)
        done = self._done
        del self._done  # Break a cycle: it may refer to this object.
        done(self, exc)

    def abort(self) -> None:
        """End the handshake; `done` is called with an error."""
        self.aborted = True
        self._channel.close(aborted=True)
