"""Ctrl-C while a task is about to wait: the group still ends in order."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from network import needs_signals, run_program
from support import Stack

from transports_anyio._waiters import wake_future

pytestmark = [pytest.mark.anyio, pytest.mark.ours_only("the other process uses a group")]


@pytest.mark.parametrize(
    "where",
    [
        "serve_forever",
        "wait_closed of the server",
        "wait_closed of the group",
        "leaving",
        "sendfile",
        "handshake",
        "start_tls",
    ],
)
async def test_interrupted_between_registering_and_waiting(stack: Stack, where: str) -> None:
    if stack.name != "trio":
        pytest.skip("only trio interrupts a task there")
    output = await run_program(sys.executable, str(Path(__file__).with_name("interrupted.py")), where)
    *before, last = output.decode().splitlines()
    assert last == "KeyboardInterrupt"
    assert set(before) == {"connection_lost"}


@pytest.mark.parametrize("where", ["receive", "async for", "send", "aclose", "datagrams"])
async def test_interrupted_where_an_anyio_object_over_a_transport_waits(stack: Stack, where: str) -> None:
    if stack.name != "trio":
        pytest.skip("only trio interrupts a task there")
    output = await run_program(sys.executable, str(Path(__file__).with_name("interrupted.py")), where)
    # The protocol of a transport with a stream gets no more callbacks.
    before = {"aclose": ["closed"], "datagrams": ["connection_lost"]}.get(where, [])
    assert output.decode().split() == [*before, "KeyboardInterrupt"]


@pytest.mark.parametrize("where", ["aborting", "losing"])
async def test_interrupted_while_everything_is_aborted(stack: Stack, where: str) -> None:
    if stack.name != "trio":
        pytest.skip("only trio interrupts a task there")
    output = await run_program(sys.executable, str(Path(__file__).with_name("interrupted.py")), where)
    assert output.decode().split() == ["connection_lost", "KeyboardInterrupt"]


@needs_signals
async def test_interrupted_while_a_task_is_woken(stack: Stack) -> None:
    """On asyncio Ctrl-C cancels the main task in a signal handler: between any two steps of what wakes it."""
    if stack.name == "trio":
        pytest.skip("a future of asyncio's")
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    interrupts = 0

    def interrupt(*_: Any) -> None:
        nonlocal interrupts
        interrupts += 1
        future.cancel()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 50e-6, 50e-6)
        end = time.monotonic() + 0.2
        while time.monotonic() < end or not interrupts:
            future = loop.create_future()
            wake_future(future)
            assert future.done()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
