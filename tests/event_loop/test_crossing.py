"""Crossings between backend code and asyncio code: results, errors, cancellation, context variables."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import sys
import threading
import time
import weakref
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.lowlevel
import pytest
from support import GUARD, turns, until

from transports_anyio import from_asyncio, open_event_loop, run_asyncio, to_asyncio

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class MistakeError(Exception):
    pass


# -- to asyncio


@pytest.mark.parametrize("first_step", [True, False])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_leaves_is_not_reported_as_well(anyio_backend, caplog, first_step, error):
    async def leave():
        if not first_step:
            await asyncio.sleep(0)
        raise error(3)

    name, options = anyio_backend if isinstance(anyio_backend, tuple) else (anyio_backend, {})
    with pytest.raises(error) as caught:
        run_asyncio(leave, backend=name, backend_options=options)
    assert caught.value.args == (3,)
    gc.collect()
    assert not caplog.records


async def test_run_returns_the_result_of_an_asyncio_task(anyio_backend):
    async def double(number):
        assert asyncio.current_task() is not None
        await asyncio.sleep(0.001)
        return 2 * number

    async with open_event_loop():
        assert await to_asyncio.run(double, 21) == 42


async def test_run_takes_whatever_returns_an_awaitable(anyio_backend):
    def future_of(loop, value):
        future = loop.create_future()
        loop.call_soon(future.set_result, value)
        return future

    async with open_event_loop() as loop:
        assert await to_asyncio.run(future_of, loop, 5) == 5
        assert await to_asyncio.run(lambda: asyncio.sleep(0, 6)) == 6


async def test_run_of_something_that_does_not_wait(anyio_backend):
    async def at_once():
        return asyncio.get_running_loop()

    async with open_event_loop() as loop:
        assert await to_asyncio.run(at_once) is loop


async def test_many_tasks_of_the_backend_use_the_loop_at_once(anyio_backend):
    results = []

    async def use(number):
        results.append(await to_asyncio.run(asyncio.sleep, 0.001, number))

    async with open_event_loop(), anyio.create_task_group() as tasks:
        for number in range(50):
            tasks.start_soon(use, number)
    assert sorted(results) == list(range(50))


async def test_an_exception_is_the_same_object(anyio_backend):
    mistake = MistakeError()

    async def fail(*, wait):
        if wait:
            await asyncio.sleep(0)
        raise mistake

    async with open_event_loop():
        for wait in (False, True):
            with pytest.raises(MistakeError) as caught:
                await to_asyncio.run(lambda wait=wait: fail(wait=wait))
            assert caught.value is mistake


async def test_a_group_of_exceptions_is_the_same_object(anyio_backend):
    group = ExceptionGroup("several", [MistakeError(), ValueError()])

    async def fail():
        raise group

    async with open_event_loop():
        with pytest.raises(ExceptionGroup) as caught:
            await to_asyncio.run(fail)
        assert caught.value is group


async def test_stop_iteration_becomes_a_runtime_error(anyio_backend):
    def stop():
        raise StopIteration

    async def ask():
        await from_asyncio.run(stop)

    async with open_event_loop():
        for function in (stop, ask):
            with pytest.raises(RuntimeError, match="raised StopIteration"):
                await to_asyncio.run(function)


async def test_a_cancelled_scope_cancels_the_task_once_and_waits_for_it(anyio_backend):
    events = []
    begun = anyio.Event()

    async def work():
        from_asyncio.run_sync(begun.set)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            events.append("cancelled")
            for _ in range(3):
                await asyncio.sleep(0.001)  # May wait, and is left in peace.
            events.append("cleaned up")
            raise

    async with open_event_loop():
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def cancel():
                    await begun.wait()
                    scope.cancel()

                tasks.start_soon(cancel)
                await to_asyncio.run(work)
                events.append("not reached")
        assert scope.cancelled_caught
        assert events == ["cancelled", "cleaned up"]


async def test_a_deadline_cancels_the_task(anyio_backend):
    async with open_event_loop():
        with anyio.move_on_after(0.01) as scope:
            await to_asyncio.run(asyncio.sleep, 3600)
        assert scope.cancelled_caught
        with pytest.raises(TimeoutError), anyio.fail_after(0.01):
            await to_asyncio.run(asyncio.Event().wait)


async def test_a_value_that_is_returned_in_spite_of_a_cancellation(anyio_backend):
    async def insist():
        asyncio.get_running_loop().call_soon(scope.cancel)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return "value"

    async with open_event_loop():
        values = []
        with anyio.CancelScope() as scope:
            values.append(await to_asyncio.run(insist))
            await anyio.sleep(3600)
        assert values == ["value"]
        assert scope.cancelled_caught


async def test_something_else_that_is_raised_after_a_cancellation(anyio_backend):
    async def fail():
        asyncio.get_running_loop().call_soon(scope.cancel)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise MistakeError from None

    async with open_event_loop():
        with pytest.raises(MistakeError), anyio.CancelScope() as scope:
            await to_asyncio.run(fail)


async def test_a_scope_that_is_cancelled_already_starts_nothing(anyio_backend):
    started = []

    async def start():
        started.append(1)

    async with open_event_loop():
        with anyio.CancelScope() as scope:
            scope.cancel()
            await to_asyncio.run(start)
        assert scope.cancelled_caught
        assert started == []


async def test_a_task_that_asyncio_code_cancels_is_an_ordinary_error_for_the_backend(anyio_backend):
    async def cancel_itself():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def raise_it():
        raise asyncio.CancelledError

    async with open_event_loop():
        for function in (cancel_itself, raise_it):
            with pytest.raises(concurrent.futures.CancelledError) as caught:
                await to_asyncio.run(function)
            assert isinstance(caught.value, Exception)
            assert not isinstance(caught.value, asyncio.CancelledError)


async def test_context_variables_are_copied_to_asyncio_and_not_back(anyio_backend):
    async def look():
        seen = variable.get()
        variable.set("asyncio's")
        await asyncio.sleep(0)
        return seen

    def look_sync():
        seen = variable.get()
        variable.set("asyncio's")
        return seen

    async with open_event_loop():
        variable.set("backend's")
        assert await to_asyncio.run(look) == "backend's"
        assert variable.get() == "backend's"


async def test_context_variables_of_run_sync(anyio_backend):
    async with open_event_loop():
        variable.set("backend's")
        assert to_asyncio.run_sync(variable.get) == "backend's"
        assert to_asyncio.run_sync(from_asyncio.run_sync, variable.get) == "backend's"


async def test_run_sync_calls_at_once_with_the_loop_running(anyio_backend):
    def construct():
        loop = asyncio.get_running_loop()
        return loop, loop.create_future(), threading.get_ident()

    async with open_event_loop() as loop:
        found, future, thread = to_asyncio.run_sync(construct)
        assert found is loop
        assert future.get_loop() is loop
        assert thread == threading.get_ident()


async def test_run_sync_raises_the_same_object(anyio_backend):
    mistake = MistakeError()

    def fail():
        raise mistake

    async with open_event_loop():
        with pytest.raises(MistakeError) as caught:
            to_asyncio.run_sync(fail)
        assert caught.value is mistake


async def test_what_run_sync_starts_goes_on(anyio_backend):
    done = []

    async def work():
        await asyncio.sleep(0.001)
        done.append(1)

    async with open_event_loop() as loop:
        task = to_asyncio.run_sync(lambda: loop.create_task(work()))
        await until(lambda: done)
        await until(task.done)


# -- context managers


@asynccontextmanager
async def manager(events, *, suppress=()):
    task = asyncio.current_task()
    events.append("entered")
    try:
        yield "value"
    except suppress as exc:
        events.append(repr(exc))
    except asyncio.CancelledError:
        await asyncio.sleep(0.001)
        events.append("cancelled")
        raise
    finally:
        await asyncio.sleep(0.001)
        assert asyncio.current_task() is task
        events.append("left")


async def test_a_context_manager_is_entered_and_left_in_one_task(anyio_backend):
    events = []
    async with open_event_loop():
        async with to_asyncio.wrap_async_context_manager(manager(events)) as value:
            assert value == "value"
            await anyio.sleep(0.001)
            events.append("inside")
    assert events == ["entered", "inside", "left"]


async def test_a_context_manager_sees_what_the_block_raises(anyio_backend):
    events = []
    mistake = MistakeError()
    async with open_event_loop():
        with pytest.raises(MistakeError) as caught:
            async with to_asyncio.wrap_async_context_manager(manager(events)):
                raise mistake
        assert caught.value is mistake
        async with to_asyncio.wrap_async_context_manager(manager(events, suppress=MistakeError)):
            raise mistake
    assert events == ["entered", "left", "entered", "MistakeError()", "left"]


async def test_a_context_manager_whose_block_is_cancelled(anyio_backend):
    events = []
    async with open_event_loop() as loop:
        with anyio.CancelScope() as scope:
            async with to_asyncio.wrap_async_context_manager(manager(events)):
                loop.call_soon(scope.cancel)
                await anyio.sleep(3600)
        assert scope.cancelled_caught
    assert events == ["entered", "cancelled", "left"]


async def test_a_context_manager_that_fails_to_enter(anyio_backend):
    @asynccontextmanager
    async def failing():
        await asyncio.sleep(0)
        raise MistakeError
        yield

    async with open_event_loop():
        with pytest.raises(MistakeError):
            async with to_asyncio.wrap_async_context_manager(failing()):
                raise AssertionError("not reached")


async def test_a_context_manager_that_fails_to_leave(anyio_backend):
    @asynccontextmanager
    async def failing():
        yield
        raise MistakeError

    async with open_event_loop():
        with pytest.raises(MistakeError):
            async with to_asyncio.wrap_async_context_manager(failing()):
                pass


async def test_a_context_manager_that_is_cancelled_while_it_is_entered(anyio_backend):
    @asynccontextmanager
    async def slow():
        await asyncio.sleep(3600)
        yield

    async with open_event_loop():
        with anyio.move_on_after(0.01) as scope:
            async with to_asyncio.wrap_async_context_manager(slow()):
                raise AssertionError("not reached")
        assert scope.cancelled_caught


async def test_stop_iteration_in_the_block_of_a_context_manager(anyio_backend):
    stop = StopIteration(1)
    async with open_event_loop():
        caught = None
        try:
            async with to_asyncio.wrap_async_context_manager(manager([])):
                raise stop
        except StopIteration as exc:
            caught = exc
        assert caught is stop


# -- from asyncio


async def test_backend_functions_are_called_from_asyncio_code(anyio_backend):
    async def add(a, b):
        await anyio.sleep(0.001)
        return a + b

    async def ask():
        return await from_asyncio.run(add, 1, 2)

    async with open_event_loop():
        assert await to_asyncio.run(ask) == 3


async def test_backend_functions_run_on_the_backend(anyio_backend):
    name, _ = anyio_backend

    async def which():
        if name == "trio":
            import trio

            await trio.sleep(0.001)
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
        else:
            await asyncio.sleep(0.001)
        return anyio.get_current_task().id

    async def ask():
        return await from_asyncio.run(which)

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_a_backend_function_goes_back_to_asyncio(anyio_backend):
    async def inner():
        await asyncio.sleep(0.001)
        return asyncio.get_running_loop()

    async def middle():
        return await to_asyncio.run(inner)

    async def outer():
        return await from_asyncio.run(middle), to_asyncio.run_sync(asyncio.get_running_loop)

    async with open_event_loop() as loop:
        assert await to_asyncio.run(outer) == (loop, loop)


async def test_a_backend_functions_exception_is_the_same_object(anyio_backend):
    mistake = MistakeError()

    async def fail():
        await anyio.lowlevel.checkpoint()
        raise mistake

    async def ask():
        try:
            await from_asyncio.run(fail)
        except MistakeError as exc:
            return exc

    async with open_event_loop():
        assert await to_asyncio.run(ask) is mistake


async def test_a_time_out_of_asyncio_cancels_the_backend_function(anyio_backend):
    events = []

    async def work():
        try:
            await anyio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.001)
            events.append("cleaned up")

    async def ask():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(from_asyncio.run(work), 0.01)
        assert events.pop() == "cleaned up"
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await from_asyncio.run(work)
            assert events.pop() == "cleaned up"
            assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(0)

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_a_cancelled_task_waits_for_its_backend_function(anyio_backend):
    events = []

    async def work():
        events.append("begun")
        try:
            await anyio.sleep(3600)
        finally:
            events.append("ended")

    async def ask():
        task = asyncio.ensure_future(from_asyncio.run(work))
        while not events:
            await asyncio.sleep(0.001)
        task.cancel("because")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert events == ["begun", "ended"]
        assert task.cancelled()

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_a_task_that_is_cancelled_before_its_backend_function_begins(anyio_backend):
    async def ask():
        task = asyncio.ensure_future(from_asyncio.run(anyio.sleep, 3600))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_a_backend_function_that_shields_itself_returns_its_value(anyio_backend):
    events = []

    async def insist():
        events.append("begun")
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.05)
        return "value"

    async def ask():
        events.append(await from_asyncio.run(insist))
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    async def cancel():
        task = asyncio.ensure_future(ask())
        while not events:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert events == ["begun", "value", "cancelled"]
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await from_asyncio.run(insist)
                    await asyncio.sleep(3600)
            assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(0)

    async with open_event_loop():
        await to_asyncio.run(cancel)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the blocks are new in Python 3.11")
@pytest.mark.parametrize("of_the_backend", [False, True])
@pytest.mark.parametrize("block", ["timeout", "TaskGroup"])
async def test_a_block_takes_back_the_cancellation_of_what_returns_a_value(anyio_backend, block, of_the_backend):
    async def backend_function():
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.02)
        return "value"

    async def asyncio_function():
        try:
            await asyncio.sleep(GUARD)
        except asyncio.CancelledError:
            return "value"

    async def fail():
        raise MistakeError

    async def main():
        got = []
        try:
            async with asyncio.timeout(0.01 if block == "timeout" else GUARD), asyncio.TaskGroup() as tasks:
                if block == "TaskGroup":
                    tasks.create_task(fail())
                if of_the_backend:
                    got.append(await from_asyncio.run(backend_function))
                else:
                    got.append(await asyncio_function())
        except (TimeoutError, ExceptionGroup):
            pass
        for _ in range(3):
            await asyncio.sleep(0.001)
        return got

    async with open_event_loop():
        assert await to_asyncio.run(main) == ["value"]


async def test_a_backend_function_that_raises_something_else_when_it_is_cancelled(anyio_backend):
    async def fail():
        try:
            await anyio.sleep(3600)
        except BaseException:
            raise MistakeError from None

    async def ask():
        with pytest.raises(MistakeError):
            await asyncio.wait_for(from_asyncio.run(fail), 0.01)

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_context_variables_are_copied_to_the_backend_and_not_back(anyio_backend):
    async def look():
        seen = variable.get()
        variable.set("backend's")
        return seen

    async def ask():
        variable.set("asyncio's")
        assert await from_asyncio.run(look) == "asyncio's"
        assert variable.get() == "asyncio's"

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_run_sync_from_asyncio_calls_as_backend_code(anyio_backend):
    name, _ = anyio_backend

    def look():
        if name == "trio":
            import trio

            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            return trio.current_time()
        return asyncio.get_running_loop().time()

    async def ask():
        loop = asyncio.get_running_loop()
        assert abs(from_asyncio.run_sync(look) - loop.time()) < GUARD
        assert asyncio.get_running_loop() is loop
        mistake = MistakeError()

        def fail():
            raise mistake

        with pytest.raises(MistakeError) as caught:
            from_asyncio.run_sync(fail)
        assert caught.value is mistake
        assert asyncio.get_running_loop() is loop
        assert asyncio.current_task() is not None

    async with open_event_loop():
        await to_asyncio.run(ask)


async def test_crossings_inside_one_another(anyio_backend):
    """Both ways several times, in the same task and synchronously."""

    def down(depth):
        return up(depth - 1) if depth else asyncio.get_running_loop()

    def up(depth):
        return from_asyncio.run_sync(lambda: to_asyncio.run_sync(down, depth))

    async with open_event_loop() as loop:
        assert to_asyncio.run_sync(down, 5) is loop

        async def ask():
            return down(5)

        assert await to_asyncio.run(ask) is loop


async def test_memory_streams_connect_backend_and_asyncio_tasks(anyio_backend):
    send, receive = anyio.create_memory_object_stream[int](0)
    send_back, receive_back = anyio.create_memory_object_stream[int](0)

    async def double():
        async with receive, send_back:
            async for number in receive:
                await send_back.send(2 * number)

    async with open_event_loop(), anyio.create_task_group() as tasks:
        tasks.start_soon(to_asyncio.run, double)
        async with send, receive_back:
            for number in range(20):
                await send.send(number)
                assert await receive_back.receive() == 2 * number


async def test_threads_of_asyncio_code_do_not_believe_that_they_are_inside_a_backend(anyio_backend):
    if anyio_backend[0] != "trio":
        pytest.skip("anyio.run says so on asyncio, too")

    async def in_thread():
        return await asyncio.to_thread(anyio.run, anyio.sleep, 0, backend="asyncio")

    async with open_event_loop():
        await to_asyncio.run(in_thread)


# -- mistakes


async def test_without_an_event_loop(anyio_backend):
    if anyio_backend[0] != "trio":
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match=r"to_asyncio\.run\(\) found no event loop: .*open_event_loop"):
        await to_asyncio.run(asyncio.sleep, 0)
    with pytest.raises(RuntimeError, match=r"to_asyncio\.run_sync\(\) found no event loop"):
        to_asyncio.run_sync(asyncio.get_running_loop)
    with pytest.raises(RuntimeError, match=r"from_asyncio\.run\(\) is for asyncio code"):
        await from_asyncio.run(anyio.sleep, 0)
    with pytest.raises(RuntimeError, match=r"from_asyncio\.run_sync\(\) is for asyncio code"):
        from_asyncio.run_sync(anyio.current_time)
    async with open_event_loop():
        pass
    with pytest.raises(RuntimeError, match="found no event loop"):
        await to_asyncio.run(asyncio.sleep, 0)


def test_where_nothing_runs():
    with pytest.raises(RuntimeError, match="found no event loop"):
        to_asyncio.run_sync(str)
    with pytest.raises(RuntimeError, match="no event loop is running"):
        from_asyncio.run_sync(str)


async def test_in_another_thread(anyio_backend):
    if anyio_backend[0] != "trio":
        pytest.skip("there is no running event loop in that thread")
    async with open_event_loop():

        def in_thread():
            with pytest.raises(RuntimeError, match="another thread"):
                to_asyncio.run_sync(str)
            return 1

        assert await anyio.to_thread.run_sync(in_thread) == 1


async def test_backend_code_that_awaits_an_asyncio_awaitable_is_told_what_to_call(anyio_backend):
    if anyio_backend[0] != "trio":
        pytest.skip("there it works")
    with pytest.raises(TypeError, match=r"to_asyncio\.run\("):
        async with open_event_loop() as loop:
            await loop.create_future()


async def test_asyncio_code_that_awaits_a_trio_awaitable_is_told_what_to_call(anyio_backend):
    if anyio_backend[0] != "trio":
        pytest.skip("there is no trio")
    import trio

    async def mistake():
        await trio.lowlevel.checkpoint()

    async with open_event_loop():
        with pytest.raises(RuntimeError, match=r"from_asyncio\.run\("):
            await to_asyncio.run(mistake)
        # Nothing is broken by it.
        assert await to_asyncio.run(asyncio.sleep, 0.001, 1) == 1
        await anyio.sleep(0.001)


async def test_coroutine_object_instead_of_a_function(anyio_backend):
    """The coroutine is closed: no warning says that it was never awaited."""

    async def function():
        raise AssertionError("not called")

    async def call_from_asyncio():
        with pytest.raises(TypeError, match=r"^from_asyncio.run\(\) needs a function, not <coroutine "):
            await from_asyncio.run(function())
        with pytest.raises(TypeError, match=r"^from_asyncio.run_sync\(\) needs a function, not 5"):
            from_asyncio.run_sync(5)

    async with open_event_loop():
        with pytest.raises(TypeError, match=r"^to_asyncio.run\(\) needs .* to_asyncio.run\(function, \*args"):
            await to_asyncio.run(function())
        with pytest.raises(TypeError, match=r"^to_asyncio.run_sync\(\) needs a function"):
            to_asyncio.run_sync(function())
        await to_asyncio.run(call_from_asyncio)


def test_run_asyncio_of_a_coroutine_object():
    async def function():
        raise AssertionError("not called")

    with pytest.raises(TypeError, match=r"^run_asyncio\(\) needs a function, not <coroutine .*without calling it$"):
        run_asyncio(function(), backend="asyncio")


async def test_a_failed_crossing_leaves_no_cycle(anyio_backend):
    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing)

    async def fail(thing):
        raise MistakeError

    async def fail_in_backend(thing):
        await anyio.lowlevel.checkpoint()
        raise MistakeError

    async def ask(thing):
        await from_asyncio.run(fail_in_backend, thing)

    async with open_event_loop():
        gc.collect()
        gc.disable()
        try:
            for function in (fail, ask):
                try:
                    await to_asyncio.run(function, thing)
                except MistakeError:
                    pass
            del thing
            await turns()
            assert alive() is None
        finally:
            gc.enable()


async def test_other_tasks_run_beside_crossings_that_wait_for_nothing(anyio_backend):
    """Also if each of them returns at once, and for context managers."""
    rounds = 0

    async def nothing():
        pass

    @asynccontextmanager
    async def manager():
        yield

    async def work():
        nonlocal rounds
        while True:
            await anyio.lowlevel.checkpoint()
            rounds += 1

    async def managed():
        async with to_asyncio.wrap_async_context_manager(manager()):
            pass

    async with open_event_loop(), anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        for cross in (partial(to_asyncio.run, nothing), managed):
            rounds = 0
            end = time.monotonic() + GUARD
            while rounds < 3:
                await cross()
                assert time.monotonic() < end
        tasks.cancel_scope.cancel()


async def test_a_group_of_exceptions_of_a_backend_function_is_the_same_object(anyio_backend):
    mistake = ExceptionGroup("several", [MistakeError(), ValueError()])

    async def fail():
        raise mistake

    async def ask():
        with pytest.raises(ExceptionGroup) as caught:
            await from_asyncio.run(fail)
        return caught.value

    async with open_event_loop():
        assert await to_asyncio.run(ask) is mistake


async def test_stop_iteration_of_a_backend_function_becomes_a_runtime_error(anyio_backend):
    async def fail():
        raise StopIteration

    async def ask():
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            await from_asyncio.run(fail)

    async with open_event_loop():
        await to_asyncio.run(ask)


def test_another_event_loop_may_have_an_attribute_of_the_same_name():
    async def main():
        asyncio.get_running_loop()._core = object()
        return from_asyncio.run_sync(int, "5")

    assert asyncio.run(main()) == 5
