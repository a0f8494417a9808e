"""TLS: extra info, and the features of contexts."""

from __future__ import annotations

import socket
import ssl
import sys
from typing import TYPE_CHECKING, Any

import pytest
from network import names
from support import (
    HOST,
    Recorder,
    Stack,
    collect_contexts,
    until,
)
from tls_support import (
    NAME,
    Certificates,
    TLSPeer,
    echo,
    serve,
    tls_client,
)

from transports_anyio import current_group

if TYPE_CHECKING:
    pass
from tls_helpers import connect_to, echoes, peers_contexts, variable

pytestmark = pytest.mark.anyio


# -- what is known ------------------------------------------------------------------------------------------


async def test_extra_info(stack: Stack, certificates: Certificates, version: str) -> None:
    context = certificates.client()
    async with stack.open() as group:
        async with tls_client(group, certificates, version=version, ssl=context) as (transport, protocol, peer):
            info = transport.get_extra_info
            assert info("sslcontext") is context
            assert ("DNS", NAME) in info("peercert")["subjectAltName"]
            assert info("cipher") == peer.socket.cipher()
            assert info("compression") is None
            assert info("ssl_object").version() == f"TLSv{version}"
            assert info("sockname") == peer.socket.getpeername()
            assert info("peername") == peer.socket.getsockname()
            assert info("socket").fileno() >= 0
            assert info("nothing", "default") == "default"
            transport.abort()
            await protocol.wait_for("connection_lost")


