"""TLS: handshakes that fail, and their parameters."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import socket
import ssl
import struct
import threading
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from network import needs_unix
from support import (
    GUARD,
    HOST,
    Peer,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    connected,
    listening,
    open_descriptors,
    turns,
    until,
)
from tls_support import (
    DROPPED,
    NAME,
    VERSIONS,
    Certificates,
    TLSPeer,
    serve,
    tls_client,
    together,
)

from transports_anyio import TransportGroup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
from tls_helpers import connect_to, echoes

pytestmark = pytest.mark.anyio


# -- the end ------------------------------------------------------------------------------------------------


async def is_dropped(connecting: Awaitable[TLSPeer]) -> bool:
    """The other end disconnects without `close_notify`, during or after the peer's handshake."""
    with pytest.raises(DROPPED):
        with await connecting as peer:
            await peer.receive_all()
    return True


# -- handshakes that fail -----------------------------------------------------------------------------------


@contextmanager
def plain_server(*answers: Callable[[socket.socket], object]) -> Iterator[Any]:
    """A server without TLS in a thread: each connection gets the next answer."""

    def run() -> None:
        for answer in answers:
            sock, _ = listener.accept()
            with sock:
                try:
                    answer(sock)
                except OSError:
                    pass  # The client was quicker.

    with listening() as listener:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            thread.join(GUARD)
            assert not thread.is_alive()


def read_four(sock: socket.socket) -> None:
    sock.recv(4, socket.MSG_WAITALL)


def read_until_end(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def reset(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer_half(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"\x16\x03\x03\x00\x7a\x02")


def speak_http(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    read_until_end(sock)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda sock: None, ConnectionResetError),
        (read_four, ConnectionResetError),
        (lambda sock: sock.recv(65536), ConnectionResetError),
        (reset, ConnectionResetError),
        (answer_half, ConnectionResetError),
        (speak_http, ssl.SSLError),
    ],
    ids=["closes", "reads four bytes and closes", "reads and closes", "resets", "answers by half", "speaks HTTP"],
)
async def test_t4_peer_that_disconnects_in_mid_handshake(
    stack: Stack, certificates: Certificates, answer: Any, expected: type[Exception]
) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        with plain_server(answer) as address:
            error = await connect_to(group, address, ssl=certificates.client())
        assert type(error) is expected
        assert contexts == []


