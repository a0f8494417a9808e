"""Crossings: how backend code runs asyncio code, and asyncio code runs backend code.

Holds: what the functions of `to_asyncio` and `from_asyncio` do, on trio and on asyncio's event loops.
May know: `anyio`, `asyncio`, `_clock`, `_loop`, `_mistakes`, `_scheduler`, `_sides`, `_waiters`.

On asyncio and uvloop both kinds of code run in tasks of the same event loop; backend code uses AnyIO's cancel scopes
there. The rules for cancellation are the same on every backend:

- When the caller is cancelled, the task that it has started is cancelled once. The caller waits until that task ends.
- If the task ends with the cancellation, the caller is cancelled. If the task returns a value instead, the caller gets
  the value, and is cancelled when it next waits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import anyio
import anyio.lowlevel

from .._clock import monotonic
from .._scheduler import scheduler_of
from .._waiters import wake_future
from ._mistakes import advise, require_function
from ._sides import current_loop, library_variable, loop_of_backend_code, running_loop

if TYPE_CHECKING:
    from ._loop import EventLoop

T = TypeVar("T")

# How long, in seconds, crossings that wait for nothing may keep other tasks of the backend from running.
CHECKPOINT_INTERVAL = 0.001

EAGER_TASKS = sys.version_info >= (3, 12)


class TaskCancelled(concurrent.futures.CancelledError):
    """The asyncio task was cancelled, and not by the backend code that waits for it."""

    def __init__(self) -> None:
        super().__init__("the asyncio task was cancelled by asyncio code")


def asyncio_context() -> Context:
    """Return a copy of the current context for asyncio code."""
    context = copy_context()
    if context.get(library_variable) is not None:
        # AnyIO has named the backend in it. A thread that gets a copy of the context would seem to run in the backend.
        context.run(library_variable.set, None)
    return context


# To asyncio


async def call_and_await(async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Await `async_function(*args)`, called in the task that awaits it."""
    return await async_function(*args)


async def begin_and_await(
    async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...], first_step: list[Any]
) -> T | None:
    """As `call_and_await`, in a task that begins inside its constructor.

    A `KeyboardInterrupt` or `SystemExit` of the first step is added to `first_step`. If it were raised, it would leave
    the constructor, nobody would have the task, and asyncio would report an exception that was never retrieved. Before
    later steps the caller adds something to `first_step`, so they raise.
    """
    try:
        return await async_function(*args)
    except (KeyboardInterrupt, SystemExit) as exc:
        if first_step:
            raise
        first_step.append(exc)
        return None


def start_task(
    loop: EventLoop, async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...], context: Context
) -> asyncio.Task[T]:
    """Start a task. The event loop must be set as running."""
    name = getattr(async_function, "__qualname__", None)
    if not EAGER_TASKS or loop.get_task_factory() is not None:
        return loop.create_task(call_and_await(async_function, args), name=name, context=context)
    first_step: list[Any] = []
    coroutine: Any = begin_and_await(async_function, args, first_step)
    task = asyncio.Task(coroutine, loop=loop, name=name, context=context, eager_start=True)  # type: ignore[call-arg,unused-ignore]
    try:
        if first_step:
            raise first_step.pop()
        first_step.append(None)
        return task
    finally:
        del task  # Break a cycle: the traceback of its exception has this frame.


async def checkpoint(loop: EventLoop) -> None:
    """Raise a pending cancellation of this backend task; from time to time let other tasks run, too.

    Raises `RuntimeError` if the event loop runs no code any more, and this task is shielded from its cancellation.

    Most crossings wait, and so let other tasks run. One that does not wait costs less than a checkpoint does.
    """
    trio = loop._trio
    if monotonic() < loop._next_checkpoint:
        await trio.checkpoint_if_cancelled()
    else:
        await trio.checkpoint()
        loop._next_checkpoint = monotonic() + CHECKPOINT_INTERVAL
    loop._spawner.check()


