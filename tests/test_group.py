"""The group: ownership, leaving the block, exceptions in callbacks, and the current group."""

from __future__ import annotations

import asyncio
import contextvars
import errno
import gc
import itertools
import os
import signal
import socket
import ssl
import sys
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from io import BytesIO
from typing import Any, ClassVar

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import tls_support
import trustme
from anyio.streams.stapled import StapledByteStream
from network import cancelled_after, few_descriptors
from support import (
    GUARD,
    HOST,
    SMALL,
    BaseExceptionGroup,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    connected,
    fill,
    leaves,
    listening,
    open_descriptors,
    raises_inside,
    turns,
    until,
)
from tls_support import NAME, Certificates, TLSPeer

import transports_anyio._selector
from transports_anyio import Protocol, TransportGroup, current_group
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio

#: More than the small kernel buffers of both sides and the high watermark together.
MUCH = bytes(1 << 20)


class BoomError(Exception):
    """The exception of the callbacks in these tests."""


def echo() -> Recorder:
    return Recorder(on_data_received=lambda self, data: self.transport.write(data))


async def answers(peer: Peer) -> bool:
    """Return whether the echo at the other end still works."""
    await peer.send(b"are you there?")
    return await peer.receive_exactly(14) == b"are you there?"


def run(backend: Any, main: Callable[[], Awaitable[object]]) -> None:
    """Run `main` in an event loop of its own, for exceptions that end an event loop."""
    name, options = backend
    anyio.run(main, backend=name, backend_options=options)


# -- entering ---------------------------------------------------------------------------------------------------------


