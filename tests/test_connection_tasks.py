"""Tasks of a connection, and tasks that wait for one."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import socket
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from group_helpers import MUCH, BoomError, answers, echo, run
from network import needs_pipes
from support import (
    GUARD,
    HOST,
    DatagramRecorder,
    Peer,
    Recorder,
    SubprocessRecorder,
    collect_contexts,
    connected,
    fill,
    raises_inside,
    settle,
    turns,
    until,
)
from tls_support import NAME, Certificates, TLSPeer, together

from transports_anyio import Protocol, TransportGroup, abc, current_group
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio


# -- every kind of transport --------------------------------------------------------------------------------


async def tcp(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    transport, protocol, _ = await stack.enter_async_context(connected(group))
    return transport, protocol


async def tls(group: TransportGroup, stack: AsyncExitStack, certificates: Certificates) -> tuple[Any, Any]:
    contexts = {"client_ssl": certificates.client(), "server_ssl": certificates.server()}
    server = await group.create_server(Recorder, HOST, 0, ssl=contexts["server_ssl"])
    address = server.sockets[0].getsockname()
    pair = await group.create_connection(Recorder, *address, ssl=contexts["client_ssl"], server_hostname=NAME)
    server.close()
    return pair


async def memory(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    first, _ = await memory_connection(group, Recorder, Recorder)
    return first


async def anyio_stream(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    sock = stack.enter_context(socket.create_server((HOST, 0)))
    return await group.connect_stream(Recorder, await anyio.connect_tcp(*sock.getsockname()))


async def read_pipe(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    reading, writing = os.pipe()
    stack.callback(os.close, writing)
    return await group.connect_read_pipe(Recorder, os.fdopen(reading, "rb", 0))


async def write_pipe(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    return await group.connect_write_pipe(Recorder, os.fdopen(writing, "wb", 0))


async def datagrams(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    return await group.create_datagram_endpoint(DatagramRecorder, local_addr=(HOST, 0))


async def child(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    return await group.subprocess_exec(SubprocessRecorder, "cat")


async def pipe_of_child(group: TransportGroup, stack: AsyncExitStack) -> tuple[Any, Any]:
    transport, protocol = await child(group, stack)
    return transport.get_pipe_transport(0), protocol


EVERYWHERE = (tcp, memory, anyio_stream, datagrams)
ON_POSIX = (read_pipe, write_pipe, child, pipe_of_child)
KINDS: dict[str, Callable[..., Any]] = {each.__name__: each for each in (*EVERYWHERE, *ON_POSIX)}


@pytest.fixture(
    params=[
        *(each.__name__ for each in EVERYWHERE),
        *(pytest.param(each.__name__, marks=needs_pipes) for each in ON_POSIX),
        "tls",
    ]
)
def kind(request: Any, certificates: Certificates) -> Callable[..., Any]:
    """Make a transport of each kind, with its protocol."""
    return partial(tls, certificates=certificates) if request.param == "tls" else KINDS[request.param]


async def test_a_task_is_cancelled_with_its_connection(anyio_backend: Any, kind: Any) -> None:
    """After `connection_lost`; the group waits until the task has cleaned up."""
    order: list[str] = []

    async def task(value: int, transport: Any) -> None:
        assert current_group() is group
        assert value == 1
        order.append("started")
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await transport.wait_closed()
                await turns(3)
            order.append("cancelled")

    with anyio.fail_after(GUARD):
        async with AsyncExitStack() as stack, TransportGroup() as group:
            transport, _ = await kind(group, stack)
            transport.start_soon(task, 1, transport)
            group.call_soon(transport.start_soon, task, 1, transport)
            await until(lambda: len(order) == 2)
            assert group.statistics().running_tasks == 2
            (transport.close if isinstance(transport, abc.SubprocessTransport) else transport.abort)()
            await transport.wait_closed()
            await group.wait_closed()
            assert order == ["started"] * 2 + ["cancelled"] * 2
            with pytest.raises(ConnectionError, match=r"group\.start_soon\(\)"):
                transport.start_soon(task, 1, transport)
            with pytest.raises(ConnectionError):
                await transport.drain()
            await transport.wait_closed()
            assert not group.statistics().running_tasks


async def test_a_failing_task_ends_its_connection_and_no_other(anyio_backend: Any, kind: Any) -> None:
    """A datagram endpoint stays open, as after a callback's exception."""

    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    error = BoomError()
    with anyio.fail_after(GUARD):
        async with AsyncExitStack() as stack, TransportGroup() as group:
            contexts = collect_contexts(group)
            _, _, peer = await stack.enter_async_context(connected(group, echo()))
            transport, protocol = await kind(group, stack)
            receiver = transport.get_protocol()
            transport.start_soon(fail)
            if isinstance(transport, abc.DatagramTransport):
                await until(lambda: contexts)
                assert not transport.is_closing()
                transport.close()
            await transport.wait_closed()
            (context,) = contexts
            assert context["exception"] is error
            assert "fail" in context["message"]
            assert context["transport"] is transport
            assert context["protocol"] is receiver
            if isinstance(protocol, Recorder):
                assert protocol.exception is error
            assert await answers(peer)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_task_leaves_through_the_group(anyio_backend: Any, error: type[BaseException]) -> None:
    protocols: list[Recorder] = []

    async def fail() -> None:
        raise error

    async def main() -> None:
        async with TransportGroup() as group, connected(group) as (transport, protocol, _):
            protocols.append(protocol)
            transport.start_soon(fail)
            await anyio.sleep_forever()

    with raises_inside(error):
        run(anyio_backend, main)
    assert protocols[0].lost


