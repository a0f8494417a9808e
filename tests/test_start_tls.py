"""`start_tls`: TLS in the middle of a connection."""

from __future__ import annotations

import gc
import io
import os
import socket
import ssl
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from network import needs_pipes, needs_unix
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
    listening,
    pattern,
    settle,
    turns,
    until,
)
from tls_support import DROPPED, NAME, Certificates, TLSPeer, echo, tls_client, tls_peer_process, together

from transports_anyio import TransportGroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def accepted(group: Any, protocol: Any) -> AsyncIterator[Peer]:
    """Accept a connection with a server of the group; yield the client's bare end."""
    server = await group.create_server(lambda: protocol, HOST, 0)
    with Peer.connect(server.sockets[0].getsockname()) as peer:
        await protocol.wait_for("connection_made")
        yield peer
    server.close()


async def upgrade_client(
    group: Any, transport: Any, protocol: Any, peer: Peer, certificates: Certificates, **options: Any
) -> tuple[Any, TLSPeer]:
    """Upgrade both ends of `connected`: the group has the client."""
    new, tls = await together(
        lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME, **options),
        lambda: TLSPeer.wrap(peer.socket, certificates.server(), server_side=True),
    )
    protocol.transport = new
    return new, tls


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


# -- what goes wrong --------------------------------------------------------------------------------------


async def test_certificate_that_is_refused(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        contexts = collect_contexts(group)

        async def accept() -> None:
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                tls = await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True)
                with tls:
                    await tls.receive()  # In TLS 1.3 a server notices it late.

        async def upgrade() -> None:
            with pytest.raises(ssl.SSLCertVerificationError):
                await group.start_tls(transport, protocol, certificates.client(), server_hostname="other.example")

        await together(upgrade, accept)
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ssl.SSLCertVerificationError)
        assert contexts == []


@pytest.mark.differs(
    "`start_tls`: a time-out or a cancellation",
    asyncio="no `connection_lost`",
    here="`connection_lost` is called",
    why="exactly one for every `connection_made`",
)
async def test_handshake_that_takes_too_long(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        with pytest.raises(ConnectionAbortedError, match=r"0\.05 seconds"):
            await group.start_tls(
                transport, protocol, certificates.client(), server_hostname=NAME, ssl_handshake_timeout=0.05
            )
        if stack.is_oracle:
            protocol.hand_over()  # asyncio forgets `connection_lost`.
            return
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionAbortedError)
        assert await peer.gone()


