"""The beginning and the end of an event loop.

Holds: `open_event_loop`, `run_asyncio`, and the order in which everything ends.
May know: `anyio`, `asyncio`, `exceptiongroup`, `_core`, `_crossing`, `_loop`, `_mistakes`, `_sides`, `_trio`.
"""

from __future__ import annotations

import asyncio
import sys
import warnings
from asyncio import _get_running_loop, _set_running_loop
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel

from ._core import LoopCore
from ._crossing import TaskCancelled, outcome_in_backend, run_to_asyncio
from ._mistakes import advise, require_function
from ._sides import current_loop, running_loop

if TYPE_CHECKING:
    from ._loop import EventLoop

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")

# The number of times that callbacks which schedule callbacks are run at the end.
ROUNDS_AT_THE_END = 100


def open_event_loop() -> AbstractAsyncContextManager[asyncio.AbstractEventLoop]:
    """Return a context manager that opens an asyncio event loop for its block.

    On trio it is an event loop of this package, which runs beside trio's tasks. Use `to_asyncio` to run asyncio code
    in it. On asyncio and uvloop, and in asyncio code on trio, it is the running event loop, and nothing ends with the
    block.

    When the block is left on trio, all asyncio tasks are cancelled and awaited, servers and transports are closed, and
    asynchronous generators and threads are ended, as `asyncio.run` does. The end waits for a task that does not end. If
    the block is left by an exception or a cancellation, transports are aborted instead of closed. `connection_lost` is
    called for each of them.

    Raises the exception of the block, as itself and not in a group; `KeyboardInterrupt` or `SystemExit` of a callback
    or task, which cancels the block, when everything has ended; and `RuntimeError` where neither an event loop nor trio
    runs.

    Source: https://docs.python.org/3/library/asyncio-runner.html
    """
    return Opening()


def run_asyncio(
    async_function: Callable[..., Awaitable[T]],
    *args: Any,
    backend: str = "trio",
    backend_options: dict[str, Any] | None = None,
) -> T:
    """Run `async_function(*args)`, which is asyncio code, on `backend`, and return its result.

    It is `asyncio.run(async_function(*args))` on any backend of AnyIO. Ctrl-C cancels the task of the function.

    `async_function` is called in an asyncio task, and returns an awaitable. `backend` and `backend_options` are those
    of `anyio.run`, which passes options to trio since AnyIO 4.14.

    Raises whatever the function raises; `asyncio.CancelledError` if its task is cancelled; `KeyboardInterrupt` after
    Ctrl-C, when the task has ended; `RuntimeError` if an event loop is running in this thread; `LookupError` if the
    backend is not installed; and `TypeError` for a coroutine object in place of the function.

    Source: https://docs.python.org/3/library/asyncio-runner.html#asyncio.run
    """
    require_function("run_asyncio", async_function)

    async def main() -> T:
        async with open_event_loop():
            return await run_to_asyncio(async_function, args)

    try:
        return anyio.run(main, backend=backend, backend_options=backend_options)
    except TaskCancelled:
        raise asyncio.CancelledError from None
    finally:
        asyncio.set_event_loop(None)  # As `asyncio.run`: if asyncio code has set one, it is closed by now.


class Opening(AbstractAsyncContextManager[asyncio.AbstractEventLoop, "bool | None"]):
    """What `open_event_loop` returns."""

    _loop: EventLoop | None = None

    async def __aenter__(self) -> asyncio.AbstractEventLoop:
        running = running_loop()
        if running is not None:
            return running
        await anyio.lowlevel.checkpoint_if_cancelled()  # Raises `RuntimeError` where nothing runs.
        # Here, because they import trio.
        from .. import _trio
        from ._loop import EventLoop

        _trio.protect(LoopCore._run_scheduler, LoopCore.run_once, LoopCore.call)
        _trio.protect(Opening.__aenter__, Opening.__aexit__)
        self._scope = _trio.Scope()
        loop = EventLoop(_trio)
        loop._core.end_block = self._scope.cancel
        async with AsyncExitStack() as stack:
            stack.enter_context(self._scope)
            self._inside = await stack.enter_async_context(AsyncExitStack())
            await loop._open(self._inside)
            stack.pop_all()
        self._loop = loop
        self._token = current_loop.set(loop)
        return loop

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        loop = self._loop
        if loop is None:
            return None
        core = loop._core
        advise(exc)
        current_loop.reset(self._token)
        outcome = exc
        try:
            cancellation = await loop._spawner.finish(end, loop, exc is not None)
            loop._spawner.end()  # Tasks that began too late for `end`.
            try:
                await self._inside.aclose()
                if exc is None and cancellation is not None:
                    cancellation()
            except BaseException as error:
                # The exception of the block is more important than a cancellation, which will be raised again.
                if exc is None or not isinstance(error, anyio.get_cancelled_exc_class()):
                    outcome = only_one(error)
            try:
                if outcome is None:
                    suppressed = self._scope.__exit__(None, None, None)
                else:
                    suppressed = self._scope.__exit__(type(outcome), outcome, outcome.__traceback__)
            finally:
                if core.leaving is not None:
                    raise core.leaving
            if outcome is None or outcome is exc or suppressed:
                return suppressed
            raise outcome
        finally:
            outcome = None  # Break a cycle: its traceback has this frame.


def only_one(exc: BaseException) -> BaseException:
    """Return the only exception of a group, or of groups in it; otherwise `exc`."""
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc


async def end(loop: EventLoop, flushing: AbstractContextManager[object], aborting: bool) -> None:
    """End everything in order. A cancellation of the scope `flushing` ends the wait for write buffers."""
    core = loop._core
    await outcome_in_backend(loop, cancel_tasks, (loop,))
    if not aborting:
        with flushing:
            core.call(core.close_all)
            await core.until_empty()
    await abort_transports(loop)
    await outcome_in_backend(loop, wind_up, (loop,))
    await abort_transports(loop)  # Those that were opened by the callbacks and tasks that ended last.
    for _ in range(ROUNDS_AT_THE_END):
        if not core.ready:
            break
        core.call(bool)
    loop._close()
    unset_event_loop(loop)


def unset_event_loop(loop: EventLoop) -> None:
    """Undo `asyncio.set_event_loop(loop)`, if asyncio code has called it."""
    running = _get_running_loop()  # That of a host, in trio's guest mode.
    _set_running_loop(None)
    try:
        with warnings.catch_warnings():
            # `get_event_loop` makes one if none is set. Since Python 3.12 it warns first, which is an error here.
            warnings.simplefilter("error")
            if sys.version_info < (3, 12) or asyncio.get_event_loop() is loop:
                asyncio.set_event_loop(None)
    except (DeprecationWarning, RuntimeError):
        pass  # No event loop was set.
    finally:
        _set_running_loop(running)


async def abort_transports(loop: EventLoop) -> None:
    """Abort servers and transports, and wait for every `connection_lost`."""
    core = loop._core
    core.call(core.abort_transports)
    await core.until_empty()


async def wind_up(loop: EventLoop) -> None:
    """End tasks, asynchronous generators and threads, in asyncio's order."""
    await cancel_tasks(loop)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
    await cancel_tasks(loop)


async def cancel_tasks(loop: EventLoop) -> None:
    """Cancel all other tasks, wait until they have ended, and report those that failed."""
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    if not tasks:
        return
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled() and task.exception() is not None:
            loop.call_exception_handler(
                {
                    "message": "unhandled exception during the end of the event loop",
                    "exception": task.exception(),
                    "task": task,
                }
            )