async def test_an_exception_group_of_a_task(anyio_backend: Any) -> None:
    """A task whose own task group fails, and one that fails when it is cancelled."""

    async def fail() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            await anyio.lowlevel.checkpoint()
            raise BoomError

    async def fail_late() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise BoomError

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group) as (transport, protocol, _):
            contexts = collect_contexts(group)
            transport.start_soon(fail_late)
            transport.start_soon(fail)
            await group.wait_closed()
            first, second = (context["exception"] for context in contexts)
            assert protocol.exception is first
            assert isinstance(first.exceptions[0], BoomError)
            assert isinstance(second, BoomError)


@pytest.mark.parametrize("ends", ["connection", "group", "scope around it"])
async def test_a_task_group_whose_cleanup_fails(anyio_backend: Any, ends: str) -> None:
    """The error is reported, and the cancellation goes its way."""

    async def clean_up() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise BoomError

    async def task() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(clean_up)
            await anyio.sleep_forever()

    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        async with TransportGroup() as group, connected(group) as (transport, _, _):
            contexts = collect_contexts(group)
            transport.start_soon(task)
            await turns()
            if ends == "connection":
                transport.abort()
                await group.wait_closed()
            else:
                (group.cancel_scope if ends == "group" else scope).cancel()
                await anyio.sleep_forever()
    (context,) = contexts
    with raises_inside(BoomError):
        raise context["exception"]


@pytest.mark.parametrize("connected_still", [True, False])
async def test_a_task_that_asyncio_cancels(anyio_backend_name: str, connected_still: bool) -> None:
    """It ends its connection only. AnyIO's own task groups are cancelled by that, without a word."""
    if anyio_backend_name == "trio":
        pytest.skip("trio's tasks are cancelled by scopes only")

    async def task() -> None:
        job = asyncio.ensure_future(asyncio.sleep(GUARD))
        try:
            if not connected_still:
                await anyio.sleep_forever()
        finally:
            job.cancel()
            await job

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
            contexts = collect_contexts(group)
            async with connected(group) as (transport, protocol, _):
                transport.start_soon(task)
                await turns()
                if not connected_still:
                    transport.abort()
                await transport.wait_closed()
                await turns()
                assert isinstance(protocol.exception, CancelledError) == connected_still
            assert [context["exception"] for context in contexts] == [protocol.exception] * connected_still
            assert await answers(peer)


