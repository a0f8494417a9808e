"""Run the same script on asyncio's own transports and on ours, over every kind of stream: `differential.py`."""

from __future__ import annotations

import functools
import sys
from typing import Any

import anyio
import pytest
from differential import CARRIERS, Scenario, run_scenario
from scenarios import DIFFERENCES, SCENARIOS, is_mended, nearest, oracle
from support import ORACLE, Stack

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

#: asyncio's own transports are the oracle in the newest Python; elsewhere ours on asyncio are.
HAS_ORACLE = sys.version_info >= (3, 13)


@functools.cache
def recorded_on_asyncio(scenario: str, carrier: str, stack: str) -> list[Any]:
    return anyio.run(run_scenario, BY_NAME[scenario], CARRIERS[carrier], Stack(stack), backend="asyncio")


@pytest.mark.parametrize("name", BY_NAME)
def test_scenario(anyio_backend: tuple[str, dict[str, Any]], name: str) -> None:
    backend, options = anyio_backend
    carriers = [carrier for carrier in BY_NAME[name].carriers if CARRIERS[carrier].available]
    if not carriers:
        pytest.skip("this system has no such connections")
    for carrier in carriers:
        over = oracle(name, carrier)
        if HAS_ORACLE and over and CARRIERS[over].available:
            expected = recorded_on_asyncio(name, over, ORACLE)
        else:
            expected = recorded_on_asyncio(name, carrier, "ours")
        recording = anyio.run(
            run_scenario, BY_NAME[name], CARRIERS[carrier], Stack("ours"), backend=backend, backend_options=options
        )
        for ours, theirs in zip(recording, expected, strict=True):
            assert ours == theirs, f"over {carrier}"


@pytest.mark.skipif(not HAS_ORACLE, reason="asyncio of an older Python is no oracle")
@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference(name: str) -> None:
    """Every documented difference still exists; one that has gone must be removed from the page."""
    for scenario, carriers in DIFFERENCES[name].shows.items():
        for carrier in carriers:
            if is_mended(scenario, carrier) is not False or not CARRIERS[nearest(carrier)].available:
                continue
            script = (BY_NAME[scenario], CARRIERS[nearest(carrier)], Stack(ORACLE))
            try:
                # Some of those that hang do so at every wait. A short time-out could only hide that a difference has
                # gone.
                theirs = anyio.run(run_scenario, *script, 0.1, backend="asyncio")
            except Exception:
                continue
            assert recorded_on_asyncio(scenario, carrier, "ours") != theirs, f"{scenario} over {carrier}"


def test_scenario_names_are_unique() -> None:
    assert len(BY_NAME) == len(SCENARIOS)
    assert {scenario for each in DIFFERENCES.values() for scenario in each.shows} <= set(BY_NAME)


def test_unsent_bytes_are_recorded_as_a_mistake(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """An assertion in a callback ends the connection, equally on both sides: that alone would show nothing."""
    backend, options = anyio_backend
    strange = Scenario("strange", [("a", "write_anything", b"none of the script's")])
    with pytest.raises(AssertionError, match="b got other bytes than were sent, after 0"):
        anyio.run(run_scenario, strange, CARRIERS["tcp"], Stack("ours"), backend=backend, backend_options=options)


def test_the_report_has_the_error_of_the_script(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    """It must not be a mistake of the recorder instead, which would be equal on both sides too."""
    backend, options = anyio_backend
    raising = [each for each in SCENARIOS if any(("self", "raise") in steps for steps in each.reactions.values())]
    assert len(raising) > 5
    for scenario in raising:
        if not CARRIERS[scenario.carriers[0]].available:
            continue
        script = (scenario, CARRIERS[scenario.carriers[0]], Stack("ours"))
        recording = anyio.run(run_scenario, *script, backend=backend, backend_options=options)
        reported = [name for entry in recording for name, *_ in entry["reports"]]
        assert set(reported) == {"Boom"}, scenario.name
