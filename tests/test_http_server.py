"""The HTTP server of the examples: real clients, and bare sockets for invalid requests."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import h11
import pytest
from support import GUARD, HOST, SMALL, Peer, Stack, collect_contexts, until

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import http_server
from http_server import BLOCK, HTTP, Response, application

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("the protocol asks for its group, which asyncio does not have"),
]

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = ("Transfer-Encoding", "chunked")


@asynccontextmanager
async def visiting(
    group: Any, answer: Any = application, *, receive_buffer: int | None = None, idle_timeout: float = 3600
) -> AsyncIterator[tuple[Peer, list[HTTP]]]:
    """Yield a bare socket connected to the server, and the list of the server's protocols."""
    made: list[HTTP] = []

    def factory() -> HTTP:
        made.append(HTTP(answer, idle_timeout))
        return made[-1]

    server = await group.create_server(factory, HOST, 0)
    with Peer.connect(server.sockets[0].getsockname(), receive_buffer=receive_buffer) as peer:
        await until(lambda: made)
        yield peer, made


class Client:
    """Reads responses with h11."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.http = h11.Connection(h11.CLIENT)

    async def ask(self, method: str, target: str, *headers: tuple[str, str], body: bytes = b"") -> tuple[Any, bytes]:
        if self.http.our_state is h11.DONE:
            self.http.start_next_cycle()
        await self.send(h11.Request(method=method, target=target, headers=[("Host", "x"), *headers]))
        if body:
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())
        return await self.response()

    async def send(self, event: h11.Event) -> None:
        await self.peer.send(self.http.send(event) or b"")

    async def event(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.peer.receive())
        return event

    async def response(self) -> tuple[Any, bytes]:
        head = await self.event()
        body = b""
        while isinstance(event := await self.event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        return head, body


def header(head: Any, name: bytes) -> bytes | None:
    found: bytes | None = dict(head.headers).get(name)
    return found


async def until_end(peer: Peer) -> bytes:
    with anyio.fail_after(GUARD):
        return await peer.receive_all()


async def test_several_requests_on_one_connection(stack: Stack) -> None:
    async with stack.open() as group, visiting(group) as (peer, made):
        client = Client(peer)
        for size in (0, 1, 100_000):
            head, body = await client.ask("GET", f"/bytes/{size}")
            assert (head.status_code, header(head, b"content-length")) == (200, str(size).encode())
            assert body == (BLOCK * 2)[:size]
            head, body = await client.ask("GET", f"/stream/{size}")
            assert (head.status_code, header(head, b"transfer-encoding")) == (200, b"chunked")
            assert body == (BLOCK * 2)[:size]
        head, body = await client.ask("GET", "/nowhere")
        assert head.status_code == 404
        head, body = await client.ask("DELETE", "/")
        assert head.status_code == 405
        assert len(made) == 1


async def test_head_has_the_headers_and_no_body(stack: Stack) -> None:
    async with stack.open() as group, visiting(group) as (peer, _):
        client = Client(peer)
        for _ in range(2):
            head, body = await client.ask("HEAD", "/bytes/1000000")
            assert (head.status_code, header(head, b"content-length"), body) == (200, b"1000000", b"")


async def test_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    """They wait while one request is answered: h11 holds the bytes that came with it, the kernel the rest."""
    sizes = [300_000, 1, 100_000, 2] * 25
    requests = b"".join(b"GET /bytes/%d HTTP/1.1\r\nHost: x\r\n\r\n" % size for size in sizes)
    async with stack.open() as group, visiting(group) as (peer, made):
        await peer.send(requests)
        peer.shutdown()  # A client that has asked everything may say so.
        reader = h11.Connection(h11.CLIENT)
        received = await until_end(peer)
        assert made[0].transport.is_closing()
        for size in sizes:
            reader.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
            reader.send(h11.EndOfMessage())
            reader.receive_data(received)
            received = b""
            body = b""
            while not isinstance(event := reader.next_event(), h11.EndOfMessage):
                assert isinstance(event, (h11.Response, h11.Data))
                body += event.data if isinstance(event, h11.Data) else b""
            assert len(body) == size
            reader.start_next_cycle()
        assert reader.trailing_data[0] == b""


async def test_a_client_is_not_read_while_its_request_is_answered(stack: Stack) -> None:
    async with stack.open() as group, visiting(group, receive_buffer=SMALL) as (peer, made):
        await peer.send(b"GET /bytes/100000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: made[0].paused)
        assert not made[0].transport.is_reading()
        await peer.send(GET * 10)
        body = made[0].body
        assert body is not None
        # Only as much as fits into the buffers was taken from the generator.
        assert made[0].transport.get_write_buffer_size() <= 64 * 1024 + len(BLOCK) + 1000
        left = sum(map(len, body))
        assert left > 50_000_000
        made[0].transport.abort()
        assert await peer.gone()


async def test_a_big_download_to_a_slow_reader(stack: Stack) -> None:
    async with stack.open() as group, visiting(group, receive_buffer=SMALL) as (peer, made):
        size = 8_000_000
        await peer.send(b"GET /stream/%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % size)
        await until(lambda: made[0].paused)
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method="GET", target="/", headers=[("Host", "x"), ("Connection", "close")]))
        reader.send(h11.EndOfMessage())
        digest, peak = hashlib.sha256(), 0
        with anyio.fail_after(GUARD):
            while not isinstance(event := reader.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    reader.receive_data(await peer.receive(65536))
                    peak = max(peak, made[0].transport.get_write_buffer_size())
                elif isinstance(event, h11.Data):
                    digest.update(event.data)
        assert digest.digest() == hashlib.sha256((BLOCK * (size // len(BLOCK) + 1))[:size]).digest()
        assert peak <= 64 * 1024 + len(BLOCK) + 1000
        assert await peer.receive() == b""


async def test_a_fast_reader_does_not_delay_other_clients(stack: Stack) -> None:
    """A long body is sent over many iterations, so that another client is answered in between."""
    async with stack.open() as group, visiting(group) as (greedy, made):
        await greedy.send(b"GET /bytes/40000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        done: list[int] = []

        async def drain() -> None:
            done.append(len(await greedy.receive_all()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain)
            address = made[0].transport.get_extra_info("sockname")
            with Peer.connect(address) as other:
                head, _ = await Client(other).ask("GET", "/")
                assert head.status_code == 200
                assert not done
        assert done[0] > 40_000_000


async def test_a_chunked_upload(stack: Stack) -> None:
    """Piece by piece: no more than one receive is ever held."""
    block, count = bytes(range(250)) * 4000, 20
    async with stack.open() as group, visiting(group) as (peer, made):
        client = Client(peer)
        await client.send(h11.Request(method="POST", target="/digest", headers=[("Host", "x"), CHUNKED]))
        for _ in range(count):
            await client.send(h11.Data(data=block))
            assert len(made[0].http.trailing_data[0]) <= 256 * 1024
        await client.send(h11.EndOfMessage())
        head, body = await client.response()
        assert head.status_code == 200
        assert body == f"{len(block) * count} {hashlib.sha256(block * count).hexdigest()}\n".encode()
        head, body = await client.ask("GET", "/bytes/3")  # The connection lives on.
        assert body == BLOCK[:3]


async def test_expect_100_continue(stack: Stack) -> None:
    async with stack.open() as group, visiting(group) as (peer, _):
        client = Client(peer)
        headers = [("Host", "x"), ("Content-Length", "3"), ("Expect", "100-continue")]
        await client.send(h11.Request(method="PUT", target="/digest", headers=headers))
        go_on = await client.event()
        assert (type(go_on), go_on.status_code) == (h11.InformationalResponse, 100)
        await client.send(h11.Data(data=b"abc"))
        await client.send(h11.EndOfMessage())
        head, body = await client.response()
        assert (head.status_code, body.split()[0]) == (200, b"3")


async def test_an_unwanted_body_of_a_client_that_expects_100_continue(stack: Stack) -> None:
    """The answer comes at once and the connection ends, because the client may or may not send the body."""
    async with stack.open() as group, visiting(group) as (peer, _):
        client = Client(peer)
        headers = [("Host", "x"), ("Content-Length", "1000000"), ("Expect", "100-continue")]
        await client.send(h11.Request(method="PUT", target="/nowhere", headers=headers))
        head, _ = await client.response()
        assert (head.status_code, header(head, b"connection")) == (405, b"close")
        await peer.send(bytes(1_000_000))  # It is taken, and thrown away.
        peer.shutdown()
        assert await until_end(peer) == b""


async def test_an_unwanted_body_is_discarded(stack: Stack) -> None:
    async with stack.open() as group, visiting(group) as (peer, _):
        client = Client(peer)
        head, _ = await client.ask("POST", "/nowhere", ("Content-Length", "500000"), body=bytes(500_000))
        assert head.status_code == 405
        head, _ = await client.ask("GET", "/")
        assert head.status_code == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000, 431),
        (b"PUT /digest HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n", 400),
        (b"PUT /digest HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
    ids=["nonsense", "no host", "too large", "bad chunk", "bad coding"],
)
async def test_malformed_requests(stack: Stack, request_: bytes, status: int) -> None:
    """It is answered and ends the connection, and the answer is not lost in a reset."""
    async with stack.open() as group, visiting(group) as (peer, _):
        await peer.send(request_)
        answer = await until_end(peer)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in answer.lower()


async def test_a_malformed_target(stack: Stack) -> None:
    """It is the client's mistake, not a failure of the server; the next request is answered."""
    async with stack.open() as group, visiting(group) as (peer, _):
        contexts = collect_contexts(group)
        client = Client(peer)
        head, body = await client.ask("GET", "//[")
        assert (head.status_code, body[:4]) == (400, b"400 ")
        assert contexts == []
        head, _ = await client.ask("GET", "/")
        assert head.status_code == 200


