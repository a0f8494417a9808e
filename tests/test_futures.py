"""Futures: those of a group beside those of asyncio's event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import sys
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support import GUARD, Stack, collect_contexts, raises_inside, turns

from transports_anyio import (
    Future,
    Protocol,
    TransportGroup,
    TransportStream,
    current_group,
    open_event_loop,
    to_asyncio,
)
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_a_result(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        assert not future.done()
        assert not future.cancelled()
        group.call_soon(future.set_result, 42)
        assert await future == 42
        assert future.done()
        assert not future.cancelled()
        assert future.result() == 42
        assert future.exception() is None
        assert await future == 42  # At once.


async def test_an_exception(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        error = LookupError("gone")
        group.call_soon(future.set_exception, error)
        with pytest.raises(LookupError) as caught:
            await future
        assert caught.value is error
        assert future.exception() is error
        assert not future.cancelled()
        with pytest.raises(LookupError):
            future.result()


@pytest.mark.differs(
    "the order of a future's callbacks and of the tasks that await it",
    asyncio="that in which they were added and began to wait",
    here="the callbacks run in the order in which they were added; tasks may run before or after them",
    why="the tasks are the backend's, and trio runs tasks in any order",
)
async def test_the_order_of_callbacks_and_waiting_tasks(stack: Stack) -> None:
    order: list[str] = []

    async def wait() -> None:
        await future
        order.append("task")

    async with stack.open() as group:
        future = group.create_future()
        async with anyio.create_task_group() as tasks:
            future.add_done_callback(lambda _: order.append("first"))
            tasks.start_soon(wait)
            await turns()
            future.add_done_callback(lambda _: order.append("second"))
            future.set_result(1)
        await turns()
    if stack.is_oracle:
        assert order == ["first", "task", "second"]
    order.remove("task")
    assert order == ["first", "second"]


async def test_a_class_of_exceptions(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        future.set_exception(ValueError)
        assert type(future.exception()) is ValueError


async def test_stop_iteration_is_the_cause_of_a_runtime_error(stack: Stack) -> None:
    async with stack.open() as group:
        for given in (StopIteration, StopIteration(3)):
            future = group.create_future()
            future.set_exception(given)
            error = future.exception()
            assert type(error) is RuntimeError
            assert type(error.__cause__) is StopIteration
            with pytest.raises(RuntimeError):
                await future


async def test_what_is_not_an_exception_is_refused(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        for given in (3, "error", int):
            with pytest.raises(TypeError):
                future.set_exception(given)
        assert not future.done()
        future.set_result(None)


async def test_a_future_that_is_pending_or_done_refuses(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        with pytest.raises(asyncio.InvalidStateError):
            future.result()
        with pytest.raises(asyncio.InvalidStateError):
            future.exception()
        future.set_result(1)
        with pytest.raises(asyncio.InvalidStateError):
            future.set_result(2)
        with pytest.raises(asyncio.InvalidStateError):
            future.set_exception(LookupError())
        assert future.cancel() is False
        assert future.result() == 1
        failed = group.create_future()
        failed.set_exception(LookupError())
        with pytest.raises(asyncio.InvalidStateError):
            failed.set_result(2)
        assert isinstance(failed.exception(), LookupError)


async def test_cancel(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        assert future.cancel() is True
        assert future.cancel() is False
        assert future.done()
        assert future.cancelled()
        with pytest.raises(asyncio.InvalidStateError):
            future.set_result(1)
        error = asyncio.CancelledError if stack.is_oracle else concurrent.futures.CancelledError
        for call in (future.result, future.exception):
            with pytest.raises(error) as caught:
                call()
            assert caught.value.args == ()
        named = group.create_future()
        named.cancel("too late")
        with pytest.raises(error) as caught:
            named.result()
        assert caught.value.args == ("too late",)


@pytest.mark.differs(
    "awaiting a future that was cancelled",
    asyncio="raises `asyncio.CancelledError`, as if the task were cancelled",
    here="raises `concurrent.futures.CancelledError`, an `Exception`",
    why="on trio only the backend may raise its cancellation",
)
@pytest.mark.ours_only
async def test_a_cancelled_future_raises_an_exception_in_the_waiting_task(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        group.call_soon(future.cancel, "no more")
        with pytest.raises(concurrent.futures.CancelledError) as caught:
            await future
        assert isinstance(caught.value, Exception)
        assert caught.value.args == ("no more",)
        await anyio.lowlevel.checkpoint()  # The task itself is not cancelled.


async def test_callbacks_come_later_in_order_and_once(stack: Stack) -> None:
    calls: list[Any] = []
    async with stack.open() as group:
        future = group.create_future()
        future.add_done_callback(lambda given: calls.append(("first", given)))
        future.add_done_callback(lambda given: calls.append(("second", given)))
        future.set_result(1)
        assert calls == []
        await turns()
        assert calls == [("first", future), ("second", future)]
        future.add_done_callback(lambda given: calls.append(("third", given)))
        assert len(calls) == 2
        await turns()
        assert calls[2:] == [("third", future)]


async def test_the_context_of_a_callback(stack: Stack) -> None:
    seen: list[str] = []

    def note(_: object) -> None:
        seen.append(variable.get())

    async with stack.open() as group:
        for done_before in (False, True):
            future = group.create_future()
            if done_before:
                future.set_result(None)
            variable.set("when it was added")
            future.add_done_callback(note)
            given = copy_context()
            given.run(variable.set, "given")
            future.add_done_callback(note, context=given)
            variable.set("later")
            if not done_before:
                future.set_result(None)
            await turns()
    assert seen == ["when it was added", "given"] * 2


async def test_remove_done_callback(stack: Stack) -> None:
    calls: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, _: object) -> None:
            calls.append(self.name)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Counted) and other.name == self.name

        __hash__ = None  # type: ignore[assignment]

    async with stack.open() as group:
        future = group.create_future()
        for name in "abab":
            future.add_done_callback(Counted(name))
        assert future.remove_done_callback(Counted("a")) == 2
        assert future.remove_done_callback(Counted("a")) == 0
        assert future.remove_done_callback(Counted("c")) == 0
        future.cancel()
        await turns()
        assert calls == ["b", "b"]
        assert future.remove_done_callback(Counted("b")) == 0


async def test_a_callback_that_fails_is_reported(stack: Stack) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        future = group.create_future()
        later: list[object] = []
        future.add_done_callback(lambda _: 1 / 0)
        future.add_done_callback(later.append)
        future.set_result(None)
        await turns()
        (context,) = contexts
        assert isinstance(context["exception"], ZeroDivisionError)
        assert later == [future]


@pytest.mark.differs(
    "`add_done_callback` with something that cannot be called",
    asyncio="an error in the event loop, later",
    here="`TypeError` at the call",
    why="the traceback shows the line with the mistake",
)
@pytest.mark.ours_only
async def test_a_done_callback_that_cannot_be_called_is_refused(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        with pytest.raises(TypeError):
            future.add_done_callback("not callable")
        future.set_result(None)
        with pytest.raises(TypeError):
            future.add_done_callback("not callable")


async def test_an_exception_that_is_never_retrieved_is_reported(stack: Stack) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        future = group.create_future()
        error = LookupError()
        future.set_exception(error)
        del future
        gc.collect()
        (context,) = contexts
        assert context["message"] == "Future exception was never retrieved"
        assert context["exception"] is error
        assert context["future"].exception() is error
        contexts.clear()
        context.clear()
        for retrieve in ("result", "exception", "await"):
            future = group.create_future()
            future.set_exception(LookupError())
            if retrieve == "exception":
                assert future.exception() is not None
            else:
                with pytest.raises(LookupError):
                    future.result() if retrieve == "result" else await future
            del future
        cancelled = group.create_future()
        cancelled.cancel()
        del cancelled
        gc.collect()
        assert contexts == []


async def test_repr(stack: Stack) -> None:
    async with stack.open() as group:
        states = {
            "pending": lambda _: None,
            "cancelled": lambda future: future.cancel(),
            "finished result=42": lambda future: future.set_result(42),
            "finished exception=LookupError('gone')": lambda future: future.set_exception(LookupError("gone")),
        }
        for state, change in states.items():
            future = group.create_future()
            change(future)
            assert repr(future) == f"<Future {state}>"
            if "exception" in state:
                future.exception()

    class Bad:
        def __repr__(self) -> str:
            raise ArithmeticError

    bad: Future[Bad] = Future(group)
    if not stack.is_oracle:
        bad.set_result(Bad())
        assert repr(bad).startswith("<Future finished result=<Bad instance at ")


async def test_many_tasks_wait(stack: Stack) -> None:
    async with stack.open() as group:
        future, results = group.create_future(), []

        async def wait() -> None:
            results.append(await future)

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(wait)
            await turns()
            future.set_result("x")
            assert results == []
        assert results == ["x"] * 100


async def test_each_waiting_task_raises_the_exception_with_its_own_traceback(stack: Stack) -> None:
    async with stack.open() as group:
        future, depths = group.create_future(), []

        async def wait() -> None:
            try:
                await future
            except LookupError as exc:
                traceback, depth = exc.__traceback__, 0
                while traceback is not None:
                    traceback, depth = traceback.tb_next, depth + 1
                depths.append(depth)

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(wait)
            await turns()
            future.set_exception(LookupError())
        assert len(set(depths)) == 1, depths


@pytest.mark.differs(
    "a task is cancelled while it awaits a future",
    asyncio="the future is cancelled too",
    here="the future stays as it is",
    why="other tasks may await the same future",
)
@pytest.mark.ours_only
async def test_a_cancelled_waiting_task_does_not_cancel_the_future(stack: Stack) -> None:
    async with stack.open() as group:
        future = group.create_future()
        ended: list[str] = []

        async def wait() -> None:
            try:
                ended.append(await future)
            except anyio.get_cancelled_exc_class():
                ended.append("cancelled")
                raise

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            async with anyio.create_task_group() as others:
                others.start_soon(wait)
                await turns()
                others.cancel_scope.cancel()
            assert ended == ["cancelled"]
            assert not future.done()
            with anyio.move_on_after(0.001) as scope:
                await future
            assert scope.cancelled_caught
            future.set_result("x")
        assert ended == ["cancelled", "x"]


async def test_a_task_that_is_cancelled_as_the_future_ends(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        for order in ("cancel first", "set first"):
            future: Future[int] = group.create_future()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait_for, future)
                await turns()
                if order == "cancel first":
                    tasks.cancel_scope.cancel()
                future.set_result(1)
                tasks.cancel_scope.cancel()
            assert await future == 1


async def wait_for(future: Future[int]) -> None:
    await future


async def test_a_future_is_freed_without_the_garbage_collector(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        gc.disable()
        try:
            for end in ("result", "exception"):
                future: Future[int] = group.create_future()
                group.call_soon(*((future.set_result, 1) if end == "result" else (future.set_exception, LookupError())))
                try:
                    await future
                except LookupError:
                    pass
                watched = weakref.ref(future)
                await turns()
                del future
                assert watched() is None, end
        finally:
            gc.enable()


async def test_the_group_is_current_in_a_callback(anyio_backend: Any) -> None:
    groups: list[TransportGroup] = []
    async with TransportGroup() as group:
        future = group.create_future()
        future.add_done_callback(lambda _: groups.append(current_group()), context=copy_context())
        future.set_result(None)
        await turns()
        assert groups == [group]


async def test_a_callback_after_the_end_of_the_group_is_refused(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        future = group.create_future()
        future.add_done_callback(print)
    with pytest.raises(RuntimeError):
        future.set_result(1)
    assert future.result() == 1
    late: Future[int] = group.create_future()
    late.set_result(2)
    assert await late == 2


async def test_tasks_of_both_kinds_wait_for_one_future(anyio_backend: Any) -> None:
    got: list[tuple[str, object]] = []
    for setter in ("backend", "asyncio"):
        async with open_event_loop(), TransportGroup() as group:
            future = group.create_future()

            async def wait(kind: str, future: Future[Any] = future) -> None:
                got.append((kind, await future))

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(wait, "backend task")
                    tasks.start_soon(to_asyncio.run, wait, "asyncio task")
                    tasks.start_soon(to_asyncio.run, asyncio.ensure_future, wait("asyncio task"))
                await turns()
                if setter == "backend":
                    future.set_result(setter)
                else:
                    to_asyncio.run_sync(future.set_result, setter)
        assert sorted(got) == [("asyncio task", setter)] * 6 + [("backend task", setter)] * 3
        got.clear()


async def test_asyncio_functions_take_a_future_of_a_group(anyio_backend: Any) -> None:
    async def main() -> None:
        async with TransportGroup() as group:
            future = group.create_future()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(future, 0.001)
            assert not future.done()
            group.call_soon(future.set_result, 1)
            assert [*await asyncio.gather(future, asyncio.wait_for(future, GUARD))] == [1, 1]

    async with open_event_loop():
        await to_asyncio.run(main)


async def test_from_another_thread(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        future = group.create_future()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, group.call_soon_threadsafe, future.set_result, 5)
            assert await future == 5


def test_a_result_that_cannot_be_set_leaves_the_future_pending() -> None:
    """In another thread, or at the recursion limit: on trio, because asyncio's own futures lose what waits for them."""

    def sink(depth: int) -> None:
        if depth:
            sink(depth - 1)
        else:
            future.set_result("at the limit")

    async def main() -> None:
        nonlocal future
        async with TransportGroup() as group:
            future = group.create_future()
            async with anyio.create_task_group() as tasks:
                for _ in range(2):
                    tasks.start_soon(wait_for, future)
                await turns()
                for call in (partial(future.set_result, 1), partial(future.set_exception, ValueError()), future.cancel):
                    with pytest.raises(RuntimeError):
                        await anyio.to_thread.run_sync(call)
                    assert not future.done()
                tasks.cancel_scope.cancel()
            got: list[Any] = []

            async def wait() -> None:
                got.append(await future)

            for _ in range(2):
                group.start_soon(wait)
            await turns()
            refused = 0
            for depth in range(sys.getrecursionlimit(), 0, -1):
                try:
                    sink(depth)
                except RecursionError:
                    refused += 1
                else:
                    break
            assert refused
            await turns()
            assert got == ["at the limit"] * 2

    future: Future[Any]
    pytest.importorskip("trio").run(main)


