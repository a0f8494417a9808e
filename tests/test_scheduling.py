"""Scheduling: `call_soon`, timers, threads, tasks, and the exception handler."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import operator
import os
import random
import select
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from types import FrameType
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from network import needs_pipes, needs_selector, needs_signals
from support import (
    GUARD,
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    connected,
    fill,
    leaves,
    raises_inside,
    turns,
    until,
)

from transports_anyio import DatagramProtocol, SubprocessProtocol, TransportGroup, current_group
from transports_anyio._core import Core
from transports_anyio._handles import Handle
from transports_anyio._scheduler import MAX_SERVED
from transports_anyio._selector import BATCH_SIZE

pytestmark = pytest.mark.anyio

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def scheduler(group: Any, name: str) -> Callable[..., Any]:
    """Return `call_soon` or a similar method, with the time filled in."""
    if name == "call_later":
        return lambda callback, *args, **options: group.call_later(0.01, callback, *args, **options)
    if name == "call_at":
        return lambda callback, *args, **options: group.call_at(group.time() + 0.01, callback, *args, **options)
    method: Callable[..., Any] = getattr(group, name)
    return method


every_scheduler = pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])


# -- order ------------------------------------------------------------------------------------------------


@every_scheduler
async def test_callbacks_get_their_arguments_and_run_later(stack: Stack, name: str) -> None:
    calls: list[Any] = []
    async with stack.open() as group:
        scheduler(group, name)(lambda *args: calls.append(args), 1, "two")
        assert calls == []
        await until(lambda: calls)
    assert calls == [(1, "two")]


async def test_first_in_first_out(stack: Stack) -> None:
    order: list[int] = []
    async with stack.open() as group:
        for number in range(200):
            (group.call_soon if number % 3 else group.call_soon_threadsafe)(order.append, number)
        await until(lambda: len(order) == 200)
    assert order == list(range(200))


async def test_a_callback_scheduled_by_a_callback_runs_in_the_next_iteration(stack: Stack) -> None:
    order: list[str] = []
    async with stack.open() as group:

        def first() -> None:
            order.append("first")
            group.call_soon(order.append, "third")

        group.call_soon(first)
        group.call_soon(order.append, "second")
        await until(lambda: len(order) == 3)
    assert order == ["first", "second", "third"]


async def test_a_callback_that_schedules_itself_does_not_starve_connections(stack: Stack) -> None:
    iterations = 0
    async with stack.open() as group, connected(group) as (_, protocol, peer):

        def again() -> None:
            nonlocal iterations
            iterations += 1
            if not protocol.received:
                group.call_soon(again)

        again()
        await peer.send(b"let me in")
        await protocol.wait_received(9)
    assert iterations > 0


def wait_for_input(transport: Any) -> None:
    """Block until data has arrived that the transport has not received yet."""
    assert select.select([transport.get_extra_info("socket").fileno()], [], [], GUARD)[0]


#: How long the callbacks of a flood take, in seconds: long enough for one of them to fill an iteration.
SLOW = 0.004


async def served_for_each_step_of_a_task(served: list[int]) -> float:
    """Return how many callbacks run between two steps of a task, on average."""
    await until(lambda: served)
    before = len(served)
    await turns(5)
    return (len(served) - before) / 5


@pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
async def test_a_flood_whose_callbacks_are_slow_does_not_keep_tasks_waiting(stack: Stack, kind: Any) -> None:
    """An iteration is limited in time, not only in the number of events: each message brings the next one.

    This counts, and measures nothing: on a loaded machine callbacks are slower still.
    """
    served: list[int] = []
    stop = False

    def received(*_: Any) -> None:
        served.append(1)
        time.sleep(SLOW)
        if not stop:
            peer.socket.send(b"x")

    hook = "on_data_received" if kind is Recorder else "on_buffer_updated"
    async with stack.open() as group, connected(group, kind(**{hook: received})) as (_, _, peer):
        await peer.send(b"x")
        count = await served_for_each_step_of_a_task(served)
        stop = True
    assert count <= 4


async def test_a_flood_of_connections_that_are_slow_to_make_does_not_keep_tasks_waiting(stack: Stack) -> None:
    """Tasks run after the connections that wait to be accepted; each connection brings the next one."""
    served: list[int] = []
    clients: list[Peer] = []
    stop = False

    def made(protocol: Any, transport: Any) -> None:
        served.append(1)
        time.sleep(SLOW / 4)
        transport.abort()
        if not stop:
            clients.pop().close()
            clients.append(Peer.connect(address))

    async with stack.open() as group:
        server = await group.create_server(lambda: Recorder(on_connection_made=made), HOST, 0, backlog=8)
        address = server.sockets[0].getsockname()
        clients.append(Peer.connect(address))
        count = await served_for_each_step_of_a_task(served)
        stop = True
        await turns()
        clients.pop().close()
    assert count <= 4 * 8


@pytest.mark.parametrize("reason", ["messages", "call_soon_threadsafe", "timers", "call_soon", "tasks"])
async def test_iterations_do_not_multiply(stack: Stack, reason: str) -> None:
    """While there is always something to do, other requests for an iteration do not add one.

    A callback that schedules itself runs once in an iteration, and a checkpoint takes one iteration of the backend.
    """
    count = 0
    stop = False

    def again() -> None:
        nonlocal count
        count += 1
        if not stop:
            group.call_soon(again)

    echo = Recorder(on_data_received=lambda self, data: self.transport.write(data))
    async with stack.open() as group, connected(group, echo) as (_, _, peer):
        again()
        for _ in range(100):
            if reason == "messages":
                await peer.send(b"x")
                await peer.receive_exactly(1)
            elif reason == "timers":
                group.call_later(0, str)
                group.call_later(3600, str).cancel()
            elif reason == "tasks":
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.sleep, 0)
            else:
                getattr(group, reason)(str)
            await anyio.lowlevel.checkpoint()
        await turns()
        before = count
        await turns(100)
        stop = True
        assert 1 <= count - before <= 300


@needs_selector
async def test_iterations_do_not_multiply_while_a_descriptor_is_always_ready(anyio_backend: Any) -> None:
    """The system does not watch such a device, so the next iteration begins at once, without a wait."""
    async with TransportGroup() as group:
        transport, protocol = await group.connect_read_pipe(Recorder, open("/dev/zero", "rb", 0))
        await protocol.wait_for("data_received")
        transport.pause_reading()
        for _ in range(100):
            group.call_soon_threadsafe(str)
            transport.resume_reading()
            await anyio.lowlevel.checkpoint()
            transport.pause_reading()
        transport.resume_reading()
        await turns()
        before = protocol.count("data_received")
        await turns(20)
        transport.abort()  # type: ignore[attr-defined]
        assert 1 <= protocol.count("data_received") - before <= 60


@needs_selector
async def test_closed_but_inherited_listener_does_not_spin(anyio_backend: Any) -> None:
    """A forked child has the copy, for example. The system still listens, and reports clients that nothing accepts."""
    async with CountingGroup() as group:
        server = await group.create_server(Recorder, HOST, 0)
        listener = server.sockets[0]
        address = listener.getsockname()
        with socket.socket(fileno=os.dup(listener.fileno())):
            server.close()
            with Peer.connect(address):
                await turns()
                group.iterations = 0
                await turns(20)
                assert group.iterations <= 1


async def test_scheduled_callbacks_run_before_input_that_waits(stack: Stack) -> None:
    order: list[str] = []
    protocol = Recorder(on_data_received=lambda *_: order.append("input"))
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        transport.pause_reading()
        await peer.send(b"input")
        wait_for_input(transport)
        transport.resume_reading()
        group.call_soon(order.append, "scheduled")
        await until(lambda: len(order) == 2)
    assert order == ["scheduled", "input"]


@needs_selector
async def test_a_due_timer_runs_before_callbacks_that_input_schedules(stack: Stack) -> None:
    order: list[str] = []

    def on_data(*_: object) -> None:
        order.append("input")
        group.call_soon(order.append, "scheduled")

    protocol = Recorder(on_data_received=on_data)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        transport.pause_reading()
        await peer.send(b"input")
        # Nothing else runs until both are due.
        transport.resume_reading()
        group.call_at(group.time(), order.append, "timer")
        wait_for_input(transport)
        await until(lambda: len(order) == 3)
    assert order == ["input", "timer", "scheduled"]


#: More than the first call of epoll asks for.
MANY = BATCH_SIZE + 50

#: How long the program is held up, and after what part of it the time-outs fall due, in seconds.
STALL = 0.1
TIME_OUT = 0.03


class Impatient(asyncio.Protocol, DatagramProtocol):
    """Closes after a time-out, unless data arrives first."""

    timer: Any = None

    def __init__(self, group: Any, outcomes: list[str], on_data: Callable[[], object] = lambda: None) -> None:
        self.group = group
        self.outcomes = outcomes
        self.on_data = on_data

    def arm(self) -> None:
        self.timer = self.group.call_later(TIME_OUT, self.outcomes.append, "timed out")

    def data_received(self, data: bytes) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.outcomes.append("received")
        self.on_data()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.data_received(data)


async def connect_tcp(group: Any, factory: Any, exits: AsyncExitStack) -> Callable[[bytes], object]:
    """Make a connection, and return a function that sends to it at once, like the functions below."""
    _, _, peer = await exits.enter_async_context(connected(group, factory()))
    return peer.socket.send


async def connect_unix(group: Any, factory: Any, exits: AsyncExitStack) -> Callable[[bytes], object]:
    ours, theirs = socket.socketpair()
    exits.enter_context(theirs)
    await group.connect_accepted_socket(factory, ours)
    return theirs.send


async def connect_udp(group: Any, factory: Any, exits: AsyncExitStack) -> Callable[[bytes], object]:
    transport, _ = await group.create_datagram_endpoint(factory, local_addr=(HOST, 0))
    exits.callback(transport.close)
    sender = exits.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender.connect(transport.get_extra_info("sockname"))
    return sender.send


async def connect_pipe(group: Any, factory: Any, exits: AsyncExitStack) -> Callable[[bytes], object]:
    reader, writer = os.pipe()
    exits.callback(os.close, writer)
    await group.connect_read_pipe(factory, open(reader, "rb", 0))
    return lambda data: os.write(writer, data)


async def connect_anyio_stream(group: Any, factory: Any, exits: AsyncExitStack) -> Callable[[bytes], object]:
    listener = exits.enter_context(socket.create_server((HOST, 0)))
    stream = await anyio.connect_tcp(*listener.getsockname())
    peer = exits.enter_context(listener.accept()[0])
    await group.connect_stream(factory, stream)
    await turns()  # Its task receives.
    return peer.send


async def connect_anyio_socket(group: Any, factory: Any, exits: AsyncExitStack) -> Callable[[bytes], object]:
    sock = await anyio.create_udp_socket(family=socket.AF_INET, local_host=HOST)
    await group.connect_datagram_socket(factory, sock)
    sender = exits.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender.connect(sock.extra(anyio.abc.SocketAttribute.local_address))
    await turns()
    return sender.send


CONNECTIONS = {
    "tcp": connect_tcp,
    "unix": connect_unix,
    "udp": connect_udp,
    "pipe": connect_pipe,
    "anyio stream": connect_anyio_stream,
    "anyio datagram socket": connect_anyio_socket,
}

every_connection = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_pipes) if kind == "pipe" else kind for kind in CONNECTIONS]
)


@pytest.mark.parametrize("held_up_in", ["a task", "a callback"])
@every_connection
async def test_g1_data_that_has_arrived_comes_before_a_timer(stack: Stack, kind: str, held_up_in: str) -> None:
    if stack.is_oracle and kind.startswith("anyio"):
        pytest.skip("asyncio has no such thing")
    outcomes: list[str] = []
    async with stack.open() as group, AsyncExitStack() as exits:
        protocol = Impatient(group, outcomes)
        send = await CONNECTIONS[kind](group, lambda: protocol, exits)

        def hold_up() -> None:
            protocol.arm()
            send(b"in time")
            time.sleep(STALL)

        (hold_up if held_up_in == "a task" else partial(group.call_soon, hold_up))()
        await until(lambda: outcomes)
        await anyio.sleep(TIME_OUT)
    assert outcomes == ["received"]


async def test_g1_data_of_many_connections_comes_before_their_timers(stack: Stack) -> None:
    """The program is stopped for a while, by a slow callback, a signal, or a computer that sleeps."""
    outcomes: list[str] = []
    made: list[Impatient] = []

    def factory() -> Impatient:
        made.append(Impatient(group, outcomes))
        return made[-1]

    async with stack.open() as group, AsyncExitStack() as exits:
        sends = [await connect_unix(group, factory, exits) for _ in range(MANY)]
        for protocol in made:
            protocol.arm()
        for send in sends:
            send(b"in time")
        time.sleep(STALL)  # noqa: ASYNC251  # nothing else runs
        await until(lambda: len(outcomes) >= MANY)
    assert outcomes == ["received"] * MANY


async def test_g1_a_slow_callback_of_a_connection_lets_no_timer_overtake_the_others(stack: Stack) -> None:
    """Data that arrived while it ran is received before timers that fell due are run."""
    outcomes: list[str] = []

    def hold_up() -> None:
        for protocol in protocols:
            protocol.arm()
        for send in sends:
            send(b"in time")
        time.sleep(STALL)

    async with stack.open() as group, AsyncExitStack() as exits:
        slow = await connect_unix(group, lambda: Impatient(group, outcomes, hold_up), exits)
        protocols = [Impatient(group, outcomes) for _ in range(3)]
        sends = [await connect_unix(group, lambda each=each: each, exits) for each in protocols]
        slow(b"now")
        await until(lambda: len(outcomes) >= 4)
    assert outcomes == ["received"] * 4


@every_connection
async def test_g1_a_flood_does_not_keep_a_timer_from_running(stack: Stack, kind: str) -> None:
    """Each message brings the next one."""
    if stack.is_oracle and kind.startswith("anyio"):
        pytest.skip("asyncio has no such thing")
    outcomes: list[str] = []
    fired: list[int] = []
    async with stack.open() as group, AsyncExitStack() as exits:

        def again() -> None:
            if not fired:
                send(b"more")

        send = await CONNECTIONS[kind](group, lambda: Impatient(group, outcomes, again), exits)
        group.call_later(0.02, fired.append, 1)
        send(b"first")
        await until(lambda: fired)
    assert "received" in outcomes


async def test_timers_run_by_time(stack: Stack) -> None:
    order: list[int] = []
    async with stack.open() as group:
        now = group.time()
        for number in (3, 1, 4, 0, 2):
            group.call_at(now + number / 200, order.append, number)
        await until(lambda: len(order) == 5)
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.differs(
    "timers that are due at the same time",
    asyncio="in any order",
    here="in the order in which they were made",
    why="the order that one expects",
)
@pytest.mark.ours_only
async def test_timers_of_the_same_time_run_in_the_order_in_which_they_were_made(stack: Stack) -> None:
    order: list[int] = []
    async with stack.open() as group:
        when = group.time() + 0.01
        for number in range(100):
            group.call_at(when, order.append, number)
        await until(lambda: len(order) == 100)
    assert order == list(range(100))


@pytest.mark.parametrize("delay", [0, -1])
async def test_a_time_that_has_passed_is_due_at_once(stack: Stack, delay: float) -> None:
    calls: list[int] = []
    async with stack.open() as group:
        group.call_later(delay, calls.append, 1)
        assert calls == []
        await until(lambda: calls)


async def test_a_timer_never_fires_early(stack: Stack) -> None:
    fired: list[float] = []
    async with stack.open() as group:
        when = group.time() + 0.03
        group.call_at(when, lambda: fired.append(group.time()))
        await until(lambda: fired)
    # asyncio counts what is due within the resolution of its clock as due.
    assert fired[0] >= when - 1e-6


async def test_a_timer_that_comes_first_ends_the_wait_for_a_later_one(stack: Stack) -> None:
    order: list[str] = []
    async with stack.open() as group:
        late = group.call_later(3600, order.append, "late")
        await anyio.sleep(0.01)  # the group waits for the late one now
        group.call_later(0.01, order.append, "early")
        await until(lambda: order)
        late.cancel()
    assert order == ["early"]


async def test_the_clock_is_the_backends(stack: Stack) -> None:
    async with stack.open() as group:
        before = anyio.current_time()
        now = group.time()
        assert before <= now <= anyio.current_time()


# -- handles ----------------------------------------------------------------------------------------------


@every_scheduler
async def test_a_cancelled_callback_does_not_run(stack: Stack, name: str) -> None:
    calls: list[str] = []
    async with stack.open() as group:
        handle = scheduler(group, name)(calls.append, "cancelled")
        assert not handle.cancelled()
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
        scheduler(group, name)(calls.append, "last")
        await until(lambda: calls)
    assert calls == ["last"]


async def test_repr_of_handles(stack: Stack) -> None:
    def callback(*args: object) -> None: ...

    async with stack.open() as group:
        handle = group.call_soon(callback, 1)
        timer = group.call_later(3600, callback, 2)
        assert "callback" in repr(handle)
        assert "callback" in repr(timer)
        assert "when=" in repr(timer)
        timer.cancel()
        handle.cancel()
        assert "cancelled" in repr(handle)
        assert "cancelled" in repr(timer)


async def test_when_returns_the_time_of_a_timer(stack: Stack) -> None:
    async with stack.open() as group:
        when = group.time() + 3600
        timer = group.call_at(when, print)
        assert timer.when() == when
        timer.cancel()
        assert timer.when() == when
        before = group.time()
        timer = group.call_later(3600, print)
        assert before + 3600 <= timer.when() <= group.time() + 3600
        timer.cancel()


async def test_g7_timers_compare_as_asyncios(stack: Stack) -> None:
    """They are ordered by time, and equal if time, callback and arguments are."""
    calls: list[int] = []
    async with stack.open() as group:
        when = group.time() + 3600
        first = group.call_at(when, calls.append, 1)
        same = group.call_at(when, calls.append, 1)
        another = group.call_at(when, calls.append, 2)
        later = group.call_at(when + 1, calls.append, 1)
        soon = group.call_soon(calls.append, 1)
        assert first == same
        assert hash(first) == hash(same) == hash(when)
        assert first != another
        assert first != later
        assert first != soon
        assert first != when
        assert not first < another
        assert not first <= another
        assert first <= same
        assert first >= same
        assert first < later <= later
        assert later > first
        assert later >= same
        assert max(later, first) is later
        assert sorted([later, first]) == [first, later]
        assert len({first, same, another, later}) == 3
        for compare in (operator.lt, operator.le, operator.gt, operator.ge):
            with pytest.raises(TypeError):
                compare(first, when)
        same.cancel()
        assert first != same
        first.cancel()
        assert first == same
        for handle in (another, later):
            handle.cancel()


async def test_cancelling_a_timer_after_it_ran_is_harmless(stack: Stack) -> None:
    calls: list[int] = []
    async with stack.open() as group:
        timers = [group.call_later(0, calls.append, number) for number in range(3)]
        await until(lambda: len(calls) == 3)
        for timer in timers:
            timer.cancel()
        group.call_later(0, calls.append, 3)
        await until(lambda: len(calls) == 4)


async def test_cancelling_releases_the_callback_and_its_arguments(stack: Stack) -> None:
    class Thing: ...

    async with stack.open() as group:
        thing = Thing()
        reference = weakref.ref(thing)
        timer = group.call_later(3600, print, thing)
        del thing
        timer.cancel()
        gc.collect()
        assert reference() is None


async def test_a_hundred_thousand_timers(stack: Stack) -> None:
    fired: list[int] = []
    async with stack.open() as group:
        far = group.time() + 3600
        timers = [group.call_at(far + (number * 7919) % 100_000, fired.append, number) for number in range(100_000)]
        group.call_later(0, fired.append, -1)
        await until(lambda: fired)
        for timer in timers:
            timer.cancel()
        group.call_later(0, fired.append, -2)
        await until(lambda: len(fired) == 2)
    assert fired == [-1, -2]


async def test_rearming_a_timer_frees_the_cancelled_ones(stack: Stack) -> None:
    class Thing: ...

    alive: weakref.WeakSet[Thing] = weakref.WeakSet()

    def callback(_: Thing) -> None: ...

    async with stack.open() as group:
        timer = group.call_later(3600, print)
        for _ in range(5000):
            timer.cancel()
            thing = Thing()
            alive.add(thing)
            timer = group.call_later(3600, callback, thing)
        del thing
        gc.collect()
        assert len(alive) == 1
        timer.cancel()


async def test_remaining_timers_run_in_order_after_many_were_cancelled(stack: Stack) -> None:
    order: list[int] = []
    async with stack.open() as group:
        now = group.time()
        # In no order, and cancelled in another one.
        timers = {number: group.call_at(now + number / 20_000, order.append, number) for number in scattered(600)}
        kept = range(0, 600, 4)
        for number in reversed(scattered(600)):
            if number not in kept:
                timers[number].cancel()
        await until(lambda: len(order) == len(kept))
    assert order == list(kept)


def scattered(size: int) -> list[int]:
    """Return the numbers below `size`, which 7 must not divide, in mixed order."""
    return [number * 7 % size for number in range(size)]


async def test_rearming_a_timer_later_than_another_frees_the_cancelled_ones(stack: Stack) -> None:
    """The cancelled ones never become the first timer while the other one is pending."""
    async with stack.open() as group:
        first = group.call_later(1800, print)
        gc.collect()
        before = len(gc.get_objects())
        for number in range(20_000):
            group.call_later(3600, print).cancel()
            if not number % 100:
                await anyio.lowlevel.checkpoint()  # asyncio removes cancelled timers in its iterations.
        gc.collect()
        assert len(gc.get_objects()) - before < 2000
        first.cancel()


class CountingCore(Core):
    def run_once(self) -> float:
        self.group.iterations += 1  # type: ignore[attr-defined]
        return super().run_once()


class CountingGroup(TransportGroup):
    """A group that counts its iterations."""

    iterations = 0

    def __init__(self) -> None:
        super().__init__()
        self._core = CountingCore(self)


@pytest.mark.parametrize("where", ["a callback", "a task"])
@needs_selector
async def test_a_cancelled_timer_costs_no_wake_up(anyio_backend: Any, where: str) -> None:
    """It was cancelled in an iteration, or while the group was waiting for it."""
    timers: list[Any] = []
    fired: list[int] = []

    def arm() -> None:
        timers.extend(group.call_later(0.001 * number, fired.append, 0) for number in range(1, 40))

    def cancel() -> None:
        for timer in timers:
            timer.cancel()

    async with CountingGroup() as group:
        await turns()
        group.call_later(0.2, fired.append, 1)
        await turns()
        if where == "a callback":
            group.call_soon(lambda: (arm(), cancel()))
            await until(lambda: timers)
        else:
            arm()
            cancel()
        group.iterations = 0
        await until(lambda: fired)
        assert group.iterations <= 1  # For the last timer.
    assert fired == [1]


@needs_selector
async def test_a_timer_that_was_waited_for_and_is_cancelled_costs_no_wake_up(anyio_backend: Any) -> None:
    fired: list[int] = []
    async with CountingGroup() as group:
        timer = group.call_later(0.05, print)
        await turns()  # The group waits for it.
        timer.cancel()
        await turns()
        group.iterations = 0
        group.call_later(0.2, fired.append, 1)
        await until(lambda: fired)
        assert group.iterations <= 1


async def test_a_task_that_rearms_a_time_out_causes_no_iterations(anyio_backend: Any) -> None:
    async with CountingGroup() as group:
        timer = group.call_later(3600, print)
        await turns()
        group.iterations = 0
        for _ in range(100):
            timer.cancel()
            timer = group.call_later(3600, print)
            await anyio.lowlevel.checkpoint()
        await turns()
        assert group.iterations == 0
        timer.cancel()


@needs_selector
async def test_a_time_between_the_ticks_of_the_loops_clock_causes_one_iteration(anyio_backend: Any) -> None:
    """uvloop counts in milliseconds, rounded."""
    fired: list[float] = []
    async with CountingGroup() as group:
        await turns()
        group.iterations = 0
        for number in range(1, 31):
            when = group.time() + 0.002 + number * 0.00013
            group.call_at(when, lambda when=when: fired.append(group.time() - when))
            await until(lambda number=number: len(fired) == number)  # type: ignore[misc]
        # The first one may wake a group that waits without a deadline.
        assert group.iterations <= 2 * 30
        assert min(fired) >= -1e-6


# -- moving timers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reschedule", "reschedule_at"])
@pytest.mark.parametrize(("before", "after"), [(0.2, 0.25), (3600, 0.06), (0.06, 0.06)])
async def test_a_moved_timer_runs_once_at_its_new_time(
    anyio_backend: Any, before: float, after: float, method: str
) -> None:
    fired: list[float] = []
    async with TransportGroup() as group:
        timer = group.call_later(before, lambda: fired.append(group.time()))
        await turns()  # The group waits for it.
        now = group.time()
        if method == "reschedule":
            timer.reschedule(after)
            assert now + after <= timer.when() <= group.time() + after
        else:
            timer.reschedule_at(now + after)
            assert timer.when() == now + after
        assert not timer.cancelled()
        assert group.statistics().pending_timers == 1
        await until(lambda: fired)
        await anyio.sleep(0.01)
        assert group.statistics().pending_timers == 0
    assert len(fired) == 1
    assert fired[0] >= timer.when() - 1e-6


async def test_timers_that_are_moved_at_random_run_in_the_order_of_their_times(anyio_backend: Any) -> None:
    """As if each were cancelled and made again: those of the same time in the order of the last moves."""
    choose = random.Random(5)
    order: list[int] = []
    expected: dict[int, tuple[float, int]] = {}
    async with TransportGroup() as group:
        now = group.time()
        timers = {}
        for step in range(3000):
            number = choose.randrange(200)
            when = now + choose.randrange(100, 120) / 1000
            if number not in expected:
                timers[number] = group.call_at(when, order.append, number)
                expected[number] = when, step
            elif choose.random() < 0.2:
                timers.pop(number).cancel()
                del expected[number]
            else:
                timers[number].reschedule_at(when)
                expected[number] = when, step
            assert group.statistics().pending_timers == len(expected)
        assert all(timers[number].when() == when for number, (when, _) in expected.items())
        await until(lambda: len(order) == len(expected))
        assert group.statistics().pending_timers == 0
    assert order == sorted(expected, key=expected.__getitem__)


@pytest.mark.parametrize("later", [True, False])
async def test_a_timer_that_is_moved_to_the_time_of_others_runs_after_them(anyio_backend: Any, later: bool) -> None:
    order: list[str] = []
    async with TransportGroup() as group:
        when = group.time() + 0.02
        moved = group.call_at(when - 0.01 if later else when + 10, order.append, "moved")
        same = group.call_at(when, order.append, "moved to the same time")
        group.call_at(when, order.append, "made")
        moved.reschedule_at(when)
        same.reschedule_at(when)
        await until(lambda: len(order) == 3)
    assert order == ["made", "moved", "moved to the same time"]


async def test_a_callback_may_move_and_cancel_timers_that_are_due_with_it(anyio_backend: Any) -> None:
    order: list[str] = []
    async with TransportGroup() as group:

        def first() -> None:
            order.append("first")
            later.reschedule(0.02)
            at_once.reschedule_at(now)
            cancelled.cancel()
            with pytest.raises(RuntimeError, match="was cancelled"):
                cancelled.reschedule(1)

        now = group.time()
        group.call_at(now, first)
        later = group.call_at(now, order.append, "later")
        at_once = group.call_at(now, order.append, "at once")
        cancelled = group.call_at(now, order.append, "cancelled")
        group.call_at(now, order.append, "last")
        await until(lambda: "later" in order)
        await anyio.sleep(0.01)
        assert group.statistics().pending_timers == 0
    assert order == ["first", "last", "at once", "later"]


@pytest.mark.leaves_timers
async def test_a_timer_that_is_not_pending_cannot_be_moved(anyio_backend: Any) -> None:
    raised: list[str] = []

    def callback() -> None:
        with pytest.raises(RuntimeError) as caught:
            timers[0].reschedule(1)
        raised.append(str(caught.value))

    async with TransportGroup() as group:
        timers = [group.call_later(0, callback)]
        await until(lambda: raised)
        assert "has run" in raised[0]
        with pytest.raises(RuntimeError, match="has run"):
            timers[0].reschedule(1)
        cancelled = group.call_later(3600, print)
        cancelled.cancel()
        for move in (cancelled.reschedule, cancelled.reschedule_at):
            with pytest.raises(RuntimeError, match="was cancelled"):
                move(1)
        pending = group.call_later(3600, print)
        when = pending.when()
        for wrong, error in (("soon", TypeError), (None, TypeError), (float("nan"), ValueError)):
            for wrong_move in (pending.reschedule, pending.reschedule_at):
                with pytest.raises(error):
                    wrong_move(wrong)  # type: ignore[arg-type]
                assert pending.when() == when
        assert group.statistics().pending_timers == 1
    with pytest.raises(RuntimeError, match="group has ended"):
        pending.reschedule(1)


async def test_a_timer_can_be_moved_to_infinity_and_back(anyio_backend: Any) -> None:
    fired: list[int] = []
    async with TransportGroup() as group:
        timer = group.call_later(0.3, fired.append, 1)
        await turns()
        timer.reschedule(float("inf"))
        assert timer.when() == float("inf")
        await anyio.sleep(0.4)
        assert fired == []
        timer.reschedule(0.01)
        await until(lambda: fired)


@needs_selector
async def test_a_moved_time_out_costs_no_iterations(anyio_backend: Any) -> None:
    """Neither the moves, nor the time that the group waited for before, nor what is left of earlier times."""
    fired: list[int] = []
    async with CountingGroup() as group:
        timer = group.call_later(0.4, fired.append, 1)
        others = [group.call_later(0.3 + 0.01 * number, print) for number in range(30)]
        await turns()  # The group waits for the first one.
        group.iterations = 0
        for other in others:
            other.reschedule(3600)
        until_then = group.time() + 0.7
        while group.time() < until_then:
            timer.reschedule(0.5)
            await anyio.sleep(0.005)
        assert group.iterations == 0
        assert not fired
        await until(lambda: fired)
        assert group.iterations <= 1
        for other in others:
            other.cancel()


async def test_timers_that_are_moved_earlier_again_and_again_leave_nothing(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        first = group.call_later(1800, print)
        timer = group.call_later(3600, print)
        gc.collect()
        before = len(gc.get_objects())
        for number in range(20_000):
            timer.reschedule(3600 if number % 2 else 2400)
        gc.collect()
        assert len(gc.get_objects()) - before < 2000
        assert group.statistics().pending_timers == 2
        first.cancel()
        timer.cancel()
        assert group.statistics().pending_timers == 0


@pytest.mark.leaves_timers
async def test_a_moved_timer_is_compared_by_its_new_time(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        when = group.time() + 3600
        moved, other = group.call_at(when, print), group.call_at(when + 2, print)
        assert moved < other
        moved.reschedule_at(when + 2)
        assert moved == other
        assert hash(moved) == hash(other)
        moved.reschedule_at(when + 3)
        assert moved > other


# -- bad calls --------------------------------------------------------------------------------------------


@pytest.mark.differs(
    "a callback that cannot be called, given to `call_soon` or a timer",
    asyncio="an error in debug mode only",
    here="`TypeError` at the call",
    why="the traceback shows the line with the mistake",
)
@pytest.mark.ours_only
@every_scheduler
async def test_something_that_cannot_be_called_is_refused_at_the_call(stack: Stack, name: str) -> None:
    async with stack.open() as group:
        with pytest.raises(TypeError, match="callable"):
            scheduler(group, name)("not a function")


@pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at", "start_soon"])
async def test_a_group_that_is_not_open_takes_no_callbacks(anyio_backend: Any, name: str) -> None:
    def use(group: TransportGroup) -> None:
        if name == "start_soon":
            group.start_soon(anyio.sleep, 0)
        else:
            scheduler(group, name)(print)

    group = TransportGroup()
    with pytest.raises(RuntimeError, match="not open"):
        use(group)
    async with group:
        pass
    with pytest.raises(RuntimeError, match="not open"):
        use(group)


@pytest.mark.parametrize("name", ["call_later", "call_at"])
async def test_missing_time_is_refused_at_the_call(stack: Stack, name: str) -> None:
    async with stack.open() as group:
        with pytest.raises(TypeError):
            getattr(group, name)(None, print)


@pytest.mark.differs(
    'an invalid time (`"soon"`, `nan`), given to a timer',
    asyncio="the event loop fails, or spins, later",
    here="`TypeError` or `ValueError` at the call",
    why="the traceback shows the line with the mistake",
)
@pytest.mark.ours_only
@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("soon", TypeError),
        (float("nan"), ValueError),
        # Numbers that can be compared with times, and never added to one.
        pytest.param(10**400, OverflowError, id="10**400"),
        pytest.param(-(10**400), OverflowError, id="-10**400"),
    ],
)
@pytest.mark.parametrize("name", ["call_later", "call_at"])
async def test_invalid_time_is_refused_at_the_call(stack: Stack, name: str, when: Any, error: type[Exception]) -> None:
    calls: list[int] = []
    async with stack.open() as group:
        for _ in range(2):  # With and without others to compare with.
            with pytest.raises(error):
                getattr(group, name)(when, print)
            group.call_later(0, calls.append, 1)
        await until(lambda: len(calls) == 2)


@pytest.mark.parametrize("when", [float("inf"), 1e300, 10**12])
@pytest.mark.leaves_timers
async def test_a_time_that_never_comes(anyio_backend: Any, when: float) -> None:
    calls: list[str] = []
    async with TransportGroup() as group:
        group.call_later(when, calls.append, "never")
        await turns()
        group.call_later(0.01, calls.append, "soon")
        await until(lambda: calls)
    assert calls == ["soon"]


async def test_start_soon_refuses_what_is_not_an_async_function(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        coroutine = anyio.lowlevel.checkpoint()
        with pytest.raises(TypeError, match=r"start_soon\(\) takes an async function"):
            group.start_soon(coroutine)  # type: ignore[arg-type]
        coroutine.close()
        assert group.statistics().running_tasks == 0


@pytest.mark.differs("a task that is ready to run, for example because a callback has set its event")
@pytest.mark.parametrize("in_a_scheduled_turn", [False, True])
async def test_a_new_task_has_its_first_turn_before_more_data_is_received(
    stack: Stack, in_a_scheduled_turn: bool
) -> None:
    """It may call `start_tls`, and then the data belongs to the handshake."""
    order: list[str] = []
    started: list[Any] = []

    async def task() -> None:
        order.append("task")

    def received(protocol: Any, data: bytes) -> None:
        order.append("data")
        if stack.is_oracle:
            started.append(asyncio.get_running_loop().create_task(task()))
        else:
            group.start_soon(task)
        if in_a_scheduled_turn:
            group.call_soon(order.count, "nothing")
        if order.count("data") < 50:
            peer.socket.send(b"more")  # It has arrived when this returns.

    async with stack.open() as group, connected(group, Recorder(on_data_received=received)) as (_, _, peer):
        await peer.send(b"first")
        await until(lambda: order.count("task") == 50)
    assert order == ["data", "task"] * 50


@pytest.mark.differs(
    "a task that is ready to run, for example because a callback has set its event",
    asyncio="runs before anything more is received",
    here=(
        "may run some 100 messages, or two milliseconds, later; a task that `start_soon` starts makes its first "
        "step before that"
    ),
    why="one pass through the backend for each message would cost more than the message",
)
async def test_a_task_that_a_callback_wakes_has_its_turn_soon(stack: Stack) -> None:
    """On asyncio before anything more is received; here an iteration may receive more, within limits."""
    received = 0
    woken = anyio.Event()
    seen: list[int] = []

    def more(protocol: Any, data: bytes) -> None:
        nonlocal received
        received += 1
        woken.set()
        peer.socket.send(b"more")  # It has arrived when this returns.

    async with stack.open() as group, connected(group, Recorder(on_data_received=more)) as (transport, _, peer):
        await peer.send(b"first")
        for _ in range(20):
            woken = anyio.Event()
            before = received
            await woken.wait()
            seen.append(received - before)
        transport.abort()
    # A backend may run another iteration of the group before the task.
    assert max(seen) <= (1 if stack.is_oracle else 2 * MAX_SERVED), seen


async def test_a_task_started_by_connection_made_begins_before_data_is_received(stack: Stack) -> None:
    order: list[str] = []
    started: list[Any] = []

    async def task() -> None:
        order.append("task")

    def made(protocol: Any, transport: Any) -> None:
        if stack.is_oracle:
            started.append(asyncio.get_running_loop().create_task(task()))
        else:
            group.start_soon(task)

    async with stack.open() as group:
        for _ in range(30):
            ours, theirs = socket.socketpair()
            with theirs:
                theirs.send(b"is there already")
                protocol = Recorder(on_connection_made=made, on_data_received=lambda *_: order.append("data"))
                await group.create_connection(lambda protocol=protocol: protocol, sock=ours)
                await protocol.wait_for("data_received")
            await protocol.wait_for("connection_lost")
    assert order == ["task", "data"] * 30


class Nameless:
    def __str__(self) -> str:
        raise LookupError("it has no name")

    __repr__ = __str__


async def never(argument: object) -> None:
    pytest.fail("it was started")


def not_async(*_: object) -> str:
    return "done already"


#: The arguments of `start_soon`, and the error.
MISTAKES: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception]]] = {
    "a name that cannot be printed": ((never, 1), {"name": Nameless()}, LookupError),
    "a function that is not async": ((not_async,), {}, TypeError),
    "no argument": ((never,), {}, TypeError),
    "too many arguments": ((never, 1, 2), {}, TypeError),
}


@pytest.mark.parametrize("where", ["the block", "a callback"])
@pytest.mark.parametrize("mistake", MISTAKES)
async def test_start_soon_raises_for_wrong_arguments_at_the_call(anyio_backend: Any, mistake: str, where: str) -> None:
    """The task is not counted, so the block can be left; and no coroutine is left unawaited."""
    args, options, error = MISTAKES[mistake]
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            if where == "the block":
                with pytest.raises(error):
                    group.start_soon(*args, **options)
            else:
                group.call_soon(lambda: group.start_soon(*args, **options))
                await until(lambda: contexts)
                assert [type(context["exception"]) for context in contexts] == [error]
            assert group.statistics().running_tasks == 0
            # The group still works.
            done: list[int] = []
            group.call_soon(done.append, 1)
            await until(lambda: done)


# -- threads ----------------------------------------------------------------------------------------------


async def test_a_thread_wakes_a_group_whose_tasks_all_wait(stack: Stack) -> None:
    """It does so more than once."""
    threads: list[int] = []
    async with stack.open() as group:
        for _ in range(3):
            done = anyio.Event()

            def callback(done: anyio.Event = done) -> None:
                threads.append(threading.get_ident())
                done.set()

            thread = threading.Thread(target=group.call_soon_threadsafe, args=[callback])
            with anyio.fail_after(GUARD):
                await anyio.sleep(0.02)
                thread.start()
                await done.wait()
            thread.join()
    assert threads == [threading.get_ident()] * 3


async def test_call_soon_threadsafe_in_a_row_causes_one_iteration(anyio_backend: Any) -> None:
    calls: list[int] = []
    async with CountingGroup() as group:
        await turns()
        group.iterations = 0
        for number in range(1000):
            group.call_soon_threadsafe(calls.append, number)
        await until(lambda: len(calls) == 1000)
        await turns()
        assert group.iterations <= 2
    assert calls == list(range(1000))


@pytest.mark.differs(
    "`cancel` of a handle of `call_soon_threadsafe`, in another thread",
    asyncio="until 3.14 returns at once, while the callback may still run",
    here="waits until the callback has ended, as 3.14 does",
    why="after `cancel`, the caller may free what the callback uses",
)
@pytest.mark.ours_only(before=(3, 14))
async def test_cancel_in_another_thread_waits_for_a_callback_that_runs(stack: Stack) -> None:
    begun = threading.Event()
    order: list[str] = []

    def callback() -> None:
        handle.cancel()  # In its own thread it does not wait.
        begun.set()
        time.sleep(0.05)  # Gives the other thread time to fail.
        order.append("ran")

    def cancel() -> None:
        begun.wait(GUARD)
        handle.cancel()
        order.append("cancelled")

    thread = threading.Thread(target=cancel)
    async with stack.open() as group:
        thread.start()
        handle = group.call_soon_threadsafe(callback)
        await until(lambda: len(order) == 2)
        thread.join()
        assert order == ["ran", "cancelled"]
        handle = group.call_soon_threadsafe(order.append, "never")
        thread = threading.Thread(target=handle.cancel)
        thread.start()
        thread.join()  # Before the group runs an iteration.
        await turns()
        assert handle.cancelled()
        assert len(order) == 2


async def test_many_threads_at_once(stack: Stack) -> None:
    calls: list[tuple[int, int]] = []
    async with stack.open() as group:

        def work(me: int) -> None:
            for number in range(500):
                group.call_soon_threadsafe(calls.append, (me, number))

        async with anyio.create_task_group() as tasks:
            for me in range(8):
                tasks.start_soon(anyio.to_thread.run_sync, work, me)
        await until(lambda: len(calls) == 8 * 500)
    for me in range(8):
        assert [number for who, number in calls if who == me] == list(range(500))


@pytest.mark.differs(
    "`call_soon_threadsafe` just before the group ends",
    asyncio="may never run",
    here="either runs before the block is left, or raises `RuntimeError` and never runs",
    why="nothing that was scheduled is lost, or runs twice",
)
async def test_what_a_thread_has_handed_over_runs_however_close_to_the_end(anyio_backend: Any) -> None:
    """If the call returns a handle, the callback runs; if it raises, the callback does not."""
    for _ in range(50):
        ran: list[int] = []
        accepted: list[int] = []
        running = threading.Event()

        def work(ran: list[int] = ran, accepted: list[int] = accepted, running: threading.Event = running) -> None:
            for number in range(1_000_000):
                try:
                    group.call_soon_threadsafe(ran.append, number)
                except RuntimeError:
                    return
                accepted.append(number)
                running.set()

        async with TransportGroup() as group:
            thread = threading.Thread(target=work)
            thread.start()
            running.wait(GUARD)
        thread.join()
        assert ran == accepted


@needs_signals
async def test_call_soon_threadsafe_in_a_signal_handler(anyio_backend: Any) -> None:
    """It runs in the group's own thread, possibly during another `call_soon_threadsafe`."""
    calls: list[str] = []
    async with TransportGroup() as group:
        before = signal.signal(signal.SIGALRM, lambda *_: group.call_soon_threadsafe(calls.append, "signal"))
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        try:
            while calls.count("signal") < 100:
                for _ in range(1000):
                    group.call_soon_threadsafe(calls.append, "task")
                await anyio.lowlevel.checkpoint()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert len(calls) - calls.count("signal") >= 1000


