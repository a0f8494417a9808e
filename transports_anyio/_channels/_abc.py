"""What a stream transport asks of a channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

    class SizedBuffer(Buffer, Sized, Protocol):
        """What `get_buffer` returns: `len` says that it is not empty; its items may be more than a byte each."""


def joined(chunks: Iterable[bytes | memoryview], most: int) -> bytes | memoryview:
    """Return the first `most` bytes of `chunks` as one, for a channel that does not gather."""
    some: list[bytes | memoryview] = []
    size = 0
    for chunk in chunks:
        some.append(chunk[: most - size])  # All of it may be much more, and would be copied each time.
        size += len(some[-1])
        if size == most:
            break
    return some[0] if len(some) == 1 else b"".join(some)


class FileError(Exception):
    """A file cannot be sent, and the connection is as before; the cause is the `OSError` that says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class Channel(ABC):
    """Moves bytes without blocking, and says when it could move more.

    Errors are translated here, at the edge: a call that cannot move anything now raises `BlockingIOError`, and a
    connection that is broken raises an `OSError`. After a `send` that would block the same bytes are offered again,
    perhaps with more behind them.
    """

    __slots__ = ()

    is_two_way = True
    can_send = True
    can_write_eof = True
    can_send_file = False
    can_notice_hangup = False
    #: Whether what is written after `close` is dropped even while what came before is flushed, as asyncio does it.
    drops_after_close = False

    @abstractmethod
    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        """Remember whom to call; nothing is called before an interest is set."""

    @abstractmethod
    def set_reading(self, reading: bool) -> None:
        """Call `read_ready` whenever there is something to receive, or stop doing so."""

    @abstractmethod
    def set_writing(self, writing: bool) -> None:
        """Call `write_ready` whenever something can be sent, or stop doing so."""

    @abstractmethod
    def receive(self) -> bytes:
        """Return what has arrived, at least one byte; `b""` at the end of the stream."""

    @abstractmethod
    def receive_into(self, buffer: SizedBuffer, /) -> int:
        """Receive into `buffer` and return the number of bytes; 0 at the end of the stream."""

    @abstractmethod
    def send(self, data: bytes | bytearray | memoryview, /) -> int:
        """Send from the start of `data` and return how many bytes were taken."""

    @abstractmethod
    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        """Send from the start of `chunks`, gathered, and return how many bytes were taken."""

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send up to `count` bytes of a file from `offset` on and return how many were taken, 0 at its end.

        Only where `can_send_file`. An `OSError` is the connection's; `FileError` says that the file cannot be sent.
        """
        raise NotImplementedError

    @abstractmethod
    def send_eof(self) -> None:
        """Shut down the sending side."""

    def has_hung_up(self) -> bool:
        """Whether nobody can receive any more what is sent. Only where `can_notice_hangup`."""
        raise NotImplementedError

    def shutdown(self, done: Callable[[Exception | None, bool], None]) -> bool:
        """Take leave of the other end; everything has been sent. Return whether that is all over.

        Otherwise `done` is called once, later: with what went wrong, and whether the end of the stream was met.
        From now on nobody is told of readiness. `close` ends it at any time, and `done` is then not called.
        """
        return True

    @abstractmethod
    def close(self, *, aborted: bool) -> None:
        """Give everything back. `aborted` says that the other end need not be told politely."""

    @abstractmethod
    def extra_info(self) -> dict[str, Any]:
        """What `get_extra_info` of the transport knows."""
