"""`TransportGroup.statistics`, and the `repr` of what a group has."""

from __future__ import annotations

import io
import socket
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trustme
from network import needs_pipes, needs_unix
from support import GUARD, BufferedRecorder, Peer, Recorder, connected, fill, pattern, until
from tls_support import NAME, Certificates, TLSPeer

from transports_anyio import DatagramProtocol, Protocol, SubprocessProtocol, TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio


async def test_statistics(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        empty = group.statistics()
        assert empty.open_transports == {}
        assert (empty.bytes_received, empty.bytes_sent, empty.bytes_buffered, empty.pending_timers) == (0, 0, 0, 0)
        server = await group.create_server(Recorder, "127.0.0.1", 0)
        endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, ("127.0.0.1", 0))
        timer = group.call_later(3600, print)
        async with connected(group) as (transport, protocol, peer):
            await peer.send(b"four")
            await protocol.wait_received(4)
            transport.write(b"seven!!")
            assert await peer.receive_exactly(7) == b"seven!!"
            now = group.statistics()
            assert now.open_transports == {"StreamTransport": 1, "DatagramTransport": 1}
            assert now.open_servers == 1
            assert now.pending_timers == 1
            assert (now.bytes_received, now.bytes_sent, now.bytes_buffered) == (4, 7, 0)
            written = fill(transport)
            buffered = transport.get_write_buffer_size()
            assert group.statistics().bytes_buffered == buffered
            assert group.statistics().bytes_sent == 7 + written - buffered
            transport.abort()
        await until(lambda: protocol.lost)
        timer.cancel()
        endpoint.sendto(b"12345", endpoint.get_extra_info("sockname"))
        await until(lambda: group.statistics().bytes_received == 9)
        endpoint.close()
        server.close()
        await group.wait_closed()
        after = group.statistics()
        assert after.open_transports == {}
        assert (after.bytes_received, after.bytes_sent) == (9, 7 + written - buffered + 5)
        assert after.open_servers == after.pending_timers == after.bytes_buffered == 0