async def test_handshake_that_takes_too_long(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        with plain_server(read_until_end) as address:
            error = await connect_to(group, address, ssl=certificates.client(), ssl_handshake_timeout=0.05)
        assert type(error) is ConnectionAbortedError
        assert "0.05 seconds" in str(error)


async def test_handshake_that_is_cancelled(stack: Stack, certificates: Certificates) -> None:
    greeted = threading.Event()

    def answer(sock: socket.socket) -> None:
        sock.recv(1)
        greeted.set()
        read_until_end(sock)  # Returns because the socket is closed.

    async with stack.open() as group:
        with plain_server(answer) as address:
            async with anyio.create_task_group() as tasks:

                async def connect() -> None:
                    await connect_to(group, address, ssl=certificates.client())

                tasks.start_soon(connect)
                await until(greeted.is_set)
                tasks.cancel_scope.cancel()
            await turns()


@pytest.mark.ours_only("asyncio leaks descriptors here")
@pytest.mark.exhaustive
async def test_t3_failed_handshakes_leak_nothing(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        before = len(open_descriptors())
        with plain_server(*[read_four] * 1000) as address:
            for _ in range(1000):
                await connect_to(group, address, ssl=certificates.client())
        with listening() as stalling:
            address = stalling.getsockname()
            stalling.setblocking(False)

            def forget() -> None:
                """Take the silent connections out of the backlog."""
                with contextlib.suppress(BlockingIOError):
                    while True:
                        stalling.accept()[0].close()

            for _ in range(1000):
                await connect_to(group, address, ssl=certificates.client(), ssl_handshake_timeout=0.001)
                forget()
            for _ in range(1000):
                with anyio.move_on_after(0.001):
                    await connect_to(group, address, ssl=certificates.client())
                forget()
        await until(lambda: len(open_descriptors()) <= before)


async def test_failed_handshakes_of_a_servers_clients_leak_nothing(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        group.set_exception_handler(lambda *_: None)
        serving = await serve(group, certificates.server())
        before = len(open_descriptors())
        for number in range(300):
            with Peer.connect(serving.address) as peer:
                if number % 3 == 0:
                    await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                    assert await peer.gone()
                elif number % 3 == 1:
                    await peer.send(b"\x16\x03\x01\x02\x00\x01")
                else:
                    peer.reset()
        await until(lambda: len(open_descriptors()) <= before)
        assert await echoes(group, serving, certificates)
        serving.server.close()


def count_of_openssls_objects() -> int:
    return sum(isinstance(each, (ssl.SSLObject, ssl.MemoryBIO)) for each in gc.get_objects())


@pytest.mark.exhaustive
@pytest.mark.ours_only("the test counts objects of this package")
async def test_t6_failed_handshakes_keep_no_memory(stack: Stack, certificates: Certificates) -> None:
    # Counted without the garbage collector: a cycle for each failure would pile up until it runs.
    context = certificates.client()
    server = certificates.server()
    async with stack.open() as group:
        group.set_exception_handler(lambda *_: None)
        serving = await serve(group, server)
        untrusting = ssl.create_default_context()
        gc.collect()
        before = count_of_openssls_objects()
        gc.disable()
        try:
            with plain_server(*[read_four] * 1000) as address:
                for _ in range(1000):
                    await connect_to(group, address, ssl=context)
            for _ in range(1000):
                await connect_to(group, serving.address, ssl=untrusting)
            # The server may still be about to hear of the last ones.
            await until(lambda: count_of_openssls_objects() < before + 10)
        finally:
            gc.enable()
        serving.server.close()


def refused(name: str, certificates: Certificates) -> tuple[ssl.SSLContext, dict[str, Any]]:
    context = ssl.create_default_context() if name == "authority" else certificates.client()
    return context, {"server_hostname": "other.example"} if name == "name" else {}


@pytest.mark.differs(
    "the peer's view of a handshake that fails",
    asyncio="the connection is cut",
    here="it gets the TLS alert",
    why="TLS specifies it",
)
@pytest.mark.parametrize("what", ["authority", "name"])
async def test_certificate_that_is_refused(stack: Stack, certificates: Certificates, version: str, what: str) -> None:
    context, options = refused(what, certificates)
    context.maximum_version = VERSIONS[version]
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server())
        error = await connect_to(group, serving.address, ssl=context, **options)
        assert isinstance(error, ssl.SSLCertVerificationError)
        assert error.reason == "CERTIFICATE_VERIFY_FAILED"
        assert error.verify_code == (62 if what == "name" else 20)
        if not stack.is_oracle:
            # asyncio's client does not report the alert, and its server does so only in debug mode.
            await until(lambda: contexts)
            (context_,) = contexts
            assert "ALERT" in str(context_["exception"])
            assert isinstance(context_["exception"], ssl.SSLError)
        assert await echoes(group, serving, certificates)
        serving.server.close()


@pytest.mark.differs(
    "the protocol factory of a TLS server",
    asyncio="called before the handshake",
    here="called after the handshake",
    why="a peer that sends nothing costs no protocol",
)
@pytest.mark.differs(
    "a handshake that fails on a server",
    asyncio="reported in debug mode only",
    here=(
        "reported to the exception handler with `handshake` and the client's `peername`, by default as one line at"
        " level INFO"
    ),
    why="an operator wants to see who failed, but not a traceback for each port scan",
)
@pytest.mark.parametrize("kind", ["garbage", "leaves", "half", "resets", "slow"])
async def test_server_survives_a_failing_handshake(stack: Stack, certificates: Certificates, kind: str) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server(), ssl_handshake_timeout=0.1 if kind == "slow" else None)
        with Peer.connect(serving.address) as peer:
            client = peer.socket.getsockname()
            if kind == "garbage":
                await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await peer.gone()
            elif kind == "half":
                await peer.send(b"\x16\x03\x01\x02\x00\x01")
                peer.shutdown()
                assert await peer.gone()
            elif kind == "resets":
                await peer.send(b"\x16\x03\x01")
                peer.reset()
            elif kind == "slow":
                assert await peer.gone()
        if not stack.is_oracle:  # asyncio reports it only in debug mode.
            await until(lambda: contexts)
            expected = {"garbage": ssl.SSLError, "slow": ConnectionAbortedError}.get(kind, ConnectionResetError)
            assert [type(context["exception"]) for context in contexts] == [expected]
            assert contexts[0]["message"] == "TLS handshake failed"
            assert contexts[0]["handshake"]
            assert contexts[0]["peername"] == client
            assert serving.protocols == []
        assert await echoes(group, serving, certificates)
        serving.server.close()


@pytest.mark.differs("a handshake that fails on a server")
@pytest.mark.parametrize("kind", ["leaves", "plain HTTP", "unknown authority", "slow", "name that Python cannot read"])
async def test_failed_handshake_is_one_line_at_level_info(
    stack: Stack, certificates: Certificates, tmp_path: Path, kind: str
) -> None:
    """What a port on the internet sees all day. asyncio writes nothing, unless in debug mode."""
    options: dict[str, Any] = {"ssl_handshake_timeout": 0.1} if kind == "slow" else {}
    context = certificates.server()
    if kind == "name that Python cannot read":
        context.verify_mode = ssl.CERT_REQUIRED
        certificates.authority.configure_trust(context)
    async with stack.open() as group:
        with capture_log(stack) as records:
            serving = await serve(group, context, **options)
            if kind == "unknown authority":
                with socket.socket() as sock:
                    sock.bind((HOST, 0))
                    client = sock.getsockname()
                untrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                error = await connect_to(group, serving.address, ssl=untrusting, local_addr=client)
                assert isinstance(error, ssl.SSLCertVerificationError)
            elif kind == "name that Python cannot read":
                unreadable = with_unreadable_certificate(certificates, certificates.client(), tmp_path)
                connecting = TLSPeer.connect_to(serving.address, unreadable)
                assert await is_dropped(connecting)
                client = None
            else:
                with Peer.connect(serving.address) as peer:
                    client = peer.socket.getsockname()
                    if kind == "plain HTTP":
                        await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                    if kind != "leaves":
                        assert await peer.gone()
            if not stack.is_oracle:
                await until(lambda: records)
            serving.server.close()
            await serving.server.wait_closed()
        if stack.is_oracle:
            return
        (record,) = records
        assert record.levelname == "INFO"
        assert not record.exc_info
        message = record.getMessage()
        assert message.startswith("TLS handshake with " + (repr(client) if client else ""))
        assert "\n" not in message


@pytest.mark.differs("a protocol factory that raises for an accepted connection")
@pytest.mark.ours_only
async def test_failing_factory_of_a_tls_server_stays_an_error(stack: Stack, certificates: Certificates) -> None:
    def factory() -> Recorder:
        raise ZeroDivisionError

    async with stack.open() as group:
        with capture_log(stack) as records:
            server = await group.create_server(factory, HOST, 0, ssl=certificates.server())
            assert await is_dropped(TLSPeer.connect_to(server.sockets[0].getsockname(), certificates.client()))
            await until(lambda: records)
            server.close()
        (record,) = records
        assert record.levelname == "ERROR"
        assert record.exc_info
        assert record.exc_info[0] is ZeroDivisionError
        assert "handshake" not in record.getMessage()


@pytest.mark.ours_only("asyncio reports nothing")
@needs_unix
async def test_failed_handshake_of_a_unix_connection(stack: Stack, certificates: Certificates, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_unix_server(Recorder, path, ssl=certificates.server())
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
        await until(lambda: contexts)
        assert [(context["message"], context["handshake"]) for context in contexts] == [("TLS handshake failed", True)]
        server.close()


def with_unreadable_certificate(certificates: Certificates, context: ssl.SSLContext, directory: Path) -> ssl.SSLContext:
    """Give `context` a certificate that OpenSSL takes, with a name that Python cannot decode."""
    authority = certificates.authority
    signer: Any = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.timezone.utc)
    name = b"\x30\x04\x82\x02\xff\xfe"  # A sequence of one dNSName, of two bytes.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, name), critical=False)
        .sign(signer, hashes.SHA256())
    )
    path = directory / "unreadable.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context.load_cert_chain(path)
    return context


@pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
async def test_client_with_a_certificate_that_python_cannot_read(
    stack: Stack, certificates: Certificates, tmp_path: Path, version: str, required: bool
) -> None:
    context = certificates.server(version=version)
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    certificates.authority.configure_trust(context)
    unreadable = with_unreadable_certificate(certificates, certificates.client(), tmp_path)
    readable = certificates.client()
    certificates.authority.issue_cert("client.example").configure_cert(readable)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, context)
        for _ in range(2):
            assert await is_dropped(TLSPeer.connect_to(serving.address, unreadable))
        if not stack.is_oracle:  # asyncio makes the protocol before the handshake.
            await until(lambda: len(contexts) == 2)
            for context_ in contexts:
                assert isinstance(context_["exception"], UnicodeDecodeError)
                assert context_["message"] == "TLS handshake failed"
            assert serving.protocols == []
        with await TLSPeer.connect_to(serving.address, readable) as peer:
            await peer.send(b"are you there?")
            await until(lambda: any(protocol.received == b"are you there?" for protocol in serving.protocols))
            peer.send_close_notify_and_close()
        await until(lambda: serving.protocols[-1].lost)
        serving.server.close()


@pytest.mark.parametrize("how", ["create_connection", "start_tls", "connect_stream"])
async def test_server_with_a_certificate_that_python_cannot_read(
    stack: Stack, certificates: Certificates, tmp_path: Path, version: str, how: str
) -> None:
    if stack.is_oracle and how == "connect_stream":
        pytest.skip("asyncio has no such thing")
    theirs = with_unreadable_certificate(certificates, certificates.server(version=version), tmp_path)
    ours = certificates.client()
    ours.check_hostname = False
    protocol = Recorder()

    async def connect(group: Any, address: Any) -> BaseException:
        with pytest.raises(UnicodeDecodeError) as caught:
            if how == "create_connection":
                await group.create_connection(lambda: protocol, *address, ssl=ours, server_hostname=NAME)
            elif how == "start_tls":
                transport, _ = await group.create_connection(lambda: protocol, *address)
                await group.start_tls(transport, protocol, ours, server_hostname=NAME)
            else:
                stream = await anyio.connect_tcp(*address)
                await group.connect_stream(lambda: protocol, stream, ssl=ours, server_hostname=NAME)
        return caught.value.with_traceback(None)

    async def accept(listener: socket.socket) -> None:
        await anyio.wait_readable(listener)
        assert await is_dropped(TLSPeer.wrap(listener.accept()[0], theirs, server_side=True))

    async with stack.open() as group:
        contexts = collect_contexts(group)
        with listening() as listener:
            listener.setblocking(False)
            error, _ = await together(lambda: connect(group, listener.getsockname()), lambda: accept(listener))
        if how == "start_tls":
            await protocol.wait_for("connection_lost")
            assert protocol.exception is error
        else:
            assert protocol.calls == []
        assert stack.is_oracle or contexts == []  # The call has raised the error.
        async with tls_client(group, certificates) as (transport, living, peer):
            await peer.send(b"still alive")
            await living.wait_received(11)
            transport.abort()
            await living.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio allocates 256 KiB for each of them, and takes too long")
