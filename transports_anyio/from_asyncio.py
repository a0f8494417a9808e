"""Run backend code from asyncio code: for asyncio tasks that use trio or AnyIO.

May know: `_event_loop`.

On trio the functions need an event loop that `transports_anyio.open_event_loop` has opened. On asyncio and uvloop they
work in every event loop.
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

    When the asyncio task is cancelled, by `asyncio.timeout` for example, the scope of the function is cancelled, and
    the asyncio task waits until the function ends. Then the asyncio task is cancelled. If the function returns a value
    instead, the value is returned, and the asyncio task is cancelled when it next waits.

    Raises whatever the function raises, the same object; `RuntimeError` if no event loop is running; and `TypeError`
    for a coroutine object in place of the function.

    Source: https://docs.python.org/3/library/asyncio-task.html#task-cancellation
    """
    return await run_from_asyncio(async_function, args)


def run_sync(function: Callable[..., T], *args: Any) -> T:
    """Return `function(*args)`, called at once as backend code.

    Use it for functions such as `trio.current_time`, or `set` of an event. On asyncio and uvloop it is a plain call.
    The function runs in the caller's context.

    Raises whatever the function raises, and `RuntimeError` if no event loop is running.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.get_running_loop
    """
    return run_sync_from_asyncio(function, args)
