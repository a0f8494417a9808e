"""Exceptions of user code, and the log.

Holds: the rule for which exceptions propagate and which are reported, the logger, and wordings of errors.
May know: `anyio`, `exceptiongroup`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias, TypeVar

import anyio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("transports_anyio")

ExceptionContext: TypeAlias = "dict[str, Any]"

T = TypeVar("T")


class Group(Protocol):
    """The part of `TransportGroup`, or of an event loop, that is needed to report errors."""

    def call_exception_handler(self, context: dict[str, Any]) -> None: ...


class NotOpenError(RuntimeError):
    """Raised for a call that needs an open group, before the group is entered and after it is left."""

    def __init__(self, message: str, group: Group) -> None:
        super().__init__(message)
        self.group = group


def is_refusal(exc: BaseException, group: Group) -> bool:
    """Whether `exc` is the `NotOpenError` of `group`, or an exception group of nothing else."""
    if isinstance(exc, BaseExceptionGroup):
        return all(is_refusal(each, group) for each in exc.exceptions)
    return isinstance(exc, NotOpenError) and exc.group is group


def should_propagate(exc: BaseException) -> bool:
    """Whether `exc`, raised by user code, ends the group instead of being reported."""
    if isinstance(exc, Exception):
        return False  # The usual case, which also works where AnyIO does not know the backend.
    return isinstance(exc, (KeyboardInterrupt, SystemExit, anyio.get_cancelled_exc_class()))


def run_user_code(function: Callable[..., T], *args: Any, failed: Callable[[BaseException], T]) -> T:
    """Return `function(*args)`, or what `failed` returns for an exception that does not propagate."""
    try:
        return function(*args)
    except BaseException as exc:
        if should_propagate(exc):
            raise
        return failed(exc)


def safe_repr(thing: object) -> str:
    """Return `repr(thing)`, or the default repr if that raises."""
    return run_user_code(repr, thing, failed=lambda _: object.__repr__(thing))


def log_debug(group: Group, message: str, *args: object) -> None:
    """Log `message` at level DEBUG. Exceptions of a `repr` or a log handler are reported."""
    if not logger.isEnabledFor(logging.DEBUG):
        return

    def failed(exc: BaseException) -> None:
        group.call_exception_handler({"message": "Exception while logging", "exception": exc})

    run_user_code(partial(logger.debug, stacklevel=3), message, *args, failed=failed)


def has_callback(protocol: object, name: str) -> bool:
    """Whether the protocol has the callback `name`."""
    try:
        return hasattr(protocol, name)
    except Exception:
        return True  # A mock whose attributes raise: calling the callback raises the same error.


def failed_callback(protocol: object, name: str) -> str:
    """Return asyncio's message for a failed callback, with advice if the protocol does not have it."""
    said = f"Fatal error: protocol.{name}() call failed."
    if has_callback(protocol, name):
        return said
    said += f" {type(protocol).__qualname__} has no method {name}(): "
    if name == "data_received" and has_callback(protocol, "get_buffer"):
        return said + "derive it from BufferedProtocol to use its get_buffer()."
    return said + "define it, or derive the class from one of asyncio's protocol classes, which define them all."
