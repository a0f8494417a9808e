"""Mistakes with crossings: asyncio code awaits something of the backend, or the reverse, or passes no function.

Holds: the errors, and the advice that is added to the errors of asyncio and trio.
May know: `exceptiongroup`.
"""

from __future__ import annotations

import sys
from collections.abc import Coroutine

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

BACKEND_AWAITED_BY_ASYNCIO = (
    "This asyncio task has awaited something that belongs to the backend: await it with "
    "transports_anyio.from_asyncio.run(async_function, *args)."
)
ASYNCIO_AWAITED_BY_BACKEND = (
    "This backend code has awaited something that belongs to asyncio: await it with "
    "transports_anyio.to_asyncio.run(async_function, *args)."
)

#: By type of error: how the message of asyncio or trio begins, and the advice.
ADVICE = {
    RuntimeError: ("Task got bad yield: ", BACKEND_AWAITED_BY_ASYNCIO),
    TypeError: ("trio.run received unrecognized yield message ", ASYNCIO_AWAITED_BY_BACKEND),
}


def require_function(caller: str, function: object) -> None:
    """Raise `TypeError` if `function` cannot be called; a coroutine object is closed, so that no warning follows."""
    if callable(function):
        return
    if isinstance(function, Coroutine):
        function.close()
    raise TypeError(
        f"{caller}() needs a function, not {function!r}: pass the function and its arguments, "
        f"{caller}(function, *args), without calling it"
    )


def advise(exc: BaseException | None) -> None:
    """Add advice to the message of such an error, also if it is in a group."""
    if isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            advise(each)
        return
    beginning, advice = ADVICE.get(type(exc), ("", ""))  # type: ignore[arg-type]
    if advice and exc is not None and exc.args:
        message = exc.args[0]
        if isinstance(message, str) and message.startswith(beginning) and not message.endswith(advice):
            exc.args = (f"{message}. {advice}", *exc.args[1:])
