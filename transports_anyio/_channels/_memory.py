"""Two connected channels in memory, without the operating system.

They behave as a pair of UNIX stream sockets: what was sent before the other end closed can still be received, an end
that closes with something unread resets the other one, and sending to a closed end raises `BrokenPipeError`.

Holds: the two directions of a connection in memory.
May know: the interface of channels.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ._abc import StreamChannel
from ._receive_buffers import RECEIVE_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Direction:
    """What has been sent from one end to the other and not received."""

    __slots__ = ("abandoned", "capacity", "data", "ended", "reset", "wake_receiver", "wake_sender")

    #: Called when an end may be able to receive or send. Each end sets its own.
    wake_receiver: Callable[[], None]
    wake_sender: Callable[[], None]

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = False  # Nothing follows `data`.
        self.abandoned = False  # The receiver is closed.
        self.reset = False  # The sender has closed with something unread: the receiver gets one error.


class MemoryChannel(StreamChannel):
    """One end of a connection in memory; `pair` creates both."""

    __slots__ = (
        "_call_soon",
        "_chunk_size",
        "_incoming",
        "_info",
        "_outgoing",
        "_read_ready",
        "_reading",
        "_scheduled",
        "_write_ready",
        "_writing",
    )

    def __init__(
        self,
        incoming: Direction,
        outgoing: Direction,
        call_soon: Callable[[Callable[[], None]], None],
        chunk_size: int | None,
        info: Mapping[str, Any],
    ) -> None:
        """`call_soon` schedules a callback for the next turn."""
        self._incoming = incoming
        self._outgoing = outgoing
        self._call_soon = call_soon
        self._chunk_size = chunk_size or RECEIVE_SIZE  # As from a socket.
        self._info = info
        self._reading = self._writing = self._scheduled = False
        incoming.wake_receiver = outgoing.wake_sender = self._schedule

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        self._schedule()

    def set_writing(self, writing: bool) -> None:
        self._writing = writing
        self._schedule()

    # Readiness is a state, as in a selector: an end is called again as long as it can do what it waits for.

    @property
    def _can_receive(self) -> bool:
        return self._reading and bool(self._incoming.data or self._incoming.ended)

    @property
    def _can_send(self) -> bool:
        outgoing = self._outgoing
        return self._writing and (outgoing.abandoned or len(outgoing.data) < outgoing.capacity)

    def _schedule(self) -> None:
        if not self._scheduled and (self._can_receive or self._can_send):
            self._scheduled = True
            self._call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        if self._can_receive:
            self._read_ready()
        if self._can_send:
            self._write_ready()
        self._schedule()

    def _take(self, most: int) -> bytes:
        incoming = self._incoming
        data = bytes(incoming.data[: min(most, self._chunk_size)])
        if data:
            del incoming.data[: len(data)]
            incoming.wake_sender()
        elif incoming.reset:
            incoming.reset = False
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        elif not incoming.ended:
            raise BlockingIOError
        return data

    def receive(self) -> bytes:
        return self._take(self._chunk_size)

    def receive_into(self, buffer: Buffer) -> int:
        with memoryview(buffer).cast("B") as view:
            data = self._take(len(view))
            view[: len(data)] = data
        return len(data)

    def send(self, data: bytes | bytearray | memoryview) -> int:
        outgoing = self._outgoing
        if outgoing.abandoned:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        space = outgoing.capacity - len(outgoing.data)
        if not space:
            raise BlockingIOError
        taken = data[:space]
        outgoing.data += taken
        outgoing.wake_receiver()
        return len(taken)

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        sent = 0
        for chunk in chunks:
            try:
                sent += self.send(chunk)
            except BlockingIOError:
                if not sent:
                    raise
                break
        return sent

    def send_eof(self) -> None:
        self._outgoing.ended = True
        self._outgoing.wake_receiver()

    def close(self, *, aborted: bool) -> None:
        self._reading = self._writing = False
        self._incoming.abandoned = True
        self._incoming.wake_sender()
        if self._incoming.data:
            self._incoming.data.clear()
            self._outgoing.reset = True
        self.send_eof()

    def extra_info(self) -> Mapping[str, Any]:
        return self._info


def pair(
    call_soon: Callable[[Callable[[], None]], None],
    *,
    chunk_size: int | None,
    buffer_size: int,
    info_a: Mapping[str, Any],
    info_b: Mapping[str, Any],
) -> tuple[MemoryChannel, MemoryChannel]:
    """Return two connected channels. At most `chunk_size` bytes are received at a time."""
    to_a, to_b = Direction(buffer_size), Direction(buffer_size)
    return (
        MemoryChannel(to_a, to_b, call_soon, chunk_size, info_a),
        MemoryChannel(to_b, to_a, call_soon, chunk_size, info_b),
    )
