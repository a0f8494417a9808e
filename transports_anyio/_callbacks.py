"""Calling user code, and reporting its errors.

Holds: the current group, the context in which a connection's callbacks run, and checks of protocols.
May know: `_errors`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from functools import partial
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, iscoroutine, iscoroutinefunction, signature
from types import FunctionType, MethodType
from typing import Any, ParamSpec, Protocol, TypeGuard, TypeVar
from weakref import WeakSet

from ._errors import Group, safe_repr

P = ParamSpec("P")
T = TypeVar("T")
ProtocolT = TypeVar("ProtocolT")


ASYNC_FLAGS = CO_COROUTINE | CO_ASYNC_GENERATOR

#: The group that the running callback or task belongs to.
current: ContextVar[Any] = ContextVar("transports_anyio.current_group")


class GivenContext:
    """A context that the user gave for a callback. The group is current in it only while the callback runs."""

    __slots__ = ("_group", "context")

    def __init__(self, context: Context, group: Group) -> None:
        self.context: Context = context
        self._group = group

    def run(self, callback: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.context.run(call_with_current, self._group, callback, *args, **kwargs)


def call_with_current(group: Group, callback: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `callback(*args, **kwargs)`, called in the caller's context with `group` current."""
    token = current.set(group)
    try:
        return callback(*args, **kwargs)
    finally:
        current.reset(token)


#: The callbacks of asyncio's protocols, and `shutdown_requested`, which asyncio does not have.
CALLBACKS = frozenset(
    {
        "buffer_updated",
        "connection_lost",
        "connection_made",
        "data_received",
        "datagram_received",
        "eof_received",
        "error_received",
        "get_buffer",
        "pause_writing",
        "pipe_connection_lost",
        "pipe_data_received",
        "process_exited",
        "resume_writing",
        "shutdown_requested",
    }
)

#: The classes of protocols without async callbacks. Weak, so that a class can be collected. Groups in several threads
#: share it without a lock: it is never iterated, so each of its methods is one operation of a set, which is atomic. Two
#: threads may check the same class, with the same result.
checked_classes: WeakSet[type] = WeakSet()


def is_async_function(function: object) -> bool:
    """Whether a call of `function` runs nothing, and returns an object to await or iterate."""
    # The types are looked at, no attributes: those of a proxy may raise anything.
    plain: Any = function.__func__ if type(function) is MethodType else function
    if type(plain) is FunctionType:
        return bool(plain.__code__.co_flags & ASYNC_FLAGS)
    return type(plain) is partial and is_async_function(plain.func)


def check_scheduled(callback: object) -> None:
    """Raise `TypeError` if `callback` is not a callable object, or is an async function."""
    if not callable(callback):
        msg = f"a callable object was expected, got {callback!r}"
        raise TypeError(msg)
    if is_async_function(callback):
        raise TypeError(
            f"{callback!r} is an async function, which a callback cannot await: call start_soon() of the group or "
            "of a transport"
        )


def check_callbacks(protocol: object) -> None:
    """Raise `TypeError` if a callback of `protocol` is an async function, which would never run."""
    protocol_class = type(protocol)
    if protocol_class not in checked_classes:
        for name in CALLBACKS:
            if is_async_function(getattr(protocol_class, name, None)):
                raise async_callback(protocol, name)
        checked_classes.add(protocol_class)
    own: dict[str, object] = getattr(protocol, "__dict__", {})
    if not CALLBACKS.isdisjoint(own):
        for name in CALLBACKS.intersection(own):
            if is_async_function(own[name]):
                raise async_callback(protocol, name)


def async_callback(protocol: object, name: str) -> TypeError:
    return TypeError(
        f"{name}() of the protocol {safe_repr(protocol)} is an async function, which would never run: make it a plain "
        "function that calls transport.start_soon(async_function) for what has to wait"
    )


