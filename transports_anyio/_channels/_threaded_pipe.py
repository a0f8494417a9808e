"""A channel over one end of a pipe that cannot be polled (Windows): a thread reads or writes it.

Holds: the channel and its thread.
May know: `_abc`, `_pipe`, `os`, `socket`.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from ._abc import StreamChannel, copy_into, joined
from ._pipe import STANDARD_STREAMS, check_pipe, file_number

if TYPE_CHECKING:
    from ._abc import SizedBuffer

# The most bytes to read or write at once.
CHUNK_SIZE = 64 * 1024


class ThreadedPipeChannel(StreamChannel):
    """Moves bytes in one direction. The channel owns `pipe`, a file object or socket, and closes it.

    A thread makes the system calls that block, one at a time: what is written stays in the transport's buffer until the
    call has returned. The system offers no way to interrupt such a call. The thread therefore has a file descriptor of
    its own, and closes it when the call returns, if the channel is closed then.

    The thread is not AnyIO's: the interpreter waits at its exit for AnyIO's threads on asyncio, and a call that reads
    from a terminal need never return.
    """

    __slots__ = (
        "_busy",
        "_call_from_thread",
        "_call_soon",
        "_close_duplicate",
        "_closed",
        "_kept_open",
        "_pipe",
        "_read",
        "_read_ready",
        "_reading",
        "_received",
        "_requests",
        "_sent",
        "_started",
        "_write",
        "_write_ready",
        "_writing",
        "can_send",
    )

    is_two_way = False
    can_write_eof = False
    drops_after_close = True

    def __init__(
        self,
        call_soon: Callable[[Callable[[], object]], None],
        call_from_thread: Callable[..., None],
        pipe: Any,
        *,
        writing: bool,
        kept_open: Container[int] = STANDARD_STREAMS,
    ) -> None:
        """`call_soon` and `call_from_thread` schedule a callback. The files in `kept_open` are not closed."""
        self._read: Callable[[int], bytes]
        self._write: Callable[[bytes], int]
        self._close_duplicate: Callable[[], None]
        if isinstance(pipe, socket.socket):  # On Windows a socket has no file descriptor.
            duplicate = pipe.dup()
            duplicate.setblocking(True)
            self._read, self._write, self._close_duplicate = duplicate.recv, duplicate.send, duplicate.close
        else:
            check_pipe(pipe)
            fd = os.dup(pipe.fileno())
            if sys.platform != "win32":  # For the tests. On Windows only programs that ask for it get another mode.
                os.set_blocking(fd, True)
            self._read, self._write = partial(os.read, fd), partial(os.write, fd)
            self._close_duplicate = partial(os.close, fd)
        self._call_soon = call_soon
        self._call_from_thread = call_from_thread
        self._pipe = pipe
        self._kept_open = kept_open
        self.can_send = writing
        self._requests: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._started = False
        self._busy = False  # The thread makes a system call, or its result has not come yet.
        self._closed = False
        self._reading = False
        self._writing = False
        self._received: Any = None  # Bytes that the transport has not taken yet, or an exception.
        self._sent: int | Exception = 0  # How much of what was offered has been written, or an exception.

    def set_callbacks(self, read_ready: Callable[[], None], write_ready: Callable[[], None]) -> None:
        self._read_ready = read_ready
        self._write_ready = write_ready

    # The thread

    def _request(self, call: Callable[[], Any]) -> None:
        """Let the thread make a system call. Raises `OSError` if the system cannot start the thread."""
        if not self._started:
            name = f"transports_anyio: pipe {file_number(self._pipe)}"
            try:
                Thread(target=self._serve, name=name, daemon=True).start()
            except RecursionError:  # The thread may have started all the same, and ends with the channel.
                raise
            except RuntimeError as exc:
                raise OSError(errno.ENOMEM, f"no thread can be started for a pipe: {exc}") from exc
            self._started = True
        self._busy = True
        self._requests.put(call)

    def _serve(self) -> None:
        while (call := self._requests.get()) is not None:
            try:
                result = call()
            except Exception as exc:
                result = exc
            self._call_from_thread(self._returned, result)
            del call, result

    def _returned(self, result: Any) -> None:
        self._busy = False
        if self._closed:
            return
        if self.can_send:
            self._sent = as_broken_pipe(result)
            self._go_on_writing()
        else:
            self._received = result
            self._go_on_reading()

    # Reading

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        if reading:
            if self._received is not None:
                self._call_soon(self._go_on_reading)
            elif not self._busy:
                self._request(partial(self._read, CHUNK_SIZE))

    def _go_on_reading(self) -> None:
        if self._reading and self._received is not None:
            self._read_ready()
            self.set_reading(self._reading)  # The rest, for a protocol with a small buffer, or the next chunk.

    def receive(self) -> bytes:
        return bytes(self._take_received())

    def receive_into(self, buffer: SizedBuffer) -> int:
        data = self._take_received()
        count = copy_into(buffer, data)
        if count < len(data):
            self._received = memoryview(data)[count:]  # The rest is not copied.
        return count

    def _take_received(self) -> Any:
        received, self._received = self._received, None
        if received is None:
            raise BlockingIOError
        if isinstance(received, Exception):
            raise received
        return received

    # Writing

    def set_writing(self, writing: bool) -> None:
        self._writing = writing
        if writing and not self._busy:
            self._call_soon(self._go_on_writing)

    def _go_on_writing(self) -> None:
        if self._writing and not self._busy:
            self._write_ready()
            self.set_writing(self._writing)  # If it has taken what was sent, it offers more in the next iteration.

    def send(self, data: bytes | bytearray | memoryview) -> int:
        return self.send_many((data if isinstance(data, bytes) else memoryview(data),))

    def send_many(self, chunks: Iterable[bytes | memoryview]) -> int:
        sent, self._sent = self._sent, 0
        if isinstance(sent, Exception):
            raise sent
        if not sent and not self._busy:
            data = bytes(joined(chunks, CHUNK_SIZE))
            if data:
                self._request(partial(self._write, data))
        if self._busy:
            raise BlockingIOError
        return sent

    def send_eof(self) -> None:
        raise NotImplementedError  # To end a pipe is to close it.

    # The end

    def close(self, *, aborted: bool) -> None:
        self._closed = True
        if self._busy:
            self._requests.put(self._close_duplicate)
        else:
            self._close_duplicate()
        self._requests.put(None)
        number = file_number(self._pipe)
        if number >= 0 and number not in self._kept_open:
            self._pipe.close()

    def extra_info(self) -> Mapping[str, Any]:
        return {"pipe": self._pipe}


def as_broken_pipe(result: Any) -> Any:
    """Return the result of a write. Windows has another error for a pipe without a reader.

    https://bugs.python.org/issue19612
    """
    if sys.platform == "win32" and isinstance(result, OSError) and result.errno == errno.EINVAL:
        return BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    return result
