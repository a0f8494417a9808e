"""The log of a connection at level DEBUG."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import trustme
from network import needs_pipes
from support import HOST, Recorder, connected, fill, until
from tls_support import NAME, Certificates

from transports_anyio import DatagramProtocol, Protocol, SubprocessProtocol, TransportGroup
from transports_anyio.testing import memory_connection

pytestmark = pytest.mark.anyio

LOGGER = logging.getLogger("transports_anyio")


@contextmanager
def story(level: int = logging.DEBUG) -> Iterator[list[str]]:
    """Return the log without addresses and numbers."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = re.sub(r" (sockname|peername)=\([^)]*\)| pipe=<[^>]*>|, 0x\w+", "", record.getMessage())
            message = re.sub(r" on \[.*?\]|( servers=\d+ tasks=\d+ timers=\d+)", "", message)
            lines.append(re.sub(r"\('127.0.0.1', \d+\)", "ADDRESS", message))

    handler = Keep()
    before = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)


def about(lines: list[str], kind: str) -> list[str]:
    """Return the lines of one transport, without its name."""
    return [line.removeprefix(f"<{kind} ") for line in lines if line.startswith(f"<{kind} ")]


class Echo(Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def converse(messages: int = 100) -> None:
    """Ask an echo server one request after the other, so that the order of the lines is certain."""
    async with TransportGroup() as group:
        server = await group.create_server(Echo, HOST, 0)
        transport, client = await group.create_connection(Recorder, *server.sockets[0].getsockname())
        for _ in range(messages):
            size = len(client.received)
            transport.write(b"hello")
            await client.wait_received(size + 5)
        transport.write_eof()
        await client.wait_for("connection_lost")
        await group.wait_closed()


async def test_an_echo(anyio_backend: Any) -> None:
    with story() as lines:
        await converse()
    # The system decides which end is made first, so each end is checked separately.
    logged = [line for line in lines if "StreamTransport" not in line]
    assert logged == [
        "<TransportGroup open transports=0 buffered=0>: entered",
        "<Server serving connections=0 buffered=0>: listening",
        "<Server serving connections=0 buffered=0>: accepted ADDRESS",
        "<TransportGroup closing transports=0 buffered=0>: leaving, closing all transports",
        "<Server serving connections=0 buffered=0>: closing",
        "<TransportGroup closed transports=0 buffered=0>: left",
    ]
    streams = about(lines, "StreamTransport")
    client = [
        "open buffered=0>: connection made, with a Recorder",
        "open buffered=0 eof written>: end of file sent",
        "open buffered=0 eof written>: end of file received",
        "open buffered=0 eof received eof written>: closing",
        "closing buffered=0 eof received eof written>: everything is sent",
        "closing buffered=0 eof received eof written>: connection lost",
        "closed buffered=0 eof received eof written>: closed",
    ]
    server = [
        "open buffered=0>: connection made, with a Echo",
        "open buffered=0>: end of file received",
        "open buffered=0 eof received>: closing",
        "closing buffered=0 eof received>: everything is sent",
        "closing buffered=0 eof received>: connection lost",
        "closed buffered=0 eof received>: closed",
    ]
    assert [line for line in streams if line in client] == client
    assert [line for line in streams if line in server] == server
    assert len(streams) == len(client) + len(server)  # Nothing was logged for the hundred messages.


async def test_nothing_is_logged_at_info(anyio_backend: Any) -> None:
    with story(logging.INFO) as lines:
        await converse()
    assert lines == []


async def test_messages_are_not_logged(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logger is asked as often for a hundred messages as for one: only when a state changes."""
    asked = 0
    is_enabled_for = LOGGER.isEnabledFor

    def counting(level: int) -> bool:
        nonlocal asked
        asked += 1
        return is_enabled_for(level)

    monkeypatch.setattr(LOGGER, "isEnabledFor", counting)
    counts = []
    for messages in (1, 100):
        asked = 0
        await converse(messages)
        counts.append(asked)
    assert counts[0] == counts[1] > 0


async def test_flow_control_and_a_failure(anyio_backend: Any) -> None:
    with story() as lines:
        async with TransportGroup() as group, connected(group, small=True) as (transport, protocol, peer):
            fill(transport, 100_000)
            await peer.receive_exactly(transport.get_write_buffer_size())
            await until(lambda: not protocol.writing_paused)
            peer.reset()
            await protocol.wait_for("connection_lost")
    logged = [re.sub(r"buffered=\d+", "buffered=N", line) for line in about(lines, "StreamTransport")]
    assert logged[:3] == [
        "open buffered=N>: connection made, with a Recorder",
        "open buffered=N writing paused>: pause_writing()",
        "open buffered=N>: resume_writing()",
    ]
    assert re.match(r"open .*: (read|write) failed: \w+Error\(", logged[3])
    assert re.match(r"open .*: connection lost: \w+Error\(", logged[4])


async def test_an_end_by_an_exception(anyio_backend: Any) -> None:
    with story() as lines:
        try:
            async with TransportGroup() as group:
                await memory_connection(group, Protocol, Protocol)
                raise ZeroDivisionError
        except BaseException as exc:
            assert "ZeroDivisionError" in repr(exc)
    assert lines[-6:] == [
        "<TransportGroup closing transports=2 buffered=0>: leaving, aborting all transports: ZeroDivisionError()",
        "<StreamTransport open buffered=0>: aborted",
        "<StreamTransport open buffered=0>: aborted",
        "<StreamTransport closed buffered=0>: closed",
        "<StreamTransport closed buffered=0>: closed",
        "<TransportGroup closed transports=0 buffered=0>: left",
    ]


async def test_handshakes(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    certificates = Certificates(certificate_authority)
    with story() as lines:
        async with TransportGroup() as group:
            group.set_exception_handler(lambda _group, _context: None)
            server = await group.create_server(Echo, HOST, 0, ssl=certificates.server())
            address = server.sockets[0].getsockname()
            transport, _ = await group.create_connection(
                Recorder, *address, ssl=certificates.client(), server_hostname=NAME
            )
            cipher = transport.get_extra_info("cipher")[0]
            await until(lambda: sum("done" in line for line in lines) == 2)
            with pytest.raises(OSError, match="certificate"):
                await group.create_connection(
                    Recorder, *address, ssl=certificates.client(), server_hostname="other.example"
                )
    assert lines.count(f"TLS handshake with ADDRESS done: TLSv1.3, {cipher}") == 2
    # Each end logs it, with the peer.
    (refusal,) = [line for line in lines if "CERTIFICATE_VERIFY_FAILED" in line]
    assert refusal.startswith("TLS handshake with ADDRESS failed: SSLCertVerificationError")
    assert sum(line.startswith("TLS handshake with ADDRESS failed: ") for line in lines) == 2
    assert "<StreamTransport open buffered=0 tls=TLSv1.3>: connection made, with a Recorder" in lines


async def test_an_upgrade(anyio_backend: Any, certificate_authority: trustme.CA) -> None:
    certificates = Certificates(certificate_authority)
    with story() as lines:
        async with TransportGroup() as group:
            (client, a), (server, b) = await memory_connection(group, Recorder, Recorder)
            upgraded = []
            server.pause_reading()  # The next bytes are the handshake.

            async def upgrade() -> None:
                upgraded.append(await group.start_tls(server, b, certificates.server(), server_side=True))

            group.start_soon(upgrade)
            upgraded.append(await group.start_tls(client, a, certificates.client(), server_hostname=NAME))
            await until(lambda: len(upgraded) == 2)
    assert sum(line.endswith(": upgrading to TLS") for line in lines) == 2
    assert not any("failed" in line for line in lines)
    assert sum(line.startswith("TLS handshake with None done: TLSv1.3, ") for line in lines) == 2
    assert sum(line.endswith("tls=TLSv1.3>: closing") for line in lines) == 2


@needs_pipes
async def test_a_child(anyio_backend: Any) -> None:
    with story() as lines:
        async with TransportGroup() as group:
            transport, _ = await group.subprocess_exec(
                SubprocessProtocol, sys.executable, "-c", "raise SystemExit(3)", stdin=None, stdout=None, stderr=None
            )
            await group.wait_closed()
    pid = transport.get_pid()
    assert about(lines, "SubprocessTransport") == [
        f"pid={pid} running>: spawned, with a SubprocessProtocol",
        f"pid={pid} returncode=3>: exited",
        f"closed pid={pid} returncode=3>: lost",
    ]


@needs_pipes
async def test_datagrams_and_pipes(anyio_backend: Any) -> None:
    reading, writing = os.pipe()
    with story() as lines:
        async with TransportGroup() as group:
            endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, (HOST, 0))
            endpoint.close()
            await group.connect_read_pipe(Protocol, os.fdopen(reading, "rb", 0))
            writer, _ = await group.connect_write_pipe(Protocol, os.fdopen(writing, "wb", 0))
            writer.close()
            with anyio.fail_after(15):
                await group.wait_closed()
    assert about(lines, "DatagramTransport") == [
        "open buffered=0>: connection made, with a DatagramProtocol",
        "open buffered=0>: closing",
        "closing buffered=0>: connection lost",
        "closed buffered=0>: closed",
    ]
    assert about(lines, "WritePipeTransport") == [
        "open buffered=0>: connection made, with a Protocol",
        "open buffered=0>: closing",
        "closing buffered=0>: everything is sent",
        "closing buffered=0>: connection lost",
        "closed buffered=0>: closed",
    ]
    assert about(lines, "ReadPipeTransport") == [
        "open buffered=0>: connection made, with a Protocol",
        "open buffered=0>: end of file received",
        "open buffered=0 eof received>: closing",
        "closing buffered=0 eof received>: everything is sent",
        "closing buffered=0 eof received>: connection lost",
        "closed buffered=0 eof received>: closed",
    ]
