"""The group: leaving the block by an exception or a cancellation."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from io import BytesIO
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from group_helpers import ENDPOINTS, MUCH, BoomError, LeavingError, echo, raiser, run
from network import cancelled_after, needs_unix
from support import (
    GUARD,
    HOST,
    SMALL,
    Peer,
    Recorder,
    collect_contexts,
    connected,
    fill,
    listening,
    open_descriptors,
    raises_inside,
    settle,
    turns,
    until,
)
from tls_support import NAME, Certificates

from transports_anyio import TransportGroup, current_group

pytestmark = pytest.mark.anyio


# -- leaving by an exception or a cancellation --------------------------------------------------------------


@asynccontextmanager
async def left_by(how: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Surround a group; yield an async function that makes the block end."""

    async def leave_by_exception() -> None:
        raise LeavingError

    async def leave_by_cancellation() -> None:
        scope.cancel()
        await anyio.sleep(GUARD)

    with anyio.CancelScope() as scope:
        if how == "cancellation":
            yield leave_by_cancellation
        else:
            with raises_inside(LeavingError) as caught:
                yield leave_by_exception
            assert len(caught) == 1
    assert scope.cancelled_caught == (how == "cancellation")


either_way = pytest.mark.parametrize("how", ["exception", "cancellation"])


@either_way
async def test_leaving_early_aborts_and_calls_connection_lost_first(anyio_backend: Any, how: str) -> None:
    order: list[str] = []
    protocols = [Recorder(on_connection_lost=lambda *_: order.append("connection_lost")) for _ in range(3)]
    async with AsyncExitStack() as peers:
        made = []
        async with left_by(how) as leave:
            try:
                async with TransportGroup() as group:
                    server = await group.create_server(lambda: protocols[2], HOST, 0)
                    (sock,) = server.sockets
                    address = sock.getsockname()
                    idle, _, peer = await peers.enter_async_context(connected(group, protocols[0]))
                    made.append(peer)
                    full, _, peer = await peers.enter_async_context(connected(group, protocols[1], small=True))
                    made.append(peer)
                    size = fill(full, 1 << 20)
                    made.append(peers.enter_context(Peer.connect(address)))
                    await protocols[2].wait_for("connection_made")
                    assert not idle.is_closing()
                    await leave()
            finally:
                order.append("left")
        assert order == ["connection_lost"] * 3 + ["left"]
        assert [protocol.exception for protocol in protocols] == [None] * 3
        assert protocols[1].count("resume_writing") == 0
        with pytest.raises(ConnectionRefusedError):
            Peer.connect(address)
        assert [await peer.receive() for peer in (made[0], made[2])] == [b"", b""]
        assert len(await made[1].receive_all()) < size


@either_way
async def test_leaving_early_while_a_close_still_flushes(anyio_backend: Any, how: str, connect_peer: Any) -> None:
    protocol = Recorder()
    async with left_by(how) as leave, TransportGroup() as group:
        transport, _, _ = await connect_peer(group, protocol, small=True)
        fill(transport, 1 << 20)
        transport.close()
        await settle(group)
        assert not protocol.lost
        await leave()
    assert protocol.exception is None


@either_way
async def test_leaving_early_when_connection_lost_is_scheduled(anyio_backend: Any, how: str, connect_peer: Any) -> None:
    """It keeps its exception, and comes once."""
    protocols = [Recorder() for _ in range(3)]
    async with left_by(how) as leave, TransportGroup() as group:
        reset, _, peer = await connect_peer(group, protocols[0])
        closed, _, _ = await connect_peer(group, protocols[1])
        aborted, _, _ = await connect_peer(group, protocols[2])
        peer.reset()
        closed.close()
        aborted.abort()
        while not reset.is_closing():  # The group does not run in between.
            reset.write(b"x")
        assert [protocol.lost for protocol in protocols] == [False] * 3
        await leave()
    assert isinstance(protocols[0].exception, ConnectionError)
    assert [protocol.exception for protocol in protocols[1:]] == [None, None]


