"""Async functions where a plain function is called: they would never run, so they are refused."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import MagicMock

import anyio
import pytest
from group_helpers import answers, echo
from support import HOST, Recorder, connected
from tls_support import Certificates

from transports_anyio import BufferedProtocol, DatagramProtocol, Protocol, SubprocessProtocol, TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("error")]

REFUSED = r"async function.*start_soon"

CALLBACKS = {
    Protocol: (
        "connection_made",
        "connection_lost",
        "pause_writing",
        "resume_writing",
        "data_received",
        "eof_received",
        "shutdown_requested",
    ),
    BufferedProtocol: ("get_buffer", "buffer_updated"),
    DatagramProtocol: ("datagram_received", "error_received", "shutdown_requested"),
    SubprocessProtocol: ("pipe_data_received", "pipe_connection_lost", "process_exited", "shutdown_requested"),
}


async def never(*_: object) -> None:
    raise AssertionError


async def never_yields(*_: object) -> Any:
    raise AssertionError
    yield


async def connect(group: TransportGroup, base: type[Any], factory: Any) -> None:
    """Give the factory to the endpoint function for its kind of protocol."""
    if base is DatagramProtocol:
        await group.create_datagram_endpoint(factory, local_addr=(HOST, 0))
    elif base is SubprocessProtocol:
        await group.subprocess_exec(factory, "true")
    else:
        await memory_connection(group, factory, factory)


@pytest.mark.differs(
    "a protocol with an async callback; an async function for `call_soon`, `call_later`, `call_at` or "
    "`call_soon_threadsafe`",
    asyncio="called, but never awaited, with a warning at most; `TypeError` in debug mode for `call_soon`",
    here="`TypeError` at the call, or when the protocol is set",
    why="it can never work",
)
@pytest.mark.parametrize(("base", "name"), [(base, name) for base, names in CALLBACKS.items() for name in names])
@pytest.mark.parametrize(
    "function", [never, never_yields, functools.partial(never, 1)], ids=["def", "yield", "partial"]
)
async def test_a_protocol_with_an_async_callback(anyio_backend: Any, base: type[Any], name: str, function: Any) -> None:
    """In its class, and as an attribute of the protocol; the first connection and the second."""
    in_class = type("InClass", (base,), {name: staticmethod(function)})

    def own() -> Any:
        protocol = type("Own", (base,), {})()
        setattr(protocol, name, function)
        return protocol

    async with TransportGroup() as group:
        for factory in (in_class, in_class, own):
            with pytest.raises(TypeError, match=rf"{name}\(\) of the protocol .*{REFUSED}"):
                await connect(group, base, factory)
        assert not group.statistics().open_transports


async def test_set_protocol_and_start_tls(anyio_backend: Any, certificates: Certificates) -> None:
    """The connection goes on with its protocol."""

    class Wrong(Protocol):
        async def data_received(self, data: bytes) -> None:  # type: ignore[override]
            raise AssertionError

    async with TransportGroup() as group, connected(group, echo()) as (transport, protocol, peer):
        with pytest.raises(TypeError, match=REFUSED):
            transport.set_protocol(Wrong())
        with pytest.raises(TypeError, match=REFUSED):
            await group.start_tls(transport, Wrong(), certificates.client(), server_hostname="localhost")
        assert transport.get_protocol() is protocol
        assert await answers(peer)


async def test_set_protocol_of_a_child(anyio_backend: Any) -> None:
    class Wrong(SubprocessProtocol):
        async def process_exited(self) -> None:  # type: ignore[override]
            raise AssertionError

    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(SubprocessProtocol, "true")
        with pytest.raises(TypeError, match=REFUSED):
            transport.set_protocol(Wrong())


async def test_plain_protocols_are_not_refused(anyio_backend: Any) -> None:
    """A mock, a protocol with slots, one with async methods of its own, and one that derives from no class."""

    class Slots(Recorder):
        __slots__ = ()

    class Helper(Recorder):
        async def answer(self) -> None:
            raise AssertionError

    async with TransportGroup() as group:
        for factory in (Slots, Helper, lambda: MagicMock(spec=Protocol)):
            await memory_connection(group, factory, factory)


@pytest.mark.parametrize(
    "function", [never, never_yields, functools.partial(never, 1)], ids=["async", "generator", "partial"]
)
async def test_callbacks(anyio_backend: Any, function: Any) -> None:
    async with TransportGroup() as group:
        for call in (
            lambda: group.call_soon(function),
            lambda: group.call_later(0, function),
            lambda: group.call_at(0, function),
            lambda: group.call_soon_threadsafe(function),
            lambda: group.call_soon(function, context=None),
        ):
            with pytest.raises(TypeError, match=REFUSED):
                call()
        assert not group.statistics().pending_timers


async def test_methods_are_refused_too(anyio_backend: Any) -> None:
    class Thing:
        async def method(self) -> None:
            raise AssertionError

        def plain(self) -> None:
            called.set()

    called = anyio.Event()
    async with TransportGroup() as group:
        with pytest.raises(TypeError, match=REFUSED):
            group.call_soon(Thing().method)
        group.call_soon(Thing().plain)
        await called.wait()
