"""A pytest plugin: every event loop that asyncio makes is the one of `transports_anyio`, on trio.

    pytest -p on_trio

Other projects' tests make a loop, call `run_until_complete` again and again, and close it. Ours belongs to a trio
program, so trio runs as a guest of the thread that made the loop, and goes on only while that waits for a result.
"""

from __future__ import annotations

import asyncio
import queue
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import trio
from trio._core._run import GLOBAL_RUN_CONTEXT

from transports_anyio import open_event_loop
from transports_anyio._event_loop._loop import EventLoop

GUESTS: dict[EventLoop, Guest] = {}


class Guest:
    """A trio program that does nothing but to have an event loop open."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.loop: Any = None
        self.outcome: Any = None
        self.stopped = False
        # What trio keeps for the thread; each guest has its own, so that there may be several.
        self.context: dict[str, Any] = {}
        self.inside(self.start)
        self.pump(lambda: self.loop is not None)
        GUESTS[self.loop] = self

    def start(self) -> None:
        # So trio leaves Ctrl-C to the host: it may be closed in another thread, where it could not.
        handler = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if main:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        trio.lowlevel.start_guest_run(
            self.main,
            host_uses_signal_set_wakeup_fd=True,
            run_sync_soon_threadsafe=self.calls.put,
            done_callback=lambda outcome: setattr(self, "outcome", outcome),
        )
        if main:
            signal.signal(signal.SIGINT, handler)

    async def main(self) -> None:
        self.token, self.closing = trio.lowlevel.current_trio_token(), trio.Event()
        async with open_event_loop() as loop:
            self.loop = loop
            await self.closing.wait()

    def inside(self, call: Callable[[], object]) -> None:
        before = dict(GLOBAL_RUN_CONTEXT.__dict__)
        GLOBAL_RUN_CONTEXT.__dict__.clear()
        GLOBAL_RUN_CONTEXT.__dict__.update(self.context)
        try:
            call()
        finally:
            self.context = dict(GLOBAL_RUN_CONTEXT.__dict__)
            GLOBAL_RUN_CONTEXT.__dict__.clear()
            GLOBAL_RUN_CONTEXT.__dict__.update(before)

    def pump(self, until: Callable[[], object]) -> None:
        self.pumping = True
        try:
            while not until():
                if self.outcome is not None:
                    self.outcome.unwrap()
                    raise RuntimeError("Event loop stopped before Future completed.")
                self.inside(self.calls.get())
        finally:
            self.pumping = False


def run_until_complete(loop: EventLoop, future: Any) -> Any:
    guest = guest_of(loop)
    new = not asyncio.isfuture(future)
    future = asyncio.ensure_future(future, loop=loop)
    loop.call_soon_threadsafe(bool)
    try:
        guest.pump(lambda: future.done() or guest.stopped)
    except BaseException:
        if new and future.done() and not future.cancelled():
            future.exception()
        raise
    finally:
        guest.stopped = False
    if not future.done():
        raise RuntimeError("Event loop stopped before Future completed.")
    return future.result()


def run_forever(loop: EventLoop) -> None:
    guest = guest_of(loop)
    loop.call_soon_threadsafe(bool)
    guest.pump(lambda: guest.stopped)
    guest.stopped = False


def guest_of(loop: EventLoop) -> Guest:
    if loop.is_closed():
        raise RuntimeError("Event loop is closed")
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("Cannot run the event loop while another loop is running")
    # Some make a loop in one thread, and run it in another.
    loop._core.thread = threading.get_ident()
    return GUESTS[loop]


def stop(loop: EventLoop) -> None:
    if loop in GUESTS:
        GUESTS[loop].stopped = True


def close(loop: EventLoop) -> None:
    if loop.is_running():
        raise RuntimeError("Cannot close a running event loop")
    guest = GUESTS.pop(loop, None)
    if guest is not None and guest.outcome is None:
        loop._core.thread = threading.get_ident()
        guest.token.run_sync_soon(guest.closing.set)
        guest.pump(lambda: guest.outcome is not None)
        guest.outcome.unwrap()


EventLoop.is_running = lambda loop: loop in GUESTS and GUESTS[loop].pumping
EventLoop.run_until_complete = run_until_complete
EventLoop.run_forever = run_forever
EventLoop.stop = stop
EventLoop.close = close


def usable_outside(name: str) -> None:
    """Let a method be called while the loop does not run: it asks trio for the time."""
    method = getattr(EventLoop, name)

    def call(loop: EventLoop, *args: Any, **options: Any) -> Any:
        guest = GUESTS.get(loop)
        if guest is None or asyncio._get_running_loop() is loop or threading.get_ident() != loop._core.thread:
            return method(loop, *args, **options)
        result = None

        def inside() -> None:
            nonlocal result
            result = method(loop, *args, **options)

        guest.inside(inside)
        return result

    setattr(EventLoop, name, call)


for name in ("time", "call_soon", "call_later", "call_at", "create_task"):
    usable_outside(name)


class Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return Guest().loop


def install() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.set_event_loop_policy(Policy())
    try:
        import blockbuster
    except ImportError:
        return
    # It knows by their names the modules of asyncio that may read, write and send files.
    blockbuster.BlockBuster.activate = lambda self: None


install()