@pytest.mark.ours_only("asyncio never calls connection_lost")
async def test_handshake_that_is_cancelled(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def cancel() -> None:
                    await peer.receive()
                    scope.cancel()

                tasks.start_soon(cancel)
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert await peer.gone()


@pytest.mark.ours_only("asyncio returns a transport that is lost, or raises in a callback")
@pytest.mark.parametrize("how", ["close", "abort", "peer closes", "peer resets"])
async def test_t13_connection_ends_during_the_handshake(stack: Stack, certificates: Certificates, how: str) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        contexts = collect_contexts(group)

        async def upgrade() -> BaseException:
            try:
                await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
            except Exception as exc:
                return exc.with_traceback(None)
            raise AssertionError("no error")

        async def end() -> None:
            await anyio.wait_readable(peer.socket)
            if how == "close":
                transport.close()
            elif how == "abort":
                transport.abort()
            elif how == "peer closes":
                await peer.receive()
                peer.close()
            else:
                peer.reset()

        error, _ = await together(upgrade, end)
        await protocol.wait_for("connection_lost")
        if how.startswith("peer"):
            assert type(error) is ConnectionResetError
            assert type(protocol.exception) is ConnectionResetError
        else:
            assert type(error) is ConnectionAbortedError
            assert protocol.exception is None
        assert contexts == []


async def failed_upgrade(*arguments: Any, **options: Any) -> Exception | None:
    """Upgrade and return the error; asyncio also accepts a transport that has been closed."""
    group, *rest = arguments
    try:
        await group.start_tls(*rest, **options)
    except Exception as exc:
        return exc.with_traceback(None)
    return None


@pytest.mark.differs("`start_tls`: `close` during the handshake")
async def test_buffered_plaintext_is_sent_when_closed_during_the_handshake(
    stack: Stack, certificates: Certificates
) -> None:
    data = pattern(3_000_000)
    protocol = Recorder()
    async with stack.open() as group, connected(group, protocol, small=True) as (transport, _, peer):
        if stack.is_oracle:  # asyncio's upgrade asserts when a paused protocol is to be resumed.
            transport.set_write_buffer_limits(high=1 << 30)
        transport.write(data)

        async def close() -> None:
            await turns()
            transport.close()
            # As a server it would speak second, so nothing but this has been sent.
            assert await peer.receive_all() == data

        error, _ = await together(
            lambda: failed_upgrade(group, transport, protocol, certificates.server(), server_side=True), close
        )
        if stack.is_oracle:
            protocol.hand_over()  # asyncio forgets `connection_lost`.
            return
        await protocol.wait_for("connection_lost")
        assert type(error) is ConnectionAbortedError
        assert protocol.exception is None
        assert protocol.received == b""


@pytest.mark.differs(
    "`start_tls`: `close` during the handshake",
    asyncio="`connection_lost` may never come, or gets an error; the caller may get a transport that does not work",
    here=(
        "the buffer is flushed, encrypted or not; the caller gets `ConnectionAbortedError`, and the protocol "
        "`connection_lost(None)`"
    ),
    why="exactly one `connection_lost`, and nothing that was written is lost",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("peer_does", ["complete", "nothing", "leave"])
async def test_what_is_written_during_the_handshake_and_closed(
    stack: Stack, certificates: Certificates, peer_does: str
) -> None:
    data = pattern(300_000)
    timeout = 0.1 if peer_does == "nothing" else None

    async def end() -> None:
        await anyio.wait_readable(peer.socket)
        transport.write(data)
        transport.close()
        transport.write(b"and this")  # Dropped, as always after a close over TLS.
        if peer_does == "nothing":
            assert (await peer.receive_all())[0] == 0x16  # Only the handshake, not the written data.
        elif peer_does == "leave":
            peer.reset()
        else:
            with await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True) as tls:
                await tls.send(b"too late")
                assert await tls.receive_all() == data
                await tls.shut_down_tls()

    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        error, _ = await together(
            lambda: failed_upgrade(
                group, transport, protocol, certificates.client(), server_hostname=NAME, ssl_handshake_timeout=timeout
            ),
            end,
        )
        await protocol.wait_for("connection_lost")
        assert type(error) is (ConnectionResetError if peer_does == "leave" else ConnectionAbortedError)
        assert protocol.exception is (None if peer_does == "complete" else error)
        assert protocol.count("connection_lost") == 1
        assert protocol.received == b""
        assert contexts == []


@pytest.mark.ours_only("asyncio lets a closing transport be upgraded")
@pytest.mark.parametrize("how", ["cancelled", "aborted", "peer resets", "takes too long"])
async def test_a_close_during_the_handshake_whose_flush_is_aborted(
    stack: Stack, certificates: Certificates, how: str
) -> None:
    errors: list[Any] = []
    timeout = 0.1 if how == "takes too long" else None
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        fill(transport, 1_000_000)

        async def upgrade() -> None:
            errors.append(
                await failed_upgrade(
                    group,
                    transport,
                    protocol,
                    certificates.client(),
                    server_hostname=NAME,
                    ssl_handshake_timeout=timeout,
                )
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upgrade)
            await turns()
            transport.close()
            await settle(group)
            assert not protocol.lost
            if how == "cancelled":
                tasks.cancel_scope.cancel()
            elif how == "aborted":
                transport.abort()
            elif how == "peer resets":
                peer.reset()
        await protocol.wait_for("connection_lost")
        assert protocol.count("connection_lost") == 1
        assert protocol.count("resume_writing") == 0
        if how == "cancelled":
            assert errors == []
        else:
            assert [type(error) for error in errors] == [ConnectionAbortedError]
        if how in ("cancelled", "aborted"):
            assert protocol.exception is None
        else:
            assert type(protocol.exception) in (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
        assert contexts == []


@pytest.mark.ours_only("asyncio has no group to leave")
@pytest.mark.parametrize("written", ["before", "during"])
async def test_group_that_is_left_during_the_handshake(stack: Stack, certificates: Certificates, written: str) -> None:
    # In order: buffered data is flushed first, as plaintext or encrypted.
    data = pattern(3_000_000)
    protocol = Recorder()
    errors: list[Any] = []

    async def upgrade(group: Any) -> None:
        errors.append(
            await failed_upgrade(group, protocol.transport, protocol, certificates.client(), server_hostname=NAME)
        )

    async def read(peer: Peer) -> None:
        with peer:
            if written == "before":
                assert await peer.receive_exactly(len(data)) == data
                assert await peer.gone()
            else:
                with await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True) as tls:
                    assert await tls.receive_all() == data
                    await tls.shut_down_tls()

    stack.expected_tasks = 2
    async with anyio.create_task_group() as tasks:
        async with stack.open() as group:
            with listening(receive_buffer=SMALL) as listener:
                transport, _ = await group.create_connection(lambda: protocol, *listener.getsockname())
                peer = Peer(listener.accept()[0])
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            if written == "before":
                transport.write(data)
            tasks.start_soon(upgrade, group)
            await turns()
            if written == "during":
                transport.write(data)
            assert not protocol.lost
            tasks.start_soon(read, peer)
        assert protocol.lost
    assert protocol.exception is None
    assert [type(error) for error in errors] == [ConnectionAbortedError]


@pytest.mark.ours_only("asyncio goes on with the handshake, and returns a transport that is lost")
@pytest.mark.parametrize("how", ["abort", "close"])
async def test_end_between_the_handshake_and_the_return(stack: Stack, certificates: Certificates, how: str) -> None:
    # `start_tls` returns when its task runs. The callback here may come before or after that.
    ended: list[bool] = []
    returned: list[Any] = []

    class Ending(ssl.SSLObject):
        def cipher(self) -> Any:
            if not ended:
                group.call_soon(end)
            return super().cipher()

    def end() -> None:
        if not ended:
            ended.append(bool(returned))
            getattr(transport, how)()

    context = certificates.client()
    context.sslobject_class = Ending
    data = pattern(1_000_000)
    async with stack.open() as group, connected(group, small=True) as (transport, protocol, peer):
        transport.write(data)
        assert protocol.writing_paused

        async def upgrade() -> None:
            returned.append(await group.start_tls(transport, protocol, context, server_hostname=NAME))

        async def accept() -> None:
            assert await peer.receive_exactly(len(data)) == data
            with await TLSPeer.wrap(peer.socket, certificates.server(), server_side=True) as tls:
                if how == "close":
                    assert await tls.receive_all() == b""
                    await tls.shut_down_tls()
                else:
                    with pytest.raises(DROPPED):
                        await tls.receive_all()

        await together(upgrade, accept)
        await protocol.wait_for("connection_lost")
        assert returned[0].is_closing()
        assert protocol.exception is None
        if how == "abort" and ended == [False]:
            assert protocol.names == ["connection_made", "pause_writing", "connection_lost"]


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


async def test_peer_that_has_ended_its_stream_before(stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder(on_eof_received=lambda _: True)
    async with stack.open() as group, connected(group, protocol) as (transport, _, peer):
        peer.shutdown()
        await protocol.wait_for("eof_received")
        with pytest.raises(ConnectionResetError):
            await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)
        assert transport.is_closing()
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ConnectionResetError)


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


