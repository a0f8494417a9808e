"""Messages of calls that cannot work: they name the function and say what to do instead."""

from __future__ import annotations

import asyncio
import functools
import inspect
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from network import AF_UNIX, needs_unix
from support import HOST, Peer, Recorder, Stack, collect_contexts, connected, listening, open_descriptors, turns, until

from transports_anyio import Protocol, SubprocessProtocol, TransportGroup
from transports_anyio._endpoints._base import Endpoints
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio

#: Every endpoint function, and whether it takes a protocol factory.
ENDPOINTS = {
    name: "factory" in str(inspect.signature(function))
    for family in TransportGroup.__mro__
    if issubclass(family, Endpoints)
    for name, function in vars(family).items()
    if inspect.iscoroutinefunction(function) and not name.startswith("_") and name != "wait_closed"
}


def required_arguments(name: str) -> list[Any]:
    """Arguments for the parameters of an endpoint function that have no default."""
    parameters = inspect.signature(getattr(TransportGroup, name)).parameters.values()
    required = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    return [Protocol if each == "protocol_factory" else None for each in required if each != "self"]


def test_the_list_of_endpoint_functions_is_complete() -> None:
    assert {"create_connection", "create_server", "subprocess_exec", "start_tls", "sendfile"} <= set(ENDPOINTS)
    assert not ENDPOINTS["start_tls"]
    assert sum(ENDPOINTS.values()) >= 13


# -- outside the group's life -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDPOINTS)
async def test_endpoint_functions_before_and_after_the_block(anyio_backend: Any, name: str) -> None:
    group = TransportGroup()
    with pytest.raises(RuntimeError, match=rf"{name}\(\): the group is not open yet: enter it.*async with"):
        await getattr(group, name)(*required_arguments(name))
    async with group:
        pass
    with pytest.raises(RuntimeError, match=rf"{name}\(\): the group is not open any more: .*before .* new"):
        await getattr(group, name)(*required_arguments(name))


async def test_endpoint_functions_while_the_block_is_being_left(anyio_backend: Any) -> None:
    """In `connection_lost` new connections are refused with a message; callbacks can still be scheduled."""
    coroutines: list[Any] = []

    def reconnect(recorder: Recorder, exc: Exception | None) -> None:
        coroutines.append(group.create_connection(Recorder, HOST, 1))
        group.call_soon(later.append, "called")

    later: list[str] = []
    async with AsyncExitStack() as peers:
        async with TransportGroup() as group:
            await peers.enter_async_context(connected(group, Recorder(on_connection_lost=reconnect)))
    with pytest.raises(RuntimeError, match="not open any more"):
        await coroutines[0]
    assert later == ["called"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("call_soon", [print]),
        ("call_soon_threadsafe", [print]),
        ("call_later", [0, print]),
        ("call_at", [0, print]),
        ("start_soon", [anyio.sleep, 0]),
    ],
)
async def test_callbacks_outside_the_block(anyio_backend: Any, name: str, arguments: list[Any]) -> None:
    group = TransportGroup()
    with pytest.raises(RuntimeError, match=rf"{name}\(\).*: the group is not open yet"):
        getattr(group, name)(*arguments)
    with pytest.raises(RuntimeError, match=r"^time\(\): the group is not open yet"):
        group.time()
    async with group:
        pass
    with pytest.raises(RuntimeError, match=rf"{name}.*\(\): the group is not open any more"):
        getattr(group, name)(*arguments)


async def test_the_traceback_shows_the_endpoint_function_itself(anyio_backend: Any) -> None:
    """There is no wrapper between the caller and the endpoint function."""
    async with TransportGroup() as group:
        with pytest.raises(ValueError, match="host and port was not specified") as caught:
            await group.create_connection(Protocol)
    assert [entry.name for entry in caught.traceback][1:] == ["create_connection"]


# -- another thread ---------------------------------------------------------------------------------------


