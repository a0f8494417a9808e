"""docs/known-bugs.md: each of its rows has tests. Also the tests of its rows that belong to no other file."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from adopting import Echo
from network import needs_pipes
from support import (
    GUARD,
    BufferedRecorder,
    Peer,
    Recorder,
    Stack,
    collect_contexts,
    connected,
    open_descriptors,
    pattern,
    settle,
    turns,
    until,
)
from tls_support import NAME, Certificates, TLSPeer, serve, tls_client

from transports_anyio import TransportGroup
from transports_anyio.testing import memory_connection

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "known-bugs.md"
ROW = re.compile(r"^\| ([A-Z]\d+) \|")


# -- the table -----------------------------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, list[str]]]:
    """Return the name of each row of the page, and the tests that it names."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := ROW.match(line):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            assert len(cells) == 4, line
            assert all(cells), line
            yield match[1], re.findall(r"`(test_\w+)`", cells[3])


def existing_tests() -> set[str]:
    return {
        node.name
        for file in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    }


def test_every_row_names_tests_that_exist_and_are_named_after_it() -> None:
    existing = existing_tests()
    names = [name for name, _ in rows()]
    assert len(names) == len(set(names))
    # The families are numbered without a gap, so that no row gets lost.
    for family in {name[0] for name in names}:
        numbers = sorted(int(name[1:]) for name in names if name[0] == family)
        assert numbers == list(range(1, len(numbers) + 1)), family
    for name, tests in rows():
        assert any(re.match(rf"test_(\w+_)?{name.lower()}_", test) for test in tests), name
        assert set(tests) <= existing, name


def test_every_test_named_after_a_row_is_in_the_table() -> None:
    known = {test for _, tests in rows() for test in tests}
    assert {test for test in existing_tests() if re.match(r"test_[a-z]\d+_", test)} == known


