"""The group: entering the block, leaving it normally, and `wait_closed`."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from anyio.streams.stapled import StapledByteStream
from group_helpers import ENDPOINTS, BoomError, answers, echo, raiser
from network import few_descriptors
from support import (
    GUARD,
    HOST,
    BaseExceptionGroup,
    DatagramRecorder,
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
from tls_support import NAME, Certificates

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


# -- entering -----------------------------------------------------------------------------------------------


async def test_a_group_is_entered_once(anyio_backend: Any) -> None:
    async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
        with pytest.raises(RuntimeError, match="once"):
            await group.__aenter__()
        assert await answers(peer)
    with pytest.raises(RuntimeError, match="once"):
        async with group:
            pytest.fail("the block of a group that is over was entered")


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


# -- leaving normally ---------------------------------------------------------------------------------------


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
    assert [protocol.exception for protocol in (*made, client)] == [None, None]


async def test_a_task_that_fails_while_the_block_is_left_normally(anyio_backend: Any, connect_peer: Any) -> None:
    """It ends a flush that would never finish."""

    async def fail() -> None:
        await other.wait_for("connection_lost")
        raise BoomError

    other, stuck = Recorder(), Recorder()
    with raises_inside(BoomError) as caught:
        async with TransportGroup() as group:
            transport, _, _ = await connect_peer(group, stuck, small=True)
            fill(transport, 1 << 20)
            await connect_peer(group, other)
            group.start_soon(fail)
    assert len(caught) == 1
    assert other.exception is None
    assert stuck.exception is None


async def test_a_callback_that_raises_while_the_block_is_left_normally(anyio_backend: Any) -> None:
    """The connections that still flush go on flushing."""
    async with AsyncExitStack() as peers:
        tasks = await peers.enter_async_context(anyio.create_task_group())
        received = []
        failing, protocol = Recorder(on_resume_writing=raiser(BoomError())), Recorder()
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
        assert isinstance(failing.exception, BoomError)
        assert protocol.exception is None
        await until(lambda: received == [size])


async def test_a_deadline_bounds_the_flush(anyio_backend: Any, connect_peer: Any) -> None:
    protocol = Recorder()
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            transport, _, _ = await connect_peer(group, protocol, small=True)
            fill(transport, 1 << 20)
            await anyio.sleep(0.02)
            assert not protocol.lost
            scope.deadline = anyio.current_time() + 0.02
    assert scope.cancelled_caught
    assert protocol.exception is None


# -- leaving normally while a protocol connects again -------------------------------------------------------


@pytest.mark.differs("a task that calls an endpoint function while the group is left")
@pytest.mark.parametrize("asks_first", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        "start_soon",
        "call_soon",
        "call_soon twice",
        # The group may end before the timer is due.
        pytest.param("call_later", marks=pytest.mark.leaves_timers),
        "TLS",
    ],
)
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
        options: dict[str, Any] = {"ssl": certificates.client(), "server_hostname": NAME} if how == "TLS" else {}
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
        options: dict[str, Any] = {"ssl": Certificates(certificate_authority).client(), "server_hostname": NAME}
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


# -- wait_closed --------------------------------------------------------------------------------------------


async def test_wait_closed_waits_for_every_transport(anyio_backend: Any, connect_peer: Any) -> None:
    """It also waits for transports that are made during the wait, but not for servers."""
    order: list[str] = []
    async with anyio.create_task_group() as tasks, TransportGroup() as group:
        with anyio.fail_after(GUARD):
            await group.wait_closed()  # There is no transport yet.

        async def wait() -> None:
            await group.wait_closed()
            order.append("closed")

        def protocol(name: str) -> Recorder:
            return Recorder(on_connection_lost=lambda *_: order.append(name))

        server = await group.create_server(Recorder, HOST, 0)
        first, _, _ = await connect_peer(group, protocol("first"))
        second, _, _ = await connect_peer(group, protocol("second"))
        for _ in range(2):
            tasks.start_soon(wait)
        await turns()
        third, _, _ = await connect_peer(group, protocol("third"))
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


@pytest.mark.parametrize("options", [{}, {"happy_eyeballs_delay": 1}, {"all_errors": True}], ids=str)
@pytest.mark.ours_only("asyncio's event loop cancels no tasks")
async def test_a_task_is_cancelled_whatever_the_end_of_the_group_does_to_its_connection(
    stack: Stack, options: dict[str, Any]
) -> None:
    """The end closes the server too, which resets a connection that is about to be returned to the task."""

    async def connect(group: Any, address: Any) -> None:
        await group.create_connection(Recorder, *address, **options)

    for checkpoints in range(12):  # In some of these rounds the task is ready to run, but has not run yet.
        with listening() as listener:
            with pytest.raises(BaseExceptionGroup) as caught:
                async with stack.open() as group:
                    group.start_soon(connect, group, listener.getsockname())
                    for _ in range(checkpoints):
                        await anyio.lowlevel.checkpoint()
                    listener.close()
                    raise BoomError
            assert [type(error) for error in leaves(caught.value)] == [BoomError]


@pytest.mark.parametrize("kind", ["stream", "datagram"])
@pytest.mark.ours_only("asyncio's event loop cancels no tasks")
async def test_a_task_that_connects_to_a_unix_socket_is_cancelled(
    stack: Stack, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    async def connect(group: Any) -> None:
        if kind == "stream":
            await group.create_unix_connection(Recorder, "socket")
        else:
            await group.create_datagram_endpoint(DatagramRecorder, remote_addr="socket", family=socket.AF_UNIX)

    before = open_descriptors()
    for checkpoints in range(12):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if kind == "stream" else socket.SOCK_DGRAM)
        with listener:
            listener.bind("socket")
            if kind == "stream":
                listener.listen()
            with pytest.raises(BaseExceptionGroup) as caught:
                async with stack.open() as group:
                    group.start_soon(connect, group)
                    for _ in range(checkpoints):
                        await anyio.lowlevel.checkpoint()
                    listener.close()
                    raise BoomError
            assert [type(error) for error in leaves(caught.value)] == [BoomError]
        os.remove("socket")
        caught = None  # type: ignore[assignment]  # its traceback has the listener
        gc.collect()
        assert open_descriptors() == before


RESOLVING: dict[str, Callable[[Any], Any]] = {
    "create_connection": lambda group: group.create_connection(Recorder, "name.test", 80),
    "create_connection from": lambda group: group.create_connection(Recorder, HOST, 80, local_addr=("name.test", 0)),
    "create_server": lambda group: group.create_server(Recorder, "name.test", 80),
    "create_datagram_endpoint to": lambda group: group.create_datagram_endpoint(
        DatagramRecorder, remote_addr=("name.test", 80)
    ),
    "create_datagram_endpoint": lambda group: group.create_datagram_endpoint(
        DatagramRecorder, local_addr=("name.test", 80)
    ),
}


@pytest.mark.parametrize("name", RESOLVING)
@pytest.mark.parametrize("found", [True, False], ids=["found", "not found"])
@pytest.mark.ours_only("asyncio's event loop cancels no tasks")
async def test_a_task_whose_name_resolution_ends_after_the_group_is_cancelled(
    stack: Stack, name: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver in a thread cannot be interrupted, and may end at the same time."""
    asked = anyio.Event()
    over = anyio.Event()

    async def getaddrinfo(*_: Any, **__: Any) -> Any:
        with anyio.CancelScope(shield=True):
            asked.set()
            await over.wait()
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, 0, 0, "", ("127.0.0.1", 1))]

    monkeypatch.setattr(anyio, "getaddrinfo", getaddrinfo)

    async def end() -> None:
        with anyio.CancelScope(shield=True):
            await turns()
            over.set()

    before = open_descriptors()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with stack.open() as group:
            group.start_soon(RESOLVING[name], group)
            await asked.wait()
            group.start_soon(end)
            await turns()
            raise BoomError
    assert [type(error) for error in leaves(caught.value)] == [BoomError]
    assert open_descriptors() == before
