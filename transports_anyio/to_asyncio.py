"""Run asyncio code from backend code: for trio and AnyIO tasks that use asyncio libraries.

May know: `_event_loop`.

The functions need an event loop, which `transports_anyio.open_event_loop` opens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from ._event_loop._crossing import run_sync_to_asyncio, run_to_asyncio
from ._event_loop._managers import AsyncioContextManager

__all__ = ["run", "run_sync", "wrap_async_context_manager"]

T = TypeVar("T")


async def run(async_function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await `async_function(*args)` in an asyncio task, and return its result.

    The function is called in the task, so any function that returns an awaitable can be used. The task has a copy of
    the caller's context variables.

    When the caller's scope is cancelled, the task is cancelled once, and the caller waits until the task ends. Then the
    caller is cancelled. If the task returns a value instead, the value is returned, and the caller is cancelled at its
    next checkpoint.

    Raises whatever the task raises, the same object; `concurrent.futures.CancelledError` if asyncio code has cancelled
    the task; `RuntimeError` outside `open_event_loop`, and in another thread than the event loop's; and `TypeError`
    for a coroutine object in place of the function.

    Source: https://docs.python.org/3/library/asyncio-task.html
    """
    return await run_to_asyncio(async_function, args)


def run_sync(function: Callable[..., T], *args: Any) -> T:
    """Return `function(*args)`, called at once as asyncio code: with the event loop set as running.

    Use it for constructors that need the running event loop. The function runs in a copy of the caller's context.

    Raises whatever the function raises, and `RuntimeError` as `run` does.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.get_running_loop
    """
    return run_sync_to_asyncio(function, args)


def wrap_async_context_manager(cm: AbstractAsyncContextManager[T, Any]) -> AbstractAsyncContextManager[T, bool | None]:
    """Return a context manager for backend code that enters and leaves `cm` in one asyncio task.

    Entering and leaving are cancelled as in `run`. If the block is left by a cancellation, `cm` gets one
    `asyncio.CancelledError`, and is not cancelled again.

    Raises what `cm` raises, and `RuntimeError` as `run` does when it is entered.

    Source: https://docs.python.org/3/reference/datamodel.html#async-context-managers
    """
    return AsyncioContextManager(cm)