async def test_a_group_is_entered_once(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
        with pytest.raises(RuntimeError, match="once"):
            await group.__aenter__()
        assert await answers(peer)
    with pytest.raises(RuntimeError, match="once"):
        async with group:
            pytest.fail("the block of a group that is over was entered")


ENDPOINTS: dict[str, Callable[[TransportGroup, socket.socket], Awaitable[object]]] = {
    "create_connection": lambda group, sock: group.create_connection(Recorder, HOST, 1),
    "create_connection, adopting": lambda group, sock: group.create_connection(Recorder, sock=sock),
    "create_server": lambda group, sock: group.create_server(Recorder, HOST, 0),
    "connect_accepted_socket": lambda group, sock: group.connect_accepted_socket(Recorder, sock),
    "create_unix_connection": lambda group, sock: group.create_unix_connection(Recorder, "/nonexistent"),
    "create_unix_server": lambda group, sock: group.create_unix_server(Recorder, "/nonexistent/path"),
    "create_datagram_endpoint": lambda group, sock: group.create_datagram_endpoint(Recorder, local_addr=(HOST, 0)),
}


@pytest.mark.parametrize("name", ENDPOINTS)
async def test_endpoint_functions_outside_the_block(anyio_backend: Any, name: str) -> None:
    """Before and after the block: nothing is made, and the caller keeps its objects."""
    group = TransportGroup()
    before = open_descriptors()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(RuntimeError, match="not open"):
            await ENDPOINTS[name](group, ours)
        async with group:
            pass
        with pytest.raises(RuntimeError, match="not open"):
            await ENDPOINTS[name](group, ours)
        theirs.send(b"still the caller's")
        assert ours.recv(100) == b"still the caller's"
    assert open_descriptors() == before


async def test_connect_stream_outside_the_block(anyio_backend: Any) -> None:
    group = TransportGroup()
    sender, receiver = anyio.create_memory_object_stream[bytes](1)
    stream: Any = StapledByteStream(sender, receiver)  # type: ignore[arg-type]
    with sender, receiver:
        with pytest.raises(RuntimeError, match="not open"):
            await group.connect_stream(Recorder, stream)
        async with group:
            pass
        with pytest.raises(RuntimeError, match="not open"):
            await group.connect_stream(Recorder, stream)
        await sender.send(b"still the caller's")
        assert await receiver.receive() == b"still the caller's"


async def test_objects_are_harmless_after_the_block(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Recorder, HOST, 0)
        async with connected(group) as (transport, protocol, _):
            transport.close()
            await protocol.wait_for("connection_lost")
    transport.write(b"too late")
    transport.close()
    transport.abort()
    transport.pause_reading()
    transport.resume_reading()
    server.close()
    server.abort_clients()
    assert transport.is_closing()
    assert transport.get_extra_info("peername") is not None
    assert not server.is_serving()
    with anyio.fail_after(GUARD):
        await server.wait_closed()
        await group.wait_closed()
    with pytest.raises(RuntimeError):
        await server.start_serving()


async def test_repr_of_a_group(anyio_backend: Any) -> None:
    group = TransportGroup()
    assert repr(group) == "<TransportGroup new transports=0 buffered=0 servers=0 tasks=0 timers=0>"
    seen = []
    async with group:
        await group.create_server(Recorder, HOST, 0)
        async with connected(group, Recorder(on_connection_lost=lambda *_: seen.append(repr(group)))):
            assert repr(group) == "<TransportGroup open transports=1 buffered=0 servers=1 tasks=0 timers=0>"
    assert seen == ["<TransportGroup closing transports=1 buffered=0 servers=0 tasks=0 timers=0>"]
    assert repr(group) == "<TransportGroup closed transports=0 buffered=0 servers=0 tasks=0 timers=0>"


async def test_no_fd_for_the_poller(anyio_backend: Any) -> None:
    """The group cannot be entered, leaks nothing, and can be entered once file descriptors are available."""
    group = TransportGroup()
    for spare in (0, 1, 2):
        before = open_descriptors()
        with few_descriptors(spare):
            try:
                async with group:
                    break
            except OSError:
                gc.collect()
        assert open_descriptors() == before
    else:
        async with group:
            pass


# -- leaving normally -------------------------------------------------------------------------------------------------


async def test_leaving_normally_flushes_and_waits(anyio_backend: Any) -> None:
    """Everything arrives at peers that begin to read only once the block is being left; servers close first."""
    order: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: order.append(name)

    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        peers, sizes, received = [], [], []
        async with TransportGroup() as group:
            server = await group.create_server(Recorder, HOST, 0)
            (sock,) = server.sockets
            address = sock.getsockname()
            for _ in range(3):
                transport, _, peer = await stack.enter_async_context(
                    connected(group, Recorder(on_connection_lost=hook("connection_lost")), small=True)
                )
                sizes.append(fill(transport, 1 << 19))
                peers.append(peer)

            async def read() -> None:
                await until(lambda: not server.is_serving())
                with pytest.raises(ConnectionRefusedError):
                    Peer.connect(address)
                assert order == []
                received.extend([len(await peer.receive_all()) for peer in peers])

            tasks.start_soon(read)
        order.append("left")
    assert order == ["connection_lost"] * 3 + ["left"]
    assert received == sizes


async def test_leaving_normally_closes_both_ends_of_a_connection(anyio_backend: Any) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(echo())
        return made[-1]

    async with TransportGroup() as group:
        server = await group.create_server(factory, HOST, 0)
        transport, client = await group.create_connection(Recorder, *server.sockets[0].getsockname())
        transport.write(b"hello")
        await client.wait_received(5)
    assert [protocol.lost_with for protocol in (*made, client)] == [None, None]


async def test_a_task_that_fails_while_the_block_is_left_normally(anyio_backend: Any) -> None:
    """It ends a flush that would never finish."""

    async def fail() -> None:
        await other.wait_for("connection_lost")
        raise BoomError

    other, stuck = Recorder(), Recorder()
    async with AsyncExitStack() as peers:
        with raises_inside(BoomError) as caught:
            async with TransportGroup() as group:
                transport, _, _ = await peers.enter_async_context(connected(group, stuck, small=True))
                fill(transport, 1 << 20)
                await peers.enter_async_context(connected(group, other))
                group.start_soon(fail)
        assert len(caught) == 1
        assert other.lost_with is None
        assert stuck.lost_with is None


async def test_a_callback_that_raises_while_the_block_is_left_normally(anyio_backend: Any) -> None:
    """The connections that still flush go on flushing."""

    def fail(*_: Any) -> None:
        raise BoomError

    async with AsyncExitStack() as peers:
        tasks = await peers.enter_async_context(anyio.create_task_group())
        received = []
        failing, protocol = Recorder(on_resume_writing=fail), Recorder()
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            first, _, first_peer = await peers.enter_async_context(connected(group, failing, small=True))
            second, _, second_peer = await peers.enter_async_context(connected(group, protocol, small=True))
            fill(first, 1 << 20)
            size = fill(second, 1 << 20)

            async def read() -> None:
                await until(first.is_closing)
                await first_peer.gone()
                await failing.wait_for("connection_lost")
                received.append(len(await second_peer.receive_all()))

            tasks.start_soon(read)
        assert [type(context["exception"]) for context in contexts] == [BoomError]
        assert isinstance(failing.lost_with, BoomError)
        assert protocol.lost_with is None
        await until(lambda: received == [size])


async def test_a_deadline_bounds_the_flush(anyio_backend: Any) -> None:
    protocol = Recorder()
    async with AsyncExitStack() as peers:
        with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
            async with TransportGroup() as group:
                transport, _, _ = await peers.enter_async_context(connected(group, protocol, small=True))
                fill(transport, 1 << 20)
                await anyio.sleep(0.02)
                assert not protocol.lost
                scope.deadline = anyio.current_time() + 0.02
        assert scope.cancelled_caught
        assert protocol.lost_with is None


# -- leaving by an exception or a cancellation ------------------------------------------------------------------------


class LeavingError(Exception):
    """The exception of the block in these tests."""


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
        assert [protocol.lost_with for protocol in protocols] == [None] * 3
        assert protocols[1].count("resume_writing") == 0
        with pytest.raises(ConnectionRefusedError):
            Peer.connect(address)
        assert [await peer.receive() for peer in (made[0], made[2])] == [b"", b""]
        assert len(await made[1].receive_all()) < size


@either_way
async def test_leaving_early_while_a_close_still_flushes(anyio_backend: Any, how: str) -> None:
    protocol = Recorder()
    async with AsyncExitStack() as peers:
        async with left_by(how) as leave, TransportGroup() as group:
            transport, _, _ = await peers.enter_async_context(connected(group, protocol, small=True))
            fill(transport, 1 << 20)
            transport.close()
            await turns()
            assert not protocol.lost
            await leave()
        assert protocol.lost_with is None


@either_way
async def test_leaving_early_when_connection_lost_is_scheduled(anyio_backend: Any, how: str) -> None:
    """It keeps its exception, and comes once."""
    protocols = [Recorder() for _ in range(3)]
    async with AsyncExitStack() as peers:
        async with left_by(how) as leave, TransportGroup() as group:
            reset, _, peer = await peers.enter_async_context(connected(group, protocols[0]))
            closed, _, _ = await peers.enter_async_context(connected(group, protocols[1]))
            aborted, _, _ = await peers.enter_async_context(connected(group, protocols[2]))
            peer.reset()
            closed.close()
            aborted.abort()
            while not reset.is_closing():  # The group does not run in between.
                reset.write(b"x")
            assert [protocol.lost for protocol in protocols] == [False] * 3
            await leave()
        assert isinstance(protocols[0].lost_with, ConnectionError)
        assert [protocol.lost_with for protocol in protocols[1:]] == [None, None]


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
        assert protocol.lost_with is None


@either_way
async def test_connection_lost_that_raises_while_the_block_is_left(anyio_backend: Any, how: str) -> None:
    """Each error is reported, the other connections are lost in order, and the block ends as it would have."""

    def fail(*_: Any) -> None:
        raise BoomError

    protocols = [Recorder(on_connection_lost=fail) for _ in range(5)]
    async with AsyncExitStack() as peers:
        async with left_by(how) as leave, TransportGroup() as group:
            contexts = collect_contexts(group)
            for protocol in protocols:
                await peers.enter_async_context(connected(group, protocol))
            await leave()
        assert [protocol.count("connection_lost") for protocol in protocols] == [1] * 5
        assert [type(context["exception"]) for context in contexts] == [BoomError] * 5


@either_way
async def test_new_connections_are_refused_while_the_block_is_left(anyio_backend: Any, how: str) -> None:
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

    async with AsyncExitStack() as peers:
        async with left_by(how) as leave, TransportGroup() as group:
            assert not group.is_closing()
            other, _, _ = await peers.enter_async_context(connected(group))
            await peers.enter_async_context(connected(group, Recorder(on_connection_lost=reconnect)))
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


@either_way
@pytest.mark.parametrize("name", CALLS)
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
        options = {"ssl": Certificates(certificate_authority).client(), "server_hostname": NAME}
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


# -- leaving normally while a protocol connects again -----------------------------------------------------------------


@pytest.mark.parametrize("asks_first", [False, True])
@pytest.mark.parametrize("how", ["start_soon", "call_soon", "call_soon twice", "call_later", "TLS"])
async def test_g3_a_reconnecting_protocol_does_not_fail_a_normal_exit(
    anyio_backend: Any, how: str, asks_first: bool, certificate_authority: Any
) -> None:
    certificates = Certificates(certificate_authority)
    lost: list[bool] = []

    def connect_again(protocol: Recorder, exc: BaseException | None) -> None:
        lost.append(group.is_closing())
        if asks_first and group.is_closing():
            return
        if how == "call_soon":
            group.call_soon(group.start_soon, connect)
        elif how == "call_soon twice":
            group.call_soon(group.call_soon, group.start_soon, connect)
        elif how == "call_later":
            group.call_later(0, group.start_soon, connect)
        else:
            group.start_soon(connect)

    async def connect() -> None:
        options = {"ssl": certificates.client(), "server_hostname": NAME} if how == "TLS" else {}
        await group.create_connection(lambda: Recorder(on_connection_lost=connect_again), *address, **options)

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            server = await group.create_server(Recorder, HOST, 0, ssl=certificates.server() if how == "TLS" else None)
            (sock,) = server.sockets
            address = sock.getsockname()
            await connect()
    assert lost == [True]
    assert contexts == []


async def test_g3_the_refusal_of_a_task_is_logged(anyio_backend: Any) -> None:
    stack = Stack(anyio_backend[0])

    async def connect() -> None:
        await group.create_connection(Recorder, HOST, 1)

    with capture_log(stack) as records:
        async with TransportGroup() as group:
            group.call_soon(group.start_soon, connect)
    (record,) = records
    assert record.levelname == "INFO"
    assert "connect" in record.getMessage()
    assert "create_connection(): the group is not open any more" in record.getMessage()


async def test_g3_a_task_that_connects_in_a_task_group_of_its_own(anyio_backend: Any) -> None:
    done: list[int] = []

    async def connect() -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(group.create_connection, Recorder, HOST, 1)
            done.append(1)

    async with TransportGroup() as group:
        group.call_soon(group.start_soon, connect)
    assert done == [1]


@pytest.mark.parametrize("leaving", [False, True])
async def test_g3_another_groups_refusal_is_a_failure(anyio_backend: Any, leaving: bool) -> None:
    """Calling a group that has been left is a mistake of the task."""
    async with TransportGroup() as old:
        pass

    async def connect() -> None:
        await old.create_connection(Recorder, HOST, 1)

    with raises_inside(RuntimeError) as caught:
        async with TransportGroup() as group:
            group.start_soon(connect)
            if not leaving:
                await anyio.sleep_forever()
    assert len(caught) == 1


async def test_g3_a_task_that_fails_beside_a_refusal(anyio_backend: Any) -> None:
    async def fail() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(group.create_connection, Recorder, HOST, 1)
            raise BoomError

    with pytest.raises(BaseException) as caught:
        async with TransportGroup() as group:
            group.call_soon(group.start_soon, fail)
    assert BoomError in {type(leaf) for leaf in leaves(caught.value)}


async def test_g3_a_handshake_interrupted_by_the_end_of_the_block(
    anyio_backend: Any, certificate_authority: Any
) -> None:
    """As for a connection that is not made yet: the task gets a `RuntimeError`, and the block ends normally."""
    errors: list[BaseException] = []

    async def connect() -> None:
        options = {"ssl": Certificates(certificate_authority).client(), "server_hostname": NAME}
        try:
            await group.create_connection(Recorder, *listener.getsockname(), **options)
        except RuntimeError as exc:
            errors.append(exc)
            raise

    with listening() as listener, anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            group.start_soon(connect)
            while not group.statistics().pending_handshakes:
                await turns(1)
    (error,) = errors
    assert "not open any more" in str(error)
    errors.clear()


# -- waiting when no callbacks run any more
# ------------------------------------------------------------------------------


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
            assert {protocol.lost_with for protocol in protocols} == {None}
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
                lost_in_time = all(protocol.state in ("new", "lost") for protocol in made)
        assert lost_in_time
        assert open_descriptors() == before
        if not scope.cancelled_caught:
            break
    assert checkpoints > 5


# -- exceptions of the block
# --------------------------------------------------------------------------------------------


async def test_the_blocks_exception_comes_out_in_a_group(anyio_backend: Any) -> None:
    """As with any task group of AnyIO."""
    error = BoomError("the block's")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with TransportGroup():
            raise error
    assert isinstance(caught.value, Exception)
    assert caught.value.exceptions == (error,)


async def test_exceptions_of_the_block_and_of_a_task_come_out_together(anyio_backend: Any) -> None:
    async def fail() -> None:
        raise BoomError("the task's")

    with pytest.raises(BaseExceptionGroup) as caught:
        async with TransportGroup() as group:
            group.start_soon(fail)
            try:
                await anyio.sleep(GUARD)
            finally:
                raise BoomError("the block's")
    assert sorted(str(leaf) for leaf in leaves(caught.value)) == ["the block's", "the task's"]


async def test_an_exception_caught_inside_the_block_does_not_end_it(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
        try:
            raise BoomError
        except BoomError:
            pass
        assert await answers(peer)


async def test_a_time_out_around_the_group(anyio_backend: Any) -> None:
    protocol = Recorder()
    async with AsyncExitStack() as peers:
        with pytest.raises(TimeoutError):
            with anyio.fail_after(GUARD) as scope:
                async with TransportGroup() as group:
                    await peers.enter_async_context(connected(group, protocol))
                    scope.deadline = anyio.current_time() + 0.01
                    await anyio.sleep_forever()
        assert protocol.lost_with is None


# -- exceptions in callbacks ------------------------------------------------------------------------------------------


async def nothing(transport: Any, peer: Peer) -> None:
    pass


async def send(transport: Any, peer: Peer) -> None:
    await peer.send(b"x")


async def shut_down(transport: Any, peer: Peer) -> None:
    peer.shutdown()


async def clog(transport: Any, peer: Peer) -> None:
    transport.write(MUCH)


async def clog_and_drain(transport: Any, peer: Peer) -> None:
    transport.write(MUCH)
    await peer.gone()


async def close(transport: Any, peer: Peer) -> None:
    transport.close()


#: For each callback, a function that causes it, given the transport and its peer.
TRIGGERS: dict[str, Callable[[Any, Peer], Awaitable[object]]] = {
    "connection_made": nothing,
    "data_received": send,
    "get_buffer": send,
    "buffer_updated": send,
    "eof_received": shut_down,
    "pause_writing": clog,
    "resume_writing": clog_and_drain,
    "connection_lost": close,
}
#: For these callbacks asyncio behaves as we do.
FATAL_IN_ASYNCIO = ["data_received", "get_buffer", "buffer_updated", "eof_received"]


def recorder(callback: str, hook: Callable[..., Any]) -> Any:
    """Return a recorder of the kind that has the callback."""
    return (BufferedRecorder if "buffer" in callback else Recorder)(**{f"on_{callback}": hook})


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


async def fail_in(group: Any, callback: str) -> None:
    """A callback raises: its error is reported, and only its own connection ends."""
    error = BoomError(callback)
    contexts = collect_contexts(group)
    failing = recorder(callback, raiser(error))
    async with connected(group, echo(), small=True) as (other, _, other_peer):
        async with connected(group, failing, small=True) as (transport, _, peer):
            await TRIGGERS[callback](transport, peer)
            await failing.wait_for("connection_lost")
            assert transport.is_closing()
            assert await peer.gone()
        assert contexts == [
            {
                "message": f"Fatal error: protocol.{callback}() call failed.",
                "exception": error,
                "transport": transport,
                "protocol": failing,
            }
        ]
        assert failing.count(callback) == 1
        assert failing.names[-1] == "connection_lost"
        assert failing.lost_with is (None if callback == "connection_lost" else error)
        assert not other.is_closing()
        assert await answers(other_peer)
    # A connection that is made afterwards works too.
    async with connected(group, echo()) as (_, _, peer):
        assert await answers(peer)


@pytest.mark.parametrize("callback", FATAL_IN_ASYNCIO)
async def test_a_callback_that_raises_ends_its_connection_only(stack: Stack, callback: str) -> None:
    async with stack.open() as group:
        await fail_in(group, callback)


@pytest.mark.ours_only("asyncio reports these in other words, and lets the connection go on")
@pytest.mark.parametrize("callback", [name for name in TRIGGERS if name not in FATAL_IN_ASYNCIO])
async def test_any_other_callback_that_raises_ends_its_connection_only(stack: Stack, callback: str) -> None:
    async with stack.open() as group:
        await fail_in(group, callback)


@pytest.mark.parametrize("callback", TRIGGERS)
@pytest.mark.ours_only("asyncio has no rule for every callback")
async def test_an_accepted_connection_whose_callback_raises(stack: Stack, callback: str) -> None:
    """The server goes on accepting, and can be closed and waited for."""
    error = BoomError(callback)
    failing = recorder(callback, raiser(error))
    protocols = [failing, echo()]
    made = iter(protocols)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(lambda: next(made), HOST, 0)
        (sock,) = server.sockets
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        with Peer.connect(sock.getsockname(), receive_buffer=SMALL) as peer:
            await failing.wait_for("connection_made")
            await TRIGGERS[callback](failing.transport, peer)
            await failing.wait_for("connection_lost")
            assert await peer.gone()
        with Peer.connect(sock.getsockname()) as peer:
            assert await answers(peer)
        server.close()
        with anyio.fail_after(GUARD):
            await server.wait_closed()
        assert [(context["exception"], context["protocol"]) for context in contexts] == [(error, failing)]
        assert all(protocol.count("connection_lost") == 1 for protocol in protocols)


@pytest.mark.ours_only("asyncio leaves the socket to the garbage collector", before=(3, 14, 10))
async def test_a_factory_that_raises_fails_the_call_only(stack: Stack) -> None:
    """The endpoint function raises it, and the other connections go on."""
    async with stack.open() as group, connected(group, echo()) as (_, _, peer):
        contexts = collect_contexts(group)
        with listening() as listener:
            before = open_descriptors()
            with pytest.raises(BoomError):
                await group.create_connection(raiser(BoomError()), *listener.getsockname())
            assert open_descriptors() == before
        assert await answers(peer)
        assert contexts == []


@pytest.mark.ours_only("asyncio keeps a protocol without the method as long as the method is not needed, and after")
@pytest.mark.parametrize("callback", ["data_received", "eof_received", "pause_writing"])
async def test_a_protocol_that_lacks_a_callback(stack: Stack, callback: str) -> None:
    """It is reported as an error of that callback."""
    lost: list[Any] = []

    def connection_lost(self: Any, exc: Any) -> None:
        lost.append(exc)

    names = ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing"]
    methods: dict[str, Any] = {name: lambda *_: None for name in names if name != callback}
    protocol = type("Duck", (), {**methods, "connection_lost": connection_lost})()
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with connected(group, protocol, small=True) as (transport, _, peer):
            await TRIGGERS[callback](transport, peer)
            await until(lambda: lost)
        (context,) = contexts
        assert context["message"].startswith(f"Fatal error: protocol.{callback}() call failed. Duck has no method")
        assert isinstance(context["exception"], AttributeError)
        assert lost == [context["exception"]]


async def test_without_a_handler_the_error_is_logged(stack: Stack) -> None:
    error = BoomError("in data_received")
    protocol = Recorder(on_data_received=raiser(error))
    async with stack.open() as group, connected(group, protocol) as (_, _, peer):
        with capture_log(stack) as records:
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
        (record,) = [record for record in records if record.levelname == "ERROR"]
        assert record.exc_info is not None
        assert record.exc_info[1] is error
        assert "protocol.data_received() call failed" in record.getMessage()
        assert "protocol: " in record.getMessage()
        assert "transport: " in record.getMessage()


@pytest.mark.parametrize("callback", FATAL_IN_ASYNCIO)
async def test_a_handler_that_raises_changes_nothing_for_the_connections(stack: Stack, callback: str) -> None:
    error = BoomError("the callback's")
    failing = recorder(callback, raiser(error))
    async with stack.open() as group:
        group.set_exception_handler(raiser(LookupError("the handler's")))
        async with connected(group, echo()) as (_, _, other_peer):
            with capture_log(stack) as records:
                async with connected(group, failing, small=True) as (transport, _, peer):
                    await TRIGGERS[callback](transport, peer)
                    await failing.wait_for("connection_lost")
            assert failing.lost_with is error
            assert [record.exc_info[1].args for record in records if record.exc_info] == [("the handler's",)]
            assert await answers(other_peer)


@pytest.mark.ours_only("asyncio goes on with the connection")
async def test_write_returns_when_pause_writing_raises(stack: Stack) -> None:
    """The handler failed; the caller of `write` gets no exception."""
    protocol = Recorder(on_pause_writing=raiser(BoomError()))
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with connected(group, protocol, small=True) as (transport, _, _):
            for _ in range(3):
                transport.write(MUCH)
                assert transport.is_closing()
                assert transport.get_write_buffer_size() == 0
            await protocol.wait_for("connection_lost")
            assert len(contexts) == 1


# -- exceptions that end the group ------------------------------------------------------------------------------------

leaving_errors = pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])