async def run_to_asyncio(async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Return what `async_function(*args)` returns in an asyncio task."""
    require_function("to_asyncio.run", async_function)
    running = running_loop()
    if running is not None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        name = getattr(async_function, "__qualname__", None)
        return await outcome_in_asyncio(running.create_task(call_and_await(async_function, args), name=name))
    loop = loop_of_backend_code("to_asyncio.run")
    await checkpoint(loop)
    return await outcome_in_backend(loop, async_function, args)


async def outcome_in_backend(loop: EventLoop, async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Run an asyncio task, and return its result in backend code."""
    task: asyncio.Task[T] = loop._core.call(start_task, loop, async_function, args, asyncio_context())
    try:
        cancellation = None
        if not task.done():
            cancellation = await loop._wait_for(task, task.cancel)
        return result_of(task, cancellation)
    finally:
        del task  # Break a cycle: the traceback of its exception has this frame.


def result_of(task: asyncio.Task[T], cancellation: Callable[[], NoReturn] | None) -> T:
    """Return the result of a task that has ended. If it was cancelled, raise by `cancellation`, if there is one."""
    try:
        if not task.cancelled():
            advise(task.exception())
            return task.result()
    finally:
        del task  # Break a cycle: the traceback of its exception has this frame.
    if cancellation is not None:
        cancellation()
    raise TaskCancelled


async def outcome_in_asyncio(task: asyncio.Task[T]) -> T:
    """Wait for another task of the same event loop, and return its result."""
    try:
        cancellation = await wait_in_asyncio(task, task.cancel)
        result = result_of(task, None if cancellation is None else partial(raise_, cancellation))
        if cancellation is not None:
            cancel_again(cancellation)
        return result
    finally:
        cancellation = None
        del task  # Break a cycle: the traceback of its exception has this frame.


def raise_(exc: BaseException) -> NoReturn:
    raise exc


async def wait_in_asyncio(future: asyncio.Future[Any], cancel: Callable[[], object]) -> asyncio.CancelledError | None:
    """Wait until `future` is done. If this task is cancelled before that, call `cancel`, and continue to wait.

    Return the first cancellation, if there was one.
    """
    cancellation: asyncio.CancelledError | None = None
    try:
        while not future.done():
            # Not `future` itself: the cancellation of this task would cancel it.
            waiter = future.get_loop().create_future()
            wake = partial(_set_done, waiter)
            future.add_done_callback(wake)
            try:
                with anyio.CancelScope(shield=cancellation is not None):
                    await waiter
            except asyncio.CancelledError as exc:
                cancellation = cancellation or exc
                cancel()
            finally:
                future.remove_done_callback(wake)
        return cancellation
    finally:
        cancellation = None


def _set_done(waiter: asyncio.Future[None], _: object) -> None:
    wake_future(waiter)


def cancel_again(cancellation: asyncio.CancelledError) -> None:
    """Cancel this task once more, so that it is cancelled when it next waits: the cancellation was caught."""
    if anyio.current_effective_deadline() == -inf:
        return  # The cancel scope does this.
    task = asyncio.current_task()
    assert task is not None
    if sys.version_info >= (3, 13):
        task.uncancel()  # Both cancellations together count as one.
    elif sys.version_info >= (3, 11):
        # Here a block such as `asyncio.timeout` does not take back a cancellation that waits. So none does: the task is
        # cancelled in the next iteration, unless such a block has ended before.
        task.get_loop().call_soon(cancel_if_cancelling, task, task.cancelling(), cancellation)
        return
    task.cancel(*cancellation.args)


def cancel_if_cancelling(task: asyncio.Task[Any], before: int, cancellation: asyncio.CancelledError) -> None:
    """Cancel `task` once more, unless a block has taken its cancellation back, or another one has come."""
    if sys.version_info >= (3, 11) and 0 < task.cancelling() <= before:
        task.uncancel()
        task.cancel(*cancellation.args)


def run_sync_to_asyncio(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Return `function(*args)`, called as asyncio code."""
    require_function("to_asyncio.run_sync", function)
    if running_loop() is not None:
        return function(*args)
    loop = loop_of_backend_code("to_asyncio.run_sync")
    loop._spawner.check()
    return asyncio_context().run(loop._core.call, function, *args)


# From asyncio


class Answer(asyncio.Future[T]):
    """The future that an asyncio task awaits while a backend function runs.

    `cancel` cancels the scope of the function. The future is cancelled only if the function ends with that.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.cancellation: tuple[Any, ...] | None = None  # The arguments of `cancel`.
        self.scope: Any = None

    def cancel(self, *args: Any, **options: Any) -> bool:
        """Cancel the scope of the backend function."""
        if self.done():
            return False
        if self.cancellation is None:
            self.cancellation = (*args, *options.values())
            self.scope.cancel()
        return True

    def settle(self, exc: BaseException | None, result: Any) -> None:
        """Set the result: the backend function has raised `exc`, or has returned `result`."""
        if exc is None:
            self.set_result(result)
        elif isinstance(exc, asyncio.CancelledError):
            super().cancel(*(self.cancellation or ()))
        else:
            self.set_exception(exc)


async def run_from_asyncio(async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Return what `async_function(*args)` returns in a backend task."""
    require_function("from_asyncio.run", async_function)
    loop = running_loop()
    if loop is None:
        raise RuntimeError(
            "from_asyncio.run() is for asyncio code, but no event loop is running here. Backend code awaits the "
            "function itself"
        )
    answer: Answer[T] = Answer(loop)
    start = getattr(loop, "_start_backend_task", None)  # Only our event loop has this method.
    task = None
    if start is not None:
        start(answer, async_function, args)
    else:
        answer.scope = anyio.CancelScope()
        name = getattr(async_function, "__qualname__", None)
        task = loop.create_task(settle_in_asyncio(answer, async_function, args), name=name)
    try:
        result = await answer
    finally:
        cancellation = answer.cancellation
        del answer, task
    if cancellation is not None:
        cancel_again(asyncio.CancelledError(*cancellation))
    return result


async def settle_in_asyncio(
    answer: Answer[T], async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]
) -> None:
    """Await `async_function(*args)` in the scope of `answer`, and settle it. On asyncio this is the backend task."""
    result: Any = None
    failure: BaseException | None = None
    try:
        with answer.scope:
            result = await call_and_await(async_function, args)
    except BaseException as exc:
        failure = exc
    else:
        if answer.scope.cancelled_caught:
            failure = asyncio.CancelledError()
    try:
        answer.settle(failure, result)
        if isinstance(failure, (KeyboardInterrupt, SystemExit)):
            raise failure
    finally:
        del answer, failure  # Break a cycle: the traceback of the exception has this frame.


def run_sync_from_asyncio(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Return `function(*args)`, called as backend code."""
    require_function("from_asyncio.run_sync", function)
    loop = running_loop()
    if loop is None:
        raise RuntimeError(
            "from_asyncio.run_sync() is for asyncio code, but no event loop is running here. Backend code calls the "
            "function itself"
        )
    scheduler = scheduler_of(loop)
    return function(*args) if scheduler is None else scheduler.as_backend(with_loop, loop, function, args)


def with_loop(loop: EventLoop, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Return `function(*args)`, called with `loop` as the event loop that backend code finds."""
    token = current_loop.set(loop)
    try:
        return function(*args)
    finally:
        current_loop.reset(token)
