"""Pipes: threads that read and write where pipes cannot be polled, as on Windows, and groups in several threads."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import termios
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from network import run_main
from pipe_helpers import connect_reader, connect_writer, drain, pipe
from process_helpers import Child
from support import (
    GUARD,
    BaseExceptionGroup,
    Recorder,
    collect_contexts,
    fill,
    open_descriptors,
    pattern,
    settle,
    until,
)

from transports_anyio import TransportGroup, _capabilities
from transports_anyio._channels import _pipe, _threaded_pipe
from transports_anyio._driver import TaskDriver
from transports_anyio._poller import Poller
from transports_anyio._selector import make_system_selector

pytestmark = pytest.mark.anyio


# -- where pipes cannot be polled ----------------------------------------------------------------------------


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: `--descriptors threads` for one test."""
    monkeypatch.setattr(_capabilities, "polls_files", False)


@pytest.mark.usefixtures("in_threads")
async def test_bulk_data_through_threads(anyio_backend: Any) -> None:
    data = pattern(4 << 20)
    with pipe() as (reader, writer):
        async with TransportGroup() as group:
            _, receiver = await connect_reader(group, reader)
            transport, sender = await connect_writer(group, writer)
            assert {thread.name for thread in threading.enumerate()} & {f"transports_anyio: pipe {reader.fileno()}"}
            transport.writelines([data[:100_000], data[100_000:]])
            assert sender.names[-1] == "pause_writing"
            transport.close()
            assert await receiver.wait_received(len(data)) == data
            await receiver.wait_for("connection_lost")
            assert sender.names == ["connection_made", "pause_writing", "resume_writing", "connection_lost"]
            assert sender.exception is receiver.exception is None
        assert reader.closed
        assert writer.closed


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("how", ["close", "exception"])
async def test_a_silent_pipe_that_a_thread_reads_does_not_hold_the_group_back(anyio_backend: Any, how: str) -> None:
    with pipe() as (reader, writer):
        before = open_descriptors()
        with anyio.fail_after(GUARD), suppress(LookupError, BaseExceptionGroup):
            async with TransportGroup() as group:
                transport, protocol = await connect_reader(group, reader)
                if how == "exception":
                    raise LookupError
                transport.close()
        assert protocol.names == ["connection_made", "connection_lost"]
        assert reader.closed
        assert len(open_descriptors()) == len(before), "the thread has one, instead of ours"
        writer.write(b"lost with the thread")
        await until(lambda: len(open_descriptors()) == len(before) - 1)


