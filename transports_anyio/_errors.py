"""What goes wrong in the user's code, and how it is told.

Holds: the one rule for an exception that leaves the user's code, and where everything is logged.
May know: logging and AnyIO's cancellation.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol, TypeAlias

import anyio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

logger = logging.getLogger("transports_anyio")

ExceptionContext: TypeAlias = "dict[str, Any]"


class Group(Protocol):
    """Whom the user's code knows as its group, and who hears of its errors."""

    def call_exception_handler(self, context: dict[str, Any]) -> None: ...


class NotOpenError(RuntimeError):
    """Raised for a call that needs an open group, before or after that."""

    def __init__(self, message: str, group: Group) -> None:
        super().__init__(message)
        self.group = group


def is_refusal(exc: BaseException, group: Group) -> bool:
    """Whether `exc` says that `group` is not open, alone or as the only kind in an exception group."""
    if isinstance(exc, BaseExceptionGroup):
        return all(is_refusal(each, group) for each in exc.exceptions)
    return isinstance(exc, NotOpenError) and exc.group is group


def should_propagate(exc: BaseException) -> bool:
    """Whether `exc`, raised in the user's code, ends the group instead of being reported."""
    if isinstance(exc, Exception):
        return False  # Nearly always, and also where AnyIO does not know what runs.
    return isinstance(exc, (KeyboardInterrupt, SystemExit, anyio.get_cancelled_exc_class()))


def safe_repr(thing: object) -> str:
    """Return `repr(thing)`, which is the user's code too: it may fail, and nothing else has to."""
    try:
        return repr(thing)
    except BaseException as exc:
        if should_propagate(exc):
            raise
        return object.__repr__(thing)


def log_debug(group: Group, message: str, *args: object) -> None:
    """Log `message` at level DEBUG. What a `repr` or a handler raises is reported, and the caller goes on."""
    try:
        logger.debug(message, *args, stacklevel=2)
    except BaseException as exc:
        if should_propagate(exc):
            raise
        group.call_exception_handler({"message": "Exception while logging", "exception": exc})


def has_callback(protocol: object, name: str) -> bool:
    """Return whether the protocol has the callback `name`."""
    try:
        return hasattr(protocol, name)
    except Exception:
        return True  # A mock whose attributes raise: the call will raise the same error.


def failed_callback(protocol: object, name: str) -> str:
    """Say that the callback `name` has failed: in asyncio's words, and what to do if the protocol has none."""
    said = f"Fatal error: protocol.{name}() call failed."
    if has_callback(protocol, name):
        return said
    said += f" {type(protocol).__qualname__} has no method {name}(): "
    if name == "data_received" and has_callback(protocol, "get_buffer"):
        return said + "derive it from BufferedProtocol if its get_buffer() is to be used."
    return said + "define it, or derive the class from one of asyncio's protocol classes, which define them all."