# -- ownership --------------------------------------------------------------------------------------------


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


# -- TLS in TLS -------------------------------------------------------------------------------------------


async def test_tls_in_tls(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, outer):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        inner = certificates.server().wrap_bio(incoming, outgoing, server_side=True)

        async def attempt(call: Any, *arguments: Any) -> Any:
            while True:
                try:
                    result = call(*arguments)
                except ssl.SSLWantReadError:
                    await outer.send(outgoing.read())
                    incoming.write(await outer.receive())
                else:
                    await outer.send(outgoing.read())
                    return result

        new, _ = await together(
            lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME),
            lambda: attempt(inner.do_handshake),
        )
        protocol.transport = new
        data = pattern(1_000_000)
        new.write(data)
        received = b""
        while len(received) < len(data):
            received += await attempt(inner.read, 65536)
        assert received == data

        async def send() -> None:
            for start in range(0, len(data), 50_000):
                await attempt(inner.write, data[start : start + 50_000])

        await together(send, lambda: protocol.wait_received(len(data)))
        assert protocol.received == data
        assert new.get_extra_info("ssl_object") is not transport.get_extra_info("ssl_object")
        new.close()
        if stack.is_oracle:
            await attempt(inner.unwrap)
        else:  # Each layer sends `close_notify`: the inner, then the outer.
            await attempt(inner.unwrap)
            assert await outer.receive() == b""
        await outer.shut_down_tls()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@pytest.mark.differs(
    "`start_tls`: a server name callback that closes the connection",
    asyncio="`start_tls` never returns",
    here="`ConnectionAbortedError`",
    why="an awaited call must end",
)
@pytest.mark.ours_only
async def test_connection_that_is_closed_by_its_server_name_callback(stack: Stack, certificates: Certificates) -> None:
    # OpenSSL has an answer to send when the callback returns, but the connection is closed by then.
    context = certificates.server()
    context.sni_callback = lambda *_: protocol.transport.close()  # type: ignore[assignment]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    protocol = Recorder()
    async with stack.open() as group, accepted(group, protocol) as peer:

        async def close() -> None:
            await peer.send(outgoing.read())
            assert await peer.receive_all() == b""

        error, _ = await together(
            lambda: failed_upgrade(group, protocol.transport, protocol, context, server_side=True), close
        )
        await protocol.wait_for("connection_lost")
        assert type(error) is ConnectionAbortedError
        assert protocol.exception is None


