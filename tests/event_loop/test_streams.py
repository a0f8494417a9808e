"""asyncio's streams, servers, TLS, files and pipes over the transports of this package."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from network import needs_pipes, needs_unix
from support import pattern

HOST = "127.0.0.1"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


@asynccontextmanager
async def serving(handle: Any, **options: Any) -> AsyncIterator[Any]:
    """Serve over TCP, and yield the address."""
    server = await asyncio.start_server(handle, HOST, 0, **options)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        await server.wait_closed()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    await closed(writer)


async def echo_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    await closed(writer)


@pytest.fixture
def contexts(certificate_authority):
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate_authority.issue_cert("localhost").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    certificate_authority.configure_trust(client)
    return server, client


def test_lines_there_and_back(run):
    async def main() -> None:
        async with serving(echo_lines) as address:
            reader, writer = await asyncio.open_connection(*address)
            for number in range(10):
                writer.write(f"line {number}\n".encode())
                await writer.drain()
                assert await reader.readline() == f"line {number}\n".encode()
            writer.writelines([b"one ", b"two\n", b"three"])
            assert await reader.readuntil() == b"one two\n"
            writer.write_eof()
            assert await reader.readexactly(5) == b"three"
            assert await reader.read() == b""
            assert reader.at_eof()
            await closed(writer)

    run(main)


def test_much_data_there_and_back(run):
    async def main() -> None:
        data = pattern(5_000_000)
        async with serving(echo) as address:
            reader, writer = await asyncio.open_connection(*address, limit=1 << 14)

            async def send() -> None:
                for start in range(0, len(data), 100_000):
                    writer.write(data[start : start + 100_000])
                    await writer.drain()
                writer.write_eof()

            sending = asyncio.create_task(send())
            assert await reader.read() == data
            await sending
            await closed(writer)

    run(main)


def test_many_connections(run):
    async def main() -> None:
        async with serving(echo_lines) as address:

            async def talk(number: int) -> None:
                reader, writer = await asyncio.open_connection(*address)
                for _ in range(20):
                    writer.write(f"{number}\n".encode())
                    assert await reader.readline() == f"{number}\n".encode()
                await closed(writer)

            await asyncio.gather(*map(talk, range(50)))

    run(main)


def test_extra_information_of_a_stream(run):
    async def main() -> None:
        seen = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            seen.set_result((writer.get_extra_info("sockname"), writer.get_extra_info("peername")))
            await closed(writer)

        async with serving(handle) as address:
            reader, writer = await asyncio.open_connection(*address)
            assert await seen == (address, writer.get_extra_info("sockname"))
            assert writer.get_extra_info("peername") == address
            assert await reader.read() == b""
            await closed(writer)

    run(main)


def test_the_peer_resets_a_stream(run):
    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            # Whatever has been read: a reset, and not an end.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        async with serving(handle) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"line\n")
            with pytest.raises(ConnectionResetError):
                await reader.read()
            await closed(writer)

    run(main)


def test_nobody_listens(run):
    async def main() -> None:
        async with serving(echo) as address:
            pass
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)

    run(main)


def test_a_read_that_times_out(run):
    async def main() -> None:
        async with serving(echo) as address:
            reader, writer = await asyncio.open_connection(*address)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reader.readline(), 0.01)
            writer.write(b"line\n")
            assert await reader.readline() == b"line\n"
            await closed(writer)

    run(main)


def test_a_handler_that_fails_is_reported(run):
    if sys.version_info < (3, 12):
        pytest.skip("asyncio reports it since Python 3.12")

    async def main() -> None:
        reported = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.set_result(context))

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raise ZeroDivisionError

        async with serving(handle) as address:
            reader, writer = await asyncio.open_connection(*address)
            context = await reported
            assert isinstance(context["exception"], ZeroDivisionError)
            assert await reader.read() == b""
            await closed(writer)

    run(main)


def test_a_socket_that_was_accepted_elsewhere(run):
    async def main():
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            accepted, _ = listener.accept()
        received = asyncio.StreamReader()
        transport, _ = await loop.connect_accepted_socket(lambda: asyncio.StreamReaderProtocol(received), accepted)
        writer.write(b"hello")
        assert await received.readexactly(5) == b"hello"
        transport.write(b"goodbye")
        transport.close()
        assert await reader.read() == b"goodbye"
        writer.close()
        await writer.wait_closed()

    run(main)


def test_a_protocol_factory_that_is_a_coroutine_function(run):
    """The error says what asyncio code calls instead. asyncio fails later, when it uses the protocol."""

    async def factory():
        return asyncio.Protocol()

    async def main():
        loop = asyncio.get_running_loop()
        with pytest.raises(TypeError, match=re.escape("asyncio.create_task()")):
            await loop.create_connection(factory, "127.0.0.1", 1)  # type: ignore[type-var]

    if run.name == "trio":
        run(main)


def test_a_server_that_is_asked_to_end(run):
    async def main() -> None:
        server = await asyncio.start_server(echo, HOST, 0)
        assert server.get_loop() is asyncio.get_running_loop()
        assert server.is_serving()
        serving = asyncio.create_task(server.serve_forever())
        await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.gather(serving, closed(writer))
        assert not server.is_serving()

    run(main)


def test_streams_over_tls(run, contexts):
    server, client = contexts

    async def main() -> None:
        data = pattern(1_000_000)
        async with serving(echo, ssl=server) as address:
            reader, writer = await asyncio.open_connection(*address, ssl=client, server_hostname="localhost")
            assert isinstance(writer.get_extra_info("ssl_object"), (ssl.SSLObject, ssl.SSLSocket))
            assert writer.get_extra_info("peercert")["subjectAltName"] == (("DNS", "localhost"),)
            sending = asyncio.create_task(drained(writer, data))
            assert await reader.readexactly(len(data)) == data
            await sending
            await closed(writer)

    async def drained(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    run(main)


async def last_words(address: Any, context: ssl.SSLContext, data: bytes) -> None:
    """Connect over TLS, receive a line, and send `data` and `close_notify` in one piece. Wait for the other end's."""
    loop = asyncio.get_running_loop()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)

        async def attempt(call: Any, *args: Any) -> Any:
            while True:
                try:
                    return call(*args)
                except ssl.SSLWantReadError:
                    await loop.sock_sendall(sock, outgoing.read())
                    received = await loop.sock_recv(sock, 65536)
                    incoming.write(received)
                    if not received:
                        incoming.write_eof()

        await attempt(tls.do_handshake)
        assert await attempt(tls.read, 100) == b"ready\n"
        tls.write(data)
        await attempt(tls.unwrap)