@leaving_errors
@pytest.mark.parametrize("where", [*TRIGGERS, "factory", "handler", "call_soon", "call_later", "the block"])
def test_keyboard_interrupt_and_system_exit_propagate(anyio_backend: Any, where: str, error: Any) -> None:
    """Every protocol gets `connection_lost` once, also the one whose callback raised."""
    others = [Recorder() for _ in range(3)]
    protocols = list(others)
    at_the_end: list[int] = []

    async def main() -> None:
        async with AsyncExitStack() as peers:
            try:
                async with TransportGroup() as group:
                    for protocol in others:
                        transport, _, _ = await peers.enter_async_context(connected(group, protocol, small=True))
                    fill(transport, 1 << 17)
                    await raise_it(group, peers)
                    await anyio.sleep(GUARD)
            finally:
                at_the_end.extend(protocol.count("connection_lost") for protocol in protocols)

    async def raise_it(group: TransportGroup, peers: AsyncExitStack) -> None:
        fail = raiser(error())
        if where == "the block":
            fail()
        elif where == "call_soon":
            group.call_soon(fail)
        elif where == "call_later":
            group.call_later(0, fail)
        elif where == "handler":
            group.set_exception_handler(fail)
            group.call_soon(raiser(BoomError()))
        elif where == "factory":
            server = await group.create_server(fail, HOST, 0)
            peers.enter_context(Peer.connect(server.sockets[0].getsockname()))
        else:
            protocol = recorder(where, fail)
            protocols.append(protocol)
            transport, _, peer = await peers.enter_async_context(connected(group, protocol, small=True))
            await TRIGGERS[where](transport, peer)

    with raises_inside(error) as caught:
        run(anyio_backend, main)
    assert len(caught) == 1
    assert at_the_end == [1] * len(protocols)


