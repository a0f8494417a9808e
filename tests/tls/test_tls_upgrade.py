"""TLS: `start_tls` in the middle of a connection, and the transport that it replaces."""

from __future__ import annotations

import io
import ssl
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import needs_unix
from support import GUARD, HOST, Peer, Recorder, Stack, connected, pattern, until
from tls_helpers import accepted, upgrade_client
from tls_support import NAME, Certificates, TLSPeer, echo, tls_peer_process, together

pytestmark = pytest.mark.anyio


# -- both ends --------------------------------------------------------------------------------------------


async def test_client(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        await peer.send(b"in the clear")
        await protocol.wait_received(12)
        context = certificates.client()
        new, tls = await together(
            lambda: group.start_tls(transport, protocol, context, server_hostname=NAME),
            lambda: TLSPeer.wrap(peer.socket, certificates.server(), server_side=True),
        )
        with tls:
            assert new is not transport
            assert new.get_extra_info("sslcontext") is context
            assert new.get_extra_info("cipher") == tls.socket.cipher()
            assert new.get_extra_info("peername") == tls.socket.getsockname()
            assert new.get_protocol() is protocol
            assert new.is_reading()
            assert new.can_write_eof() is False
            new.write(b"secret")
            assert await tls.receive_exactly(6) == b"secret"
            await tls.send(b"answer")
            assert await protocol.wait_received(18) == b"in the clearanswer"
            await tls.shut_down_tls()
            await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert protocol.count("connection_made") == 1


async def test_server(stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder()
    async with stack.open() as group, accepted(group, protocol) as peer:
        new, tls = await together(
            lambda: group.start_tls(protocol.transport, protocol, certificates.server(), server_side=True),
            lambda: TLSPeer.wrap(peer.socket, certificates.client(), server_hostname=NAME),
        )
        with tls:
            await tls.send(b"question")
            assert await protocol.wait_received(8) == b"question"
            new.write(b"answer")
            new.close()
            assert await tls.receive_all() == b"answer"
            await tls.shut_down_tls()
            await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@needs_unix
async def test_unix_connection(stack: Stack, certificates: Certificates, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    client, server = Recorder(), Recorder(on_data_received=echo)
    async with stack.open() as group:
        listener = await group.create_unix_server(lambda: server, path)
        await group.create_unix_connection(lambda: client, path)
        await server.wait_for("connection_made")

        async def upgrade(protocol: Recorder, context: ssl.SSLContext, **options: Any) -> None:
            protocol.transport = await group.start_tls(protocol.transport, protocol, context, **options)

        await together(
            lambda: upgrade(server, certificates.server(), server_side=True),
            lambda: upgrade(client, certificates.client(), server_hostname=NAME),
        )
        client.transport.write(b"hello")
        await client.wait_received(5)
        client.transport.close()
        await client.wait_for("connection_lost")
        await server.wait_for("connection_lost")
        listener.close()


async def test_new_protocol(stack: Stack, certificates: Certificates) -> None:
    # The protocol given gets every later callback; its `connection_made` is not called.
    first = Recorder()
    calls: list[Any] = []

    class Second:
        def data_received(self, data: bytes) -> None:
            calls.append(data)

        def eof_received(self) -> None:
            calls.append("eof")

        def connection_lost(self, exc: Exception | None) -> None:
            calls.append(exc)
            first.hand_over()  # for the check at the end of each test

    async with stack.open() as group, connected(group, first) as (transport, _, peer):
        _, tls = await together(
            lambda: group.start_tls(transport, Second(), certificates.client(), server_hostname=NAME),
            lambda: TLSPeer.wrap(peer.socket, certificates.server(), server_side=True),
        )
        with tls:
            await tls.send(b"x")
            await tls.shut_down_tls()
            await until(lambda: len(calls) == 3)
    assert calls == [b"x", "eof", None]
    assert first.names == ["connection_made"]


@pytest.mark.ours_only("abort_clients is new in Python 3.13")
@pytest.mark.parametrize("how", ["abort_clients", "close_clients", "group"])
async def test_upgraded_connection_belongs_to_its_server(stack: Stack, certificates: Certificates, how: str) -> None:
    protocol = Recorder()
    async with stack.open() as group:
        server = await group.create_server(lambda: protocol, HOST, 0)
        peer = Peer.connect(server.sockets[0].getsockname())
        await protocol.wait_for("connection_made")
        _, tls = await together(
            lambda: group.start_tls(protocol.transport, protocol, certificates.server(), server_side=True),
            lambda: TLSPeer.wrap(peer.socket, certificates.client(), server_hostname=NAME),
        )
        with tls:
            server.close()
            if how == "abort_clients":
                server.abort_clients()
            elif how == "close_clients":
                server.close_clients()
                await tls.shut_down_tls()
            else:
                tls.send_close_notify_and_close()
            with anyio.fail_after(GUARD):
                await server.wait_closed()
            assert protocol.lost


@pytest.mark.ours_only("asyncio is the other end")
async def test_asyncio_upgrades_the_other_end(stack: Stack, certificates: Certificates) -> None:
    async def upgrade(protocol: Recorder) -> None:
        transport = protocol.transport
        transport.write(b"go ahead\n")
        protocol.transport = await group.start_tls(transport, protocol, certificates.server(), server_side=True)

    def received(protocol: Recorder, data: bytes) -> None:
        if data == b"STARTTLS\n":
            protocol.transport.pause_reading()
            group.start_soon(upgrade, protocol)
        else:
            echo(protocol, data)

    protocol = Recorder(on_data_received=received)
    with certificates.files() as files:
        async with stack.open() as group:
            server = await group.create_server(lambda: protocol, HOST, 0)
            port = server.sockets[0].getsockname()[1]
            async with tls_peer_process("asyncio_starttls_client", port, files["ca"], NAME) as peer:
                assert await peer.line() == "hello"
                assert await peer.line() == "lost None"
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None
            server.close()


# -- data around the handshake ----------------------------------------------------------------------------


async def test_reading_is_paused_before(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        transport.pause_reading()
        new, tls = await upgrade_client(group, transport, protocol, peer, certificates)
        with tls:
            assert new.is_reading()
            await tls.send(b"x")
            await protocol.wait_received(1)
            new.abort()
            await protocol.wait_for("connection_lost")


async def test_buffered_data_is_sent_in_plaintext_first(stack: Stack, certificates: Certificates) -> None:
    data = pattern(3_000_000)

    async def read_then_accept(peer: Peer) -> TLSPeer:
        assert await peer.receive_exactly(len(data)) == data
        return await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True)

    protocol = Recorder()
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        if stack.is_oracle:  # asyncio's upgrade asserts when a paused protocol is to be resumed.
            transport.set_write_buffer_limits(high=1 << 30)
        transport.write(data)
        assert transport.get_write_buffer_size() > 0
        assert protocol.writing_paused != stack.is_oracle
        new, tls = await together(
            lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME),
            lambda: read_then_accept(peer),
        )
        with tls:
            assert not protocol.writing_paused
            new.write(b"secret")
            assert await tls.receive_exactly(6) == b"secret"
            new.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`start_tls`: the first data",
    asyncio="may reach the protocol before the call returns",
    here="reaches the protocol after the call has returned",
    why="otherwise the protocol would answer without TLS",
)
async def test_data_that_comes_at_once_after_the_handshake(stack: Stack, certificates: Certificates) -> None:
    # The protocol must have the new transport by then.
    seen: list[Any] = []

    def received(protocol: Recorder, data: bytes) -> None:
        seen.append(protocol.transport.get_extra_info("cipher"))
        protocol.transport.write(data)

    protocol = Recorder(on_data_received=received)

    async def upgrade() -> Any:
        protocol.transport = await group.start_tls(
            protocol.transport, protocol, certificates.server(), server_side=True
        )

    async with stack.open() as group, accepted(group, protocol) as peer:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)

        async def client() -> None:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await peer.send(outgoing.read())
                    incoming.write(await peer.receive())
            tls.write(b"first")
            await peer.send(outgoing.read())

        await together(upgrade, client)
        await protocol.wait_received(5)
        if not stack.is_oracle:  # asyncio's delivers it before `start_tls` has returned.
            assert seen[0] is not None
        protocol.transport.abort()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio delivers data before `start_tls` has returned")
