"""`shutdown` of a server, a group and a child: in order, and within the deadline."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from decimal import Decimal
from importlib.metadata import version
from math import nan
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import Echo, needs_pipes, needs_signals, needs_unix
from support import GUARD, HOST, DatagramRecorder, Peer, Recorder, SubprocessRecorder, collect_contexts, fill, until
from tls_support import NAME, Certificates, TLSPeer

from transports_anyio import (
    BufferedProtocol,
    DatagramProtocol,
    Protocol,
    SubprocessProtocol,
    TransportGroup,
    TransportStream,
    testing,
)

pytestmark = pytest.mark.anyio

#: Short, for tests in which it passes.
DEADLINE = 0.3
#: uvloop's clock counts milliseconds.
CLOCK_STEP = 0.001


class Asked(Recorder):
    """Records in `order` when it is asked, and when its connection is lost; what it does is in its first line."""

    order: list[tuple[str, str]]
    group: TransportGroup

    def __init__(self, order: list[tuple[str, str]]) -> None:
        super().__init__()
        self.order = order

    @property
    def kind(self) -> str:
        return bytes(self.received).decode()

    def shutdown_requested(self) -> None:
        self.order.append(("asked", self.kind))
        if self.kind == "idle":
            self.transport.close()
        elif self.kind == "busy":
            self.group.call_later(DEADLINE / 3, self.answer)
        elif self.kind == "broken":
            raise ZeroDivisionError

    def answer(self) -> None:
        self.transport.write(b"the answer")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.order.append(("lost", self.kind))
        super().connection_lost(exc)


class Clients:
    """A server of `Asked`, and clients of its group."""

    def __init__(self, group: Any, kind: str, directory: Path, certificates: Certificates) -> None:
        self.group = group
        self.unix = kind == "unix"
        self.tls = kind == "tls"
        self.path = str(directory / "socket")
        self.certificates = certificates
        self.order: list[tuple[str, str]] = []
        self.made: list[Any] = []
        self.connected = 0
        self.clients = group  # Of which the clients are.

    def factory(self) -> Asked:
        protocol = Asked(self.order)
        protocol.group = self.group
        self.made.append(protocol)
        return protocol

    async def start(self, factory: Any = None) -> Any:
        options = {"ssl": self.certificates.server()} if self.tls else {}
        factory = factory or self.factory
        if self.unix:
            self.server = await self.group.create_unix_server(factory, self.path)
        else:
            self.server = await self.group.create_server(factory, HOST, 0, **options)
            self.address = self.server.sockets[0].getsockname()
        return self.server

    async def connect(self, kind: str) -> Recorder:
        if self.unix:
            transport, recorder = await self.clients.create_unix_connection(Recorder, self.path)
        elif self.tls:
            options = {"ssl": self.certificates.client(), "server_hostname": NAME}
            transport, recorder = await self.clients.create_connection(Recorder, *self.address, **options)
        else:
            transport, recorder = await self.clients.create_connection(Recorder, *self.address)
        transport.write(kind.encode())
        self.connected += 1
        await until(lambda: sum(bool(protocol.kind) for protocol in self.made) == self.connected)
        return recorder


@pytest.mark.parametrize("whose", ["server", "group"])
@pytest.mark.parametrize("kind", ["tcp", "tls", pytest.param("unix", marks=needs_unix)])
async def test_idle_busy_and_stuck_clients(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates, kind: str, whose: str
) -> None:
    async with TransportGroup() as clients, TransportGroup() as group:
        service = Clients(group, kind, tmp_path, certificates)
        service.clients = clients
        server = await service.start()
        idle, busy, stuck = [await service.connect(name) for name in ("idle", "busy", "stuck")]
        begun = anyio.current_time()
        with anyio.fail_after(GUARD):
            await (server if whose == "server" else group).shutdown(DEADLINE)
        assert anyio.current_time() - begun >= DEADLINE - CLOCK_STEP
        assert sorted(service.order[:3]) == [("asked", "busy"), ("asked", "idle"), ("asked", "stuck")]
        assert service.order[3:] == [("lost", "idle"), ("lost", "busy"), ("lost", "stuck")]
        assert not server.is_serving()
        with anyio.fail_after(GUARD):
            for recorder in (idle, busy, stuck):
                await recorder.wait_for("connection_lost")
        assert tuple(bytes(each.received) for each in (idle, busy, stuck)) == (b"", b"the answer", b"")


async def test_it_returns_as_soon_as_all_have_gone(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates
) -> None:
    async with TransportGroup() as group:
        service = Clients(group, "tcp", tmp_path, certificates)
        server = await service.start()
        for _ in range(3):
            await service.connect("idle")
        with anyio.fail_after(GUARD):
            await server.shutdown(3600)
            await server.shutdown(3600)
        assert [what for what, _ in service.order] == ["asked"] * 3 + ["lost"] * 3


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "does not read"])
async def test_a_protocol_that_does_not_want_to_know_is_closed(
    anyio_backend: Any, certificates: Certificates, reads: bool
) -> None:
    """What is buffered is sent if the peer reads it in time."""
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with TransportGroup() as group:
        server = await group.create_server(factory, HOST, 0)
        with Peer.connect(server.sockets[0].getsockname()) as peer:
            await until(lambda: made and made[0].transport)
            written = fill(made[0].transport)
            with anyio.fail_after(GUARD):
                if not reads:
                    await server.shutdown(0.05)
                    assert made[0].calls[-1] == ("connection_lost", None)
                else:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(server.shutdown, None)
                        assert len(await peer.receive_all()) == written


async def test_a_callback_that_raises_ends_its_connection_and_no_other(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates
) -> None:
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        service = Clients(group, "tcp", tmp_path, certificates)
        server = await service.start()
        await service.connect("broken")
        busy = await service.connect("busy")
        with anyio.fail_after(GUARD):
            await server.shutdown(None)
            await busy.wait_for("connection_lost")
        assert busy.received == b"the answer"
        (context,) = contexts
        assert isinstance(context["exception"], ZeroDivisionError)
        assert "shutdown_requested" in context["message"]


async def test_pending_handshakes_end_at_once(anyio_backend: Any, tmp_path: Path, certificates: Certificates) -> None:
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        server = await Clients(group, "tls", tmp_path, certificates).start()
        with Peer.connect(server.sockets[0].getsockname()) as peer:
            await until(lambda: server.statistics().pending_handshakes)
            with anyio.fail_after(GUARD):
                await server.shutdown(3600)
            assert await peer.gone()
        assert contexts == []


async def test_an_upgraded_connection_is_asked(anyio_backend: Any, tmp_path: Path, certificates: Certificates) -> None:
    async with TransportGroup() as group:
        service = Clients(group, "tcp", tmp_path, certificates)
        server = await service.start()
        with Peer.connect(service.address) as plain:
            await until(lambda: service.made and service.made[0].transport)
            protocol = service.made[0]
            protocol.transport.pause_reading()  # The client may be the first of the two to begin.

            async def upgrade() -> None:
                protocol.transport = await group.start_tls(
                    protocol.transport, protocol, certificates.server(), server_side=True
                )

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(upgrade)
                peer = await TLSPeer.wrap(plain.socket, certificates.client(), server_hostname=NAME)
            with peer:
                await peer.send(b"busy")
                await until(lambda: protocol.kind == "busy")
                async with anyio.create_task_group() as tasks:
                    with anyio.fail_after(GUARD):
                        tasks.start_soon(server.shutdown, None)
                        assert await peer.receive_exactly(10) == b"the answer"
                        peer.send_close_notify_and_close()
        assert service.order == [("asked", "busy"), ("lost", "busy")]


async def test_no_time_at_all(anyio_backend: Any, tmp_path: Path, certificates: Certificates) -> None:
    async with TransportGroup() as group:
        service = Clients(group, "tcp", tmp_path, certificates)
        server = await service.start()
        stuck = await service.connect("stuck")
        with anyio.fail_after(GUARD):
            await server.shutdown(0)
            await stuck.wait_for("connection_lost")
        assert service.order[-1] == ("lost", "stuck")


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), (nan, ValueError), ("5", TypeError)])
async def test_a_timeout_that_is_refused_changes_nothing(anyio_backend: Any, timeout: Any, error: Any) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Echo, HOST, 0)
        for each in (server, group):
            with pytest.raises(error):
                await each.shutdown(timeout)
        assert server.is_serving()
        assert not group.is_closing()


async def test_a_decimal_timeout(anyio_backend: Any) -> None:
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            server = await group.create_server(Echo, HOST, 0)
            with Peer.connect(server.sockets[0].getsockname()):
                await until(lambda: group.statistics().open_transports)
                await server.shutdown(Decimal("0.01"))  # type: ignore[arg-type]
            await group.shutdown(Decimal(0))  # type: ignore[arg-type]


async def test_a_shutdown_that_is_cancelled_goes_on(
    anyio_backend: Any, tmp_path: Path, certificates: Certificates
) -> None:
    async with TransportGroup() as group:
        service = Clients(group, "tcp", tmp_path, certificates)
        server = await service.start()
        busy = await service.connect("busy")
        with anyio.move_on_after(0.01) as scope:
            await server.shutdown(None)
        assert scope.cancelled_caught
        with anyio.fail_after(GUARD):
            await server.wait_closed()
            await busy.wait_for("connection_lost")
        assert busy.received == b"the answer"


# -- a group ----------------------------------------------------------------------------------------------------------


async def test_a_group_that_has_shut_down(anyio_backend: Any) -> None:
    """Every kind of transport has ended, no new one can be made, and tasks and callbacks go on."""
    async with TransportGroup() as group:
        server = await group.create_server(Echo, HOST, 0)
        where = server.sockets[0].getsockname()
        _, client = await group.create_connection(Recorder, *where)
        _, endpoint = await group.create_datagram_endpoint(DatagramRecorder, (HOST, 0))
        event = anyio.Event()
        group.start_soon(event.wait)
        with anyio.fail_after(GUARD):
            await group.shutdown(3600)
        assert client.lost
        assert endpoint.lost
        assert group.is_closing()
        assert group.statistics().open_transports == {}
        with pytest.raises(RuntimeError, match="not open any more"):
            await group.create_connection(Recorder, *where)
        assert group.statistics().running_tasks == 1
        called = anyio.Event()
        group.call_soon(called.set)
        with anyio.fail_after(GUARD):
            await called.wait()
        event.set()
    with pytest.raises(RuntimeError, match="not open any more"):
        await group.shutdown(1)


@needs_pipes
async def test_pipes_of_a_group_that_shuts_down(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        reading, writing = os.pipe()
        _, reader = await group.connect_read_pipe(Recorder, os.fdopen(reading, "rb", 0))
        transport, writer = await group.connect_write_pipe(Recorder, os.fdopen(writing, "wb", 0))
        transport.write(b"the last words")
        await until(lambda: reader.received)
        with anyio.fail_after(GUARD):
            await group.shutdown(3600)
        assert reader.lost
        assert writer.lost


FOREVER = "import time; time.sleep(3600)"
TERMINATES = "import sys; print('ready', flush=True); sys.stdin.read()"
# A program that ended at once could be quicker than the kill.
TERMINATES_LATE = f"{TERMINATES}; import time; time.sleep({4 * GUARD})"
# A handler might run just before the program waits, which then never ends: the signal is waited for instead.
CLEANS_UP = (
    "import signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
    "print('ready', flush=True)\n"
    "signal.sigwait([signal.SIGTERM])\n"
    "print('cleaned up', flush=True)\n"
    "sys.exit(3)\n"
)
IGNORES = (
    "import signal\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('ready', flush=True)\n"
    "while True: signal.pause()\n"
)


async def start_exec(group: TransportGroup, factory: Any, program: str) -> Any:
    return await group.subprocess_exec(factory, sys.executable, "-c", program)


async def start_shell(group: TransportGroup, factory: Any, program: str) -> Any:
    return await group.subprocess_shell(factory, f"exec {shlex.join([sys.executable, '-c', program])}")


async def start_anyio(group: TransportGroup, factory: Any, program: str) -> Any:
    return await group.connect_process(factory, await anyio.open_process([sys.executable, "-c", program]))


#: The ways to start a child.
every_child = pytest.mark.parametrize("start", [start_exec, start_shell, start_anyio])


async def ready(child: SubprocessRecorder) -> None:
    """Wait until the program runs and has set its signal handler."""
    await child.wait_until(lambda: child.received.get(1, b"") == b"ready\n", timeout=GUARD)


@needs_signals
@pytest.mark.parametrize("whose", ["group", "transport"])
@every_child
@pytest.mark.parametrize(
    ("program", "timeout", "returncode", "output"),
    [
        (TERMINATES, 3600, -signal.SIGTERM, b"ready\n"),
        (CLEANS_UP, 3600, 3, b"ready\ncleaned up\n"),
        (IGNORES, DEADLINE, -9, b"ready\n"),
    ],
    ids=["terminates", "cleans up", "ignores it"],
)
async def test_a_child_is_terminated_and_killed_at_the_deadline(
    anyio_backend: Any, start: Any, whose: str, program: str, timeout: float, returncode: int, output: bytes
) -> None:
    async with TransportGroup() as group:
        transport, child = await start(group, SubprocessRecorder, program)
        await ready(child)
        begun = anyio.current_time()
        with anyio.fail_after(GUARD):
            await (group if whose == "group" else transport).shutdown(timeout)
        assert transport.get_returncode() == returncode
        assert child.received[1] == output
        assert child.exception is None
        if timeout == DEADLINE:
            assert anyio.current_time() - begun >= DEADLINE - CLOCK_STEP


class Quitting(SubprocessRecorder):
    """Ends its program by an end of file."""

    def shutdown_requested(self) -> None:
        self.transport.get_pipe_transport(0).close()


class Stuck(SubprocessRecorder):
    asked = 0

    def shutdown_requested(self) -> None:
        self.asked += 1


@needs_signals
@pytest.mark.parametrize("whose", ["group", "transport"])
@every_child
async def test_a_child_whose_protocol_wants_to_know(anyio_backend: Any, start: Any, whose: str) -> None:
    async with TransportGroup() as group:
        transport, child = await start(group, Quitting, TERMINATES)
        await ready(child)
        with anyio.fail_after(GUARD):
            await (group if whose == "group" else transport).shutdown(3600)
        assert transport.get_returncode() == 0
        assert child.lost


@needs_signals
@every_child
async def test_one_child_of_several(anyio_backend: Any, start: Any) -> None:
    """The others run on, and the group makes more connections."""
    async with TransportGroup() as group:
        transport, child = await start(group, Stuck, TERMINATES)
        other, runs_on = await start(group, Stuck, TERMINATES)
        await ready(child)
        await ready(runs_on)
        begun = anyio.current_time()
        with anyio.fail_after(GUARD):
            await transport.shutdown(DEADLINE)
        assert anyio.current_time() - begun >= DEADLINE - CLOCK_STEP
        assert transport.get_returncode() == -signal.SIGKILL
        assert (child.asked, runs_on.asked) == (1, 0)
        assert other.get_returncode() is None
        assert not group.is_closing()
        _, third = await start(group, SubprocessRecorder, TERMINATES)
        await ready(third)


@needs_signals
@every_child
async def test_a_child_that_has_no_time_at_all(anyio_backend: Any, start: Any) -> None:
    async with TransportGroup() as group:
        transport, child = await start(group, Quitting, TERMINATES_LATE)
        await ready(child)
        with anyio.fail_after(GUARD):
            await transport.shutdown(0)
        assert transport.get_returncode() == -signal.SIGKILL
        assert child.lost


@needs_signals
@every_child
async def test_a_child_that_has_ended(anyio_backend: Any, start: Any) -> None:
    """In its group, after it, and while its end is under way."""
    async with TransportGroup() as group:
        transport, child = await start(group, Stuck, "")
        await child.wait_for("connection_lost", timeout=GUARD)
        with anyio.fail_after(GUARD):
            await transport.shutdown(None)
        closing, closed = await start(group, Stuck, TERMINATES)
        closing.close()
        with anyio.fail_after(GUARD):
            await closing.shutdown(None)
        assert closed.lost
        assert child.asked == closed.asked == 0
    with anyio.fail_after(GUARD):
        await transport.shutdown(None)


@needs_signals
@every_child
async def test_a_grandchild_that_holds_the_output(anyio_backend: Any, start: Any) -> None:
    """The child has ended, and its pipe has not: it is closed at the deadline."""
    older = tuple(map(int, version("anyio").split(".")[:2])) < (4, 14)
    if older and start is start_anyio and anyio_backend[0] == "asyncio":
        pytest.skip("older releases of AnyIO leave the pipe open")
    program = f"import os\ngrandchild = os.fork()\nif grandchild: print(grandchild, flush=True)\nelse: {FOREVER}\n"
    async with TransportGroup() as group:
        transport, child = await start(group, SubprocessRecorder, program)
        await child.wait_until(lambda: b"\n" in child.received.get(1, b""), timeout=GUARD)
        try:
            await child.wait_for("process_exited", timeout=GUARD)
            assert transport.get_returncode() == 0
            with anyio.fail_after(GUARD):
                await transport.shutdown(DEADLINE)
            assert transport.get_returncode() == 0
            assert child.exception is None
        finally:
            os.kill(int(child.received[1]), signal.SIGKILL)


@needs_signals
@every_child
async def test_the_shutdown_of_a_child_that_is_cancelled_goes_on(anyio_backend: Any, start: Any) -> None:
    async with TransportGroup() as group:
        transport, child = await start(group, SubprocessRecorder, TERMINATES)
        await ready(child)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await transport.shutdown(3600)
        assert scope.cancelled_caught
        with anyio.fail_after(GUARD):
            await transport.wait_closed()
        assert transport.get_returncode() == -signal.SIGTERM


@needs_signals
async def test_a_task_of_the_child_shuts_it_down(anyio_backend: Any) -> None:
    """The task is cancelled when `connection_lost` has been called, as every task of a connection."""
    async with TransportGroup() as group:
        transport, child = await start_exec(group, SubprocessRecorder, TERMINATES)
        await ready(child)
        transport.start_soon(transport.shutdown, 3600)
        with anyio.fail_after(GUARD):
            await group.wait_closed()
        assert transport.get_returncode() == -signal.SIGTERM
        assert child.exception is None


@needs_signals
async def test_a_callback_of_a_child_that_raises_ends_it(anyio_backend: Any) -> None:
    class Broken(SubprocessRecorder):
        def shutdown_requested(self) -> None:
            raise ZeroDivisionError

    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        transport, child = await start_exec(group, Broken, TERMINATES)
        await ready(child)
        with anyio.fail_after(GUARD):
            await transport.shutdown(3600)
        assert isinstance(child.exception, ZeroDivisionError)
        (context,) = contexts
        assert "shutdown_requested" in context["message"]
        assert transport.get_returncode() == -signal.SIGKILL


# -- recorders --------------------------------------------------------------------------------------------------------


class Closing:
    """The part of a protocol that ends its connection when it is asked."""

    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def shutdown_requested(self) -> None:
        self.transport.close()


@pytest.mark.parametrize("how", ["protocol", "hook", "neither"])
@pytest.mark.parametrize("kind", ["stream", "buffered", "datagram", "child"])
async def test_a_recorder_asks_the_protocol_that_it_wraps(anyio_backend: Any, kind: str, how: str) -> None:
    base, recorder_class = {
        "stream": (Protocol, testing.Recorder),
        "buffered": (BufferedProtocol, testing.BufferedRecorder),
        "datagram": (DatagramProtocol, testing.DatagramRecorder),
        "child": (SubprocessProtocol, testing.SubprocessRecorder),
    }[kind]
    protocol = type("Wrapped", (Closing, base), {})() if how == "protocol" else None
    hooks = {"on_shutdown_requested": lambda recorder: recorder.transport.close()} if how == "hook" else {}
    recorder: Any = recorder_class(protocol, **hooks)
    async with TransportGroup() as group:
        if kind == "datagram":
            await group.create_datagram_endpoint(lambda: recorder, (HOST, 0))
        elif kind == "child":
            if sys.platform == "win32":
                pytest.skip("pipes of POSIX")
            await group.subprocess_exec(lambda: recorder, sys.executable, "-c", FOREVER)
        else:
            await testing.memory_connection(group, lambda: recorder, Recorder)
        with anyio.fail_after(GUARD):
            await group.shutdown(3600)
    assert recorder.count("shutdown_requested") == (how != "neither")
    recorder.check()


# -- protocols without `shutdown_requested` ---------------------------------------------------------------------------


async def test_a_stream_without_shutdown_requested_sends_what_is_buffered(
    anyio_backend: Any, certificates: Certificates
) -> None:
    """In memory, over TLS, and with a `TransportStream` on top."""

    class Reading(Recorder):
        def shutdown_requested(self) -> None:
            """Go on: the connection ends when all has come."""

    async with TransportGroup() as group:
        tls: dict[str, Any] = {
            "ssl": certificates.client(),
            "server_ssl": certificates.server(),
            "server_hostname": NAME,
        }
        plain, encrypted, used = [
            await testing.memory_connection(group, Recorder, Reading, buffer_size=16, **options)
            for options in ({}, tls, {})
        ]
        stream = TransportStream(used[0][0])
        for (transport, _), _ in (plain, encrypted):
            transport.write(bytes(100_000))
        await stream.send(b"from a stream")
        with anyio.fail_after(GUARD):
            await group.shutdown(3600)
        for (_, first), (_, second) in (plain, encrypted):
            assert first.exception is None
            assert second.exception is None
            assert second.received == bytes(100_000)
        assert used[1][1].received == b"from a stream"
        with pytest.raises(anyio.BrokenResourceError):
            await stream.send(b"more")


@needs_unix
async def test_datagrams_without_shutdown_requested_are_sent(anyio_backend: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with theirs:
        theirs.setblocking(False)
        async with TransportGroup() as group:
            transport, endpoint = await group.create_datagram_endpoint(DatagramRecorder, sock=ours)
            sent = 0
            while not transport.get_write_buffer_size():
                transport.sendto(b"one")
                sent += 1
            got = 0
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(group.shutdown, None)
                with anyio.fail_after(GUARD):
                    while got < sent:
                        await anyio.wait_readable(theirs)
                        assert theirs.recv(10) == b"one"
                        got += 1
            assert endpoint.exception is None
