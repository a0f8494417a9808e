"""Scheduling: the context variables of callbacks."""

from __future__ import annotations

import contextvars
import sys
from typing import Any

import pytest
from scheduling_helpers import every_scheduler, scheduler, variable
from support import Stack, until

from transports_anyio import current_group

pytestmark = pytest.mark.anyio


@every_scheduler
async def test_callbacks_run_in_the_context_of_the_call(stack: Stack, name: str) -> None:
    seen: list[str] = []
    async with stack.open() as group:
        variable.set("at the call")
        scheduler(group, name)(lambda: seen.append(variable.get()))
        variable.set("later")
        await until(lambda: seen)
    assert seen == ["at the call"]


@every_scheduler
async def test_a_context_can_be_given(stack: Stack, name: str) -> None:
    seen: list[str] = []
    context = contextvars.copy_context()
    context.run(variable.set, "given")

    def callback() -> None:
        seen.append(variable.get())
        variable.set("changed by the callback")

    async with stack.open() as group:
        scheduler(group, name)(callback, context=context)
        await until(lambda: seen)
    assert seen == ["given"]
    assert context[variable] == "changed by the callback"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio's handles have it since Python 3.12")
@every_scheduler
async def test_get_context_of_a_handle(stack: Stack, name: str) -> None:
    context = contextvars.copy_context()
    variable.set("the caller's")
    async with stack.open() as group:
        given = scheduler(group, name)(print, "given", context=context)
        copied = scheduler(group, name)(print, "copied")
        assert given.get_context() is context
        assert copied.get_context()[variable] == "the caller's"
        given.cancel()
        copied.cancel()


@every_scheduler
async def test_a_context_without_variables_can_be_given(stack: Stack, name: str) -> None:
    """It is empty, so it is false."""
    seen: list[str] = []
    variable.set("the caller's")
    async with stack.open() as group:
        scheduler(group, name)(lambda: seen.append(variable.get()), context=contextvars.Context())
        await until(lambda: seen)
    assert seen == ["unset"]


@pytest.mark.ours_only("asyncio has no group")
@every_scheduler
async def test_the_group_is_current_in_a_given_context(stack: Stack, name: str) -> None:
    """Only while the callback runs, even if the context is the caller's own."""
    seen: list[Any] = []
    context = contextvars.Context()
    context.run(variable.set, "given")
    async with stack.open() as group:
        context.run(lambda: scheduler(group, name)(lambda: seen.append(current_group()), context=context))
        await until(lambda: seen)
        with pytest.raises(RuntimeError, match="no transport group"):
            context.run(current_group)
    assert seen == [group]


async def test_callbacks_do_not_see_one_anothers_variables(stack: Stack) -> None:
    seen: list[str] = []
    variable.set("outside")
    async with stack.open() as group:
        for number in range(3):
            group.call_soon(lambda number: (seen.append(variable.get()), variable.set(str(number))), number)
        await until(lambda: len(seen) == 3)
    assert seen == ["outside"] * 3
    assert variable.get() == "outside"
