"""The one door to the user's code.

Holds: which group is current, and how a connection's callbacks are entered and their failures reported.
Knows nothing of what the callbacks are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from inspect import iscoroutine, signature
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
ProtocolT = TypeVar("ProtocolT")


class Group(Protocol):
    """Whom the user's code knows as its group, and who hears of its errors."""

    def call_exception_handler(self, context: dict[str, Any]) -> None: ...


#: The group that the running callback or task belongs to.
current: ContextVar[Any] = ContextVar("transports_anyio.current_group")


class GivenContext:
    """A context that the user gave for a callback: the group is current in it, but only while the callback runs."""

    __slots__ = ("_group", "context")

    def __init__(self, context: Context, group: Group) -> None:
        self.context: Context = context
        self._group = group

    def run(self, callback: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.context.run(call_with_current, self._group, callback, *args, **kwargs)


def call_with_current(group: Group, callback: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `callback` in the caller's context, with `group` current."""
    token = current.set(group)
    try:
        return callback(*args, **kwargs)
    finally:
        current.reset(token)


def check_protocol(protocol: object, factory: object) -> None:
    """Raise what asyncio raises, `AttributeError` or `TypeError`, for an object that can never be a protocol.

    Any object with the right methods is one. Which it needs beyond `connection_made` depends on what happens to its
    connection, so a callback that is missing otherwise is told when it is due.
    """
    if not hasattr(protocol, "connection_made"):
        what = repr(protocol)
        if iscoroutine(protocol):
            protocol.close()  # That nobody awaited it is no further news.
            what = f"the coroutine {what}"
        raise AttributeError(
            f"the protocol factory {factory!r} returned {what}, which has no connection_made(): let it return a "
            "protocol, an object with asyncio's callbacks"
        )
    if isinstance(protocol, type):
        try:
            # A class whose callbacks are class methods is as good as any other object.
            signature(protocol.connection_made).bind(None)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            raise TypeError(
                f"the protocol factory {factory!r} returned the class {protocol.__qualname__}: let it return an "
                "instance, or give the class itself as the factory"
            ) from None


class Door:
    """The way from one connection into the user's code.

    `run` calls a function in the connection's own copy of the `contextvars` context, in which the group is current.
    Whatever the function raises goes to `report`, unless `leaves`.
    """

    __slots__ = ("call_soon", "context", "group", "leaves", "run")

    def __init__(self, group: Group, call_soon: Callable[..., None], leaves: Callable[[BaseException], bool]) -> None:
        self.group: Group = group
        self.call_soon: Callable[..., None] = call_soon
        self.leaves: Callable[[BaseException], bool] = leaves
        self.context: Context = copy_context()
        self.run: Callable[..., Any] = self.context.run
        self.run(current.set, group)

    def make_protocol(self, factory: Callable[[], ProtocolT]) -> ProtocolT:
        """Call the protocol factory in the connection's context; what it raises is the caller's to handle.

        Raises `AttributeError` or `TypeError` when it returns what can never be a protocol.
        """
        protocol: ProtocolT = self.run(factory)
        check_protocol(protocol, factory)
        return protocol

    def call_in_place(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` in the caller's context, with the group current."""
        call_with_current(self.group, callback, *args)

    def report(self, message: str, exc: BaseException, transport: object, protocol: object) -> None:
        """Tell the exception handler, with asyncio's keys, in the connection's context."""
        # A copy: the caller may be in the context already, and it cannot be entered twice.
        self.context.copy().run(
            self.group.call_exception_handler,
            {"message": message, "exception": exc, "transport": transport, "protocol": protocol},
        )
