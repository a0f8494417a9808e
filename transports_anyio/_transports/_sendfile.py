"""A `sendfile` in progress.

Holds: the steps of sending a file over a stream transport, and what the transport suspends during it.
May know: channels' errors, buffers of bytes, waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.lowlevel

from .._waiters import InterruptSafeEvent
from ._flow_control import as_bytes_view
from ._state import State

if TYPE_CHECKING:
    from ._stream import StreamTransport


class SendfileOperation:
    """One `sendfile` over one transport, by one task: `flush` and the `send` methods, then `end`.

    Until `end` the transport refuses `write`, receives nothing, and calls neither `pause_writing` nor `resume_writing`.
    """

    __slots__ = ("_error", "_progress", "_transport", "_was_reading")

    def __init__(self, transport: StreamTransport) -> None:
        self._transport = transport
        self._was_reading = transport.is_reading()
        # Set when everything buffered is sent and the channel is writable, and when the transport is closing.
        self._progress = InterruptSafeEvent()
        self._error: BaseException | None = None  # Why the connection was lost.

    async def flush(self) -> None:
        """Wait until nothing is buffered. Raises `ConnectionError` when the transport is closing."""
        await anyio.lowlevel.checkpoint()
        self._check_open()
        if self._transport._buffer.size:
            await self.until_writable()

    async def until_writable(self) -> None:
        """Wait until nothing is buffered and something could be sent. Raises as `flush` does."""
        self._check_open()
        self._progress = InterruptSafeEvent()
        self._transport._watch_output()
        await self._progress.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._transport._state is not State.OPEN:
            if isinstance(self._error, OSError):
                raise self._error
            raise ConnectionError("the connection was closed while a file was sent") from self._error

    def send_file(self, fd: int, offset: int, count: int) -> int:
        """Send from a file, past the buffer. Return how many bytes were sent, 0 at its end.

        Raises `FileError` for what the file cannot do, and `OSError` for a broken connection.
        """
        transport = self._transport
        try:
            sent: int = transport._channel.send_file(fd, offset, count)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError as exc:
            transport._broken(exc, "sendfile")
            raise
        transport._bytes_sent += sent
        return sent

    def send_block(self, data: bytes) -> None:
        """Send `data`, and buffer the rest. Raises as `flush` does, and `TypeError` for data that is not bytes-like."""
        self._check_open()
        self._transport._buffer.append(as_bytes_view(data))
        self._transport._watch_output()
        self._transport._write_ready()

    def end(self) -> None:
        """Let the transport go on."""
        self._error = None  # Its traceback may have the caller's frame: no reference cycle.
        self._transport._end_sendfile(was_reading=self._was_reading)

    # Called by the transport

    def on_writable(self) -> None:
        """Everything buffered is sent and the channel is writable."""
        self._progress.set()

    def on_closing(self, error: BaseException | None = None) -> None:
        """The transport is closing, or lost because of `error`."""
        self._error = error
        self._progress.set()
