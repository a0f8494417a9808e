"""Scheduling, futures, tasks and the debug mode: what asyncio's own event loop does, ours does."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import threading
import time
import warnings
import weakref

import pytest
from support import at_depth, frames_left

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class MistakeError(Exception):
    pass


async def pauses(count):
    for _ in range(count):
        await asyncio.sleep(0)


# -- callbacks


def test_callbacks_run_in_order(run):
    async def main():
        loop = asyncio.get_running_loop()
        order = []
        loop.call_soon(order.append, 1)
        loop.call_soon(loop.call_soon, order.append, 3)
        loop.call_soon(order.append, 2)
        assert order == []
        await pauses(3)
        assert order == [1, 2, 3]

    run(main)


def test_timers_run_by_time_and_then_in_order(run):
    if run.is_uvloop:
        pytest.skip("uvloop rounds to milliseconds")

    async def main():
        loop = asyncio.get_running_loop()
        order = []
        done = loop.create_future()
        now = loop.time()
        loop.call_at(now + 0.02, order.append, 3)
        loop.call_at(now + 0.01, order.append, 1)
        loop.call_at(now + 0.01, order.append, 2)
        loop.call_at(now + 0.03, done.set_result, None)
        handle = loop.call_at(now + 0.015, order.append, "cancelled")
        assert handle.when() == now + 0.015
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
        await done
        assert loop.time() >= now + 0.03
        assert order == [1, 2, 3]

    run(main)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])
def test_a_call_that_raises_at_the_recursion_limit_schedules_nothing(run, name, debug):
    if run.name != "trio" and name == "call_soon_threadsafe":
        pytest.skip("asyncio's and uvloop's run it nevertheless")

    async def main():
        loop = asyncio.get_running_loop()
        others = [loop.call_later(3600 + number, pytest.fail) for number in range(5)]
        schedule = getattr(loop, name)
        when = {"call_later": [0.001], "call_at": [loop.time()]}.get(name, [])
        refused = 0
        for spare in range(1, 80):
            ran = []
            raised = False
            try:
                at_depth(frames_left() - spare, lambda ran=ran: schedule(*when, ran.append, "refused"))
            except RecursionError:
                raised = True
            refused += raised
            done = loop.create_future()
            loop.call_later(0.002, done.set_result, None)
            await done
            assert ran == ([] if raised else ["refused"])
        assert refused or run.is_uvloop  # Its calls need no frames.
        assert not raised
        for other in others:
            other.cancel()

    run(main, debug=debug)


def test_a_timer_in_the_past_runs_in_the_next_iterations(run):
    async def main():
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        loop.call_later(-1, done.set_result, "done")
        assert await done == "done"

    run(main)


def test_a_callback_of_none_is_reported(run):
    if run.is_uvloop:
        pytest.skip("uvloop takes it for a handle without a callback, and stops with an error of its own")

    async def main():
        loop = asyncio.get_running_loop()
        contexts = []
        loop.set_exception_handler(lambda _, context: contexts.append(context))
        handles = [loop.call_soon(None), loop.call_later(0, None), loop.call_soon_threadsafe(None)]
        assert not any(handle.cancelled() for handle in handles)
        for _ in range(5):
            await asyncio.sleep(0.001)
        assert [str(context["exception"]) for context in contexts] == ["'NoneType' object is not callable"] * 3

    run(main)


@pytest.mark.parametrize(
    ("when", "error"),
    [("soon", TypeError), (float("nan"), ValueError), pytest.param(10**400, OverflowError, id="10**400")],
)
def test_a_time_that_is_none_is_refused(run, when, error):
    if run.name != "trio":
        pytest.skip("asyncio and uvloop fail later: see the differences of groups")

    async def main():
        loop = asyncio.get_running_loop()
        order = []
        for call in (loop.call_later, loop.call_at):
            with pytest.raises(error):
                call(when, print)
            loop.call_later(0.002, order.append, 2)
            loop.call_later(0.001, order.append, 1)
            await asyncio.sleep(0.005)
        assert order == [1, 2] * 2

    run(main)


def test_a_timer_that_falls_due_while_a_task_runs_comes_after_the_task_that_it_made(run):
    if run.is_uvloop:
        pytest.skip("uvloop runs its timers first")

    async def main():
        order = []

        async def task():
            order.append("task")

        for _ in range(5):
            made = asyncio.create_task(task())
            asyncio.get_running_loop().call_later(0.001, order.append, "timer")
            time.sleep(0.003)  # noqa: ASYNC251  # the timer is due before the event loop goes on
            await made
            await asyncio.sleep(0.002)
            assert order == ["task", "timer"]
            order.clear()

    run(main)


def test_a_handle_can_be_cancelled(run):
    async def main():
        loop = asyncio.get_running_loop()
        called = []
        handle = loop.call_soon(called.append, 1)
        assert not handle.cancelled()
        handle.cancel()
        assert handle.cancelled()
        await pauses(2)
        assert called == []
        assert isinstance(handle, asyncio.Handle) or run.is_uvloop
        timer = loop.call_later(0, called.append, 1)
        assert isinstance(timer, asyncio.TimerHandle) or run.is_uvloop
        await asyncio.sleep(0.01)
        assert called == [1]
        timer.cancel()

    run(main)


def test_callbacks_run_in_a_context(run):
    async def main():
        loop = asyncio.get_running_loop()
        seen = []
        context = contextvars.copy_context()
        context.run(variable.set, "given")
        variable.set("current")

        def look():
            seen.append(variable.get())
            variable.set("changed")

        loop.call_soon(look)
        loop.call_soon(look, context=context)
        loop.call_later(0, look)
        loop.call_later(0, look, context=context)
        loop.call_soon_threadsafe(look)
        await asyncio.sleep(0.01)
        assert sorted(seen) == ["changed", "current", "current", "current", "given"]
        assert variable.get() == "current"
        assert context[variable] == "changed"

    run(main)


def test_a_thread_hands_callbacks_over(run):
    async def main():
        loop = asyncio.get_running_loop()
        count = 1000
        called = []
        done = loop.create_future()

        def call(number):
            called.append(number)
            if len(called) == count:
                done.set_result(threading.get_ident())

        def in_thread():
            for number in range(count):
                loop.call_soon_threadsafe(call, number)
                if number % 100 == 0:
                    time.sleep(0.001)

        thread = threading.Thread(target=in_thread)
        thread.start()
        assert await done == threading.get_ident()
        assert called == list(range(count))
        thread.join()

    run(main)


@pytest.mark.differs(
    "a handle of `call_soon_threadsafe` that another thread cancels, in the event loop on trio",
    asyncio="until 3.14 its callback may be running, or run without its arguments",
    here="when `cancel` returns, the callback has ended or will never run",
    why="as in a group",
)
def test_a_handle_that_a_thread_cancels(run):
    if run.name != "trio":
        pytest.skip("asyncio's callback may still run")

    async def main():
        loop = asyncio.get_running_loop()
        begun = threading.Event()
        ended = []

        def slow():
            begun.set()
            time.sleep(0.02)
            ended.append(1)

        def in_thread():
            handle = loop.call_soon_threadsafe(slow)
            begun.wait()
            handle.cancel()
            assert ended == [1]
            never = loop.call_soon_threadsafe(ended.append, 2)
            never.cancel()
            return never.cancelled()

        for _ in range(3):
            begun.clear()
            ended.clear()
            assert await asyncio.to_thread(in_thread)
            assert ended in ([1], [1, 2])

    run(main)


def test_threads_and_the_event_loop_play_ping_pong(run):
    """No wake-up is lost, whenever it comes."""

    async def main():
        loop = asyncio.get_running_loop()

        def in_thread(number):
            async def answer():
                return number

            return asyncio.run_coroutine_threadsafe(answer(), loop).result(10)

        for _ in range(30):
            numbers = await asyncio.gather(*(asyncio.to_thread(in_thread, number) for number in range(5)))
            assert numbers == [0, 1, 2, 3, 4]

    run(main)


def test_what_a_callback_holds_goes_with_it(run):
    if run.is_uvloop:
        pytest.skip("uvloop's handles hold it longer")

    async def main():
        loop = asyncio.get_running_loop()

        class Thing:
            def method(self):
                raise MistakeError

        import weakref

        async def fail(thing):
            await asyncio.sleep(0)
            raise MistakeError

        thing = Thing()
        alive = weakref.ref(thing)
        gc.collect()
        gc.disable()
        try:
            loop.call_soon(thing.method).cancel()
            loop.call_later(3600, thing.method).cancel()
            with pytest.raises(MistakeError):
                await asyncio.create_task(fail(thing))
            del thing
            await pauses(3)
            assert alive() is None
        finally:
            gc.enable()

    run(main)


# -- futures and tasks


def test_a_task_has_its_name_and_context(run):
    async def main():
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        context.run(variable.set, "given")

        async def look():
            return variable.get()

        options = {"context": context} if sys.version_info >= (3, 11) else {}
        task = loop.create_task(look(), name="a name", **options)
        assert task.get_name() == "a name"
        assert await task == ("given" if options else "unset")
        assert task.get_loop() is loop
        assert task not in asyncio.all_tasks()

    run(main)


def test_a_task_factory_makes_the_tasks(run):
    async def main():
        loop = asyncio.get_running_loop()
        made = []

        def factory(loop, coro, **options):
            task = asyncio.Task(coro, loop=loop, **options)
            made.append(task)
            return task

        before = loop.get_task_factory()
        loop.set_task_factory(factory)
        try:
            assert loop.get_task_factory() is factory
            task = asyncio.ensure_future(asyncio.sleep(0, 5))
            named = loop.create_task(asyncio.sleep(0), name="a name")
            assert named.get_name() == "a name"
            assert made == [task, named]
            assert await task == 5
            await named
        finally:
            loop.set_task_factory(before)
        with pytest.raises(TypeError):
            loop.set_task_factory(5)

    run(main)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are Python 3.12's")
def test_eager_tasks(run):
    if run.is_uvloop:
        pytest.skip("uvloop passes the factory what the one of Python 3.13.0 does not take")

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        try:
            order = []

            async def work():
                order.append("begun")
                await asyncio.sleep(0)
                order.append("done")

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(work())
                order.append("created")
            assert order == ["begun", "created", "done"]
        finally:
            loop.set_task_factory(None)

    run(main)


def test_futures_belong_to_the_loop(run):
    async def main():
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        assert future.get_loop() is loop
        loop.call_soon(future.set_result, 5)
        assert await future == 5

    run(main)


# -- asynchronous generators


def test_a_generator_that_is_dropped_is_closed(run):
    async def main():
        closed = asyncio.Event()

        async def generate():
            try:
                yield 1
            finally:
                await asyncio.sleep(0)
                closed.set()

        async for _ in generate():
            break
        gc.collect()
        await asyncio.wait_for(closed.wait(), 5)

    run(main)


def test_generators_are_shut_down(run):
    async def main():
        loop = asyncio.get_running_loop()
        reports = []
        loop.set_exception_handler(lambda _, context: reports.append(context))
        order = []

        async def generate(*, fail):
            try:
                yield 1
            finally:
                order.append("closed")
                if fail:
                    raise MistakeError

        generators = [generate(fail=False), generate(fail=True)]
        for generator in generators:
            await generator.asend(None)
        await loop.shutdown_asyncgens()
        assert order == ["closed", "closed"]
        assert [report["asyncgen"] for report in reports] == [generators[1]]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            late = generate(fail=False)
            await late.asend(None)
            await late.aclose()
        assert [each.category for each in caught] == [ResourceWarning]
        loop.set_exception_handler(None)

    run(main)


# -- errors


def test_exception_handlers(run, caplog):
    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(None)
        assert loop.get_exception_handler() is None
        with pytest.raises(TypeError):
            loop.set_exception_handler(5)
        reports = []

        def handler(loop, context):
            reports.append((loop, context))

        loop.set_exception_handler(handler)
        assert loop.get_exception_handler() is handler
        loop.call_exception_handler({"message": "hello"})
        assert reports == [(loop, {"message": "hello"})]
        loop.set_exception_handler(None)
        loop.call_exception_handler({"message": "hello", "exception": MistakeError("details"), "future": 5})
        loop.call_exception_handler({})

    with caplog.at_level(logging.ERROR, "asyncio"):
        run(main)
    first, second = caplog.records
    assert first.getMessage() == "hello\nfuture: 5"
    assert first.exc_info[0] is MistakeError
    assert second.getMessage() == "Unhandled exception in event loop"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12 calls it in the context of what failed")
def test_the_exception_handler_runs_in_the_context_of_what_failed(run):
    if run.is_uvloop:
        pytest.skip("uvloop calls it in its own")

    async def main():
        loop = asyncio.get_running_loop()
        seen = []
        loop.set_exception_handler(lambda *_: seen.append(variable.get()))
        variable.set("failed")

        def fail():
            raise MistakeError

        loop.call_soon(fail)
        variable.set("later")
        await pauses(2)
        loop.set_exception_handler(None)
        assert seen == ["failed"]

    run(main)


# -- what only the owner may do


def test_every_method_of_an_event_loop_is_there(run):
    if run.is_uvloop:
        pytest.skip("uvloop lacks some")

    async def main():
        loop = asyncio.get_running_loop()
        for name, method in vars(asyncio.AbstractEventLoop).items():
            if callable(method) and not name.startswith("_"):
                assert getattr(type(loop), name) is not method, name

    run(main)


@pytest.mark.differs(
    "`stop` in an event loop of `open_event_loop`",
    asyncio="ends `run_forever`",
    here="`RuntimeError`",
    why="the end of the block ends it",
)
def test_what_a_running_event_loop_refuses(run):
    async def main():
        loop = asyncio.get_running_loop()
        coroutine = asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already running"):
            loop.run_until_complete(coroutine)
        coroutine.close()
        with pytest.raises(RuntimeError, match="Cannot close a running event loop"):
            loop.close()
        assert loop.is_running()
        assert not loop.is_closed()
        if run.name == "trio":  # asyncio stops, of course, and Python 3.13.0's `run_forever` breaks what runs.
            with pytest.raises(RuntimeError, match="already running"):
                loop.run_forever()
            with pytest.raises(RuntimeError, match="Cannot stop"):
                loop.stop()
        await asyncio.sleep(0)

    run(main)


# -- debug mode


def test_a_slow_callback_is_logged_in_debug_mode(run, caplog):
    if run.is_uvloop:
        pytest.skip("uvloop has other words")

    async def main():
        loop = asyncio.get_running_loop()
        assert loop.get_debug()
        loop.slow_callback_duration = 0.1
        loop.call_soon(time.sleep, 0.11)
        loop.call_later(0, time.sleep, 0.11)
        await asyncio.sleep(0.01)

        async def slow_task():
            time.sleep(0.11)  # noqa: ASYNC251  # on purpose

        await asyncio.create_task(slow_task())
        loop.call_soon_threadsafe(time.sleep, 0)
        await pauses(2)

    with caplog.at_level(logging.WARNING, "asyncio"):
        run(main, debug=True)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3, messages
    assert all(message.startswith("Executing <") for message in messages)
    assert "Handle" in messages[0]
    assert "slow_task" in messages[2]
    assert "seconds" in messages[2]


def test_wrong_calls_are_found_in_debug_mode(run):
    if run.is_uvloop:
        pytest.skip("uvloop has other words")

    async def main():
        loop = asyncio.get_running_loop()

        async def coroutine_function():
            pass

        for call in (loop.call_soon, loop.call_soon_threadsafe, lambda callback: loop.call_later(0, callback)):
            with pytest.raises(TypeError, match="coroutines cannot be used"):
                call(coroutine_function)
            with pytest.raises(TypeError, match="a callable object was expected"):
                call(5)
        caught = []

        def in_thread():
            for call in (loop.call_soon, lambda callback: loop.call_later(0, callback)):
                try:
                    call(str)
                except RuntimeError as exc:
                    caught.append(exc)

        await asyncio.to_thread(in_thread)
        assert len(caught) == 2
        assert "Non-thread-safe" in str(caught[0])

    run(main, debug=True)


def test_in_debug_mode_reports_say_where_things_were_made(run, caplog):
    if run.is_uvloop:
        pytest.skip("uvloop has other words")

    async def main():
        loop = asyncio.get_running_loop()

        def fail():
            raise MistakeError

        loop.call_soon(fail)
        await pauses(2)
        handle = loop.call_later(3600, fail)
        assert f"created at {__file__}" in repr(handle)
        handle.cancel()
        assert "cancelled" in repr(handle)

    with caplog.at_level(logging.ERROR, "asyncio"):
        run(main, debug=True)
    assert "Object created at (most recent call last)" in caplog.text
    assert __file__ in caplog.text


def test_in_debug_mode_reports_name_the_callback_that_runs(run, caplog):
    if run.is_uvloop:
        pytest.skip("uvloop does not")

    def report():
        asyncio.get_running_loop().call_exception_handler({"message": "something"})

    async def main():
        asyncio.get_running_loop().call_soon(report)
        await asyncio.sleep(0)

    run(main, debug=True)
    (record,) = [record for record in caplog.records if "something" in record.getMessage()]
    assert "Handle created at" in record.getMessage()
    assert "call_soon(report)" in record.getMessage()
    caplog.clear()
    run(main)
    (record,) = caplog.records
    assert record.getMessage() == "something"


def test_debug_mode_tracks_where_coroutines_are_made(run):
    async def main():
        loop = asyncio.get_running_loop()
        for enabled in (True, False, True):
            loop.set_debug(enabled)
            await pauses(3)
            assert bool(sys.get_coroutine_origin_tracking_depth()) == enabled

    before = sys.get_coroutine_origin_tracking_depth()
    run(main)
    assert sys.get_coroutine_origin_tracking_depth() == before


@pytest.mark.parametrize("debug", [False, True])
def test_no_cycle_keeps_what_a_task_raised(run, debug):
    """A task that fails is deleted without the garbage collector, with its exception and the frames of that."""

    async def fail(scheduled):
        if scheduled:
            await asyncio.sleep(0.001)
        raise LookupError

    async def main():
        for scheduled in (False, True):
            task = asyncio.create_task(fail(scheduled))
            await asyncio.wait([task])
            failed = weakref.ref(task)
            del task
            await asyncio.sleep(0)
            assert failed() is None

    gc.disable()
    try:
        run(main, debug=debug)
    finally:
        gc.enable()


def test_debug_mode_can_be_changed(run):
    async def main():
        loop = asyncio.get_running_loop()
        for enabled in (True, False, True):
            loop.set_debug(enabled)
            assert loop.get_debug() is enabled
            done = loop.create_future()
            loop.call_soon(done.set_result, 5)
            assert await done == 5
            await asyncio.create_task(asyncio.sleep(0))
        loop.set_debug(False)

    run(main)
