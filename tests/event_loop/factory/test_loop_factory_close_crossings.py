"""`EventLoop`: trio tasks that wait for asyncio code when the trio run ends, with `close` or a call.

No callback of asyncio's runs any more then. Each test is a program, because one that fails would wait for ever.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import GUARD

pytest.importorskip("trio")


def output_of(program: str, *args: str) -> list[str]:
    """Return the lines that `program` prints."""
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", program, *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=GUARD)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CLOSED = """
import asyncio, gc, sys, time
import trio
from contextlib import asynccontextmanager
from transports_anyio import EventLoop, from_asyncio, to_asyncio

steps = []
reports = []


async def asyncio_code(seconds=1000):
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        steps.append("asyncio cancelled")
        await asyncio.sleep(1000)


@asynccontextmanager
async def manager():
    try:
        yield
    finally:
        steps.append("manager left")
        await asyncio.sleep(1000)


async def waits():
    await to_asyncio.run(asyncio_code)


async def nested():
    await to_asyncio.run(from_asyncio.run, waits)


async def shielded():
    with trio.CancelScope(shield=True):
        try:
            await to_asyncio.run(asyncio_code)
        except RuntimeError as exc:
            steps.append(str(exc))
            await trio.sleep(0.001)  # A shielded clean-up may still wait for trio.
            raise


async def crosses_again():
    try:
        await to_asyncio.run(asyncio_code)
    finally:
        with trio.CancelScope(shield=True):
            for cross in (to_asyncio.run, to_asyncio.run_sync):
                try:
                    await cross(steps.append, "not called")
                except RuntimeError as exc:
                    steps.append(str(exc))


async def in_a_manager():
    async with to_asyncio.wrap_async_context_manager(manager()):
        await trio.sleep_forever()


async def begins():
    await trio.sleep_forever()


async def cancelled_before():
    with trio.CancelScope() as scopes["before"]:
        await to_asyncio.run(asyncio_code)


async def cancelled_at_last():
    with trio.CancelScope() as scopes["at last"]:
        await to_asyncio.run(asyncio_code)


async def on_trio(function):
    try:
        await function()
    except BaseException as exc:
        steps.append(type(exc).__name__)
        raise


async def main(names):
    for name in names:
        tasks.append(asyncio.create_task(from_asyncio.run(on_trio, globals()[name])))
    await asyncio.sleep(0.05)
    if "before" in scopes:
        from_asyncio.run_sync(scopes["before"].cancel)
        await asyncio.sleep(0.01)
    if "begins" in names:
        tasks.append(asyncio.create_task(from_asyncio.run(on_trio, waits)))
        await asyncio.sleep(0)  # Its trio task has been started, and has not run yet.
    if "at last" in scopes:
        from_asyncio.run_sync(scopes["at last"].cancel)  # It would reach asyncio code in the next iteration.


scopes = {}
tasks = []
loop = EventLoop()
loop.set_exception_handler(lambda _, context: reports.append(context["message"]))
loop.run_until_complete(main(sys.argv[1:]))
before = time.monotonic()
loop.close()
assert time.monotonic() - before < 5
assert not trio.lowlevel.in_trio_run()
assert not any(task.done() for task in tasks)
print(*sorted(steps), sep="\\n")
tasks.clear()
gc.collect()
assert set(reports) <= {"Task was destroyed but it is pending!", "Answer exception was never retrieved"}, reports
assert "Task was destroyed but it is pending!" in reports
"""

STOPPED = "the event loop runs no asyncio code any more: its trio tasks end"


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["waits"], ["Cancelled"]),
        (["waits"] * 3, ["Cancelled"] * 3),
        (["nested"], ["Cancelled"]),
        (["in_a_manager"], ["Cancelled"]),
        (["cancelled_before"], ["Cancelled", "asyncio cancelled"]),
        (["begins"], ["Cancelled", "Cancelled"]),
        (["cancelled_at_last"], ["Cancelled"]),
        (["shielded"], ["RuntimeError", STOPPED]),
        (["crosses_again"], ["Cancelled", STOPPED, STOPPED]),
        (["waits", "shielded", "nested"], ["Cancelled", "Cancelled", "RuntimeError", STOPPED]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_close_gives_up_what_trio_tasks_wait_for(names: list[str], steps: list[str]) -> None:
    """They are cancelled; what is shielded from that gets an error. Tasks of asyncio's stay as they are."""
    assert output_of(CLOSED, *names) == sorted(steps)


UNCLOSED = """
import asyncio
from transports_anyio import EventLoop, from_asyncio, to_asyncio

async def on_trio():
    await to_asyncio.run(asyncio.sleep, 1000)

async def main():
    tasks.append(asyncio.create_task(from_asyncio.run(on_trio)))
    await asyncio.sleep(0.01)

tasks = []
loop = EventLoop()
loop.run_until_complete(main())
print("end")
"""


def test_an_unclosed_event_loop_whose_trio_tasks_wait_for_asyncio_code_does_not_keep_the_process() -> None:
    assert output_of(UNCLOSED) == ["end"]


GENERATOR = """
import asyncio
from contextlib import asynccontextmanager
from transports_anyio import EventLoop, from_asyncio, to_asyncio

@asynccontextmanager
async def manager():
    try:
        yield
    finally:
        await asyncio.sleep(0.001)
        print("left")

async def generator():
    async with to_asyncio.wrap_async_context_manager(manager()):
        yield

async def on_trio():
    generators.append(generator())
    await generators[0].__anext__()

generators = []
loop = EventLoop()
loop.run_until_complete(from_asyncio.run(on_trio))
print("between the calls")
loop.run_until_complete(asyncio.sleep(0.01))
print(loop.run_until_complete(from_asyncio.run(to_asyncio.run, asyncio.sleep, 0, "goes on")))
loop.close()
"""


def test_a_generator_of_trios_that_ends_with_the_call_leaves_the_rest_to_the_next_one() -> None:
    """trio ends it when its run ends, and cannot wait for the asyncio task, which goes on in the next call."""
    assert output_of(GENERATOR) == ["between the calls", "left", "goes on"]
