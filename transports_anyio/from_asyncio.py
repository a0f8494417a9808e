"""From asyncio code to backend code: functions for an asyncio task that wants something of trio's, or of AnyIO's.

They need an event loop that `transports_anyio.open_event_loop` has opened. On asyncio and uvloop any one will do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ._event_loop._crossing import run_from_asyncio, run_sync_from_asyncio

__all__ = ["run", "run_sync"]

T = TypeVar("T")


async def run(async_function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await `async_function(*args)` in a task of the backend, and return its result.

    The task has a copy of the caller's context variables.

    When the asyncio task is cancelled, or `asyncio.timeout` comes, the scope of the function is cancelled, and the
    asyncio task waits for its end. The cancellation goes on then; a value that the function returns all the same is
    returned, and the cancellation comes when the asyncio task next waits.

    Raises whatever the function raises, the same object, `RuntimeError` when no event loop is running, and `TypeError`
    for a coroutine object in place of the function.

    Source: https://docs.python.org/3/library/asyncio-task.html#task-cancellation
    """
    return await run_from_asyncio(async_function, args)


def run_sync(function: Callable[..., T], *args: Any) -> T:
    """Return `function(*args)`, called at once as backend code: `trio.current_time`, or `set` of an event.

    On asyncio and uvloop that is a plain call. The function sees the caller's context variables.

    Raises whatever the function raises, and `RuntimeError` when no event loop is running.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.get_running_loop
    """
    return run_sync_from_asyncio(function, args)
