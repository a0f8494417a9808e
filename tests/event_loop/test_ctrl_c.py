"""Ctrl-C at random moments, from another process, loses no callback and no clean-up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from network import needs_signals


@needs_signals
@pytest.mark.parametrize("rounds", [4, pytest.param(24, marks=pytest.mark.exhaustive)])
def test_ctrl_c_at_random_moments(rounds):
    pytest.importorskip("trio")
    moments = random.Random(rounds)
    # Python warns of a coroutine if the signal comes between making it and awaiting it: here of `sleep`, of
    # `sleep_forever`, and of the function that the program gives to `from_asyncio.run`.
    names = ("sleep", "backend_work")
    warnings = [option for name in names for option in ("-W", f"ignore:coroutine '{name}:RuntimeWarning")]
    program = [sys.executable, "-u", *warnings, str(Path(__file__).with_name("interrupted_program.py"))]
    for _ in range(rounds):
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout.readline() == "running\n"
            time.sleep(moments.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=30)
        assert output.splitlines() == [
            "KeyboardInterrupt",
            "callbacks lost: 0",
            "connections lost: 2 of 2",
            "scopes open: 0",
            "cleaned up: 1",
        ], output
        assert process.returncode == 0


@needs_signals
@pytest.mark.parametrize("where", ["body", "task", "callback"])
def test_ctrl_c_ends_the_block_as_itself(where):
    """In backend code, in an asyncio task and in a callback: everything is cleaned up."""
    trio = pytest.importorskip("trio")
    import asyncio

    from transports_anyio import open_event_loop, to_asyncio

    events = []

    async def background():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            events.append("background")

    async def foreground():
        loop = asyncio.get_running_loop()
        try:
            if where == "callback":
                loop.call_soon(signal.raise_signal, signal.SIGINT)
            elif where == "task":
                signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            events.append("foreground")

    async def main():
        async with open_event_loop() as loop:
            keep = to_asyncio.run_sync(lambda: loop.create_task(background()))
            await to_asyncio.run(asyncio.sleep, 0)
            try:
                if where == "body":
                    signal.raise_signal(signal.SIGINT)
                    await trio.sleep(3600)
                await to_asyncio.run(foreground)
            finally:
                events.append("body")
        del keep

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert events == (["body", "background"] if where == "body" else ["foreground", "body", "background"])


def test_a_second_ctrl_c_while_the_event_loop_ends_breaks_nothing():
    trio = pytest.importorskip("trio")
    import asyncio

    from transports_anyio import open_event_loop, to_asyncio

    events = []

    async def stubborn():
        try:
            await asyncio.sleep(3600)
        finally:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0.01)
            events.append("cleaned up")

    async def main():
        async with open_event_loop() as loop:
            keep = to_asyncio.run_sync(lambda: loop.create_task(stubborn()))
            await to_asyncio.run(asyncio.sleep, 0)
            signal.raise_signal(signal.SIGINT)
        del keep

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert events == ["cleaned up"]


def test_ctrl_c_between_two_iterations():
    """At each line of the driver and of the core, outside of callbacks."""
    trio = pytest.importorskip("trio")
    import asyncio

    from transports_anyio import from_asyncio, open_event_loop, to_asyncio
    from transports_anyio._event_loop._core import LoopCore
    from transports_anyio._trio import TrioDriver

    events = []

    async def work(scope):
        events.append("begun")
        try:
            for _ in range(20):
                await asyncio.sleep(0.001)
            from_asyncio.run_sync(scope.cancel)  # Not after some time: on a busy machine nothing might have begun.
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.001)
            events.append("cleaned up")

    async def main(code, line):
        async with open_event_loop():
            await to_asyncio.run(asyncio.sleep, 0)

            def trace(frame, event, _):
                if frame.f_code is code and frame.f_lineno == line and event == "line":
                    sys.settrace(None)
                    events.append("interrupted")
                    signal.raise_signal(signal.SIGINT)
                return trace

            for frame in sys._current_frames().values():
                frame.f_trace = trace
            sys.settrace(trace)
            with trio.CancelScope() as scope:
                await to_asyncio.run(work, scope)
            sys.settrace(None)

    reached = 0
    alarm = next(each for each in TrioDriver.run.__code__.co_consts if getattr(each, "co_name", "") == "alarm")
    driver = (TrioDriver.run, TrioDriver._run, TrioDriver._watch, TrioDriver._alarm, TrioDriver._run_iterations)
    core = (LoopCore._run_scheduler, LoopCore.run_once, LoopCore.call)
    for code in (alarm, *(each.__code__ for each in (*driver, TrioDriver.wait_until, TrioDriver.wake, *core))):
        for line in sorted({line for _, _, line in code.co_lines() if line}):
            events.clear()
            try:
                trio.run(main, code, line)
            except KeyboardInterrupt:
                assert events.count("interrupted") == 1
                assert events.count("cleaned up") == events.count("begun")  # It may be too early for both.
                reached += 1
            else:
                assert events == ["begun", "cleaned up"]
            finally:
                sys.settrace(None)
    assert reached >= 10
