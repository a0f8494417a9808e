"""What the phases of a TLS connection share: OpenSSL, the channel below, and a time-out.

OpenSSL works on memory buffers and not on a file descriptor, so it reads only what it is given:

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

# How many bytes of plaintext are encrypted before the ciphertext is sent. It bounds what is buffered, twice, for a peer
# that does not read. Both sizes also bound the memory that a connection's buffers keep allocated.
ENCRYPT_SIZE = 128 * 1024

# How many bytes may wait for a peer that does not read before nothing more is received from it: its messages may make
# OpenSSL answer without end (key updates). `TLSChannel.send` leaves less waiting.
ANSWERS_LIMIT = 4 * ENCRYPT_SIZE


@dataclass(frozen=True)
class TLSOptions:
    """The TLS options of one end of a connection; time-outs are in seconds.

    Raises `ValueError` for a context that is to check a name, without one.
    """

    context: ssl.SSLContext
    server_side: bool
    server_hostname: str | None
    handshake_timeout: float
    shutdown_timeout: float

    def __post_init__(self) -> None:
        # Python 3.14 raises this too, but once connected; earlier versions do not check the name.
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
        # Looked up once, not for each message. It is this thread's, and the group stays in this thread.
        self._ciphertext = buffers.received
        self._timer: Cancellable | None = None

    def receive(self) -> int:
        """Pass what has arrived to OpenSSL. Return how many bytes that were, 0 at the end of the stream."""
        ciphertext = self._ciphertext
        count = self.inner.receive_into(ciphertext)
        self.incoming.write(ciphertext[:count])
        return count

    def flush(self) -> None:
        """Send as much of what is encrypted as can be sent now."""
        if self.outgoing.pending:
            ciphertext = self.outgoing.read()
            self.unsent = b"".join((self.unsent, ciphertext)) if self.unsent else ciphertext
        while self.unsent:
            try:
                # Not `send`, which may take what it sends later: the phases know what becomes of their messages.
                sent = self.inner.send_many((self.unsent,))
            except (BlockingIOError, InterruptedError):
                break
            self.unsent = memoryview(self.unsent)[sent:]

    def may_receive(self) -> bool:
        """Return whether to receive: not while too many answers wait for a peer that does not read."""
        return len(self.unsent) <= ANSWERS_LIMIT

    def stop_io(self) -> None:
        """Stop waiting for the channel below: after an error it would be reported ready again and again."""
        self.inner.set_reading(False)
        self.inner.set_writing(False)

    def start_timeout(self, seconds: float, on_timeout: Callable[[], None]) -> None:
        """Call `on_timeout` after `seconds`, unless `cancel_timeout` is called before."""
        self._timer = self.scheduler.call_later(seconds, on_timeout)

    def cancel_timeout(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