@pytest.mark.differs("TLS: a transport that was closed")
@pytest.mark.ours_only
async def test_t10_extra_info_after_two_closes(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        transport.close()
        transport.close()
        assert transport.get_extra_info("cipher")[1].startswith("TLS")
        assert transport.get_extra_info("nothing", 7) == 7
        peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")
        assert transport.get_extra_info("cipher")[1].startswith("TLS")


@pytest.mark.differs(
    "`get_read_buffer_size`, `get_read_buffer_limits`, `set_read_buffer_limits`",
    asyncio="on TLS transports only",
    here="not there",
    why="undocumented, and missing over TCP too",
)
@pytest.mark.ours_only
async def test_a_tls_transport_has_only_documented_methods(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        for name in ("get_read_buffer_size", "get_read_buffer_limits", "set_read_buffer_limits"):
            assert not hasattr(transport, name)
        peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio has no statistics")
async def test_the_handshake_time_out_ends_with_the_handshake(stack: Stack, certificates: Certificates) -> None:
    """Or else it would end the connection later on."""
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, _):
        assert group.statistics().pending_timers == 0
        transport.abort()
        await protocol.wait_for("connection_lost")


async def test_no_write_eof(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, tls_client(group, certificates) as (transport, protocol, peer):
        assert transport.can_write_eof() is False
        with pytest.raises(NotImplementedError):
            transport.write_eof()
        transport.write(b"still open")
        assert await peer.receive_exactly(10) == b"still open"
        transport.abort()
        await protocol.wait_for("connection_lost")


# -- features of contexts -----------------------------------------------------------------------------------


async def test_server_name_indication(stack: Stack, certificates: Certificates) -> None:
    seen: list[str | None] = []
    other = certificates.server("other.example")
    context = certificates.server()

    def choose(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        seen.append(name)
        if name == "other.example":
            tls.context = other

    context.sni_callback = choose
    async with stack.open() as group:
        serving = await serve(group, context, lambda: Recorder(on_data_received=echo))
        for name in ("other.example", NAME):
            client = Recorder()
            await group.create_connection(
                lambda client=client: client, *serving.address, ssl=certificates.client(), server_hostname=name
            )
            client.transport.write(b"hi")
            await client.wait_received(2)
            assert ("DNS", name) in client.transport.get_extra_info("peercert")["subjectAltName"]
            client.transport.close()
            await client.wait_for("connection_lost")
        assert seen == ["other.example", NAME]
        serving.server.close()


@pytest.mark.differs(
    "a server name callback that raises",
    asyncio="the connection is cut",
    here="the peer gets the TLS alert",
    why="TLS specifies it",
)
async def test_server_name_callback_is_called_as_a_callback(
    stack: Stack, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It runs in the context of `create_server`; if it raises or refuses, only that handshake ends.
    seen: list[Any] = []
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    context = certificates.server()

    def choose(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> int | None:
        seen.append((name, variable.get(), stack.is_oracle or current_group() is group))
        variable.set("callback")
        if name == "raises.example":
            raise ZeroDivisionError
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME if name == "unknown.example" else None

    context.sni_callback = choose
    variable.set("server")
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, context)
        variable.set("client")
        for name, alert in (("raises.example", "HANDSHAKE_FAILURE"), ("unknown.example", "UNRECOGNIZED_NAME")):
            with pytest.raises(ssl.SSLError, match=None if stack.is_oracle else alert):
                await TLSPeer.connect_to(serving.address, certificates.client(), name)
        assert await echoes(group, serving, certificates)
        assert seen == [(name, "server", True) for name in ("raises.example", "unknown.example", NAME)]
        assert unraisable == [ZeroDivisionError]  # Python's `ssl` does not pass it on.
        if not stack.is_oracle:
            assert ["CALLBACK_FAILED" in str(error) for error in peers_contexts(contexts)] == [True, True]
        serving.server.close()


async def test_alpn(stack: Stack, certificates: Certificates) -> None:
    ours, theirs = certificates.server(), certificates.client()
    ours.set_alpn_protocols(["h2", "http/1.1"])
    theirs.set_alpn_protocols(["http/1.1"])
    async with stack.open() as group:
        serving = await serve(group, ours)
        with await TLSPeer.connect_to(serving.address, theirs) as peer:
            assert peer.socket.selected_alpn_protocol() == "http/1.1"
            protocol = await serving.protocol()
            assert protocol.transport.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
            peer.send_close_notify_and_close()
        await protocol.wait_for("connection_lost")
        serving.server.close()


async def test_client_certificate_that_is_asked_for_later(stack: Stack, certificates: Certificates) -> None:
    # Post-handshake authentication (RFC 8446, section 4.6.2): messages of the handshake in the midst of the data.
    ours, theirs = certificates.server(version="1.3"), certificates.client()
    ours.post_handshake_auth = theirs.post_handshake_auth = True
    ours.verify_mode = ssl.CERT_REQUIRED
    certificates.authority.configure_trust(ours)
    certificates.authority.issue_cert("client.example").configure_cert(theirs)
    names: list[Any] = []

    def serve_it(protocol: Recorder, data: bytes) -> None:
        tls = protocol.transport.get_extra_info("ssl_object")
        names.append((data, (tls.getpeercert() or {}).get("subjectAltName")))
        if data == b"private":
            tls.verify_client_post_handshake()
        protocol.transport.write(data)

    async with stack.open() as group:
        serving = await serve(group, ours, lambda: Recorder(on_data_received=serve_it))
        client = Recorder()
        await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
        for request, so_far in ((b"public", 6), (b"private", 13), (b"secret", 19)):
            client.transport.write(request)
            await client.wait_received(so_far)
        assert names == [(b"public", None), (b"private", None), (b"secret", (("DNS", "client.example"),))]
        client.transport.close()
        await client.wait_for("connection_lost")
        await serving.protocols[0].wait_for("connection_lost")
        serving.server.close()


@pytest.mark.parametrize("required", [True, False], ids=["required", "optional"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "none"])
async def test_client_certificates(
    stack: Stack, certificates: Certificates, version: str, required: bool, given: bool
) -> None:
    ours, theirs = certificates.server(version=version), certificates.client()
    ours.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    certificates.authority.configure_trust(ours)
    if given:
        certificates.authority.issue_cert("client.example").configure_cert(theirs)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        serving = await serve(group, ours)
        client = Recorder()
        if required and not given:  # asyncio's server keeps the alert to itself.
            if version == "1.2":
                error = await connect_to(group, serving.address, ssl=theirs)
            else:  # In TLS 1.3 the client finishes before the server has checked its certificate.
                await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
                await client.wait_for("connection_lost")
                error = client.exception  # type: ignore[assignment]
            if not stack.is_oracle:
                assert isinstance(error, ssl.SSLError)
                assert "ALERT" in str(error)
                await until(lambda: contexts)
                assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in str(contexts[0]["exception"])
                assert serving.protocols == []
        else:
            await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
            protocol = await serving.protocol()
            peercert = protocol.transport.get_extra_info("peercert")
            if given:
                assert ("DNS", "client.example") in peercert["subjectAltName"]
            else:
                assert peercert is None
            client.transport.close()
            await protocol.wait_for("connection_lost")
            await client.wait_for("connection_lost")
        serving.server.close()


async def test_session_resumption(stack: Stack, certificates: Certificates, version: str) -> None:
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=echo))
        context = certificates.client(version=version)
        session = None
        for number in range(2):
            with await TLSPeer.connect_to(serving.address, context, session=session) as peer:
                await peer.send(b"x")
                assert await peer.receive() == b"x"
                assert peer.socket.session_reused == (number == 1)
                session = peer.socket.session
                protocol = await serving.protocol(number)
                assert protocol.transport.get_extra_info("ssl_object").session_reused == (number == 1)
                await peer.shut_down_tls()
            await protocol.wait_for("connection_lost")
        serving.server.close()


async def test_session_resumption_by_a_client(stack: Stack, certificates: Certificates, version: str) -> None:
    # As with asyncio: an `sslobject_class` may set the session before the handshake.
    sessions: list[ssl.SSLSession] = []

    class Resuming(ssl.SSLObject):
        def do_handshake(self) -> None:
            if sessions and self.session is None:
                self.session = sessions[-1]
            super().do_handshake()

    context = certificates.client(version=version)
    context.sslobject_class = Resuming
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=echo))
        for number in range(2):
            client = Recorder()
            await group.create_connection(
                lambda client=client: client, *serving.address, ssl=context, server_hostname=NAME
            )
            client.transport.write(b"x")
            await client.wait_received(1)
            tls = client.transport.get_extra_info("ssl_object")
            assert tls.session_reused == (number == 1)
            sessions.append(tls.session)
            client.transport.close()
            await client.wait_for("connection_lost")
        serving.server.close()


