"""`sendfile`: over AnyIO streams, UNIX sockets and pipes, and to other programs."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio.abc import SocketStream
from anyio.streams.tls import TLSStream
from network import HOST, needs_pipes, needs_sendfile, needs_unix, run_program
from sendfile_helpers import LARGE_CONTENT, SMALL_CONTENT, Sending, files, in_memory, on_disk, send, stuck
from support import Peer, Recorder, Stack, listening, peer_process, until

from transports_anyio import Protocol, TransportGroup, current_group

pytestmark = pytest.mark.anyio


# -- other transports -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def over_a_stream(group: TransportGroup, wrap: Callable[[SocketStream], Any]) -> AsyncIterator[Any]:
    """A transport over an AnyIO stream: it has no socket of ours to send from."""
    with listening() as listener:
        stream = await anyio.connect_tcp(*listener.getsockname()[:2])
        with Peer(listener.accept()[0]) as peer:
            transport, protocol = await group.connect_stream(Recorder, wrap(stream))
            yield transport, protocol, peer


@files
@pytest.mark.ours_only("asyncio has no connect_stream")
async def test_over_an_anyio_stream(stack: Stack, make_file: Any) -> None:
    async with TransportGroup() as group, over_a_stream(group, lambda s: s) as (transport, protocol, peer):
        with make_file(LARGE_CONTENT) as file:
            with pytest.raises(RuntimeError, match="fallback is disabled"):
                await group.sendfile(transport, file, fallback=False)
            file.seek(500)
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sending.run, group, transport, file, 0, 1_000_003)
                assert await peer.receive_exactly(1_000_003) == LARGE_CONTENT[:1_000_003]
            assert sending.result == 1_000_003
            assert file.tell() == 1_000_003
        transport.write(b"the end")
        assert await peer.receive_exactly(7) == b"the end"
        assert "pause_writing" not in protocol.names


@pytest.mark.ours_only("asyncio has no connect_stream")
@pytest.mark.parametrize("how", ["cancel", "close", "abort", "reset"])
async def test_ending_in_the_middle_over_an_anyio_stream(stack: Stack, how: str) -> None:
    async with TransportGroup() as group, over_a_stream(group, lambda s: s) as (transport, protocol, peer):
        sending = Sending()
        async with anyio.create_task_group() as tasks:
            with on_disk(LARGE_CONTENT * 4) as file:
                tasks.start_soon(sending.run, group, transport, file)
                start = await peer.receive_exactly(1000)
                await until(transport.get_write_buffer_size)
                if how == "cancel":
                    sending.scope.cancel()
                elif how == "reset":
                    peer.reset()
                else:
                    getattr(transport, how)()
                await sending.wait()
                if how == "cancel":
                    sent = file.tell()
                    transport.write(b"the end")
                    data = await peer.receive_exactly(sent + 7 - 1000)
                    assert start + data == (LARGE_CONTENT * 4)[:sent] + b"the end"
                else:
                    assert isinstance(sending.error, ConnectionError)
                    if how != "reset":
                        await peer.gone()
                    await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio has no connect_stream")
async def test_f1_f2_over_an_anyio_tls_stream(
    stack: Stack, certificate_authority: trustme.CA, server_context: ssl.SSLContext
) -> None:
    client_context = ssl.create_default_context()
    certificate_authority.configure_trust(client_context)
    received = bytearray()

    async def receive(stream: SocketStream) -> None:
        async with await TLSStream.wrap(stream, ssl_context=server_context, standard_compatible=False) as tls:
            while len(received) < 1_000_003 + 7:
                received.extend(await tls.receive())

    with listening() as listener:
        async with anyio.create_task_group() as tasks:
            stream = await anyio.connect_tcp(*listener.getsockname()[:2])
            accepted = listener.accept()[0]
            tasks.start_soon(receive, await SocketStream.from_socket(accepted))
            tls = await TLSStream.wrap(
                stream, hostname="localhost", ssl_context=client_context, standard_compatible=False
            )
            async with TransportGroup() as group:
                transport, protocol = await group.connect_stream(Recorder, tls)
                with on_disk(LARGE_CONTENT) as file:
                    file.seek(500)  # Whatever its position.
                    assert await send(group, transport, file, 0, 1_000_003) == 1_000_003
                    assert file.tell() == 1_000_003
                transport.write(b"the end")
                await protocol.wait_for("connection_lost")
    assert received == LARGE_CONTENT[:1_000_003] + b"the end"


@needs_unix
@needs_sendfile
async def test_over_a_unix_socket(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        transport, protocol = await group.create_unix_connection(Recorder, sock=ours)
        with Peer(theirs) as peer, on_disk(SMALL_CONTENT) as file:
            assert await send(group, transport, file, fallback=False) == len(SMALL_CONTENT)
            assert await peer.receive_exactly(1000) == SMALL_CONTENT
        await protocol.wait_for("connection_lost")


@pytest.mark.differs(
    "`sendfile` over a pipe or a child's standard input",
    asyncio="`RuntimeError`",
    here="sent, block by block",
    why="as over any other stream",
)
@files
@pytest.mark.ours_only
@needs_pipes
async def test_over_a_pipe(stack: Stack, make_file: Any) -> None:
    read, write = os.pipe()
    async with stack.open() as group:
        reader, received = await group.connect_read_pipe(Recorder, open(read, "rb", 0))
        writer, protocol = await group.connect_write_pipe(Recorder, open(write, "wb", 0))
        with make_file(LARGE_CONTENT) as file:
            with pytest.raises(RuntimeError, match="not supported"):
                await group.sendfile(writer, file, fallback=False)
            with pytest.raises(RuntimeError, match="not supported"):
                await group.sendfile(reader, file)
            writer.write(b"before")
            assert await send(group, writer, file) == len(LARGE_CONTENT)
            assert file.tell() == len(LARGE_CONTENT)
            writer.write(b"after")
        writer.close()
        await received.wait_for("connection_lost")
        assert received.received == b"before" + LARGE_CONTENT + b"after"
        await protocol.wait_for("connection_lost")


# -- other programs ---------------------------------------------------------------------------------------------------


@files
async def test_a_slow_process(stack: Stack, make_file: Any) -> None:
    """The peer reads nothing until it gets a line."""
    if stack.is_oracle and make_file is in_memory:
        pytest.skip("the oracle does not show that its fallback is under way")
    async with stack.open() as group:
        connection: list[Recorder] = []

        def factory() -> Recorder:
            connection.append(Recorder())
            return connection[-1]

        server = await group.create_server(factory, HOST, 0)
        async with peer_process("late_reader", server.sockets[0].getsockname()[1]) as process:
            assert await process.line() == "connected"
            await until(lambda: connection and connection[0].transport)
            transport = connection[0].transport
            transport.write(b"header")
            sending = Sending()
            async with anyio.create_task_group() as tasks:
                stack.expected_tasks = 1
                with make_file(LARGE_CONTENT) as file:
                    tasks.start_soon(sending.run, group, transport, file)
                    await stuck(transport)
                    await process.say("now")
                    await sending.wait()
            transport.close()
            digest = hashlib.sha256(b"header" + LARGE_CONTENT).hexdigest()
            assert await process.line() == f"{6 + len(LARGE_CONTENT)} {digest}"
        server.close()


@pytest.mark.ours_only("asyncio has no current_group")
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl_downloads_a_file(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(LARGE_CONTENT)

    class Files(Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data.endswith(b"\r\n\r\n"):
                current_group().start_soon(self.answer)

        async def answer(self) -> None:
            with open(tmp_path / "file", "rb") as file:
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(LARGE_CONTENT))
                await current_group().sendfile(self.transport, file)

    async with TransportGroup() as group:
        server = await group.create_server(Files, HOST, 0)
        host, port = server.sockets[0].getsockname()
        # Twice over one connection: after a file the transport reads again.
        url = f"http://{host}:{port}/"
        downloaded = await run_program("curl", "-sS", "--noproxy", "*", url, url)
        assert downloaded == LARGE_CONTENT * 2
        server.close()
