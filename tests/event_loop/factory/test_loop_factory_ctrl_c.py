"""`EventLoop`: Ctrl-C, and handlers of other signals."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any

import pytest
from network import needs_signals
from support import GUARD

from transports_anyio import EventLoop

pytest.importorskip("trio")

CTRL_C = """
import asyncio, os, signal, sys, threading, time
from transports_anyio import EventLoop

class EventLoopOnTrio(EventLoop):
    def _check_may_run(self):
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)

make = next(each for each in (asyncio.SelectorEventLoop, EventLoop, EventLoopOnTrio) if each.__name__ == sys.argv[1])

def press(after, times=1):
    def do():
        for _ in range(times):
            time.sleep(after)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=do, daemon=True).start()

def report(text):
    print(text, flush=True)

async def main():
    press(0.05)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        report("cancelled")
        await asyncio.sleep(0.001)
        report("cleaned up")
        raise
"""

IN_A_WAIT = """
with asyncio.Runner(loop_factory=make) as runner:
    try:
        runner.run(main())
    except KeyboardInterrupt:
        report("KeyboardInterrupt")
    report(runner.run(asyncio.sleep(0.001, "goes on")))
"""

IN_A_WAIT_WITHOUT_RUNNER = """
loop = make()
task = loop.create_task(main())
try:
    loop.run_until_complete(task)
except KeyboardInterrupt:
    report("KeyboardInterrupt")
task.cancel()
try:
    loop.run_until_complete(task)
except asyncio.CancelledError:
    report(loop.run_until_complete(asyncio.sleep(0.001, "goes on")))
loop.close()
"""

IN_A_CALLBACK = """
async def busy():
    try:
        await asyncio.sleep(0.01)
        press(0.05, times=2)
        while True:
            pass
    finally:
        report("left")
with asyncio.Runner(loop_factory=make) as runner:
    try:
        runner.run(busy())
    except KeyboardInterrupt:
        report("KeyboardInterrupt")
    report(runner.run(asyncio.sleep(0.001, "goes on")))
"""

HANDLER_OF_THE_LOOP = """
async def wait():
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, event.set)
    press(0.05)
    await event.wait()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    return "handled"
with asyncio.Runner(loop_factory=make) as runner:
    report(runner.run(wait()))
    report(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        pytest.param(IN_A_WAIT, "cancelled, cleaned up, KeyboardInterrupt, goes on", id="in a wait"),
        pytest.param(
            IN_A_WAIT_WITHOUT_RUNNER,
            "KeyboardInterrupt, cancelled, cleaned up, goes on",
            id="in a wait, without a runner",
        ),
        pytest.param(IN_A_CALLBACK, "left, KeyboardInterrupt, goes on", id="in a callback that does not end"),
        pytest.param(HANDLER_OF_THE_LOOP, "handled, True", id="with a handler of the event loop"),
    ],
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.Runner is new in Python 3.11")
@needs_signals
def test_ctrl_c(make: Any, program: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C + program, make.__name__],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert done.stdout.splitlines() == expected.split(", "), done.stderr
    assert done.returncode == 0


def test_ctrl_c_when_something_leaves_already(ours: EventLoop) -> None:
    """One of the two is raised, with the other one as its context, and nothing is left for the next call."""

    def leave() -> None:
        raise SystemExit("before")

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ours.call_soon(leave)
        ours.call_soon(signal.raise_signal, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            ours.run_forever()
        assert isinstance(caught.value.__context__, SystemExit)
        assert ours.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"
    finally:
        signal.signal(signal.SIGINT, handler)


@needs_signals
def test_a_handler_of_ctrl_c_that_is_set_during_a_call_stays(loop: asyncio.AbstractEventLoop) -> None:
    def handler(*_: object) -> None: ...

    before = signal.getsignal(signal.SIGINT)
    try:
        loop.call_soon(signal.signal, signal.SIGINT, handler)
        loop.run_until_complete(asyncio.sleep(0.001))
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@needs_signals
@pytest.mark.parametrize("error", [TimeoutError, SystemExit])
def test_what_the_handler_of_another_signal_raises_leaves_an_idle_wait(
    loop: asyncio.AbstractEventLoop, error: type[BaseException]
) -> None:
    """Python calls it in the middle of the wait."""

    def handler(*_: object) -> None:
        raise error("out")

    before = signal.signal(signal.SIGALRM, handler)
    task = loop.create_task(asyncio.sleep(GUARD))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(error, match="out"):
            loop.run_until_complete(task)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not loop.is_running()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    assert loop.run_until_complete(asyncio.sleep(0.001, "goes on")) == "goes on"


STORM = """
import asyncio, os, signal, sys, threading
from transports_anyio import EventLoop

class EventLoopOnTrio(EventLoop):
    def _check_may_run(self):
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)

times = int(sys.argv[2])
loop = (EventLoopOnTrio if sys.argv[1] == "with trio" else EventLoop)()
raised = handled = 0
stop = threading.Event()

def press():
    while not stop.wait(0.0007):
        os.kill(os.getpid(), signal.SIGINT)

def handler(*_):
    global handled
    handled += 1
    if loop.is_running():
        raise KeyboardInterrupt

seen = 0
async def work():
    global seen
    event = asyncio.Event()
    for _ in range(20):
        loop.call_soon(event.set)
        await event.wait()
        event.clear()
        await asyncio.sleep(0.0002)
        seen += 1

signal.signal(signal.SIGINT, handler)
task = loop.create_task(work())
thread = threading.Thread(target=press)
thread.start()
while raised < times or seen < times:
    try:
        while raised < times or seen < times:
            if task.done():
                if not task.cancelled():
                    task.exception()
                task = loop.create_task(work())
            loop.run_until_complete(asyncio.wait([task], timeout=0.01))
    except KeyboardInterrupt:
        raised += 1
stop.set()
thread.join()
signal.signal(signal.SIGINT, signal.SIG_IGN)
for each in asyncio.all_tasks(loop):
    each.cancel()
loop.run_until_complete(asyncio.sleep(0.01))
loop.close()
print("whole")
"""


@pytest.mark.differs(
    "`EventLoop`: Ctrl-C while the event loop's own code runs",
    asyncio="raises there",
    here="the signal handler runs as the next callback",
    why="an event loop that is interrupted half-way is broken",
)
@needs_signals
@pytest.mark.parametrize("times", [150, pytest.param(1000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("trio", ["with trio", "without trio"])
def test_a_storm_of_ctrl_c_leaves_the_event_loop_whole(trio: str, times: int) -> None:
    """Raised between any two lines of ours, it would break it sooner or later."""
    program = [sys.executable, "-W", "ignore", "-c", STORM, trio, str(times)]
    done = subprocess.run(program, check=False, capture_output=True, text=True, timeout=2 * GUARD)
    assert done.stdout == "whole\n", done.stderr
