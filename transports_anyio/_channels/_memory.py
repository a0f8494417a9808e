"""Two ends joined back to back in memory, without the operating system.

It behaves as a pair of UNIX stream sockets: what was sent before the other end closed can still be received, an end
that closes with something unread resets the other one, and sending to an end that is closed is a broken pipe.
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
    """What is under way from one end to the other."""

    __slots__ = ("abandoned", "capacity", "data", "ended", "reset", "wake_receiver", "wake_sender")

    #: Called when there may be something to do for an end; set by each.
    wake_receiver: Callable[[], None]
    wake_sender: Callable[[], None]

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = False  # Nothing comes behind what is under way.
        self.abandoned = False  # Nobody receives any more.
        self.reset = False  # The sender has left with something unread: the receiver is told of it once.


class MemoryChannel(StreamChannel):
    """One end of a connection in memory; `pair` makes both."""

    __slots__ = (
        "_call_soon",
        "_chunk_size",
        "_incoming",
        "_info",
        "_outgoing",
        "_read_ready",
        "_reading",
        "_turn_asked",
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
        """`call_soon` calls something in the next turn."""
        self._incoming = incoming
        self._outgoing = outgoing
        self._call_soon = call_soon
        self._chunk_size = chunk_size or RECEIVE_SIZE  # As from a socket.
        self._info = info
        self._reading = self._writing = self._turn_asked = False
        incoming.wake_receiver = outgoing.wake_sender = self._ask_for_turn

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        self._ask_for_turn()

    def set_writing(self, writing: bool) -> None:
        self._writing = writing
        self._ask_for_turn()

    # Readiness is a state, as in a selector: an end has a turn as long as there is something that it waits for.

    @property
    def _can_receive(self) -> bool:
        return self._reading and bool(self._incoming.data or self._incoming.ended)

    @property
    def _can_send(self) -> bool:
        outgoing = self._outgoing
        return self._writing and (outgoing.abandoned or len(outgoing.data) < outgoing.capacity)

    def _ask_for_turn(self) -> None:
        if not self._turn_asked and (self._can_receive or self._can_send):
            self._turn_asked = True
            self._call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_asked = False
        if self._can_receive:
            self._read_ready()
        if self._can_send:
            self._write_ready()
        self._ask_for_turn()

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
        room = outgoing.capacity - len(outgoing.data)
        if not room:
            raise BlockingIOError
        taken = data[:room]
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
    """Return two channels that are joined; at most `chunk_size` bytes are received at a time."""
    to_a, to_b = Direction(buffer_size), Direction(buffer_size)
    return (
        MemoryChannel(to_a, to_b, call_soon, chunk_size, info_a),
        MemoryChannel(to_b, to_a, call_soon, chunk_size, info_b),
    )
