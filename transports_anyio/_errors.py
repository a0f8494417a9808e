"""What goes wrong in the user's code, and how it is told.

Holds: the one rule for an exception that leaves the user's code, and the exception handler.
May know: logging and AnyIO's cancellation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from ._door import call_with_current

if TYPE_CHECKING:
    from ._group import TransportGroup

logger = logging.getLogger("transports_anyio")

ExceptionContext: TypeAlias = "dict[str, Any]"
ExceptionHandler: TypeAlias = "Callable[[TransportGroup, ExceptionContext], object]"


def leaves_through_the_group(exc: BaseException) -> bool:
    """Whether `exc`, raised in the user's code, ends the group instead of being reported."""
    if isinstance(exc, Exception):
        return False  # Nearly always, and also where AnyIO does not know what runs.
    return isinstance(exc, (KeyboardInterrupt, SystemExit, anyio.get_cancelled_exc_class()))


def lacks(protocol: object, name: str) -> bool:
    """Whether the protocol has no callback `name`."""
    try:
        return not hasattr(protocol, name)
    except Exception:
        return False  # A stand-in that fails when it is looked at: whoever calls it gets its error.


def failed_callback(protocol: object, name: str) -> str:
    """Say that the callback `name` has failed: in asyncio's words, and what to do if the protocol has none."""
    said = f"Fatal error: protocol.{name}() call failed."
    if not lacks(protocol, name):
        return said
    said += f" {type(protocol).__qualname__} has no method {name}(): "
    if name == "data_received" and not lacks(protocol, "get_buffer"):
        return said + "derive it from BufferedProtocol if its get_buffer() is to be used."
    return said + "define it, or derive the class from one of asyncio's protocol classes, which define them all."


class ErrorReporter:
    """The exception handler of a group."""

    __slots__ = ("_group", "handler")

    def __init__(self, group: TransportGroup) -> None:
        self._group = group
        self.handler: ExceptionHandler | None = None

    def report(self, context: ExceptionContext) -> None:
        """Call the handler that is set, or the default one. A handler that raises is itself reported."""
        if self.handler is None:
            self._report_at_last(context)
            return
        try:
            call_with_current(self._group, self.handler, self._group, context)
        except BaseException as exc:
            if leaves_through_the_group(exc):
                raise
            self._report_at_last(
                {"message": "Unhandled error in exception handler", "exception": exc, "context": context}
            )

    def _report_at_last(self, context: ExceptionContext) -> None:
        # What is logged has the `repr` of the user's objects in it, and a derived group may have a handler of its own.
        try:
            self._group.default_exception_handler(context)
        except BaseException as exc:
            if leaves_through_the_group(exc):
                raise
            logger.exception("Exception in default exception handler")

    def report_by_default(self, context: ExceptionContext) -> None:
        """Log `context` to the logger `transports_anyio`, with the traceback of its exception."""
        lines = [context.get("message") or "Unhandled exception in a transport group"]
        lines += [f"{key}: {context[key]!r}" for key in sorted(context) if key not in {"message", "exception"}]
        exc = context.get("exception")
        logger.error("\n".join(lines), exc_info=exc if isinstance(exc, BaseException) else None)
