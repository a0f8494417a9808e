"""The group: the current group, context variables, and groups inside groups."""

from __future__ import annotations

import contextvars
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from group_helpers import (
    FATAL_IN_ASYNCIO,
    MUCH,
    TRIGGERS,
    BoomError,
    answers,
    echo,
    raiser,
    recorder,
)
from support import (
    GUARD,
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    connected,
    fill,
    raises_inside,
    until,
)

from transports_anyio import TransportGroup, current_group

pytestmark = pytest.mark.anyio


# -- the current group --------------------------------------------------------------------------------------


async def test_the_current_group(anyio_backend: Any) -> None:
    """A group is current in its callbacks and tasks, and not in the block around it."""

    def no_group() -> None:
        with pytest.raises(RuntimeError, match="no transport group is current"):
            current_group()

    async def task() -> None:
        assert current_group() is outer
        async with TransportGroup():
            assert current_group() is outer
        with raises_inside(BoomError):
            async with TransportGroup():
                raise BoomError
        assert current_group() is outer
        ran.set()

    no_group()
    ran = anyio.Event()
    async with TransportGroup() as outer:
        no_group()
        outer.start_soon(task)
        await ran.wait()
        no_group()
    no_group()


async def test_a_hidden_group_does_not_become_its_users(anyio_backend: Any) -> None:
    """A library opens a group in a task of its user's group: what the user starts there lands in the user's group."""
    seen: list[Any] = []

    @asynccontextmanager
    async def client() -> AsyncIterator[TransportGroup]:
        async with TransportGroup() as hidden:
            yield hidden

    async def failing() -> None:
        await anyio.lowlevel.checkpoint()
        raise BoomError

    async def slow() -> None:
        await left.wait()
        seen.append("slow")

    async def user() -> None:
        async with client() as hidden:
            assert current_group() is mine
            hidden.call_soon(lambda: seen.append(current_group() is hidden))
            await until(lambda: seen)
            current_group().start_soon(slow)
        left.set()  # Leaving the library's block has not waited for the task.
        await until(lambda: "slow" in seen)
        with pytest.raises(anyio.get_cancelled_exc_class()):
            async with client():
                current_group().start_soon(failing)
                await anyio.sleep_forever()
        seen.append("cancelled")
        await anyio.sleep_forever()

    left = anyio.Event()
    with anyio.fail_after(GUARD), raises_inside(BoomError):
        async with TransportGroup() as mine:
            mine.start_soon(user)
    assert seen == [True, "slow", "cancelled"]


async def test_a_callback_belongs_to_the_group_of_its_connection(anyio_backend: Any, connect_peer: Any) -> None:
    """Whatever group is current where the connection is made, or where its transport is used."""
    seen: list[Any] = []

    def note(*_: Any) -> None:
        seen.append(current_group())

    async with TransportGroup() as outer:
        protocol = Recorder(
            on_connection_made=note,
            on_data_received=note,
            on_pause_writing=note,
            on_resume_writing=note,
            on_eof_received=note,
            on_connection_lost=note,
        )
        async with TransportGroup():
            transport, _, peer = await connect_peer(outer, protocol, small=True)
            outer.call_soon(note)
            outer.call_later(0, note)
            transport.write(MUCH)
            await peer.receive_exactly(len(MUCH))
            await peer.send(b"x")
            await protocol.wait_for("data_received")
            peer.shutdown()
            await protocol.wait_for("connection_lost")
    assert seen == [outer] * 8


async def test_a_task_belongs_to_the_group_it_was_started_in(anyio_backend: Any) -> None:
    seen: list[Any] = []

    async def note() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(current_group())

    async with TransportGroup() as outer:
        async with TransportGroup() as inner:
            outer.start_soon(note)
            inner.start_soon(note)
    assert sorted(map(id, seen)) == sorted(map(id, [outer, inner]))


