"""The `Server` object: its states, the ways to end it, its clients, and errors of the accept loop."""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from network import Echo, linux_only
from support import (
    GUARD,
    HOST,
    SMALL,
    Peer,
    Recorder,
    Stack,
    collect_contexts,
    connected,
    fill,
    raises_inside,
    settle,
    turns,
    until,
)

from transports_anyio import Server, TransportGroup, TransportSocket

pytestmark = pytest.mark.anyio


class Made(list[Any]):
    """A protocol factory that keeps the protocols it made."""

    def __init__(self, make: Callable[[], Any] = Echo) -> None:
        super().__init__()
        self.make = make

    def __call__(self) -> Any:
        self.append(self.make())
        return self[-1]

    async def wait_connected(self, count: int = 1) -> None:
        await until(lambda: sum(protocol.transport is not None for protocol in self) >= count)


def address(server: Any) -> Any:
    return server.sockets[0].getsockname()


async def answers(peer: Peer) -> bool:
    await peer.send(b"are you there?")
    return await peer.receive_exactly(14) == b"are you there?"


def refuses(where: Any) -> bool:
    try:
        Peer.connect(where).close()
    except ConnectionRefusedError:
        return True
    return False


class Waiter:
    """A task that waits for a method of the server, and its result."""

    def __init__(self, tasks: Any, wait: Callable[[], Any]) -> None:
        self.ended = anyio.Event()
        self.error: BaseException | None = None
        self.scope = anyio.CancelScope()
        tasks.start_soon(self._run, wait)

    async def _run(self, wait: Callable[[], Any]) -> None:
        with self.scope:
            try:
                await wait()
            except RuntimeError as error:
                self.error = error
        self.ended.set()

    @property
    def done(self) -> bool:
        return self.ended.is_set()

    async def finish(self) -> None:
        with anyio.fail_after(GUARD):
            await self.ended.wait()


# -- what it is -------------------------------------------------------------------------------------------------------


async def test_a_server_is_one_of_asyncios(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0)
        assert isinstance(server, asyncio.AbstractServer)
        if not stack.is_oracle:
            assert isinstance(server, Server)
        server.close()


async def test_the_sockets_of_a_server_cannot_do_io(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0)
        assert isinstance(server.sockets, tuple)
        (sock,) = server.sockets
        assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
        assert sock.getsockname()[0] == HOST
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert sock.fileno() >= 0
        assert type(sock) is TransportSocket
        server.close()
        assert server.sockets == ()
        assert sock.fileno() == -1


async def test_repr_of_a_server(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Echo, HOST, 0, start_serving=False)
        names = [sock.getsockname() for sock in server.sockets]
        assert repr(server) == f"<Server not serving on {names} connections=0 buffered=0>"
        await server.start_serving()
        with Peer.connect(names[0]) as peer:
            assert await answers(peer)
            assert repr(server) == f"<Server serving on {names} connections=1 buffered=0>"
            server.close()
            assert repr(server) == f"<Server closed on {names} connections=1 buffered=0>"


@pytest.mark.differs(
    "`Server.get_loop` on trio",
    asyncio="the running loop",
    here="`RuntimeError`",
    why="a group on trio has no event loop",
)
async def test_the_event_loop_of_a_server(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0)
        if stack.name == "trio":
            with pytest.raises(RuntimeError, match=r"current_group\(\)"):
                server.get_loop()
        else:
            assert server.get_loop() is asyncio.get_running_loop()
        server.close()


# -- serving ----------------------------------------------------------------------------------------------------------


async def test_the_states_of_a_server(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0, start_serving=False)
        where = address(server)
        assert not server.is_serving()
        assert refuses(where)
        for _ in range(2):  # Once more does nothing.
            await server.start_serving()
            assert server.is_serving()
        with Peer.connect(where) as peer:
            assert await answers(peer)
        for _ in range(2):
            server.close()
            assert not server.is_serving()
            assert server.sockets == ()
            assert refuses(where)


@pytest.mark.differs(
    "`start_serving` after `close`",
    asyncio="`TypeError` from inside asyncio",
    here="`RuntimeError`",
    why="as `serve_forever`",
)
@pytest.mark.ours_only
async def test_start_serving_after_close(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0)
        server.close()
        with pytest.raises(RuntimeError, match="is closed"):
            await server.start_serving()
        assert not server.is_serving()