@needs_pipes
async def test_children_count_what_goes_over_their_pipes(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(SubprocessProtocol, "cat")
        transport.get_pipe_transport(0).write(b"hello")
        await until(lambda: group.statistics().bytes_received == 5)
        assert group.statistics().bytes_sent == 5
        assert group.statistics().open_transports == {"SubprocessTransport": 1}


def moved(group: Any) -> tuple[int, int]:
    now = group.statistics()
    return now.bytes_received, now.bytes_sent


@pytest.mark.parametrize("on_disk", [True, False])
async def test_files_count(anyio_backend: Any, on_disk: bool) -> None:
    """Files that the system sends, and files that are read in blocks."""
    content = pattern(1_000_000)
    with tempfile.TemporaryFile() if on_disk else io.BytesIO() as file:
        file.write(content)
        file.seek(0)
        async with TransportGroup() as group, connected(group) as (transport, protocol, peer):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(group.sendfile, transport, file)
                assert await peer.receive_exactly(len(content)) == content
            transport.write(b"behind")
            assert await peer.receive_exactly(6) == b"behind"
            assert moved(group) == (0, len(content) + 6)
            transport.close()
            await protocol.wait_for("connection_lost")
            assert group.statistics().open_transports == {}
            assert moved(group) == (0, len(content) + 6)


async def test_buffered_protocols_count(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        # In three pieces, the last of which does not fill the buffer.
        async with connected(group, BufferedRecorder(buffer_size=4)) as (transport, protocol, peer):
            await peer.send(b"0123456789")
            await protocol.wait_received(10)
            assert moved(group) == (10, 0)
            transport.close()
            await protocol.wait_for("connection_lost")
        assert moved(group) == (10, 0)


async def test_bytes_before_and_after_start_tls_count(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    """The protocol's bytes before and after `start_tls` count, not the ciphertext."""
    certificates = Certificates(certificate_authority)
    async with TransportGroup() as group:
        one, other = Recorder(), Recorder()
        for protocol, sock in zip((one, other), socket.socketpair(), strict=True):
            await group.connect_accepted_socket(lambda protocol=protocol: protocol, sock)
        one.transport.write(b"plain")
        await other.wait_received(5)
        assert moved(group) == (5, 5)

        async def upgrade(protocol: Any, context: Any, **options: Any) -> None:
            protocol.transport = await group.start_tls(protocol.transport, protocol, context, **options)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(upgrade, one, certificates.client(), server_hostname=NAME))
            tasks.start_soon(partial(upgrade, other, certificates.server(), server_side=True))
        assert moved(group) == (5, 5)
        assert group.statistics().open_transports == {"StreamTransport": 2}
        one.transport.write(b"encrypted")
        other.transport.write(b"as well")
        await one.wait_received(7)
        await other.wait_received(5 + 9)
        assert moved(group) == (21, 21)
        other.transport.pause_reading()
        fill(one.transport)
        assert group.statistics().bytes_buffered == one.transport.get_write_buffer_size()
        _, sent = moved(group)
        one.transport.abort()
        await one.wait_for("connection_lost")
        assert moved(group) == (21, sent)
        other.transport.abort()
        await other.wait_for("connection_lost")
        assert group.statistics().open_transports == {}
        assert moved(group) == (21, sent)


@needs_unix
async def test_datagrams_that_had_to_wait_count(anyio_backend: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "receiver")
    async with TransportGroup() as group:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(path)
            receiver.setblocking(False)
            transport, _ = await group.create_datagram_endpoint(
                DatagramProtocol, remote_addr=path, family=socket.AF_UNIX
            )
            count = 0
            while transport.get_write_buffer_size() <= 2000:  # type: ignore[attr-defined]
                transport.sendto(bytes(1000))
                count += 1
                assert count < 10_000, "the system takes all"
            assert moved(group) == (0, 1000 * (count - 2))
            assert group.statistics().bytes_buffered == 2 * (1000 + 8)  # With their headers, as asyncio counts them.
            transport.close()
            with anyio.fail_after(GUARD):
                for _ in range(count):
                    await anyio.wait_readable(receiver)
                    assert len(receiver.recv(2000)) == 1000
            await group.wait_closed()
            assert moved(group) == (0, 1000 * count)
            assert group.statistics().bytes_buffered == 0


async def test_tasks_count_while_they_run(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        assert group.statistics().running_tasks == 0
        go_on = anyio.Event()
        group.start_soon(go_on.wait)
        group.start_soon(go_on.wait)
        assert group.statistics().running_tasks == 2
        go_on.set()
        await until(lambda: not group.statistics().running_tasks)


async def test_a_pending_handshake_is_not_a_transport(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    certificates = Certificates(certificate_authority)
    async with TransportGroup() as group:
        server = await group.create_server(Recorder, "127.0.0.1", 0, ssl=certificates.server())
        assert group.statistics().pending_handshakes == 0
        with Peer.connect(server.sockets[0].getsockname()) as silent:
            await until(lambda: group.statistics().pending_handshakes)
            now = group.statistics()
            assert (now.open_transports, now.pending_handshakes) == ({}, 1)
            assert "transports=0 buffered=0 handshakes=1 " in repr(group)
            assert repr(server).endswith(" connections=0 buffered=0 handshakes=1>")
            # A second client, whose handshake succeeds.
            peer = await TLSPeer.connect_to(server.sockets[0].getsockname(), certificates.client(), NAME)
            with peer:
                await until(lambda: group.statistics().open_transports)
                now = group.statistics()
                assert (now.open_transports, now.pending_handshakes) == ({"StreamTransport": 1}, 1)
                assert repr(server).endswith(" connections=1 buffered=0 handshakes=1>")
            silent.close()
            group.set_exception_handler(lambda *_: None)  # Ignore the report about the silent client.
            await until(lambda: not group.statistics().pending_handshakes)
            assert "handshakes" not in repr(group) + repr(server)
            await until(lambda: not group.statistics().open_transports)


async def test_repr_shows_the_state(anyio_backend: Any) -> None:
    group = TransportGroup()
    assert "new" in repr(group)
    async with group:
        assert "open" in repr(group)
        async with connected(group) as (transport, protocol, peer):
            text = repr(transport)
            assert text.startswith("<StreamTransport open")
            assert repr(peer.socket.getsockname()) in text
            assert "buffered=0" in text
            transport.pause_reading()
            fill(transport, 1 << 17)
            assert "reading paused" in repr(transport)
            assert "writing paused" in repr(transport)
            assert f"buffered={transport.get_write_buffer_size()}" in repr(transport)
            transport.abort()
            await until(lambda: protocol.lost)
            assert "closed" in repr(transport)
        server = await group.create_server(Recorder, "127.0.0.1", 0)
        assert repr(server).startswith("<Server serving on [('127.0.0.1',")
        server.close()
        assert "closed" in repr(server)
        endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, family=socket.AF_INET)
        assert repr(endpoint).startswith("<DatagramTransport open")
    assert "closed" in repr(group)


@pytest.mark.parametrize("enough", [40, pytest.param(400, marks=pytest.mark.exhaustive)])
async def test_statistics_from_another_thread(anyio_backend: Any, enough: int) -> None:
    """A monitoring thread, for example, while connections begin and end."""
    over = threading.Event()
    looks = []

    def look() -> None:
        while not over.is_set():
            looks.append((group.statistics(), repr(group)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        async with TransportGroup() as group:
            for _ in range(200):
                await memory_connection(group, Protocol, Protocol)
            group.start_soon(anyio.to_thread.run_sync, look)
            try:
                while len(looks) < enough:
                    (transport, _), _ = await memory_connection(group, Protocol, Protocol)
                    transport.close()
            finally:
                over.set()
    finally:
        sys.setswitchinterval(interval)
