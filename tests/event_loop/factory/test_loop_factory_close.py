"""`EventLoop`: closing it, and not closing it."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loop_factory_helpers import EventLoopOnTrio
from network import needs_pipes
from support import GUARD, HOST

from transports_anyio import EventLoop, from_asyncio

trio = pytest.importorskip("trio")


def test_after_close(make: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = make()
    loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    loop.close()
    assert loop.is_closed()
    future = loop.create_future()
    for call in (loop.run_forever, lambda: loop.run_until_complete(future), lambda: loop.call_soon(print)):
        with pytest.raises(RuntimeError, match="Event loop is closed"):
            call()


class Recorder(asyncio.Protocol):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def connection_made(self, transport: Any) -> None:
        self.calls.append("connection_made")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("connection_lost")


@pytest.mark.differs(
    "`EventLoop`: transports that are open at `close`",
    asyncio="stay open until they are collected, with a `ResourceWarning`",
    here="aborted, with the same `ResourceWarning`; no callback is called",
    why="otherwise their file descriptors stay open",
)
def test_close_from_another_thread_warns_and_calls_nothing(make: Any) -> None:
    """As asyncio's: it ran in a thread that has ended, with transports, timers and tasks that are left."""
    loop = make()
    recorder = Recorder()
    held: list[Any] = []

    async def open_all() -> None:
        server = await loop.create_server(Recorder, HOST, 0)
        held.append(await loop.create_connection(lambda: recorder, *server.sockets[0].getsockname()))
        held.append(server)
        loop.call_later(0.01, recorder.calls.append, "timer")

    thread = threading.Thread(target=loop.run_until_complete, args=[open_all()])
    thread.start()
    thread.join()
    loop.call_soon(recorder.calls.append, "callback")
    time.sleep(0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.close()
        held.clear()
        for _ in range(3):
            gc.collect()
    messages = [str(warning.message) for warning in caught if "transport" in str(warning.message)]
    assert messages
    assert all("unclosed transport <" in message for message in messages)
    assert all(warning.category is ResourceWarning for warning in caught)
    assert recorder.calls == ["connection_made"]


class RecorderOfAll(Recorder, asyncio.DatagramProtocol, asyncio.SubprocessProtocol):  # type: ignore[misc]
    def process_exited(self) -> None:
        self.calls.append("process_exited")

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.calls.append("pipe_connection_lost")


@needs_pipes
def test_close_ends_transports_of_each_kind() -> None:
    loop = EventLoop()
    recorders: list[RecorderOfAll] = []

    def make_protocol() -> RecorderOfAll:
        recorders.append(RecorderOfAll())
        return recorders[-1]

    async def open_all() -> Any:
        await loop.create_datagram_endpoint(make_protocol, (HOST, 0))
        reader, writer = os.pipe()
        await loop.connect_read_pipe(make_protocol, os.fdopen(reader, "rb", 0))
        await loop.connect_write_pipe(make_protocol, os.fdopen(writer, "wb", 0))
        server = await loop.create_server(make_protocol, HOST, 0)
        await loop.create_connection(make_protocol, *server.sockets[0].getsockname())
        child, _ = await loop.subprocess_exec(make_protocol, sys.executable, "-c", "input()")
        return child.get_extra_info("subprocess")

    before = os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []
    child = loop.run_until_complete(open_all())
    with pytest.warns(ResourceWarning, match="unclosed transport <") as caught:
        loop.close()
    assert len(caught) >= len(recorders)
    assert all(set(recorder.calls) <= {"connection_made"} for recorder in recorders)
    gc.collect()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before)
    assert child.wait(GUARD) != 0
    assert not trio.lowlevel.in_trio_run()


def test_an_unclosed_event_loop_warns(make: Any) -> None:
    loop = make()
    loop.run_until_complete(asyncio.sleep(0.001))
    gc.collect()
    with pytest.warns(ResourceWarning, match="unclosed event loop <"):
        del loop
        gc.collect()


def test_an_unclosed_event_loop_that_has_used_trio_warns() -> None:
    """Trio's hooks for asynchronous generators keep neither the event loop nor the trio run."""
    loop = EventLoop()
    loop.run_until_complete(from_asyncio.run(trio.sleep, 0))
    gc.collect()
    with pytest.warns(ResourceWarning, match="unclosed event loop <"):
        del loop
        gc.collect()


def test_an_unclosed_event_loop_does_not_keep_the_process(make: Any) -> None:
    if make is EventLoopOnTrio:
        pytest.skip("another test: with trio tasks under way")
    name = "EventLoop" if make is EventLoop else "SelectorEventLoop"
    module = "transports_anyio" if make is EventLoop else "asyncio"
    program = f"""
import asyncio
from {module} import {name}
loop = {name}()
task = loop.create_task(asyncio.sleep(60))
loop.run_until_complete(asyncio.start_server(print, "{HOST}", 0))
loop.run_until_complete(asyncio.sleep(0.001))
print("end")
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=GUARD)
    assert done.stdout == "end\n"
    assert done.returncode == 0, done.stderr


def test_the_default_executor_takes_no_more_after_close(make: Any) -> None:
    loop = make()
    loop.run_until_complete(loop.run_in_executor(None, int))
    threads = loop._default_executor._threads  # asyncio's has the same name
    loop.close()
    for thread in threads:
        thread.join(GUARD)
        assert not thread.is_alive()


def test_no_descriptor_is_left() -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("nothing tells which descriptors are open")

    def once() -> None:
        loop = EventLoop()
        loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()

    once()
    before = set(os.listdir("/proc/self/fd"))
    once()
    assert set(os.listdir("/proc/self/fd")) == before
