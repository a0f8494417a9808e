"""Scheduling: wrong arguments are refused at the call, and so are calls while the group is not open."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from scheduling_helpers import every_scheduler, scheduler
from support import GUARD, Stack, collect_contexts, turns, until

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


@pytest.mark.differs(
    "a callback that cannot be called, given to `call_soon` or a timer",
    asyncio="an error in debug mode only",
    here="`TypeError` at the call",
    why="the traceback shows the line with the mistake",
)
@pytest.mark.ours_only
@every_scheduler
async def test_something_that_cannot_be_called_is_refused_at_the_call(stack: Stack, name: str) -> None:
    async with stack.open() as group:
        with pytest.raises(TypeError, match="callable"):
            scheduler(group, name)("not a function")


@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at", "start_soon"])
async def test_a_group_that_is_not_open_takes_no_callbacks(anyio_backend: Any, name: str) -> None:
    def use(group: TransportGroup) -> None:
        if name == "start_soon":
            group.start_soon(anyio.sleep, 0)
        else:
            scheduler(group, name)(print)

    group = TransportGroup()
    with pytest.raises(RuntimeError, match="not open"):
        use(group)
    async with group:
        pass
    with pytest.raises(RuntimeError, match="not open"):
        use(group)


@pytest.mark.parametrize("name", ["call_later", "call_at"])
async def test_missing_time_is_refused_at_the_call(stack: Stack, name: str) -> None:
    async with stack.open() as group:
        with pytest.raises(TypeError):
            getattr(group, name)(None, print)


@pytest.mark.differs(
    'an invalid time (`"soon"`, `nan`), given to a timer',
    asyncio="the event loop fails, or spins, later",
    here="`TypeError` or `ValueError` at the call",
    why="the traceback shows the line with the mistake",
)
@pytest.mark.ours_only
@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("soon", TypeError),
        (float("nan"), ValueError),
        # Numbers that can be compared with times, and never added to one.
        pytest.param(10**400, OverflowError, id="10**400"),
        pytest.param(-(10**400), OverflowError, id="-10**400"),
    ],
)
@pytest.mark.parametrize("name", ["call_later", "call_at"])
async def test_invalid_time_is_refused_at_the_call(stack: Stack, name: str, when: Any, error: type[Exception]) -> None:
    calls: list[int] = []
    async with stack.open() as group:
        for _ in range(2):  # With and without others to compare with.
            with pytest.raises(error):
                getattr(group, name)(when, print)
            group.call_later(0, calls.append, 1)
        await until(lambda: len(calls) == 2)


@pytest.mark.parametrize("when", [float("inf"), 1e300, 10**12])
@pytest.mark.leaves_timers
async def test_a_time_that_never_comes(anyio_backend: Any, when: float) -> None:
    calls: list[str] = []
    async with TransportGroup() as group:
        group.call_later(when, calls.append, "never")
        await turns()
        group.call_later(0.01, calls.append, "soon")
        await until(lambda: calls)
    assert calls == ["soon"]


async def test_start_soon_refuses_what_is_not_an_async_function(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        coroutine = anyio.lowlevel.checkpoint()
        with pytest.raises(TypeError, match=r"start_soon\(\) takes an async function"):
            group.start_soon(coroutine)  # type: ignore[arg-type]
        coroutine.close()
        assert group.statistics().running_tasks == 0


class Nameless:
    def __str__(self) -> str:
        raise LookupError("it has no name")

    __repr__ = __str__


async def never(argument: object) -> None:
    pytest.fail("it was started")


def not_async(*_: object) -> str:
    return "done already"


#: The arguments of `start_soon`, and the error.
MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception]]] = {
    "a name that cannot be printed": ((never, 1), {"name": Nameless()}, LookupError),
    "a function that is not async": ((not_async,), {}, TypeError),
    "no argument": ((never,), {}, TypeError),
    "too many arguments": ((never, 1, 2), {}, TypeError),
}


@pytest.mark.parametrize("where", ["the block", "a callback"])
@pytest.mark.parametrize("mistake", MISTAKES)
async def test_start_soon_raises_for_wrong_arguments_at_the_call(anyio_backend: Any, mistake: str, where: str) -> None:
    """The task is not counted, so the block can be left; and no coroutine is left unawaited."""
    args, options, error = MISTAKES[mistake]
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            if where == "the block":
                with pytest.raises(error):
                    group.start_soon(*args, **options)
            else:
                group.call_soon(lambda: group.start_soon(*args, **options))
                await until(lambda: contexts)
                assert [type(context["exception"]) for context in contexts] == [error]
            assert group.statistics().running_tasks == 0
            # The group still works.
            done: list[int] = []
            group.call_soon(done.append, 1)
            await until(lambda: done)
