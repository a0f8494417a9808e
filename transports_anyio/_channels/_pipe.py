"""One end of a pipe, FIFO, socket or character device, non-blocking and in the group's poller."""

from __future__ import annotations

import os
import select
import socket
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from threading import RLock
from typing import TYPE_CHECKING, Any

from .._poller import Poller
from .._selector import HANGUP, READ
from ._abc import StreamChannel
from ._polled import Polled
from ._receive_buffers import RECEIVE_SIZE
from ._socket import GATHER_LIMIT, take_error_queue

if sys.platform == "linux":
    import fcntl

# What type checkers miss on Windows is ignored in this module: `require_pipes` comes first.

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What a pipe holds on Linux to begin with, in bytes: one read empties it. For a larger one the C library may map memory
# and take it back, most of it for nothing, at ten times the cost of a small read.
SYSTEM_SIZE = 64 * 1024

# What a pipe of ours holds, in bytes, once it carries bulk: neither side waits as often for the other. 64 MiB
# through a `cat` on another processor cost a fifth less than with 128 KiB (a quarter on trio), hardly less with more.
BULK_SIZE = 512 * 1024

# How many pipes are as large as that at once, half of what the system lets the pipes of all of a user's programs hold.
# What it would do then is make every new one, of whichever program, smaller.
BULK_PIPES = 64

# Descriptors that outlive us: whoever writes to them later must not meet another file.
STANDARD_STREAMS = range(3)


# Groups in several threads share what follows, and may share a file: held while it is looked at and changed, and so
# whether the file blocks. A signal handler that interrupts this may close a channel, too.
shared = RLock()

# The open channels on each file, by its device and inode: those that may have to agree on whether it blocks.
open_channels: dict[tuple[int, int], list[PipeChannel]] = {}


def require_pipes() -> None:
    """Raise `NotImplementedError` where a pipe has no descriptor that can be waited for: asyncio's error there."""
    if sys.platform == "win32":
        raise NotImplementedError(
            "this platform cannot wait for pipes: give an AnyIO stream to connect_stream(), or an AnyIO process to "
            "connect_process()"
        )