async def test_an_end_in_the_middle_of_a_request(stack: Stack) -> None:
    async with stack.open() as group, visiting(group) as (peer, _):
        await peer.send(b"PUT /digest HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
        peer.shutdown()
        assert (await until_end(peer)).startswith(b"HTTP/1.1 400 ")


async def test_connection_close_and_http_1_0(stack: Stack) -> None:
    for request in (GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), b"GET / HTTP/1.0\r\n\r\n"):
        async with stack.open() as group, visiting(group) as (peer, _):
            await peer.send(request + GET)  # What comes after it is not answered.
            answer = await until_end(peer)
            assert answer.count(b"HTTP/1.1 200") == 1
            assert b"connection: close" in answer.lower()


async def test_a_client_that_does_not_leave(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "LINGER", 0.01)
    async with stack.open() as group, visiting(group) as (peer, made):
        await peer.send(b"GET / HTTP/1.0\r\n\r\n")
        assert (await until_end(peer)).startswith(b"HTTP/1.1 200")
        await until(made[0].transport.is_closing)


async def test_a_silent_client(stack: Stack) -> None:
    async with stack.open() as group, visiting(group, idle_timeout=0.02) as (peer, _):
        assert await until_end(peer) == b""
    async with stack.open() as group, visiting(group) as (peer, made):
        await peer.send(GET[:10])
        await until(lambda: made[0].http.trailing_data[0])
        group.call_soon(made[0].expect_within, 0)
        assert (await until_end(peer)).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_does_not_read(stack: Stack) -> None:
    async with stack.open() as group, visiting(group, receive_buffer=SMALL, idle_timeout=0.05) as (peer, made):
        await peer.send(b"GET /bytes/1000000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: made and made[0].transport.is_closing())
        assert await peer.gone()
        await until(lambda: made[0].body is None)


async def test_an_application_that_raises(stack: Stack) -> None:
    def fails(request: h11.Request) -> Response:
        raise ZeroDivisionError

    def breaks_off(request: h11.Request) -> Response:
        def body() -> Iterator[bytes]:
            yield b"only so much"
            raise ZeroDivisionError

        return Response(200, [], body())

    async with stack.open() as group:
        contexts = collect_contexts(group)
        async with visiting(group, fails) as (peer, _):
            client = Client(peer)
            for _ in range(2):
                head, _ = await client.ask("GET", "/")
                assert head.status_code == 500
        async with visiting(group, breaks_off) as (peer, _):
            await peer.send(GET)
            # The client sees that the body is not complete: the last chunk is missing.
            assert (await until_end(peer)).endswith(b"only so much\r\n")
        assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError] * 3