@either_way
async def test_connections_work_in_a_shielded_finally(anyio_backend: Any, how: str) -> None:
    """A shielded `finally` of the block may still talk to its peers: the group still runs until then."""
    async with AsyncExitStack() as peers:
        async with left_by(how) as leave, TransportGroup() as group:
            transport, protocol, peer = await peers.enter_async_context(connected(group))
            try:
                await leave()
            finally:
                with anyio.CancelScope(shield=True):
                    transport.write(b"goodbye?")
                    assert await peer.receive_exactly(8) == b"goodbye?"
                    await peer.send(b"goodbye!")
                    assert await protocol.wait_received(8) == b"goodbye!"
        assert protocol.exception is None


@either_way
async def test_connection_lost_that_raises_while_the_block_is_left(
    anyio_backend: Any, how: str, connect_peer: Any
) -> None:
    """Each error is reported, the other connections are lost in order, and the block ends as it would have."""
    protocols = [Recorder(on_connection_lost=raiser(BoomError())) for _ in range(5)]
    async with left_by(how) as leave, TransportGroup() as group:
        contexts = collect_contexts(group)
        for protocol in protocols:
            await connect_peer(group, protocol)
        await leave()
    assert [protocol.count("connection_lost") for protocol in protocols] == [1] * 5
    assert [type(context["exception"]) for context in contexts] == [BoomError] * 5


@either_way
async def test_new_connections_are_refused_while_the_block_is_left(
    anyio_backend: Any, how: str, connect_peer: Any
) -> None:
    """`connection_lost` may call anything: a call that would open something is refused or already cancelled."""
    seen: list[Any] = []

    def reconnect(protocol: Recorder, exc: Any) -> None:
        assert current_group().is_closing()
        current_group().start_soon(connect)
        current_group().start_soon(never)
        current_group().call_later(0, seen.append, "a timer")
        other.write(b"x")
        other.close()

    async def connect() -> None:
        try:
            await current_group().create_connection(Recorder, HOST, 1)
        except BaseException as error:
            seen.append(type(error))
            raise

    async def never() -> None:
        await anyio.sleep_forever()

    async with left_by(how) as leave, TransportGroup() as group:
        assert not group.is_closing()
        other, _, _ = await connect_peer(group)
        await connect_peer(group, Recorder(on_connection_lost=reconnect))
        await leave()
    await turns()  # Nothing comes later either.
    cancelled = anyio.get_cancelled_exc_class()
    assert seen == [cancelled]
    assert group.is_closing()


async def serve_anew(group: TransportGroup, server: Any, sock: socket.socket) -> object:
    await server.serve_forever()
    return await group.create_connection(Recorder, HOST, 1)  # It may end in order, and the next call is refused.


#: The calls of a task at the moment at which its group is left.
CALLS: dict[str, Callable[[TransportGroup, Any, socket.socket], Awaitable[object]]] = {
    **{name: lambda group, _, sock, call=call: call(group, sock) for name, call in ENDPOINTS.items()},
    "start_serving": lambda group, server, _: server.start_serving(),
    "serve_forever": serve_anew,
}


@pytest.mark.differs(
    "a task that calls an endpoint function while the group is left",
    asyncio="the call goes on",
    here="cancelled if the group is cancelled; otherwise `RuntimeError`, which ends the task but not the block",
    why="a normal exit is not a failure",
)
@either_way
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_unix) if "unix" in name else name for name in CALLS])
async def test_g2_a_task_sees_its_cancellation_and_no_error(anyio_backend: Any, how: str, name: str) -> None:
    """The task is about to run when the block is left, and its call needs an open group."""
    outcomes: list[type[BaseException] | None] = []
    waiting, go = anyio.Event(), anyio.Event()

    async def work() -> None:
        waiting.set()
        await go.wait()
        try:
            await CALLS[name](group, server, ours)
        except BaseException as error:
            outcomes.append(type(error))
            raise

    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with left_by(how) as leave, TransportGroup() as group:
            server = await group.create_server(Recorder, HOST, 0)
            group.start_soon(work)
            await waiting.wait()
            go.set()
            await leave()
        assert outcomes == [anyio.get_cancelled_exc_class()]