class PipeChannel(Polled, StreamChannel):
    """Moves bytes in one direction; the channel owns `pipe`, a file object, and closes it.

    The descriptor becomes non-blocking. That is a property of the open file, which other processes may share (a
    terminal, say), so `close` gives it back as it was; if other channels have the same open file (a terminal again, for
    input and output), the last of them does. Standard input, output and error are not closed.
    """

    __slots__ = ("_blocking", "_duplicate", "_file", "_input", "_pipe", "can_notice_hangup", "can_send")

    is_two_way = False
    can_write_eof = False
    drops_after_close = True

    #: Which descriptors are left open.
    outliving = STANDARD_STREAMS

    def __init__(self, poller: Poller, pipe: Any, *, writing: bool) -> None:
        fd = pipe.fileno()
        status = os.fstat(fd)
        mode = status.st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
            raise ValueError(f"a pipe, socket or character device was expected, got {pipe!r}")
        # One file object may be the end for both directions (a terminal's); each needs a descriptor to wait for.
        self._duplicate = poller.owner(fd) is not None
        super().__init__(poller, os.dup(fd) if self._duplicate else fd)
        self._pipe = pipe
        self.can_send = writing
        # A writing end has nothing to read: what it waits for is that its reader has gone.
        self._input = HANGUP if writing else READ
        # A terminal's hang-up cannot be told from its input; a FIFO's writing end looks hung up on macOS while data is
        # unread (CPython issue 145030), and on AIX always.
        self.can_notice_hangup = stat.S_ISSOCK(mode) or (
            stat.S_ISFIFO(mode) and not sys.platform.startswith(("darwin", "aix"))
        )
        self._file = status.st_dev, status.st_ino
        with shared:
            self._blocking = os.get_blocking(fd)  # type: ignore[attr-defined,unused-ignore]
            os.set_blocking(fd, False)  # type: ignore[attr-defined,unused-ignore]
            open_channels.setdefault(self._file, []).append(self)

    def set_reading(self, reading: bool) -> None:
        self._set_interest(self.interest | self._input if reading else self.interest & ~self._input)

    def receive(self) -> bytes:
        return os.read(self.fd, SYSTEM_SIZE)

    def receive_into(self, buffer: Buffer) -> int:
        return os.readv(self.fd, [buffer])  # type: ignore[attr-defined,no-any-return,unused-ignore]

    def send(self, data: bytes | bytearray | memoryview) -> int:
        return os.write(self.fd, data)

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        return os.writev(self.fd, list(islice(chunks, GATHER_LIMIT)))  # type: ignore[attr-defined,no-any-return,unused-ignore]

    def send_eof(self) -> None:
        raise NotImplementedError  # The end of a pipe is its close.

    def error_ready(self) -> bool:
        return isinstance(self._pipe, socket.socket) and take_error_queue(self._pipe) is not None

    def has_hung_up(self) -> bool:
        poll = select.poll()  # type: ignore[attr-defined,unused-ignore]
        # Asks for nothing but hang-ups and errors; that the other end of a TCP socket has gone is half a hang-up.
        poll.register(self.fd, getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def close(self, *, aborted: bool) -> None:
        self._poller.unregister(self)
        with shared:
            self._leave_file()

    def _leave_file(self) -> None:
        others = open_channels[self._file]
        others.remove(self)
        if not others:
            del open_channels[self._file]
        fd = self.number()
        if self._duplicate or fd >= 0:
            if self._blocking:
                self._block(others)
            if self._duplicate:
                os.close(self.fd)
        # The other direction may still need it.
        if fd >= 0 and fd not in self.outliving and all(other.number() != fd for other in others):
            self._pipe.close()

    def number(self) -> int:
        """Return the descriptor of `pipe`, -1 once somebody has closed it: the number may be somebody else's by now."""
        try:
            return int(self._pipe.fileno())
        except ValueError:
            return -1

    def _block(self, others: list[PipeChannel]) -> None:
        os.set_blocking(self.fd, True)  # type: ignore[attr-defined,unused-ignore]
        # The two ends of a pipe are one file, opened twice. Whether it is the same opening, only a try tells.
        for channel in others:
            if channel.takes_over_blocking():
                return

    def takes_over_blocking(self) -> bool:
        """Whether the open file has just become blocking: it is made non-blocking, and blocking again by `close`."""
        with suppress(OSError):  # Closed by somebody else.
            if os.get_blocking(self.fd):  # type: ignore[attr-defined,unused-ignore]
                os.set_blocking(self.fd, False)  # type: ignore[attr-defined,unused-ignore]
                self._blocking = True
                return True
        return False

    def extra_info(self) -> Mapping[str, Any]:
        return {"pipe": self._pipe}


#: The open channels on pipes that were enlarged.
enlarged: set[ChildPipeChannel] = set()


class ChildPipeChannel(PipeChannel):
    """One end of a pipe that we made for a child. It is enlarged when there is much in it, where the system can.

    Not before: the system limits what all the pipes of a user may hold, and most carry little.
    """

    __slots__ = ("_capacity", "_read_size")

    outliving = range(0)  # Where our standard streams are closed, a new pipe has their numbers.

    def __init__(self, poller: Poller, pipe: Any, *, writing: bool) -> None:
        super().__init__(poller, pipe, writing=writing)
        self._capacity: int | None = None  # In bytes; nobody has asked.
        self._read_size = SYSTEM_SIZE

    def receive(self) -> bytes:
        data = os.read(self.fd, self._read_size)
        # As much as there may be the next time: what is large is followed by more.
        self._read_size = SYSTEM_SIZE if len(data) < SYSTEM_SIZE else min(self._enlarge(), RECEIVE_SIZE)
        return data

    def set_writing(self, writing: bool) -> None:
        if writing:
            self._enlarge()  # There was no room for something, however it was sent.
        super().set_writing(writing)

    def close(self, *, aborted: bool) -> None:
        with shared:
            enlarged.discard(self)
        super().close(aborted=aborted)

    def _enlarge(self) -> int:
        """Return what the pipe holds: it has been enlarged, unless somebody has chosen its size."""
        if self._capacity is None:
            self._capacity = SYSTEM_SIZE
            if sys.platform == "linux":
                # An unprivileged user's pipes may be at their limit: then it stays as it is.
                with suppress(OSError), shared:
                    self._capacity = fcntl.fcntl(self.fd, fcntl.F_GETPIPE_SZ)
                    if self._capacity == SYSTEM_SIZE and len(enlarged) < BULK_PIPES:
                        self._capacity = fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, BULK_SIZE)
                        enlarged.add(self)
        return self._capacity
