"""The buffers that channels receive into, one set for each thread.

Holds: the buffers, their size and how they are allocated; what the C library does with memory that is freed.
May know: nothing.
"""

from __future__ import annotations

import mmap
import sys
import threading
from functools import cache

# How much one readiness event may receive: asyncio's figure, for the same chunks at the protocol.
RECEIVE_SIZE = 256 * 1024


# AMD's Zen processors copy at a twelfth of the speed if the target's offset in its page is 1 to 31 bytes larger than
# the source's. The kernel's copy of a message has offset 0, or 53: what is left of 64 KiB after the largest segment of
# the loopback interface, 65,483 bytes. The C library returns offset 16 for large blocks. Half a page is far from these.
PAGE_OFFSET = 2048


def allocate(size: int) -> memoryview:
    """Return zeroed memory at an address that is fast to copy to and from."""
    whole = size + PAGE_OFFSET
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, whole))[PAGE_OFFSET:]
    # A private mapping: a forked child does not share it.
    return memoryview(mmap.mmap(-1, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[PAGE_OFFSET:]


class ReceiveBuffers(threading.local):
    """The buffers of one thread: `recv` lets other threads run before it returns.

    `recv(262144)` would make the C library map and unmap 256 KiB for every message, until the process has freed its
    first such block. No buffer is in use while the user's code runs.
    """

    def __init__(self) -> None:
        #: Bytes from a socket.
        self.received = allocate(RECEIVE_SIZE)
        #: Bytes that TLS has decrypted.
        self.decrypted = allocate(RECEIVE_SIZE)


buffers = ReceiveBuffers()


# How much freed memory the C library keeps for the next chunks, in bytes.
KEPT_SIZE = 4 * 1024 * 1024


@cache
def keep_freed_memory() -> None:
    """Let the C library keep `KEPT_SIZE` bytes that were freed, and not give them back to the system at once.

    Where a task for each connection receives and sends, all of them hold a chunk, free it and allocate the next one.
    glibc gives back what is more than 128 KiB at the end of its memory, and to get it again costs as much as an echo of
    64 KiB. It keeps twice the size of the largest block that was freed so far, unless the user has set a limit.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html (`M_MMAP_THRESHOLD`)
    """
    bytes(KEPT_SIZE // 2)  # Freed at once. Its pages are never touched.
