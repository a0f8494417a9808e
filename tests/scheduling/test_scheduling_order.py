"""Scheduling: the order of callbacks, input and timers."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from network import needs_pipes, needs_selector
from scheduling_helpers import CountingGroup, every_scheduler, scheduler
from support import GUARD, HOST, BufferedRecorder, Peer, Recorder, Stack, connected, turns, until

from transports_anyio import DatagramProtocol, TransportGroup
from transports_anyio._selector import BATCH_SIZE

pytestmark = pytest.mark.anyio


# -- callbacks --------------------------------------------------------------------------------------------


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


# -- what is always ready ---------------------------------------------------------------------------------


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


# -- input ------------------------------------------------------------------------------------------------


def wait_for_input(transport: Any) -> None:
    """Block until data has arrived that the transport has not received yet."""
    assert select.select([transport.get_extra_info("socket").fileno()], [], [], GUARD)[0]


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


# -- input and time-outs that are due together ------------------------------------------------------------


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


# -- timers -----------------------------------------------------------------------------------------------


async def test_timers_run_by_time(stack: Stack) -> None:
    order: list[int] = []
    async with stack.open() as group:
        now = group.time()
        for number in (3, 1, 4, 0, 2):
            group.call_at(now + number / 200, order.append, number)
        await until(lambda: len(order) == 5)
    assert order == [0, 1, 2, 3, 4]


async def test_a_timer_that_falls_due_while_callbacks_run_comes_after_what_they_scheduled(stack: Stack) -> None:
    order: list[str] = []

    def callback() -> None:
        group.call_later(0.001, order.append, "timer")
        group.call_soon(order.append, "soon")
        time.sleep(0.003)

    async with stack.open() as group:
        for _ in range(5):
            group.call_soon(callback)
            await until(lambda: len(order) == 2)
            assert order == ["soon", "timer"]
            order.clear()


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