async def test_the_client_of_the_standard_library(stack: Stack) -> None:
    def visit(port: int) -> None:
        connection = http.client.HTTPConnection(HOST, port, timeout=GUARD)
        try:
            for _ in range(3):
                connection.request("GET", "/stream/200000")
                response = connection.getresponse()
                assert (response.status, len(response.read())) == (200, 200_000)
                connection.request("HEAD", "/bytes/200000")
                response = connection.getresponse()
                assert (response.getheader("Content-Length"), response.read()) == ("200000", b"")
                body = (bytes(10_000) for _ in range(300))
                connection.request("POST", "/digest", body, encode_chunked=True)
                expected = f"3000000 {hashlib.sha256(bytes(3_000_000)).hexdigest()}\n"
                assert connection.getresponse().read().decode() == expected
        finally:
            connection.close()

    async with stack.open() as group, visiting(group) as (_, made):
        port = made[0].transport.get_extra_info("sockname")[1]
        await anyio.to_thread.run_sync(visit, port)
        assert len(made) == 2  # Ours, and theirs for all.


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl(stack: Stack, tmp_path: Path) -> None:
    data = BLOCK * 40
    (tmp_path / "data").write_bytes(data)
    async with stack.open() as group, visiting(group) as (_, made):
        url = f"http://{HOST}:{made[0].transport.get_extra_info('sockname')[1]}"

        async def curl(*arguments: str) -> bytes:
            with anyio.fail_after(4 * GUARD):
                return (await anyio.run_process(["curl", "-sS", "--noproxy", "*", *arguments], stderr=None)).stdout

        assert b"It works" in await curl(url)
        assert await curl(f"{url}/stream/1000000") == (BLOCK * 16)[:1_000_000]
        before = len(made)
        expected = f"{len(data)} {hashlib.sha256(data).hexdigest()}\n".encode()
        upload = ["-H", "Transfer-Encoding: chunked", "-H", "Expect: 100-continue", "--data-binary"]
        # Twice, on one connection.
        assert await curl(*upload, f"@{tmp_path / 'data'}", f"{url}/digest", f"{url}/digest") == expected * 2
        assert len(made) == before + 1
        assert (await curl("-I", f"{url}/bytes/5")).startswith(b"HTTP/1.1 200 OK\r\n")