@pytest.mark.parametrize("inside_out", [False, True])
async def test_the_exception_handler_belongs_to_its_group(anyio_backend: Any, inside_out: bool) -> None:
    """For every kind of failure, with another current group at the call, or none."""
    seen: list[Any] = []

    def handler(group: TransportGroup, _: Any) -> None:
        seen.append((group, current_group()))

    async with TransportGroup() as outer, TransportGroup() as inner, AsyncExitStack() as peers:
        for group in (outer, inner):
            group.set_exception_handler(handler)
        group, other = (inner, outer) if inside_out else (outer, inner)
        fail = raiser(BoomError())
        group.call_soon(fail)
        group.call_later(0, fail)
        group.call_soon(fail, context=contextvars.Context())
        group.call_soon_threadsafe(fail)
        await until(lambda: len(seen) == 4)
        # In a callback of the other group.
        other.call_soon(group.call_exception_handler, {"message": "hello"})
        await until(lambda: len(seen) == 5)
        protocol = Recorder(on_data_received=fail)
        _, _, peer = await peers.enter_async_context(connected(group, protocol))
        await peer.send(b"x")
        await protocol.wait_for("connection_lost")
        # A connection's callback that is called inside a callback of the other group.
        protocol = Recorder(on_pause_writing=fail)
        transport, _, _ = await peers.enter_async_context(connected(group, protocol, small=True))
        other.call_soon(transport.write, MUCH)
        await protocol.wait_for("connection_lost")
        server = await group.create_server(fail, HOST, 0)
        peers.enter_context(Peer.connect(server.sockets[0].getsockname()))
        await until(lambda: len(seen) == 8)
    assert seen == [(group, group)] * 8


async def test_a_task_outside_the_block_has_no_group(anyio_backend: Any) -> None:
    async def outside() -> None:
        await inside.wait()
        with pytest.raises(RuntimeError):
            current_group()
        looked.set()

    inside, looked = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outside)
        async with TransportGroup():
            inside.set()
            with anyio.fail_after(GUARD):
                await looked.wait()


# -- context variables --------------------------------------------------------------------------------------


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")


async def test_callbacks_run_in_the_context_of_the_connecting_task(stack: Stack) -> None:
    seen: list[str] = []

    def note(*_: Any) -> None:
        seen.append(variable.get())

    async with stack.open() as group:
        protocol = Recorder(
            on_connection_made=note, on_data_received=note, on_eof_received=note, on_connection_lost=note
        )
        variable.set("the caller's")
        async with connected(group, protocol) as (_, _, peer):
            variable.set("changed since")
            await peer.send(b"x")
            await protocol.wait_received(1)
            peer.shutdown()
            await protocol.wait_for("connection_lost")
        assert seen == ["the caller's"] * 4


async def test_connections_do_not_share_context_variables(stack: Stack) -> None:
    """Nor do its variables reach the task that accepted or connected it."""
    seen: dict[str, str] = {}

    def protocol(name: str) -> Recorder:
        def made(*_: Any) -> None:
            seen[f"{name} at first"] = variable.get()
            variable.set(name)

        def received(*_: Any) -> None:
            seen[f"{name} with data"] = variable.get()
            variable.set(name)

        return Recorder(on_connection_made=made, on_data_received=received)

    protocols = [protocol("first"), protocol("second")]
    made = iter(protocols)
    async with stack.open() as group:
        server = await group.create_server(lambda: next(made), HOST, 0)
        address = server.sockets[0].getsockname()
        with Peer.connect(address) as first, Peer.connect(address) as second:
            await until(lambda: len(seen) == 2)
            await first.send(b"x")
            await protocols[0].wait_received(1)
            await second.send(b"x")
            await protocols[1].wait_received(1)
        async with connected(group, protocol("third")):
            assert seen["third at first"] == "nobody's"
            assert variable.get() == "nobody's"
        server.close()
        assert {key: value for key, value in seen.items() if "at first" in key} == {
            "first at first": "nobody's",
            "second at first": "nobody's",
            "third at first": "nobody's",
        }
        assert seen["second with data"] != "first"


