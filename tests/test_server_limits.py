"""Servers under load: `max_connections`, `max_handshakes` and the statistics of a server."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import AF_UNIX, Echo, needs_unix
from support import GUARD, HOST, Peer, Recorder, collect_contexts, open_descriptors, settle, until
from tls_support import NAME, Certificates, TLSPeer

from transports_anyio import ServerStatistics, TransportGroup

pytestmark = pytest.mark.anyio


class Service:
    """An echo server with limits, and its clients."""

    def __init__(self, group: Any, kind: str, directory: Path, certificates: Certificates) -> None:
        self.group = group
        self.unix = kind.startswith("unix")
        self.tls = kind.endswith("tls")
        self.path = str(directory / "socket")
        self.certificates = certificates

    async def start(self, factory: Any = Echo, **options: Any) -> Any:
        if self.tls:
            options["ssl"] = self.certificates.server()
        if self.unix:
            self.server = await self.group.create_unix_server(factory, self.path, **options)
        else:
            self.server = await self.group.create_server(factory, HOST, 0, **options)
        return self.server

    def connect(self) -> Peer:
        if not self.unix:
            return Peer.connect(self.server.sockets[0].getsockname())
        sock = socket.socket(AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)
        return Peer(sock)

    async def client(self) -> Peer:
        """Return a peer that has done its handshake."""
        peer = self.connect()
        if not self.tls:
            return peer
        return await TLSPeer.wrap(peer.socket, self.certificates.client(), server_hostname=NAME)


KINDS = ["tcp", "tcp tls", pytest.param("unix", marks=needs_unix), pytest.param("unix tls", marks=needs_unix)]


@asynccontextmanager
async def opened(kind: str, directory: Path, certificates: Certificates) -> AsyncIterator[Service]:
    async with TransportGroup() as group:
        service = Service(group, kind, directory, certificates)
        yield service
        service.server.close()
        service.server.abort_clients()


async def answers(peer: Peer, text: bytes = b"are you there?") -> bool:
    await peer.send(text)
    return await peer.receive_exactly(len(text)) == text


@pytest.mark.parametrize("kind", KINDS)
async def test_no_more_connections_than_the_limit(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates, kind: str
) -> None:
    async with opened(kind, tmp_path, certificates) as service, AsyncExitStack() as peers:
        server = await service.start(max_connections=2)
        assert server.statistics() == ServerStatistics(0, 0, 0, 0, False)
        first, second = [peers.enter_context(await service.client()) for _ in range(2)]
        assert await answers(first)
        assert await answers(second)
        assert server.statistics() == ServerStatistics(2, 0, 2, 0, True)
        waiting = [peers.enter_context(service.connect()) for _ in range(3)]
        await settle(service.group)
        assert server.statistics() == ServerStatistics(2, 0, 2, 0, True)
        assert server.is_serving()
        assert await answers(first)
        for number, (leaving, next_one) in enumerate(zip([first, second], waiting[:2], strict=True), 3):
            leaving.close()
            peer: Any
            if service.tls:
                peer = await TLSPeer.wrap(next_one.socket, certificates.client(), server_hostname=NAME)
            else:
                peer = next_one
            peers.enter_context(peer)
            assert await answers(peer)
            assert server.statistics() == ServerStatistics(2, 0, number, 0, True)
        server.close()
        assert await answers(peer)


@pytest.mark.parametrize("kind", ["tcp", "tcp tls"])
async def test_a_connection_that_never_gets_a_protocol_leaves_its_place(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates, kind: str
) -> None:
    made: list[Any] = []

    def factory() -> Any:
        made.append(None)
        if len(made) < 4:
            raise ZeroDivisionError
        return Echo()

    async with opened(kind, tmp_path, certificates) as service:
        contexts = collect_contexts(service.group)
        server = await service.start(factory, max_connections=1)
        for number in range(3):
            with await service.client():
                await until(lambda: len(contexts) > number)  # noqa: B023
        with await service.client() as peer:
            assert await answers(peer)
        assert len(contexts) == 3
        assert server.statistics().accepted_connections == 4


async def test_a_failed_handshake_leaves_its_place(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates
) -> None:
    async with opened("tcp tls", tmp_path, certificates) as service:
        collect_contexts(service.group)
        server = await service.start(max_connections=1, max_handshakes=1)
        for _ in range(3):
            with service.connect() as peer:
                await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await peer.gone()
        with await service.client() as peer:
            assert await answers(peer)
        assert server.statistics() == ServerStatistics(1, 0, 4, 3, True)


async def test_a_finished_handshake_leaves_its_place_among_the_handshakes(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates
) -> None:
    async with opened("tcp tls", tmp_path, certificates) as service, AsyncExitStack() as peers:
        server = await service.start(max_handshakes=1)
        clients = [peers.enter_context(await service.client()) for _ in range(5)]
        for client in clients:
            assert await answers(client)
        assert server.statistics() == ServerStatistics(5, 0, 5, 0, False)


async def test_a_limit_holds_for_all_addresses_of_a_server(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Echo, [HOST, "127.0.0.2"], 0, max_connections=1)
        if len(server.sockets) < 2:
            pytest.skip("a loopback network of one address")
        sockets = [sock.getsockname() for sock in server.sockets]
        with Peer.connect(sockets[0]) as first:
            assert await answers(first)
            with Peer.connect(sockets[0]) as second, Peer.connect(sockets[1]) as third:
                await settle(group)
                assert server.statistics().accepted_connections == 1
                first.close()
                await until(lambda: server.statistics().accepted_connections == 2)
                await settle(group)
                assert server.statistics().accepted_connections == 2
                # Which of the two is next is the system's choice.
                server.close_clients()
                await until(lambda: server.statistics().accepted_connections == 3)
                server.close_clients()
                assert await second.gone()
                assert await third.gone()
        server.close()


async def test_a_server_that_is_closed_at_its_limit(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Echo, HOST, 0, max_connections=1)
        where = server.sockets[0].getsockname()
        with Peer.connect(where) as first, Peer.connect(where) as second:
            assert await answers(first)
            await settle(group)
            server.close()
            assert await second.gone()
            first.close()
            with anyio.fail_after(GUARD):
                await server.wait_closed()
        assert server.statistics() == ServerStatistics(0, 0, 1, 0, False)


async def test_an_upgraded_connection_keeps_its_place(anyio_backend: Any, certificates: Certificates) -> None:
    made: list[Any] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with TransportGroup() as group:
        server = await group.create_server(factory, HOST, 0, max_connections=1)
        where = server.sockets[0].getsockname()
        with Peer.connect(where) as plain, Peer.connect(where) as second:
            await until(lambda: made and made[0].transport)
            made[0].transport.pause_reading()  # The client may be the first of the two to begin.
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(
                    partial(group.start_tls, made[0].transport, made[0], certificates.server(), server_side=True)
                )
                peer = await TLSPeer.wrap(plain.socket, certificates.client(), server_hostname=NAME)
            assert server.statistics() == ServerStatistics(1, 0, 1, 0, True)
            peer.close()
            await until(lambda: len(made) == 2)
            await second.send(b"x")
            with anyio.fail_after(GUARD):
                await made[1].wait_received(1)
        server.close()


@pytest.mark.parametrize("end", ["leave", "time-out"])
async def test_a_thousand_silent_clients(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates, end: str
) -> None:
    """A good client behind them is served as soon as there is room, and they cost no more than the limit."""
    count, limit = 1000, 100
    if sys.platform != "linux":
        pytest.skip("the backlog has to hold all of them")
    with open("/proc/sys/net/core/somaxconn") as setting:
        if int(setting.read()) <= count:
            pytest.skip("the backlog has to hold all of them")
    options = {"ssl_handshake_timeout": 0.1} if end == "time-out" else {}
    async with opened("tcp tls", tmp_path, certificates) as service, AsyncExitStack() as peers:
        collect_contexts(service.group)
        server = await service.start(backlog=2 * count, max_handshakes=limit, start_serving=False, **options)
        before = len(open_descriptors())
        await server.start_serving()
        silent = [peers.enter_context(service.connect()) for _ in range(count)]
        await until(lambda: server.statistics().pending_handshakes == limit)
        if end == "leave":
            await settle(service.group)
            assert server.statistics() == ServerStatistics(0, limit, limit, 0, True)
            assert len(open_descriptors()) <= before + count + limit
            for peer in silent:
                peer.close()
        good = peers.enter_context(await service.client())
        assert await answers(good)
        now = server.statistics()
        assert now.pending_handshakes <= limit
        assert now.accepted_connections == count + 1
        assert now.failed_handshakes + now.pending_handshakes == count


@pytest.mark.parametrize("name", ["max_connections", "max_handshakes"])
@pytest.mark.parametrize(
    ("limit", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("5", TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("kind", KINDS)
async def test_limits_that_are_no_positive_whole_number(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates, kind: str, name: str, limit: Any, error: Any
) -> None:
    async with TransportGroup() as group:
        service = Service(group, kind, tmp_path, certificates)
        with pytest.raises(error, match=name):
            await service.start(**{name: limit})
        assert os.listdir(tmp_path) == []


@needs_unix
async def test_a_limit_of_handshakes_without_tls(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates
) -> None:
    async with TransportGroup() as group:
        for kind in ("tcp", "unix"):
            with pytest.raises(ValueError, match="max_handshakes is only meaningful with ssl"):
                await Service(group, kind, tmp_path, certificates).start(max_handshakes=1)
