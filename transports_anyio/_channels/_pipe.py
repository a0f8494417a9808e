"""A channel over one end of a pipe, FIFO, socket or character device.

Holds: the channel, the one for pipes of a child, and which channels share an open file.
May know: `_abc`, `_polled`, `_receive_buffers`, `_socket`, `_poller`, `_selector`, `fcntl`, `os`, `select`, `socket`.
"""

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

if sys.platform != "win32":
    import fcntl

# The `type: ignore` comments are for Windows, where channels of `_threaded_pipe` are used instead.

if TYPE_CHECKING:
    from typing_extensions import Buffer

# The default capacity of a pipe on Linux, in bytes: one read empties it. For a larger read the C library may map and
# unmap memory, most of it unused, at ten times the cost of a small read.
SYSTEM_SIZE = 64 * 1024

# The capacity of a child's pipe that carries bulk data, in bytes: the two sides wait for each other less often. 64 MiB
# through a `cat` on another processor cost a fifth less than with 128 KiB (a quarter on trio); more saves little.
BULK_SIZE = 512 * 1024

# How many pipes may have that capacity at once: half of the system's limit for all pipes of a user. Above the limit the
# system makes every new pipe of the user smaller, in all programs.
BULK_PIPES = 64

# File descriptors that are never closed: code that writes to them later must not write to another file.
STANDARD_STREAMS = range(3)


# Protects `open_channels`, `enlarged`, and whether an open file blocks, because groups in several threads share them.
# Reentrant, because a signal handler may close a channel.
shared = RLock()

# The open channels of each file, by its device and inode. They may share an open file, and with it whether it blocks.
open_channels: dict[tuple[int, int], list[PipeChannel]] = {}


def check_pipe(pipe: Any) -> os.stat_result:
    """Return the status of the file of `pipe`. Raises `ValueError` if it is a regular file, for example."""
    status = os.fstat(pipe.fileno())
    mode = status.st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
        raise ValueError(f"a pipe, socket or character device was expected, got {pipe!r}")
    return status


def file_number(pipe: Any) -> int:
    """Return the file descriptor of `pipe`, or -1 if other code has closed it: the number may be in use again."""
    try:
        return int(pipe.fileno())
    except ValueError:
        return -1


