"""A mail server that turns on encryption in mid-stream: SMTP with STARTTLS (RFC 5321, RFC 3207).

    python examples/mail_server.py --backend trio --certificate server.pem

Then `openssl s_client -starttls smtp -connect 127.0.0.1:8888`, or Python's `smtplib`. The file has the certificate
chain and its private key in PEM. Mail is taken over encrypted connections only, and printed.

An attacker between client and server could add commands in the clear right after STARTTLS, and the server would take
them for encrypted ones of the client. So this server ends the connection when data follows STARTTLS.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

import _backend

from transports_anyio import BaseTransport, Protocol, TimerHandle, Transport, TransportGroup, current_group

#: In bytes, without the end of the line (RFC 5321, 4.5.3.1.6, has 998).
MAX_LINE = 2000
MAX_MESSAGE = 10 * 1024 * 1024
MAX_RECIPIENTS = 100


@dataclass
class Message:
    """What a client hands over."""

    sender: str
    recipients: list[str] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)


class Mail(Protocol):
    """One client."""

    transport: Transport

    def __init__(
        self, deliver: Callable[[Message], object], context: ssl.SSLContext, idle_timeout: float = 300
    ) -> None:
        self.deliver = deliver
        self.context = context
        self.idle_timeout = idle_timeout
        self.timer: TimerHandle | None = None
        self.buffer = b""
        self.encrypted = False
        self.forget()

    def forget(self) -> None:
        """Reset what is known of the client: at the start, and after the TLS handshake (RFC 3207, 4.2)."""
        self.greeted = False
        self.message: Message | None = None
        self.receiving = False  # The content of the message.

    # Callbacks of the transport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport
        self.reply("220 mail.example ESMTP")
        self.expect_more()

    def data_received(self, data: bytes) -> None:
        # Only CR LF ends a line: accepting one of the two alone allows SMTP smuggling.
        *lines, self.buffer = (self.buffer + data).split(b"\r\n")
        for number, line in enumerate(lines, 1):
            if self.transport.is_closing():
                return
            if line.upper() == b"STARTTLS" and not self.receiving:
                self.start_tls(alone=number == len(lines) and not self.buffer)
                return
            self.line_received(line)
        if len(self.buffer) > MAX_LINE:
            self.leave("500 your line is too long")
        self.expect_more()

    def pause_writing(self) -> None:
        self.transport.pause_reading()  # Who does not read our replies may not send us more commands.

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.expect_nothing()

    # Time

    def expect_nothing(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def expect_more(self) -> None:
        self.expect_nothing()
        self.timer = current_group().call_later(self.idle_timeout, self.give_up)

    def give_up(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.leave("421 you have been silent for too long")

    # Encryption

    def start_tls(self, *, alone: bool) -> None:
        if not alone:
            self.leave("554 nothing may come behind STARTTLS")
        elif self.encrypted:
            self.reply("503 it is encrypted already")
        else:
            self.reply("220 go ahead")
            # The data that follows is the TLS handshake, so the protocol must not read it.
            self.transport.pause_reading()
            current_group().start_soon(self.encrypt)

    async def encrypt(self) -> None:
        if self.transport.is_closing():
            return
        try:
            self.transport = await current_group().start_tls(self.transport, self, self.context, server_side=True)
        except OSError as exc:  # `ssl.SSLError` is one. The connection is lost, and `connection_lost` called.
            print(f"no encryption: {exc}", flush=True)
        else:
            self.forget()
            self.encrypted = True
            self.expect_more()

    # Commands

    def line_received(self, line: bytes) -> None:
        if b"\r" in line or b"\n" in line or len(line) > MAX_LINE:
            self.leave("500 that is no line")
        elif self.receiving:
            self.content_received(line)
        else:
            command, _, rest = line.decode(errors="replace").partition(" ")
            self.command_received(command.upper(), rest.strip())

    def command_received(self, command: str, rest: str) -> None:
        if command == "QUIT":
            self.leave("221 goodbye")
        elif command == "NOOP":
            self.reply("250 nothing done")
        elif command in ("EHLO", "HELO"):
            self.forget()
            self.greeted = True
            offers = [f"SIZE {MAX_MESSAGE}", "PIPELINING", "8BITMIME"]
            if not self.encrypted:
                offers.append("STARTTLS")
            self.reply(*([f"250 hello {rest}"] if command == "HELO" else [f"250-hello {rest}", *offers_of(offers)]))
        elif not self.encrypted:
            self.reply("530 say STARTTLS first")
        elif not self.greeted:
            self.reply("503 say EHLO first")
        elif command == "RSET":
            self.message = None
            self.reply("250 forgotten")
        elif command == "MAIL":
            self.mail_from(rest)
        elif command == "RCPT":
            self.recipient(rest)
        elif command == "DATA":
            self.data()
        else:
            self.reply("500 what?")

    def mail_from(self, rest: str) -> None:
        address = path_of(rest, "FROM:")
        if self.message is not None:
            self.reply("503 one sender is enough")
        elif address is None:
            self.reply("501 MAIL FROM:<address>, please")
        elif size_of(rest) > MAX_MESSAGE:
            self.reply("552 that is too much")
        else:
            self.message = Message(address)
            self.reply("250 fine")

    def recipient(self, rest: str) -> None:
        address = path_of(rest, "TO:")
        if self.message is None:
            self.reply("503 say MAIL first")
        elif not address:
            self.reply("501 RCPT TO:<address>, please")
        elif len(self.message.recipients) >= MAX_RECIPIENTS:
            self.reply("452 these are enough")
        else:
            self.message.recipients.append(address)
            self.reply("250 fine")

    def data(self) -> None:
        if self.message is None or not self.message.recipients:
            self.reply("503 say MAIL and RCPT first")
        else:
            self.receiving = True
            self.reply("354 go ahead, and end it with a dot")

    def content_received(self, line: bytes) -> None:
        message = self.message
        assert message is not None
        if line != b".":
            # A line that begins with a dot was sent with one more (RFC 5321, 4.5.2).
            if len(message.content) <= MAX_MESSAGE:
                message.content += line.removeprefix(b".") + b"\r\n"
            return
        self.receiving = False
        self.message = None
        if len(message.content) > MAX_MESSAGE:
            self.reply("552 that is too much")
        else:
            self.deliver(message)
            self.reply("250 taken")

    # Replies

    def reply(self, *lines: str) -> None:
        self.transport.write("".join(f"{line}\r\n" for line in lines).encode())

    def leave(self, line: str) -> None:
        self.reply(line)
        self.transport.close()


def offers_of(offers: list[str]) -> list[str]:
    """Lines of a reply: all but the last have a dash."""
    return [f"250-{offer}" for offer in offers[:-1]] + [f"250 {offers[-1]}"]


def path_of(rest: str, keyword: str) -> str | None:
    """The address in `FROM:<address> SIZE=1000`; empty for the sender of a bounce, `None` if it is missing."""
    if not rest.upper().startswith(keyword):
        return None
    path, end, _ = rest[len(keyword) :].strip().partition(">")
    return path[1:] if end and path.startswith("<") else None


def size_of(rest: str) -> int:
    """What is announced in `FROM:<address> SIZE=1000` (RFC 1870), or 0."""
    for parameter in rest.upper().split():
        name, _, value = parameter.partition("=")
        if name == "SIZE" and value.isdecimal() and len(value) <= 20:
            return int(value)
    return 0


def show(message: Message) -> None:
    print(f"from {message.sender} to {' '.join(message.recipients)}: {len(message.content)} bytes", flush=True)


async def main(host: str, port: int, certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with TransportGroup() as group:
        server = await group.create_server(lambda: Mail(show, context), host, port)
        for sock in server.sockets:
            print(f"taking mail on {sock.getsockname()}; Ctrl-C ends it", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    parser = _backend.make_parser("Take mail over SMTP with STARTTLS.")
    parser.add_argument("--certificate", required=True, help="file with the certificate chain and its private key")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.certificate)
