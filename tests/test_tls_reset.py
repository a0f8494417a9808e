"""A connection that is reset while OpenSSL sends something of its own: session tickets, Finished.

The system reports a reset once, here to that send. It must not look like an orderly end to the protocol.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from network import needs_unix
from support import GUARD, HOST, Peer, Recorder, Stack, connected, listening
from tls_support import NAME, Certificates, together

pytestmark = pytest.mark.anyio


class Layer:
    """One end of TLS in memory, over a socket or over another layer; the test decides when it sends."""

    def __init__(self, context: ssl.SSLContext, below: Layer | Peer, **options: Any) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, **options)
        self.below = below

    def send(self, data: bytes = b"") -> None:
        """Encrypt `data`, and send all that is encrypted, at once."""
        if data:
            self.tls.write(data)
        self.below.send(self.outgoing.read()) if isinstance(self.below, Layer) else self._send_to_socket()

    def _send_to_socket(self) -> None:
        ciphertext = self.outgoing.read()
        assert self.below.socket.send(ciphertext) == len(ciphertext)  # type: ignore[union-attr]

    async def receive(self) -> bytes:
        while True:
            try:
                return self.tls.read()
            except ssl.SSLWantReadError:
                self.incoming.write(await self.below.receive())

    async def shake_hands(self, *, send_last: bool = True) -> None:
        """Shake hands; the last message waits for the next `send` unless `send_last`."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.send()
                self.incoming.write(await self.below.receive())
            else:
                break
        if send_last:
            self.send()


def client_layer(certificates: Certificates, below: Layer | Peer) -> Layer:
    return Layer(certificates.client(version="1.3"), below, server_hostname=NAME)


async def send_and_reset(layer: Layer, peer: Peer, request: bytes = b"request") -> None:
    """Finish the handshake, send a request and reset the connection, without a pause in between."""
    await layer.shake_hands(send_last=False)
    layer.send(request)
    peer.reset()


async def over_tcp(group: Any, certificates: Certificates, protocol: Recorder) -> None:
    with listening() as listener:
        peer = Peer.connect(listener.getsockname())
        sock, _ = listener.accept()
    await together(
        lambda: group.connect_accepted_socket(lambda: protocol, sock, ssl=certificates.server()),
        lambda: send_and_reset(client_layer(certificates, peer), peer),
    )


async def after_start_tls(group: Any, certificates: Certificates, protocol: Recorder) -> None:
    async with connected(group, protocol) as (transport, _, peer):

        async def upgrade() -> None:
            protocol.transport = await group.start_tls(transport, protocol, certificates.server(), server_side=True)

        await together(upgrade, lambda: send_and_reset(client_layer(certificates, peer), peer))


async def in_tls(group: Any, certificates: Certificates, protocol: Recorder) -> None:
    async with connected(group, protocol) as (transport, _, peer):
        below = client_layer(certificates, peer)
        outer, _ = await together(lambda: upgraded(group, certificates, transport, protocol), below.shake_hands)
        await together(
            lambda: upgraded(group, certificates, outer, protocol),
            lambda: send_and_reset(client_layer(certificates, below), peer),
        )


async def upgraded(group: Any, certificates: Certificates, transport: Any, protocol: Recorder) -> Any:
    protocol.transport = await group.start_tls(transport, protocol, certificates.server(), server_side=True)
    return protocol.transport


async def over_an_anyio_stream(group: Any, certificates: Certificates, protocol: Recorder) -> None:
    async with await anyio.create_tcp_listener(local_host=HOST) as listener:
        streams: list[SocketStream] = []

        async def accept(stream: SocketStream) -> None:
            streams.append(stream)
            scope.cancel()

        peer = Peer.connect(listener.extra(anyio.abc.SocketAttribute.local_address))
        with anyio.CancelScope() as scope:
            await listener.serve(accept)
    await together(
        lambda: group.connect_stream(lambda: protocol, streams[0], ssl=certificates.server(), server_side=True),
        lambda: send_and_reset(client_layer(certificates, peer), peer),
    )


