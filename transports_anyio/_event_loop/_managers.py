"""Context managers of asyncio libraries, for backend code.

Holds: what `to_asyncio.wrap_async_context_manager` returns.
May know: `anyio`, `asyncio`, `_crossing`, `_loop`, `_sides`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import anyio
import anyio.lowlevel

from ._crossing import asyncio_context, cancel_again, checkpoint, raise_, result_of, start_task, wait_in_asyncio
from ._sides import loop_of_backend_code, running_loop

if TYPE_CHECKING:
    from ._loop import EventLoop

T = TypeVar("T")


def nothing() -> None: ...


class AsyncioContextManager(AbstractAsyncContextManager[T, "bool | None"]):
    """Enters and leaves a context manager in one asyncio task, which waits while the block runs."""

    _loop: EventLoop | None
    _entered: asyncio.Future[T]
    _leaving: asyncio.Future[BaseException | None]
    _task: asyncio.Task[bool]

    def __init__(self, manager: AbstractAsyncContextManager[T, Any]) -> None:
        self._manager = manager

    async def _hold(self) -> bool:
        """Enter the context manager, wait, and leave it. Return whether it has suppressed an exception."""
        async with self._manager as value:
            self._entered.set_result(value)
            failure = await self._leaving
            if failure is not None:
                raise failure
            return False
        return True

    async def __aenter__(self) -> T:
        running = running_loop()
        if running is None:
            self._loop = loop = loop_of_backend_code("to_asyncio.wrap_async_context_manager")
            await checkpoint(loop)
            self._make_futures(loop)
            self._task = loop._core.call(start_task, loop, self._hold, (), asyncio_context())
        else:
            self._loop = None
            await anyio.lowlevel.checkpoint_if_cancelled()
            self._make_futures(running)
            self._task = running.create_task(self._hold())
        # If the task ends before it has entered the context manager, the wait for that ends, too.
        self._task.add_done_callback(lambda _: self._entered.done() or self._entered.cancel())
        cancellation = await self._wait_for(self._entered, self._task.cancel)
        if self._entered.cancelled():
            result_of(self._task, cancellation)
        self._cancel_again(cancellation)
        return self._entered.result()

    def _make_futures(self, loop: asyncio.AbstractEventLoop) -> None:
        self._entered = loop.create_future()
        self._leaving = loop.create_future()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
        if not self._leaving.done():
            failure = asyncio.CancelledError() if cancelled else exc
            if self._loop is None:
                self._leaving.set_result(failure)
            else:
                self._loop._core.call(self._leaving.set_result, failure)
        # If the block was cancelled, the task has had its cancellation.
        cancellation = await self._wait_for(self._task, nothing if cancelled else self._task.cancel)
        task_cancelled = self._task.cancelled()
        try:
            suppressed = result_of(self._task, cancellation)
        except BaseException as error:
            if exc is not None and ((cancelled and task_cancelled) or exc is error or exc is error.__cause__):
                exc.__traceback__ = traceback  # Remove the lines of the asyncio task.
                return False
            raise
        finally:
            del self._task  # Break a cycle: the traceback of its exception has this frame.
        if not cancelled:
            self._cancel_again(cancellation)
        return suppressed and not cancelled

    async def _wait_for(
        self, future: asyncio.Future[Any], cancel: Callable[[], object]
    ) -> Callable[[], NoReturn] | None:
        if self._loop is not None:
            return None if future.done() else await self._loop._wait_for(future, cancel)
        exc = await wait_in_asyncio(future, cancel)
        return None if exc is None else Cancellation(exc)

    def _cancel_again(self, cancellation: Callable[[], NoReturn] | None) -> None:
        if isinstance(cancellation, Cancellation):
            cancel_again(cancellation.exc)


class Cancellation:
    """A cancellation that was caught in an asyncio task. A call raises it."""

    def __init__(self, exc: asyncio.CancelledError) -> None:
        self.exc = exc

    def __call__(self) -> NoReturn:
        raise_(self.exc)