@pytest.mark.differs(
    "the context variables of a connection's callbacks",
    asyncio="until 3.15 a new copy of the context for each kind of event",
    here="one context for each connection: `data_received` sees what `connection_made` has set",
    why="a connection's variables belong to the connection",
)
@pytest.mark.ours_only(before=(3, 15))
async def test_the_callbacks_of_a_connection_share_one_context(stack: Stack) -> None:
    seen: list[str] = []

    def made(*_: Any) -> None:
        variable.set("the connection's")

    def note(*_: Any) -> None:
        seen.append(variable.get())

    async with stack.open() as group:
        protocol = Recorder(
            on_connection_made=made, on_data_received=note, on_eof_received=note, on_connection_lost=note
        )
        async with connected(group, protocol) as (_, _, peer):
            await peer.send(b"x")
            await protocol.wait_received(1)
            peer.shutdown()
            await protocol.wait_for("connection_lost")
        assert seen == ["the connection's"] * 3
        assert variable.get() == "nobody's"


@pytest.mark.parametrize("callback", FATAL_IN_ASYNCIO)
async def test_the_exception_handler_runs_in_the_connections_context(stack: Stack, callback: str) -> None:
    """It sees the variables of the connecting task, and those that the failing callback has set."""
    seen: list[str] = []

    def fail(*_: Any) -> None:
        seen.append(variable.get())
        variable.set("the callback's")
        raise BoomError

    protocol = recorder(callback, fail)
    async with stack.open() as group:
        group.set_exception_handler(lambda *_: seen.append(variable.get()))
        variable.set("the caller's")
        async with connected(group, protocol, small=True) as (transport, _, peer):
            variable.set("changed since")
            await TRIGGERS[callback](transport, peer)
            await protocol.wait_for("connection_lost")
    assert seen == ["the caller's", "the callback's"]
    assert variable.get() == "changed since"


@pytest.mark.differs("the context variables of a connection's callbacks")
@pytest.mark.ours_only
@pytest.mark.parametrize("callback", [name for name in TRIGGERS if name != "pause_writing"])
async def test_the_exception_handler_shares_the_context_of_the_connection(stack: Stack, callback: str) -> None:
    """It also sees variables set in an earlier callback, unless the callback runs in the writer's context."""
    seen: list[str] = []

    def made(*_: Any) -> None:
        variable.set("the connection's")
        if callback == "connection_made":
            raise BoomError

    hooks = {} if callback == "connection_made" else {f"on_{callback}": raiser(BoomError())}
    protocol = (BufferedRecorder if "buffer" in callback else Recorder)(on_connection_made=made, **hooks)
    async with stack.open() as group:
        group.set_exception_handler(lambda *_: seen.append(variable.get()))
        async with connected(group, protocol, small=True) as (transport, _, peer):
            await TRIGGERS[callback](transport, peer)
            await protocol.wait_for("connection_lost")
            await until(lambda: seen)
    assert seen == ["the connection's"]
    assert variable.get() == "nobody's"


async def test_resume_writing_runs_in_the_connections_context(stack: Stack) -> None:
    """`pause_writing` comes from inside `write`, in the caller's context."""
    seen: list[str] = []

    def note(*_: Any) -> None:
        seen.append(variable.get())

    async with stack.open() as group:
        variable.set("the caller's")
        async with connected(group, Recorder(on_resume_writing=note), small=True) as (transport, protocol, peer):
            written = fill(transport, transport.get_write_buffer_limits()[1] + 1)
            await peer.receive_exactly(written)
            await protocol.wait_for("resume_writing")
        assert seen == ["the caller's"]


# -- groups in groups ---------------------------------------------------------------------------------------


async def test_an_inner_group_ends_without_the_outer_one(anyio_backend: Any) -> None:
    async with TransportGroup() as outer, connected(outer, echo()) as (_, _, outer_peer):
        for _ in range(2):
            async with TransportGroup() as inner, connected(inner, echo()) as (_, protocol, peer):
                assert await answers(peer)
                assert await answers(outer_peer)
            assert protocol.lost
            with raises_inside(BoomError):
                async with TransportGroup() as inner, connected(inner, protocol := Recorder()):
                    raise BoomError
            assert protocol.lost
        assert await answers(outer_peer)