@pytest.mark.parametrize("start_serving", [False, True])
async def test_serve_forever_serves_until_it_is_cancelled(stack: Stack, start_serving: bool) -> None:
    """Cancelling it closes the server and its connections."""
    stack.needs_python(3, 14, why="it leaves the connections open")
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(Echo, HOST, 0, start_serving=start_serving)
        where = address(server)
        forever = Waiter(tasks, server.serve_forever)
        await until(server.is_serving)
        with Peer.connect(where) as peer:
            assert await answers(peer)
            assert not forever.done
            forever.scope.cancel()
            await forever.finish()
            assert forever.scope.cancelled_caught
            assert not server.is_serving()
            assert refuses(where)
            assert await peer.receive() == b""


async def test_serve_forever_after_close(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0)
        server.close()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="is closed"):
                await server.serve_forever()
        assert not server.is_serving()


async def test_serve_forever_after_one_that_was_cancelled(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await server.serve_forever()
        assert scope.cancelled_caught
        with pytest.raises(RuntimeError, match="is closed"):
            await server.serve_forever()


async def test_two_concurrent_serve_forever_calls(stack: Stack) -> None:
    """The second is refused, and the first goes on."""
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(Echo, HOST, 0)
        forever = Waiter(tasks, server.serve_forever)
        await turns()
        with pytest.raises(RuntimeError, match="already being awaited"):
            await server.serve_forever()
        assert not forever.done
        assert server.is_serving()
        with Peer.connect(address(server)) as peer:
            assert await answers(peer)
        forever.scope.cancel()


@pytest.mark.differs(
    "`serve_forever` when the server is closed from elsewhere",
    asyncio="since 3.14 closes the clients, waits for them, and raises `CancelledError`",
    here="returns, and the clients stay",
    why="the task was not cancelled, and the documentation of `close` says that clients stay open",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("by", ["task", "connection_made", "data_received", "connection_lost", "call_soon"])
async def test_serve_forever_returns_when_the_server_is_closed(stack: Stack, by: str) -> None:
    made = Made(lambda: Recorder(**({} if by in ("task", "call_soon") else {f"on_{by}": lambda *_: server.close()})))
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(made, HOST, 0, start_serving=False)
        forever = Waiter(tasks, server.serve_forever)
        await until(server.is_serving)
        with Peer.connect(address(server)) as peer:
            await made.wait_connected()
            if by == "task":
                server.close()
            elif by == "call_soon":
                group.call_soon(server.close)
            elif by == "data_received":
                await peer.send(b"x")
            elif by == "connection_lost":
                peer.close()
            await forever.finish()
            assert forever.error is None
            assert not forever.scope.cancelled_caught
            assert not server.is_serving()
            assert made[0].lost == (by == "connection_lost")


async def test_a_server_outlives_the_task_that_made_it(stack: Stack) -> None:
    servers: list[Any] = []
    async with stack.open() as group:

        async def serve() -> None:
            servers.append(await group.create_server(Echo, HOST, 0))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
        (server,) = servers
        with Peer.connect(address(server)) as peer:
            assert await answers(peer)
        server.close()


async def test_several_servers_of_one_group(stack: Stack) -> None:
    """Closing one server and its clients does not affect the others."""
    async with stack.open() as group, AsyncExitStack() as peers:
        stack.needs_python(3, 13, why="there is no abort_clients")
        servers = [await group.create_server(Echo, HOST, 0) for _ in range(3)]
        clients = [peers.enter_context(Peer.connect(address(server))) for server in servers]
        _, _, outgoing = await peers.enter_async_context(connected(group, Echo()))
        assert all([await answers(peer) for peer in (*clients, outgoing)])
        servers[1].close()
        servers[1].abort_clients()
        assert await clients[1].gone()
        with anyio.fail_after(GUARD):
            await servers[1].wait_closed()
        assert [server.is_serving() for server in servers] == [True, False, True]
        assert all([await answers(peer) for peer in (clients[0], clients[2], outgoing)])
        for server in servers:
            server.close()


# -- closing ----------------------------------------------------------------------------------------------------------


async def test_close_leaves_the_connections_open(stack: Stack) -> None:
    made = Made()
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        where = address(server)
        with Peer.connect(where) as first, Peer.connect(where) as second:
            await made.wait_connected(2)
            server.close()
            server.close()
            assert refuses(where)
            assert await answers(first)
            second.shutdown()
            assert await second.receive() == b""
            assert await answers(first)
        assert len(made) == 2


CALLBACKS = ["connection_made", "data_received", "eof_received", "connection_lost"]


@pytest.mark.parametrize("callback", CALLBACKS)
async def test_closing_the_server_in_a_callback(stack: Stack, callback: str) -> None:
    made = Made(lambda: Recorder(**{f"on_{callback}": lambda *_: server.close()}))
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        where = address(server)
        with Peer.connect(where) as peer:
            await peer.send(b"x")
            peer.shutdown()
            assert await peer.receive() == b""
        assert refuses(where)
        with anyio.fail_after(GUARD):
            await server.wait_closed()
        (protocol,) = made
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]


async def test_closing_resets_clients_waiting_to_be_accepted(stack: Stack) -> None:
    async with stack.open() as group:
        made = Made()
        server = await group.create_server(made, HOST, 0)
        with ExitStack() as peers:
            # The kernel has completed their connections; the group has not run yet.
            clients = [peers.enter_context(Peer.connect(address(server))) for _ in range(5)]
            server.close()
            for peer in clients:
                assert await peer.gone()
        assert made == []


# -- ending the clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_s2_ending_the_clients_of_a_server_that_goes_on(stack: Stack, how: str) -> None:
    stack.needs_python(3, 13, why=f"there is no {how}")
    made = Made()
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        getattr(server, how)()  # No client has been accepted yet.
        for number in range(1, 4):
            with ExitStack() as peers:
                clients = [peers.enter_context(Peer.connect(address(server))) for _ in range(10)]
                await made.wait_connected(10 * number)
                getattr(server, how)()
                getattr(server, how)()
                assert all(protocol.transport.is_closing() for protocol in made)
                for peer in clients:
                    assert await peer.gone()
            await until(lambda: all(protocol.lost for protocol in made))
            assert server.is_serving()
        server.close()
        getattr(server, how)()
        with anyio.fail_after(GUARD):
            await server.wait_closed()


async def test_s2_close_clients_flushes_and_abort_clients_does_not(stack: Stack) -> None:
    stack.needs_python(3, 13, why="there is no close_clients")
    made = Made(Recorder)
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(made, HOST, 0)
        (sock,) = server.sockets
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)  # Inherited by what is accepted.
        with ExitStack() as peers:
            clients = [peers.enter_context(Peer.connect(sock.getsockname(), receive_buffer=SMALL)) for _ in range(2)]
            await made.wait_connected(2)
            # The kernel decides which of the two was accepted first.
            by_name = {protocol.transport.get_extra_info("peername"): protocol for protocol in made}
            reader, silent = (by_name[peer.socket.getsockname()] for peer in clients)
            size = fill(reader.transport, 1 << 19)
            fill(silent.transport, 1 << 19)
            server.close()
            server.close_clients()
            waiter = Waiter(tasks, server.wait_closed)
            assert len(await clients[0].receive_all()) == size
            await reader.wait_for("connection_lost")
            await settle(group)
            assert not silent.lost
            assert not waiter.done
            server.abort_clients()
            await waiter.finish()
            assert [reader.exception, silent.exception] == [None, None]


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_s2_ending_the_clients_in_a_callback(stack: Stack, callback: str, how: str) -> None:
    """The connection that calls it is among them."""
    stack.needs_python(3, 13, why=f"there is no {how}")
    made = Made(lambda: Recorder(**({f"on_{callback}": lambda *_: getattr(server, how)()} if len(made) == 2 else {})))
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        with ExitStack() as peers:
            for number in (1, 2, 3):
                peer = peers.enter_context(Peer.connect(address(server)))
                await made.wait_connected(number)
            if callback == "data_received":
                await peer.send(b"x")
            else:
                peer.shutdown()
            await until(lambda: all(protocol.lost for protocol in made))
        server.close()