@leaving_errors
@pytest.mark.parametrize("how", ["normally", "by an exception"])
def test_system_exit_from_connection_lost_while_the_block_is_left(anyio_backend: Any, how: str, error: Any) -> None:
    """Raised in one `connection_lost`: those of the other connections still come."""
    protocols = [Recorder(), Recorder(on_connection_lost=raiser(error())), Recorder()]
    at_the_end: list[int] = []

    async def main() -> None:
        async with AsyncExitStack() as peers:
            try:
                async with TransportGroup() as group:
                    for protocol in protocols:
                        await peers.enter_async_context(connected(group, protocol))
                    if how == "by an exception":
                        raise BoomError
            finally:
                at_the_end.extend(protocol.count("connection_lost") for protocol in protocols)

    with raises_inside(error) as caught:
        run(anyio_backend, main)
    assert len(caught) == 1
    assert at_the_end == [1] * 3


@pytest.mark.parametrize("where", ["the block", "data_received", "while leaving"])
def test_ctrl_c_with_a_real_signal(anyio_backend: Any, where: str) -> None:
    """A real signal, at an arbitrary moment."""
    protocols = [Recorder() for _ in range(3)]
    at_the_end: list[int] = []

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    async def interrupt_while_leaving(transport: Any) -> None:
        await until(transport.is_closing)
        interrupt()

    async def main() -> None:
        async with AsyncExitStack() as peers:
            try:
                async with TransportGroup() as group:
                    for protocol in protocols:
                        transport, _, peer = await peers.enter_async_context(connected(group, protocol, small=True))
                    if where == "the block":
                        interrupt()
                    elif where == "data_received":
                        protocol.hooks["data_received"] = interrupt
                        await peer.send(b"x")
                    else:
                        fill(transport, 1 << 20)
                        group.start_soon(interrupt_while_leaving, transport)
                        return
                    await anyio.sleep(GUARD)
            finally:
                at_the_end.extend(protocol.count("connection_lost") for protocol in protocols)

    # On asyncio of Python 3.10, AnyIO raises the cancellation by which it interrupts the main task.
    told_by = (
        asyncio.CancelledError if anyio_backend[0] == "asyncio" and sys.version_info < (3, 11) else KeyboardInterrupt
    )
    with raises_inside(told_by):
        run(anyio_backend, main)
    assert at_the_end == [1] * 3


