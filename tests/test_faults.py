"""Make every system call fail, or do only a part, at every position, under every kind of transport."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from faults import (
    FAULTS,
    MAX_CALLS,
    ONE_BYTE,
    TRANSIENT,
    FaultyDatagrams,
    FaultyProcess,
    FaultyStream,
    Layer,
    installed,
)
from support import (
    GUARD,
    HOST,
    RECORDERS,
    BufferedRecorder,
    DatagramRecorder,
    Peer,
    Recorder,
    SubprocessRecorder,
    leaves,
    listening,
    open_descriptors,
    pattern,
    until,
)
from tls_support import NAME, Certificates, TLSPeer

from transports_anyio import TransportGroup, _server

pytestmark = [pytest.mark.anyio, pytest.mark.exhaustive]

#: What each end sends. A socket is given a small buffer, so that it takes many calls.
UP = pattern(300_000)
DOWN = pattern(300_000)[::-1]
SMALL_BUFFER = 20_000


class Outcome:
    """The result of one run of a scenario."""

    def __init__(self, group: Any, layer: Layer) -> None:
        self.group = group
        self.layer = layer
        self.contexts: list[dict[str, Any]] = []
        self.server: Any = None
        group.set_exception_handler(self.report)
        #: Pairs of the bytes sent and the bytes received.
        self.streams: list[tuple[bytes, Callable[[], bytes]]] = []
        self.protocols: list[Any] = []
        #: The errors that endpoint functions raised.
        self.raised: list[BaseException] = []
        self.pids: list[int] = []
        #: Whether it is an AnyIO stream that fails: it knows no transient errors.
        self.on_stream = False

    def report(self, group: Any, context: dict[str, Any]) -> None:
        self.contexts.append(context)
        if "accepts no more" in context["message"]:
            self.server.close()  # Otherwise its client would never stop waiting.

    @property
    def spoiled(self) -> bool:
        return bool(self.layer.spoiled)

    @property
    def transient(self) -> bool:
        """Return whether the fault must have no visible effect."""
        if self.on_stream:
            return not self.spoiled or self.layer.fault == ONE_BYTE
        return all(
            (
                self.layer.fault in TRANSIENT
                # A UNIX socket that cannot connect at once never will (connect(2)); `shutdown` never says such things.
                and not (name in ("connect_ex", "shutdown") and self.layer.fault == "EAGAIN")
                and not (name == "shutdown" and self.layer.fault == "EINTR")
            )
            # It is tried again.
            or (name == "accept" and self.layer.fault in ("ECONNRESET", "ENOBUFS", "EMFILE"))
            # The file is read instead.
            or ((name, number) == ("sendfile", 0) and self.layer.fault in ("ENOBUFS", "EMFILE"))
            for name, number in self.layer.spoiled
        )

    def errors(self) -> list[BaseException]:
        """Return every error that was raised or reported."""
        found = [*self.raised, *(context["exception"] for context in self.contexts if "exception" in context)]
        calls = [call for protocol in self.protocols for call in protocol.calls]
        found += [call[-1] for call in calls if isinstance(call[-1], BaseException)]
        return [leaf for error in found for leaf in leaves(error)]


Scenario = Callable[[Outcome], Awaitable[None]]


@pytest.fixture(autouse=True)
def quick_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "RETRY_DELAY", 0.001)


# -- scenarios -----------------------------------------------------------------------------------------------


async def exchange(outcome: Outcome, serve: Any, connect: Any, recorder: Any = Recorder) -> None:
    """Both ends send at once; the client ends first."""
    made: list[Any] = []

    def greet(protocol: Any, transport: Any) -> None:
        shrink(transport)
        transport.writelines([DOWN[:100], b"", DOWN[100:20_000]])
        send(transport, DOWN[20_000:])

    def accept() -> Any:
        protocol = recorder(on_connection_made=greet)
        made.append(protocol)
        outcome.protocols.append(protocol)
        outcome.streams += [(UP, lambda: bytes(protocol.received)), (DOWN, lambda: bytes(client.received))]
        return protocol

    client = recorder()
    server = outcome.server = await serve(accept)
    try:
        transport, _ = await connect(server, lambda: client)
    except OSError as exc:
        outcome.raised.append(exc)
        server.close()
        return
    outcome.protocols.append(client)
    shrink(transport)
    transport.writelines([UP[:100], b"", UP[100:20_000]])
    send(transport, UP[20_000:])
    if transport.can_write_eof():
        transport.write_eof()

    def over() -> object:
        return (
            client.lost or len(client.received) == len(DOWN) or (outcome.contexts and not (made or outcome.transient))
        )

    await until_spinning(over)
    # Not earlier: two ends that flush without reading would wait for each other (see W10).
    transport.close()
    if outcome.transient:
        await until_spinning(lambda: made and made[0].lost and client.lost)
    server.close()


def send(transport: Any, data: bytes) -> None:
    """Write in many chunks, of which the last ones are gathered."""
    for start in range(0, len(data), 50_000):
        transport.write(data[start : start + 50_000])


def shrink(transport: Any) -> None:
    # A small buffer for receiving would make TCP wait for its timers.
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)


async def until_spinning(condition: Callable[[], object]) -> None:
    """Like `until`, without pauses: both ends are ours, and the scenarios run thousands of times."""
    with anyio.fail_after(GUARD):
        while not condition():
            await anyio.lowlevel.checkpoint()


def tcp(recorder: Any = Recorder, certificates: Certificates | None = None) -> Scenario:
    server_context = certificates and certificates.server()
    client_options = {"ssl": certificates.client(), "server_hostname": NAME} if certificates else {}

    async def scenario(outcome: Outcome) -> None:
        group = outcome.group

        async def serve(factory: Any) -> Any:
            return await group.create_server(factory, HOST, 0, ssl=server_context)

        async def connect(server: Any, factory: Any) -> Any:
            return await group.create_connection(factory, *server.sockets[0].getsockname(), **client_options)

        await exchange(outcome, serve, connect, recorder)

    return scenario


def unix(path: str) -> Scenario:
    numbers = itertools.count()

    async def scenario(outcome: Outcome) -> None:
        group = outcome.group
        name = f"{path}/{next(numbers)}"

        async def serve(factory: Any) -> Any:
            return await group.create_unix_server(factory, name)

        async def connect(server: Any, factory: Any) -> Any:
            return await group.create_unix_connection(factory, name)

        await exchange(outcome, serve, connect)

    return scenario


async def accepted_socket(outcome: Outcome) -> None:
    """Adopted sockets, a pair of them."""
    ends = socket.socketpair()
    first, second = Recorder(), Recorder()
    outcome.protocols += [first, second]
    outcome.streams += [(UP, lambda: bytes(second.received)), (DOWN, lambda: bytes(first.received))]
    for protocol, sock, data in ((first, ends[0], UP), (second, ends[1], DOWN)):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        transport, _ = await outcome.group.connect_accepted_socket(lambda protocol=protocol: protocol, sock)
        transport.writelines([data[:1000], data[1000:20_000]])
        send(transport, data[20_000:])
        transport.write_eof()
        protocol.hooks["eof_received"] = lambda _: None
    await until_spinning(lambda: first.lost and second.lost)


def upgraded(certificates: Certificates) -> Scenario:
    """`start_tls` on both ends of a connection."""
    contexts = certificates.client(), certificates.server()

    async def scenario(outcome: Outcome) -> None:
        protocols = Recorder(), Recorder()
        outcome.protocols += protocols
        outcome.streams += [(UP, lambda: bytes(protocols[1].received)), (DOWN, lambda: bytes(protocols[0].received))]
        for protocol, sock in zip(protocols, socket.socketpair(), strict=True):
            await outcome.group.connect_accepted_socket(lambda protocol=protocol: protocol, sock)
        new: list[Any] = []

        async def upgrade(protocol: Any, context: Any, data: bytes, **options: Any) -> None:
            try:
                transport = await outcome.group.start_tls(protocol.transport, protocol, context, **options)
            except OSError as exc:
                outcome.raised.append(exc)
                return
            new.append(transport)
            shrink(transport)
            send(transport, data)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(upgrade, protocols[0], contexts[0], UP, server_hostname=NAME))
            tasks.start_soon(partial(upgrade, protocols[1], contexts[1], DOWN, server_side=True))
        await until_spinning(
            lambda: (
                any(protocol.lost for protocol in protocols)
                or (len(protocols[0].received) == len(DOWN) and len(protocols[1].received) == len(UP))
            )
        )
        if new:
            new[0].close()
        await until_spinning(lambda: all(protocol.lost for protocol in protocols))

    return scenario


def pipes(recorder: Any) -> Scenario:
    async def scenario(outcome: Outcome) -> None:
        reader, writer = os.pipe()
        receiver, sender = recorder(), Recorder()
        outcome.protocols += [receiver, sender]
        outcome.streams.append((UP, lambda: bytes(receiver.received)))
        transport, _ = await outcome.group.connect_write_pipe(lambda: sender, open(writer, "wb", 0))
        transport.writelines([UP[:1000], UP[1000:20_000]])
        send(transport, UP[20_000:])
        transport.close()
        await outcome.group.connect_read_pipe(lambda: receiver, open(reader, "rb", 0))
        await until_spinning(lambda: receiver.lost and sender.lost)

    return scenario


async def child(outcome: Outcome) -> None:
    recorder = SubprocessRecorder()
    outcome.protocols.append(recorder)
    outcome.streams.append((UP, lambda: bytes(recorder.received.get(1, b""))))
    transport, _ = await outcome.group.subprocess_exec(lambda: recorder, "cat")
    outcome.pids.append(transport.get_pid())
    stdin = transport.get_pipe_transport(0)
    stdin.writelines([UP[:1000], UP[1000:20_000]])
    send(stdin, UP[20_000:])
    stdin.close()
    await recorder.wait_for("connection_lost")


def echo(recorder: DatagramRecorder, data: bytes, addr: Any) -> None:
    recorder.transport.sendto(data, addr)


def datagrams(directory: str | None) -> Scenario:
    numbers = itertools.count()
    count = 5

    async def scenario(outcome: Outcome) -> None:
        group = outcome.group
        server, client = DatagramRecorder(on_datagram_received=echo), DatagramRecorder()
        number = next(numbers)
        here: Any
        options: dict[str, Any]
        if directory is None:
            here, options = (HOST, 0), {}
        else:
            here, options = f"{directory}/server{number}", {"family": socket.AF_UNIX}
        bound, _ = await group.create_datagram_endpoint(lambda: server, local_addr=here, **options)
        outcome.protocols.append(server)
        if directory is not None:
            options["local_addr"] = f"{directory}/client{number}"
        address = bound.get_extra_info("sockname")
        try:
            transport, _ = await group.create_datagram_endpoint(lambda: client, remote_addr=address, **options)
        except OSError as exc:
            outcome.raised.append(exc)
            return
        outcome.protocols.append(client)
        sent = [b"%d" % n for n in range(count)]
        for data in sent:
            transport.sendto(data)

        def expected() -> int:
            lost = sum(name.startswith("send") for name, _ in outcome.layer.spoiled)
            return count - (0 if outcome.transient else lost)

        await until_spinning(lambda: client.count("datagram_received") == expected())
        if not outcome.transient:
            # At most one datagram was lost, both endpoints live on, and one protocol got the error.
            assert client.count("error_received") + server.count("error_received") == 1
        for recorder in (server, client):
            arrived = [data for data, _ in recorder.received]
            assert arrived == [data for data in sent if data in arrived]
        for _ in range(2):  # The fault may drop one of these.
            transport.sendto(b"still alive")
        await until_spinning(lambda: client.received[-1:] and client.received[-1][0] == b"still alive")

    return scenario


def file(directory: str) -> Scenario:
    path = Path(directory, "file")
    path.write_bytes(UP)

    async def scenario(outcome: Outcome) -> None:
        receiver, sender = Recorder(), Recorder()
        outcome.streams.append((UP, lambda: bytes(receiver.received)))
        server = outcome.server = await outcome.group.create_server(lambda: receiver, HOST, 0)
        try:
            transport, _ = await outcome.group.create_connection(lambda: sender, *server.sockets[0].getsockname())
        except OSError as exc:
            outcome.raised.append(exc)
            server.close()
            return
        outcome.protocols.append(sender)
        shrink(transport)
        with path.open("rb") as source, anyio.fail_after(GUARD):
            try:
                await outcome.group.sendfile(transport, source)
            except OSError as exc:
                outcome.raised.append(exc)
        transport.close()
        await until_spinning(lambda: sender.lost)
        if outcome.transient:
            await until_spinning(lambda: receiver.lost)
        if receiver.calls:
            outcome.protocols.append(receiver)
        server.close()

    return scenario


async def anyio_stream(outcome: Outcome) -> None:
    protocol = Recorder()
    outcome.on_stream = True
    outcome.streams.append((DOWN, lambda: bytes(protocol.received)))
    received = bytearray()
    outcome.streams.append((UP, lambda: bytes(received)))
    with listening() as listener:
        stream = await anyio.connect_tcp(*listener.getsockname())
        sock, _ = listener.accept()
    with Peer(sock) as peer:
        transport, _ = await outcome.group.connect_stream(lambda: protocol, FaultyStream(stream, outcome.layer))
        outcome.protocols.append(protocol)
        transport.write(UP[:100])
        transport.writelines([UP[100:30_000], UP[30_000:]])
        transport.write_eof()
        await peer.send(DOWN)
        try:
            while data := await peer.receive():
                received.extend(data)
        except ConnectionError:
            pass
        with contextlib.suppress(OSError):  # It may have gone.
            peer.shutdown()
        await until(lambda: protocol.lost)


def encrypted_stream(certificates: Certificates) -> Scenario:
    """TLS of ours over an AnyIO stream."""
    contexts = certificates.client(), certificates.server()

    async def scenario(outcome: Outcome) -> None:
        protocol = Recorder()
        outcome.on_stream = True
        received = bytearray()
        outcome.streams += [(DOWN, lambda: bytes(protocol.received)), (UP, lambda: bytes(received))]
        with listening() as listener:
            stream = await anyio.connect_tcp(*listener.getsockname())
            sock, _ = listener.accept()

        async def peer() -> None:
            with sock, contextlib.suppress(OSError):  # The fault may end it at any moment, as may its consequences.
                with await TLSPeer.wrap(sock, contexts[1], server_side=True) as other:
                    await other.send(DOWN)
                    while data := await other.receive():
                        received.extend(data)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer)
            try:
                transport, _ = await outcome.group.connect_stream(
                    lambda: protocol, FaultyStream(stream, outcome.layer), ssl=contexts[0], server_hostname=NAME
                )
            except OSError as exc:
                outcome.raised.append(exc)
                return
            outcome.protocols.append(protocol)
            transport.writelines([UP[:100], b"", UP[100:30_000]])
            send(transport, UP[30_000:])
            await until_spinning(lambda: protocol.lost or len(protocol.received) == len(DOWN))
            transport.close()
            await until_spinning(lambda: protocol.lost)

    return scenario


async def anyio_process(outcome: Outcome) -> None:
    recorder = SubprocessRecorder()
    outcome.on_stream = True
    outcome.protocols.append(recorder)
    outcome.streams.append((UP, lambda: bytes(recorder.received.get(1, b""))))
    process = await anyio.open_process(["cat"])
    outcome.pids.append(process.pid)
    transport, _ = await outcome.group.connect_process(lambda: recorder, FaultyProcess(process, outcome.layer))
    stdin = transport.get_pipe_transport(0)
    stdin.writelines([UP[:1000], UP[1000:20_000]])
    send(stdin, UP[20_000:])
    stdin.close()
    await until(lambda: recorder.lost or any(call[0] == "pipe_connection_lost" and call[2] for call in recorder.calls))
    # On asyncio, AnyIO closes the fd of an output only with its process: the child would write without end.
    transport.close()
    await recorder.wait_for("connection_lost")


async def anyio_datagrams(outcome: Outcome) -> None:
    server, client = DatagramRecorder(on_datagram_received=echo), DatagramRecorder()
    outcome.on_stream = True
    bound = await anyio.create_udp_socket(socket.AF_INET, local_host=HOST)
    await outcome.group.connect_datagram_socket(lambda: server, bound)
    outcome.protocols.append(server)
    address: Any = bound.extra(anyio.abc.SocketAttribute.local_address)
    connected = await anyio.create_connected_udp_socket(*address)
    transport, _ = await outcome.group.connect_datagram_socket(
        lambda: client, FaultyDatagrams(connected, outcome.layer)
    )
    outcome.protocols.append(client)
    sent = [b"%d" % number for number in range(5)]
    for data in sent:
        transport.sendto(data)

    def lost() -> int:
        return 0 if outcome.transient else sum(name == "send" for name, _ in outcome.layer.spoiled)

    # At most one datagram was lost, the endpoint lives on, and its protocol got the error.
    await until_spinning(lambda: client.count("datagram_received") == len(sent) - lost())
    arrived = [data for data, _ in client.received]
    assert arrived == [data for data in sent if data in arrived]
    for _ in range(2):  # The fault may drop one of these.
        transport.sendto(b"still alive")
    await until_spinning(lambda: client.received[-1:] and client.received[-1][0] == b"still alive")
    reported = 0 if outcome.transient else len(outcome.layer.spoiled)
    await until_spinning(lambda: client.count("error_received") == reported)


# -- running them --------------------------------------------------------------------------------------------


def own_descriptors() -> dict[int, str]:
    # uvloop keeps one file descriptor in reserve from its first stream on.
    return {fd: what for fd, what in open_descriptors().items() if what != os.devnull}


async def run(scenario: Scenario, layer: Layer) -> None:
    """Run a scenario in its own group, and check everything afterwards."""
    descriptors = own_descriptors()
    tasks = {task.id for task in anyio.get_running_tasks()}
    with installed(layer), anyio.fail_after(2 * GUARD):
        async with TransportGroup() as group:
            outcome = Outcome(group, layer)
            await scenario(outcome)
            # Leaving the block ends everything that the fault has left open.
    assert [task for task in anyio.get_running_tasks() if task.id not in tasks] == []
    assert own_descriptors() == descriptors
    for pid in outcome.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for protocol in outcome.protocols:
        assert protocol.lost, protocol
    for recorder in RECORDERS:
        recorder.check()
    RECORDERS.clear()
    for sent, arrived in outcome.streams:
        if outcome.transient:
            assert arrived() == sent
        else:
            assert sent.startswith(arrived())
    if not outcome.transient:
        check_error_was_reported(outcome)
    if outcome.transient:
        assert outcome.raised == []
        assert [error for error in outcome.errors() if not is_accept(error, outcome)] == []


def check_error_was_reported(outcome: Outcome) -> None:
    """An error that had an effect was raised or reported."""
    if outcome.on_stream:
        return
    fault = outcome.layer.fault
    gone = ("EPIPE", "ECONNRESET")  # In a handshake these two are the same error.
    codes = [getattr(errno, name) for name in (gone if fault in gone else (fault,))]
    reported = [error for error in outcome.errors() if getattr(error, "errno", None) in codes]
    # An end that has already closed does not miss the peer's TLS shutdown.
    missed_nothing = fault in gone and all(arrived() == sent for sent, arrived in outcome.streams)
    assert reported or missed_nothing, outcome.layer.spoiled


def is_accept(error: BaseException, outcome: Outcome) -> bool:
    """Whether it is the report of an `accept` that will be tried again."""
    return any(context["exception"] is error and "trying again" in context["message"] for context in outcome.contexts)


#: Calls that cannot be done for a single byte.
INDIVISIBLE = {"accept", "connect_ex", "shutdown", "sendto", "recvfrom_into", "send_eof"}


async def every_position(scenario: Scenario, fault: str) -> int:
    """Run a scenario once for each call that it makes, with the fault instead of that call."""
    counting = Layer(fault)
    await run(scenario, counting)
    runs = 0
    for name in sorted(counting.calls):
        if fault == ONE_BYTE and name in INDIVISIBLE:
            continue
        for number in range(MAX_CALLS):
            layer = Layer(fault, lambda n, i, name=name, number=number: (n, i) == (name, number))
            await run(scenario, layer)
            if not layer.spoiled:
                break  # There was no such call any more.
            runs += 1
        else:
            raise AssertionError(f"{name} is called without end")
    return runs


@pytest.fixture(params=["tcp", "buffered", "tls", "buffered tls", "upgraded", "unix", "accepted", "pipe", "readv",
                        "child", "udp", "unix datagrams", "sendfile", "stream", "tls stream", "anyio process",
                        "anyio datagrams"])  # fmt: skip
def scenario(request: pytest.FixtureRequest, anyio_backend: Any, certificates: Certificates) -> Iterator[Scenario]:
    if request.param == "anyio process" and anyio_backend[0] == "asyncio" and sys.version_info < (3, 11):
        pytest.skip("asyncio warns that the error of a broken pipe was never retrieved from its process")
    with tempfile.TemporaryDirectory() as directory:
        yield {
            "tcp": tcp,
            "buffered": lambda: tcp(lambda **hooks: BufferedRecorder(buffer_size=50_000, **hooks)),
            "tls": lambda: tcp(Recorder, certificates),
            "buffered tls": lambda: tcp(lambda **hooks: BufferedRecorder(buffer_size=50_000, **hooks), certificates),
            "upgraded": lambda: upgraded(certificates),
            "unix": lambda: unix(directory),
            "accepted": lambda: accepted_socket,
            "pipe": lambda: pipes(Recorder),
            "readv": lambda: pipes(lambda: BufferedRecorder(buffer_size=65536)),
            "child": lambda: child,
            "udp": lambda: datagrams(None),
            "unix datagrams": lambda: datagrams(directory),
            "sendfile": lambda: file(directory),
            "stream": lambda: anyio_stream,
            "tls stream": lambda: encrypted_stream(certificates),
            "anyio process": lambda: anyio_process,
            "anyio datagrams": lambda: anyio_datagrams,
        }[request.param]()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_call_that_fails_at_every_position(anyio_backend: Any, scenario: Scenario, fault: str) -> None:
    assert await every_position(scenario, fault)


async def test_w6_a_blocked_call_keeps_the_buffer(anyio_backend: Any, scenario: Scenario) -> None:
    """Every other call would block, then is interrupted; and each of several calls in a row."""
    for fault in ("EAGAIN", "EINTR"):
        for period, phase in ((2, 0), (2, 1), (5, 4)):
            layer = Layer(
                fault,
                lambda name, number, period=period, phase=phase: (
                    name not in ("connect_ex", "shutdown", "send_eof") and number % period == phase
                ),
            )
            await run(scenario, layer)