# -- wait_closed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(["close", "wait", "one", "two"])), ids=" ".join)
async def test_s1_wait_closed_in_every_order(stack: Stack, order: tuple[str, ...]) -> None:
    """It returns when the server is closed and both clients are gone, not before."""
    stack.needs_python(3, 12, 1, why="wait_closed returns too early: CPython 79033")
    made = Made()
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(made, HOST, 0)
        with Peer.connect(address(server)) as one, Peer.connect(address(server)) as two:
            await made.wait_connected(2)
            by_name = {protocol.transport.get_extra_info("peername"): protocol for protocol in made}
            waiter = None
            left = {"close", "one", "two"}
            for step in order:
                if step == "close":
                    server.close()
                elif step == "wait":
                    waiter = Waiter(tasks, server.wait_closed)
                else:
                    peer = {"one": one, "two": two}[step]
                    name = peer.socket.getsockname()
                    peer.close()
                    await by_name[name].wait_for("connection_lost")
                left.discard(step)
                await settle(group)
                if waiter is not None and left:
                    assert not waiter.done
            assert waiter is not None
            await waiter.finish()
            await server.wait_closed()  # Later calls return at once.


async def test_s1_a_server_without_connections(stack: Stack) -> None:
    stack.needs_python(3, 12, 1, why="wait_closed returns too early: CPython 79033")
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        for start_serving in (False, True):
            server = await group.create_server(Echo, HOST, 0, start_serving=start_serving)
            waiters = [Waiter(tasks, server.wait_closed) for _ in range(3)]
            await settle(group)
            assert not any(waiter.done for waiter in waiters)
            waiters[0].scope.cancel()
            await waiters[0].finish()
            assert not waiters[1].done
            server.close()
            for waiter in waiters:
                await waiter.finish()
            assert [waiter.scope.cancelled_caught for waiter in waiters] == [True, False, False]


