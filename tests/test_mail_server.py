"""The mail server of the examples, with Python's `smtplib`, and with bare sockets for invalid input."""

from __future__ import annotations

import smtplib
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSStream
from support import GUARD, HOST, SMALL, Peer, Stack
from tls_support import NAME, Certificates

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import mail_server
from mail_server import Mail, Message

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("the protocol asks for its group, which asyncio does not have"),
]


class Server:
    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.clients: list[Mail] = []
        self.messages: list[Message] = []


@asynccontextmanager
async def serving(group: Any, certificates: Certificates, idle_timeout: float = 3600) -> AsyncIterator[Server]:
    context = certificates.server()
    found: list[Server] = []

    def factory() -> Mail:
        found[0].clients.append(Mail(found[0].messages.append, context, idle_timeout))
        return found[0].clients[-1]

    server = await group.create_server(factory, HOST, 0)
    found.append(Server(server.sockets[0].getsockname()))
    yield found[0]


class Client:
    """Lines, over a bare socket."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.pending = b""

    async def say(self, *lines: str) -> None:
        await self.peer.send("".join(f"{line}\r\n" for line in lines).encode())

    async def hear(self) -> str:
        while b"\r\n" not in self.pending:
            more = await self.peer.receive()
            if not more:
                return "(the end)"
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\r\n")
        return line.decode()

    async def ask(self, line: str) -> str:
        """Return the status of the answer."""
        await self.say(line)
        while (heard := await self.hear())[3:4] == "-":
            pass
        return heard[:3]


class EncryptedPeer:
    """Like a `Peer` after the handshake: AnyIO's TLS over the same socket."""

    def __init__(self, stream: TLSStream) -> None:
        self.send = stream.send
        self.receive_from = BufferedByteReceiveStream(stream)

    async def receive(self) -> bytes:
        try:
            with anyio.fail_after(GUARD):
                return await self.receive_from.receive()
        except anyio.EndOfStream:
            return b""


@asynccontextmanager
async def visiting(server: Server, *, receive_buffer: int | None = None) -> AsyncIterator[Client]:
    with Peer.connect(server.address, receive_buffer=receive_buffer) as peer:
        client = Client(peer)
        assert (await client.hear()).startswith("220 ")
        yield client


@asynccontextmanager
async def encrypted(server: Server, certificates: Certificates) -> AsyncIterator[Client]:
    """Yield a client that has greeted over TLS."""
    async with await anyio.connect_tcp(*server.address) as stream:
        buffered = BufferedByteReceiveStream(stream)
        assert (await buffered.receive_until(b"\r\n", 100)).startswith(b"220 ")
        await stream.send(b"STARTTLS\r\n")
        assert (await buffered.receive_until(b"\r\n", 100)).startswith(b"220 ")
        with anyio.fail_after(GUARD):
            tls = await TLSStream.wrap(
                stream, hostname=NAME, ssl_context=certificates.client(), standard_compatible=False
            )
        peer: Any = EncryptedPeer(tls)
        client = Client(peer)
        assert await client.ask("EHLO me") == "250"
        yield client


async def test_pythons_smtplib(stack: Stack, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail_server, "MAX_MESSAGE", 100_000)
    message = EmailMessage()
    message["Subject"] = "Greetings"
    message.set_content("Hello,\n\n.a line with a dot\n..and one with two\n" + "and a long one\n" * 5_000)

    def send(address: tuple[str, int]) -> None:
        context = certificates.client()
        with smtplib.SMTP(*address, timeout=GUARD) as client:
            client.ehlo("me")
            assert client.has_extn("starttls")
            # `smtplib` checks the certificate's name, which is not this server's address.
            client._host = NAME  # type: ignore[attr-defined]
            client.starttls(context=context)
            client.ehlo("me")
            assert not client.has_extn("starttls")
            for _ in range(2):
                client.send_message(message, "me@example.org", ["you@example.org", "all@example.org"])
            too_much = b"x\r\n" * 40_000
            with pytest.raises(smtplib.SMTPSenderRefused) as caught:  # `smtplib` sends the size first.
                client.sendmail("me@example.org", ["you@example.org"], too_much)
            assert caught.value.smtp_code == 552
            assert client.mail("me@example.org")[0] == client.rcpt("you@example.org")[0] == 250
            assert client.data(too_much)[0] == 552

    async with stack.open() as group, serving(group, certificates) as server:
        await anyio.to_thread.run_sync(send, server.address)
        await group.wait_closed()
        first, second = server.messages
        assert first == second
        assert first.sender == "me@example.org"
        assert first.recipients == ["you@example.org", "all@example.org"]
        assert first.content.endswith(
            b"\r\n.a line with a dot\r\n..and one with two\r\n" + b"and a long one\r\n" * 5_000
        )