def in_a_thread(function: Callable[[], object]) -> list[BaseException]:
    """Return what `function` raises in another thread."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return errors


@pytest.mark.differs(
    "an endpoint function that is called in another thread",
    asyncio="undefined",
    here="`RuntimeError`, with the ways that work",
    why="the alternative is a race",
)
@pytest.mark.parametrize("name", ENDPOINTS)
async def test_from_another_thread(anyio_backend: Any, name: str) -> None:
    async with TransportGroup() as group:
        # As an event loop of that thread would do.
        (error,) = in_a_thread(lambda: getattr(group, name)(*required_arguments(name)).send(None))
    assert isinstance(error, RuntimeError)
    assert str(error).startswith(f"{name}() was called in another thread than the group's")
    assert f"anyio.from_thread.run(group.{name}, ...)" in str(error)
    assert "call_soon_threadsafe" in str(error)


async def test_a_connection_in_memory_from_another_thread(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (error,) = in_a_thread(lambda: memory_connection(group, Protocol, Protocol).send(None))
    assert str(error).startswith("memory_connection() was called in another thread than the group's")
    assert "anyio.from_thread.run(memory_connection, group, ...)" in str(error)


async def test_start_soon_from_another_thread(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (error,) = in_a_thread(lambda: group.start_soon(anyio.sleep, 0))
        assert group.statistics().running_tasks == 0
    assert str(error).startswith("start_soon() was called in another thread")
    assert "anyio.from_thread.run_sync(group.start_soon, ...)" in str(error)


@pytest.mark.parametrize("name", ["call_soon", "call_later", "write", "close"])
async def test_a_mistake_that_asyncio_lets_pass(anyio_backend: Any, name: str) -> None:
    """What only schedules has an effect, though perhaps late: half of a `close` would leave the group waiting."""
    async with TransportGroup() as group:
        (transport, sender), (_, receiver) = await memory_connection(group, Recorder, Recorder)
        scheduled: list[str] = []
        calls: dict[str, Callable[[], object]] = {
            "call_soon": lambda: group.call_soon(scheduled.append, name),
            "call_later": lambda: group.call_later(0.001, scheduled.append, name),
            "write": lambda: transport.write(b"data"),
            "close": transport.close,
        }
        await turns(10)  # The group waits now.
        assert in_a_thread(calls[name]) == []
        await until(lambda: scheduled == [name] or receiver.received == b"data" or receiver.count("connection_lost"))
        transport.close()
        await sender.wait_for("connection_lost")


async def test_waking_a_task_from_another_thread(anyio_backend: Any) -> None:
    """trio cannot do it, and its own error says nothing of threads."""
    async with TransportGroup() as group:
        future = group.create_future()

        async def wait() -> None:
            await future

        group.start_soon(wait)
        await turns(10)
        errors = in_a_thread(lambda: future.set_result(None))
        if anyio_backend[0] == "trio":
            (error,) = errors
            assert type(error) is RuntimeError
            assert "call_soon_threadsafe()" in str(error)
            future.set_result(None)
        else:
            assert errors == []


async def test_the_advice_of_the_messages_works(anyio_backend: Any) -> None:
    """Try each way that the messages name."""
    done = anyio.Event()

    async def task() -> None:
        done.set()

    async with TransportGroup() as group:
        with listening() as listener:
            address = listener.getsockname()

            def work() -> None:
                transport, _ = anyio.from_thread.run(group.create_connection, Protocol, *address)  # type: ignore[arg-type]
                group.call_soon_threadsafe(transport.close)
                anyio.from_thread.run_sync(group.start_soon, task)

            await anyio.to_thread.run_sync(work)
            await done.wait()
            await group.wait_closed()


# -- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({}, ValueError, "unexpected address family: give local_addr, remote_addr, a family or a sock"),
        ({"local_addr": HOST}, TypeError, f"2-tuple is expected, of host and port, got {HOST!r}"),
        pytest.param(
            {"local_addr": (HOST, 0), "family": AF_UNIX},
            TypeError,
            f"string is expected, the path of a UNIX socket, got {(HOST, 0)}",
            marks=needs_unix,
        ),
        (
            {"local_addr": (HOST, 0), "remote_addr": ("::1", 9)},
            ValueError,
            f"can not get address information: {(HOST, 0)} and ('::1', 9) have no family of addresses in common",
        ),
    ],
    ids=["none", "no pair", "no path", "two families"],
)
async def test_messages_about_datagram_addresses(
    stack: Stack, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with stack.open() as group:
        with pytest.raises(error) as caught:
            await group.create_datagram_endpoint(Recorder, **parameters)
        # asyncio's message has the first part.
        assert message.startswith(str(caught.value)) if stack.is_oracle else str(caught.value) == message


# -- factories --------------------------------------------------------------------------------------------


async def make_protocol() -> Protocol:
    return Protocol()


COROUTINE_FUNCTIONS: dict[str, Any] = {"plain": make_protocol, "partial": functools.partial(make_protocol)}


@pytest.mark.differs(
    "a coroutine function as a protocol factory",
    asyncio="connects first, then `AttributeError` and a warning",
    here="`TypeError` at the call",
    why="the mistake shows before a connection is made",
)
@pytest.mark.parametrize("name", [name for name, takes_factory in ENDPOINTS.items() if takes_factory])
@pytest.mark.parametrize("factory", COROUTINE_FUNCTIONS.values(), ids=COROUTINE_FUNCTIONS)
async def test_a_coroutine_function_as_a_factory(anyio_backend: Any, name: str, factory: Any) -> None:
    """Refused at the call, before anything is done, for every parameter."""
    async with TransportGroup() as group:
        with pytest.raises(TypeError, match=rf"{name}\(\) takes .* got the coroutine function .*start_soon\(\)"):
            await getattr(group, name)(factory, *required_arguments(name)[1:])


async def test_either_factory_of_a_memory_connection(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        with pytest.raises(TypeError, match=r"memory_connection\(\) takes a protocol factory, got 1"):
            await memory_connection(group, Protocol, 1)  # type: ignore[arg-type]


async def connect(group: Any, factory: Any) -> None:
    with listening() as listener:
        await group.create_connection(factory, *listener.getsockname())


@pytest.mark.parametrize("factory", [None, 5, Protocol()], ids=["None", "a number", "a protocol"])
async def test_a_callback_that_is_not_callable(stack: Stack, factory: Any) -> None:
    async with stack.open() as group:
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(TypeError, match="not callable"):
            await group.connect_accepted_socket(factory, ours)


@pytest.mark.differs(
    "a server's protocol factory that cannot be called",
    asyncio="an error when the first client connects",
    here="`TypeError` at the call",
    why="the traceback shows the line with the mistake",
)
async def test_a_protocol_instance_instead_of_a_factory(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        with pytest.raises(TypeError, match=r"create_server\(\) takes .* the protocol <.*> itself.*`lambda: protocol`"):
            await group.create_server(Protocol(), HOST, 0)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"create_server\(\) takes .* got 5.* give a protocol class"):
            await group.create_server(5, HOST, 0)  # type: ignore[arg-type]


def async_lambda() -> Any:
    return make_protocol()


class Nothing:
    """Has no callbacks."""


@pytest.mark.differs(
    "a factory that returns something without `connection_made`",
    asyncio="`AttributeError`; the socket is left to the garbage collector, and a child's pipes stay open",
    here="`AttributeError` with an explanation; everything is closed",
    why="nothing leaks",
)
@pytest.mark.differs(
    "a factory that returns a class",
    asyncio="`TypeError` in every callback",
    here="`TypeError` from the call, unless the callbacks are class methods",
    why="such a connection cannot work",
)
@pytest.mark.ours_only
@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (lambda: None, AttributeError, r"<lambda> .*returned None, which has no connection_made\(\): let it return"),
        (Nothing, AttributeError, r"Nothing'> returned <.*>, which has no connection_made\(\)"),
        (async_lambda, AttributeError, r"returned the coroutine <.*make_protocol.*has no connection_made"),
        (lambda: Protocol, TypeError, r"returned the class Protocol: let it return an instance, or give the class"),
    ],
    ids=["None", "nothing", "coroutine", "class"],
)
async def test_factory_returning_a_non_protocol(
    stack: Stack, factory: Any, error: type[Exception], message: str
) -> None:
    """The endpoint function raises it, and nothing is left open; no coroutine stays unawaited."""
    before = open_descriptors()
    async with stack.open() as group:
        contexts = collect_contexts(group)
        inside = open_descriptors()
        for call in (
            lambda: connect(group, factory),
            lambda: group.create_datagram_endpoint(factory, (HOST, 0)),
            lambda: group.subprocess_exec(factory, sys.executable, "-c", ""),
            lambda: memory_connection(group, Protocol, factory),
        ):
            with pytest.raises(error, match=message):
                await call()
        await group.wait_closed()
        assert open_descriptors() == inside
        assert contexts == []
    assert open_descriptors() == before


async def test_a_servers_factory_that_returns_none(anyio_backend: Any) -> None:
    """It is noticed with the first client, and reported like any failure of the factory."""
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(lambda: None, HOST, 0)  # type: ignore[arg-type, return-value]
        with Peer.connect(server.sockets[0].getsockname()) as peer:
            assert await peer.gone()
        (context,) = contexts
        assert context["message"] == "Error on transport creation for incoming connection"
        assert "returned None, which has no connection_made()" in str(context["exception"])


async def test_a_class_whose_callbacks_are_class_methods_is_a_protocol(stack: Stack) -> None:
    """Like any object with the right methods."""
    calls: list[str] = []

    class Everybody:
        @classmethod
        def connection_made(cls, transport: Any) -> None:
            calls.append("connection_made")
            transport.close()

        @staticmethod
        def connection_lost(exc: Exception | None) -> None:
            calls.append("connection_lost")

    async with stack.open() as group:
        await connect(group, lambda: Everybody)
        await until(lambda: calls == ["connection_made", "connection_lost"])


@pytest.mark.parametrize("function", [subprocess.Popen, asyncio.create_subprocess_exec], ids=["Popen", "asyncio's"])
async def test_a_process_that_is_not_anyios(anyio_backend: Any, function: Any) -> None:
    """Refused at the call and left untouched: waiting for its exit would fail later and end the group."""
    if function is not subprocess.Popen and anyio_backend[0] != "asyncio":
        return  # asyncio's processes need its loop.
    command = [sys.executable, "-c", "input()"]
    process = function(command, stdin=-1) if function is subprocess.Popen else await function(*command, stdin=-1)
    try:
        async with TransportGroup() as group:
            with pytest.raises(TypeError, match=r"process was expected, got <.*open_process\(\).*subprocess_exec\("):
                await group.connect_process(SubprocessProtocol, process)  # type: ignore[arg-type]
            assert process.returncode is None
    finally:
        process.stdin.close()
        ended = process.wait()
        if inspect.isawaitable(ended):
            await ended


# -- callbacks that are missing ---------------------------------------------------------------------------


class Duck:
    """A protocol that does not derive from asyncio's, and has only what it needs."""

    def __init__(self) -> None:
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Buffered(Duck):
    def get_buffer(self, sizehint: int) -> bytearray:
        raise AssertionError

    def buffer_updated(self, nbytes: int) -> None:
        raise AssertionError


