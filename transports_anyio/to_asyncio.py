"""From backend code to asyncio code: functions for a trio or AnyIO task that wants something of an asyncio library.

They need an event loop, which `transports_anyio.open_event_loop` opens. On asyncio and uvloop that is the running one.
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

    The function is called inside the task, so whatever returns an awaitable will do. The task has a copy of the
    caller's context variables.

    When the caller's scope is cancelled, the task gets one `asyncio.CancelledError`, and the caller waits for its end.
    The cancellation goes on then; a value that the task returns all the same is returned, and the cancellation comes
    at the next checkpoint.

    Raises whatever the task raises, the same object; `concurrent.futures.CancelledError` when asyncio code has
    cancelled the task; `RuntimeError` outside `open_event_loop`, and in another thread than the event loop's; and
    `TypeError` for a coroutine object in place of the function.

    Source: https://docs.python.org/3/library/asyncio-task.html
    """
    return await run_to_asyncio(async_function, args)


def run_sync(function: Callable[..., T], *args: Any) -> T:
    """Return `function(*args)`, called at once, in this task, as asyncio code: with the event loop running.

    For constructors that ask for the running event loop. The function sees a copy of the caller's context variables.

    Raises whatever the function raises, and `RuntimeError` as `run` does.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.get_running_loop
    """
    return run_sync_to_asyncio(function, args)


def wrap_async_context_manager(cm: AbstractAsyncContextManager[T, Any]) -> AbstractAsyncContextManager[T, bool | None]:
    """Return a context manager for backend code that enters and leaves `cm`, both in the same asyncio task.

    Entering and leaving it is cancelled as `run` is. If the block is left by a cancellation, `cm` gets an
    `asyncio.CancelledError`, and is left in peace.

    Raises what `cm` raises, and `RuntimeError` as `run` does when it is entered.

    Source: https://docs.python.org/3/reference/datamodel.html#async-context-managers
    """
    return AsyncioContextManager(cm)
