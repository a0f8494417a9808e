"""The one door to the user's code.

Holds: which group is current, and how a connection's callbacks are entered and their failures reported.
May know: the group's interface. Knows nothing of what the callbacks are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._group import TransportGroup

current: ContextVar[TransportGroup] = ContextVar("transports_anyio.current_group")


def current_group() -> TransportGroup:
    """Return the group that the running callback or task belongs to.

    Raises `RuntimeError` outside any group.
    """
    try:
        return current.get()
    except LookupError:
        msg = "no transport group is current: call this from a callback or task of a group, or within `async with`"
        raise RuntimeError(msg) from None


class Door:
    """The way from one connection into the user's code.

    `run` calls a function in the connection's own copy of the `contextvars` context, in which the group is current.
    Whatever the function raises goes to `report`, unless `leaves_through_the_group`.
    """

    __slots__ = ("_group", "call_soon", "context", "run")

    def __init__(self, group: TransportGroup) -> None:
        self._group = group
        self.context = copy_context()
        self.run = self.context.run
        self.run(current.set, group)
        self.call_soon = group.call_internal

    def call_in_place(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` in the caller's context, with the group current."""
        token = current.set(self._group)
        try:
            callback(*args)
        finally:
            current.reset(token)

    def report(self, message: str, exc: BaseException, transport: object, protocol: object) -> None:
        """Tell the exception handler, with asyncio's keys."""
        self._group.call_exception_handler(
            {"message": message, "exception": exc, "transport": transport, "protocol": protocol}
        )
