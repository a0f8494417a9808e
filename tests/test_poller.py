"""The pollers: one suite of rules for all of them, and the transports over the one that this platform does not need."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from math import inf
from typing import Any

import anyio
import anyio.lowlevel
import pytest
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
    turns,
    until,
)

import transports_anyio._group
from transports_anyio import TransportGroup
from transports_anyio._loop_poller import make_poller
from transports_anyio._poller import Poller, TaskPoller, WaitingListPoller
from transports_anyio._selector import (
    BATCH_SIZE,
    READ,
    WRITE,
    EpollSelector,
    PlatformSelector,
    Registration,
    Selector,
    make_selector,
)

pytestmark = pytest.mark.anyio


class Turns:
    """An owner of a poller that does nothing but take its turns."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self.count = 0
        self.deadline = inf
        self.failure: Exception | None = None
        self.tasks_started = False
        self.failures: list[tuple[Registration, BaseException]] = []

    def failed(self, registration: Registration, exc: BaseException) -> None:
        self.failures.append((registration, exc))

    def turn(self) -> float:
        self.count += 1
        self.poller.dispatch(self.failed)
        if self.deadline <= self.poller.time():
            self.deadline = inf
        if self.failure is not None:
            raise self.failure
        return self.deadline


def watch_of(
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


def waiting_poller() -> Poller:
    selector = make_selector()
    assert selector is not None
    return WaitingListPoller(selector)


#: Every kind of poller: what is made here, what other backends, other systems with a selector, and Windows have.
POLLERS: dict[str, Callable[[], Poller]] = {
    "made here": make_poller,
    "waiting": waiting_poller,
    "selector": lambda: WaitingListPoller(PlatformSelector()),
    "tasks": TaskPoller,
}


@pytest.fixture(params=POLLERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Poller]:
    return POLLERS[request.param]


@asynccontextmanager
async def running(make: Callable[[], Poller]) -> AsyncIterator[tuple[Poller, Turns]]:
    poller = make()
    turns = Turns(poller)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(poller.run, turns)
            await anyio.sleep(0.005)
            yield poller, turns
            tasks.cancel_scope.cancel()
    finally:
        poller.close()


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    with a, b:
        a.setblocking(False)
        b.setblocking(False)
        yield a, b


async def test_the_best_poller_is_chosen(anyio_backend: Any) -> None:
    poller = make_poller()
    assert type(poller).__name__ == ("TrioPoller" if anyio_backend[0] == "trio" else "LoopPoller")
    poller.close()


async def test_readiness_is_told_in_every_batch_until_it_is_over(anyio_backend: Any, make: Any) -> None:
    told: list[int] = []
    with pair() as (a, b):
        async with running(make) as (poller, _):
            registration = watch_of(poller, a, lambda: told.append(READ))
            poller.set_interest(registration, READ)
            await anyio.sleep(0.01)
            assert told == []
            b.send(b"x")
            await until(lambda: len(told) >= 3)
            a.recv(1)
            await anyio.sleep(0.01)
            count = len(told)
            await anyio.sleep(0.01)
            assert len(told) == count
            poller.set_interest(registration, 0)


class MustBeWatched(Registration):
    ready_if_refused = False


@pytest.mark.parametrize("kind", ["made here", "waiting", "selector"])
async def test_a_descriptor_that_has_to_be_watched_and_cannot(anyio_backend: Any, kind: str) -> None:
    async with running(POLLERS[kind]) as (poller, _):
        with pair() as (a, _b):
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
        assert not poller.is_ready
        poller.unregister(registration)


async def test_both_directions_and_changes_of_the_interest(anyio_backend: Any, make: Any) -> None:
    told: list[int] = []
    with pair() as (a, b):
        async with running(make) as (poller, _):
            registration = watch_of(poller, a, lambda: told.append(READ), lambda: told.append(WRITE))
            poller.set_interest(registration, READ | WRITE)
            await until(lambda: told)
            assert set(told) == {WRITE}
            b.send(b"x")
            await until(lambda: READ in told)
            poller.set_interest(registration, READ)
            told.clear()
            await until(lambda: len(told) >= 2)
            assert set(told) == {READ}
            poller.set_interest(registration, WRITE)
            told.clear()
            await until(lambda: len(told) >= 2)
            assert set(told) == {WRITE}
            poller.set_interest(registration, 0)
            told.clear()
            await anyio.sleep(0.01)
            assert told == []


async def test_a_hang_up_is_told_to_whoever_waits(anyio_backend: Any, make: Any) -> None:
    for interest in (READ, WRITE):
        told: list[int] = []
        with pair() as (a, b):
            async with running(make) as (poller, _):
                registration = watch_of(
                    poller, a, lambda told=told: told.append(READ), lambda told=told: told.append(WRITE)
                )
                b.close()
                poller.set_interest(registration, interest)
                await until(lambda told=told: told)
                assert set(told) == {interest}
                poller.set_interest(registration, 0)


async def test_a_descriptor_number_that_is_used_again(anyio_backend: Any, make: Any) -> None:
    told: list[str] = []
    async with running(make) as (poller, _):
        for number in range(20):
            name = f"owner {number}"
            with pair() as (a, b):
                registration = watch_of(poller, a, lambda name=name: told.append(name))
                poller.set_interest(registration, READ)
                b.send(b"x")
                if number % 2:
                    await until(lambda name=name: name in told)
                poller.set_interest(registration, 0)
            told.clear()
            await anyio.sleep(0.001)
            assert told == []


async def test_a_callback_may_take_out_others_of_its_batch(anyio_backend: Any, make: Any) -> None:
    told: list[int] = []
    with pair() as (a, b), pair() as (c, d):
        async with running(make) as (poller, _):

            def ready(number: int) -> None:
                told.append(number)
                for registration in registrations:
                    poller.set_interest(registration, 0)

            registrations = [watch_of(poller, a, lambda: ready(1)), watch_of(poller, c, lambda: ready(2))]
            b.send(b"x")
            d.send(b"x")
            for registration in registrations:
                poller.set_interest(registration, READ)
            await until(lambda: told)
            await anyio.sleep(0.01)
            assert len(told) == 1


async def test_deadlines(anyio_backend: Any, make: Any) -> None:
    async with running(make) as (poller, turns):
        turns.deadline = poller.time() + 0.02
        poller.wake()
        await until(lambda: turns.deadline == inf)


async def test_waking(anyio_backend: Any, make: Any) -> None:
    async with running(make) as (poller, turns):
        for wake in (poller.wake, poller.wake_threadsafe):
            before = turns.count
            wake()
            await until(lambda before=before: turns.count > before)
            await anyio.sleep(0.005)
        before = turns.count
        thread = threading.Thread(target=poller.wake_threadsafe)
        thread.start()
        await until(lambda: turns.count > before)
        thread.join()


async def test_what_a_turn_raises_comes_out_of_run(anyio_backend: Any, make: Any) -> None:
    poller = make()
    turns = Turns(poller)
    turns.failure = ZeroDivisionError()
    try:
        turns.deadline = -inf
        with anyio.fail_after(GUARD), pytest.raises(BaseException) as caught:
            await poller.run(turns)
        assert "ZeroDivisionError" in repr(caught.value)
    finally:
        poller.close()


async def test_hundreds_of_descriptors(anyio_backend: Any, make: Any) -> None:
    told: set[int] = set()
    registrations: list[Registration] = []
    pairs = [socket.socketpair() for _ in range(200)]
    try:
        async with running(make) as (poller, _):
            for a, b in pairs:

                def ready(sock: socket.socket = a) -> None:
                    os.read(sock.fileno(), 1)
                    told.add(sock.fileno())

                registrations.append(watch_of(poller, a, ready))
                poller.set_interest(registrations[-1], READ)
                b.send(b"x")
            await until(lambda: len(told) == len(pairs))
            for registration in registrations:
                poller.set_interest(registration, 0)
    finally:
        for a, b in pairs:
            a.close()
            b.close()


@pytest.mark.parametrize("make", [EpollSelector, PlatformSelector])
def test_g1_one_batch_has_all_that_is_ready(make: Callable[[], Selector]) -> None:
    selector = make()
    called: list[int] = []
    with ExitStack() as exits:
        exits.callback(selector.close)
        for number in range(BATCH_SIZE + 50):
            ours, theirs = exits.enter_context(pair())
            registration = Registration(ours.fileno())
            registration.read_ready = partial(called.append, number)
            selector.registrations[registration.fd] = registration
            selector.set_interest(registration, READ)
            theirs.send(b"x")
        assert selector.dispatch(raise_failure) == BATCH_SIZE + 50
    assert sorted(called) == list(range(BATCH_SIZE + 50))


@pytest.mark.ours_only("about our pollers")
@pytest.mark.parametrize("poller", [name for name in POLLERS if name != "made here"])
@pytest.mark.parametrize("where", ["a task", "a callback"])
async def test_g1_data_comes_before_a_timer_over_every_poller(
    stack: Stack, poller: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever notices that a descriptor is ready has had the time to do so before a timer that is due runs."""
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
    """It is called again, as long as its descriptor is ready."""

    def fail() -> None:
        raise error

    called: list[int] = []
    with pair() as (a, b), pair() as (c, d):
        async with running(make) as (poller, owner):
            failing = watch_of(poller, a, fail)
            other = watch_of(poller, c, lambda: called.append(1))
            b.send(b"x")
            d.send(b"x")
            poller.set_interest(failing, READ)
            poller.set_interest(other, READ)
            await until(lambda: len(owner.failures) > 1 and len(called) > 1)
            poller.set_interest(failing, 0)
            poller.set_interest(other, 0)
    assert {(registration, type(exc)) for registration, exc in owner.failures} == {(failing, error)}


@pytest.mark.ours_only("about our pollers")
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
async def test_p6_input_does_not_end_a_writer_over_any_poller(
    anyio_backend: Any, poller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most systems tell a hang-up as input, and have to be asked which of the two it is."""
    monkeypatch.setattr(transports_anyio._core, "make_poller", POLLERS[poller])
    with pair() as (a, b):
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


async def test_a_number_that_belongs_to_somebody_else_by_now(make: Callable[[], Poller], anyio_backend: Any) -> None:
    """Somebody has closed a descriptor behind its owner's back, and the system has given its number away once more."""
    told: list[int] = []
    with pair() as (a, b):
        async with running(make) as (poller, _):
            first = watch_of(poller, a, lambda: told.append(1), lambda: told.append(1))
            poller.set_interest(first, READ)
            poller.set_interest(first, 0)
            second = watch_of(poller, a, lambda: told.append(2))
            poller.set_interest(second, READ)
            poller.unregister(first)
            b.send(b"x")
            await until(lambda: told)
            assert set(told) == {2}
            poller.unregister(second)


async def test_a_descriptor_closed_behind_our_back(anyio_backend: Any) -> None:
    """Whoever waits for it is told, and learns from its next call what has happened."""
    for make in (make_poller, waiting_poller, POLLERS["selector"]):
        told: list[int] = []
        with pair() as (a, _):
            async with running(make) as (poller, _):
                registration = watch_of(
                    poller, a, lambda told=told: told.append(READ), lambda told=told: told.append(WRITE)
                )
                poller.set_interest(registration, READ)
                a.close()
                assert told == []
                poller.set_interest(registration, READ | WRITE)
                await until(lambda told=told: {READ, WRITE} <= set(told))
                poller.unregister(registration)


class LeavingError(Exception):
    """What a block raises here."""


@pytest.mark.parametrize("poller", POLLERS)
@pytest.mark.parametrize("how", ["normally", "by an exception", "by a cancellation"])
@pytest.mark.parametrize("buffered", [False, True])
async def test_a_socket_closed_behind_our_back_breaks_no_ones_end(
    anyio_backend: Any, poller: str, how: str, buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own connection ends as well as it can; all the others end as they would have, and so does the block."""
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
                    # Leaving normally flushes what waits, which nobody reads of the others.
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
    assert [protocol.lost_with for protocol in (protocols[0], *protocols[2:])] == [None] * 3


@pytest.mark.parametrize("poller", POLLERS)
def test_an_interrupt_in_a_callback_with_full_buffers(
    anyio_backend: Any, poller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more turns are taken, and the connections still let go of what they wait for, one direction at a time."""
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
    assert [protocol.lost_with for protocol in protocols] == [None] * 3
