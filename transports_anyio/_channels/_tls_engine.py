"""What the phases of a TLS connection share: OpenSSL, its way to the channel below, and a limit in time.

Memory buffers, and not a descriptor in OpenSSL's hands, because then OpenSSL reads only what it was fed:

- It can say `close_notify` while data of the peer is on its way. `SSL_shutdown` on a descriptor would read that data
  and break the connection ("application data after close notify").
- A connection that was cut is known from one that was closed, whatever the options of the context
  (`SSL_OP_IGNORE_UNEXPECTED_EOF`, which Python sets, makes them look the same).
- One `recv` takes many records, where OpenSSL would call `read` twice for each.
- The same code runs over sockets, streams, and TLS itself.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from ._receive_buffers import buffers

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ._abc import StreamChannel

# How much plaintext is encrypted before the ciphertext is sent. It bounds what waits, twice, behind a peer that does
# not read. Both sizes also bound what the memory buffers of a connection keep allocated once they were that full.
ENCRYPT_SIZE = 128 * 1024

# How much may wait for a peer that does not read before nothing more is received from it: what it sends may make
# OpenSSL answer (key updates), without end. What `TLSChannel.send` leaves waiting is less.
ANSWERS_LIMIT = 4 * ENCRYPT_SIZE


@dataclass(frozen=True)
class TLSOptions:
    """How one end of a connection speaks TLS; the time-outs are seconds.

    Raises `ValueError` for a context that is to check a name, without one.
    """

    context: ssl.SSLContext
    server_side: bool
    server_hostname: str | None
    handshake_timeout: float
    shutdown_timeout: float

    def __post_init__(self) -> None:
        # Python 3.14 says so too, but once connected; Pythons before leave the name unchecked.
        if self.context.check_hostname and not self.server_hostname:
            raise ValueError("check_hostname requires server_hostname")


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """Who calls back later, in the group's next turn or after a time; and who calls the user's code."""

    def new_user_call(self) -> Callable[..., Any]: ...
    def call_internal(self, callback: Callable[..., object], *args: Any) -> None: ...
    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Cancellable: ...


class TLSEngine:
    """OpenSSL, at work on two memory buffers, and the channel below, which moves the ciphertext.

    `unsent` is what the channel below has not taken yet: ciphertext, and in front of it what was written in the clear
    before the handshake. Raises `ValueError` for options that OpenSSL refuses.
    """

    __slots__ = (
        "_ciphertext",
        "_timer",
        "incoming",
        "inner",
        "options",
        "outgoing",
        "read",
        "scheduler",
        "tls",
        "unsent",
    )

    def __init__(self, inner: StreamChannel, options: TLSOptions, scheduler: Scheduler, unsent: bytes) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = options.context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=options.server_side,
            server_hostname=options.server_hostname,
        )
        # With a buffer, `read` returns a number.
        self.read = cast("Callable[[int, Buffer], int]", self.tls.read)
        self.inner = inner
        self.options = options
        self.scheduler = scheduler
        self.unsent: bytes | memoryview = unsent
        # Looked up once, and not for each message: of this thread, which is the group's.
        self._ciphertext = buffers.received
        self._timer: Cancellable | None = None

    def receive(self) -> int:
        """Give OpenSSL what the channel below has, and return how much that was, 0 at the end."""
        ciphertext = self._ciphertext
        count = self.inner.receive_into(ciphertext)
        self.incoming.write(ciphertext[:count])
        return count

    def flush(self) -> None:
        """Send what is encrypted, as far as it goes now."""
        if self.outgoing.pending:
            ciphertext = self.outgoing.read()
            self.unsent = b"".join((self.unsent, ciphertext)) if self.unsent else ciphertext
        while self.unsent:
            try:
                sent = self.inner.send(self.unsent)
            except (BlockingIOError, InterruptedError):
                break
            self.unsent = memoryview(self.unsent)[sent:]

    def may_receive(self) -> bool:
        """Whether the peer reads enough to be read from."""
        return len(self.unsent) <= ANSWERS_LIMIT

    def stop_io(self) -> None:
        """Wait for nothing any more: of a failure below, readiness would be reported over and over."""
        self.inner.set_reading(False)
        self.inner.set_writing(False)

    def start_timeout(self, seconds: float, on_timeout: Callable[[], None]) -> None:
        """Call `expired` after so many seconds, unless `lift_limit` comes before."""
        self._timer = self.scheduler.call_later(seconds, on_timeout)

    def cancel_timeout(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