@either_way
@pytest.mark.parametrize("when", ["connecting", "handshake"])
async def test_g2_a_pending_connection_is_cancelled(
    anyio_backend: Any, how: str, when: str, certificate_authority: Any
) -> None:
    outcomes: list[type[BaseException] | None] = []

    async def connect() -> None:
        options: dict[str, Any] = {"ssl": Certificates(certificate_authority).client(), "server_hostname": NAME}
        try:
            await group.create_connection(Recorder, *address, **(options if when == "handshake" else {}))
        except BaseException as error:
            outcomes.append(type(error))
            raise

    with listening() as listener:
        address = listener.getsockname()
        async with left_by(how) as leave, TransportGroup() as group:
            group.start_soon(connect)
            while when == "handshake" and not group.statistics().pending_handshakes:
                await turns(1)
            await leave()
    assert outcomes == [anyio.get_cancelled_exc_class()]


@either_way
async def test_g2_a_task_cleans_up_with_the_groups_help(anyio_backend: Any, how: str) -> None:
    """A cancelled task still gets its callbacks and timers; its group exists until the task has ended."""
    done: list[str] = []

    async def work() -> None:
        waiting.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True), anyio.fail_after(GUARD):
                await wait_for(group.call_soon)
                await wait_for(partial(group.call_later, 0.01))
                await wait_for(group.start_soon)
                done.append("cleaned up")

    async def wait_for(scheduler: Callable[..., object]) -> None:
        event = anyio.Event()

        async def set_event() -> None:
            event.set()

        scheduler(set_event if scheduler == group.start_soon else event.set)
        await event.wait()

    waiting = anyio.Event()
    async with left_by(how) as leave, TransportGroup() as group:
        group.start_soon(work)
        await waiting.wait()
        await leave()
    assert done == ["cleaned up"]


# -- waiting when no callbacks run any more -----------------------------------------------------------------


#: The shielded waits of a task when an error propagates through the group: the call, and its exception.
WAITS: dict[str, Callable[[TransportGroup, Any, Any, Any], Awaitable[object]]] = {
    "wait_closed of the group": lambda group, *_: group.wait_closed(),
    "wait_closed of the server": lambda _, server, *__: server.wait_closed(),
    "serve_forever": lambda _, server, *__: server.serve_forever(),
    "sendfile": lambda group, _, transport, __: group.sendfile(transport, BytesIO(bytes(1 << 24))),
    "start_tls": lambda group, _, transport, tls: group.start_tls(
        transport, transport.get_protocol(), tls, server_hostname=NAME
    ),
    "handshake": lambda group, server, _, tls: group.create_connection(
        Recorder, *server.sockets[0].getsockname(), ssl=tls, server_hostname=NAME
    ),
}


@pytest.mark.parametrize("where", ["the block", "a task"])
@pytest.mark.parametrize("name", WAITS)
def test_g4_a_shielded_wait_ends_when_an_error_propagates(
    anyio_backend: Any, name: str, where: str, certificate_authority: Any
) -> None:
    """The event would come once the block is left, and leaving waits for the task."""
    tls = Certificates(certificate_authority).client()
    outcomes: list[object] = []
    protocol, silent = Recorder(), Recorder()
    error: Any = SystemExit if anyio_backend[0] == "trio" else asyncio.CancelledError

    def leave() -> None:
        raise error

    async def wait(group: TransportGroup, server: Any, transport: Any) -> None:
        with anyio.CancelScope(shield=True):
            try:
                with anyio.fail_after(GUARD):
                    await WAITS[name](group, server, transport, tls)
            except (OSError, RuntimeError) as exc:
                assert not isinstance(exc, TimeoutError)
            with pytest.raises(RuntimeError, match="not open"):
                group.call_soon(leave)
            outcomes.append("ended")

    async def main() -> None:
        with listening() as listener:
            async with TransportGroup() as group:
                server = await group.create_server(lambda: silent, HOST, 0)
                transport, _ = await group.create_connection(lambda: protocol, *listener.getsockname())
                group.call_later(0.05, leave)
                if where == "a task":
                    group.start_soon(wait, group, server, transport)
                    await anyio.sleep_forever()
                await wait(group, server, transport)

    if error is SystemExit:
        with raises_inside(SystemExit):
            run(anyio_backend, main)
    else:
        run(anyio_backend, main)  # The cancellation ends with the group.
    assert outcomes == ["ended"]
    assert protocol.lost