@pytest.mark.parametrize("size", [-1, 4096], ids=["read to the end", "read once"])
def test_drain_after_the_last_words_of_a_tls_peer(run, contexts, size):
    """The connection is closing, so the answer is dropped, but `drain` does not raise before `connection_lost`."""
    if sys.version_info < (3, 11) and run.name not in ("trio", "uvloop"):
        pytest.skip("asyncio of Python 3.10: another implementation of TLS, which ends without close_notify")
    server, client = contexts

    async def main() -> None:
        outcome = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                writer.write(b"ready\n")
                data = await reader.read(size)
                writer.write(b"answer")
                await writer.drain()
                data += await reader.read()
                writer.close()
                await writer.wait_closed()
                outcome.set_result(data)
            except BaseException as exc:
                outcome.set_exception(exc)

        async with serving(handle, ssl=server) as address:
            await last_words(address, client, b"last words")
            assert await outcome == b"last words"

    run(main)


def test_a_certificate_that_is_not_trusted(run, contexts):
    server, _ = contexts

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # The server's end may complain.
        async with serving(echo, ssl=server) as address:
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection(
                    *address, ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), server_hostname="localhost"
                )

    run(main)


def test_start_tls_from_both_sides(run, contexts):
    if not hasattr(asyncio.StreamWriter, "start_tls"):
        pytest.skip("of Python 3.11")
    server, client = contexts

    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"STARTTLS\n"
            writer.write(b"220 go ahead\n")
            await writer.start_tls(server)
            await echo_lines(reader, writer)

        async with serving(handle) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"220 go ahead\n"
            await writer.start_tls(client, server_hostname="localhost")
            assert writer.get_extra_info("peercert")
            for number in range(3):
                writer.write(f"secret {number}\n".encode())
                await writer.drain()
                assert await reader.readline() == f"secret {number}\n".encode()
            await closed(writer)

    run(main)


def test_many_upgrades_to_tls_at_once(run, contexts):
    if not hasattr(asyncio.StreamWriter, "start_tls"):
        pytest.skip("of Python 3.11")
    server, client = contexts

    async def main() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(b"go\n")
            await writer.start_tls(server)
            await echo_lines(reader, writer)

        async def talk(address: Any) -> None:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"please\n")
            assert await reader.readline() == b"go\n"
            await writer.start_tls(client, server_hostname="localhost")
            writer.write(b"secret\n")
            assert await reader.readline() == b"secret\n"
            await closed(writer)

        async with serving(handle) as address:
            await asyncio.gather(*(talk(address) for _ in range(30)))

    run(main)


@needs_unix
def test_unix_streams(run, tmp_path):
    async def main() -> None:
        path = str(tmp_path / "socket")
        server = await asyncio.start_unix_server(echo_lines, path)
        async with server:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"line\n")
            assert await reader.readline() == b"line\n"
            assert writer.get_extra_info("peername") == path
            await closed(writer)
        with pytest.raises(OSError):
            await asyncio.open_unix_connection(path + " that is not there")

    run(main)


@needs_unix
def test_unix_streams_over_tls(run, contexts, tmp_path):
    server_context, client = contexts

    async def main() -> None:
        path = str(tmp_path / "socket")
        async with await asyncio.start_unix_server(echo_lines, path, ssl=server_context):
            reader, writer = await asyncio.open_unix_connection(path, ssl=client, server_hostname="localhost")
            writer.write(b"line\n")
            assert await reader.readline() == b"line\n"
            await closed(writer)

    run(main)


