"""The group: nothing is left of an ended connection or an ended group."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import tls_support
import trustme
from group_helpers import (
    BoomError,
    LeavingError,
)
from network import needs_pipes
from support import (
    HOST,
    Peer,
    Recorder,
    Stack,
    connected,
    leaves,
    listening,
    open_descriptors,
    turns,
    until,
)
from tls_support import Certificates

from transports_anyio import Protocol, TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio


# -- no reference cycle of an ended connection --------------------------------------------------------------


class KeepsTransport(asyncio.Protocol, asyncio.DatagramProtocol, asyncio.SubprocessProtocol):
    """Like most protocols, it keeps its transport and never deletes it."""

    # Recorders would be kept alive for the checks after the test.
    made: ClassVar[list[weakref.ref[KeepsTransport]]] = []
    lost: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.made.append(weakref.ref(self))

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.append(repr(exc))  # Not the exception: its traceback refers to the protocol.


class FailsWithTransport(KeepsTransport):
    def data_received(self, data: bytes) -> None:
        raise BoomError


async def live_over_tcp(group: Any, kind: type[KeepsTransport] = KeepsTransport, **tls: Any) -> None:
    server_tls = {"ssl": tls.pop("server")} if tls else {}
    server = await group.create_server(KeepsTransport, HOST, 0, **server_tls)
    transport, _ = await group.create_connection(kind, *server.sockets[0].getsockname(), **tls)
    transport.write(b"x")
    await until(lambda: len(KeepsTransport.made) == 2)
    await turns()
    transport.close()
    server.close()


async def live_and_fail(group: Any) -> None:
    with listening() as listener:
        await group.create_connection(FailsWithTransport, *listener.getsockname())
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
            transport, protocol = await group.create_connection(KeepsTransport, sock=sock)
            upgraded = await group.start_tls(transport, protocol, options.pop("sslcontext"), **options)
            if new_one_is_kept:
                protocol.transport = upgraded
            upgraded.close()

        async with anyio.create_task_group() as tasks:
            for sock, options in zip(socket.socketpair(), ends, strict=True):
                tasks.start_soon(upgrade, sock, dict(options))


async def live_as_an_endpoint(group: Any) -> None:
    transport, _ = await group.create_datagram_endpoint(KeepsTransport, local_addr=(HOST, 0))
    transport.sendto(b"x", transport.get_extra_info("sockname"))
    transport.close()


async def live_on_pipes(group: Any) -> None:
    reading, writing = os.pipe()
    reader, _ = await group.connect_read_pipe(KeepsTransport, open(reading, "rb", 0))
    writer, _ = await group.connect_write_pipe(KeepsTransport, open(writing, "wb", 0))
    reader.close()
    writer.close()


async def live_with_a_child(group: Any) -> None:
    transport, _ = await group.subprocess_exec(KeepsTransport, "cat")
    transport.get_pipe_transport(0).write(b"x")
    transport.get_pipe_transport(0).close()
    await until(lambda: transport.get_returncode() is not None)
    transport.close()


async def live_on_a_stream(group: Any) -> None:
    with listening() as listener:
        stream = await anyio.connect_tcp(*listener.getsockname())
    transport, _ = await group.connect_stream(KeepsTransport, stream)
    transport.close()


async def live_on_anyios_datagrams(group: Any) -> None:
    transport, _ = await group.connect_datagram_socket(KeepsTransport, await anyio.create_udp_socket(local_host=HOST))
    transport.close()


async def live_in_memory(group: Any) -> None:
    (transport, _), _ = await memory_connection(group, KeepsTransport, KeepsTransport)
    transport.write(b"x")
    transport.close()


LIVES = [
    live_over_tcp, live_and_fail, live_over_tls, live_through_an_upgrade, live_as_an_endpoint,
    pytest.param(live_on_pipes, marks=needs_pipes), pytest.param(live_with_a_child, marks=needs_pipes),
]  # fmt: skip


OUR_LIVES = [live_on_a_stream, live_on_anyios_datagrams, live_in_memory]


async def leaves_nothing_to_collect(group: Any, live: Callable[[Any], Awaitable[None]]) -> None:
    KeepsTransport.made.clear()
    KeepsTransport.lost.clear()
    group.set_exception_handler(lambda *_: None)
    gc.collect()
    gc.disable()
    try:
        await live(group)
        await until(lambda: len(KeepsTransport.lost) == len(KeepsTransport.made))
        await turns()
        assert KeepsTransport.made
        assert [reference() for reference in KeepsTransport.made] == [None] * len(KeepsTransport.made)
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


# -- nothing is left ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["normally", "exception", "cancellation"])
@pytest.mark.leaves_timers
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
