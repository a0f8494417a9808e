"""Where bytes on their way in are put first."""

from __future__ import annotations

import mmap
import sys
import threading

# How much one readiness event may receive: asyncio's figure, for the same chunks at the protocol.
RECEIVE_SIZE = 256 * 1024


def allocate_pages(size: int) -> memoryview:
    """Return zeroed memory of the process's own that begins with a page.

    Zen processors copy to 16 bytes behind the beginning of a page, where the C library puts what is this large, at a
    quarter of the speed: 64 KiB took `recv` 48 µs instead of 12.
    """
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, size))
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))  # Not shared with a forked child.


class ReceiveBuffers(threading.local):
    """The buffers of a thread. `recv` lets other threads run between filling one and returning.

    `recv(262144)` instead would make the C library map and unmap 256 KiB for every message, until a process has freed
    its first such block. A buffer is never held over a call of the user's code.
    """

    def __init__(self) -> None:
        #: What a socket gives.
        self.received = allocate_pages(RECEIVE_SIZE)
        #: What TLS makes of it.
        self.decrypted = allocate_pages(RECEIVE_SIZE)


buffers = ReceiveBuffers()