async def test_a_protocol_needs_only_the_methods_that_are_called(stack: Stack) -> None:
    """Nothing comes and nothing is paused, so nothing more is needed."""
    async with stack.open() as group:
        duck = Duck()
        async with connected(group, duck) as (transport, _, peer):
            transport.write(b"hello")
            assert await peer.receive_exactly(5) == b"hello"
            transport.close()
            await until(lambda: duck.lost == [None])


@pytest.mark.parametrize(
    ("protocol", "advice"),
    [
        (Duck, "Duck has no method data_received(): define it, or derive the class from one of asyncio's protocol"),
        (Buffered, "Buffered has no method data_received(): derive it from BufferedProtocol"),
    ],
)
async def test_data_for_a_protocol_without_data_received(
    anyio_backend: Any, protocol: Callable[[], Duck], advice: str
) -> None:
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        duck = protocol()
        async with connected(group, duck) as (_, _, peer):
            await peer.send(b"x")
            await until(lambda: duck.lost)
        (context,) = contexts
        assert context["message"].startswith(f"Fatal error: protocol.data_received() call failed. {advice}")
        assert isinstance(context["exception"], AttributeError)


async def test_datagrams_and_output_for_protocols_without_the_callbacks(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        endpoint, _ = await group.create_datagram_endpoint(Duck, (HOST, 0))  # type: ignore[type-var]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", endpoint.get_extra_info("sockname"))
        await until(lambda: contexts)
        endpoint.close()
        program = (sys.executable, "-c", "print('x')")
        await group.subprocess_exec(Duck, *program, stdin=None, stderr=None)  # type: ignore[type-var]
        await group.wait_closed()
        messages = [context["message"] for context in contexts]
        for name in ("datagram_received", "pipe_data_received"):
            advice = f"Fatal error: protocol.{name}() call failed. Duck has no method {name}(): define it"
            assert any(message.startswith(advice) for message in messages)


async def test_an_attribute_error_in_a_callback_is_not_reported_as_missing(anyio_backend: Any) -> None:
    class Failing(Protocol):
        def data_received(self, data: bytes) -> None:
            raise AttributeError("of another object")

    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        async with connected(group, Failing()) as (_, _, peer):
            await peer.send(b"x")
            await until(lambda: contexts)
        assert contexts[0]["message"] == "Fatal error: protocol.data_received() call failed."