async def test_wrong_calls(anyio_backend: Any, kind: Any) -> None:
    async def task(argument: int) -> None:
        raise AssertionError

    def plain() -> None: ...

    async with AsyncExitStack() as stack:
        async with TransportGroup() as group:
            transport, _ = await kind(group, stack)
            for arguments in ((plain,), (task,), (task, 1, 2), (None,)):
                with pytest.raises(TypeError):
                    transport.start_soon(*arguments)
            with pytest.raises(RuntimeError, match="another thread"):
                await anyio.to_thread.run_sync(transport.start_soon, task, 1)
        with pytest.raises(RuntimeError, match="not open any more"):
            transport.start_soon(task, 1)


async def test_a_task_runs_in_a_copy_of_the_callers_context(anyio_backend: Any) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def task() -> None:
        seen.append(variable.get())
        variable.set("the task's")

    def made(self: Any, transport: Any) -> None:
        variable.set("the connection's")
        transport.start_soon(task)

    async with TransportGroup() as group, connected(group, Recorder(on_connection_made=made)) as (transport, _, _):
        variable.set("the caller's")
        transport.start_soon(task)
        await until(lambda: len(seen) == 2)
        assert sorted(seen) == ["the caller's", "the connection's"]
        assert variable.get() == "the caller's"


# -- servers ------------------------------------------------------------------------------------------------


async def test_a_failing_handler_does_not_end_the_server(anyio_backend: Any) -> None:
    class Handler(Protocol):
        def connection_made(self, transport: Any) -> None:
            transport.start_soon(self.handle, transport)

        async def handle(self, transport: Any) -> None:
            transport.write(b"hello")
            await transport.drain()
            if next(numbers) % 2:
                raise BoomError
            transport.close()

    numbers = iter(range(20))
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            server = await group.create_server(Handler, HOST, 0)
            for _ in range(20):
                with Peer.connect(server.sockets[0].getsockname()) as peer:
                    assert await peer.receive_exactly(5) == b"hello"
                    await peer.gone()
            server.close()
            await server.wait_closed()
            assert [type(context["exception"]) for context in contexts] == [BoomError] * 10


@pytest.mark.parametrize("end", ["server", "group"])
async def test_wait_closed_waits_for_the_tasks_of_clients(anyio_backend: Any, end: str) -> None:
    ended: list[bool] = []

    async def task() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await released.wait()
            ended.append(True)

    async def release() -> None:
        await turns(20)
        assert not ended
        released.set()

    released = anyio.Event()
    made: list[Any] = []
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            protocol = Recorder(on_connection_made=lambda _, transport: transport.start_soon(task))
            server = await group.create_server(lambda: protocol, HOST, 0)
            with Peer.connect(server.sockets[0].getsockname()):
                await protocol.wait_for("connection_made")
                await turns()
                server.close()
                server.close_clients()
                await protocol.wait_for("connection_lost")
                group.start_soon(release)
                await (server if end == "server" else group).wait_closed()
                assert ended
                assert not made


@pytest.mark.parametrize("how", ["peer", "task", "both"])
async def test_a_thousand_connections_with_tasks_come_and_go(anyio_backend: Any, how: str) -> None:
    async def task(transport: Any) -> None:
        if how == "task":
            raise BoomError
        await anyio.sleep_forever()

    def factory() -> Recorder:
        return Recorder(on_connection_made=lambda _, transport: transport.start_soon(task, transport))

    with anyio.fail_after(4 * GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            for _ in range(20):
                pairs = [await memory_connection(group, factory, factory) for _ in range(25)]
                await turns(2)
                for (first, _), (second, _) in pairs:
                    if how != "task":
                        first.abort()
                    if how == "both":
                        second.abort()
                await group.wait_closed()
                statistics = group.statistics()
                assert not statistics.open_transports
                assert not statistics.running_tasks
            assert len(contexts) == (1000 if how == "task" else 0)


# -- start_tls ----------------------------------------------------------------------------------------------


async def test_tasks_survive_start_tls(anyio_backend: Any, certificates: Certificates) -> None:
    """Those that were started before, on the old transport, belong to the new one. Failing, they end it."""

    async def task() -> None:
        await finish.wait()
        raise error

    async def wait(name: str) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(name)

    error = BoomError()
    ended: list[str] = []
    finish = anyio.Event()
    with anyio.fail_after(GUARD):
        async with (
            AsyncExitStack() as stack,
            TransportGroup() as group,
            connected(group) as (transport, protocol, peer),
        ):
            contexts = collect_contexts(group)
            transport.start_soon(task)
            transport.start_soon(wait, "before")
            new, encrypted = await together(
                lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME),
                lambda: TLSPeer.wrap(peer.socket, certificates.server(), server_side=True),
            )
            stack.enter_context(encrypted)
            transport.start_soon(wait, "old")
            new.start_soon(wait, "new")
            await settle(group)
            assert not ended
            new.write(b"x")
            await new.drain()
            await transport.drain()
            finish.set()
            await transport.wait_closed()
            await new.wait_closed()
            assert protocol.exception is error
            await group.wait_closed()
            assert sorted(ended) == ["before", "new", "old"]
            assert [context["transport"] for context in contexts] == [new]