# -- the rows ------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.skipif(not hasattr(socket.socket, "sendmsg"), reason="there is no sendmsg")
@pytest.mark.ours_only("asyncio may copy the data")
@pytest.mark.parametrize("limit", [1000, 30_000])
async def test_w12_writes_do_not_copy_the_data(stack: Stack, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """However many partial sends there are, the system is given the written object or a view of it."""
    blocks = [pattern(65536 + number) for number in range(16)]
    written = {id(block) for block in blocks}
    offered = 0

    def check(chunk: Any) -> None:
        nonlocal offered
        if bytes(chunk) == b"\0":
            return  # A poller's wake-up.
        offered += 1
        assert id(chunk.obj if isinstance(chunk, memoryview) else chunk) in written

    def send(sock: socket.socket, data: Any) -> int:
        check(data)
        return original_send(sock, data[:limit])

    def sendmsg(sock: socket.socket, chunks: Any) -> int:
        chunks = list(chunks)
        for chunk in chunks:
            check(chunk)
        return original_send(sock, chunks[0][:limit])

    original_send = socket.socket.send
    monkeypatch.setattr(socket.socket, "send", send)
    monkeypatch.setattr(socket.socket, "sendmsg", sendmsg)
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        for block in blocks:
            transport.write(block)
        transport.close()
        assert await peer.receive_all() == b"".join(blocks)  # It only reads, so the patch does not affect it.
        await protocol.wait_for("connection_lost")
    assert offered > 16


def _strided(*_: object) -> memoryview:
    return memoryview(bytearray(64))[::2]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tcp", "tls", pytest.param("pipe", marks=needs_pipes), "memory", "stream"])
async def test_r2_a_buffer_that_is_not_contiguous(
    anyio_backend: Any, certificates: Certificates, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = BufferedRecorder(on_get_buffer=_strided)
    async with contextlib.AsyncExitStack() as stack:
        group = await stack.enter_async_context(TransportGroup())
        contexts = collect_contexts(group)
        if kind == "tcp":
            _, _, peer = await stack.enter_async_context(connected(group, protocol))
            await peer.send(b"data")
        elif kind == "tls":
            _, _, peer = await stack.enter_async_context(tls_client(group, certificates, protocol))
            with contextlib.suppress(OSError):  # The session tickets of TLS 1.3 were enough.
                await peer.send(b"data")
        elif kind == "memory":
            _, (transport, _) = await memory_connection(group, lambda: protocol, Recorder)
            transport.write(b"data")
        elif kind == "pipe":
            reader, writer = os.pipe()
            os.write(writer, b"data")
            os.close(writer)
            await group.connect_read_pipe(lambda: protocol, open(reader, "rb", 0))
        else:
            send, receive = anyio.create_memory_object_stream[bytes](1)
            send.send_nowait(b"data")
            await group.connect_stream(lambda: protocol, Bytes(receive))
            send.close()
        await protocol.wait_for("connection_lost")
        (context,) = contexts
        assert isinstance(context["exception"], (BufferError, TypeError, ValueError))
        assert "get_buffer" in context["message"]
        assert protocol.exception is context["exception"]
        assert protocol.count("buffer_updated") == 0


class Bytes(anyio.abc.ByteReceiveStream):
    def __init__(self, items: Any) -> None:
        self._items = items

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data: bytes = await self._items.receive()
        return data

    async def aclose(self) -> None:
        self._items.close()


@pytest.mark.anyio
async def test_r7_a_buffered_protocol_over_tls_takes_many_records_at_once(
    stack: Stack, certificates: Certificates
) -> None:
    """A plain TLS socket returns one record of at most 16 KiB for each read. Ours needs no more reads."""
    record = 16384
    updates: list[int] = []
    protocol = BufferedRecorder(on_buffer_updated=lambda p, count: updates.append(count))
    protocol.buffer = memoryview(bytearray(256 * 1024))  # type: ignore[assignment]
    async with stack.open() as group, tls_client(group, certificates, protocol) as (transport, _, peer):
        transport.pause_reading()
        sent = 0
        block = bytes(record)
        while True:
            try:
                sent += peer.socket.send(block)
            except ssl.SSLWantWriteError:
                break
        assert sent > 16 * record
        transport.resume_reading()
        await protocol.wait_received(sent)
        assert sum(updates) == sent
        assert len(updates) <= 4 + sent // (4 * record)
        # There is no copy between OpenSSL and the protocol, and no useless `get_buffer` while data is available.
        assert protocol.count("get_buffer") <= 2 * len(updates) + 2
        peer.cut()


@pytest.mark.anyio
@pytest.mark.ours_only("asyncio would wait a minute for the silent clients")
async def test_t3_a_thousand_silent_clients_do_not_delay_the_next_one(stack: Stack, certificates: Certificates) -> None:
    resource = pytest.importorskip("resource", reason="no limits of descriptors here")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(1000, (soft - len(open_descriptors()) - 50) // 2)
    assert count > 100
    async with stack.open() as group:
        serving = await serve(group, certificates.server(), Echo)
        with contextlib.ExitStack() as peers:
            for number in range(count):
                peers.enter_context(Peer.connect(serving.address))
                if not number % 50:
                    await turns()  # A backlog may be short.
            with await TLSPeer.connect_to(serving.address, certificates.client(), NAME) as peer:
                await peer.send(b"next!")
                assert await peer.receive_exactly(5) == b"next!"
            before = len(open_descriptors())
            assert before > 2 * count
        # They disconnect without sending anything; nothing of them is left.
        group.set_exception_handler(lambda *_: None)
        await until(lambda: len(open_descriptors()) <= before - 2 * count)
        serving.server.close()


@pytest.mark.anyio
@needs_pipes
@pytest.mark.needs_polling("no reader is noticed to have gone")
async def test_p7_on_macos_a_fifo_is_not_asked_whether_its_reader_has_gone(
    anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    near, far = socket.socketpair()
    async with TransportGroup() as group:
        control = Recorder()
        await group.connect_write_pipe(lambda: control, near)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "darwin")
            protocol = Recorder()
            transport, _ = await group.connect_write_pipe(lambda: protocol, open(writer, "wb", 0))
        transport.write(b"x")
        os.close(reader)
        far.close()
        await control.wait_for("connection_lost")  # Sockets are asked everywhere.
        await settle(group)
        assert protocol.count("connection_lost") == 0
        with anyio.fail_after(GUARD):
            transport.write(b"y")  # Only this shows it.
            await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, BrokenPipeError)
