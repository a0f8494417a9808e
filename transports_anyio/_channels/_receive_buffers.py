"""Where bytes on their way in are put first."""

from __future__ import annotations

import mmap
import sys
import threading

# How much one readiness event may receive: asyncio's figure, for the same chunks at the protocol.
RECEIVE_SIZE = 256 * 1024


# Zen processors copy at a twelfth of the speed to an address that is 1 to 31 bytes further into its page than the
# source is into its own. The kernel's memory of a message begins with a page, or 53 bytes behind one: that is what is
# left of 64 KiB when the loopback interface's largest segment, 65,483 bytes, has been sent before. What the C library
# makes for anything as large begins 16 bytes behind a page. The middle of a page is far from all of these.
PAGE_OFFSET = 2048


def allocate(size: int) -> memoryview:
    """Return zeroed memory of the process's own, where it is quick to copy to and from."""
    whole = size + PAGE_OFFSET
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, whole))[PAGE_OFFSET:]
    # Not shared with a forked child.
    return memoryview(mmap.mmap(-1, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[PAGE_OFFSET:]


class ReceiveBuffers(threading.local):
    """The buffers of a thread. `recv` lets other threads run between filling one and returning.

    `recv(262144)` instead would make the C library map and unmap 256 KiB for every message, until a process has freed
    its first such block. A buffer is never held over a call of the user's code.
    """

    def __init__(self) -> None:
        #: What a socket gives.
        self.received = allocate(RECEIVE_SIZE)
        #: What TLS makes of it.
        self.decrypted = allocate(RECEIVE_SIZE)


buffers = ReceiveBuffers()
