"""The event loops under test. Each test is a program, which the fixture `run` runs on one of them.

- `oracle`: asyncio's own event loop, run by asyncio itself.
- `mixins`: asyncio's own event loop, with our methods for sockets, threads and signals instead of its own.
- `trio`, `asyncio`, `uvloop`: `run_asyncio` on this backend.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support import BACKENDS, GUARD, ORACLE

from transports_anyio import run_asyncio
from transports_anyio._event_loop._signals import Signals
from transports_anyio._event_loop._sock_methods import SockMethods
from transports_anyio._event_loop._threads import Threads

MIXINS = "mixins"


class MixedLoop(SockMethods, Threads, Signals, asyncio.SelectorEventLoop):
    """asyncio's event loop with our methods."""


class Runner:
    """Runs an async function on an event loop, as `asyncio.run` does."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def is_ours(self) -> bool:
        """Whether the methods under test belong to this package."""
        return self.name in (MIXINS, "trio")

    @property
    def is_uvloop(self) -> bool:
        return self.name == "uvloop"

    def __call__(self, main: Callable[[], Coroutine[Any, Any, Any]], *, debug: bool = False) -> Any:
        async def guarded() -> Any:
            asyncio.get_running_loop().set_debug(debug)
            return await asyncio.wait_for(main(), GUARD)

        if self.name in BACKENDS:
            name, options = BACKENDS[self.name]
            return run_asyncio(guarded, backend=name, backend_options=options)
        loop = MixedLoop() if self.name == MIXINS else asyncio.SelectorEventLoop()
        try:
            asyncio.set_event_loop(loop)
            return loop.run_until_complete(guarded())
        finally:
            try:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.run_until_complete(loop.shutdown_default_executor())
                if isinstance(loop, MixedLoop):
                    loop._remove_signal_handlers()
            finally:
                asyncio.set_event_loop(None)
                loop.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run" not in metafunc.fixturenames:
        return
    backends = metafunc.config.getoption("--backend") or list(BACKENDS)
    names = [name for name in BACKENDS if name in backends]
    if "asyncio" in backends:
        # Where Python versions differ, the newest behaviour is right: older ones are no oracle.
        names[:0] = [ORACLE, MIXINS] if sys.version_info >= (3, 13) else [MIXINS]
    left_out = getattr(metafunc.module, "LEFT_OUT", [])
    names = [name for name in names if name not in left_out]
    metafunc.parametrize("run", names, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Runner:
    if request.param in ("trio", "uvloop"):
        pytest.importorskip(request.param)
    return Runner(request.param)
