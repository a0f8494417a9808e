"""The repr of every transport, server, group and handle: state, addresses, buffer, pauses."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio.streams.stapled import StapledByteStream
from network import needs_pipes, needs_unix
from support import HOST, Recorder, connected, fill, listening, until
from tls_support import NAME, Certificates

from transports_anyio import DatagramProtocol, Protocol, SubprocessProtocol, TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio


def check_end(group: Any, *things: Any) -> None:
    """Check that the repr says "closed", and goes on doing so."""
    for thing in things:
        assert re.search(r"closed|returncode=", repr(thing)), repr(thing)
    assert repr(group).startswith("<TransportGroup closed transports=0 buffered=0 servers=0")


async def test_streams(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        async with connected(group, small=True) as (transport, protocol, peer):
            addresses = f"sockname={transport.get_extra_info('sockname')!r} peername={peer.socket.getsockname()!r}"
            assert repr(transport) == f"<StreamTransport open {addresses} buffered=0>"
            transport.pause_reading()
            fill(transport, 100_000)
            size = transport.get_write_buffer_size()
            paused = f"buffered={size} writing paused reading paused>"
            assert repr(transport) == f"<StreamTransport open {addresses} {paused}"
            assert repr(group).startswith(f"<TransportGroup open transports=1 buffered={size} paused=1 servers=0")
            transport.resume_reading()
            transport.write_eof()
            peer.shutdown()
            protocol.hooks["eof_received"] = lambda _: True
            await protocol.wait_for("eof_received")
            assert repr(transport).endswith("writing paused eof received eof written>")
            transport.close()
            assert repr(transport).startswith("<StreamTransport closing ")
            await peer.receive_all()
            await protocol.wait_for("connection_lost")
            assert repr(transport) == f"<StreamTransport closed {addresses} buffered=0 eof received eof written>"
    check_end(group, transport)


async def test_sendfile_in_progress(anyio_backend: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 23))
    async with TransportGroup() as group, connected(group, small=True) as (transport, _, peer):
        with (tmp_path / "file").open("rb") as file:
            group.start_soon(group.sendfile, transport, file)
            await until(lambda: "sending a file" in repr(transport))
            for _ in range(1 << 3):
                await peer.receive_exactly(1 << 20)
            await until(lambda: "sending a file" not in repr(transport))


async def test_tls_and_its_upgrade(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    certificates = Certificates(certificate_authority)
    async with TransportGroup() as group:
        accepted: list[Any] = []
        server = await group.create_server(
            lambda: Recorder(on_connection_made=lambda _, transport: accepted.append(transport)), HOST, 0
        )
        address = server.sockets[0].getsockname()
        plain, protocol = await group.create_connection(Recorder, *address)
        await until(lambda: accepted)
        accepted[0].pause_reading()  # The next bytes are the handshake.

        async def upgrade() -> None:
            same = accepted[0].get_protocol()
            upgraded.append(await group.start_tls(accepted[0], same, certificates.server(), server_side=True))

        upgraded: list[Any] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upgrade)
            transport = await group.start_tls(plain, protocol, certificates.client(), server_hostname=NAME)
        sockname = transport.get_extra_info("sockname")
        assert repr(plain).startswith(f"<StreamTransport upgraded sockname={sockname!r} peername={address!r}")
        assert repr(transport) == (
            f"<StreamTransport open sockname={sockname!r} peername={address!r} buffered=0 tls=TLSv1.3>"
        )
    check_end(group, transport, server, *upgraded)


@needs_unix
async def test_unix_sockets(anyio_backend: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with TransportGroup() as group:
        server = await group.create_unix_server(Protocol, path)
        assert repr(server) == f"<Server serving on [{path!r}] connections=0 buffered=0>"
        transport, _ = await group.create_unix_connection(Protocol, path)
        assert repr(transport) == f"<StreamTransport open peername={path!r} buffered=0>"
    assert repr(server) == f"<Server closed on [{path!r}] connections=0 buffered=0>"
    check_end(group, transport, server)


async def test_servers(anyio_backend: Any) -> None:
    made: list[Any] = []
    async with TransportGroup() as group:
        server = await group.create_server(
            lambda: Recorder(on_connection_made=lambda _, transport: made.append(transport)), HOST, 0
        )
        names = [sock.getsockname() for sock in server.sockets]
        with socket.create_connection(names[0]):
            await until(lambda: made)
            fill(made[0], 100_000)
            size = made[0].get_write_buffer_size()
            assert repr(server) == f"<Server serving on {names} connections=1 buffered={size} paused=1>"
            made[0].abort()
            await server_empty(server)
        # A socket that is not bound yet has no address, nor has one that other code has closed.
        with socket.socket() as unbound:
            unbound.bind((HOST, 0))
            other = await group.create_server(Protocol, sock=unbound, start_serving=False)
            assert repr(other).startswith(f"<Server not serving on [('{HOST}', ")
            os.close(unbound.detach())
            assert repr(other) == "<Server not serving on [None] connections=0 buffered=0>"
            server.close()
    check_end(group, server, other)


async def server_empty(server: Any) -> None:
    await until(lambda: "connections=0" in repr(server))


@needs_unix
async def test_datagrams(anyio_backend: Any, tmp_path: Path) -> None:
    async with TransportGroup() as group:
        bound, _ = await group.create_datagram_endpoint(DatagramProtocol, (HOST, 0))
        address = bound.get_extra_info("sockname")
        assert repr(bound) == f"<DatagramTransport open sockname={address!r} buffered=0>"
        connected_, _ = await group.create_datagram_endpoint(DatagramProtocol, remote_addr=address)
        sockname = connected_.get_extra_info("sockname")
        assert repr(connected_) == f"<DatagramTransport open sockname={sockname!r} peername={address!r} buffered=0>"
        # A receiver that reads nothing: the waiting datagrams are counted, and pause the protocol.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
            receiver.bind(str(tmp_path / "receiver"))
            full, _ = await group.create_datagram_endpoint(
                DatagramProtocol, remote_addr=str(tmp_path / "receiver"), family=socket.AF_UNIX
            )
            while "writing paused" not in repr(full):
                full.sendto(bytes(1000))
            size = full.get_write_buffer_size()  # type: ignore[attr-defined]
            path = str(tmp_path / "receiver")
            assert repr(full) == f"<DatagramTransport open peername={path!r} buffered={size} writing paused>"
            full.close()
            assert repr(full).startswith("<DatagramTransport closing ")
            full.abort()
    check_end(group, bound, connected_, full)


@needs_pipes
async def test_pipes(anyio_backend: Any) -> None:
    reading, writing = os.pipe()
    async with TransportGroup() as group:
        reader, _ = await group.connect_read_pipe(Protocol, os.fdopen(reading, "rb", 0))
        writer, _ = await group.connect_write_pipe(Protocol, os.fdopen(writing, "wb", 0))
        name = f"<_io.FileIO name={reading} mode='rb' closefd=True>"
        assert repr(reader) == f"<ReadPipeTransport open pipe={name} buffered=0>"
        reader.pause_reading()
        assert repr(reader).endswith(" buffered=0 reading paused>")
        fill(writer, 100_000)
        name = f"<_io.FileIO name={writing} mode='wb' closefd=True>"
        size = writer.get_write_buffer_size()
        assert repr(writer) == f"<WritePipeTransport open pipe={name} buffered={size} writing paused>"
        reader.close()
    assert repr(reader) == "<ReadPipeTransport closed pipe=<_io.FileIO [closed]> buffered=0 reading paused>"
    check_end(group, reader, writer)


async def test_children(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        code = "import sys; sys.stdin.read()"
        transport, _ = await group.subprocess_exec(SubprocessProtocol, sys.executable, "-c", code, stderr=None)
        pid = transport.get_pid()
        stdin, stdout = (transport.get_pipe_transport(fd) for fd in (0, 1))
        assert repr(transport) == f"<SubprocessTransport pid={pid} running stdin={stdin!r} stdout={stdout!r}>"
        stdin.write(bytes(1 << 20))
        assert "buffered=0 writing paused" not in repr(transport)
        fill(stdin, 100_000)
        assert f"buffered={stdin.get_write_buffer_size()} writing paused" in repr(transport)
        assert "paused=1" in repr(group)
        transport.close()
        assert repr(transport).startswith(f"<SubprocessTransport closed pid={pid} running")
        stdin.abort()  # The child is killed, and will not read it.
    assert repr(transport).startswith(f"<SubprocessTransport closed pid={pid} returncode=-9 stdin=<WritePipe")
    check_end(group, transport)


async def test_processes_and_streams_of_anyio(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        process = await anyio.open_process([sys.executable, "-c", ""], stderr=None)
        child, _ = await group.connect_process(SubprocessProtocol, process)
        assert repr(child).startswith(f"<SubprocessTransport pid={process.pid} running stdin=<WritePipeTransport open")
        with listening() as listener:
            stream = await anyio.connect_tcp(*listener.getsockname())
            transport, _ = await group.connect_stream(Protocol, stream)
            # AnyIO gives addresses as pairs.
            assert repr(transport) == (
                f"<StreamTransport open sockname={transport.get_extra_info('sockname')!r} "
                f"peername={listener.getsockname()!r} buffered=0>"
            )
        sender, receiver = anyio.create_memory_object_stream[bytes](1)
        stapled: Any = StapledByteStream(sender, receiver)  # type: ignore[arg-type]
        nameless, _ = await group.connect_stream(Protocol, stapled)
        assert repr(nameless) == "<StreamTransport open buffered=0>"
    check_end(group, child, transport, nameless)


async def test_memory_connections(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        (a, _), (b, _) = await memory_connection(group, Protocol, Protocol, info_a={"peername": "b"}, buffer_size=10)
        assert repr(a) == "<StreamTransport open peername='b' buffered=0>"
        assert repr(b) == "<StreamTransport open buffered=0>"
        b.pause_reading()
        a.write(bytes(100_000))
        assert repr(a).endswith(f"buffered={a.get_write_buffer_size()} writing paused>")
        a.abort()
    check_end(group, a, b)


async def test_the_group(anyio_backend: Any) -> None:
    group = TransportGroup()
    assert repr(group) == "<TransportGroup new transports=0 buffered=0 servers=0 tasks=0 timers=0>"
    async with group:
        await group.create_server(Protocol, HOST, 0)
        timer = group.call_later(3600, print)
        wait = anyio.Event()
        group.start_soon(wait.wait)
        assert repr(group) == "<TransportGroup open transports=0 buffered=0 servers=1 tasks=1 timers=1>"
        wait.set()
        timer.cancel()


async def test_handles(anyio_backend: Any) -> None:
    """Callbacks and arguments may have a failing repr; that of a handle still works."""

    class Silent:
        def __call__(self, *args: object) -> None: ...

        def __repr__(self) -> str:
            raise ZeroDivisionError

    async with TransportGroup() as group:
        handle = group.call_soon(print, "x", 5)
        assert repr(handle) == "<Handle print('x', 5)>"
        timer = group.call_at(group.time() + 3600, print, b"y")
        assert repr(timer) == f"<TimerHandle when={timer.when():.3f} print(b'y')>"
        silent = group.call_later(3600, Silent(), Silent(), [Silent()], "x" * 1000)
        assert repr(silent).count("Silent instance") == 3
        assert len(repr(silent)) < 300
        for each in (handle, timer, silent):
            each.cancel()
            assert "cancelled" in repr(each)
