"""TLS: calls of `start_tls` that are refused."""

from __future__ import annotations

import io
import os
from pathlib import Path

import anyio
import pytest
from network import needs_pipes
from support import Recorder, Stack, connected, pattern
from tls_helpers import upgrade_client
from tls_support import NAME, Certificates, TLSPeer, together

from transports_anyio import TransportGroup

pytestmark = pytest.mark.anyio


async def test_parameters_that_are_refused(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        context = certificates.client()
        nan = float("nan")
        for arguments, options, error in (
            ((transport, protocol, None), {}, TypeError),
            ((transport, protocol, True), {}, TypeError),
            ((object(), protocol, context), {}, TypeError),
            ((transport, protocol, context), {"ssl_handshake_timeout": 0}, ValueError),
            ((transport, protocol, context), {"ssl_shutdown_timeout": -1}, ValueError),
            *(
                ()
                if stack.is_oracle
                else (
                    ((transport, protocol, context), {"ssl_handshake_timeout": nan}, ValueError),
                    ((transport, protocol, context), {"ssl_shutdown_timeout": nan}, ValueError),
                    ((transport, protocol, context), {"received": 5}, TypeError),
                    ((transport, protocol, context), {"received": "text"}, TypeError),
                )
            ),
        ):
            with pytest.raises(error):
                await group.start_tls(*arguments, server_hostname=NAME, **options)
        await peer.send(b"still alive")
        await protocol.wait_received(11)
        transport.write(b"both ways")
        assert await peer.receive_exactly(9) == b"both ways"
        transport.abort()
        await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`start_tls` on a transport that is closing",
    asyncio="returns a transport that does not work",
    here="`RuntimeError`",
    why="as `sendfile`",
)
@pytest.mark.ours_only
async def test_t13_transport_that_is_closing(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        transport.close()
        with pytest.raises(RuntimeError, match="closing"):
            await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
        await protocol.wait_for("connection_lost")
        with pytest.raises(RuntimeError, match="closing"):
            await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
        assert protocol.exception is None


@pytest.mark.differs(
    "`start_tls` or `sendfile` during another `start_tls`",
    asyncio="a handshake inside the handshake, or the file in its middle",
    here="`RuntimeError`",
    why="one at a time, as with `sendfile`",
)
@pytest.mark.ours_only
async def test_calls_that_are_refused_during_the_handshake(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):

        async def try_again() -> TLSPeer:
            await anyio.wait_readable(peer.socket)
            with pytest.raises(RuntimeError, match="start_tls is in progress"):
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
            with pytest.raises(RuntimeError, match="start_tls is in progress"):
                await group.sendfile(transport, io.BytesIO(b"in between"))
            return await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True)

        new, tls = await together(
            lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME), try_again
        )
        with tls:
            assert await group.sendfile(new, io.BytesIO(b"now")) == 3
            assert await tls.receive_exactly(3) == b"now"
            await tls.send(b"and back")
            await protocol.wait_received(8)
            new.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio does not check this")
async def test_start_tls_while_a_file_is_sent(stack: Stack, certificates: Certificates, tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = pattern(1_000_000)
    path.write_bytes(data)
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        with path.open("rb") as file:

            async def upgrade() -> None:
                await anyio.wait_readable(peer.socket)
                with pytest.raises(RuntimeError, match="sendfile is in progress"):
                    await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
                assert await peer.receive_exactly(len(data)) == data

            await together(lambda: group.sendfile(transport, file), upgrade)
        new, tls = await upgrade_client(group, transport, protocol, peer, certificates)
        with tls:
            new.write(b"secret")
            assert await tls.receive_exactly(6) == b"secret"
            new.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio does not check this")
async def test_transport_that_cannot_be_upgraded(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        async with connected(group) as (transport, protocol, peer):
            transport.write_eof()
            with pytest.raises(RuntimeError, match="write_eof"):
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
            await peer.send(b"still alive")
            await protocol.wait_received(11)
        await protocol.wait_for("connection_lost")


@needs_pipes
async def test_one_way_transports(stack: Stack, certificates: Certificates) -> None:
    reading, writing = os.pipe()
    protocol = Recorder()
    async with stack.open() as group:
        with open(writing, "wb"):
            transport, _ = await group.connect_read_pipe(lambda: protocol, open(reading, "rb"))
            with pytest.raises(TypeError, match="not supported by start_tls"):
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
            transport.close()
            await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio lets the connection go on")
async def test_group_that_is_closed(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, _):
        other = TransportGroup()
        with pytest.raises(RuntimeError, match="not open"):
            await other.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
        transport.abort()
        await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`start_tls` through another group than the transport's",
    asyncio="there is one event loop for all",
    here="`RuntimeError`",
    why="its timers would end with the other group",
)
@pytest.mark.ours_only
async def test_transport_of_another_group(stack: Stack, certificates: Certificates) -> None:
    # Otherwise its timers and callbacks would end with the other group.
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        async with TransportGroup() as other:
            with pytest.raises(RuntimeError, match="belongs to another group"):
                await other.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
        await peer.send(b"still alive")
        await protocol.wait_received(11)
        new, tls = await upgrade_client(group, transport, protocol, peer, certificates)
        with tls:
            new.write(b"secret")
            assert await tls.receive_exactly(6) == b"secret"
            new.abort()
            await protocol.wait_for("connection_lost")
