"""TLS: `start_tls` that fails, and connections that end during its handshake."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import anyio
import pytest
from support import SMALL, Peer, Recorder, Stack, collect_contexts, connected, fill, listening, pattern, settle, turns
from tls_helpers import accepted, failed_upgrade
from tls_support import DROPPED, NAME, Certificates, TLSPeer, together

pytestmark = pytest.mark.anyio


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
