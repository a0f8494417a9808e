"""Every example runs on every backend as a program, and real programs talk to it."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
import trustme
from anyio.streams.tls import TLSStream
from network import needs_signals, unused_port
from support import GUARD, HOST, Peer, peer_process
from tls_support import NAME, Certificates

from transports_anyio import TransportGroup
from transports_anyio.testing import Recorder, memory_connection

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from foreign_stream import ask_through
from http_tunnel import open_tunnel
from memory_connection import Netstrings

pytestmark = pytest.mark.anyio

EXAMPLES = Path(__file__).parents[1] / "examples"


def name_of(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    name, options = anyio_backend
    return "uvloop" if options.get("use_uvloop") else name


def command(example: str, *arguments: object) -> list[str]:
    return [sys.executable, "-u", str(EXAMPLES / f"{example}.py"), *map(str, arguments)]


@asynccontextmanager
async def serving(
    example: str, backend: str, port: int, *more: object, end: signal.Signals = signal.SIGINT
) -> AsyncIterator[anyio.abc.Process]:
    """Run an example that serves until Ctrl-C, or the signal `end`, which must end it without output."""
    python, *program = command(example, "--backend", backend, "--port", port, *more)
    # trio raises `KeyboardInterrupt` anywhere, and between the call of a coroutine function and its `await` too: then
    # Python says so of a coroutine that is not ours. Elsewhere the event loop cancels the main task instead.
    options = ["-W", "ignore:coroutine:RuntimeWarning"] if backend == "trio" else []
    process = await anyio.open_process([python, *options, *program])
    try:
        assert process.stdout is not None
        with anyio.fail_after(4 * GUARD):
            announcement = await process.stdout.receive()
        assert str(port) in announcement.decode()
        yield process
        process.send_signal(end)
        assert process.stderr is not None
        with anyio.fail_after(4 * GUARD):
            errors = b"".join([chunk async for chunk in process.stderr])
            assert await process.wait() == 0, errors.decode()
        assert errors == b"", errors.decode()
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.aclose()


async def output(*arguments: str, text: bytes = b"") -> str:
    with anyio.fail_after(4 * GUARD):
        return (await anyio.run_process(arguments, input=text, stderr=None)).stdout.decode()


async def test_tcp_echo(anyio_backend: Any) -> None:
    backend = name_of(anyio_backend)
    port = unused_port()
    async with serving("tcp_echo_server", backend, port):
        said = await output(*command("tcp_echo_client", "--backend", backend, "--port", port, "Is this on?"))
        assert said.splitlines() == ["sent      'Is this on?'", "received  'Is this on?'", "closed"]


async def answer(*arguments: str, text: bytes) -> bytes:
    """Return the first output of a program for `text`; the program would not end with its input, so it is killed."""
    process = await anyio.open_process(arguments)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send(text)
        with anyio.fail_after(4 * GUARD):
            return await process.stdout.receive()
    finally:
        with anyio.CancelScope(shield=True):
            process.kill()
            await process.aclose()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl_talks_to_the_echo_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("tcp_echo_server", name_of(anyio_backend), port):
        url = f"telnet://{HOST}:{port}"
        assert await answer("curl", "-sSN", url, text=b"hello from curl\n") == b"hello from curl\n"


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc")
async def test_nc_talks_to_the_echo_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("tcp_echo_server", name_of(anyio_backend), port):
        assert await output("nc", "-N", HOST, str(port), text=b"hello from nc\n") == "hello from nc\n"


async def test_udp_echo(anyio_backend: Any) -> None:
    backend = name_of(anyio_backend)
    port = unused_port(socket.SOCK_DGRAM)
    async with serving("udp_echo_server", backend, port):
        said = await output(*command("udp_echo_client", "--backend", backend, "--port", port, "Is this on?"))
        assert said.splitlines() == ["sent      'Is this on?'", "received  'Is this on?'", "closed"]


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc")
async def test_nc_talks_to_the_udp_echo_server(anyio_backend: Any) -> None:
    port = unused_port(socket.SOCK_DGRAM)
    async with serving("udp_echo_server", name_of(anyio_backend), port):
        assert await answer("nc", "-u", HOST, str(port), text=b"hello from nc\n") == b"hello from nc\n"


async def test_a_client_without_a_server(anyio_backend: Any) -> None:
    """No socket is bound to the port, and the system reports it (ICMP)."""
    port = unused_port(socket.SOCK_DGRAM)
    said = await output(*command("udp_echo_client", "--backend", name_of(anyio_backend), "--port", port))
    assert "no answer" in said


async def test_the_date_of_a_subprocess(anyio_backend: Any) -> None:
    said = await output(*command("subprocess_date", "--backend", name_of(anyio_backend)))
    assert said.startswith("Current date: 20")


async def test_a_filter(anyio_backend: Any, tmp_path: Path) -> None:
    lines = b"".join(b"%d\n" % (number * 7919 % 10_000) for number in range(10_000))
    (tmp_path / "source").write_bytes(lines)
    paths = [str(tmp_path / "source"), str(tmp_path / "target")]
    await output(*command("filter_file", "--backend", name_of(anyio_backend), *paths, "sort", "-n"))
    assert (tmp_path / "target").read_bytes() == b"".join(b"%d\n" % number for number in range(10_000))


#: Runs an example, then prints the most memory that the process had, in KiB.
MEASURED = """
import pathlib, runpy, sys
del sys.argv[0]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
status = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the memory is not told there")
async def test_filtering_a_large_file_uses_constant_memory(anyio_backend: Any, tmp_path: Path) -> None:
    """The result is not read for a while: without back-pressure all of it would wait in memory."""
    source, target, result = tmp_path / "source", tmp_path / "target", tmp_path / "result"
    os.mkfifo(target)
    example = command("filter_file", "--backend", name_of(anyio_backend), source, target, "cat")[2:]
    peaks = []
    for mebibytes in (1, 128):
        with source.open("wb") as file:
            for number in range(mebibytes):
                file.write(bytes([number]) * (1 << 20))
        with subprocess.Popen(["sh", "-c", '{ sleep 1; cat; } < "$0" > "$1"', target, result]) as reader:
            try:
                said = await output(sys.executable, "-c", MEASURED, *example)
                reader.wait(GUARD)
            finally:
                reader.kill()
        assert filecmp.cmp(source, result, shallow=False)
        peaks.append(int(said.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 16 * 1024
    source.unlink()
    result.unlink()


async def test_the_line_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("line_server", name_of(anyio_backend), port):
        async with await anyio.connect_tcp(HOST, port) as stream:
            await stream.send(b"login anna\nquit\n")
            heard = b"".join([chunk async for chunk in stream]).decode()
        assert heard.splitlines() == ["please login", "welcome anna", "goodbye"]


async def heard(process: anyio.abc.Process) -> str:
    """Return the next output of an example. A line may come in pieces."""
    assert process.stdout is not None
    said = ""
    with anyio.fail_after(4 * GUARD):
        while not said.strip():
            said = (await process.stdout.receive()).decode()
    return said.strip()


async def test_an_existing_socket(anyio_backend: Any) -> None:
    said = await output(*command("existing_socket", "--backend", name_of(anyio_backend), "Is this on?"))
    assert said.splitlines() == ["received  'Is this on?'", "answered  'thank you'"]


@pytest.mark.parametrize("size", [None, 1, 7])
async def test_a_memory_connection(anyio_backend: Any, size: int | None) -> None:
    options = [] if size is None else ["--chunk-size", size]
    said = await output(*command("memory_connection", "--backend", name_of(anyio_backend), *options, "pots", "emit"))
    # Two netstrings of seven bytes.
    chunks = {None: "1 chunk", 1: "14 chunks", 7: "2 chunks"}[size]
    assert said.splitlines() == [
        "'pots' backwards is 'stop'",
        "'emit' backwards is 'time'",
        f"the questions came in {chunks}",
    ]


@pytest.mark.parametrize("wrong", [b"x", b"5hello,", b"5:hello!", b":", b"100001:", b"9999999"])
async def test_malformed_netstrings(anyio_backend: Any, wrong: bytes) -> None:
    async with TransportGroup() as group:
        (transport, recorder), (_, netstrings) = await memory_connection(group, Recorder, Netstrings, chunk_size=1)
        transport.write(b"0:,6:100000,")
        transport.write(wrong)
        with anyio.fail_after(GUARD):
            await netstrings.finished.wait()
            await recorder.wait_for("connection_lost")
        assert recorder.received == b""


async def test_a_protocol_over_a_stream_of_another_library(anyio_backend: Any) -> None:
    """The pipes of `cat`, and of a relay to our own server."""
    backend = name_of(anyio_backend)
    said = await output(*command("foreign_stream", "--backend", backend, "--message", "hello", "cat"))
    assert said.splitlines() == ["sent      'hello'", "received  'hello'"]
    port = unused_port()
    async with serving("tcp_echo_server", backend, port):
        relay = [sys.executable, "-c", RELAY, HOST, str(port)]
        assert (await output(*command("foreign_stream", "--backend", backend, *relay))).endswith("is this an echo?'\n")


@asynccontextmanager
async def http_proxy(*arguments: str) -> AsyncIterator[str]:
    async with peer_process("http_proxy", *arguments) as process:
        yield f"http://{HOST}:{await process.line()}"


async def test_a_stream_of_httpcore(anyio_backend: Any) -> None:
    """A tunnel through a proxy in another process."""
    backend = name_of(anyio_backend)
    port = unused_port()
    async with serving("tcp_echo_server", backend, port), http_proxy() as proxy:
        said = await output(*command("http_tunnel", "--backend", backend, "--port", port, "--proxy", proxy))
    assert said.splitlines() == [f"{word:8}  'Hello, is this an echo?'" for word in ("sent", "received")]


async def test_a_tunnel_has_addresses_and_ends(anyio_backend: Any) -> None:
    with socket.create_server((HOST, 0)) as listener:
        async with http_proxy() as proxy, open_tunnel(proxy, HOST, listener.getsockname()[1]) as tunnel:
            async with TransportGroup() as group:
                transport, recorder = await group.connect_stream(Recorder, tunnel)
                assert transport.get_extra_info("peername") == (HOST, int(proxy.rpartition(":")[2]))
                assert transport.get_extra_info("sockname")[0] == HOST
                server, _ = await anyio.to_thread.run_sync(listener.accept)
                with server:
                    transport.write(b"x" * 1_000_000)
                    received = 0
                    while received < 1_000_000:
                        received += len(await anyio.to_thread.run_sync(server.recv, 65536))
                    server.sendall(b"bye")
                with anyio.fail_after(GUARD):
                    await recorder.wait_for("connection_lost")
    assert recorder.received == b"bye"
    assert recorder.calls[-2:] == [("eof_received",), ("connection_lost", None)]


async def test_a_proxy_that_refuses(anyio_backend: Any) -> None:
    async with http_proxy("403 Forbidden") as proxy:
        with pytest.raises(ConnectionError, match="403"):
            async with open_tunnel(proxy, HOST, 1):
                pass


#: Standard input and output, and a socket: `nc` for systems that have none.
RELAY = """
import os, socket, sys, threading
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def there():
    while data := os.read(0, 65536):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
threading.Thread(target=there, daemon=True).start()
while data := sock.recv(65536):
    os.write(1, data)
"""


async def test_anyios_tls_over_a_process(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    """AnyIO's TLS over the pipes of a process, with a server of AnyIO's: only the protocol is ours."""
    certificates = Certificates(certificate_authority)
    listener = await anyio.create_tcp_listener(local_host=HOST)

    async def echo(stream: anyio.abc.SocketStream) -> None:
        tls = await TLSStream.wrap(
            stream, server_side=True, ssl_context=certificates.server(), standard_compatible=False
        )
        async with tls:
            await tls.send(await tls.receive())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        with anyio.fail_after(4 * GUARD):
            relay = [sys.executable, "-c", RELAY, HOST, str(port)]
            assert await ask_through(relay, "hello", certificates.client(), NAME) == "hello"
        tasks.cancel_scope.cancel()
    await listener.aclose()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_the_http_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("http_server", name_of(anyio_backend), port):
        assert "<h1>It works</h1>" in await output("curl", "-sS", "--noproxy", "*", f"http://{HOST}:{port}/")


async def test_the_proxy(anyio_backend: Any) -> None:
    backend = name_of(anyio_backend)
    port = port_behind = unused_port()
    while port_behind == port:
        port_behind = unused_port()
    async with serving("tcp_proxy", backend, port, HOST, port_behind) as proxy:
        # A bare socket: the reset may come before others have made a stream of theirs.
        with Peer.connect((HOST, port)) as peer, pytest.raises(ConnectionError):
            await peer.receive()
        assert "cannot reach" in await heard(proxy)
        async with serving("tcp_echo_server", backend, port_behind):
            said = await output(*command("tcp_echo_client", "--backend", backend, "--port", port, "Is this on?"))
            assert said.splitlines() == ["sent      'Is this on?'", "received  'Is this on?'", "closed"]


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_graceful_stop(anyio_backend: Any, number: signal.Signals) -> None:
    """Idle clients are closed, busy ones get their answer, and the program ends with status 0 and no traceback."""
    port = unused_port()
    options = ["--seconds", 0.5, "--grace", 4 * GUARD]
    async with serving("graceful_stop", name_of(anyio_backend), port, *options, end=number):
        idle, busy = Peer.connect((HOST, port)), Peer.connect((HOST, port))
        await busy.send(b"hello\n")
        assert await busy.receive_exactly(17) == b"working on hello\n"
    with idle, busy:
        assert await idle.receive() == b""
        assert await busy.receive_all() == b"HELLO\n"


@needs_signals
async def test_a_graceful_stop_has_a_deadline(anyio_backend: Any) -> None:
    port = unused_port()
    options = ["--seconds", 3600, "--grace", 0.2]
    async with serving("graceful_stop", name_of(anyio_backend), port, *options, end=signal.SIGTERM):
        stuck = Peer.connect((HOST, port))
        await stuck.send(b"hello\n")
        assert await stuck.receive_exactly(17) == b"working on hello\n"
    with stuck:
        assert await stuck.gone()


async def test_the_chat_server(anyio_backend: Any) -> None:
    port = unused_port()
    async with serving("chat_server", name_of(anyio_backend), port):
        async with await anyio.connect_tcp(HOST, port) as stream:
            await stream.send(b"anna\nhello\n")
            await stream.send_eof()
            said = b"".join([chunk async for chunk in stream]).decode()
        assert said.splitlines() == ["* your name, please", "* here: nobody", "* anna is here", "anna: hello"]


async def test_the_mail_server(anyio_backend: Any, certificate_authority: trustme.CA, tmp_path: Path) -> None:
    certificate = certificate_authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    context = Certificates(certificate_authority).client()
    port = unused_port()

    def send() -> None:
        with smtplib.SMTP("localhost", port, timeout=GUARD) as client:
            client.starttls(context=context)
            client.sendmail("me@example.org", "you@example.org", b"hello\r\n")

    async with serving(
        "mail_server", name_of(anyio_backend), port, "--certificate", tmp_path / "server.pem"
    ) as process:
        await anyio.to_thread.run_sync(send)
        assert await heard(process) == "from me@example.org to you@example.org: 7 bytes"


PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
#: Tests of the examples that need other people's libraries; not every environment has these.
ECOSYSTEM = Path(__file__).parents[1] / "ecosystem" / Path(__file__).name
OWN_PROGRAMS = [program for program in PROGRAMS if f'"{program}"' not in ECOSYSTEM.read_text(encoding="utf-8")]


@pytest.mark.parametrize("example", OWN_PROGRAMS)
def test_help(example: str) -> None:
    """Each example has a help text and, except for the tour, an option for the backend."""
    result = subprocess.run(command(example, "--help"), capture_output=True, text=True, timeout=4 * GUARD, check=True)
    assert result.stdout.startswith("usage: ")
    assert ("--backend {asyncio,uvloop,trio}" in result.stdout) == (example != "tour")


def test_every_example_is_tested() -> None:
    """By name, in another test than this one."""
    tests = Path(__file__).parent
    sources = [path.read_text() for path in (Path(__file__), ECOSYSTEM, *tests.glob("test_*workers.py"))]
    started = set(re.findall(r"(?:serving|command)\(\s*\"(\w+)\"|\"(\w+)\.py\"", "".join(sources)))
    assert {name for pair in started for name in pair if name} == set(PROGRAMS)


def test_the_tour() -> None:
    """It visits every backend by itself."""
    result = subprocess.run(command("tour"), capture_output=True, text=True, timeout=8 * GUARD, check=True)
    assert result.stdout.splitlines()[-1].endswith("equal")