async def test_a_task_that_upgrades_its_own_connection(anyio_backend: Any, certificates: Certificates) -> None:
    class Upgrading(Recorder):
        async def upgrade(self, old: Any) -> None:
            self.transport = await current_group().start_tls(old, self, certificates.server(), server_side=True)
            self.transport.write(b"encrypted")
            await self.transport.drain()
            done.set()

    done = anyio.Event()
    upgrading = Upgrading(on_connection_made=lambda self, transport: transport.start_soon(self.upgrade, transport))
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group, upgrading) as (_, _, peer):
            with await TLSPeer.wrap(peer.socket, certificates.client(), server_hostname=NAME) as tls_peer:
                assert await tls_peer.receive_exactly(9) == b"encrypted"
                await done.wait()


# -- drain and wait_closed ----------------------------------------------------------------------------------


async def test_drain_waits_until_writing_resumes(anyio_backend: Any) -> None:
    """Several tasks; a cancelled one changes nothing for the others."""
    drained: list[int] = []

    async def drain(number: int) -> None:
        await transport.drain()
        drained.append(number)

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group, small=True) as (transport, _, peer):
            await transport.drain()
            written = fill(transport, transport.get_write_buffer_limits()[1] + 1)
            assert transport.is_writing_paused()
            for number in range(3):
                group.start_soon(drain, number)
            with anyio.move_on_after(0) as scope:
                await transport.drain()
            assert scope.cancelled_caught
            await settle(group)
            assert not drained
            await peer.receive_exactly(written)
            await until(lambda: len(drained) == 3)
            assert not transport.is_writing_paused()


async def test_drain_raises_the_error_of_the_loss(anyio_backend: Any) -> None:
    errors: list[ConnectionError] = []

    async def drain() -> None:
        try:
            await transport.drain()
        except ConnectionError as exc:
            errors.append(exc)

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group, small=True) as (transport, protocol, peer):
            fill(transport, transport.get_write_buffer_limits()[1] + 1)
            for _ in range(2):
                group.start_soon(drain)
            await turns()
            peer.reset()
            await until(lambda: len(errors) == 2)
            assert protocol.exception is not None
            assert {error.__cause__ for error in errors} == {protocol.exception}


@pytest.mark.parametrize("waits", [False, True])
async def test_a_task_that_drains_a_lost_connection_is_not_reported(anyio_backend: Any, waits: bool) -> None:
    """`connection_lost` reports the loss."""

    async def send() -> None:
        try:
            while True:
                transport.write(MUCH if waits else b"x")
                await transport.drain()
        finally:
            ended.set()

    ended = anyio.Event()
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group, small=True) as (transport, protocol, peer):
            contexts = collect_contexts(group)
            transport.start_soon(send)
            await turns()
            peer.reset()
            await ended.wait()
            await transport.wait_closed()
            assert isinstance(protocol.exception, OSError)
            assert not contexts