@pytest.mark.parametrize(
    ("certified", "name"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("b\xfccher.example", "b\xfccher.example"),
        ("*.example.org", "www.example.org"),
    ],
    ids=["IPv4", "IPv6", "IDNA", "wildcard"],
)
async def test_server_hostname_is_verified(stack: Stack, certificates: Certificates, certified: str, name: str) -> None:
    host = name if name == "::1" else HOST
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    async with stack.open() as group:
        serving = await serve(group, certificates.server(certified), host=host)
        client = Recorder()
        # An address is verified without being given again.
        options = {} if name == host else {"server_hostname": name}
        await group.create_connection(lambda: client, host, serving.port, ssl=certificates.client(), **options)
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()


@pytest.mark.parametrize(
    ("certified", "host"),
    [
        ("b\xfccher.example", "b\xfccher.example"),
        ("localhost", "\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54"),
    ],
    ids=["IDNA", "full width"],
)
async def test_host_with_an_internationalised_name(
    stack: Stack, certificates: Certificates, certified: str, host: str, anyio_backend: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It is resolved and verified without `server_hostname`; the second one by the system's own resolver."""
    async with stack.open() as group:
        serving = await serve(group, certificates.server(certified))
        client = Recorder()
        known = {"b\xfccher.example": [HOST], "xn--bcher-kva.example": [HOST]}
        with names(monkeypatch, known, anyio_backend):
            await group.create_connection(lambda: client, host, serving.port, ssl=certificates.client())
        assert client.transport.get_extra_info("peercert")["subjectAltName"][0][1] in {*known, "localhost"}
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()


async def test_ssl_true_uses_the_systems_authorities(
    stack: Stack, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        error = await connect_to(group, serving.address, ssl=True)
        assert isinstance(error, ssl.SSLCertVerificationError)
        with certificates.files() as files:
            monkeypatch.setenv("SSL_CERT_FILE", files["ca"])
            client = Recorder()
            await group.create_connection(lambda: client, *serving.address, ssl=True, server_hostname=NAME)
            client.transport.close()
            await client.wait_for("connection_lost")
            # No name at all: the certificate is still verified, its name is not.
            unnamed = certificates.client()
            unnamed.check_hostname = False
            for context in (True, unnamed):
                client = Recorder()
                await group.create_connection(
                    lambda client=client: client, *serving.address, ssl=context, server_hostname=""
                )
                client.transport.close()
                await client.wait_for("connection_lost")
        serving.server.close()


async def test_settings_of_the_context_are_used(stack: Stack, certificates: Certificates) -> None:
    ours, theirs = certificates.server(), certificates.client()
    ours.maximum_version = ssl.TLSVersion.TLSv1_2
    ours.options |= ssl.OP_NO_TICKET
    theirs.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES128-GCM-SHA256")
    async with stack.open() as group:
        serving = await serve(group, ours)
        client = Recorder()
        await group.create_connection(lambda: client, *serving.address, ssl=theirs, server_hostname=NAME)
        cipher = client.transport.get_extra_info("cipher")
        assert cipher[0].endswith("AES128-GCM-SHA256")
        assert cipher[1] == "TLSv1.2"
        assert not client.transport.get_extra_info("ssl_object").session.has_ticket
        client.transport.close()
        await client.wait_for("connection_lost")
        serving.server.close()
