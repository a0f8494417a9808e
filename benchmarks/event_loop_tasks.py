"""The small tasks of bench_event_loop.py: `python event_loop_tasks.py PEER TASK` prints microseconds."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

COUNT = 20_000
SLOW_COUNT = 4_000
CALL_COUNT = 1_000


async def call_soon() -> None:
    """A thousand callbacks at a time, as they come from a thousand connections."""
    loop = asyncio.get_running_loop()
    for _ in range(COUNT // 1000):
        for _ in range(999):
            loop.call_soon(int)
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future


async def sleep() -> None:
    for _ in range(COUNT):
        await asyncio.sleep(0)


async def future() -> None:
    loop = asyncio.get_running_loop()
    for _ in range(COUNT):
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future


async def timer() -> None:
    """A time-out for each message."""
    loop = asyncio.get_running_loop()
    for number in range(COUNT):
        loop.call_later(60, int).cancel()
        if number % 1000 == 0:
            await asyncio.sleep(0)


async def nothing() -> None: ...


async def create_task() -> None:
    for _ in range(COUNT):
        await asyncio.create_task(nothing())


TASKS = {"call_soon": call_soon, "sleep(0)": sleep, "future": future, "timer": timer, "create_task": create_task}


async def waits() -> None:
    await asyncio.sleep(0.001)


async def calls_trio() -> None:
    from transports_anyio import from_asyncio

    from_asyncio.run_sync(int)


#: Calls of `run_until_complete`, one after the other.
CALLS = {
    "run_until_complete": nothing,
    "run_until_complete, waiting": waits,
    "run_until_complete, from_asyncio": calls_trio,
}


def calls(new_loop: Callable[[], asyncio.AbstractEventLoop], function: Callable[[], Any]) -> float:
    loop = new_loop()
    try:
        for count in (CALL_COUNT // 4, CALL_COUNT):
            gc.collect()
            before = time.process_time()
            for _ in range(count):
                loop.run_until_complete(function())
            spent = time.process_time() - before
    finally:
        loop.close()
    return spent


async def repeat(crossing: Callable[[], Awaitable[object]]) -> None:
    for _ in range(SLOW_COUNT):
        await crossing()


async def timed(function: Callable[..., Awaitable[object]], *args: Any) -> float:
    await function(*args)
    gc.collect()
    before = time.process_time()
    await function(*args)
    return time.process_time() - before


async def on_trio(crossing: str) -> float:
    """Measure crossings by `to_asyncio` and `from_asyncio`."""
    import anyio

    from transports_anyio import from_asyncio, open_event_loop, to_asyncio

    async with open_event_loop():
        if crossing == "to_asyncio.run":
            return await timed(repeat, lambda: to_asyncio.run(nothing))

        async def from_there() -> float:
            return await timed(repeat, lambda: from_asyncio.run(nothing))

        await anyio.lowlevel.checkpoint()
        return await to_asyncio.run(from_there)


async def on_trio_asyncio(crossing: str) -> float:
    """Measure the same crossings by trio-asyncio."""
    from trio_asyncio import aio_as_trio, open_loop, trio_as_aio

    async with open_loop():
        if crossing == "to_asyncio.run":
            return await timed(repeat, aio_as_trio(nothing))

        async def from_there() -> float:
            return await timed(repeat, trio_as_aio(nothing))

        return await aio_as_trio(from_there)()


async def timed_on_trio(function: Callable[[], Awaitable[object]]) -> float:
    from transports_anyio import from_asyncio

    from_asyncio.run_sync(int)
    return await timed(function)


def factory(peer: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if peer == "asyncio":
        return asyncio.SelectorEventLoop
    if peer == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    from transports_anyio import EventLoop

    return EventLoop


def main(peer: str, task: str) -> float:
    if task in CALLS:
        return calls(factory(peer), CALLS[task]) / CALL_COUNT * 1e6
    if task not in TASKS:
        import trio

        return trio.run(on_trio if peer == "ours/trio" else on_trio_asyncio, task) / SLOW_COUNT * 1e6
    function = TASKS[task]
    if peer == "ours/trio":
        from transports_anyio import run_asyncio

        spent = run_asyncio(timed, function, backend="trio")
    elif peer == "trio-asyncio":
        import trio_asyncio

        spent = trio_asyncio.run(trio_asyncio.aio_as_trio(timed), function)
    else:
        with asyncio.Runner(loop_factory=factory(peer)) as runner:
            spent = runner.run((timed_on_trio if peer == "factory, trio runs" else timed)(function))
    return spent / COUNT * 1e6


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))
