"""The one door to the user's code.

Holds: which group is current, and how a connection's callbacks are entered and their failures reported.
Knows nothing of what the callbacks are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from inspect import iscoroutine, iscoroutinefunction, signature
from typing import Any, ParamSpec, TypeGuard, TypeVar

from ._errors import Group, safe_repr

P = ParamSpec("P")
T = TypeVar("T")
ProtocolT = TypeVar("ProtocolT")


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


def check_factory(name: str, factory: object) -> None:
    """Raise `TypeError` for a protocol factory of the endpoint function `name` that can never return a protocol."""
    if isinstance(factory, type):
        return  # The most frequent kind.
    if iscoroutinefunction(factory):
        raise TypeError(
            f"{name}() takes a protocol factory that returns a protocol, got the coroutine function {factory!r}: use a "
            "plain function, and start what has to wait from connection_made(), with current_group().start_soon()"
        )
    if callable(factory):
        return
    if hasattr(factory, "connection_made"):
        raise TypeError(
            f"{name}() takes a protocol factory, got the protocol {factory!r} itself, which is not callable: give its "
            "class, or `lambda: protocol` for a protocol that exists already"
        )
    raise TypeError(
        f"{name}() takes a protocol factory, got {factory!r}, which is not callable: give a protocol class, or a "
        "function that returns a protocol"
    )


def check_made_protocol(protocol: object, factory: object) -> None:
    """Raise what asyncio raises, `AttributeError` or `TypeError`, for an object that can never be a protocol.

    Any object with the right methods is one. Which it needs beyond `connection_made` depends on what happens to its
    connection, so a callback that is missing otherwise is reported when it is due.
    """
    if not hasattr(protocol, "connection_made"):
        raise AttributeError(
            f"the protocol factory {factory!r} returned {discarded(protocol)}, which has no connection_made(): let it "
            "return a protocol, an object with asyncio's callbacks"
        )
    if is_class_of_protocols(protocol, "connection_made"):
        raise TypeError(
            f"the protocol factory {factory!r} returned the class {protocol.__qualname__}: let it return an "
            "instance, or give the class itself as the factory"
        )


def check_given_protocol(protocol: object, name: str) -> None:
    """Raise `TypeError` for an object that can never be the protocol that the method or function `name` is given.

    It comes to a connection that has been made, so that the callback it cannot do without is `connection_lost`.
    """
    if not hasattr(protocol, "connection_lost"):
        raise TypeError(
            f"{name}() takes a protocol, an object with asyncio's callbacks, got {discarded(protocol)}, which has no "
            "connection_lost()"
        )
    if is_class_of_protocols(protocol, "connection_lost"):
        raise TypeError(
            f"{name}() takes a protocol, got the class {protocol.__qualname__}: give an instance, "
            f"`{protocol.__name__}()`"
        )


def discarded(thing: object) -> str:
    """Describe what is refused. A coroutine is closed: that it was never awaited needs no second warning."""
    if not iscoroutine(thing):
        return safe_repr(thing)
    what = f"the coroutine {thing!r}"
    thing.close()
    return what


def is_class_of_protocols(protocol: object, callback: str) -> TypeGuard[type]:
    """Whether `protocol` is a class whose instances have the callback. Class methods make it as good as an object."""
    if not isinstance(protocol, type):
        return False
    try:
        signature(getattr(protocol, callback)).bind(None)
    except (TypeError, ValueError):
        return True
    return False


class CallbackContext:
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
        check_made_protocol(protocol, factory)
        return protocol

    def run_nested(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` in the caller's context, with the group current."""
        call_with_current(self.group, callback, *args)

    def report(self, message: str, exc: BaseException, transport: object, protocol: object) -> None:
        """Tell the exception handler, with asyncio's keys, in the connection's context."""
        # A copy: the caller may be in the context already, and it cannot be entered twice.
        self.context.copy().run(
            self.group.call_exception_handler,
            {"message": message, "exception": exc, "transport": transport, "protocol": protocol},
        )
