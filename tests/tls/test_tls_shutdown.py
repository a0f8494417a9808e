"""TLS: the end of a connection, in order or not."""

from __future__ import annotations

import socket
import ssl
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from network import needs_unix
from support import (
    GUARD,
    Peer,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    fill,
    pattern,
    settle,
    turns,
)
from tls_support import (
    DROPPED,
    NAME,
    Certificates,
    TLSPeer,
    tls_client,
    together,
)

if TYPE_CHECKING:
    pass
from tls_helpers import RECORD, legal, peers_contexts

pytestmark = pytest.mark.anyio


async def test_close_sends_close_notify_and_waits_for_the_peers(
    stack: Stack, certificates: Certificates, version: str
) -> None:
    async with stack.open() as group:
        async with tls_client(group, certificates, version=version) as (transport, protocol, peer):
            transport.write(b"last words")
            transport.close()
            assert transport.is_closing()
            assert await peer.receive_exactly(10) == b"last words"
            assert await peer.receive() == b""  # `close_notify`: without it `SSLEOFError`.
            await settle(group)
            assert not protocol.lost
            await peer.shut_down_tls()
            await protocol.wait_for("connection_lost")
            assert await peer.receive_raw() == b""
        # asyncio calls `eof_received` here too.
        assert protocol.names == ["connection_made", "eof_received", "connection_lost"]
        assert protocol.exception is None


@pytest.mark.differs(
    "TLS: `close` inside a callback",
    asyncio="`data_received` or `get_buffer` may be called again, even after `eof_received`",
    here="never called again",
    why="the documentation of `close` says so",
)
async def test_peer_closes(stack: Stack, certificates: Certificates, version: str, recorder: type[Any]) -> None:
    legal(stack, recorder)
    data = pattern(400_000)
    protocol = recorder()
    async with stack.open() as group:
        async with tls_client(group, certificates, protocol, version=version) as (_, _, peer):
            await peer.send(data)
            await peer.shut_down_tls()  # Returns when our `close_notify` has come.
            await protocol.wait_for("connection_lost")
            assert await peer.receive_raw() == b""
        assert protocol.received == data
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None


@pytest.mark.parametrize("end", ["close_notify", "cut"])
async def test_connection_lost_comes_some_iterations_after_the_end_of_file(
    stack: Stack, certificates: Certificates, end: str
) -> None:
    """So a task that has read to the end can still call `drain` of asyncio's `StreamWriter`, which raises after it."""
    events: list[str] = []

    def count(number: int) -> None:
        events.append(f"iteration {number}")
        if number < 2:
            group.call_soon(count, number + 1)

    def eof_received(_: Any) -> None:
        group.call_soon(count, 1)

    protocol = Recorder(on_eof_received=eof_received, on_connection_lost=lambda *_: events.append("lost"))
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        await peer.send(b"data")
        if end == "cut":
            peer.cut()
        else:
            peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")
        assert events == ["iteration 1", "iteration 2", "lost"]


@pytest.mark.parametrize("leaves", [True, False], ids=["peer has left", "peer stays"])
async def test_close_in_a_callback_while_more_is_in_memory(
    stack: Stack, certificates: Certificates, version: str, recorder: type[Any], leaves: bool
) -> None:
    # The rest of a record, or the peer's `close_notify`, has been received together with what the callback got.
    legal(stack, recorder)
    if stack.is_oracle and leaves:
        pytest.skip("asyncio's TLS calls eof_received() from inside close()")
    name = "data_received" if recorder is Recorder else "buffer_updated"
    protocol = recorder(**{f"on_{name}": lambda protocol, _: protocol.transport.close()})
    async with stack.open() as group:
        async with tls_client(group, certificates, protocol, version=version) as (transport, _, peer):
            transport.pause_reading()
            await peer.send(pattern(RECORD))
            if leaves:
                peer.send_close_notify_and_close()
            transport.resume_reading()
            await protocol.wait_for(name)
            if not leaves:
                assert await peer.receive() == b""
                await settle(group)  # It is left in peace until the peer answers.
                await peer.shut_down_tls()
            await protocol.wait_for("connection_lost")
        assert protocol.count(name) == 1
        assert protocol.names[-3:] == [name, "eof_received", "connection_lost"]
        assert protocol.exception is None


async def test_peer_closes_while_reading_is_paused(stack: Stack, certificates: Certificates) -> None:
    data = pattern(100_000)
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.pause_reading()
        await peer.send(data)
        peer.send_close_notify_and_close()
        await settle(group)
        assert protocol.names == ["connection_made"]
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == data
        assert protocol.names == ["connection_made", "data_received", "eof_received", "connection_lost"]


