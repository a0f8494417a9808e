"""aiosmtpd: a mail server whose connections become TLS connections in the middle, by asyncio's own TLS code."""

from __future__ import annotations

import asyncio
import smtplib
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session
from peers import GUARD, HOST, Tls


class Mailbox:
    """Keep what came."""

    def __init__(self) -> None:
        self.envelopes: list[tuple[bool, Envelope]] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        await asyncio.sleep(0)
        self.envelopes.append((session.ssl is not None, envelope))
        return "250 kept"


async def serve(mailbox: Any, **options: Any) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: SMTP(mailbox, hostname="localhost", loop=loop, **options), HOST, 0)


def message(size: int = 10) -> bytes:
    lines = b"".join(b"line %d\r\n" % number for number in range(size))
    return b"Subject: test\r\n\r\n" + lines


async def test_starttls(tls: Tls) -> None:
    mailbox = Mailbox()

    def authenticate(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        right = (data.login, data.password) == (b"user", b"secret")
        return AuthResult(success=right, handled=False)

    def client(port: int) -> None:
        with smtplib.SMTP(HOST, port, timeout=GUARD) as smtp:
            with pytest.raises(smtplib.SMTPSenderRefused):
                smtp.sendmail("a@example.org", "b@example.org", message())
        with smtplib.SMTP(HOST, port, timeout=GUARD) as smtp:
            smtp.starttls(context=tls.client)
            with pytest.raises(smtplib.SMTPAuthenticationError):
                smtp.login("user", "wrong")
            smtp.login("user", "secret")
            for size in (10, 20_000):
                assert smtp.sendmail("a@example.org", ["b@example.org", "c@example.org"], message(size)) == {}

    options = {"tls_context": tls.server, "require_starttls": True, "authenticator": authenticate}
    async with await serve(mailbox, **options) as server:
        port = server.sockets[0].getsockname()[1]
        await asyncio.gather(*(asyncio.to_thread(client, port) for _ in range(5)))
    assert len(mailbox.envelopes) == 10
    assert all(encrypted for encrypted, _ in mailbox.envelopes)
    assert sorted({len(envelope.content) for _, envelope in mailbox.envelopes}) == [
        len(message()),
        len(message(20_000)),
    ]


async def test_a_plain_conversation_and_a_client_that_goes_away() -> None:
    mailbox = Mailbox()

    def client(port: int) -> None:
        with smtplib.SMTP(HOST, port, timeout=GUARD) as smtp:
            smtp.sendmail("a@example.org", "b@example.org", message())
            with pytest.raises(smtplib.SMTPResponseException):
                smtp.docmd("NONSENSE")
                raise smtplib.SMTPResponseException(*smtp.docmd("NONSENSE"))
        smtp = smtplib.SMTP(HOST, port, timeout=GUARD)
        smtp.docmd("MAIL FROM:<a@example.org>")
        smtp.docmd("RCPT TO:<b@example.org>")
        smtp.docmd("DATA")
        smtp.sock.sendall(b"half of a li")
        smtp.close()

    async with await serve(mailbox) as server:
        await asyncio.to_thread(client, server.sockets[0].getsockname()[1])
    (encrypted, envelope), *others = mailbox.envelopes
    assert not encrypted
    assert others == []
    assert envelope.rcpt_tos == ["b@example.org"]


async def test_a_client_that_is_silent_too_long() -> None:
    async with await serve(Mailbox(), timeout=0.05) as server:
        reader, writer = await asyncio.open_connection(HOST, server.sockets[0].getsockname()[1])
        assert (await reader.readline()).startswith(b"220 ")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