@pytest.mark.parametrize("what", ["future", "stream"])
def test_a_wait_that_fails_at_the_recursion_limit_leaves_nothing_behind(what: str) -> None:
    """Nothing that would wake the task in its next wait: on trio, as above."""

    async def wait_below(depth: int, wait: Callable[[], Awaitable[object]]) -> None:
        await (wait_below(depth - 1, wait) if depth else wait())

    async def main() -> None:
        async with TransportGroup() as group:
            (transport, _), (peer, _) = await memory_connection(group, Protocol, Protocol)
            stream = TransportStream(transport)
            for _ in range(100):  # Until Python has specialized what runs often: it needs fewer frames then.
                peer.write(b"data")
                assert await stream.receive()
            refused = 0
            for depth in range(sys.getrecursionlimit(), 0, -1):
                future = group.create_future()
                with anyio.move_on_after(0) as scope:
                    try:
                        await wait_below(depth, stream.receive if what == "stream" else lambda future=future: future)
                    except RecursionError:
                        refused += 1
                future.set_result(None)
                peer.write(b"data")
                await anyio.lowlevel.checkpoint()
                if scope.cancelled_caught:
                    break
                assert await stream.receive()
            assert refused

    pytest.importorskip("trio").run(main)


async def test_a_waiting_task_that_is_interrupted_leaves_the_future_whole() -> None:
    pytest.importorskip("trio")
    program = Path(__file__).with_name("interrupted.py")
    for where in ("future", "future being set"):
        result = await anyio.run_process([sys.executable, str(program), where], check=False)
        *printed, last = result.stdout.decode().splitlines()
        assert last == "KeyboardInterrupt", result.stderr.decode()
        assert printed == ["the other task got 1", "connection_lost"], where


async def test_an_exception_of_a_task_leaves_through_the_group(anyio_backend: Any) -> None:
    with raises_inside(LookupError):
        async with TransportGroup() as group:
            future = group.create_future()
            group.start_soon(wait_for, future)
            await turns()
            future.set_exception(LookupError())