async def test_reading_that_is_resumed_during_the_handshake(stack: Stack, certificates: Certificates) -> None:
    # This counts for the old transport: the new one receives nothing before `start_tls` has returned.
    returned_before: list[bool] = []
    protocol = Recorder(on_data_received=lambda *_: returned_before.append(protocol.transport is not old))
    data = pattern(1_000_000)  # More than what is received with the last message of the handshake.
    async with stack.open() as group, accepted(group, protocol) as peer:
        old = protocol.transport
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)

        async def upgrade() -> None:
            protocol.transport = await group.start_tls(old, protocol, certificates.server(), server_side=True)

        async def client() -> None:
            old.pause_reading()
            old.resume_reading()
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await peer.send(outgoing.read())
                    incoming.write(await peer.receive())
            for start in range(0, len(data), 10_000):
                tls.write(data[start : start + 10_000])
            await peer.send(outgoing.read())

        await together(upgrade, client)
        assert await protocol.wait_received(len(data)) == data
        assert all(returned_before)
        protocol.transport.abort()
        await protocol.wait_for("connection_lost")


async def test_t2_plaintext_injected_before_the_upgrade(stack: Stack, certificates: Certificates) -> None:
    # RFC 3207, section 4.2, and CVE-2024-34083: plaintext must not be read as if it had been encrypted.
    protocol = Recorder(on_data_received=lambda protocol, data: protocol.transport.pause_reading())
    async with stack.open() as group, accepted(group, protocol) as peer:
        await peer.send(b"STARTTLS\r\n")
        await protocol.wait_received(10)
        await peer.send(b"EVIL\r\n")
        with anyio.fail_after(GUARD), pytest.raises(ssl.SSLError):
            await group.start_tls(protocol.transport, protocol, certificates.server(), server_side=True)
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ssl.SSLError)
    assert protocol.received == b"STARTTLS\r\n"