async def test_a_thousand_silent_connections(stack: Stack, certificates: Certificates) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = 1000
    if hard != resource.RLIM_INFINITY and hard < 2 * count + 200:
        pytest.skip("too few descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * count + 200), hard))
    try:
        async with stack.open() as group:
            contexts = collect_contexts(group)
            serving = await serve(group, certificates.server(), backlog=count)
            silent = [Peer.connect(serving.address) for _ in range(count)]
            assert await echoes(group, serving, certificates)
            for peer in silent:
                peer.close()
            await until(lambda: len(contexts) == count)
            serving.server.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.ours_only("asyncio leaves pending handshakes to their time-out")
async def test_leaving_the_group_ends_pending_handshakes(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server())
        peer = Peer.connect(serving.address)
        await until(lambda: "handshakes=1" in repr(serving.server))
    with peer:
        assert await peer.gone()
    assert contexts == []
    assert serving.protocols == []


@pytest.mark.ours_only("abort_clients is new in Python 3.13")
async def test_server_ends_pending_handshakes_with_its_clients(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server())
        with Peer.connect(serving.address) as peer:
            await until(lambda: "handshakes=1" in repr(serving.server))
            serving.server.close()
            serving.server.abort_clients()
            assert await peer.gone()
        with anyio.fail_after(GUARD):
            await serving.server.wait_closed()
        assert contexts == []


@pytest.mark.differs("the protocol factory of a TLS server")
@pytest.mark.ours_only
async def test_factory_that_raises(stack: Stack, certificates: Certificates) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, certificates.server(), fail)
        peer = await TLSPeer.connect_to(serving.address, certificates.client())
        with peer, pytest.raises(DROPPED):
            await peer.receive()
        await until(lambda: contexts)
        assert isinstance(contexts[0]["exception"], ZeroDivisionError)
        serving.server.close()