#: The ways in which a server gets a TLS connection; asyncio has no AnyIO streams, and no reliable TLS in TLS.
WAYS = [over_tcp, after_start_tls]
OUR_WAYS = [in_tls, over_an_anyio_stream]


async def check_that_a_reset_is_reported(way: Callable[..., Any], stack: Stack, certificates: Certificates) -> None:
    protocol = Recorder()
    async with stack.open() as group:
        await way(group, certificates, protocol)
        await protocol.wait_for("connection_lost")
    assert protocol.received == b"request"
    assert "eof_received" not in protocol.names
    assert isinstance(protocol.exception, ConnectionResetError)


@pytest.mark.parametrize("way", WAYS)
async def test_t15_client_that_resets_at_once(way: Any, stack: Stack, certificates: Certificates) -> None:
    await check_that_a_reset_is_reported(way, stack, certificates)


@pytest.mark.ours_only("asyncio has no AnyIO streams, and ends TLS in TLS in other ways")
@pytest.mark.parametrize("way", OUR_WAYS)
async def test_t15_client_that_resets_at_once_over_other_channels(
    way: Any, anyio_backend: Any, stack: Stack, certificates: Certificates
) -> None:
    if anyio_backend[1].get("use_uvloop") and tuple(map(int, version("anyio").split(".")[:2])) < (4, 14):
        pytest.skip("on uvloop older releases of AnyIO lose how a connection has ended")
    await check_that_a_reset_is_reported(way, stack, certificates)


async def test_t15_server_that_resets_at_once(stack: Stack, certificates: Certificates) -> None:
    """The client's Finished meets the reset."""
    protocol = Recorder()
    with listening() as listener:
        async with stack.open() as group:
            listener.setblocking(False)

            async def serve() -> None:
                with anyio.fail_after(GUARD):
                    await anyio.wait_readable(listener)
                peer = Peer(listener.accept()[0])
                layer = Layer(certificates.server(version="1.3"), peer, server_side=True)
                layer.incoming.write(await peer.receive())
                with pytest.raises(ssl.SSLWantReadError):
                    layer.tls.do_handshake()
                layer.send()
                peer.reset()

            await together(
                lambda: group.create_connection(
                    lambda: protocol, *listener.getsockname(), ssl=certificates.client(), server_hostname=NAME
                ),
                serve,
            )
            await protocol.wait_for("connection_lost")
    assert protocol.names == ["connection_made", "connection_lost"]
    assert isinstance(protocol.exception, ConnectionResetError)


@pytest.mark.ours_only("asyncio reports a reset while reading is paused")
async def test_t15_closing_after_a_reset_that_only_openssl_saw(stack: Stack, certificates: Certificates) -> None:
    """`close` drops unread data, but not the error."""
    protocol = Recorder(on_connection_made=lambda _, transport: transport.pause_reading())
    async with stack.open() as group:
        await over_tcp(group, certificates, protocol)
        protocol.transport.close()
        await protocol.wait_for("connection_lost")
    assert isinstance(protocol.exception, ConnectionResetError)


@pytest.mark.parametrize("says_so", [True, False])
@needs_unix
async def test_t15_peer_that_disconnects_before_the_session_tickets(
    stack: Stack, certificates: Certificates, says_so: bool
) -> None:
    """Over a UNIX socket they are a broken pipe: an error unless the peer has said `close_notify`."""
    ours, theirs = socket.socketpair()
    protocol = Recorder()
    peer = Peer(theirs)

    async def send_and_leave() -> None:
        layer = client_layer(certificates, peer)
        await layer.shake_hands(send_last=False)
        layer.tls.write(b"request")
        if says_so:
            with pytest.raises(ssl.SSLWantReadError):
                layer.tls.unwrap()
        layer.send()
        peer.close()

    async with stack.open() as group:
        await together(
            lambda: group.connect_accepted_socket(lambda: protocol, ours, ssl=certificates.server()), send_and_leave
        )
        await protocol.wait_for("connection_lost")
    assert protocol.received == b"request"
    assert ("eof_received" in protocol.names) is says_so
    if says_so:
        assert stack.is_oracle or protocol.exception is None  # asyncio reports the broken pipe all the same.
    else:
        assert isinstance(protocol.exception, BrokenPipeError)
