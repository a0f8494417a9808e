"""Flow control: what is written but not yet sent, and the watermarks that pause the protocol.

Holds: the buffers of streams and datagrams.
May know: nothing.

Sizes are bytes. The rules are those of the asyncio documentation, section "Buffered Streaming Protocols" and
`WriteTransport.set_write_buffer_limits`: pause strictly above the high mark, resume at or under the low one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

DEFAULT_HIGH = 64 * 1024
DEFAULT_LOW = DEFAULT_HIGH // 4


def limits(high: int | None, low: int | None) -> tuple[int, int]:
    """Return the watermarks `(low, high)` with asyncio's defaults. Raises `ValueError` unless `high >= low >= 0`."""
    if high is None:
        high = DEFAULT_HIGH if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        msg = f"high ({high!r}) must be >= low ({low!r}) must be >= 0"
        raise ValueError(msg)
    return low, high


class Watermarks:
    """How many bytes are buffered, and whether the protocol is paused."""

    __slots__ = ("high", "low", "paused", "size")

    def __init__(self) -> None:
        self.size: int = 0
        self.low: int = DEFAULT_LOW
        self.high: int = DEFAULT_HIGH
        self.paused: bool = False

    def crossed(self) -> str | None:
        """Return the name of the callback that is due if the size has crossed a watermark since the last call."""
        if self.paused:
            if self.size <= self.low:
                self.paused = False
                return "resume_writing"
        elif self.size > self.high:
            self.paused = True
            return "pause_writing"
        return None


class WriteBuffer(Watermarks):
    """Chunks waiting to be sent. The size is counted here only."""

    __slots__ = ("chunks",)
    size: int

    def __init__(self) -> None:
        super().__init__()
        # A deque only while something is buffered: an empty one takes 760 bytes, a third of an idle connection.
        self.chunks: deque[bytes | memoryview] | tuple[()] = ()

    def append(self, chunk: bytes | memoryview) -> None:
        if self.chunks:
            self.chunks.append(chunk)
        else:
            self.chunks = deque((chunk,))
        self.size += len(chunk)

    def take(self, count: int) -> None:
        """Remove the first `count` bytes, which have been sent."""
        self.size -= count
        if not self.size:
            self.chunks = ()
            return
        chunks = self.chunks
        assert chunks
        while count:
            chunk = chunks.popleft()
            if len(chunk) > count:
                chunks.appendleft(memoryview(chunk)[count:])  # A view, not a copy.
                return
            count -= len(chunk)

    def clear(self) -> None:
        self.chunks = ()
        self.size = 0


# How many bytes a buffered datagram counts in addition to its data: asyncio's figure, the size of a UDP header (RFC
# 768). So empty datagrams count too.
DATAGRAM_HEADER_SIZE = 8


class DatagramBuffer(Watermarks):
    """Datagrams waiting to be sent, each with its address."""

    __slots__ = ("datagrams",)
    size: int

    def __init__(self) -> None:
        super().__init__()
        self.datagrams: deque[tuple[bytes, Any]] = deque()

    def append(self, data: bytes, address: Any) -> None:
        self.datagrams.append((data, address))
        self.size += len(data) + DATAGRAM_HEADER_SIZE

    def take(self) -> None:
        """Remove the first datagram, which has been sent."""
        data, _ = self.datagrams.popleft()
        self.size -= len(data) + DATAGRAM_HEADER_SIZE

    def clear(self) -> None:
        self.datagrams.clear()
        self.size = 0


# Chunks of at least this size, in bytes on average, are sent as they are; smaller ones cost less if they are joined.
LARGE_CHUNK = 4096

# Sample size: measuring all of a thousand small chunks would cost half as much as joining them.
CHUNKS_LOOKED_AT = 64


def are_large(chunks: list[Any]) -> bool:
    """Return whether `chunks` are sent as they are, not joined. They may be of any type: joining raises the error."""
    some = chunks[:CHUNKS_LOOKED_AT]
    try:
        return sum(map(len, some)) >= LARGE_CHUNK * len(some)
    except TypeError:
        return False


def as_bytes_view(data: bytes | bytearray | memoryview) -> bytes | memoryview:
    """Return the bytes of `data`, one item each, whatever its item size and shape; views are not copied."""
    if type(data) is bytes:
        return data
    view = data if type(data) is memoryview else memoryview(data)
    if view.ndim == view.itemsize == 1 and view.contiguous:
        return view
    if not view.c_contiguous or 0 in (view.shape or ()):
        return view.tobytes()
    return view.cast("B")


def copied_rest(views: Iterable[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    """Return what follows the first `count` bytes of `views`, copied unless it cannot change."""
    rest: list[bytes | memoryview] = []
    for view in views:
        if count >= len(view):
            count -= len(view)
            continue
        part = memoryview(view)[count:] if count else view
        count = 0
        rest.append(part if type(view) is bytes else bytes(part))
    return rest
