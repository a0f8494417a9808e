"""TLS with other implementations: OpenSSL's own programs, curl, Python's blocking `ssl`, asyncio."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import subprocess
import sys
import termios
import threading
from typing import Any

import anyio
import pytest
from support import GUARD, HOST, Recorder, Stack, listening, pattern, until
from tls_support import (
    NAME,
    Certificates,
    Output,
    echo,
    program,
    running,
    serve,
    tls_peer_process,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["1.2", "1.3"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def flag(version: str) -> str:
    return f"-tls{version.replace('.', '_')}"


async def test_openssl_client(stack: Stack, certificates: Certificates, version: str) -> None:
    openssl = program("openssl")
    with certificates.files() as files:
        async with stack.open() as group:
            serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=echo))
            command = [openssl, "s_client", "-connect", f"{HOST}:{serving.port}", "-servername", NAME]
            command += ["-CAfile", files["ca"], "-verify_return_error", "-verify_hostname", NAME, flag(version)]
            async with running(*command) as process:
                output = Output(process)
                assert b"Verify return code: 0 (ok)" in await output.until(b"Verify return code: 0 (ok)", b"errno")
                await output.say(b"hello\n")
                await output.until(b"hello\n")
                await output.say(b"Q\n")
                with anyio.fail_after(GUARD):
                    await process.wait()
            protocol = await serving.protocol()
            await protocol.wait_for("connection_lost")
            assert protocol.exception is None
            serving.server.close()


def unread(transport: Any) -> int:
    """Return the number of bytes that wait in the kernel."""
    count = bytearray(4)
    fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


@pytest.mark.exhaustive
@pytest.mark.parametrize("blocked", ["sending", "receiving"])
async def test_key_updates_while_the_other_direction_is_blocked(
    stack: Stack, certificates: Certificates, blocked: str
) -> None:
    # "k" updates the client's key, "K" also asks for ours.
    openssl = program("openssl")
    # More than the kernel's buffers hold.
    data = b"".join(b"%079d\n" % number for number in range(50_000))
    if stack.is_oracle and blocked == "receiving":
        pytest.skip("asyncio's TLS goes on receiving, up to a limit of its own")
    # Without answers, Nagle's algorithm delays each of the client's lines by half a second, until an ACK comes.
    lines = [b"line %d\n" % number for number in range(20 if blocked == "sending" else 4)]
    async with stack.open() as group:
        serving = await serve(group, certificates.server())
        command = [openssl, "s_client", "-connect", f"{HOST}:{serving.port}", "-tls1_3", "-servername", NAME]
        async with running(*command, stderr=subprocess.PIPE) as process:
            output, news = Output(process), Output(process, process.stderr)
            await output.until(b"Verify return code")
            await output.until(b"---\n")
            protocol = await serving.protocol()
            transport = protocol.transport
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)

            async def talk() -> None:
                taken = 0
                for number, line in enumerate(lines):
                    arrived = unread(transport)
                    await output.say(b"K\n" if number % 2 else b"k\n")
                    await news.until(b"KEYUPDATE\n")
                    # It takes a command only at the start of what it reads, so the line has to be on its way before.
                    await output.say(line)
                    taken += len(line)
                    if blocked == "sending":
                        await protocol.wait_received(taken)
                    else:
                        records = len(line) + 2 * 22  # With the least that two of them add.
                        await until(lambda arrived=arrived, records=records: unread(transport) >= arrived + records)

            async def listen() -> None:
                # Session tickets are printed before the data.
                await output.until(data[:80])
                assert data[:80] + await output.until(data[-80:]) == data

            if blocked == "sending":
                # The client receives no more than it can print, and its output is not read yet.
                transport.write(data)
                await talk()
                # asyncio counts only what it has not encrypted yet.
                assert stack.is_oracle or transport.get_write_buffer_size() > len(data) // 4
                await listen()
            else:
                transport.pause_reading()
                await talk()
                transport.write(data)
                await listen()
                assert not protocol.received
                transport.resume_reading()
                await protocol.wait_received(sum(map(len, lines)))
                # The request for our key has been read by now: the rest is sent with a new key.
                transport.write(b"with a new key\n")
                await output.until(b"with a new key\n")
            assert protocol.received == b"".join(lines)
            assert transport.get_write_buffer_size() == 0
            process.terminate()
            await process.wait()
        await protocol.wait_for("connection_lost")
        serving.server.close()


async def openssl_server(certificates: Certificates, files: dict[str, str], *options: str) -> list[str]:
    return [
        program("openssl"), "s_server", "-accept", f"{HOST}:0", "-cert", files["server"], "-key", files["server"],
        *options,
    ]  # fmt: skip


async def test_openssl_server(stack: Stack, certificates: Certificates, version: str) -> None:
    data = pattern(1_000_000)
    with certificates.files() as files:
        command = await openssl_server(certificates, files, "-naccept", "1", flag(version), "-rev")
        async with running(*command) as process, stack.open() as group:
            output = Output(process)
            port = int((await output.until(b"ACCEPT ")) and (await output.line()).rpartition(":")[2])
            client = Recorder()
            await group.create_connection(lambda: client, HOST, port, ssl=certificates.client(), server_hostname=NAME)
            client.transport.write(b"".join(b"%09d\n" % number for number in range(20_000)))
            await client.wait_received(200_000)
            assert client.received == b"".join((b"%09d" % number)[::-1] + b"\n" for number in range(20_000))
            assert data
            client.transport.close()
            await client.wait_for("connection_lost")
            assert client.exception is None


async def test_renegotiation_asked_for_by_a_server(stack: Stack, certificates: Certificates) -> None:
    # TLS 1.2: the server's "r" makes OpenSSL read before it can write.
    with certificates.files() as files:
        command = await openssl_server(certificates, files, "-naccept", "1", "-tls1_2")
        async with running(*command, stderr=subprocess.DEVNULL) as process, stack.open() as group:
            output = Output(process)
            port = int((await output.until(b"ACCEPT ")) and (await output.line()).rpartition(":")[2])
            client = Recorder()
            transport, _ = await group.create_connection(
                lambda: client, HOST, port, ssl=certificates.client(), server_hostname=NAME
            )
            await output.until(b"Secure Renegotiation IS supported\n")
            for number in range(3):
                await output.say(b"r\n")
                await output.until(b"SSL_do_handshake -> 1\n")
                line = b"line %d\n" % number
                transport.write(line)
                await output.until(line)
                await output.say(line)
                await client.wait_until(lambda line=line: client.received.endswith(line))
            transport.close()
            await client.wait_for("connection_lost")
            assert client.exception is None


async def test_renegotiation_under_a_writer(stack: Stack, certificates: Certificates) -> None:
    # While it goes on OpenSSL refuses to write: what it refused must come once, in order.
    lines = [b"%07d\n" % number * 100 for number in range(3_000)]
    left = lines[::-1]

    def more(protocol: Recorder) -> None:
        while left and not protocol.writing_paused:
            protocol.transport.write(left.pop())

    client = Recorder(on_resume_writing=more)
    with certificates.files() as files:
        command = await openssl_server(certificates, files, "-naccept", "1", "-tls1_2")
        async with running(*command, stderr=subprocess.DEVNULL) as process, stack.open() as group:
            output = Output(process)
            port = int((await output.until(b"ACCEPT ")) and (await output.line()).rpartition(":")[2])
            await group.create_connection(lambda: client, HOST, port, ssl=certificates.client(), server_hostname=NAME)
            transport = client.transport
            transport.set_write_buffer_limits(high=10_000)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            await output.until(b"Secure Renegotiation IS supported\n")
            more(client)
            for _ in range(3):
                await output.say(b"r\n")
                await output.until(b"SSL_do_handshake -> 1\n")
            seen = await output.until(lines[-1])
            assert seen.endswith(b"".join(lines[-100:]))
            transport.abort()
            await client.wait_for("connection_lost")


@pytest.mark.differs(
    "a peer that leaves during a renegotiation, with data to be written",
    asyncio="waits without end",
    here="`connection_lost(ConnectionResetError)`",
    why="the answer can no longer come",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("paused", [False, True], ids=["reading", "paused"])
@pytest.mark.parametrize("over", ["socket", "stream"])
async def test_peer_that_disconnects_in_a_renegotiation_under_a_writer(
    stack: Stack, certificates: Certificates, paused: bool, over: str
) -> None:
    # The message that OpenSSL must read before it can write never comes.
    held_back, written = threading.Event(), threading.Event()

    def relay(listener: socket.socket, port: int, asked: threading.Event) -> None:
        client, _ = listener.accept()
        with client, socket.create_connection((HOST, port)) as server:
            downwards = threading.Thread(target=pump, args=(server, client))
            downwards.start()
            while (data := client.recv(65536)) and not asked.is_set():
                server.sendall(data)
            held_back.set()
            written.wait(GUARD)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while client.recv(65536):
                    pass
            server.shutdown(socket.SHUT_RDWR)
            downwards.join()

    def pump(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)

    protocol, asked = Recorder(), threading.Event()
    with certificates.files() as files, listening() as listener:
        command = await openssl_server(certificates, files, "-naccept", "1", "-tls1_2")
        async with running(*command, stderr=subprocess.DEVNULL) as process, stack.open() as group:
            output = Output(process)
            port = int((await output.until(b"ACCEPT ")) and (await output.line()).rpartition(":")[2])
            relaying = threading.Thread(target=relay, args=(listener, port, asked))
            relaying.start()
            options: dict[str, Any] = {"ssl": certificates.client(), "server_hostname": NAME}
            if over == "socket":
                transport, _ = await group.create_connection(lambda: protocol, *listener.getsockname(), **options)
            else:
                stream = await anyio.connect_tcp(*listener.getsockname())
                transport, _ = await group.connect_stream(lambda: protocol, stream, **options)
            await output.until(b"Secure Renegotiation IS supported\n")
            asked.set()
            await output.say(b"r\n")
            await until(held_back.is_set)
            if paused:
                transport.pause_reading()
            transport.write(b"in vain")
            assert transport.get_write_buffer_size() == 7
            written.set()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, ConnectionResetError)
            await until(lambda: not relaying.is_alive())


async def test_curl(stack: Stack, certificates: Certificates, version: str) -> None:
    body = pattern(2_000_000)

    def answer(protocol: Any, _: bytes) -> None:
        if protocol.received.endswith(b"\r\n\r\n"):
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            protocol.transport.write(head)
            protocol.transport.write(body)
            protocol.transport.close()

    with certificates.files() as files:
        async with stack.open() as group:
            serving = await serve(
                group, certificates.server(version=version), lambda: Recorder(on_data_received=answer)
            )
            command = [program("curl"), "-sS", "--http1.1", "--noproxy", "*", "--cacert", files["ca"]]
            command += ["--resolve", f"{NAME}:{serving.port}:{HOST}", f"https://{NAME}:{serving.port}/"]
            with anyio.fail_after(4 * GUARD):
                result = await anyio.run_process(command, check=False)
            assert result.stderr == b""
            assert result.stdout == body
            protocol = await serving.protocol()
            await protocol.wait_for("connection_lost")
            serving.server.close()


@pytest.mark.parametrize("peer", ["blocking", "asyncio"])
async def test_python_client(stack: Stack, certificates: Certificates, peer: str) -> None:
    size = 2_560_000
    with certificates.files() as files:
        async with stack.open() as group:
            serving = await serve(group, certificates.server(), lambda: Recorder(on_data_received=echo))
            async with tls_peer_process(f"{peer}_client", serving.port, files["ca"], NAME, size) as process:
                protocol = await serving.protocol()
                assert (await process.line()).startswith("done")
            await protocol.wait_for("connection_lost")
            assert len(protocol.received) == size
            assert protocol.exception is None
            serving.server.close()


@pytest.mark.parametrize("peer", ["blocking", "asyncio"])
async def test_python_server(stack: Stack, certificates: Certificates, peer: str) -> None:
    data = pattern(1_000_000)
    with certificates.files() as files:
        async with tls_peer_process(f"{peer}_server", files["server"]) as process, stack.open() as group:
            port = int(await process.line())
            client = Recorder()
            await group.create_connection(lambda: client, HOST, port, ssl=certificates.client(), server_hostname=NAME)
            client.transport.write(data)
            assert await client.wait_received(len(data)) == data
            client.transport.close()
            await client.wait_for("connection_lost")
            assert client.exception is None
            assert await process.line() == f"done {len(data)}"