@pytest.mark.usefixtures("in_threads")
async def test_a_full_pipe_that_a_thread_writes_does_not_hold_the_group_back(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        with anyio.fail_after(GUARD):
            async with TransportGroup() as group:
                transport, protocol = await connect_writer(group, writer)
                size = fill(transport, 1 << 20)
                transport.abort()
                await protocol.wait_for("connection_lost")
                assert protocol.exception is None
        assert len(await drain(reader)) < size


@pytest.mark.usefixtures("in_threads")
async def test_a_write_in_a_thread_shows_that_the_reader_has_gone(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            transport, protocol = await connect_writer(group, writer)
            reader.close()
            await settle(group)
            assert protocol.names == ["connection_made"]
            transport.write(b"x")
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, BrokenPipeError)
            assert contexts == []


@pytest.mark.usefixtures("in_threads")
async def test_windows_has_another_error_for_a_broken_pipe(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call fails as there: https://bugs.python.org/issue19612."""

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pipe() as (_, writer):
        async with TransportGroup() as group:
            monkeypatch.setattr(_threaded_pipe, "sys", SimpleNamespace(platform="win32"))
            monkeypatch.setattr(os, "write", fail)
            transport, protocol = await connect_writer(group, writer)
            transport.write(b"x")
            await protocol.wait_for("connection_lost")
            monkeypatch.undo()
            assert isinstance(protocol.exception, BrokenPipeError)


@pytest.mark.usefixtures("in_threads")
async def test_reading_that_is_paused_holds_one_chunk_back(anyio_backend: Any) -> None:
    with pipe() as (reader, writer):
        async with TransportGroup() as group:
            transport, protocol = await connect_reader(group, reader)
            transport.pause_reading()
            writer.write(b"first")
            await until(lambda: not leftover(reader))
            writer.write(b"second")
            await settle(group)
            assert protocol.received == b""
            assert leftover(reader) == len(b"second")
            for _ in range(3):
                transport.resume_reading()
                transport.pause_reading()
            transport.resume_reading()
            assert await protocol.wait_received(11) == b"firstsecond"
            transport.pause_reading()
            transport.resume_reading()
            writer.close()
            await protocol.wait_for("connection_lost")
            assert protocol.names[-2:] == ["eof_received", "connection_lost"]


def leftover(reader: Any) -> int:
    """Return how many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(reader.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("method", ["connect_read_pipe", "subprocess_exec"])
async def test_no_thread_can_be_started_for_a_pipe(
    anyio_backend: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("transports_anyio: pipe"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with anyio.fail_after(GUARD), pipe() as (reader, _):
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            monkeypatch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(OSError, match="no thread can be started"):
                if method == "connect_read_pipe":
                    await connect_reader(group, reader)
                else:
                    await group.subprocess_exec(Child, "cat")
            monkeypatch.undo()
        assert contexts == []


SILENT = """
import sys, anyio
from transports_anyio import Protocol, TransportGroup, _capabilities

_capabilities.polls_files = False

async def main():
    async with TransportGroup() as group:
        transport, _ = await group.connect_read_pipe(Protocol, sys.stdin)
        transport.close()
    print("left", flush=True)
"""


async def test_a_program_ends_although_a_thread_reads_its_input(anyio_backend: Any) -> None:
    """The interpreter waits for no thread of ours: a terminal may never be typed into."""
    read, write = os.pipe()
    try:
        result = await run_main(SILENT, anyio_backend, stdin=read, stderr=None)
        assert result.stdout == b"left\n"
    finally:
        os.close(read)
        os.close(write)


# -- groups in several threads -------------------------------------------------------------------------------

#: How often each of two threads uses the terminal and closes its transport.
ROUNDS_IN_THREADS = 300


def poller_of_a_thread() -> Poller:
    selector = make_system_selector()
    assert selector is not None
    return Poller(selector, TaskDriver(selector, anyio.current_time))


@pytest.mark.needs_polling("the file blocks all the time")
def test_g6_a_terminal_used_by_groups_in_two_threads(anyio_backend: Any) -> None:
    """One thread restores the open file's mode while the other starts to use it: the last one makes it blocking
    again."""
    name, options = anyio_backend
    first, second = os.openpty()
    failures: list[BaseException] = []
    meet = threading.Barrier(2)

    async def use() -> None:
        async with TransportGroup() as group:
            for _ in range(ROUNDS_IN_THREADS):
                transport, protocol = await group.connect_read_pipe(Recorder, open(os.dup(second), "rb", 0))
                assert not os.get_blocking(second)
                transport.close()
                await protocol.wait_for("connection_lost")

    def run() -> None:
        meet.wait(GUARD)
        try:
            anyio.run(use, backend=name, backend_options=options)
        except BaseException as exc:
            failures.append(exc)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert os.get_blocking(second)
        assert _pipe.open_channels == {}
    finally:
        sys.setswitchinterval(before)
        os.close(first)
        os.close(second)


def test_g6_shared_state_is_changed_under_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is stopped while it closes a channel: another thread must wait before it makes one."""
    reader, writer = os.pipe()
    half_way, go_on, made = threading.Event(), threading.Event(), threading.Event()
    original = os.set_blocking

    def set_blocking(descriptor: int, blocking: bool) -> None:
        if blocking and threading.current_thread() is closing:
            half_way.set()
            assert go_on.wait(GUARD)
        original(descriptor, blocking)

    def make() -> None:
        others.append(_pipe.PipeChannel(poller_of_a_thread(), open(os.dup(reader), "rb", 0), writing=False))
        made.set()

    others: list[Any] = []
    poller = poller_of_a_thread()
    channel = _pipe.PipeChannel(poller, open(reader, "rb", 0, closefd=False), writing=False)
    monkeypatch.setattr(os, "set_blocking", set_blocking)
    closing = threading.Thread(target=channel.close, kwargs={"aborted": True})
    making = threading.Thread(target=make)
    closing.start()
    assert half_way.wait(GUARD)
    making.start()
    assert not made.wait(0.1)
    go_on.set()
    closing.join()
    making.join()
    monkeypatch.undo()
    assert not os.get_blocking(reader)
    others[0].close(aborted=True)
    assert os.get_blocking(reader)
    for each in (poller, others[0]._poller):
        each.close()
    os.close(reader)
    os.close(writer)
