"""Pollers: the same tests for every selector and driver, and transports over those that this platform does not need."""

from __future__ import annotations

import os
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from math import inf
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from network import needs_pipes, needs_selector
from support import (
    GUARD,
    BaseExceptionGroup,
    BufferedRecorder,
    Recorder,
    Stack,
    connected,
    fill,
    leaves,
    listening,
    pattern,
    raises_inside,
    socket_pair,
    turns,
    until,
)

import transports_anyio._group
from transports_anyio import TransportGroup
from transports_anyio._driver import TaskDriver
from transports_anyio._poller import Poller, make_poller
from transports_anyio._selector import (
    BATCH_SIZE,
    READ,
    WRITE,
    PlatformSelector,
    Registration,
    Selector,
    SystemSelector,
    make_system_selector,
)
from transports_anyio._task_selector import TaskSelector

SYSTEM_SELECTORS: list[Callable[[], SystemSelector]] = []
if hasattr(selectors.DefaultSelector, "fileno"):
    SYSTEM_SELECTORS.append(PlatformSelector)
if sys.platform == "linux":
    from transports_anyio._selector import EpollSelector

    SYSTEM_SELECTORS.append(EpollSelector)

pytestmark = pytest.mark.anyio


class DispatchingScheduler:
    """A scheduler that only calls the callbacks of file descriptors."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.count = 0
        self.deadline = inf
        self.failure: Exception | None = None
        self.tasks_started = False
        self.failures: list[tuple[Registration, BaseException]] = []

    def failed(self, registration: Registration, exc: BaseException) -> None:
        self.failures.append((registration, exc))

    def run_once(self) -> float:
        self.count += 1
        self.poller.dispatch(self.failed)
        if self.deadline <= self.poller.clock.time():
            self.deadline = inf
        if self.failure is not None:
            raise self.failure
        return self.deadline

    def next_deadline(self) -> float:
        return self.deadline


def register(
    poller: Poller, sock: socket.socket, read: Callable[[], object], write: Callable[[], object] | None = None
) -> Registration:
    registration = Registration(sock.fileno())
    poller.register(registration)
    registration.read_ready = read
    if write is not None:
        registration.write_ready = write
    return registration


def raise_failure(registration: Registration, exc: BaseException) -> None:
    raise exc


def task_driven(selector: Selector) -> Poller:
    return Poller(selector, TaskDriver(selector, anyio.current_time))


def waiting_poller() -> Poller:
    selector = make_system_selector()
    assert selector is not None
    return task_driven(selector)


#: The poller of this backend, and those of other backends, of Windows, and of other systems with a selector.
POLLERS: dict[str, Callable[[], Poller]] = {
    "made here": make_poller,
    "tasks": lambda: task_driven(TaskSelector()),
}
if SYSTEM_SELECTORS:
    POLLERS |= {"waiting": waiting_poller, "selector": lambda: task_driven(PlatformSelector())}


@pytest.fixture(params=POLLERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Poller]:
    return POLLERS[request.param]


@asynccontextmanager
async def running(make: Callable[[], Poller]) -> AsyncIterator[tuple[Poller, DispatchingScheduler]]:
    poller = make()
    scheduler = DispatchingScheduler(poller)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(poller.driver.run, scheduler)
            await anyio.sleep(0.005)
            yield poller, scheduler
            tasks.cancel_scope.cancel()
    finally:
        poller.close()


@needs_selector
async def test_the_best_poller_is_chosen(anyio_backend: Any) -> None:
    poller = make_poller()
    assert type(poller.driver).__name__ == ("TrioDriver" if anyio_backend[0] == "trio" else "LoopDriver")
    poller.close()


async def test_readiness_is_reported_in_every_batch_while_it_lasts(anyio_backend: Any, make: Any) -> None:
    reported: list[int] = []
    with socket_pair() as (a, b):
        async with running(make) as (poller, _):
            registration = register(poller, a, lambda: reported.append(READ))
            poller.set_interest(registration, READ)
            await anyio.sleep(0.01)
            assert reported == []
            b.send(b"x")
            await until(lambda: len(reported) >= 3)
            a.recv(1)
            await anyio.sleep(0.01)
            count = len(reported)
            await anyio.sleep(0.01)
            assert len(reported) == count
            poller.set_interest(registration, 0)


class MovesBulk(Registration):
    """Moves much data in each of its first four events."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.bulk_turns = 4