def sharing(fd: int, channels: list[PipeChannel]) -> PipeChannel | None:
    """Return the first of `channels` that uses the open file of `fd`.

    The two ends of a pipe have the same inode. Only a try shows whether two file descriptors have an open file in
    common: a property that changes for one changes for the other. This is O_APPEND, because it has no effect on these
    files. If the open file became blocking for the try, another thread could hang in a system call.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)  # type: ignore[name-defined,unused-ignore]
    before = [channel.appends() for channel in channels]
    fcntl.fcntl(fd, fcntl.F_SETFL, flags ^ os.O_APPEND)  # type: ignore[name-defined,unused-ignore]
    after = [channel.appends() for channel in channels]
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)  # type: ignore[name-defined,unused-ignore]
    return next((channel for channel, old, new in zip(channels, before, after, strict=True) if old != new), None)


class PipeChannel(Polled, StreamChannel):
    """Moves bytes in one direction. The channel owns `pipe`, a file object, and closes it.

    The file descriptor becomes non-blocking. Other processes may share the open file, and with it that property (a
    terminal, for example), so `close` restores it. If several channels share the open file (a terminal for input and
    output), the last one restores it. Standard input, output and error are not closed.
    """

    __slots__ = ("_blocking", "_duplicate", "_file", "_input", "_pipe", "can_notice_hangup", "can_send")

    is_two_way = False
    can_write_eof = False
    drops_after_close = True

    #: The file descriptors that are not closed.
    kept_open = STANDARD_STREAMS

    def __init__(self, poller: Poller, pipe: Any, *, writing: bool) -> None:
        status = check_pipe(pipe)
        mode = status.st_mode
        fd = pipe.fileno()
        # One file object may serve both directions (a terminal). Each needs a file descriptor of its own in the poller.
        self._duplicate = poller.owner(fd) is not None
        super().__init__(poller, os.dup(fd) if self._duplicate else fd)
        self._pipe = pipe
        self.can_send = writing
        # A writing end has nothing to read, but waits until its reader has closed.
        self._input = HANGUP if writing else READ
        # A terminal reports a hang-up like input. The writing end of a FIFO counts as hung up while
        # data is unread on macOS (CPython issue 145030), and always on AIX.
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
        raise NotImplementedError  # To end a pipe is to close it.

    def error_ready(self) -> bool:
        return isinstance(self._pipe, socket.socket) and take_error_queue(self._pipe) is not None

    def has_hung_up(self) -> bool:
        poll = select.poll()  # type: ignore[attr-defined,unused-ignore]
        # Only for hang-ups and errors. A TCP socket whose peer has closed is half hung up: POLLRDHUP.
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
                heir = sharing(self.fd, others) if others else None
                if heir is None:
                    os.set_blocking(self.fd, True)  # type: ignore[attr-defined,unused-ignore]
                else:
                    heir.restore_blocking()
            if self._duplicate:
                os.close(self.fd)
        # The other direction may still use the file object.
        if fd >= 0 and fd not in self.kept_open and all(other.number() != fd for other in others):
            self._pipe.close()

    def number(self) -> int:
        """Return the file descriptor of the file object, or -1 if other code has closed it."""
        return file_number(self._pipe)

    def restore_blocking(self) -> None:
        """Let `close` make the open file blocking."""
        self._blocking = True

    def appends(self) -> bool | None:
        """Return whether O_APPEND is set for the open file, or `None` if other code has closed it."""
        try:
            return bool(fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND)  # type: ignore[name-defined,unused-ignore]
        except OSError:
            return None

    def extra_info(self) -> Mapping[str, Any]:
        return {"pipe": self._pipe}


#: The open channels of enlarged pipes.
enlarged: set[ChildPipeChannel] = set()


class ChildPipeChannel(PipeChannel):
    """One end of a pipe that was made for a child. Linux lets it be enlarged once it carries bulk data.

    Not earlier: the system limits the capacity of all pipes of a user, and most pipes carry little.
    """

    __slots__ = ("_capacity", "_read_size")

    kept_open = range(0)  # If our standard streams are closed, a new pipe gets their numbers.

    def __init__(self, poller: Poller, pipe: Any, *, writing: bool) -> None:
        super().__init__(poller, pipe, writing=writing)
        self._capacity: int | None = None  # In bytes; `None` until it is needed.
        self._read_size = SYSTEM_SIZE

    def receive(self) -> bytes:
        data = os.read(self.fd, self._read_size)
        # How much to read the next time: a large read is likely to be followed by another.
        self._read_size = SYSTEM_SIZE if len(data) < SYSTEM_SIZE else min(self._enlarge(), RECEIVE_SIZE)
        return data

    def set_writing(self, writing: bool) -> None:
        if writing:
            self._enlarge()  # The pipe was full.
        super().set_writing(writing)

    def close(self, *, aborted: bool) -> None:
        with shared:
            enlarged.discard(self)
        super().close(aborted=aborted)

    def _enlarge(self) -> int:
        """Enlarge the pipe unless its size was chosen by the user, and return its capacity."""
        if self._capacity is None:
            self._capacity = SYSTEM_SIZE
            if sys.platform == "linux":
                # The pipes of an unprivileged user may have reached the limit: the pipe keeps its size.
                with suppress(OSError), shared:
                    self._capacity = fcntl.fcntl(self.fd, fcntl.F_GETPIPE_SZ)
                    if self._capacity == SYSTEM_SIZE and len(enlarged) < BULK_PIPES:
                        self._capacity = fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, BULK_SIZE)
                        enlarged.add(self)
        return self._capacity
