"""The backends, the stacks under test, and the checks that surround every test.

A *stack* is something that has the event loop's endpoint functions: asyncio itself (the oracle) or a
`TransportGroup` on one of the backends. A test that takes the `stack` fixture runs on all of them, so that
asyncio's own transports say what is right.

Where to find what:

- tests of one subject are in `test_<subject>.py`; the large subjects have folders: `group/`, `scheduling/`, `tls/`,
  `sendfile/`, `datagrams/`, `pipes/`, `processes/` and `event_loop/`;
- `support.py`: stacks, recorders, raw socket peers, peers in other processes; `network.py`: addresses that behave in a
  certain way, and marks for what a system may lack; `tls_support.py`: contexts and TLS peers; `anyio_streams.py` and
  `stream_pairs.py`: pairs of streams; `*_helpers.py`: helpers for the tests of one folder;
- `differential.py` runs the scripts of `scenarios.py` on asyncio and on ours; `faults.py` makes system calls fail;
- `peers.py`, `tls_peers.py`, `load_client.py`, `interrupted.py`, `adopting.py` and `docs_program.py` are programs that
  tests start;
- `typing/`: users' code for the type checkers.
"""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import anyio
import pytest
import support
import trustme
from support import BACKENDS, ORACLE, Peer, Stack, open_connection, open_descriptors
from tls_support import Certificates

from transports_anyio import TransportGroup, _capabilities

if sys.platform == "win32":
    # About UNIX sockets, terminals, signals and programs, which Windows does not have.
    collect_ignore = [
        "test_adopted_sockets.py", "pipes", "processes", "event_loop/test_children.py", "test_tls_peers.py",
        "test_unix.py",
    ]  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=list(BACKENDS),
        help="run on this backend only; may be given more than once (default: all)",
    )
    parser.addoption(
        "--on-backends-only",
        action="store_true",
        help="leave out the tests that are the same for every backend: nox runs them with the first one only",
    )
    parser.addoption(
        "--descriptors",
        choices=["polled", "threads"],
        default="polled",
        help="how pipes and children are waited for: `threads`, as on Windows, where they cannot be polled",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--descriptors") == "threads":
        _capabilities.polls_files = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell started us in the background. The programs that tests end by Ctrl-C would inherit this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers",
        "ours_only(reason, before=None): not run on asyncio's own transports, because we differ on purpose or "
        "because asyncio has no such thing; of Pythons before `before`, since when asyncio does as we do. "
        "The reason may be left out beside `differs`",
    )
    config.addinivalue_line(
        "markers",
        "differs(what, asyncio, here, why): shows a deliberate difference from asyncio, a row of docs/differences.md; "
        "differs(what): shows the same difference as another test",
    )
    config.addinivalue_line(
        "markers", "leaves_timers: a group may end normally while timers are pending, which it then drops"
    )
    config.addinivalue_line(
        "markers", "needs_polling(reason): not run with `--descriptors threads`, which cannot do this"
    )
    config.addinivalue_line(
        "markers", "exhaustive: takes long; nox runs it on the newest Python only, unless it is given arguments"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by backend. Tests that use a stack also run on the oracle, first."""
    backends = metafunc.config.getoption("--backend") or list(BACKENDS)
    if "stack" in metafunc.fixturenames:
        names = [name for name in BACKENDS if name in backends]
        mark = metafunc.definition.get_closest_marker("ours_only")
        if mark is not None and not mark.args:
            assert metafunc.definition.get_closest_marker("differs"), "ours_only needs a reason"
        # Where Python versions differ, the newest behaviour is right, so older versions are no oracle.
        oracle_since = (3, 13) if mark is None else mark.kwargs.get("before")
        if "asyncio" in backends and oracle_since is not None and sys.version_info >= oracle_since:
            names.insert(0, ORACLE)
        metafunc.parametrize(
            "anyio_backend, stack",
            [(BACKENDS["asyncio" if name == ORACLE else name], name) for name in names],
            ids=names,
            indirect=True,
        )
    elif "anyio_backend" in metafunc.fixturenames:
        names = [name for name in BACKENDS if name in backends]
        metafunc.parametrize("anyio_backend", [BACKENDS[name] for name in names], ids=names, indirect=True)


#: The fixtures that are parametrised by backend, and the one that a test takes to see the option `--backend`.
BACKEND_FIXTURES = {"stack", "anyio_backend", "run", "make", "request"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        needs_polling = item.get_closest_marker("needs_polling")
        if needs_polling is not None and not _capabilities.polls_files:
            item.add_marker(pytest.mark.skip(reason=f"not in threads: {needs_polling.args[0]}"))
    if config.getoption("--on-backends-only"):
        same = [item for item in items if BACKEND_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=same)
        items[:] = [item for item in items if item not in set(same)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Go on measuring coverage after a test that has set a tracer of its own, or has raised in coverage's."""
    tracer = sys.gettrace()
    result = yield
    if sys.gettrace() is not tracer:
        sys.settrace(tracer)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Fail a test that has passed but left a task running. AnyIO's plugin runs the wrapper."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test) or "anyio_backend" not in pyfuncitem.fixturenames:
        return

    @functools.wraps(test)
    async def and_no_task_is_left(*args: object, **options: object) -> None:
        before = {task.id for task in anyio.get_running_tasks()}
        await test(*args, **options)
        await support.turns()
        assert [task for task in anyio.get_running_tasks() if task.id not in before] == [], "tasks left running"

    pyfuncitem.obj = and_no_task_is_left


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    name, options = request.param
    if options.get("use_uvloop"):
        pytest.importorskip("uvloop")
    if name == "trio":
        pytest.importorskip("trio")
    return name, options


@pytest.fixture(scope="session", autouse=True)
def _warm_up() -> Iterator[None]:
    """Run each backend once: uvloop opens a pipe with its first loop and keeps it, for the whole process."""
    for name, options in BACKENDS.values():
        try:
            anyio.run(anyio.sleep, 0, backend=name, backend_options=options)
        except ImportError:
            pass  # Tests of a backend that is not installed are skipped one by one.
    yield
    gc.unfreeze()


#: After this number of tests the surviving objects are frozen again, because pytest keeps some of each test.
TESTS_FOR_A_FREEZE = 100
tests_begun = itertools.count()


def _collect_garbage() -> None:
    """Collect garbage. Long-lived objects are frozen, so that the collector does not visit them around every test."""
    if next(tests_begun) % TESTS_FOR_A_FREEZE:
        gc.collect()
        return
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> Stack:
    return Stack(request.param)


@pytest.fixture(scope="session")
def certificate_authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def certificates(certificate_authority: trustme.CA) -> Certificates:
    return Certificates(certificate_authority)


@pytest.fixture
def connect_peer() -> Iterator[Callable[..., Awaitable[tuple[Any, Any, Peer]]]]:
    """`connected` of support.py without a block: the peers are closed when the test has ended.

    `transport, protocol, peer = await connect_peer(group, protocol, small=True)`
    """
    with ExitStack() as peers:

        async def connect(group: Any, protocol: Any = None, *, small: bool = False) -> tuple[Any, Any, Peer]:
            transport, protocol, peer = await open_connection(group, protocol, small=small)
            return transport, protocol, peers.enter_context(peer)

        yield connect


def _left_over_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # trio keeps idle worker threads for some seconds, shared by the whole process.
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before and not thread.name.lower().startswith("trio")
    ]