@pytest.mark.parametrize("make_selector", SYSTEM_SELECTORS)
def test_what_moves_much_data_takes_turns_and_the_rest_comes_first(make_selector: Any) -> None:
    called: list[int] = []
    with ExitStack() as stack:
        selector = make_selector()
        stack.callback(selector.close)
        pairs = [stack.enter_context(socket_pair()) for _ in range(20)]
        for index, (sock, peer) in enumerate(pairs):
            registration = (MovesBulk if index < 17 else Registration)(sock.fileno())
            registration.read_ready = partial(called.append, index)
            selector.registrations[sock.fileno()] = registration
            selector.set_interest(registration, READ)
            peer.send(b"x")  # It is never received, so all stay ready.
        selector.bulk_batches = 3

        def dispatched() -> list[int]:
            called.clear()
            assert selector.dispatch(raise_failure) == len(called)
            return list(called)

        # With more than eight of them, an eighth more each time.
        batches = [dispatched() for _ in range(6)]
        assert {tuple(sorted(batch[:3])) for batch in batches} == {(17, 18, 19)}
        assert [len(batch) - 3 for batch in batches] == [3, 3, 3, 3, 3, 3]
        turns_taken = [index for batch in batches for index in batch[3:]]
        assert sorted(turns_taken[:17]) == list(range(17))
        assert turns_taken[17] == turns_taken[0]
        # One that is closed loses its turn, and so does one that is not ready any more.
        closed, emptied = turns_taken[1:3]
        fd = pairs[closed][0].fileno()
        selector.set_interest(selector.registrations[fd], 0)
        del selector.registrations[fd]
        pairs[emptied][0].recv(1)
        assert dispatched()[3:] == turns_taken[3:5]
        # Each has had four turns after a while, and counts like any other then.
        assert len([dispatched() for _ in range(80)][-1]) == 18
        assert selector.bulk_batches == 0


class MustBeWatched(Registration):
    ready_if_refused = False


@needs_selector
@pytest.mark.parametrize("kind", ["made here", "waiting", "selector"])
async def test_a_descriptor_that_must_be_watched_but_cannot_be(anyio_backend: Any, kind: str) -> None:
    async with running(POLLERS[kind]) as (poller, _):
        with socket_pair() as (a, _b):
            registration = MustBeWatched(a.fileno())
            registration.read_ready = registration.write_ready = lambda: None
            poller.register(registration)
            poller.set_interest(registration, READ)
        with pytest.raises(OSError):  # It is closed.
            poller.set_interest(registration, READ | WRITE)
        assert registration.interest == READ
        poller.unregister(registration)
        assert registration.interest == 0
        poller.register(registration)
        with pytest.raises(OSError):
            poller.set_interest(registration, WRITE)
        assert not poller.selector.always_ready
        poller.unregister(registration)


async def test_both_directions_and_changes_of_the_interest(anyio_backend: Any, make: Any) -> None:
    reported: list[int] = []
    with socket_pair() as (a, b):
        async with running(make) as (poller, _):
            registration = register(poller, a, lambda: reported.append(READ), lambda: reported.append(WRITE))
            poller.set_interest(registration, READ | WRITE)
            await until(lambda: reported)
            assert set(reported) == {WRITE}
            b.send(b"x")
            await until(lambda: READ in reported)
            poller.set_interest(registration, READ)
            reported.clear()
            await until(lambda: len(reported) >= 2)
            assert set(reported) == {READ}
            poller.set_interest(registration, WRITE)
            reported.clear()
            await until(lambda: len(reported) >= 2)
            assert set(reported) == {WRITE}
            poller.set_interest(registration, 0)
            reported.clear()
            await anyio.sleep(0.01)
            assert reported == []


async def test_a_hang_up_is_reported_in_both_directions(anyio_backend: Any, make: Any) -> None:
    for interest in (READ, WRITE):
        reported: list[int] = []
        with socket_pair() as (a, b):
            async with running(make) as (poller, _):
                registration = register(
                    poller,
                    a,
                    lambda reported=reported: reported.append(READ),
                    lambda reported=reported: reported.append(WRITE),
                )
                b.close()
                poller.set_interest(registration, interest)
                await until(lambda reported=reported: reported)
                assert set(reported) == {interest}
                poller.set_interest(registration, 0)


