"""Fixtures for event loops that are made, run many times and closed by their owner: asyncio's own is the oracle."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator

import pytest
from loop_factory_helpers import FACTORIES

from transports_anyio import EventLoop, new_event_loop


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" in metafunc.fixturenames:
        backends = metafunc.config.getoption("--backend") or ["asyncio", "trio"]
        # Where Python versions differ, the newest behaviour is right: older ones are no oracle.
        names = ["oracle"] if "asyncio" in backends and sys.version_info >= (3, 13) else []
        names += ["without trio", "with trio"] if "trio" in backends else []
        metafunc.parametrize("make", [FACTORIES[name] for name in names], ids=names)


@pytest.fixture
def loop(make: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[asyncio.AbstractEventLoop]:
    loop = make()
    yield loop
    loop.close()


@pytest.fixture
def ours() -> Iterator[EventLoop]:
    """For what has no oracle: trio from asyncio code."""
    loop = new_event_loop()
    yield loop
    loop.close()