async def test_t2_plaintext_in_the_same_segment(stack: Stack, certificates: Certificates) -> None:
    # The protocol got it as plaintext, and does not get it again after the upgrade.
    protocol = Recorder()
    async with stack.open() as group, accepted(group, protocol) as peer:
        await peer.send(b"STARTTLS\r\nEVIL\r\n")
        await protocol.wait_received(16)
        new, tls = await together(
            lambda: group.start_tls(protocol.transport, protocol, certificates.server(), server_side=True),
            lambda: TLSPeer.wrap(peer.socket, certificates.client(), server_hostname=NAME),
        )
        with tls:
            await tls.send(b"GOOD\r\n")
            assert await protocol.wait_received(22) == b"STARTTLS\r\nEVIL\r\nGOOD\r\n"
            new.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`start_tls`: the beginning of the handshake, if the old protocol received it",
    asyncio="lost",
    here="passed back as `received`",
    why="[CPython 142352](https://github.com/python/cpython/issues/142352)",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("cut", [1, 5, 100, None])
async def test_t1_start_of_the_handshake_came_with_the_last_plaintext(
    stack: Stack, certificates: Certificates, cut: int | None
) -> None:
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    protocol = Recorder(on_data_received=lambda protocol, data: protocol.transport.pause_reading())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    async with stack.open() as group, accepted(group, protocol) as peer:
        await peer.send(header + hello[:cut])
        await protocol.wait_received(len(header) + len(hello[:cut]))
        handed_back = protocol.received[len(header) :]

        async def client() -> None:
            await peer.send(hello[len(handed_back) :])
            while True:
                incoming.write(await peer.receive())
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    pass
            await peer.send(outgoing.read())

        new, _ = await together(
            lambda: group.start_tls(
                protocol.transport, protocol, certificates.server(), server_side=True, received=handed_back
            ),
            client,
        )
        tls.write(b"hello")
        await peer.send(outgoing.read())
        await until(lambda: protocol.received.endswith(b"hello"))
        new.abort()
        await protocol.wait_for("connection_lost")


# -- the old transport ------------------------------------------------------------------------------------


@pytest.mark.differs(
    "`start_tls`: `write` on the old transport",
    asyncio="sent unencrypted, in the middle of the TLS data",
    here="encrypted if written during the handshake; afterwards `RuntimeError`",
    why="no secret is sent unencrypted",
)
@pytest.mark.ours_only
async def test_writing_to_the_old_transport(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):

        async def write() -> TLSPeer:
            await until(lambda: transport.get_protocol() is protocol)
            assert (await peer.receive(1))[0] == 0x16  # The handshake has begun.
            transport.write(b"meanwhile")
            raise ConnectionAbortedError

        with pytest.raises(ConnectionAbortedError):
            await together(
                lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME), write
            )
        await protocol.wait_for("connection_lost")
    async with stack.open() as group, connected(group) as (transport, protocol, peer):

        async def upgrade() -> Any:
            return await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)

        async def accept() -> TLSPeer:
            await anyio.wait_readable(peer.socket)
            transport.write(b"meanwhile")
            return await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True)

        new, tls = await together(upgrade, accept)
        with tls:
            assert await tls.receive_exactly(9) == b"meanwhile"
            for call in (transport.write, lambda data: transport.writelines([data])):
                with pytest.raises(RuntimeError, match="start_tls"):
                    call(b"stale")
            transport.pause_reading()
            assert new.is_reading()
            transport.close()  # It is the same connection.
            assert new.is_closing()
            await tls.shut_down_tls()
            await protocol.wait_for("connection_lost")
        assert protocol.count("connection_lost") == 1


@pytest.mark.differs(
    "`start_tls`: the old transport afterwards",
    asyncio="`is_closing` is false, `is_reading` true",
    here="`is_closing` is true, `is_reading` false",
    why="it can only end the connection",
)
@pytest.mark.ours_only
async def test_state_of_the_old_transport(stack: Stack, certificates: Certificates) -> None:
    # It can only be used to end the connection.
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        new, tls = await upgrade_client(group, transport, protocol, peer, certificates)
        with tls:
            assert (transport.is_closing(), transport.is_reading()) == (True, False)
            assert (new.is_closing(), new.is_reading()) == (False, True)
            new.abort()
            await protocol.wait_for("connection_lost")
            assert (transport.is_closing(), transport.is_reading()) == (True, False)


@pytest.mark.differs("`start_tls`: the old transport afterwards")
@pytest.mark.ours_only
async def test_the_old_transport_names_its_successor(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        new, tls = await upgrade_client(group, transport, protocol, peer, certificates)
        with tls:
            with pytest.raises(RuntimeError, match=r"start_tls\(\) after start_tls\(\): it returned a new transport"):
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
            with pytest.raises(RuntimeError, match=r"sendfile\(\) after start_tls\(\): it returned a new transport"):
                await group.sendfile(transport, io.BytesIO(b"in the clear"))
            new.write(b"alive")
            assert await tls.receive() == b"alive"