async def test_a_descriptor_number_that_is_used_again(anyio_backend: Any, make: Any) -> None:
    reported: list[str] = []
    async with running(make) as (poller, _):
        for number in range(20):
            name = f"owner {number}"
            with socket_pair() as (a, b):
                registration = register(poller, a, lambda name=name: reported.append(name))
                poller.set_interest(registration, READ)
                b.send(b"x")
                if number % 2:
                    await until(lambda name=name: name in reported)
                poller.set_interest(registration, 0)
            reported.clear()
            await anyio.sleep(0.001)
            assert reported == []


async def test_a_callback_may_unregister_others_of_its_batch(anyio_backend: Any, make: Any) -> None:
    reported: list[int] = []
    with socket_pair() as (a, b), socket_pair() as (c, d):
        async with running(make) as (poller, _):

            def ready(number: int) -> None:
                reported.append(number)
                for registration in registrations:
                    poller.set_interest(registration, 0)

            registrations = [register(poller, a, lambda: ready(1)), register(poller, c, lambda: ready(2))]
            b.send(b"x")
            d.send(b"x")
            for registration in registrations:
                poller.set_interest(registration, READ)
            await until(lambda: reported)
            await anyio.sleep(0.01)
            assert len(reported) == 1


async def test_deadlines(anyio_backend: Any, make: Any) -> None:
    async with running(make) as (poller, scheduler):
        scheduler.deadline = poller.clock.time() + 0.02
        poller.driver.wake()
        await until(lambda: scheduler.deadline == inf)


async def test_waking(anyio_backend: Any, make: Any) -> None:
    async with running(make) as (poller, scheduler):
        for wake in (poller.driver.wake, poller.driver.wake_threadsafe):
            before = scheduler.count
            wake()
            await until(lambda before=before: scheduler.count > before)
            await anyio.sleep(0.005)
        before = scheduler.count
        thread = threading.Thread(target=poller.driver.wake_threadsafe)
        thread.start()
        await until(lambda: scheduler.count > before)
        thread.join()


async def test_run_raises_what_an_iteration_raises(anyio_backend: Any, make: Any) -> None:
    poller = make()
    scheduler = DispatchingScheduler(poller)
    scheduler.failure = ZeroDivisionError()
    try:
        scheduler.deadline = -inf
        with anyio.fail_after(GUARD), pytest.raises(BaseException) as caught:
            await poller.driver.run(scheduler)
        assert "ZeroDivisionError" in repr(caught.value)
    finally:
        poller.close()


async def test_hundreds_of_descriptors(anyio_backend: Any, make: Any) -> None:
    reported: set[int] = set()
    registrations: list[Registration] = []
    pairs = [socket.socketpair() for _ in range(200)]
    try:
        async with running(make) as (poller, _):
            for a, b in pairs:

                def ready(sock: socket.socket = a) -> None:
                    os.read(sock.fileno(), 1)
                    reported.add(sock.fileno())

                registrations.append(register(poller, a, ready))
                poller.set_interest(registrations[-1], READ)
                b.send(b"x")
            await until(lambda: len(reported) == len(pairs))
            for registration in registrations:
                poller.set_interest(registration, 0)
    finally:
        for a, b in pairs:
            a.close()
            b.close()


@pytest.mark.parametrize("make", SYSTEM_SELECTORS)
def test_g1_one_batch_has_all_that_is_ready(make: Callable[[], SystemSelector]) -> None:
    selector = make()
    called: list[int] = []
    with ExitStack() as exits:
        exits.callback(selector.close)
        for number in range(BATCH_SIZE + 50):
            ours, theirs = exits.enter_context(socket_pair())
            registration = Registration(ours.fileno())
            registration.read_ready = partial(called.append, number)
            selector.registrations[registration.fd] = registration
            selector.set_interest(registration, READ)
            theirs.send(b"x")
        assert selector.dispatch(raise_failure) == BATCH_SIZE + 50
    assert sorted(called) == list(range(BATCH_SIZE + 50))


