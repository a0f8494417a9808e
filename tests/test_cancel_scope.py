"""`TransportGroup.cancel_scope`, the scope that every AnyIO task group has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support import GUARD, Recorder, connected, fill, turns

from transports_anyio import TransportGroup, current_group

pytestmark = pytest.mark.anyio


def cancel_soon(group: TransportGroup) -> None:
    group.call_soon(group.cancel_scope.cancel)


def cancel_later(group: TransportGroup) -> None:
    group.call_later(0.001, group.cancel_scope.cancel)


def cancel_in_a_task(group: TransportGroup) -> None:
    async def cancel() -> None:
        group.cancel_scope.cancel()

    group.start_soon(cancel)


def cancel_at_a_deadline(group: TransportGroup) -> None:
    group.cancel_scope.deadline = group.time() + 0.001


def cancel_in_the_block(group: TransportGroup) -> None:
    group.cancel_scope.cancel()


@pytest.mark.parametrize(
    "cancel", [cancel_soon, cancel_later, cancel_in_a_task, cancel_at_a_deadline, cancel_in_the_block]
)
async def test_cancelling_ends_the_group_and_nothing_else(
    anyio_backend: Any, cancel: Callable[[TransportGroup], None]
) -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await anyio.sleep(GUARD)
        finally:
            ended.append("task")

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group) as (transport, protocol, _):
            group.start_soon(wait)
            await turns()
            fill(transport)
            cancel(group)
            await anyio.sleep(GUARD)
            ended.append("block")
        await anyio.lowlevel.checkpoint()  # The task that runs the block is not cancelled any more.
    assert ended == ["task"]
    assert protocol.count("connection_lost") == 1
    assert group.cancel_scope.cancelled_caught


async def test_a_protocol_cancels_its_group(anyio_backend: Any) -> None:
    def received(*_: Any) -> None:
        current_group().cancel_scope.cancel()

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            protocol = Recorder(on_data_received=received)
            async with connected(group, protocol) as (_, _, peer):
                await peer.send(b"that is all")
                await anyio.sleep(GUARD)
    assert protocol.received == b"that is all"
    assert protocol.count("connection_lost") == 1


async def test_cancelling_ends_the_wait_for_a_peer_that_does_not_read(anyio_backend: Any) -> None:
    """The block has been left normally, and its buffered data cannot be flushed."""
    with anyio.fail_after(GUARD):
        async with AsyncExitStack() as stack, TransportGroup() as group:
            transport, protocol, _ = await stack.enter_async_context(connected(group))
            fill(transport, 1 << 20)
            group.call_later(0.01, group.cancel_scope.cancel)
    assert protocol.count("connection_lost") == 1


async def test_the_scope_of_a_group_that_is_not_entered(anyio_backend: Any) -> None:
    group = TransportGroup()
    with pytest.raises(RuntimeError, match="not open yet"):
        group.cancel_scope  # noqa: B018  # a property
    async with group:
        scope = group.cancel_scope
        assert isinstance(scope, anyio.CancelScope)
        assert not scope.cancel_called
    assert group.cancel_scope is scope
    assert not scope.cancelled_caught
