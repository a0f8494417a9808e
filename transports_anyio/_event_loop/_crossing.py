"""From one side to the other: what the functions of `to_asyncio` and `from_asyncio` do.

On asyncio and uvloop both sides are tasks of the same event loop, and there it is AnyIO's cancel scopes that belong to
backend code. The rules are the same:

- A task on the other side is cancelled once, and waited for until it ends, whatever happens.
- If it ends with its cancellation, the cancellation goes on in the caller. If it returns a value all the same, the
  caller gets the value, and is cancelled when it next waits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import anyio
import anyio.lowlevel

from ._mistakes import advise
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
        # AnyIO's word for the backend. Threads that get a copy of the context would believe that they are inside it.
        context.run(library_variable.set, None)
    return context


# To asyncio


async def call_and_await(async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Await `async_function(*args)`, called in the task that awaits it."""
    return await async_function(*args)


def start_task(
    loop: EventLoop, async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...], context: Context
) -> asyncio.Task[T]:
    """Start a task; with the event loop set as running."""
    coroutine = call_and_await(async_function, args)
    name = getattr(async_function, "__qualname__", None)
    if EAGER_TASKS and loop.get_task_factory() is None:
        return asyncio.Task(coroutine, loop=loop, name=name, context=context, eager_start=True)  # type: ignore[call-arg,unused-ignore]
    return loop.create_task(coroutine, name=name, context=context)


async def checkpoint(loop: EventLoop) -> None:
    """Raise a cancellation of this backend task, and let others run unless they did a moment ago.

    What is called in asyncio code may not wait for anything, and a checkpoint costs as much as all the rest then.
    """
    trio = loop._trio
    if monotonic() < loop._next_checkpoint:
        await trio.checkpoint_if_cancelled()
        return
    await trio.checkpoint()
    loop._next_checkpoint = monotonic() + CHECKPOINT_INTERVAL


async def run_to_asyncio(async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Return what `async_function(*args)` returns in an asyncio task."""
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
            cancellation = await loop._trio.wait_for(task, task.cancel)
        return result_of(task, cancellation)
    finally:
        del task  # Its exception has this frame: no cycle.


def result_of(task: asyncio.Task[T], cancellation: Callable[[], NoReturn] | None) -> T:
    """Return the result of a task that has ended, after it was cancelled if there is a `cancellation` to raise."""
    try:
        if not task.cancelled():
            advise(task.exception())
            return task.result()
    finally:
        del task  # Its exception has this frame: no cycle.
    if cancellation is not None:
        cancellation()
    raise TaskCancelled


async def outcome_in_asyncio(task: asyncio.Task[T]) -> T:
    """Return the result of a task in another task of the same event loop."""
    try:
        cancellation = await wait_in_asyncio(task, task.cancel)
        result = result_of(task, None if cancellation is None else partial(raise_, cancellation))
        if cancellation is not None:
            cancel_again(cancellation)
        return result
    finally:
        cancellation = None
        del task  # Its exception has this frame: no cycle.


def raise_(exc: BaseException) -> NoReturn:
    raise exc


async def wait_in_asyncio(future: asyncio.Future[Any], cancel: Callable[[], object]) -> asyncio.CancelledError | None:
    """Wait until `future` is done, whatever happens; call `cancel` when this task is cancelled before that.

    Return the first cancellation, if there was one.
    """
    cancellation: asyncio.CancelledError | None = None
    try:
        while not future.done():
            # A future of its own: to cancel this task must not cancel `future` by itself.
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
    if not waiter.done():
        waiter.set_result(None)


def cancel_again(cancellation: asyncio.CancelledError) -> None:
    """Let a cancellation that has been caught be raised when this task next waits."""
    if anyio.current_effective_deadline() == -inf:
        return  # A cancel scope of AnyIO's does so.
    task = asyncio.current_task()
    assert task is not None
    if sys.version_info >= (3, 11):
        task.uncancel()  # It counts once.
    task.cancel(*cancellation.args)


def run_sync_to_asyncio(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Return `function(*args)`, called as asyncio code."""
    if running_loop() is not None:
        return function(*args)
    loop = loop_of_backend_code("to_asyncio.run_sync")
    return asyncio_context().run(loop._core.call, function, *args)


# From asyncio


class Answer(asyncio.Future[T]):
    """What an asyncio task waits for while a backend function runs. To cancel it cancels the function's scope."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.cancellation: tuple[Any, ...] | None = None  # What it was cancelled with.
        self.scope: Any = None

    def cancel(self, *args: Any, **options: Any) -> bool:
        """Ask the backend function to end; it decides."""
        if self.done():
            return False
        if self.cancellation is None:
            self.cancellation = (*args, *options.values())
            self.scope.cancel()
        return True

    def settle(self, exc: BaseException | None, result: Any) -> None:
        """Take the outcome of the backend function."""
        if exc is None:
            self.set_result(result)
        elif isinstance(exc, asyncio.CancelledError):
            super().cancel(*(self.cancellation or ()))
        else:
            self.set_exception(exc)


async def run_from_asyncio(async_function: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
    """Return what `async_function(*args)` returns in a backend task."""
    loop = running_loop()
    if loop is None:
        raise RuntimeError(
            "from_asyncio.run() is for asyncio code, and no event loop is running here: backend code awaits the "
            "function itself"
        )
    answer: Answer[T] = Answer(loop)
    start = getattr(loop, "_start_backend_task", None)  # Only ours has it.
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
    """Await `async_function(*args)` in the scope of `answer`, and settle it: the backend task on asyncio."""
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
        del answer, failure  # Its traceback has this frame: no cycle.


def run_sync_from_asyncio(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Return `function(*args)`, called as backend code."""
    loop = running_loop()
    if loop is None:
        raise RuntimeError(
            "from_asyncio.run_sync() is for asyncio code, and no event loop is running here: backend code calls the "
            "function itself"
        )
    core = getattr(loop, "_core", None)
    return function(*args) if core is None else core.as_backend(with_loop, loop, function, args)


def with_loop(loop: EventLoop, function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Return `function(*args)`, with `loop` as the event loop of backend code."""
    token = current_loop.set(loop)
    try:
        return function(*args)
    finally:
        current_loop.reset(token)