@pytest.mark.ours_only("asyncio has no pollers")
@pytest.mark.parametrize("poller", [name for name in POLLERS if name != "made here"])
@pytest.mark.parametrize("where", ["a task", "a callback"])
async def test_g1_data_comes_before_a_timer_over_every_poller(
    stack: Stack, poller: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that notice that a file descriptor is ready run before a timer that is due."""
    monkeypatch.setattr(transports_anyio._core, "make_poller", POLLERS[poller])
    outcomes: list[str] = []

    def received(*_: Any) -> None:
        timer.cancel()
        outcomes.append("received")

    async with stack.open() as group, connected(group, Recorder(on_data_received=received)) as (_, _, peer):

        def hold_up() -> None:
            nonlocal timer
            timer = group.call_later(0.02, outcomes.append, "timed out")
            peer.socket.send(b"in time")
            time.sleep(0.05)

        timer: Any = None
        for _ in range(10):
            outcomes.clear()
            if where == "a task":
                hold_up()
            else:
                group.call_soon(hold_up)
            await until(lambda: outcomes)
            assert outcomes == ["received"]


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, GeneratorExit])
async def test_g5_what_a_callback_raises_is_passed_on_and_the_others_are_called(
    anyio_backend: Any, make: Any, error: type[BaseException]
) -> None:
    """It is called again, as long as its file descriptor is ready."""

    def fail() -> None:
        raise error

    called: list[int] = []
    with socket_pair() as (a, b), socket_pair() as (c, d):
        async with running(make) as (poller, owner):
            failing = register(poller, a, fail)
            other = register(poller, c, lambda: called.append(1))
            b.send(b"x")
            d.send(b"x")
            poller.set_interest(failing, READ)
            poller.set_interest(other, READ)
            await until(lambda: len(owner.failures) > 1 and len(called) > 1)
            poller.set_interest(failing, 0)
            poller.set_interest(other, 0)
    assert {(registration, type(exc)) for registration, exc in owner.failures} == {(failing, error)}


@pytest.mark.ours_only("asyncio has no pollers")
@pytest.mark.parametrize("poller", [name for name in POLLERS if name != "made here"])
@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_the_transports_work_over_every_poller(
    stack: Stack, poller: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports_anyio._core, "make_poller", POLLERS[poller])
    data = pattern(4 << 20)
    fired: list[int] = []
    async with stack.open() as group:
        group.call_later(0.01, fired.append, 1)
        for _ in range(3):
            async with connected(group, kind(), small=True) as (transport, protocol, peer):
                async with anyio.create_task_group() as tasks:
                    transport.write(data)
                    tasks.start_soon(peer.send, data)
                    assert await peer.receive_exactly(len(data)) == data
                assert await protocol.wait_received(len(data)) == data
                transport.pause_reading()
                await peer.send(b"held back")
                await anyio.sleep(0.005)
                assert len(protocol.received) == len(data)
                transport.resume_reading()
                await protocol.wait_received(len(data) + 9)
                peer.close()
                await protocol.wait_for("connection_lost")
        server = await group.create_server(kind, "127.0.0.1", 0)
        transport, protocol = await group.create_connection(Recorder, *server.sockets[0].getsockname())
        transport.abort()
        await protocol.wait_for("connection_lost")
        server.close()
        await until(lambda: fired)


@pytest.mark.parametrize("poller", POLLERS)
@needs_pipes
async def test_p6_input_does_not_end_a_writer_over_any_poller(
    anyio_backend: Any, poller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most systems report a hang-up as input, so another call has to distinguish them."""
    monkeypatch.setattr(transports_anyio._core, "make_poller", POLLERS[poller])
    with socket_pair() as (a, b):
        async with TransportGroup() as group:
            transport, protocol = await group.connect_write_pipe(Recorder, a)
            b.send(b"input that nobody wants")
            assert select.select([a], [], [], GUARD)[0]
            await turns()
            assert protocol.names == ["connection_made"]
            transport.write(b"still here")
            assert b.recv(10) == b"still here"
            b.close()
            with anyio.fail_after(GUARD):
                while not protocol.lost:
                    transport.write(b"x")
                    await anyio.lowlevel.checkpoint()


async def test_a_reused_descriptor_number(make: Callable[[], Poller], anyio_backend: Any) -> None:
    """The user has closed a registered file descriptor, and the system has reused its number."""
    reported: list[int] = []
    with socket_pair() as (a, b):
        async with running(make) as (poller, _):
            first = register(poller, a, lambda: reported.append(1), lambda: reported.append(1))
            poller.set_interest(first, READ)
            poller.set_interest(first, 0)
            second = register(poller, a, lambda: reported.append(2))
            poller.set_interest(second, READ)
            poller.unregister(first)
            b.send(b"x")
            await until(lambda: reported)
            assert set(reported) == {2}
            poller.unregister(second)


@needs_selector
async def test_a_registered_descriptor_that_the_user_closes(anyio_backend: Any) -> None:
    """It is reported as ready, so that the next call that uses it raises."""
    for make in (make_poller, waiting_poller, POLLERS["selector"]):
        reported: list[int] = []
        with socket_pair() as (a, _):
            async with running(make) as (poller, _):
                registration = register(
                    poller,
                    a,
                    lambda reported=reported: reported.append(READ),
                    lambda reported=reported: reported.append(WRITE),
                )
                poller.set_interest(registration, READ)
                a.close()
                assert reported == []
                poller.set_interest(registration, READ | WRITE)
                await until(lambda reported=reported: {READ, WRITE} <= set(reported))
                poller.unregister(registration)


class LeavingError(Exception):
    """An error raised by a block."""


@pytest.mark.leaves_timers
@pytest.mark.parametrize("poller", POLLERS)
@pytest.mark.parametrize("how", ["normally", "by an exception", "by a cancellation"])
@pytest.mark.parametrize("buffered", [False, True])
async def test_a_socket_that_the_user_closes_does_not_disturb_others(
    anyio_backend: Any, poller: str, how: str, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own connection ends; all others, and the block, end as if nothing had happened."""
    monkeypatch.setattr(transports_anyio._core, "make_poller", POLLERS[poller])
    protocols = [Recorder() for _ in range(4)]
    caught: list[BaseException] = []
    with listening() as listener, ExitStack() as closing, anyio.move_on_after(GUARD) as scope:
        try:
            async with TransportGroup() as group:
                sockets = []
                for protocol in protocols:
                    sock = socket.create_connection(listener.getsockname())
                    sockets.append(sock)
                    closing.enter_context(listener.accept()[0])
                    transport, _ = await group.create_connection(lambda protocol=protocol: protocol, sock=sock)
                    # Leaving normally flushes the buffers, and only this peer is gone: the others do not read.
                    if buffered and (how != "normally" or protocol is protocols[1]):
                        fill(transport, 1 << 20)
                group.call_later(3600, print)
                sockets[1].close()
                if how == "by an exception":
                    raise LeavingError
                if how == "by a cancellation":
                    scope.cancel()
                    await anyio.sleep(GUARD)
        except BaseExceptionGroup as error:
            caught = leaves(error)
    assert scope.cancel_called == (how == "by a cancellation")
    assert [type(error) for error in caught] == ([LeavingError] if how == "by an exception" else [])
    assert [protocol.count("connection_lost") for protocol in protocols] == [1] * 4
    assert [protocol.exception for protocol in (protocols[0], *protocols[2:])] == [None] * 3


@pytest.mark.parametrize("poller", POLLERS)
def test_an_interrupt_in_a_callback_with_full_buffers(
    anyio_backend: Any, poller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler has stopped, and the connections still unregister, one direction at a time."""
    monkeypatch.setattr(transports_anyio._core, "make_poller", POLLERS[poller])
    protocols = [Recorder() for _ in range(3)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        with listening() as listener:
            async with TransportGroup() as group:
                for protocol in protocols:
                    await group.create_connection(lambda protocol=protocol: protocol, *listener.getsockname())
                    fill(protocol.transport, 1 << 20)
                await turns()
                group.call_soon(interrupt)
                await anyio.sleep(GUARD)

    name, options = anyio_backend
    with raises_inside(KeyboardInterrupt):
        anyio.run(main, backend=name, backend_options=options)
    assert [protocol.exception for protocol in protocols] == [None] * 3