async def test_true_value_from_eof_received_still_closes(stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder(on_eof_received=lambda _: True)
    async with stack.open() as group:
        with capture_log(stack) as records:
            async with tls_client(group, certificates, protocol) as (_, _, peer):
                await peer.shut_down_tls()
                await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert [record.levelname for record in records] == ["WARNING"]


@pytest.mark.ours_only("asyncio warns even if the callback has aborted the transport")
@pytest.mark.parametrize("end", ["close", "abort"])
async def test_eof_received_that_aborts_and_returns_true(stack: Stack, certificates: Certificates, end: str) -> None:
    def eof_received(protocol: Any) -> bool:
        getattr(protocol.transport, end)()
        return True

    protocol = Recorder(on_eof_received=eof_received)
    with capture_log(stack) as records:
        async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
            peer.send_close_notify_and_close()
            await protocol.wait_for("connection_lost")
    assert [record.getMessage() for record in records] == []


async def test_what_is_written_in_eof_received_is_sent(stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder(on_eof_received=lambda protocol: protocol.transport.write(b"answer"))
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        with pytest.raises(ssl.SSLWantReadError):
            peer.socket.unwrap()
        assert await peer.receive_exactly(6) == b"answer"
        assert await peer.receive() == b""
        await protocol.wait_for("connection_lost")


async def test_abort_sends_no_close_notify(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        fill(transport)
        transport.abort()
        assert not protocol.lost
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        with pytest.raises(DROPPED):
            await peer.receive_all()


async def test_abort_during_the_shutdown(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.close()
        assert await peer.receive() == b""
        assert not protocol.lost
        transport.abort()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "connection_lost"]
        assert protocol.exception is None


async def test_abort_after_the_peers_close_notify(stack: Stack, certificates: Certificates) -> None:
    # Both become readable at once, and the callback of the first aborts the second.
    def abort(_: Recorder, data: bytes) -> None:
        if data == b"now":
            transport.abort()

    async with (
        stack.open() as group,
        tls_client(group, certificates) as (transport, protocol, peer),
        tls_client(group, certificates, Recorder(on_data_received=abort)) as (_, other, quick),
    ):
        transport.close()
        assert await peer.receive() == b""
        # epoll reports those first that it has reported the last time: that is this one, alone.
        await quick.send(b"first")
        await other.wait_received(5)
        quick.socket.send(b"now")
        peer.socket.unwrap()
        await protocol.wait_for("connection_lost")
        assert other.received == b"firstnow"
        assert protocol.names == ["connection_made", "connection_lost"]
        assert protocol.exception is None
        other.transport.abort()
        await other.wait_for("connection_lost")


async def test_t8_peer_that_never_answers_close_notify(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        async with tls_client(group, certificates, ssl_shutdown_timeout=0.05) as (transport, protocol, peer):
            contexts = collect_contexts(group)
            transport.close()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, TimeoutError)
            assert contexts == []
            assert await peer.receive() == b""


async def test_peer_that_disconnects_after_our_close_notify(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        contexts = collect_contexts(group)
        transport.close()
        assert await peer.receive() == b""
        peer.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "eof_received", "connection_lost"]
        assert protocol.exception is None
        assert contexts == []


async def test_writing_during_the_shutdown(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.close()
        transport.write(b"too late")
        assert transport.get_write_buffer_size() == 0
        assert await peer.receive() == b""
        await peer.shut_down_tls()
        await protocol.wait_for("connection_lost")


@pytest.mark.differs("TLS: data that arrives after `close`")
@pytest.mark.ours_only
async def test_t8_peer_that_goes_on_sending_after_our_close(
    stack: Stack, certificates: Certificates, version: str
) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, version=version) as (transport, protocol, peer):
            await peer.send(b"before")  # May be in any state of delivery when the transport closes.
            transport.close()
            assert await peer.receive() == b""
            before = len(protocol.received)
            for _ in range(5):
                await peer.send(bytes(20_000))
            assert not protocol.lost
            await peer.shut_down_tls()
            await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        assert len(protocol.received) == before
        assert contexts == []


@pytest.mark.differs("TLS: data that arrives after `close`")
@pytest.mark.ours_only
async def test_r3_close_in_the_middle_of_an_endless_download(stack: Stack, certificates: Certificates) -> None:
    sent = 0
    closed_at = 0

    async def flood(peer: TLSPeer) -> None:
        nonlocal sent
        try:
            while True:
                await peer.send(bytes(65536))
                sent += 65536
        except OSError:
            pass

    def close(protocol: Recorder, _: bytes) -> None:
        nonlocal closed_at
        if len(protocol.received) > 1_000_000:
            protocol.transport.close()
            closed_at = sent

    protocol = Recorder(on_data_received=close)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, protocol, small=True) as (_, _, peer):
            with anyio.fail_after(GUARD):
                await flood(peer)
            await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "data_received", "connection_lost"]
        assert protocol.exception is None
        assert sent - closed_at < 16_000_000
        assert contexts == []


@pytest.mark.parametrize("unread", [False, True], ids=["nothing unread", "unread data"])
async def test_t9_eof_without_close_notify(
    stack: Stack, certificates: Certificates, version: str, unread: bool
) -> None:
    async with stack.open() as group, tls_client(group, certificates, version=version) as (transport, protocol, peer):
        if unread:
            transport.pause_reading()
            await peer.send(b"unread")
        peer.cut()
        await turns()
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == (b"unread" if unread else b"")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None
        if not stack.is_oracle:
            assert transport.get_extra_info("close_notify") is False


@needs_unix
async def test_t9_eof_without_close_notify_over_a_unix_socket(stack: Stack, certificates: Certificates) -> None:
    """Our own `close_notify` then fails with EPIPE at once, while TCP accepts it first; neither is an error."""
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        (_, protocol), peer = await together(
            lambda: group.create_unix_connection(Recorder, sock=ours, ssl=certificates.client(), server_hostname=NAME),
            lambda: TLSPeer.wrap(theirs, certificates.server(), server_side=True),
        )
        peer.close()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None


@pytest.mark.differs(
    "the answer to an end of file without `close_notify`",
    asyncio="the connection is cut",
    here="`close_notify` is sent, as with every close",
    why="a peer that ended only its sending side sees that our data is complete",
)
async def test_an_end_of_file_without_close_notify_is_answered(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (_, protocol, peer):
        peer.cut()
        answer = await peer.receive_raw()
        await protocol.wait_for("connection_lost")
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        assert protocol.exception is None
        # A record of its own; asyncio cuts the connection as well.
        assert answer == b"" if stack.is_oracle else len(answer) > 0
        assert await peer.receive_raw() == b""


@pytest.mark.differs(
    "a TLS client that sends `close_notify` and leaves before it gets the session tickets",
    asyncio="`connection_lost` gets a `BrokenPipeError` or `ConnectionResetError`",
    here="`connection_lost` gets `None`",
    why="no data of the protocol is lost",
)
@pytest.mark.parametrize("size", [5, 100_000])
async def test_client_that_sends_and_disconnects_at_once(
    stack: Stack, certificates: Certificates, recorder: type[Any], size: int
) -> None:
    """It has finished the handshake before the server sends its session tickets, which then fails."""
    legal(stack, recorder)
    data = pattern(size)
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * size + 65536)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * size + 65536)

    async def client() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificates.client(version="1.3").wrap_bio(incoming, outgoing, server_hostname=NAME)
        with Peer(theirs) as peer:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await peer.send(outgoing.read())
                    incoming.write(await peer.receive())
            tls.write(data)
            with pytest.raises(ssl.SSLWantReadError):
                tls.unwrap()
            ciphertext = outgoing.read()
            assert theirs.send(ciphertext) == len(ciphertext)

    async with stack.open() as group:
        (_, protocol), _ = await together(
            lambda: group.connect_accepted_socket(recorder, ours, ssl=certificates.server()), client
        )
        await protocol.wait_for("connection_lost")
        assert protocol.received == data
        assert protocol.names[-2:] == ["eof_received", "connection_lost"]
        if not stack.is_oracle:  # asyncio reports the broken pipe, which does not matter after `close_notify`.
            assert protocol.exception is None
            assert protocol.transport.get_extra_info("close_notify") is True