def check_factory(name: str, factory: object, task_starter: str) -> None:
    """Raise `TypeError` for a protocol factory of the endpoint function `name` that can never return a protocol.

    `task_starter` is the call that starts a task in a callback, for the message.
    """
    if isinstance(factory, type):
        return  # The most frequent kind.
    if iscoroutinefunction(factory):
        raise TypeError(
            f"{name}() takes a protocol factory that returns a protocol, got the coroutine function {factory!r}: use a "
            f"plain function, and start what has to wait from connection_made(), with {task_starter}"
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
    """Raise asyncio's `AttributeError` or `TypeError` if a factory returned an object that is not a protocol.

    A protocol is any object with `connection_made`. Which other callbacks it needs depends on the connection, so a
    missing one is reported when it is called.
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
    check_callbacks(protocol)


def check_given_protocol(protocol: object, name: str) -> None:
    """Raise `TypeError` if the argument of `name` is not a protocol for a connection that has been made.

    Its `connection_made` is not called any more, but its `connection_lost` is.
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
    check_callbacks(protocol)


def discarded(thing: object) -> str:
    """Return the repr of a refused object. A coroutine is closed, which avoids a "never awaited" warning."""
    if not iscoroutine(thing):
        return safe_repr(thing)
    description = f"the coroutine {thing!r}"
    thing.close()
    return description


def is_class_of_protocols(protocol: object, callback: str) -> TypeGuard[type]:
    """Whether `protocol` is a class whose instances have `callback`, and not a class with class methods."""
    if not isinstance(protocol, type):
        return False
    try:
        signature(getattr(protocol, callback)).bind(None)
    except (TypeError, ValueError):
        return True
    return False


class CallbackScheduler(Protocol):
    """What the callbacks of a connection need of the scheduler."""

    group: Group

    def call_internal(self, callback: Callable[..., object], *args: Any) -> None: ...

    def leaves(self, exc: BaseException) -> bool: ...


class CallbackContext:
    """Calls the callbacks of one connection.

    They run in `context`, the connection's own copy of the `contextvars` context. The group is current in it. Callers
    pass what they raise to `report`.
    """

    __slots__ = ("_scheduler", "context", "group")

    def __init__(self, scheduler: CallbackScheduler) -> None:
        self._scheduler = scheduler
        self.group: Group = scheduler.group
        self.context: Context = copy_context()
        if self.context.get(current) is not self.group:
            self.context.run(current.set, self.group)

    def call_soon(self, callback: Callable[..., object], *args: object) -> None:
        """Run `callback` in the next iteration, without a context or a handle."""
        self._scheduler.call_internal(callback, *args)

    def leaves(self, exc: BaseException) -> bool:
        """Whether `exc`, raised by user code, ends the group instead of being reported."""
        return self._scheduler.leaves(exc)

    def make_protocol(self, factory: Callable[[], ProtocolT]) -> ProtocolT:
        """Return the protocol that `factory` makes in the connection's context.

        Raises what the factory raises, and `AttributeError` or `TypeError` if it returns no protocol.
        """
        protocol = self.context.run(factory)
        check_made_protocol(protocol, factory)
        return protocol

    def run_nested(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` in the caller's context, with the group current: the connection's may be in use."""
        call_with_current(self.group, callback, *args)

    def report(self, message: str, exc: BaseException, transport: object, protocol: object) -> None:
        """Report `exc` to the exception handler, in the connection's context, or raise it if it ends the group.

        The exception handler gets asyncio's keys.
        """
        if self.leaves(exc):
            raise exc
        details = {"message": message, "exception": exc, "transport": transport, "protocol": protocol}
        # In a copy: the context may be in use, and cannot be entered twice.
        run = self.context.copy().run
        if isinstance(exc, RecursionError):
            # From an empty stack: the handler would fail in the same way here.
            self.call_soon(run, self.group.call_exception_handler, details)
        else:
            run(self.group.call_exception_handler, details)
