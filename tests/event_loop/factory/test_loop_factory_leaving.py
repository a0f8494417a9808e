"""`EventLoop`: what leaves a call, and errors that end it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from typing import Any

import pytest
from network import needs_selector, needs_signals
from support import GUARD

from transports_anyio import EventLoop, new_event_loop

pytest.importorskip("trio")


# What leaves


@pytest.mark.differs(
    "`EventLoop`: a callback that raises `KeyboardInterrupt` or `SystemExit`",
    asyncio="raised at once",
    here="raised after the other callbacks of the iteration",
    why="everything that ends a call does so at the same place",
)
@pytest.mark.parametrize("wait", [0, 0.001])
@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_what_leaves_ends_the_call_and_not_the_loop(
    loop: asyncio.AbstractEventLoop, leaving: type[BaseException], wait: float
) -> None:
    def leave() -> None:
        raise leaving("out")

    async def leave_by_task() -> None:
        await asyncio.sleep(wait)
        raise leaving("out")

    async def wait_in_thread() -> None:
        await loop.run_in_executor(None, leave)

    loop.call_later(wait, leave)
    with pytest.raises(leaving, match="out"):
        loop.run_until_complete(asyncio.sleep(GUARD))
    for main in (leave_by_task, wait_in_thread):
        with pytest.raises(leaving, match="out"):
            loop.run_until_complete(main())
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    loop.run_until_complete(loop.shutdown_default_executor())


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "kind", ["soon", "thread", "reader", pytest.param("signal", marks=needs_signals), "done", "protocol"]
)
def test_what_leaves_a_callback_of_each_kind(
    loop: asyncio.AbstractEventLoop, kind: str, leaving: type[BaseException]
) -> None:
    """It leaves the call once, as itself, and the event loop goes on."""
    left, right = socket.socketpair()
    left.setblocking(False)
    transports: list[Any] = []

    def leave(*_: object) -> None:
        raise leaving(kind)

    class Leaves(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            transports.append(transport)

        def data_received(self, data: bytes) -> None:
            raise leaving(kind)

    async def main() -> None:
        if kind == "soon":
            loop.call_soon(leave)
        elif kind == "thread":
            loop.call_soon_threadsafe(leave)
        elif kind == "reader":
            loop.add_reader(left, lambda: leave(left.recv(1)))
            right.send(b"x")
        elif kind == "signal":
            loop.add_signal_handler(signal.SIGUSR1, leave)
            os.kill(os.getpid(), signal.SIGUSR1)
        elif kind == "done":
            future = loop.create_future()
            future.add_done_callback(leave)
            future.set_result(None)
        else:
            await loop.create_connection(Leaves, sock=left)
            right.send(b"x")
        await asyncio.sleep(GUARD)

    if kind == "signal" and sys.platform == "win32":
        pytest.skip("there is no SIGUSR1")
    task = loop.create_task(main())
    with pytest.raises(leaving, match=kind):
        loop.run_until_complete(task)
    assert not loop.is_running()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    if kind == "reader":
        loop.remove_reader(left)
    if kind == "protocol":
        transports[0].abort()
    if kind == "signal":
        loop.remove_signal_handler(signal.SIGUSR1)
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    left.close()
    right.close()


def test_an_error_that_is_never_retrieved_is_reported_at_once(loop: asyncio.AbstractEventLoop) -> None:
    """No frame between the loop and a callback keeps what the callback has dropped."""
    reports: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reports.append(context))

    async def fail() -> None:
        raise ZeroDivisionError

    async def main() -> list[str]:
        gc.collect()
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        del task
        await asyncio.sleep(0)
        return [report["message"] for report in reports]

    gc.disable()
    try:
        assert loop.run_until_complete(main()) == ["Task exception was never retrieved"]
    finally:
        gc.enable()


# A selector that fails


def ours_only(make: Any) -> None:
    if not issubclass(make, EventLoop):
        pytest.skip("there is no trio")


@pytest.mark.parametrize("wait", [0, 0.001])
def test_a_selector_that_fails_ends_the_call(make: Any, wait: float) -> None:
    """As in any run of the event loop: the call raises, and the next one has a new selector."""
    ours_only(make)
    loop = make()
    loop.call_later(wait, loop._poller.selector.close)
    with pytest.raises(ValueError, match=r"on closed|closed file"):
        loop.run_until_complete(asyncio.sleep(GUARD))
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    for task in asyncio.all_tasks(loop):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()


@needs_selector
def test_a_selector_that_is_lost_ends_the_call_and_the_clean_ups_run() -> None:
    """The user has closed its file descriptor."""
    loop = new_event_loop()

    async def main() -> None:
        await asyncio.sleep(0.01)
        os.close(loop._core.poller.selector.fileno())  # type: ignore[attr-defined]
        try:
            await asyncio.sleep(10 * GUARD)
        finally:
            await asyncio.sleep(0.001)
            await loop.run_in_executor(None, events.append, "thread")
            events.append("cleaned up")

    events: list[str] = []
    asyncio.set_event_loop(None)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.run_until_complete(main())
    (task,) = asyncio.all_tasks(loop)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()
    assert events == ["thread", "cleaned up"]