async def test_a_task_group_that_drains_a_lost_connection_is_not_reported(anyio_backend: Any) -> None:
    async def pump(transport: Any) -> None:
        await anyio.sleep_forever()

    async def task(transport: Any) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump, transport)
            await transport.drain()

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group, connected(group, small=True) as (transport, _, _):
            contexts = collect_contexts(group)
            fill(transport, transport.get_write_buffer_limits()[1] + 1)
            for _ in range(2):
                transport.start_soon(task, transport)
            await turns()
            transport.abort()
            await group.wait_closed()
    assert not contexts


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_a_task_that_closes_its_own_connection_waits_for_the_end(anyio_backend: Any, end: str) -> None:
    """It is woken before it is cancelled, wherever it is when `connection_lost` is called."""
    returned: list[int] = []

    async def task(transport: Any, number: int) -> None:
        getattr(transport, end)()
        await transport.wait_closed()
        returned.append(number)

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            for number in range(30):
                (transport, _), _ = await memory_connection(group, Recorder, Recorder)
                transport.start_soon(task, transport, number)
                await group.wait_closed()
    assert returned == [*range(30)]


async def test_draining_another_connection_that_is_lost_fails(anyio_backend: Any) -> None:
    """The connection of the task ends with that error: it is an error of the task."""

    async def relay() -> None:
        await second.drain()

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            (first, protocol), _ = await memory_connection(group, Recorder, Recorder)
            (second, _), _ = await memory_connection(group, Recorder, Recorder)
            second.abort()
            first.start_soon(relay)
            await first.wait_closed()
            assert isinstance(protocol.exception, ConnectionError)
            assert len(contexts) == 1


@needs_pipes
async def test_drain_of_a_child(anyio_backend: Any) -> None:
    """It waits for standard input, and ends when that is closed."""
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            transport, _ = await group.subprocess_exec(SubprocessRecorder, "cat")
            stdin = transport.get_pipe_transport(0)
            stdin.write(MUCH)
            assert transport.is_writing_paused()
            await transport.drain()
            assert not transport.is_writing_paused()
            stdin.close()
            await stdin.wait_closed()
            with pytest.raises(ConnectionError):
                await transport.drain()
            await transport.wait_closed()
            assert transport.get_returncode() == 0


@pytest.mark.parametrize("end", ["normal", "error", "cancelled"])
async def test_waits_end_with_the_group(anyio_backend: Any, kind: Any, end: str) -> None:
    """The tasks that wait are outside of it."""
    ended: list[str] = []

    async def wait() -> None:
        await transport.wait_closed()
        ended.append("wait_closed")

    async def drain() -> None:
        if isinstance(transport, abc.WriteTransport) and transport.can_write_eof():
            transport.write(MUCH)
        try:
            while True:
                await transport.drain()
        except ConnectionError:
            ended.append("drain")

    with anyio.fail_after(GUARD):
        async with AsyncExitStack() as stack, anyio.create_task_group() as tasks:
            try:
                with anyio.CancelScope() as scope:
                    async with TransportGroup() as group:
                        transport, _ = await kind(group, stack)
                        tasks.start_soon(wait)
                        if not end == "normal":
                            tasks.start_soon(drain)
                        await settle(group)
                        assert not ended
                        if end == "error":
                            raise BoomError
                        if end == "cancelled":
                            scope.cancel()
            except BaseException as exc:
                if end != "error":
                    raise
                assert exc is not None
            assert scope.cancel_called == (end == "cancelled")
    assert sorted(ended) == (["wait_closed"] if end == "normal" else ["drain", "wait_closed"])


async def test_wait_closed_comes_after_connection_lost(anyio_backend: Any, kind: Any) -> None:
    with anyio.fail_after(GUARD):
        async with AsyncExitStack() as stack, TransportGroup() as group:
            transport, protocol = await kind(group, stack)
            with anyio.move_on_after(0) as scope:
                await transport.wait_closed()
            assert scope.cancelled_caught
            transport.close()
            await transport.wait_closed()
            if transport.get_protocol() is None and not isinstance(protocol, SubprocessRecorder):
                assert protocol.lost
            assert transport.get_protocol() is None


async def test_no_reference_to_a_connection_is_left(anyio_backend: Any) -> None:
    async def task() -> None:
        await anyio.sleep_forever()

    async with TransportGroup() as group:
        (first, _), (second, _) = await memory_connection(group, Protocol, Protocol)
        first.start_soon(task)
        await first.drain()
        await turns()
        first.abort()
        await group.wait_closed()
        kind = type(first)
        del first, second, _
        await turns()
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is kind]
