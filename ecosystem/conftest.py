"""What is around every program: the backend that it runs on, its peers, and the checks that nothing is left.

A test that is an `async def` is asyncio code: `run_asyncio` runs it on each backend. A plain test that takes the
fixture `backend` starts by itself what it needs there. On asyncio and uvloop the loop is their own, and says what is
right.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import signal
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import peers
import pycares
import pytest
import trio
import trustme
import uvloop
from peers import GUARD

import transports_anyio

#: What the libraries themselves warn of, on asyncio as on trio.
WARNINGS_OF_LIBRARIES = [
    # uvicorn's first WebSocket implementation, and the old one of websockets that it uses: some users still have them.
    "ignore:.*websockets",
    "ignore::DeprecationWarning:websockets.legacy.protocol",
    "ignore::DeprecationWarning:websockets.legacy.server",
]


@dataclass(frozen=True)
class Backend:
    """One of AnyIO's backends, and how to run something there."""

    name: str
    anyio_name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def run_asyncio(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Run asyncio code, and see that it leaves no task and no error of a callback behind."""
        return transports_anyio.run_asyncio(
            self._watch, function, *args, backend=self.anyio_name, backend_options=self.options
        )

    def run(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Run backend code: on trio a trio task."""
        return anyio.run(function, *args, backend=self.anyio_name, backend_options=self.options)

    async def _watch(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        assert self.is_running(loop)
        failures: list[dict[str, Any]] = []
        before = asyncio.all_tasks()

        def on_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            # On a server, TLS handshakes that fail are reported by our loop, by asyncio's in debug mode only.
            if not ("peername" in context and isinstance(context["exception"], ssl.SSLError)):
                failures.append(context)

        loop.set_exception_handler(on_failure)
        async with asyncio.timeout(GUARD):
            result = await function(*args)
            # What has been asked to end gets the time to do so.
            if left := asyncio.all_tasks() - before:
                _, left = await asyncio.wait(left, timeout=1)
            assert left == set(), "tasks left running"
        gc.collect()
        assert failures == [], "reported to the loop's exception handler"
        return result

    def is_running(self, loop: asyncio.AbstractEventLoop) -> bool:
        if self.name == "trio":
            return trio.lowlevel.in_trio_run() and not isinstance(loop, asyncio.BaseEventLoop)
        return isinstance(loop, uvloop.Loop if self.name == "uvloop" else asyncio.SelectorEventLoop)


BACKENDS = {
    "asyncio": Backend("asyncio", "asyncio", {"use_uvloop": False}),
    "uvloop": Backend("uvloop", "asyncio", {"use_uvloop": True}),
    "trio": Backend("trio", "trio"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", action="append", choices=list(BACKENDS), help="run on this backend only")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background by a shell. The programs that tests end by Ctrl-C would inherit this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in WARNINGS_OF_LIBRARIES:
        config.addinivalue_line("filterwarnings", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test on every backend."""
    names = metafunc.config.getoption("--backend") or list(BACKENDS)
    metafunc.parametrize("backend", [BACKENDS[name] for name in names], ids=names, scope="function")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an asynchronous test as asyncio code."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}
    pyfuncitem.funcargs["backend"].run_asyncio(functools.partial(test, **arguments))
    return True


@pytest.fixture(scope="session", autouse=True)
def _warm_up() -> None:
    """Let come what comes once and stays: a pipe of uvloop's first loop, a thread of pycares that ends its channels."""
    for backend in BACKENDS.values():
        backend.run(anyio.to_thread.run_sync, int)
    pycares.Channel().close()
    _freeze()


def _freeze() -> None:
    """Do not look again and again through what the libraries' modules keep: there is much of it."""
    gc.collect()
    gc.freeze()


def _threads() -> set[threading.Thread]:
    # trio keeps idle worker threads for some seconds, for everyone in the process.
    return {thread for thread in threading.enumerate() if not thread.name.lower().startswith("trio")}


@pytest.fixture(autouse=True)
def no_leaks(backend: Backend) -> Iterator[None]:
    """Fail a test that leaves a descriptor or a thread."""
    gc.collect()
    threads, descriptors = _threads(), peers.open_descriptors()
    yield
    deadline = time.monotonic() + 5
    while True:
        gc.collect()
        new_threads = _threads() - threads
        new_descriptors = {fd: what for fd, what in peers.open_descriptors().items() if descriptors.get(fd) != what}
        if not (new_threads or new_descriptors) or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert new_threads == set()
    assert new_descriptors == {}


@pytest.fixture(scope="session")
def certificate_authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def tls(certificate_authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> peers.Tls:
    """Certificates of a server on this machine, as contexts and as files."""
    return peers.Tls.issue(certificate_authority, tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[peers.Redis]:
    with peers.redis_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgresql(tls: peers.Tls) -> Iterator[peers.PostgreSQL]:
    with peers.postgresql(tls) as server:
        yield server


@pytest.fixture(scope="session")
def mosquitto() -> Iterator[int]:
    with peers.mosquitto() as port:
        yield port
