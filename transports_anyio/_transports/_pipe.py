"""The transports of one-way pipes: stream transports with one direction.

Holds: what differs from a two-way stream.
May know: stream transports.

Source: https://docs.python.org/3/library/asyncio-eventloop.html#working-with-pipes
"""

from __future__ import annotations

import errno
import os

from ._base import OPEN
from ._stream import StreamTransport


class ReadPipeTransport(StreamTransport):
    """The reading end of a pipe. At end of file it closes, whatever `eof_received` returns."""

    __slots__ = ()

    def _broken(self, exc: BaseException, doing: str) -> None:
        super()._broken(exc, doing)
        # As asyncio: other errors than that of a terminal which has gone (EIO) are reported. That of `_watch_input`
        # is raised instead.
        if doing == "read" and isinstance(exc, OSError) and exc.errno != errno.EIO:
            self._callback_context.report(f"Fatal {doing} error on pipe transport", exc, self, self._protocol)


class WritePipeTransport(StreamTransport):
    """The writing end of a pipe. Closing it is its end of file, so `write_eof` does the same as `close`.

    When the reader has gone the connection ends: with `connection_lost(None)` while nothing is buffered, otherwise with
    a `BrokenPipeError`.
    """

    __slots__ = ()

    def _start(self) -> None:
        self._reading_paused = True  # There is nothing to read.
        super()._start()
        if self._state is OPEN and self._can_notice_hangup:
            self._watch_input()

    @property
    def _can_notice_hangup(self) -> bool:
        """Whether the system reports that the reader has gone while nothing is written."""
        return self._channel.can_notice_hangup

    def _read_ready(self) -> None:
        if self._channel.has_hung_up():
            self._reader_gone()
        else:
            # Input, on a file descriptor that can read too. It is not read, so it would be reported again and again
            # where the system does not distinguish it from a hang-up. The next write shows whether the reader has gone.
            self._channel.set_reading(False)

    def _reader_gone(self) -> None:
        """Drop what is buffered and end, with a `BrokenPipeError` if anything was buffered: the reader has gone."""
        error = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._lose(error if self._buffer.size else None, aborted=True)

    def resume_reading(self) -> None:
        """Do nothing: there is nothing to read."""

    def _describe(self) -> list[str]:
        return [part for part in super()._describe() if part != "reading paused"]

    def can_write_eof(self) -> bool:
        """Return whether `write_eof` is supported: always true."""
        return True

    def write_eof(self) -> None:
        """Send what is buffered, then close."""
        self.close()