def test_a_cancellation_that_a_callback_raises_ends_the_group(anyio_backend: Any) -> None:
    """As from `result()` of a cancelled future on asyncio; trio's cannot be created by users."""
    if anyio_backend[0] == "trio":
        pytest.skip("a trio.Cancelled cannot be made")
    protocols = [Recorder(), Recorder(on_data_received=raiser(asyncio.CancelledError()))]

    async def main() -> None:
        async with AsyncExitStack() as peers:
            contexts: list[Any] = []
            async with TransportGroup() as group:
                contexts = collect_contexts(group)
                for protocol in protocols:
                    _, _, peer = await peers.enter_async_context(connected(group, protocol))
                await peer.send(b"x")
                await anyio.sleep(GUARD)
                pytest.fail("the block was not cancelled")
            assert [protocol.lost_with for protocol in protocols] == [None, None]
            assert contexts == []

    run(anyio_backend, main)


# -- the current group ------------------------------------------------------------------------------------------------


async def test_the_current_group(anyio_backend: Any) -> None:
    """The innermost block has the current group; outside the current group is `None`."""
    with pytest.raises(RuntimeError, match="no transport group is current"):
        current_group()
    async with TransportGroup() as outer:
        assert current_group() is outer
        async with TransportGroup() as inner:
            assert current_group() is inner
        assert current_group() is outer
        with raises_inside(BoomError):
            async with TransportGroup():
                raise BoomError
        assert current_group() is outer
    with pytest.raises(RuntimeError, match="no transport group is current"):
        current_group()


