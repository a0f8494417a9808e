"""The poller: readiness of many descriptors for the price of one wait.

Holds: which descriptor waits for what, and whom to call.
May know: AnyIO's `wait_readable`, `selectors`. Knows nothing of channels, transports or groups.

An epoll or kqueue descriptor is itself readable when anything registered in it is ready, so one task waits for
the selector and takes the whole batch with `select(0)`.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from math import inf

import anyio

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

ReadyCallback = Callable[[int], None]


class Poller:
    """Readiness of descriptors, over one selector that is itself waited for."""

    __slots__ = ("_receiver", "_selector", "_sender", "_waiting")

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        # A socket pair rather than a pipe: it is non-blocking and wakes the selector on every platform.
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._selector.register(self._receiver, READ, self._woken)
        self._waiting = False

    def set_interest(self, descriptor: int, before: int, interest: int, ready: ReadyCallback) -> None:
        """Change what `descriptor` waits for from `before` to `interest`, each a mask of `READ` and `WRITE`.

        A selector reports errors and hang-ups whatever the interest, so a descriptor with nothing to wait for is
        taken out instead of staying in with an empty interest.
        """
        if not interest:
            self._selector.unregister(descriptor)
        elif before:
            self._selector.modify(descriptor, interest, ready)
        else:
            self._selector.register(descriptor, interest, ready)

    async def wait(self, deadline: float = inf) -> None:
        """Wait until a descriptor is ready, `wake` is called or the clock reaches `deadline`."""
        self._waiting = True
        try:
            if deadline == inf:
                await anyio.wait_readable(self._descriptor)
            else:
                with anyio.CancelScope(deadline=deadline):
                    await anyio.wait_readable(self._descriptor)
        finally:
            self._waiting = False

    @property
    def _descriptor(self) -> int:
        # Every selector that can be waited for has `fileno`; `SelectSelector` and `PollSelector` have not.
        return self._selector.fileno()

    def dispatch(self) -> None:
        """Call everybody who is ready now, once."""
        for key, mask in self._selector.select(0):
            key.data(mask)

    def wake(self) -> None:
        """End a `wait` of this thread; costs nothing while nobody waits."""
        if self._waiting:
            self._waiting = False
            self.wake_threadsafe()

    def wake_threadsafe(self) -> None:
        """End a `wait`, from any thread."""
        try:
            self._sender.send(b"\0")
        except BlockingIOError:
            pass  # The pair is full of wake-ups that nobody has read: the next wait returns at once.

    def _woken(self, mask: int) -> None:
        try:
            self._receiver.recv(4096)
        except BlockingIOError:
            pass  # A stale readiness report; the wake-up has already been taken.

    def close(self) -> None:
        self._selector.close()
        self._receiver.close()
        self._sender.close()