@pytest.mark.parametrize("side", ["connected", "accepted"])
async def test_cancelling_with_100_open_connections(anyio_backend: Any, side: str) -> None:
    """Half of them have full buffers. It takes a few iterations of the event loop, and no I/O."""
    protocols = [Recorder() for _ in range(100)]
    turns_taken = 0
    left = False

    async def count() -> None:
        nonlocal turns_taken
        while not left:
            await anyio.lowlevel.checkpoint()
            turns_taken += 1

    async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
        listener = stack.enter_context(listening(receive_buffer=SMALL))
        before = open_descriptors()
        with ExitStack() as peers:
            with anyio.CancelScope() as scope:
                async with TransportGroup() as group:
                    if side == "accepted":
                        made = iter(protocols)
                        server = await group.create_server(lambda: next(made), HOST, 0)
                        (sock,) = server.sockets
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # Inherited when accepted.
                        for _ in protocols:
                            peers.enter_context(Peer.connect(sock.getsockname(), receive_buffer=SMALL))
                        await until(lambda: all(protocol.transport for protocol in protocols))
                    else:
                        for protocol in protocols:
                            await group.create_connection(lambda p=protocol: p, *listener.getsockname())  # type: ignore[misc]
                            peers.enter_context(Peer(listener.accept()[0]))
                            sock = protocol.transport.get_extra_info("socket")
                            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
                    for protocol in protocols[::2]:
                        fill(protocol.transport, 1 << 17)
                    tasks.start_soon(count)
                    await turns()
                    turns_taken = 0
                    scope.cancel()
                    await anyio.sleep_forever()
            left = True
            assert turns_taken < 30
            assert scope.cancelled_caught
            assert [protocol.count("connection_lost") for protocol in protocols] == [1] * 100
            assert {protocol.exception for protocol in protocols} == {None}
        assert open_descriptors() == before


async def test_a_group_in_a_task_that_is_cancelled_at_every_point(anyio_backend: Any) -> None:
    """Wherever the task was, every connection that was made is lost, and nothing is left."""
    before = open_descriptors()
    for checkpoints in itertools.count():
        made: list[Recorder] = []
        lost_in_time = False

        def factory() -> Recorder:
            made.append(echo())  # noqa: B023
            return made[-1]  # noqa: B023

        async with cancelled_after(checkpoints) as scope:
            try:
                async with TransportGroup() as group:
                    server = await group.create_server(factory, HOST, 0)
                    address = server.sockets[0].getsockname()
                    client = Recorder()
                    made.append(client)
                    transport, _ = await group.create_connection(lambda: client, *address)  # noqa: B023
                    transport.write(b"hello")
                    await client.wait_received(5)
                    other, _ = await group.create_connection(factory, *address)
                    group.start_soon(client.wait_for, "connection_lost")
                    transport.write_eof()
                    await client.wait_for("connection_lost")
                    other.write(MUCH)
                    server.close()
                    other.close()
                    await group.wait_closed()
            finally:
                lost_in_time = all(protocol.lost or not protocol.calls for protocol in made)
        assert lost_in_time
        assert open_descriptors() == before
        if not scope.cancelled_caught:
            break
    assert checkpoints > 5