async def test_a_callback_belongs_to_the_group_of_its_connection(anyio_backend: Any) -> None:
    """Whatever group is current where the connection is made, or where its transport is used."""
    seen: list[Any] = []

    def note(*_: Any) -> None:
        seen.append(current_group())

    async with TransportGroup() as outer, AsyncExitStack() as peers:
        protocol = Recorder(
            on_connection_made=note,
            on_data_received=note,
            on_pause_writing=note,
            on_resume_writing=note,
            on_eof_received=note,
            on_connection_lost=note,
        )
        async with TransportGroup() as inner:
            assert current_group() is inner
            transport, _, peer = await peers.enter_async_context(connected(outer, protocol, small=True))
            outer.call_soon(note)
            outer.call_later(0, note)
            transport.write(MUCH)
            assert current_group() is inner
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
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(note)
    assert sorted(map(id, seen)) == sorted(map(id, [outer, inner, inner]))


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
        assert current_group() is inner
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


# -- context variables ------------------------------------------------------------------------------------------------

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


@pytest.mark.ours_only("asyncio makes a copy anew for each kind of event", before=(3, 15))
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


@pytest.mark.ours_only("asyncio makes a copy anew for each kind of event, and none for these callbacks")
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


# -- epoll refuses a file descriptor
# ------------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the system's limit is one of epoll's")


@contextmanager
def nothing_more_is_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when this user's programs watch as many descriptors as they may: `max_user_watches` in epoll(7).

    Reaching the real limit would take it from every other program.
    """

    def add(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(transports_anyio._selector.EpollSelector, "add", add)
        yield


@linux_only
@pytest.mark.ours_only("asyncio reports it, and leaves the connection to the garbage collector")
@pytest.mark.parametrize("tls", [False, True])
async def test_epoll_refuses_an_accepted_connection(stack: Stack, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends this connection, but not the group, the server or its other clients."""
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(echo())
        return made[-1]

    certificates = Certificates(trustme.CA())
    async with stack.open() as group, AsyncExitStack() as peers:
        contexts = collect_contexts(group)
        server = await group.create_server(factory, HOST, 0, ssl=certificates.server() if tls else None)
        address = server.sockets[0].getsockname()

        async def connect() -> Peer:
            peer = await TLSPeer.connect_to(address, certificates.client()) if tls else Peer.connect(address)
            return peers.enter_context(peer)

        first = await connect()
        assert await answers(first)
        with nothing_more_is_watched(monkeypatch):
            with Peer.connect(address) as peer:
                assert await peer.gone()
        await until(lambda: contexts)
        (context,) = contexts
        assert context["message"] == "Error on transport creation for incoming connection"
        assert context["exception"].errno == errno.ENOSPC
        second = await connect()
        assert await answers(second)
        assert await answers(first)
        lost = [protocol for protocol in made if protocol.lost]
        # Over TLS there is no protocol before the handshake.
        assert [type(protocol.lost_with) for protocol in lost] == ([] if tls else [OSError])
        assert len(made) == (2 if tls else 3)
        server.close()


async def connect_to(address: Any, group: Any, protocol: Recorder) -> Any:
    return await group.create_connection(lambda: protocol, *address)


async def connect_to_with_tls(address: Any, group: Any, protocol: Recorder) -> Any:
    return await group.create_connection(
        lambda: protocol, *address, ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), server_hostname="name"
    )


async def listen(address: Any, group: Any, protocol: Recorder) -> Any:
    return await group.create_server(lambda: protocol, HOST, 0)


async def make_an_endpoint(address: Any, group: Any, protocol: Recorder) -> Any:
    return await group.create_datagram_endpoint(lambda: protocol, local_addr=(HOST, 0))


async def read_from_a_pipe(address: Any, group: Any, protocol: Recorder) -> Any:
    reading, writing = os.pipe()
    with open(writing, "wb", 0):
        return await group.connect_read_pipe(lambda: protocol, open(reading, "rb", 0))


async def write_to_a_pipe(address: Any, group: Any, protocol: Recorder) -> Any:
    reading, writing = os.pipe()
    with open(reading, "rb", 0):
        return await group.connect_write_pipe(lambda: protocol, open(writing, "wb", 0))


