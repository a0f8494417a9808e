"""Much data both ways at the same time, through small watermarks, against a slow peer in another process."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import anyio
import pytest
from network import needs_selector
from support import GUARD, HOST, BufferedRecorder, Recorder, Stack, peer_process, socket_pair, until
from tls_support import NAME, Certificates, TLSPeer, together

pytestmark = pytest.mark.anyio

SIZE = 64 << 20
PIECE = 48 * 1024
HIGH = 32 * 1024
PAUSES = 3


class Pusher(Recorder):
    """Send `SIZE` bytes with flow control, and hash both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = hashlib.sha256()
        self.got = hashlib.sha256()
        self.bytes = 0
        self.left = SIZE
        self.greatest = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=HIGH, low=HIGH // 4)
        self.push()

    def push(self) -> None:
        while self.left and not self.writing_paused:
            block = (self.left.to_bytes(8, "big") * (PIECE // 8))[: self.left]
            self.left -= len(block)
            self.sent.update(block)
            self.transport.write(block)
            self.greatest = max(self.greatest, self.transport.get_write_buffer_size())
        if not self.left:
            self.transport.write_eof()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.push()

    def data_received(self, data: bytes) -> None:
        self.got.update(data)
        self.bytes += len(data)

    def eof_received(self) -> bool:
        super().eof_received()
        return True  # the rest is still sent


@pytest.mark.ours_only("asyncio's buffers are measured in other tests")
async def test_64_mib_each_way_at_once_against_a_slow_reader(stack: Stack) -> None:
    pushers: list[Pusher] = []

    def make() -> Pusher:
        pushers.append(Pusher())
        return pushers[-1]

    async with stack.open() as group:
        server = await group.create_server(make, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        async with peer_process("exchange", port, SIZE, 100_000, PAUSES) as peer:
            for _ in range(PAUSES):
                assert await peer.line() == "waiting"
                with anyio.fail_after(GUARD):
                    await pushers[0].wait_until(lambda: pushers[0].writing_paused)
                await peer.say("go on")
            sent, received, count = (await peer.line()).split()
        (pusher,) = pushers
        assert int(count) == SIZE
        assert received == pusher.sent.hexdigest()
        await pusher.wait_for("eof_received")
        assert pusher.bytes == SIZE
        assert sent == pusher.got.hexdigest()
        assert pusher.greatest <= HIGH + PIECE
        assert sum(name == "pause_writing" for name, *_ in pusher.calls) >= PAUSES
        pusher.transport.close()
        await pusher.wait_for("connection_lost")
        server.close()


# Enough to count as much, and what the buffers of a UNIX socket hold.
LARGE = 150_000


@needs_selector
@pytest.mark.differs(
    "a small message that arrives beside much data",
    asyncio="waits for the data of every connection that was ready before it",
    here="waits for that of one connection",
    why="a request takes as long as one large message, however many of them there are",
)
@pytest.mark.parametrize("tls", [False, True], ids=["", "TLS"])
@pytest.mark.parametrize("buffered", [False, True], ids=["", "buffered"])
async def test_a_small_message_waits_for_one_large_one(
    stack: Stack, certificates: Certificates, buffered: bool, tls: bool
) -> None:
    order: list[str] = []
    with ExitStack() as sockets:
        pairs = [sockets.enter_context(socket_pair()) for _ in range(5)]
        small, small_peer = sockets.enter_context(socket_pair())
        senders: list[Callable[[bytes], int]] = []
        connections: list[Any] = []

        def large_received(*_: object) -> None:
            order.append("large")
            if len(order) == 1:
                small_peer.send(b"x")

        async with stack.open() as group:
            for sock, peer in pairs:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * LARGE)
                protocol = (
                    BufferedRecorder(buffer_size=2 * LARGE, on_buffer_updated=large_received)
                    if buffered
                    else Recorder(on_data_received=large_received)
                )
                connect = partial(group.connect_accepted_socket, lambda protocol=protocol: protocol, sock)
                if tls:
                    connect = partial(connect, ssl=certificates.server())
                    handshake = partial(TLSPeer.wrap, peer, certificates.client(), server_hostname=NAME)
                    connection, tls_peer = await together(connect, handshake)
                    senders.append(sockets.enter_context(tls_peer.socket).send)
                else:
                    connection = await connect()
                    senders.append(peer.send)
                connections.append(connection)
            receiver = Recorder(on_data_received=lambda *_: order.append("small"))
            await group.connect_accepted_socket(lambda: receiver, small)
            for _ in range(2):  # The second time it is known who receives much.
                order.clear()
                for send in senders:
                    assert send(bytes(LARGE)) == LARGE
                await until(lambda: len(order) == 6)
            assert order.index("small") == (5 if stack.is_oracle else 1)
            for transport, _ in connections:
                transport.abort()  # The peers would not answer a TLS shutdown.
