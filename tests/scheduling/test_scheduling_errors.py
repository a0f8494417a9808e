"""Scheduling: exceptions in callbacks, and the exception handler."""

from __future__ import annotations

import contextvars
import logging
from typing import Any

import anyio
import pytest
from scheduling_helpers import every_scheduler, scheduler, variable
from support import Recorder, Stack, capture_log, collect_contexts, connected, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


# -- exceptions in callbacks ------------------------------------------------------------------------------


@every_scheduler
async def test_an_exception_is_reported_and_the_next_callback_runs(stack: Stack, name: str) -> None:
    calls: list[str] = []
    async with stack.open() as group:
        contexts = collect_contexts(group)

        def failing() -> None:
            raise ZeroDivisionError(name)

        handle = scheduler(group, name)(failing)
        scheduler(group, name)(calls.append, "next")
        await until(lambda: calls)
    (context,) = contexts
    assert isinstance(context["exception"], ZeroDivisionError)
    assert "failing" in context["message"]
    assert context["handle"] is handle


@every_scheduler
@pytest.mark.parametrize("given", [False, True])
async def test_the_exception_handler_runs_in_the_context_of_the_failed_callback(
    stack: Stack, name: str, given: bool
) -> None:
    """It sees those of the call, and those that the callback has set, such as a request number for the log."""
    seen: list[str] = []

    def failing() -> None:
        seen.append(variable.get())
        variable.set("set by the callback")
        raise ZeroDivisionError

    async with stack.open() as group:
        group.set_exception_handler(lambda *_: seen.append(variable.get()))
        variable.set("at the call")
        context = contextvars.copy_context() if given else None
        scheduler(group, name)(failing, context=context)
        variable.set("later")
        await until(lambda: len(seen) == 2)
    assert seen == ["at the call", "set by the callback"]
    assert variable.get() == "later"


class Unavailable:
    """A proxy whose object is not available, as some frameworks have them."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)

    def __call__(self) -> None:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        return "a stand-in"


@pytest.mark.differs(
    "a callback that raises and whose `repr` raises too",
    asyncio="ends the event loop",
    here="reported",
    why="one callback's failure does not affect the others",
)
@pytest.mark.ours_only
@every_scheduler
async def test_a_callback_that_has_no_name_and_cannot_say_so(stack: Stack, name: str) -> None:
    calls: list[str] = []
    async with stack.open() as group:
        contexts = collect_contexts(group)
        scheduler(group, name)(Unavailable())
        scheduler(group, name)(calls.append, "next")
        await until(lambda: calls)
    (context,) = contexts
    assert type(context["exception"]) is ZeroDivisionError
    assert "a stand-in" in context["message"]


@every_scheduler
def test_a_given_context_that_is_entered_already(anyio_backend: Any, name: str) -> None:
    """It cannot be entered twice, neither for the callback nor for reporting the failure."""
    backend, options = anyio_backend
    calls: list[str] = []
    seen: list[Any] = []

    async def main() -> None:
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            scheduler(group, name)(calls.append, "entered twice", context=context)
            scheduler(group, name)(calls.append, "next")
            await until(lambda: calls)
        seen.extend(contexts)

    context = contextvars.copy_context()
    context.run(lambda: anyio.run(main, backend=backend, backend_options=options))
    assert calls == ["next"]
    assert [type(report["exception"]) for report in seen] == [RuntimeError]


# -- the exception handler --------------------------------------------------------------------------------


async def test_the_exception_handler_can_be_set_and_reset(stack: Stack) -> None:
    async with stack.open() as group:
        assert group.get_exception_handler() is None

        def handler(_: Any, context: dict[str, Any]) -> None: ...

        group.set_exception_handler(handler)
        assert group.get_exception_handler() is handler
        with pytest.raises(TypeError):
            group.set_exception_handler("no handler")
        assert group.get_exception_handler() is handler
        group.set_exception_handler(None)
        assert group.get_exception_handler() is None


async def test_the_handler_gets_the_group_and_the_context(stack: Stack) -> None:
    seen: list[Any] = []
    async with stack.open() as group:
        group.set_exception_handler(lambda *args: seen.append(args))
        group.call_exception_handler({"message": "hello", "more": 1})
        group.set_exception_handler(None)
        owner = group.loop if stack.is_oracle else group
    assert seen == [(owner, {"message": "hello", "more": 1})]


async def test_the_default_handler_logs(stack: Stack) -> None:
    async with stack.open() as group:
        with capture_log(stack) as records:
            try:
                raise ValueError("what happened")
            except ValueError as exc:
                error = exc
            group.call_exception_handler({"message": "a message", "exception": error, "transport": "a transport"})
            group.default_exception_handler({"message": "another message"})
            group.call_exception_handler({})
    first, second, third = records
    assert "a message" in first.getMessage()
    assert "a transport" in first.getMessage()
    assert first.exc_info is not None
    assert first.exc_info[1] is error
    assert first.levelno == logging.ERROR
    assert "another message" in second.getMessage()
    assert not second.exc_info
    assert "Unhandled exception" in third.getMessage()


async def test_a_handler_that_raises_is_itself_reported(stack: Stack) -> None:
    calls: list[int] = []

    def handler(*_: Any) -> None:
        raise LookupError("in the handler")

    def failing() -> None:
        raise ZeroDivisionError

    async with stack.open() as group, connected(group) as (_, protocol, peer):
        with capture_log(stack) as records:
            group.set_exception_handler(handler)
            group.call_soon(failing)
            group.call_soon(calls.append, 1)
            await until(lambda: calls)
            await peer.send(b"still here")
            await protocol.wait_received(10)
        group.set_exception_handler(None)
    (record,) = records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)
    assert "exception handler" in record.getMessage()
    assert "ZeroDivisionError" in record.getMessage()


class Unprintable(Recorder):
    def __repr__(self) -> str:
        raise LookupError("in repr()")


async def test_the_default_handler_fails_for_an_object_without_repr(stack: Stack) -> None:
    """The failure of the handler is logged, and only the connection in the report has ended."""
    failing, other = Unprintable(on_data_received=lambda *_: 1 / 0), Recorder()
    async with stack.open() as group:
        async with connected(group, failing) as (_, _, peer), connected(group, other) as (_, _, other_peer):
            with capture_log(stack) as records:
                await peer.send(b"x")
                await failing.wait_for("connection_lost")
            assert isinstance(failing.exception, ZeroDivisionError)
            await other_peer.send(b"still here")
            await other.wait_received(10)
    (record,) = records
    assert record.getMessage().startswith("Exception in default exception handler")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_a_default_handler_of_a_derived_group(anyio_backend: Any) -> None:
    seen: list[Any] = []

    class Derived(TransportGroup):
        def default_exception_handler(self, context: dict[str, Any]) -> None:
            seen.append(context)

    async with Derived() as group:
        group.call_exception_handler({"message": "hello"})
    assert seen == [{"message": "hello"}]