@pytest.mark.differs("a client's protocol factory that raises")
@pytest.mark.ours_only
async def test_factory_of_a_client_that_raises(stack: Stack, certificates: Certificates) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        with pytest.raises(ZeroDivisionError):
            await group.create_connection(fail, *serving.address, ssl=certificates.client(), server_hostname=NAME)
        serving.server.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"server_hostname": "x"}, ValueError),
        ({"ssl_handshake_timeout": 1}, ValueError),
        ({"ssl_shutdown_timeout": 1}, ValueError),
        ({"ssl": True, "ssl_handshake_timeout": 0}, ValueError),
        ({"ssl": True, "ssl_shutdown_timeout": -1}, ValueError),
    ],
    ids=str,
)
async def test_parameters_that_are_refused(
    stack: Stack, certificates: Certificates, options: dict[str, Any], error: type[Exception]
) -> None:
    if stack.is_oracle and "ssl" in options:
        pytest.skip("asyncio refuses these after it has connected, and leaks the socket")
    async with stack.open() as group:
        with listening() as listener:
            with pytest.raises(error):
                await group.create_connection(Recorder, *listener.getsockname(), **options)
        if "server_hostname" not in options and options.get("ssl") is not True:
            with pytest.raises(error):
                await group.create_server(Recorder, HOST, 0, **options)
        with pytest.raises(TypeError):
            await group.create_server(Recorder, HOST, 0, ssl=True)


