"""Back-pressure: what is written but not yet sent, and the watermarks that pause the protocol.

Sizes are bytes. The rules are those of the asyncio documentation, section "Buffered Streaming Protocols" and
`WriteTransport.set_write_buffer_limits`: pause strictly above the high mark, resume at or under the low one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

DEFAULT_HIGH = 64 * 1024


def limits(high: int | None, low: int | None) -> tuple[int, int]:
    """Return the marks `(low, high)` with asyncio's defaults filled in; a bad pair is a `ValueError`."""
    if high is None:
        high = DEFAULT_HIGH if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        msg = f"high ({high!r}) must be >= low ({low!r}) must be >= 0"
        raise ValueError(msg)
    return low, high


class WriteBuffer:
    """Chunks waiting to be sent. Adding and taking count the size in one place each."""

    __slots__ = ("chunks", "high", "low", "paused", "size")

    def __init__(self) -> None:
        self.chunks: deque[bytes | memoryview] = deque()
        self.size = 0
        self.low, self.high = limits(None, None)
        self.paused = False

    def append(self, chunk: bytes | memoryview) -> None:
        self.chunks.append(chunk)
        self.size += len(chunk)

    def take(self, count: int) -> None:
        """Remove the first `count` bytes, which have been sent."""
        self.size -= count
        chunks = self.chunks
        while count:
            chunk = chunks.popleft()
            if len(chunk) > count:
                chunks.appendleft(memoryview(chunk)[count:])  # A view: what is left is not copied.
                return
            count -= len(chunk)

    def clear(self) -> None:
        self.chunks.clear()
        self.size = 0

    def update(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """Call `pause` or `resume` if the size has crossed a mark since the last call."""
        if self.paused:
            if self.size <= self.low:
                self.paused = False
                resume()
        elif self.size > self.high:
            self.paused = True
            pause()


def as_bytes_view(data: bytes | bytearray | memoryview) -> bytes | memoryview:
    """Return the bytes of `data`, one item each, whatever its item size and shape; views are not copied."""
    if type(data) is bytes:
        return data
    view = memoryview(data)
    if not view.c_contiguous or 0 in (view.shape or ()):
        return view.tobytes()
    return view.cast("B")