@needs_pipes
def test_pipes(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        reader = asyncio.StreamReader()
        reading, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), open(read_end, "rb", buffering=0)
        )
        lost = loop.create_future()

        class Writing(asyncio.streams.FlowControlMixin):  # type: ignore[name-defined,misc]
            def connection_lost(self, exc: BaseException | None) -> None:
                super().connection_lost(exc)
                lost.set_result(exc)

        writing, protocol = await loop.connect_write_pipe(Writing, open(write_end, "wb", buffering=0))
        data = pattern(1_000_000)

        async def write() -> None:
            for start in range(0, len(data), 10_000):
                writing.write(data[start : start + 10_000])
                await protocol._drain_helper()
            writing.close()

        task = asyncio.create_task(write())
        assert await reader.read() == data
        await task
        assert await lost is None
        reading.close()

    run(main)


@needs_pipes
@pytest.mark.needs_polling("only a write shows that the reader has gone")
def test_a_pipe_whose_reader_goes_away(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        read_end, write_end = os.pipe()
        lost = loop.create_future()

        class Writing(asyncio.Protocol):
            def connection_lost(self, exc: BaseException | None) -> None:
                lost.set_result(exc)

        transport, _ = await loop.connect_write_pipe(Writing, open(write_end, "wb", buffering=0))
        os.close(read_end)
        assert await lost is None or isinstance(lost.result(), BrokenPipeError)
        transport.close()

    run(main)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
def test_send_a_file_through_the_event_loop(run, contexts, encrypted, tmp_path):
    if run.is_uvloop:
        pytest.skip("uvloop cannot send files")
    server, client = contexts
    data = pattern(2_000_000)
    path = tmp_path / "file"
    path.write_bytes(data)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"head\n")
            with path.open("rb") as file:
                assert await loop.sendfile(writer.transport, file, 7) == len(data) - 7
            writer.write(b"tail")
            await closed(writer)

        async with serving(handle, ssl=server if encrypted else None) as address:
            options = {"ssl": client, "server_hostname": "localhost"} if encrypted else {}
            reader, writer = await asyncio.open_connection(*address, **options)
            assert await reader.readline() == b"head\n"
            assert await reader.readexactly(len(data) - 7) == data[7:]
            assert await reader.read() == b"tail"
            await closed(writer)

    run(main)


def test_datagram_endpoints(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()

        class Server(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, address: Any) -> None:
                self.transport.sendto(data.upper(), address)

        class Client(asyncio.DatagramProtocol):
            def __init__(self) -> None:
                self.received = asyncio.Queue[bytes]()

            def datagram_received(self, data: bytes, address: Any) -> None:
                self.received.put_nowait(data)

        server, _ = await loop.create_datagram_endpoint(Server, local_addr=(HOST, 0))
        client, protocol = await loop.create_datagram_endpoint(Client, remote_addr=server.get_extra_info("sockname"))
        for word in (b"one", b"two"):
            client.sendto(word)
            assert await protocol.received.get() == word.upper()
        client.close()
        server.close()
        await asyncio.sleep(0)

    run(main)


@pytest.mark.differs(
    "`open_event_loop`: servers and connections when the block is left",
    asyncio="left open",
    here="closed, with `connection_lost`",
    why="as in a group",
)
def test_a_server_and_its_connections_at_the_end_of_the_event_loop(run):
    """The event loop closes what is left open."""
    if not run.name == "trio":
        pytest.skip("asyncio leaves it open, and warns")
    lost = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        class Left(asyncio.Protocol):
            def connection_lost(self, exc: BaseException | None) -> None:
                assert asyncio.get_running_loop() is loop
                lost.append(exc)

        server = await loop.create_server(Left, HOST, 0)
        await loop.create_connection(Left, *server.sockets[0].getsockname())
        await asyncio.sleep(0.01)

    run(main)
    assert lost == [None, None]


@pytest.mark.parametrize("debug", [False, True])
def test_failed_handshake_of_a_client_is_reported_in_debug_mode_only(run, contexts, debug):
    if run.is_uvloop and debug:
        pytest.skip("uvloop does not report it in debug mode either")
    reports = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        async with serving(echo, ssl=contexts[0]) as address:
            with contextlib.suppress(ConnectionError):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                await reader.read()
                await closed(writer)
            for _ in range(10):
                await asyncio.sleep(0)

    run(main, debug=debug)
    assert [type(report["exception"]) for report in reports] == ([ssl.SSLError] if debug else [])


@pytest.mark.parametrize("timeout", [0.1, 3600])
def test_a_server_of_ours_shuts_down_in_order(run, timeout):
    """What asyncio's servers do not have."""
    if run.name != "trio":
        pytest.skip("the server is not ours")

    async def main():
        server = await asyncio.start_server(echo, HOST, 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        await asyncio.wait_for(server.shutdown(timeout), 10)
        assert await reader.read() == b""
        await closed(writer)

    run(main)
