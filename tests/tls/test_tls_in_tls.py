"""TLS: `start_tls` on a connection that has TLS already."""

from __future__ import annotations

import gc
import socket
import ssl
from typing import Any

import anyio
import pytest
from support import Recorder, Stack, collect_contexts, connected, pattern, turns
from tls_helpers import failed_upgrade
from tls_support import NAME, Certificates, tls_client, together

pytestmark = pytest.mark.anyio


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