async def test_s1_a_half_closed_connection_counts(stack: Stack) -> None:
    stack.needs_python(3, 12, 1, why="wait_closed returns too early: CPython 79033")
    made = Made(lambda: Recorder(on_eof_received=lambda *_: True))
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(made, HOST, 0)
        with Peer.connect(address(server)) as peer:
            await made.wait_connected()
            server.close()
            waiter = Waiter(tasks, server.wait_closed)
            peer.shutdown()
            await made[0].wait_for("eof_received")
            await settle(group)
            assert not waiter.done
            made[0].transport.write(b"still here")
            assert await peer.receive_exactly(10) == b"still here"
            made[0].transport.close()
            await waiter.finish()
            assert made[0].lost


@pytest.mark.ours_only("asyncio goes on after connection_made has raised, and keeps the sockets of broken factories")
@pytest.mark.parametrize("callback", ["factory", *CALLBACKS])
async def test_s1_s10_connections_that_fail_are_gone(stack: Stack, callback: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    made = Made(fail if callback == "factory" else lambda: Recorder(**{f"on_{callback}": fail}))
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        contexts = collect_contexts(group)
        server = await group.create_server(made, HOST, 0)
        for number in range(1, 4):
            with Peer.connect(address(server)) as peer:
                if callback == "data_received":
                    await peer.send(b"x")
                elif callback != "factory":
                    peer.shutdown()
                assert await peer.gone()
            await until(lambda number=number: len(contexts) == number)  # type: ignore[misc]
        assert server.is_serving()
        server.close()
        await Waiter(tasks, server.wait_closed).finish()


# -- async with -------------------------------------------------------------------------------------------------------


async def test_async_with_closes_and_waits(stack: Stack) -> None:
    stack.needs_python(3, 12, 1, why="wait_closed returns too early: CPython 79033")
    made = Made()
    states: list[Any] = []
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1

        async def serve() -> None:
            async with await group.create_server(made, HOST, 0) as server:
                states.append(address(server))
                await leave.wait()
            states.append(server.is_serving())
            states.append(made[0].lost)

        leave = anyio.Event()
        waiter = Waiter(tasks, serve)
        await until(lambda: states)
        with Peer.connect(states[0]) as peer:
            await made.wait_connected()
            leave.set()
            await until(lambda: refuses(states[0]))
            assert await answers(peer)
            assert not waiter.done
        await waiter.finish()
        assert states[1:] == [False, True]


async def test_async_with_and_serve_forever(stack: Stack) -> None:
    """As in asyncio's documentation."""
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(Echo, HOST, 0)
        where = address(server)

        async def serve() -> None:
            async with server:
                await server.serve_forever()

        waiter = Waiter(tasks, serve)
        with Peer.connect(where) as peer:
            assert await answers(peer)
        waiter.scope.cancel()
        await waiter.finish()
        assert waiter.scope.cancelled_caught
        assert refuses(where)


async def test_async_with_lets_exceptions_through(stack: Stack) -> None:
    async with stack.open() as group:
        with pytest.raises(ZeroDivisionError):
            async with await group.create_server(Echo, HOST, 0) as server:
                where = address(server)
                raise ZeroDivisionError
        assert refuses(where)


# -- the end of the group ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["normally", "exception", "cancellation"])
@pytest.mark.parametrize("forever", ["nobody", "a task", "the block"])
async def test_s9_leaving_the_group_ends_a_server_with_silent_clients(
    anyio_backend: Any, how: str, forever: str
) -> None:
    """With and without `serve_forever`, for every way to leave the block."""
    made = Made()
    async with AsyncExitStack() as peers:
        tasks = await peers.enter_async_context(anyio.create_task_group())
        clients: list[Peer] = []

        async def use() -> None:
            async with TransportGroup() as group:
                server = await group.create_server(made, HOST, 0)
                clients.extend(peers.enter_context(Peer.connect(address(server))) for _ in range(3))
                await made.wait_connected(3)
                if forever == "a task":
                    group.start_soon(server.serve_forever)
                    await turns()
                if how == "exception":
                    raise ZeroDivisionError
                if how == "cancellation":
                    scope.cancel()
                elif forever == "the block":
                    tasks.start_soon(checkpoint_and_call, server.close)
                if forever == "the block":
                    await server.serve_forever()
                await anyio.lowlevel.checkpoint()

        with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
            if how == "exception":
                with raises_inside(ZeroDivisionError):
                    await use()
            else:
                await use()
        assert scope.cancelled_caught == (how == "cancellation")
        assert [protocol.exception for protocol in made] == [None] * 3
        for peer in clients:
            assert await peer.gone()


async def checkpoint_and_call(function: Callable[[], object]) -> None:
    await anyio.lowlevel.checkpoint()
    function()


# -- the accept loop --------------------------------------------------------------------------------------------------


@linux_only
@pytest.mark.ours_only("asyncio reports it in every iteration, without end")
async def test_a_broken_listener_is_reported_once(stack: Stack) -> None:
    """The other sockets of the server go on, and its connections too."""
    made = Made()
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(made, [HOST, "127.0.0.2"], 0)
        first, second = server.sockets
        with Peer.connect(first.getsockname()) as peer:
            assert await answers(peer)
            # Another process that has the listener, a child for instance, can do this.
            with socket.socket(fileno=socket.dup(first.fileno())) as listener:
                listener.shutdown(socket.SHUT_RDWR)
            await until(lambda: contexts)
            for _ in range(10):
                assert await answers(peer)
            (context,) = contexts
            assert context["message"] == "socket.accept() failed: this socket accepts no more connections"
            assert context["exception"].errno == errno.EINVAL
            assert context["socket"].getsockname() == first.getsockname()
        with Peer.connect(second.getsockname()) as peer:
            assert await answers(peer)
        server.close()
        with anyio.fail_after(GUARD):
            await server.wait_closed()


async def test_a_hundred_clients_at_once(stack: Stack) -> None:
    """More clients than one iteration accepts; each gets its answer."""
    made = Made()
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        async with anyio.create_task_group() as tasks:

            async def visit() -> None:
                transport, client = await group.create_connection(Recorder, *where)
                transport.write(b"are you there?")
                assert await client.wait_received(14) == b"are you there?"
                transport.close()

            where = address(server)
            for _ in range(100):
                tasks.start_soon(visit)
        await until(lambda: all(protocol.lost for protocol in made))
        assert len(made) == 100
        server.close()
