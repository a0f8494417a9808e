"""`open_event_loop`: backend tasks that asyncio code starts when the event loop has nearly ended."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import GUARD

pytest.importorskip("trio")

LATE = """
import asyncio, sys
import trio
from transports_anyio import from_asyncio, open_event_loop, to_asyncio

tasks = []
reports = []
waits_for, = sys.argv[1:]

async def backend():
    try:
        if waits_for == "trio":
            await trio.sleep_forever()
        elif waits_for == "asyncio":
            await to_asyncio.run(asyncio.sleep, 1000)
        elif waits_for == "shielded":
            with trio.CancelScope(shield=True):
                await to_asyncio.run(asyncio.sleep, 1000)
        else:
            try:
                await to_asyncio.run(asyncio.sleep, 1000)
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.001)
                if waits_for == "fails":
                    raise ZeroDivisionError
                if waits_for == "leaves":
                    raise SystemExit
                to_asyncio.run_sync(print, "not called")
    except BaseException as exc:
        print(type(exc).__name__)
        raise

async def hands_on(rounds):
    \"""Leave another task behind, as often as tasks are cancelled at the end.\"""
    try:
        await asyncio.sleep(1000)
    finally:
        another = hands_on(rounds - 1) if rounds else from_asyncio.run(backend)
        tasks.append(asyncio.create_task(another))
        await asyncio.sleep(0.05)

async def main():
    async with open_event_loop() as loop:
        loop.set_exception_handler(lambda _, context: reports.append(context))
        tasks.append(to_asyncio.run_sync(asyncio.ensure_future, hands_on(2)))
        await trio.sleep(0.01)
    print("left", *(repr(context["exception"]) for context in reports))
    await trio.sleep(0.001)

trio.run(main)
print("end")
"""


def lines_of(waits_for: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LATE, waits_for], check=False, capture_output=True, text=True, timeout=GUARD
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("waits_for", "raised"),
    [("trio", "Cancelled"), ("asyncio", "Cancelled"), ("shielded", "RuntimeError"), ("crosses", "RuntimeError")],
)
def test_backend_tasks_that_are_under_way_at_the_end_are_cancelled(waits_for: str, raised: str) -> None:
    """Their asyncio tasks began after the last round in which tasks are cancelled. They stay pending, as in asyncio."""
    lines = lines_of(waits_for)
    reported = [] if raised == "Cancelled" else [lines[1].removeprefix("left ")]
    assert lines == [raised, " ".join(["left", *reported]), "end"]
    assert all("RuntimeError(" in report for report in reported)


def test_what_they_raise_is_reported() -> None:
    assert lines_of("fails") == ["ZeroDivisionError", "left ZeroDivisionError()", "end"]


def test_what_leaves_them_leaves_the_block() -> None:
    assert lines_of("leaves") == ["SystemExit"]