@pytest.mark.ours_only("asyncio cuts the connection, without `close_notify`")
async def test_tls_in_tls_that_is_closed_by_its_server_name_callback(stack: Stack, certificates: Certificates) -> None:
    # OpenSSL has an answer to send by then, but the TLS below has said `close_notify`.
    context = certificates.server()
    context.sni_callback = lambda *_: transport.close()  # type: ignore[assignment]
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    inner = certificates.client().wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        inner.do_handshake()
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, outer):
        contexts = collect_contexts(group)

        async def close() -> None:
            await outer.send(outgoing.read())
            assert await outer.receive_all() == b""
            await outer.shut_down_tls()

        error, _ = await together(lambda: failed_upgrade(group, transport, protocol, context, server_side=True), close)
        await protocol.wait_for("connection_lost")
        assert type(error) is ConnectionAbortedError
        assert protocol.exception is None
        assert contexts == []


async def test_tls_in_tls_leaves_no_reference_cycle(stack: Stack, certificates: Certificates) -> None:
    contexts = {"server": certificates.server(), "client": certificates.client()}

    async def upgrade(name: str, protocol: Recorder) -> None:
        options: dict[str, Any] = {"server_side": True} if name == "server" else {"server_hostname": NAME}
        protocol.transport = await group.start_tls(protocol.transport, protocol, contexts[name], **options)

    async with stack.open() as group:
        gc.collect()
        before = sum(isinstance(thing, ssl.SSLObject) for thing in gc.get_objects())
        gc.disable()
        try:
            protocols = {"server": Recorder(), "client": Recorder()}
            for sock, protocol in zip(socket.socketpair(), protocols.values(), strict=True):
                await group.create_connection(lambda protocol=protocol: protocol, sock=sock)
            for _ in range(2):
                async with anyio.create_task_group() as tasks:
                    for name, protocol in protocols.items():
                        tasks.start_soon(upgrade, name, protocol)
            protocols["client"].transport.close()
            for protocol in protocols.values():
                await protocol.wait_for("connection_lost")
                protocol.transport = None
                protocol.calls.clear()
            await turns()
            assert sum(isinstance(thing, ssl.SSLObject) for thing in gc.get_objects()) == before
        finally:
            gc.enable()


@pytest.mark.parametrize("waiting", [False, True], ids=["idle", "flushes"])
async def test_tls_in_tls_that_is_closed_during_the_handshake(
    stack: Stack, certificates: Certificates, waiting: bool
) -> None:
    # The interrupted handshake has no shutdown, but the TLS below it has.
    data = pattern(3_000_000) if waiting else b""
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, outer):
        transport.set_write_buffer_limits(high=1 << 30)
        transport.write(data)

        async def close() -> None:
            await turns()
            transport.close()
            assert await outer.receive_all() == data  # It fails where there is no `close_notify`.
            await outer.shut_down_tls()

        error, _ = await together(
            lambda: failed_upgrade(group, transport, protocol, certificates.server(), server_side=True), close
        )
        await protocol.wait_for("connection_lost")
        if not stack.is_oracle:  # For asyncio's protocol the handshake was interrupted.
            assert type(error) is ConnectionAbortedError
            assert protocol.exception is None
        assert protocol.received == b""


@pytest.mark.ours_only("asyncio reports it from a callback of its loop")
@pytest.mark.parametrize("when", ["handshake", "exchange", "shutdown"])
async def test_tls_in_tls_whose_outer_object_fails(stack: Stack, certificates: Certificates, when: str) -> None:
    # A context's own `sslobject_class` may raise anything; only that connection ends.
    failing = False

    class Failing(ssl.SSLObject):
        def read(self, *arguments: Any) -> Any:
            result = super().read(*arguments)
            if failing:
                raise ZeroDivisionError
            return result

    context = certificates.client()
    context.sslobject_class = Failing
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    inner = certificates.server().wrap_bio(incoming, outgoing, server_side=True)

    async def shake_hands() -> None:
        nonlocal failing
        while True:
            incoming.write(await outer.receive())
            failing = when == "handshake"
            try:
                inner.do_handshake()
                break
            except ssl.SSLWantReadError:
                await outer.send(outgoing.read())
                if failing:
                    return
        await outer.send(outgoing.read())

    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, ssl=context) as (transport, protocol, outer):

            async def upgrade() -> Any:
                return await group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME)

            if when == "handshake":
                with pytest.raises(ZeroDivisionError):
                    await together(upgrade, shake_hands)
            else:
                new, _ = await together(upgrade, shake_hands)
                await turns()
                failing = True
                if when == "shutdown":
                    new.close()
                inner.write(b"x")
                await outer.send(outgoing.read())
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, ZeroDivisionError)
        # `start_tls` has raised the error.
        assert [context["exception"] for context in contexts] == ([] if when == "handshake" else [protocol.exception])
        async with connected(group) as (transport, protocol, peer):
            await peer.send(b"still alive")
            await protocol.wait_received(11)
            transport.abort()
            await protocol.wait_for("connection_lost")


# -- other makes ------------------------------------------------------------------------------------------


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
