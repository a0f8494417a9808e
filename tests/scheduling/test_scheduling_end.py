"""Scheduling: what becomes of callbacks and timers at the end of the group."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from support import Recorder, Stack, connected, leaves, raises_inside

from transports_anyio import SubprocessProtocol, TransportGroup, current_group

pytestmark = pytest.mark.anyio


@pytest.mark.leaves_timers
async def test_pending_timers_never_fire(anyio_backend: Any) -> None:
    fired: list[int] = []
    async with TransportGroup() as group:
        group.call_later(0.005, fired.append, 1)
        group.call_later(0.01, fired.append, 2).cancel()
        group.call_later(0.02, fired.append, 3)
    assert group.statistics().pending_timers == 0
    await anyio.sleep(0.05)
    assert fired == []


@pytest.mark.leaves_timers
async def test_a_timer_that_was_pending_at_the_end_can_be_cancelled(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        timers = [group.call_later(3600, print) for _ in range(3)]
    for timer in timers:
        timer.cancel()
    assert group.statistics().pending_timers == 0
    assert "timers=0" in repr(group)


@pytest.mark.differs(
    "`call_soon` just before the group ends",
    asyncio="may never run",
    here="runs before the block is left",
    why="nothing that was scheduled is lost",
)
async def test_what_call_soon_was_given_runs_before_the_block_is_left(anyio_backend: Any) -> None:
    calls: list[str] = []
    async with TransportGroup() as group:
        group.call_soon(calls.append, "in time")
    assert calls == ["in time"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_system_exit_in_the_last_iteration_does_not_keep_other_callbacks_from_running(
    anyio_backend: Any, error: type[BaseException]
) -> None:
    calls: list[str] = []

    def leave() -> None:
        raise error

    with raises_inside(error):
        async with TransportGroup() as group:
            group.call_soon(leave)
            group.call_soon(calls.append, "in time")
            group.call_soon(leave)
            group.call_soon_threadsafe(calls.append, "this too")
    assert calls == ["in time", "this too"]


@pytest.mark.leaves_timers
@pytest.mark.parametrize("how", ["normally", "by an exception"])
async def test_connection_lost_may_schedule_while_the_group_ends(stack: Stack, how: str) -> None:
    problems: list[BaseException] = []
    fired: list[int] = []

    def connection_lost(protocol: Any, exc: Exception | None) -> None:
        try:
            protocol.group.call_soon(fired.append, 1)
            protocol.group.call_later(0.001, fired.append, 2)
        except BaseException as error:
            problems.append(error)
            raise

    protocol: Any = Recorder(on_connection_lost=connection_lost)
    try:
        async with stack.open() as group, connected(group, protocol):
            protocol.group = group
            if how != "normally":
                raise LookupError
    except BaseException as error:
        assert [type(leaf) for leaf in leaves(error)] == [LookupError]
    assert problems == []
    assert 1 in fired


async def test_connection_lost_of_a_child_may_schedule_while_the_group_ends(anyio_backend: Any) -> None:
    """It comes after the end of the child and of its pipes, each in an iteration of its own."""
    fired: list[int] = []

    class Child(SubprocessProtocol):
        def connection_lost(self, exc: Exception | None) -> None:
            current_group().call_soon(fired.append, 1)

    with pytest.raises(BaseException) as caught:
        async with TransportGroup() as group:
            await group.subprocess_exec(Child, "cat")
            raise LookupError
    assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
    assert fired == [1]
