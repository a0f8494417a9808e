"""The transports of one-way pipes: the stream transport, less one direction.

Source: https://docs.python.org/3/library/asyncio-eventloop.html#working-with-pipes
"""

from __future__ import annotations

import errno
import os

from ._stream import StreamTransport


class ReadPipeTransport(StreamTransport):
    """The reading end of a pipe. At its end of file it closes, whatever `eof_received` answers."""

    __slots__ = ()

    def _broken(self, exc: BaseException, doing: str) -> None:
        super()._broken(exc, doing)
        # As asyncio: a terminal that has gone (EIO) is no error, anything else is. What cannot be waited for is raised.
        if doing == "read" and isinstance(exc, OSError) and exc.errno != errno.EIO:
            self._callback_context.report(f"Fatal {doing} error on pipe transport", exc, self, self._protocol)


class WritePipeTransport(StreamTransport):
    """The writing end of a pipe. To close it is its end of file, so `write_eof` does the same as `close`.

    When its reader has gone it ends: with `connection_lost(None)` while nothing is buffered, with a `BrokenPipeError`
    otherwise.
    """

    __slots__ = ()

    def start(self) -> None:
        self._reading_paused = True
        super().start()
        if not self._closing and self.can_notice_hangup:
            self._await_input()

    @property
    def can_notice_hangup(self) -> bool:
        """Whether it shows that the reader has gone while nothing is written."""
        return self._channel.can_notice_hangup

    def _read_ready(self) -> None:
        if self._channel.has_hung_up():
            self.reader_gone()
        else:
            # Input, which a descriptor that can do both may get, and nobody here wants. Where the system cannot tell it
            # from a hang-up it would be reported for ever; that the reader has gone shows at the next write.
            self._channel.set_reading(False)

    def reader_gone(self) -> None:
        """Drop what is buffered and end, with a `BrokenPipeError` if anything was: its reader has gone."""
        error = BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._lose(error if self._buffer.size else None, aborted=True)

    def resume_reading(self) -> None:
        """Do nothing: there is nothing to read, and no pause may end the watch for the reader's hang-up."""

    def _describe(self) -> list[str]:
        # A writing end never reads: that needs no pause.
        return [part for part in super()._describe() if part != "reading paused"]

    def can_write_eof(self) -> bool:
        """Whether `write_eof` is supported: always."""
        return True

    def write_eof(self) -> None:
        """Flush, then close."""
        self.close()
