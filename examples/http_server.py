"""An HTTP/1.1 server on h11, which implements the protocol and does no I/O.

    python examples/http_server.py --backend trio

Then open http://127.0.0.1:8888/ in a browser, or

    curl http://127.0.0.1:8888/bytes/1000000 | wc -c
    curl --data-binary @some_file http://127.0.0.1:8888/digest

Connections are kept alive, requests may be pipelined, bodies may be chunked both ways. Memory stays bounded: the server
takes a body from its generator only as fast as the client reads it, and does not read from a client while it answers
one of its requests.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

import _backend
import h11

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup, current_group

#: Bytes of a body that are sent before other connections are served, however fast the client reads.
BYTES_AT_ONCE = 256 * 1024
#: Seconds that a client has to read its last response and close, once we have announced the end.
LINGER = 2.0

Headers: TypeAlias = "list[tuple[str, str]]"


@dataclass
class Response:
    """What a request is answered with. A body without a `Content-Length` is sent in chunks."""

    status: int = 200
    headers: Headers = field(default_factory=list)
    body: Iterable[bytes] = ()

    @classmethod
    def text(cls, text: str, status: int = 200, kind: str = "text/plain") -> Response:
        body = text.encode()
        return cls(status, [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))], [body])

    @classmethod
    def error(cls, status: int, reason: str = "") -> Response:
        return cls.text(f"{status} {HTTPStatus(status).phrase}{': ' * bool(reason)}{reason}\n", status)


class Upload(ABC):
    """Takes the body of a request, piece by piece."""

    @abstractmethod
    def body_received(self, data: bytes) -> None:
        """Take the next piece."""

    @abstractmethod
    def respond(self) -> Response:
        """The body is complete: answer."""


#: Answers a request at once, or says who takes its body first.
Application: TypeAlias = "Callable[[h11.Request], Response | Upload]"


AnswerT = TypeVar("AnswerT", bound="Response | Upload")


class HTTP(Protocol):
    """One connection. It reads a request, answers it, then reads the next one; h11 holds the state."""

    transport: Transport

    def __init__(self, application: Application, idle_timeout: float = 60) -> None:
        self.application = application
        self.idle_timeout = idle_timeout
        self.http = h11.Connection(h11.SERVER)
        self.answer: Response | Upload = Response.error(500)
        self.is_head = False
        self.body: Iterator[bytes] | None = None  # Of the response that is being sent.
        self.paused = False
        self.leaving = False  # No more requests are answered; further data is dropped.
        self.ended = False  # The client sends no more.
        self.timer: Any = None

    # Callbacks of the transport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport
        self.expect_within(self.idle_timeout)

    def data_received(self, data: bytes) -> None:
        if not self.leaving:
            self.http.receive_data(data)
            self.advance()

    def eof_received(self) -> bool:
        self.ended = True
        if self.leaving:
            return False  # Close, once the last response has been sent.
        self.http.receive_data(b"")
        self.advance()
        return True

    def pause_writing(self) -> None:
        self.paused = True
        self.expect_within(self.idle_timeout)

    def resume_writing(self) -> None:
        self.paused = False
        if self.body is None:
            self.expect_within(self.idle_timeout)
        else:
            self.expect_nothing()
        self.go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self.expect_nothing()
        self.leaving = True
        self.body = None

    # Time. One timer: for the next request, for more of a body, or for the client to read.

    def expect_within(self, seconds: float) -> None:
        self.expect_nothing()
        self.timer = current_group().call_later(seconds, self.expired)

    def expect_nothing(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def expired(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # The client does not read.
        elif self.leaving or (self.http.their_state is h11.IDLE and not self.http.trailing_data[0]):
            self.transport.close()
        else:
            self.refuse(408)

    # Requests

    def advance(self) -> None:
        """Handle what has been received, until more is needed or a response is on its way."""
        while self.body is None and not self.leaving:
            try:
                event = self.http.next_event()
            except h11.RemoteProtocolError as exc:
                self.refuse(exc.error_status_hint, str(exc))
                return
            if event is h11.NEED_DATA:
                self.transport.resume_reading()
                return
            if isinstance(event, h11.Request):
                self.request_received(event)
            elif isinstance(event, h11.Data):
                self.expect_within(self.idle_timeout)
                if isinstance(self.answer, Upload):
                    self.answer.body_received(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self.expect_nothing()
                self.respond(self.ask(self.answer.respond) if isinstance(self.answer, Upload) else self.answer)
            elif isinstance(event, h11.ConnectionClosed):
                self.transport.close()
                return

    def request_received(self, request: h11.Request) -> None:
        self.is_head = request.method == b"HEAD"
        self.answer = self.ask(self.application, request)
        if self.http.they_are_waiting_for_100_continue:
            if isinstance(self.answer, Upload):
                self.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            else:
                # The application does not want the body. The client may send it nevertheless (RFC 9110, 10.1.1), and
                # then nothing would show where the next request begins.
                self.respond(self.answer, [("Connection", "close")])

    def ask(self, function: Callable[..., AnswerT], *args: object) -> AnswerT | Response:
        """Call the application. If it raises, report the error and answer with status 500."""
        try:
            return function(*args)
        except Exception as exc:
            current_group().call_exception_handler({"message": "the application has failed", "exception": exc})
            return Response.error(500)

    def refuse(self, status: int, reason: str = "") -> None:
        """Answer with an error and close, because the data after it cannot be parsed."""
        self.expect_nothing()
        if self.http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.respond(Response.error(status, reason), [("Connection", "close")])
        else:
            self.leave()

    # Responses

    def respond(self, response: Response, more_headers: Iterable[tuple[str, str]] = ()) -> None:
        self.transport.pause_reading()
        headers = [("Date", formatdate(usegmt=True)), *response.headers, *more_headers]
        reason = HTTPStatus(response.status).phrase
        self.send(h11.Response(status_code=response.status, headers=headers, reason=reason.encode()))
        self.body = iter(() if self.is_head else response.body)
        self.send_body()

    def send(self, event: h11.Event) -> None:
        data = self.http.send(event)
        if data:
            self.transport.write(data)

    def send_body(self) -> None:
        """Send what the client reads now; `resume_writing` or the next event loop iteration continues."""
        sent = 0
        while self.body is not None and not self.paused:
            if sent >= BYTES_AT_ONCE:
                current_group().call_soon(self.go_on)
                return
            data = next(self.body, None)
            if data is not None:
                self.send(h11.Data(data=data))
                sent += len(data)
            else:
                self.body = None
                self.send(h11.EndOfMessage())
                self.response_sent()

    def go_on(self) -> None:
        self.send_body()
        self.advance()

    def response_sent(self) -> None:
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
            self.expect_within(self.idle_timeout)
        else:
            self.leave()

    def leave(self) -> None:
        """Send an end of file, and wait a while for the client's.

        Closing at once while data is unread would reset the connection, and the client could lose the rest of our
        response (RFC 9112, 9.6).
        """
        self.leaving = True
        self.body = None
        if self.ended or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self.expect_within(self.idle_timeout if self.transport.get_write_buffer_size() else LINGER)


# An application

BLOCK = bytes(range(256)) * 256
PAGE = """<!doctype html>
<title>transports_anyio</title>
<h1>It works</h1>
<p>This is one protocol, on asyncio, uvloop or trio. <a href="/bytes/1000000">A million bytes</a>,
<a href="/stream/1000000">a million bytes in chunks</a>.
"""


class Digest(Upload):
    """Answers with the size and the SHA-256 of the upload."""

    def __init__(self) -> None:
        self.size = 0
        self.digest = hashlib.sha256()

    def body_received(self, data: bytes) -> None:
        self.size += len(data)
        self.digest.update(data)

    def respond(self) -> Response:
        return Response.text(f"{self.size} {self.digest.hexdigest()}\n")


def blocks(size: int) -> Iterator[bytes]:
    """Yield `size` bytes, block by block."""
    for start in range(0, size, len(BLOCK)):
        yield BLOCK[: size - start]


def application(request: h11.Request) -> Response | Upload:
    try:
        path = urlsplit(request.target.decode()).path
    except ValueError as exc:  # `//[`, say.
        return Response.error(400, str(exc))
    method = request.method.decode()
    if path == "/digest":
        return Digest() if method in ("POST", "PUT") else Response.error(405)
    if method not in ("GET", "HEAD"):
        return Response.error(405)
    kind, _, size = path[1:].partition("/")
    if kind in ("bytes", "stream") and size.isdecimal() and len(size) < 15:
        headers = [("Content-Type", "application/octet-stream")]
        if kind == "bytes":
            headers.append(("Content-Length", str(int(size))))
        return Response(200, headers, blocks(int(size)))
    return Response.text(PAGE, kind="text/html") if path == "/" else Response.error(404)


async def main(host: str, port: int, idle_timeout: float) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(lambda: HTTP(application, idle_timeout), host, port)
        for sock in server.sockets:
            name, number = sock.getsockname()[:2]
            print(f"serving on http://{f'[{name}]' if ':' in name else name}:{number}/; Ctrl-C ends it", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    parser = _backend.make_parser("Serve pages, bytes and digests over HTTP.")
    parser.add_argument("--idle-timeout", type=float, default=60, help="seconds that a client may be silent")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.idle_timeout)
