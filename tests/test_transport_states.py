"""The life of a transport is one state that changes by a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import Recorder, Stack, connected

from transports_anyio._transports._state import TRANSITIONS, IllegalTransitionError, State
from transports_anyio._transports._upgrade import TRANSITIONS as UPGRADE_TRANSITIONS, TLSUpgrade, UpgradeState

pytestmark = pytest.mark.anyio


def test_every_state_is_in_the_table_and_reachable() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set(State) == {State.OPEN}.union(*TRANSITIONS.values())
    assert set(UPGRADE_TRANSITIONS) == set(UpgradeState)
    assert set(UpgradeState) == {UpgradeState.HANDSHAKE}.union(*UPGRADE_TRANSITIONS.values())


def test_a_later_state_is_a_larger_number() -> None:
    assert all(to > state for state, following in TRANSITIONS.items() for to in following)


@pytest.mark.ours_only("asyncio has no such table")
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("to", State)
async def test_an_illegal_transition_raises_and_changes_nothing(stack: Stack, state: State, to: State) -> None:
    async with stack.open() as group, connected(group) as (transport, _, peer):
        original = transport._state
        transport._state = state
        transport._update_write_blocked()
        before = snapshot(transport)
        try:
            if to in TRANSITIONS[state]:
                transport._advance(to, "a test")
                assert transport._state is to
            else:
                with pytest.raises(IllegalTransitionError, match=f"{state.name} cannot become {to.name}"):
                    transport._advance(to, "a test")
                assert snapshot(transport) == before
        finally:
            transport._state = original
            transport._update_write_blocked()
        transport.write(b"it works")
        assert await peer.receive_exactly(8) == b"it works"


def snapshot(transport: Any) -> dict[str, Any]:
    names = [name for each in type(transport).__mro__ for name in getattr(each, "__slots__", ())]
    names = [name for name in names if name.startswith("_") and not name.startswith("__")]
    return {name: getattr(transport, name) for name in names if hasattr(transport, name)}


@pytest.mark.parametrize("state", UpgradeState)
@pytest.mark.parametrize("to", UpgradeState)
async def test_an_illegal_transition_of_an_upgrade(anyio_backend: Any, state: UpgradeState, to: UpgradeState) -> None:
    upgrade = TLSUpgrade(object())  # type: ignore[arg-type]  # the channel is not used
    upgrade.state = state
    if to in UPGRADE_TRANSITIONS[state]:
        upgrade._advance(to)
        assert upgrade.state is to
    else:
        with pytest.raises(IllegalTransitionError):
            upgrade._advance(to)
        assert upgrade.state is state


@pytest.mark.ours_only("asyncio has no such states")
async def test_the_states_of_a_connection(stack: Stack) -> None:
    states = []
    async with stack.open() as group, connected(group) as (transport, protocol, _):

        def lost(_: Recorder, __: object) -> None:
            states.append(transport._state)

        protocol.hooks["connection_lost"] = lost
        states.append(transport._state)
        transport.close()
        states.append(transport._state)
        await protocol.wait_for("connection_lost")
        await group.wait_closed()
        states.append(transport._state)
    assert states == [State.OPEN, State.LOST, State.LOST, State.CLOSED]


def test_the_drawings_are_up_to_date() -> None:
    script = Path(__file__).parents[1] / "docs" / "draw_states.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
