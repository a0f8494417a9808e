"""`EventLoop`: the state of its thread, several threads, and forks."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from typing import Any

import pytest

from transports_anyio import EventLoop, from_asyncio
from transports_anyio._event_loop._sides import library

trio = pytest.importorskip("trio")


# The thread's state


def state() -> tuple[Any, ...]:
    return (
        asyncio._get_running_loop(),
        library.name,
        sys.get_asyncgen_hooks(),
        signal.getsignal(signal.SIGINT),
        trio.lowlevel.in_trio_run(),
    )


@pytest.mark.parametrize("wait", [0, 0.001])
def test_the_state_of_the_thread_is_as_before(ours: EventLoop, wait: float) -> None:
    def first(_: Any) -> None: ...

    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(first, first)
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    left, right = socket.socketpair()
    left.setblocking(False)
    signal.set_wakeup_fd(left.fileno())
    try:
        before = state()
        ours.run_until_complete(asyncio.sleep(wait))
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            ours.run_until_complete(fails_after(wait))
        assert state() == before
        assert signal.set_wakeup_fd(-1) == left.fileno()
    finally:
        signal.set_wakeup_fd(wakeup_fd)
        sys.set_asyncgen_hooks(*hooks)
        left.close()
        right.close()


async def fails_after(wait: float) -> None:
    await asyncio.sleep(wait)
    raise ZeroDivisionError


def test_asynchronous_generators_belong_to_the_loop(loop: asyncio.AbstractEventLoop) -> None:
    ended: list[str] = []

    async def numbers() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(0)
            ended.append("ended")

    async def begin() -> Any:
        generator = numbers()
        await generator.__anext__()
        return generator

    generator = loop.run_until_complete(begin())
    loop.run_until_complete(generator.__anext__())
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert ended == ["ended"]


# Several threads


def test_one_event_loop_in_two_threads_at_once(ours: EventLoop) -> None:
    """It is refused in the second one, and goes on in the first. asyncio 3.13.0 forgets then that it runs."""
    loop = ours
    failures: list[str] = []

    def elsewhere() -> None:
        future = loop.create_future()
        for call in (loop.run_forever, lambda: loop.run_until_complete(future), loop.close):
            try:
                call()
            except RuntimeError as exc:
                failures.append(str(exc))

    async def main() -> str:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0.001)
        thread.join()
        return "goes on"

    assert loop.run_until_complete(main()) == "goes on"
    running = "This event loop is already running"
    assert failures == [running, running, "Cannot close a running event loop"]


def test_one_event_loop_in_several_threads_in_turn(make: Any) -> None:
    loop = make()
    results: list[Any] = []
    for _ in range(3):
        thread = threading.Thread(
            target=lambda: results.append(loop.run_until_complete(asyncio.sleep(0.001, threading.get_ident())))
        )
        thread.start()
        thread.join()
    results.append(loop.run_until_complete(asyncio.sleep(0.001, "here")))
    assert len(results) == 4
    loop.close()


# fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_fork_has_loops_of_its_own(make: Any) -> None:
    """Between the calls, and with an event loop that the child makes."""
    loop = make()
    loop.run_until_complete(asyncio.sleep(0.001))
    child = os.fork()
    if child == 0:
        try:
            own = make()
            good = own.run_until_complete(asyncio.sleep(0.001, True)) and not own.is_running()
            own.close()
            os._exit(0 if good else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop.run_until_complete(asyncio.sleep(0.001, True))
    loop.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_in_a_running_event_loop(loop: asyncio.AbstractEventLoop) -> None:
    """The child has no running event loop."""

    async def main() -> int:
        await asyncio.sleep(0.001)
        child = os.fork()
        if child == 0:
            os._exit(0 if asyncio._get_running_loop() is None else 1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222

    assert loop.run_until_complete(main()) == 0


@pytest.mark.differs(
    "`EventLoop`: a child that is forked inside a call that has used trio",
    asyncio="may run a new event loop",
    here="may run asyncio's own; another `EventLoop` raises `RuntimeError`",
    why="its thread still counts as running trio",
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_fork_inside_a_call_cannot_run_trio(ours: EventLoop) -> None:
    async def main() -> int:
        await from_asyncio.run(trio.sleep, 0.001)
        child = os.fork()
        if child == 0:
            plain = asyncio.SelectorEventLoop()
            good = plain.run_until_complete(asyncio.sleep(0.001, True))
            plain.close()
            try:
                EventLoop().run_until_complete(asyncio.sleep(0.001))
            except RuntimeError as exc:
                os._exit(0 if good and "trio runs in this thread already" in str(exc) else 1)
            os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222

    assert ours.run_until_complete(main()) == 0