async def test_commands_before_starttls_are_refused(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, serving(group, certificates) as server, visiting(server) as client:
        assert await client.ask("EHLO me") == "250"
        assert await client.ask("MAIL FROM:<me@example.org>") == "530"
        assert await client.ask("NOOP") == "250"
        assert await client.ask("QUIT") == "221"
        assert await client.hear() == "(the end)"


@pytest.mark.parametrize("behind", ["MAIL FROM:<evil@example.org>\r\n", "EH"], ids=["a command", "half a command"])
async def test_pipelined_data_after_starttls_ends_the_connection(
    stack: Stack, certificates: Certificates, behind: str
) -> None:
    """In the same segment: the commands are ignored, and no encrypted connection is made."""
    async with stack.open() as group, serving(group, certificates) as server, visiting(server) as client:
        await client.peer.send(f"EHLO me\r\nSTARTTLS\r\n{behind}".encode())
        heard = [await client.hear() for _ in range(6)]
        assert [line[:3] for line in heard] == ["250"] * 5 + ["554"]
        assert await client.hear() == "(the end)"
        assert not server.clients[0].encrypted


async def test_plaintext_instead_of_a_handshake_ends_the_connection(
    stack: Stack, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stack.open() as group, serving(group, certificates) as server, visiting(server) as client:
        assert await client.ask("STARTTLS") == "220"
        await client.say("EHLO evil", "MAIL FROM:<evil@example.org>")
        assert await client.peer.gone()
        await group.wait_closed()
        assert server.clients[0].message is None
    assert "no encryption" in capsys.readouterr().out


async def test_starttls_resets_the_session(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, serving(group, certificates) as server:
        async with encrypted(server, certificates) as client:
            assert await client.ask("STARTTLS") == "503"
            assert server.clients[0].encrypted
        server.clients.clear()
        async with await anyio.connect_tcp(*server.address) as stream:
            buffered = BufferedByteReceiveStream(stream)
            await buffered.receive_until(b"\r\n", 100)
            await stream.send(b"HELO me\r\nSTARTTLS\r\n")
            await buffered.receive_until(b"220 go ahead\r\n", 1000)
            tls = await TLSStream.wrap(
                stream, hostname=NAME, ssl_context=certificates.client(), standard_compatible=False
            )
            await tls.send(b"MAIL FROM:<me@example.org>\r\n")
            assert (await tls.receive()).startswith(b"503 say EHLO")


async def test_commands_out_of_order(stack: Stack, certificates: Certificates) -> None:
    async with (
        stack.open() as group,
        serving(group, certificates) as server,
        encrypted(server, certificates) as client,
    ):
        for line, status in [
            ("RCPT TO:<you@example.org>", "503"),
            ("DATA", "503"),
            ("MAIL FROM:me", "501"),
            ("MAIL TO:<me@example.org>", "501"),
            ("mail from:<> SIZE=1", "250"),  # A bounce has no sender.
            ("MAIL FROM:<me@example.org>", "503"),
            ("DATA", "503"),
            ("RCPT TO:<>", "501"),
            ("RSET", "250"),
            ("RCPT TO:<you@example.org>", "503"),
            ("VRFY me", "500"),
        ]:
            assert (line, await client.ask(line)) == (line, status)
        # All at once: PIPELINING was offered.
        await client.say("MAIL FROM:<me@example.org>", "RCPT TO:<you@example.org>", "DATA", "STARTTLS", ".", "QUIT")
        assert [(await client.hear())[:3] for _ in range(5)] == ["250", "250", "354", "250", "221"]
        (message,) = server.messages
        assert bytes(message.content) == b"STARTTLS\r\n"


async def test_too_many_recipients(stack: Stack, certificates: Certificates) -> None:
    async with (
        stack.open() as group,
        serving(group, certificates) as server,
        encrypted(server, certificates) as client,
    ):
        await client.ask("MAIL FROM:<me@example.org>")
        for _ in range(mail_server.MAX_RECIPIENTS):
            assert await client.ask("RCPT TO:<you@example.org>") == "250"
        assert await client.ask("RCPT TO:<you@example.org>") == "452"


@pytest.mark.parametrize(
    "line", [b"NOOP\nNOOP\r\n", b"NOOP\rNOOP\r\n", b"x" * 3000, b"x" * 3000 + b"\r\n"], ids=["lf", "cr", "half", "long"]
)
async def test_malformed_lines(stack: Stack, certificates: Certificates, line: bytes) -> None:
    async with stack.open() as group, serving(group, certificates) as server, visiting(server) as client:
        await client.peer.send(line)
        assert (await client.hear())[:3] == "500"
        assert await client.hear() == "(the end)"


async def test_a_silent_client(stack: Stack, certificates: Certificates) -> None:
    async with stack.open() as group, serving(group, certificates, 0.02) as server, visiting(server) as client:
        assert (await client.hear())[:3] == "421"
        assert await client.hear() == "(the end)"


async def test_a_client_that_does_not_read(stack: Stack, certificates: Certificates) -> None:
    """It is not read either, and given up after a while."""
    async with (
        stack.open() as group,
        serving(group, certificates, 0.1) as server,
        visiting(server, receive_buffer=SMALL) as client,
    ):
        command = b"NOOP\r\n" * 1000
        server.clients[0].transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        with pytest.raises(ConnectionError):
            while True:
                await client.peer.send(command)
        assert server.clients[0].transport.is_closing()


async def test_a_client_that_leaves_during_the_handshake(
    stack: Stack, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stack.open() as group, serving(group, certificates) as server, visiting(server) as client:
        assert await client.ask("STARTTLS") == "220"
        client.peer.close()
        await group.wait_closed()
        assert server.messages == []
    assert "no encryption" in capsys.readouterr().out