async def test_cancelling_the_outer_group_ends_the_inner_one_first(anyio_backend: Any, connect_peer: Any) -> None:
    order: list[str] = []

    def protocol(name: str) -> Recorder:
        return Recorder(on_connection_lost=lambda *_: order.append(name))

    with anyio.CancelScope() as scope:
        async with TransportGroup() as outer:
            await connect_peer(outer, protocol("outer"))
            async with TransportGroup() as inner:
                transport, _, _ = await connect_peer(inner, protocol("inner"), small=True)
                fill(transport, 1 << 20)
                scope.cancel()
                await anyio.sleep_forever()
    assert order == ["inner", "outer"]


async def test_an_error_of_the_inner_group_propagates_to_the_outer_one(anyio_backend: Any, connect_peer: Any) -> None:
    protocols = [Recorder(), Recorder()]
    with raises_inside(BoomError) as caught:
        async with TransportGroup() as outer:
            await connect_peer(outer, protocols[0])
            async with TransportGroup() as inner:
                await connect_peer(inner, protocols[1])
                raise BoomError
    assert len(caught) == 1
    assert [protocol.exception for protocol in protocols] == [None, None]


async def test_a_group_in_a_task_of_a_group(anyio_backend: Any, connect_peer: Any) -> None:
    """It is cancelled with the task when the outer group is."""
    protocol = Recorder()

    async def task() -> None:
        async with TransportGroup() as inner:
            await connect_peer(inner, protocol)
            await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        async with TransportGroup() as outer:
            outer.start_soon(task)
            await protocol.wait_for("connection_made")
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert protocol.exception is None


async def test_protocols_of_two_groups_use_each_others_transports(anyio_backend: Any) -> None:
    """A relay with one end in each group: callbacks of one group write, pause and close in the other."""

    class Relay(Recorder):
        other: Any

        def __init__(self) -> None:
            super().__init__(
                on_data_received=lambda self, data: self.other.transport.write(data),
                on_eof_received=lambda self: self.other.transport.write_eof() or True,
                on_pause_writing=lambda self: self.other.transport.pause_reading(),
                on_resume_writing=lambda self: self.other.transport.resume_reading(),
            )

    left, right = Relay(), Relay()
    left.other, right.other = right, left
    async with (
        TransportGroup() as outer,
        connected(outer, left, small=True) as (_, _, one),
        TransportGroup() as inner,
        connected(inner, right, small=True) as (_, _, two),
        anyio.create_task_group() as tasks,
    ):
        for sender in (one, two):

            async def send_much(sender: Peer = sender) -> None:
                await sender.send(MUCH)
                sender.shutdown()

            tasks.start_soon(send_much)
        received: list[int] = []
        for receiver in (one, two):

            async def receive_much(receiver: Peer = receiver) -> None:
                received.append(len(await receiver.receive_all()))

            tasks.start_soon(receive_much)
        await until(lambda: left.count("eof_received") and right.count("eof_received"))
        left.transport.close()
        right.transport.close()
        await until(lambda: len(received) == 2)
        assert received == [len(MUCH)] * 2


async def test_many_groups_side_by_side(anyio_backend: Any) -> None:
    """Twenty tasks, each with a group; half of them are cancelled."""
    protocols = [echo() for _ in range(20)]
    answered = []
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        scopes = [anyio.CancelScope() for _ in protocols]
        finish = anyio.Event()

        async def task(protocol: Recorder, scope: anyio.CancelScope) -> None:
            with scope:
                async with TransportGroup() as group, connected(group, protocol) as (_, _, peer):
                    answered.append(await answers(peer))
                    await finish.wait()

        for protocol, scope in zip(protocols, scopes, strict=True):
            tasks.start_soon(task, protocol, scope)
        await until(lambda: len(answered) == 20)
        for scope in scopes[::2]:
            scope.cancel()
        for protocol in protocols[::2]:
            await protocol.wait_for("connection_lost")
        assert not any(protocol.lost for protocol in protocols[1::2])
        finish.set()
    assert all(protocol.lost for protocol in protocols)