async def test_call_soon_threadsafe_after_the_end_raises(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        pass
    errors: list[BaseException] = []

    def work() -> None:
        try:
            group.call_soon_threadsafe(print)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (error,) = errors
    assert "not open" in str(error)


# -- contexts ---------------------------------------------------------------------------------------------


@every_scheduler
async def test_callbacks_run_in_the_context_of_the_call(stack: Stack, name: str) -> None:
    seen: list[str] = []
    async with stack.open() as group:
        variable.set("at the call")
        scheduler(group, name)(lambda: seen.append(variable.get()))
        variable.set("later")
        await until(lambda: seen)
    assert seen == ["at the call"]


@every_scheduler
async def test_a_context_can_be_given(stack: Stack, name: str) -> None:
    seen: list[str] = []
    context = contextvars.copy_context()
    context.run(variable.set, "given")

    def callback() -> None:
        seen.append(variable.get())
        variable.set("changed by the callback")

    async with stack.open() as group:
        scheduler(group, name)(callback, context=context)
        await until(lambda: seen)
    assert seen == ["given"]
    assert context[variable] == "changed by the callback"


def test_a_handle_that_is_cancelled_between_any_two_instructions() -> None:
    """By another thread, for example: the callback is called with its arguments, or not at all."""

    def called(instruction: int) -> list[object]:
        """Return the calls, if the handle is cancelled before this number of its own instructions has run."""
        calls: list[object] = []
        handle = Handle(lambda *args: calls.append(args), ("argument",), contextvars.copy_context())
        seen = 0

        def step(frame: FrameType, event: str, _: object) -> Any:
            nonlocal seen
            if frame.f_code is not Handle.__call__.__code__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if seen == instruction:
                    handle.cancel()
                seen += 1
            return step

        before = sys.gettrace()
        sys.settrace(step)
        try:
            handle()
        finally:
            sys.settrace(before)
        assert handle.cancelled() == (instruction < seen)
        return calls

    outcomes = [called(instruction) for instruction in range(100)]
    assert [] in outcomes
    assert [("argument",)] in outcomes
    assert all(outcome in ([], [("argument",)]) for outcome in outcomes)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio's handles have it since Python 3.12")
@every_scheduler
async def test_get_context_of_a_handle(stack: Stack, name: str) -> None:
    context = contextvars.copy_context()
    variable.set("the caller's")
    async with stack.open() as group:
        given = scheduler(group, name)(print, "given", context=context)
        copied = scheduler(group, name)(print, "copied")
        assert given.get_context() is context
        assert copied.get_context()[variable] == "the caller's"
        given.cancel()
        copied.cancel()


@every_scheduler
async def test_a_context_without_variables_can_be_given(stack: Stack, name: str) -> None:
    """It is empty, so it is false."""
    seen: list[str] = []
    variable.set("the caller's")
    async with stack.open() as group:
        scheduler(group, name)(lambda: seen.append(variable.get()), context=contextvars.Context())
        await until(lambda: seen)
    assert seen == ["unset"]


@pytest.mark.ours_only("asyncio has no group")
@every_scheduler
async def test_the_group_is_current_in_a_given_context(stack: Stack, name: str) -> None:
    """Only while the callback runs, even if the context is the caller's own."""
    seen: list[Any] = []
    context = contextvars.Context()
    context.run(variable.set, "given")
    async with stack.open() as group:
        context.run(lambda: scheduler(group, name)(lambda: seen.append(current_group()), context=context))
        await until(lambda: seen)
        with pytest.raises(RuntimeError, match="no transport group"):
            context.run(current_group)
    assert seen == [group]


async def test_callbacks_do_not_see_one_anothers_variables(stack: Stack) -> None:
    seen: list[str] = []
    variable.set("outside")
    async with stack.open() as group:
        for number in range(3):
            group.call_soon(lambda number: (seen.append(variable.get()), variable.set(str(number))), number)
        await until(lambda: len(seen) == 3)
    assert seen == ["outside"] * 3
    assert variable.get() == "outside"


# -- errors -----------------------------------------------------------------------------------------------


@every_scheduler
async def test_an_exception_is_reported_and_the_next_callback_runs(stack: Stack, name: str) -> None:
    calls: list[str] = []
    async with stack.open() as group:
        contexts = collect_contexts(group)

        def failing() -> None:
            raise ZeroDivisionError(name)

        handle = scheduler(group, name)(failing)
        scheduler(group, name)(calls.append, "next")
        await until(lambda: calls)
    (context,) = contexts
    assert isinstance(context["exception"], ZeroDivisionError)
    assert "failing" in context["message"]
    assert context["handle"] is handle


@every_scheduler
@pytest.mark.parametrize("given", [False, True])
async def test_the_exception_handler_runs_in_the_context_of_the_failed_callback(
    stack: Stack, name: str, given: bool
) -> None:
    """It sees those of the call, and those that the callback has set, such as a request number for the log."""
    seen: list[str] = []

    def failing() -> None:
        seen.append(variable.get())
        variable.set("set by the callback")
        raise ZeroDivisionError

    async with stack.open() as group:
        group.set_exception_handler(lambda *_: seen.append(variable.get()))
        variable.set("at the call")
        context = contextvars.copy_context() if given else None
        scheduler(group, name)(failing, context=context)
        variable.set("later")
        await until(lambda: len(seen) == 2)
    assert seen == ["at the call", "set by the callback"]
    assert variable.get() == "later"


class Unavailable:
    """A proxy whose object is not available, as some frameworks have them."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)

    def __call__(self) -> None:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        return "a stand-in"


@pytest.mark.differs(
    "a callback that raises and whose `repr` raises too",
    asyncio="ends the event loop",
    here="reported",
    why="one callback's failure does not affect the others",
)
@pytest.mark.ours_only
@every_scheduler
async def test_a_callback_that_has_no_name_and_cannot_say_so(stack: Stack, name: str) -> None:
    calls: list[str] = []
    async with stack.open() as group:
        contexts = collect_contexts(group)
        scheduler(group, name)(Unavailable())
        scheduler(group, name)(calls.append, "next")
        await until(lambda: calls)
    (context,) = contexts
    assert type(context["exception"]) is ZeroDivisionError
    assert "a stand-in" in context["message"]


@every_scheduler
def test_a_given_context_that_is_entered_already(anyio_backend: Any, name: str) -> None:
    """It cannot be entered twice, neither for the callback nor for reporting the failure."""
    backend, options = anyio_backend
    calls: list[str] = []
    seen: list[Any] = []

    async def main() -> None:
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            scheduler(group, name)(calls.append, "entered twice", context=context)
            scheduler(group, name)(calls.append, "next")
            await until(lambda: calls)
        seen.extend(contexts)

    context = contextvars.copy_context()
    context.run(lambda: anyio.run(main, backend=backend, backend_options=options))
    assert calls == ["next"]
    assert [type(report["exception"]) for report in seen] == [RuntimeError]


async def test_the_exception_handler_can_be_set_and_reset(stack: Stack) -> None:
    async with stack.open() as group:
        assert group.get_exception_handler() is None

        def handler(_: Any, context: dict[str, Any]) -> None: ...

        group.set_exception_handler(handler)
        assert group.get_exception_handler() is handler
        with pytest.raises(TypeError):
            group.set_exception_handler("no handler")
        assert group.get_exception_handler() is handler
        group.set_exception_handler(None)
        assert group.get_exception_handler() is None


async def test_the_handler_gets_the_group_and_the_context(stack: Stack) -> None:
    seen: list[Any] = []
    async with stack.open() as group:
        group.set_exception_handler(lambda *args: seen.append(args))
        group.call_exception_handler({"message": "hello", "more": 1})
        group.set_exception_handler(None)
        owner = group.loop if stack.is_oracle else group
    assert seen == [(owner, {"message": "hello", "more": 1})]


async def test_the_default_handler_logs(stack: Stack) -> None:
    async with stack.open() as group:
        with capture_log(stack) as records:
            try:
                raise ValueError("what happened")
            except ValueError as exc:
                error = exc
            group.call_exception_handler({"message": "a message", "exception": error, "transport": "a transport"})
            group.default_exception_handler({"message": "another message"})
            group.call_exception_handler({})
    first, second, third = records
    assert "a message" in first.getMessage()
    assert "a transport" in first.getMessage()
    assert first.exc_info is not None
    assert first.exc_info[1] is error
    assert first.levelno == logging.ERROR
    assert "another message" in second.getMessage()
    assert not second.exc_info
    assert "Unhandled exception" in third.getMessage()


async def test_a_handler_that_raises_is_itself_reported(stack: Stack) -> None:
    calls: list[int] = []

    def handler(*_: Any) -> None:
        raise LookupError("in the handler")

    def failing() -> None:
        raise ZeroDivisionError

    async with stack.open() as group, connected(group) as (_, protocol, peer):
        with capture_log(stack) as records:
            group.set_exception_handler(handler)
            group.call_soon(failing)
            group.call_soon(calls.append, 1)
            await until(lambda: calls)
            await peer.send(b"still here")
            await protocol.wait_received(10)
        group.set_exception_handler(None)
    (record,) = records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)
    assert "exception handler" in record.getMessage()
    assert "ZeroDivisionError" in record.getMessage()


class Unprintable(Recorder):
    def __repr__(self) -> str:
        raise LookupError("in repr()")


async def test_the_default_handler_fails_for_an_object_without_repr(stack: Stack) -> None:
    """The failure of the handler is logged, and only the connection in the report has ended."""
    failing, other = Unprintable(on_data_received=lambda *_: 1 / 0), Recorder()
    async with stack.open() as group:
        async with connected(group, failing) as (_, _, peer), connected(group, other) as (_, _, other_peer):
            with capture_log(stack) as records:
                await peer.send(b"x")
                await failing.wait_for("connection_lost")
            assert isinstance(failing.exception, ZeroDivisionError)
            await other_peer.send(b"still here")
            await other.wait_received(10)
    (record,) = records
    assert record.getMessage().startswith("Exception in default exception handler")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


async def test_a_default_handler_of_a_derived_group(anyio_backend: Any) -> None:
    seen: list[Any] = []

    class Derived(TransportGroup):
        def default_exception_handler(self, context: dict[str, Any]) -> None:
            seen.append(context)

    async with Derived() as group:
        group.call_exception_handler({"message": "hello"})
    assert seen == [{"message": "hello"}]


# -- the end of the group ---------------------------------------------------------------------------------


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


# -- tasks ------------------------------------------------------------------------------------------------


async def test_timers_run_while_the_block_waits_for_tasks(anyio_backend: Any) -> None:
    log: list[str] = []

    async def task() -> None:
        await begun.wait()
        fired = anyio.Event()
        group.call_later(0.01, fired.set)
        await fired.wait()
        log.append("done")

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            begun = anyio.Event()
            group.start_soon(task)
            group.call_soon(begun.set)
        assert log == ["done"]


async def test_a_task_belongs_to_the_group(anyio_backend: Any) -> None:
    log: list[Any] = []

    async def task(number: int) -> None:
        log.append((number, current_group()))
        await go_on.wait()
        log.append("done")

    async with TransportGroup() as group:
        go_on = anyio.Event()
        group.start_soon(task, 1, name="the name")
        await anyio.lowlevel.checkpoint()
        await until(lambda: log)
        assert "the name" in {info.name for info in anyio.get_running_tasks()}
        go_on.set()
    assert log == [(1, group), "done"]


async def test_the_failure_of_a_task_cancels_the_group(anyio_backend: Any) -> None:
    async def failing() -> None:
        raise LookupError("the task's")

    ended = False
    with pytest.raises(BaseException) as caught:
        async with TransportGroup() as group:
            group.start_soon(failing)
            try:
                await anyio.sleep(GUARD)
            finally:
                ended = True
    assert ended
    assert [str(leaf) for leaf in leaves(caught.value)] == ["the task's"]


async def test_a_failing_task_aborts_the_connections(anyio_backend: Any) -> None:
    async def failing() -> None:
        raise LookupError

    stack = Stack(str(anyio_backend))
    protocol = Recorder()
    with pytest.raises(BaseException) as caught:
        async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, _):
            fill(transport, 1 << 20)
            group.start_soon(failing)
            await anyio.sleep(GUARD)
    assert protocol.lost
    assert protocol.exception is None
    assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]


CALLBACKS = [
    "connection_made", "data_received", "get_buffer", "buffer_updated", "eof_received", "pause_writing",
    "resume_writing", "connection_lost",
]  # fmt: skip


@pytest.mark.ours_only("asyncio has no group")
@pytest.mark.parametrize("callback", [*CALLBACKS, "timer", "call_soon", "task"])
async def test_a_task_waits_for_an_event_that_a_callback_sets(stack: Stack, callback: str) -> None:
    """Every callback can use the current group, start a task, and set an event that another task waits for."""
    groups: list[Any] = []
    async with stack.open() as group:
        signal = anyio.Event()
        answered = anyio.Event()

        async def answer() -> None:
            groups.append(current_group())
            answered.set()

        def hook(*_: Any) -> None:
            if not groups:
                groups.append(current_group())
                current_group().start_soon(answer)
                signal.set()

        async def task() -> None:
            hook()

        if callback == "timer":
            group.call_later(0, hook)
        elif callback == "call_soon":
            group.call_soon(hook)
        elif callback == "task":
            group.start_soon(task)
        else:
            kind = BufferedRecorder if "buffer" in callback else Recorder
            protocol = kind(**{f"on_{callback}": hook})
            async with connected(group, protocol, small=True) as (transport, _, peer):
                if "writing" in callback:
                    size = fill(transport, 1 << 17)
                    await peer.receive_exactly(size)
                else:
                    await peer.send(b"data")
                    if callback in ("eof_received", "connection_lost"):
                        peer.close()
                    else:
                        await protocol.wait_received(4)
                with anyio.fail_after(GUARD):
                    await signal.wait()
                    await answered.wait()
        with anyio.fail_after(GUARD):
            await signal.wait()
            await answered.wait()
    assert groups == [group, group]


@pytest.mark.ours_only("asyncio has no group")
@pytest.mark.parametrize(
    "callback", ["datagram_received", "error_received", "pipe_data_received", "pipe_connection_lost", "process_exited"]
)
async def test_a_task_waits_for_an_event_that_a_datagram_or_child_callback_sets(stack: Stack, callback: str) -> None:
    async with stack.open() as group:
        signal = anyio.Event()

        def hook(*_: Any) -> None:
            current_group().start_soon(answer)

        async def answer() -> None:
            assert current_group() is group
            signal.set()

        if callback in ("datagram_received", "error_received"):
            protocol: Any = type("Protocol", (DatagramProtocol,), {callback: hook})
            local, _ = await group.create_datagram_endpoint(protocol, local_addr=(HOST, 0))
            # To itself, or to an address where nothing listens any more.
            name = local.get_extra_info("sockname")
            if callback == "datagram_received":
                local.sendto(b"data", name)
            else:
                local.close()
                await until(lambda: not group.statistics().open_transports)
                remote, _ = await group.create_datagram_endpoint(protocol, remote_addr=name)
                remote.sendto(b"data")
        else:
            protocol = type("Protocol", (SubprocessProtocol,), {callback: hook})
            await group.subprocess_exec(protocol, "echo", "data", stdin=None, stderr=None)
        with anyio.fail_after(GUARD):
            await signal.wait()