@pytest.mark.differs(
    "an end of file without `close_notify`",
    asyncio="looks like one with it",
    here="extra info `close_notify` is true after an orderly end only",
    why="it reveals a truncation attack",
)
@pytest.mark.ours_only
async def test_t9_truncation_can_be_detected(stack: Stack, certificates: Certificates) -> None:
    seen: list[object] = []
    protocol = Recorder(
        on_connection_made=lambda _, transport: seen.append(transport.get_extra_info("close_notify")),
        on_eof_received=lambda protocol: seen.append(protocol.transport.get_extra_info("close_notify")),
    )
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")
        assert seen == [False, True]


async def test_t7_peer_resets_under_a_writer(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates, small=True) as (transport, protocol, peer):
        peer.reset()
        with anyio.fail_after(GUARD):
            while not protocol.lost:
                transport.write(bytes(10_000))
                await anyio.lowlevel.checkpoint()
        assert isinstance(protocol.exception, ConnectionError)
        assert transport.is_closing()


async def test_damaged_record(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (_, protocol, peer):
        await peer.send(b"good")
        await protocol.wait_received(4)
        socket.socket.send(peer.socket, b"\x17\x03\x03\x00\x20" + bytes(32))
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ssl.SSLError)
        if not stack.is_oracle:  # asyncio does not report the alert
            with pytest.raises(ssl.SSLError, match="BAD_RECORD_MAC"):
                await peer.receive()