@linux_only
@pytest.mark.parametrize(
    "make",
    [connect_to, connect_to_with_tls, listen, make_an_endpoint, read_from_a_pipe, write_to_a_pipe],
)
async def test_epoll_refuses_the_connection_of_an_endpoint_function(
    anyio_backend: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call raises, nothing is left open, and the group goes on."""
    async with TransportGroup() as group, connected(group, echo()) as (_, _, other):
        contexts = collect_contexts(group)
        protocol = Recorder()
        with listening() as listener:
            before = open_descriptors()
            with nothing_more_is_watched(monkeypatch), pytest.raises(OSError) as caught:
                await make(listener.getsockname(), group, protocol)
            assert caught.value.errno == errno.ENOSPC
            await until(lambda: open_descriptors() == before)
        if protocol.calls:
            await protocol.wait_for("connection_lost")
            assert protocol.names == ["connection_made", "connection_lost"]
            assert protocol.lost_with is caught.value
        assert sum(group.statistics().open_transports.values()) == 1
        assert contexts == []
        assert await answers(other)


# -- no reference cycle of an ended connection
# ----------------------------------------------------------------------------------


class Keeper(asyncio.Protocol, asyncio.DatagramProtocol, asyncio.SubprocessProtocol):
    """Like most protocols, it keeps its transport and never deletes it."""

    # Recorders would be kept alive for the checks after the test.
    made: ClassVar[list[weakref.ref[Keeper]]] = []
    lost: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.made.append(weakref.ref(self))

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.append(repr(exc))  # Not the exception: its traceback refers to the protocol.


class FailingKeeper(Keeper):
    def data_received(self, data: bytes) -> None:
        raise BoomError


async def live_over_tcp(group: Any, kind: type[Keeper] = Keeper, **tls: Any) -> None:
    server_tls = {"ssl": tls.pop("server")} if tls else {}
    server = await group.create_server(Keeper, HOST, 0, **server_tls)
    transport, _ = await group.create_connection(kind, *server.sockets[0].getsockname(), **tls)
    transport.write(b"x")
    await until(lambda: len(Keeper.made) == 2)
    await turns()
    transport.close()
    server.close()


async def live_and_fail(group: Any) -> None:
    with listening() as listener:
        await group.create_connection(FailingKeeper, *listener.getsockname())
        with Peer(listener.accept()[0]) as peer:
            await peer.send(b"x")
            await peer.gone()


async def live_over_tls(group: Any) -> None:
    certificates = Certificates(trustme.CA())
    await live_over_tcp(
        group, server=certificates.server(), ssl=certificates.client(), server_hostname=tls_support.NAME
    )


async def live_through_an_upgrade(group: Any) -> None:
    certificates = Certificates(trustme.CA())
    ends = [
        {"sslcontext": certificates.client(), "server_hostname": tls_support.NAME},
        {"sslcontext": certificates.server(), "server_side": True},
    ]
    for new_one_is_kept in (False, True):

        async def upgrade(sock: socket.socket, options: Any, new_one_is_kept: bool = new_one_is_kept) -> None:
            transport, protocol = await group.create_connection(Keeper, sock=sock)
            upgraded = await group.start_tls(transport, protocol, options.pop("sslcontext"), **options)
            if new_one_is_kept:
                protocol.transport = upgraded
            upgraded.close()

        async with anyio.create_task_group() as tasks:
            for sock, options in zip(socket.socketpair(), ends, strict=True):
                tasks.start_soon(upgrade, sock, dict(options))


async def live_as_an_endpoint(group: Any) -> None:
    transport, _ = await group.create_datagram_endpoint(Keeper, local_addr=(HOST, 0))
    transport.sendto(b"x", transport.get_extra_info("sockname"))
    transport.close()


async def live_on_pipes(group: Any) -> None:
    reading, writing = os.pipe()
    reader, _ = await group.connect_read_pipe(Keeper, open(reading, "rb", 0))
    writer, _ = await group.connect_write_pipe(Keeper, open(writing, "wb", 0))
    reader.close()
    writer.close()


async def live_with_a_child(group: Any) -> None:
    transport, _ = await group.subprocess_exec(Keeper, "cat")
    transport.get_pipe_transport(0).write(b"x")
    transport.get_pipe_transport(0).close()
    await until(lambda: transport.get_returncode() is not None)
    transport.close()


async def live_on_a_stream(group: Any) -> None:
    with listening() as listener:
        stream = await anyio.connect_tcp(*listener.getsockname())
    transport, _ = await group.connect_stream(Keeper, stream)
    transport.close()


async def live_on_anyios_datagrams(group: Any) -> None:
    transport, _ = await group.connect_datagram_socket(Keeper, await anyio.create_udp_socket(local_host=HOST))
    transport.close()


async def live_in_memory(group: Any) -> None:
    (transport, _), _ = await memory_connection(group, Keeper, Keeper)
    transport.write(b"x")
    transport.close()


LIVES = [
    live_over_tcp, live_and_fail, live_over_tls, live_through_an_upgrade, live_as_an_endpoint, live_on_pipes,
    live_with_a_child,
]  # fmt: skip
OUR_LIVES = [live_on_a_stream, live_on_anyios_datagrams, live_in_memory]


async def leaves_nothing_to_collect(group: Any, live: Callable[[Any], Awaitable[None]]) -> None:
    Keeper.made.clear()
    Keeper.lost.clear()
    group.set_exception_handler(lambda *_: None)
    gc.collect()
    gc.disable()
    try:
        await live(group)
        await until(lambda: len(Keeper.lost) == len(Keeper.made))
        await turns()
        assert Keeper.made
        assert [reference() for reference in Keeper.made] == [None] * len(Keeper.made)
    finally:
        gc.enable()
    group.set_exception_handler(None)


@pytest.mark.parametrize("live", LIVES)
async def test_an_ended_connection_leaves_no_reference_cycle(stack: Stack, live: Any) -> None:
    """The objects that a protocol holds, a large message say, are freed at once: the garbage collector may run much
    later."""
    async with stack.open() as group:
        # Use the loop itself: the oracle's group keeps what it made until the end of the test.
        await leaves_nothing_to_collect(group.loop if stack.is_oracle else group, live)


@pytest.mark.ours_only("asyncio has no such connections")
@pytest.mark.parametrize("live", OUR_LIVES)
async def test_an_ended_connection_of_any_kind_leaves_no_reference_cycle(stack: Stack, live: Any) -> None:
    async with stack.open() as group:
        await leaves_nothing_to_collect(group, live)


async def test_an_ended_transport_has_no_protocol(stack: Stack) -> None:
    seen: list[Any] = []
    async with stack.open() as group:
        protocol = Recorder(on_connection_lost=lambda self, _: seen.append(self.transport.get_protocol()))
        async with connected(group, protocol) as (transport, _, _):
            transport.close()
            assert transport.get_protocol() is protocol
            await protocol.wait_for("connection_lost")
            await turns()
            assert transport.get_protocol() is None
    assert seen == [protocol]


@pytest.mark.ours_only("asyncio leaves the socket to the garbage collector")
async def test_a_handshake_that_cannot_begin_leaves_no_reference_cycle(stack: Stack) -> None:
    """Its fd is forgotten too, since the system may reuse it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    async with stack.open() as group:
        for name in (".no.name", "no\0name"):
            before = open_descriptors()
            with listening() as listener:
                with pytest.raises((ValueError, TypeError)):
                    await group.create_connection(Recorder, *listener.getsockname(), ssl=context, server_hostname=name)
            assert open_descriptors() == before
            for sock in socket.socketpair():
                transport, _ = await group.create_connection(Recorder, sock=sock)
                transport.abort()
            await group.wait_closed()


# -- wait_closed ------------------------------------------------------------------------------------------------------


async def test_wait_closed_waits_for_every_transport(anyio_backend: Any) -> None:
    """It also waits for transports that are made during the wait, but not for servers."""
    order: list[str] = []
    async with anyio.create_task_group() as tasks, AsyncExitStack() as peers, TransportGroup() as group:
        with anyio.fail_after(GUARD):
            await group.wait_closed()  # There is no transport yet.

        async def wait() -> None:
            await group.wait_closed()
            order.append("closed")

        def protocol(name: str) -> Recorder:
            return Recorder(on_connection_lost=lambda *_: order.append(name))

        server = await group.create_server(Recorder, HOST, 0)
        first, _, _ = await peers.enter_async_context(connected(group, protocol("first")))
        second, _, _ = await peers.enter_async_context(connected(group, protocol("second")))
        for _ in range(2):
            tasks.start_soon(wait)
        await turns()
        third, _, _ = await peers.enter_async_context(connected(group, protocol("third")))
        for number, transport in enumerate((first, third, second), 1):
            assert "closed" not in order
            transport.close()
            await until(lambda number=number: len(order) >= number)  # type: ignore[misc]
        await until(lambda: len(order) == 5)
        assert order == ["first", "third", "second", "closed", "closed"]
        assert server.is_serving()


async def test_wait_closed_can_be_cancelled(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
        with anyio.move_on_after(0.01) as scope:
            await group.wait_closed()
        assert scope.cancelled_caught
        assert await answers(peer)
    async with TransportGroup() as group:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await group.wait_closed()  # There is nothing to wait for, but it is a checkpoint.
        assert scope.cancelled_caught


async def test_wait_closed_ends_with_the_last_connection_lost(anyio_backend: Any) -> None:
    """Its file descriptor is closed by then."""
    async with TransportGroup() as group:
        before = open_descriptors()
        with listening() as listener:
            transport, protocol = await group.create_connection(Recorder, *listener.getsockname())
            transport.close()
            assert not protocol.lost
            with anyio.fail_after(GUARD):
                await group.wait_closed()
            assert protocol.lost
        assert open_descriptors() == before


# -- groups in groups -------------------------------------------------------------------------------------------------


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


async def test_cancelling_the_outer_group_ends_the_inner_one_first(anyio_backend: Any) -> None:
    order: list[str] = []

    def protocol(name: str) -> Recorder:
        return Recorder(on_connection_lost=lambda *_: order.append(name))

    async with AsyncExitStack() as peers:
        with anyio.CancelScope() as scope:
            async with TransportGroup() as outer:
                await peers.enter_async_context(connected(outer, protocol("outer")))
                async with TransportGroup() as inner:
                    transport, _, _ = await peers.enter_async_context(connected(inner, protocol("inner"), small=True))
                    fill(transport, 1 << 20)
                    scope.cancel()
                    await anyio.sleep_forever()
        assert order == ["inner", "outer"]


async def test_an_error_of_the_inner_group_propagates_to_the_outer_one(anyio_backend: Any) -> None:
    protocols = [Recorder(), Recorder()]
    async with AsyncExitStack() as peers:
        with raises_inside(BoomError) as caught:
            async with TransportGroup() as outer:
                await peers.enter_async_context(connected(outer, protocols[0]))
                async with TransportGroup() as inner:
                    await peers.enter_async_context(connected(inner, protocols[1]))
                    raise BoomError
        assert len(caught) == 1
        assert [protocol.lost_with for protocol in protocols] == [None, None]


async def test_a_group_in_a_task_of_a_group(anyio_backend: Any) -> None:
    """It is cancelled with the task when the outer group is."""
    protocol = Recorder()
    async with AsyncExitStack() as peers:

        async def task() -> None:
            async with TransportGroup() as inner:
                await peers.enter_async_context(connected(inner, protocol))
                await anyio.sleep_forever()

        with anyio.CancelScope() as scope:
            async with TransportGroup() as outer:
                outer.start_soon(task)
                await protocol.wait_for("connection_made")
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert protocol.lost_with is None


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


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["normally", "exception", "cancellation"])
async def test_no_task_fd_or_object_is_left(anyio_backend: Any, how: str) -> None:
    """When the block has been left, no task, no file descriptor and no object remains."""

    class Plain(Protocol):
        """A protocol that keeps nothing."""

    def make() -> Plain:
        protocol = Plain()
        remembered.append(weakref.ref(protocol))
        return protocol

    async def use() -> None:
        async with TransportGroup() as group:
            remembered.append(weakref.ref(group))
            server = await group.create_server(make, HOST, 0)
            transport, _ = await group.create_connection(make, *server.sockets[0].getsockname())
            remembered.append(weakref.ref(transport))
            remembered.append(weakref.ref(server))
            group.call_later(1000, make)
            await until(lambda: len(remembered) == 5)
            if how == "exception":
                raise LeavingError
            if how == "cancellation":
                scope.cancel()
                await anyio.lowlevel.checkpoint()

    remembered: list[Any] = []
    tasks = {task.id for task in anyio.get_running_tasks()}
    before = open_descriptors()
    with anyio.CancelScope() as scope:
        try:
            await use()
        except BaseException as error:
            if how == "normally" or not all(
                isinstance(leaf, (LeavingError, anyio.get_cancelled_exc_class())) for leaf in leaves(error)
            ):
                raise
            if how == "cancellation":
                raise
    assert open_descriptors() == before
    assert {task.id for task in anyio.get_running_tasks()} == tasks
    await turns()
    gc.collect()
    assert [reference() for reference in remembered] == [None] * 5