@pytest.mark.differs(
    "NaN as a TLS time-out",
    asyncio="accepted",
    here="`ValueError`",
    why="it is not a time",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("name", ["ssl_handshake_timeout", "ssl_shutdown_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
@needs_unix
async def test_timeouts_that_are_not_positive(
    stack: Stack, certificates: Certificates, tmp_path: Path, name: str, value: float
) -> None:
    path = str(tmp_path / "socket")
    ours, theirs = socket.socketpair()
    server = {"ssl": certificates.server(), name: value}
    client = {"ssl": certificates.client(), "server_hostname": NAME, name: value}
    async with stack.open() as group:
        with ours, theirs, listening() as listener:
            for call in (
                lambda: group.create_connection(Recorder, *listener.getsockname(), **client),
                lambda: group.create_server(Recorder, HOST, 0, **server),
                lambda: group.create_unix_connection(Recorder, sock=ours, **client),
                lambda: group.create_unix_server(Recorder, path, **server),
                lambda: group.connect_accepted_socket(Recorder, ours, **server),
            ):
                with pytest.raises(ValueError, match=f"{name} should be a positive number"):
                    await call()


@pytest.mark.differs(
    "a context that checks host names, without a name to check",
    asyncio="until 3.14 not checked; since then `ValueError`, once connected",
    here="`ValueError` at the call",
    why="it is the caller's mistake",
)
@pytest.mark.ours_only
@needs_unix
async def test_check_hostname_without_a_name(stack: Stack, certificates: Certificates) -> None:
    context = certificates.client()
    ours, theirs = socket.socketpair()
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        with ours, theirs, listening() as listener:
            for call in (
                lambda: group.create_connection(Recorder, *listener.getsockname(), ssl=context, server_hostname=""),
                lambda: group.create_unix_connection(Recorder, sock=ours, ssl=context, server_hostname=""),
                lambda: group.start_tls(transport, protocol, context),
                lambda: group.create_server(Recorder, HOST, 0, ssl=context),  # One for a client.
            ):
                with pytest.raises(ValueError, match="check_hostname requires server_hostname"):
                    await call()
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()  # No client has connected.
        transport.write(b"in the clear")
        assert await peer.receive_exactly(12) == b"in the clear"
        transport.abort()


@pytest.mark.differs(
    "a TLS time-out of another number type (`Decimal`)",
    asyncio="an error in a callback, and the client waits without end",
    here="accepted",
    why="timers accept it too",
)
@pytest.mark.ours_only
async def test_timeouts_of_other_number_types(stack: Stack, certificates: Certificates) -> None:
    timeouts: Any = {"ssl_handshake_timeout": Decimal(60), "ssl_shutdown_timeout": Decimal(30)}
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), **timeouts)
        options = {"ssl": certificates.client(), "server_hostname": NAME}
        transport, protocol = await group.create_connection(Recorder, *serving.address, **options, **timeouts)
        transport.close()
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None
        for name in timeouts:
            with pytest.raises(OverflowError):
                await group.create_connection(Recorder, *serving.address, **options, **{name: 10**400})
        serving.server.close()


@pytest.mark.differs(
    "`ssl` of a wrong type (a path)",
    asyncio="`AttributeError` after the connection was made, and the socket leaks",
    here="`AttributeError`; the socket is closed",
    why="nothing leaks",
)
@pytest.mark.ours_only
async def test_ssl_of_a_wrong_type(stack: Stack, certificates: Certificates) -> None:
    # It must not count as `True`: the caller wanted something else than the default.
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        with pytest.raises(AttributeError):
            await group.create_connection(Recorder, *serving.address, ssl="certificate.pem", server_hostname=NAME)
        serving.server.close()


@pytest.mark.parametrize(
    "end",
    ["create_server", "connect_accepted_socket", pytest.param("create_unix_server", marks=needs_unix), "start_tls"],
)
async def test_shutdown_timeout_of_a_server(stack: Stack, certificates: Certificates, tmp_path: Path, end: str) -> None:
    protocol = Recorder()
    options: dict[str, Any] = {"ssl_shutdown_timeout": 0.05}
    path = str(tmp_path / "socket")
    listener = None
    async with stack.open() as group:
        if end == "create_unix_server":
            listener = await group.create_unix_server(lambda: protocol, path, ssl=certificates.server(), **options)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
        elif end == "create_server":
            listener = await group.create_server(lambda: protocol, HOST, 0, ssl=certificates.server(), **options)
            sock = socket.create_connection(listener.sockets[0].getsockname())
        else:
            ours, sock = socket.socketpair()

        async def serve_it() -> None:
            if end == "connect_accepted_socket":
                await group.connect_accepted_socket(lambda: protocol, ours, ssl=certificates.server(), **options)
            elif end == "start_tls":
                plain, _ = await group.connect_accepted_socket(lambda: protocol, ours)
                protocol.transport = await group.start_tls(
                    plain, protocol, certificates.server(), server_side=True, **options
                )

        _, peer = await together(serve_it, lambda: TLSPeer.wrap(sock, certificates.client(), server_hostname=NAME))
        with peer:
            await protocol.wait_for("connection_made")
            protocol.transport.close()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, TimeoutError)
            assert "0.05" in str(protocol.exception) or stack.is_oracle
        if listener is not None:
            listener.close()


def test_default_timeouts(certificates: Certificates) -> None:
    """One minute for the handshake and half a minute for the shutdown, on a clock that the test moves."""
    trio = pytest.importorskip("trio")
    clock = pytest.importorskip("trio.testing").MockClock()
    errors: list[Exception] = []

    async def connect(group: Any, address: Any) -> None:
        try:
            await group.create_connection(Recorder, *address, ssl=certificates.client(), server_hostname=NAME)
        except ConnectionAbortedError as exc:
            errors.append(exc.with_traceback(None))

    async def main() -> None:
        async with TransportGroup() as group, anyio.create_task_group() as tasks:
            with listening() as listener:
                tasks.start_soon(connect, group, listener.getsockname())
                while not group.statistics().pending_timers:
                    await anyio.lowlevel.checkpoint()
                clock.jump(59.9)
                await turns()
                assert not errors
                clock.jump(0.2)
                while not errors:
                    await anyio.lowlevel.checkpoint()
                assert "60" in str(errors[0])
            async with tls_client(group, certificates) as (transport, protocol, _):
                transport.close()
                clock.jump(29.9)
                await turns()
                assert not protocol.lost
                clock.jump(0.2)
                while not protocol.lost:
                    await anyio.lowlevel.checkpoint()
                assert isinstance(protocol.exception, TimeoutError)
                assert "30" in str(protocol.exception)

    trio.run(main, clock=clock)  # AnyIO 4.10 does not export the clock.