@pytest.mark.differs(
    "data that arrives together with a damaged TLS record",
    asyncio="lost",
    here="delivered, then the error",
    why="nothing that has arrived is lost",
)
@pytest.mark.ours_only
async def test_data_before_a_damaged_record(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.pause_reading()  # Both must be received together.
        await peer.send(b"good")
        socket.socket.send(peer.socket, b"\x17\x03\x03\x00\x20" + bytes(32))
        transport.resume_reading()
        await protocol.wait_for("connection_lost")
        assert protocol.received == b"good"
        assert isinstance(protocol.exception, ssl.SSLError)


class FailingObject(ssl.SSLObject):
    """An `SSLObject` that fails with its own error as soon as there is something to read."""

    def read(self, *arguments: Any) -> Any:
        super().read(*arguments)
        raise ZeroDivisionError


async def test_sslobject_that_fails_to_read(stack: Stack, certificates: Certificates) -> None:
    context = certificates.client()
    context.sslobject_class = FailingObject
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, ssl=context) as (transport, protocol, peer):
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, ZeroDivisionError)
            assert protocol.names == ["connection_made", "connection_lost"]
            with pytest.raises(DROPPED):
                await peer.receive_all()
        assert peers_contexts(contexts) == [protocol.exception]
        if not stack.is_oracle:  # asyncio reports its own internals.
            assert contexts[0]["message"] == "Fatal read error on stream transport"
            assert contexts[0]["transport"] is transport
            assert contexts[0]["protocol"] is protocol
        async with tls_client(group, certificates) as (transport, protocol, peer):
            await peer.send(b"still alive")
            await protocol.wait_received(11)
            transport.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio's ends with SSLError: application data after close notify")
async def test_sslobject_that_fails_to_read_during_the_shutdown(stack: Stack, certificates: Certificates) -> None:
    context = certificates.client()
    context.sslobject_class = FailingObject
    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with tls_client(group, certificates, ssl=context) as (transport, protocol, peer):
            transport.close()
            assert await peer.receive() == b""
            await peer.send(b"x")
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, ZeroDivisionError)
        assert peers_contexts(contexts) == [protocol.exception]
        async with tls_client(group, certificates) as (transport, protocol, peer):
            await peer.send(b"still alive")
            await protocol.wait_received(11)
            transport.abort()
            await protocol.wait_for("connection_lost")


async def test_exception_in_a_callback(stack: Stack, certificates: Certificates) -> None:
    def fail(protocol: Any, data: bytes) -> None:
        raise ZeroDivisionError

    protocol = Recorder(on_data_received=fail)
    async with stack.open() as group, tls_client(group, certificates, protocol) as (_, _, peer):
        contexts = collect_contexts(group)
        await peer.send(b"x")
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, ZeroDivisionError)
        assert [type(exc) for exc in peers_contexts(contexts)] == [ZeroDivisionError]


async def test_leaving_the_group_in_order(stack: Stack, certificates: Certificates) -> None:
    async def drive(peer: TLSPeer) -> None:
        assert await peer.receive_all() == b"last words"
        await peer.shut_down_tls()

    async with AsyncExitStack() as peers, anyio.create_task_group() as tasks:
        async with stack.open() as group:
            transport, protocol, peer = await peers.enter_async_context(tls_client(group, certificates))
            transport.write(b"last words")
            tasks.start_soon(drive, peer)
        assert protocol.lost
        assert protocol.exception is None


@pytest.mark.ours_only("asyncio has no group")
async def test_cancelling_the_group_during_a_shutdown(stack: Stack, certificates: Certificates) -> None:
    scope = anyio.CancelScope()

    async def drive(peer: TLSPeer, protocol: Recorder) -> None:
        assert await peer.receive() == b""
        assert not protocol.lost
        scope.cancel()

    async with AsyncExitStack() as peers, anyio.create_task_group() as tasks:
        with scope:
            async with stack.open() as group:
                _, protocol, peer = await peers.enter_async_context(tls_client(group, certificates))
                tasks.start_soon(drive, peer, protocol)
        assert scope.cancelled_caught
        assert protocol.lost
        assert protocol.exception is None