def _check_no_child_is_left() -> None:
    """Fail if this process has a child, running or a zombie."""
    if sys.platform == "win32":
        return
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise AssertionError(f"zombie left: {pid} with status {status}" if pid else "child process left running")


@pytest.fixture(scope="session", autouse=True)
def _count_timers() -> Iterator[None]:
    """Count the timers that a group has left after its last transport has closed, and before it drops them."""
    leave = TransportGroup._leave

    async def leave_and_count(self: TransportGroup, *exc_info: Any) -> None:
        await leave(self, *exc_info)
        if exc_info[1] is None:
            support.TIMERS.append(self.statistics().pending_timers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransportGroup, "_leave", leave_and_count)
        yield


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a file descriptor, a thread, a child or a zombie, or a timer in a group that ends
    normally, or whose callbacks came in an illegal order."""
    support.RECORDERS.clear()
    support.TIMERS.clear()
    _collect_garbage()
    threads_before = set(threading.enumerate())
    descriptors_before = open_descriptors()
    yield
    recorders = list(support.RECORDERS)
    support.RECORDERS.clear()
    gc.collect()
    deadline = time.monotonic() + 5
    while _left_over_threads(threads_before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _left_over_threads(threads_before) == []
    after = open_descriptors()
    leaked = {fd: what for fd, what in after.items() if descriptors_before.get(fd) != what}
    assert leaked == {}, "file descriptors left open"
    _check_no_child_is_left()
    assert not any(support.TIMERS) or request.node.get_closest_marker("leaves_timers"), "timers left pending"
    for recorder in recorders:
        recorder.check()
