"""The group: exceptions of the block, of callbacks and of the system."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
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
    run,
)
from network import no_descriptors_below
from support import (
    GUARD,
    HOST,
    SMALL,
    BaseExceptionGroup,
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
    until,
)
from tls_support import Certificates, TLSPeer

import transports_anyio._selector
from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


# -- exceptions of the block --------------------------------------------------------------------------------


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


async def test_a_time_out_around_the_group(anyio_backend: Any, connect_peer: Any) -> None:
    protocol = Recorder()
    with pytest.raises(TimeoutError):
        with anyio.fail_after(GUARD) as scope:
            async with TransportGroup() as group:
                await connect_peer(group, protocol)
                scope.deadline = anyio.current_time() + 0.01
                await anyio.sleep_forever()
    assert protocol.exception is None


# -- exceptions in callbacks --------------------------------------------------------------------------------


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
        assert failing.exception is (None if callback == "connection_lost" else error)
        assert not other.is_closing()
        assert await answers(other_peer)
    # A connection that is made afterwards works too.
    async with connected(group, echo()) as (_, _, peer):
        assert await answers(peer)


@pytest.mark.parametrize("callback", FATAL_IN_ASYNCIO)
async def test_a_callback_that_raises_ends_its_connection_only(stack: Stack, callback: str) -> None:
    async with stack.open() as group:
        await fail_in(group, callback)


@pytest.mark.differs("an exception in a callback")
@pytest.mark.ours_only
@pytest.mark.parametrize("callback", [name for name in TRIGGERS if name not in FATAL_IN_ASYNCIO])
async def test_any_other_callback_that_raises_ends_its_connection_only(stack: Stack, callback: str) -> None:
    async with stack.open() as group:
        await fail_in(group, callback)


@pytest.mark.parametrize("callback", TRIGGERS)
@pytest.mark.ours_only("asyncio ends the connection for some callbacks only")
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


@pytest.mark.differs(
    "a protocol that lacks one of the callbacks",
    asyncio="an error when the callback is needed; after most of them the connection goes on",
    here="the same `AttributeError`, with an explanation, ends the connection",
    why="as any exception in a callback",
)
@pytest.mark.ours_only
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
            assert failing.exception is error
            assert [record.exc_info[1].args for record in records if record.exc_info] == [("the handler's",)]
            assert await answers(other_peer)


@pytest.mark.differs("an exception in a callback")
@pytest.mark.ours_only
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


# -- exceptions that end the group --------------------------------------------------------------------------


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
    expected = (
        asyncio.CancelledError if anyio_backend[0] == "asyncio" and sys.version_info < (3, 11) else KeyboardInterrupt
    )
    with raises_inside(expected):
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
            assert [protocol.exception for protocol in protocols] == [None, None]
            assert contexts == []

    run(anyio_backend, main)


@pytest.mark.parametrize("left", [True, False], ids=["a descriptor", "no descriptor"])
async def test_a_selector_that_is_lost_ends_the_group(anyio_backend: Any, left: bool) -> None:
    """The user has closed its file descriptor, and there may be none for another one."""
    cleaned_up = []

    async def clean_up() -> None:
        try:
            await anyio.sleep(10 * GUARD)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.001)
                cleaned_up.append(True)

    with raises_inside(OSError) as caught, anyio.fail_after(GUARD), ExitStack() as stack:
        async with TransportGroup() as group, connected(group) as (_, protocol, _):
            group.start_soon(clean_up)
            await anyio.lowlevel.checkpoint()
            number = group._core.poller.selector.fileno()  # type: ignore[attr-defined]
            if not left:
                stack.enter_context(no_descriptors_below(number))
            os.close(number)
            group.call_soon(int)
            await anyio.sleep(10 * GUARD)
    assert [exc.errno for exc in caught] == [errno.EBADF]  # type: ignore[attr-defined]
    assert cleaned_up
    assert protocol.lost


# -- epoll refuses a file descriptor ------------------------------------------------------------------------


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


@pytest.mark.differs(
    "epoll cannot register one more file descriptor (`ENOSPC`), for a connection or datagram endpoint",
)
@linux_only
@pytest.mark.ours_only
@pytest.mark.parametrize("tls", [False, True])
async def test_epoll_refuses_an_accepted_connection(
    stack: Stack, tls: bool, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends this connection, but not the group, the server or its other clients."""
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(echo())
        return made[-1]

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
        assert [type(protocol.exception) for protocol in lost] == ([] if tls else [OSError])
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
            assert protocol.exception is caught.value
        assert sum(group.statistics().open_transports.values()) == 1
        assert contexts == []
        assert await answers(other)
