"""What is measured inside one process: `python tasks.py PEER TASK [PORT]` prints microseconds of its processor time.

`request` sends a message and awaits its echo, `connect` opens and closes connections to PORT one after the other,
`spawn` runs `true`, `pipe` sends 64 MiB through `cat`, `timers` makes and cancels a timer, as a server does for each
message, and `pending` does so to each of 100,000 timers that are pending. `moved` moves a timer: by `reschedule`, or,
where there is none, by cancelling it and making another.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from servers import HOST, with_anyio

CONNECTIONS = 1500
REQUESTS = 20_000
MESSAGE = bytes(1024)
CHILDREN = 150
TIMERS = 100_000
PIECE = bytes(64 * 1024)
PIECES = 1024


class Ending(asyncio.Protocol):
    def __init__(self) -> None:
        self.ended = anyio.Event()

    def connection_made(self, transport: Any) -> None:
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


class Asking(asyncio.Protocol):
    """Have one request under way, and a future for its reply."""

    reply: Any

    def data_received(self, data: bytes) -> None:
        self.reply.set_result(data)


class Child(asyncio.SubprocessProtocol):
    """Feed the child's standard input, and count what comes out of it."""

    def __init__(self, pieces: int = 0, call_soon: Any = None) -> None:
        self.ended = anyio.Event()
        self.call_soon = call_soon
        self.pieces = pieces
        self.paused = False
        self.received = 0

    def connection_made(self, transport: Any) -> None:
        if self.pieces:
            self.stdin = transport.get_pipe_transport(0)
            self.feed()

    def feed(self) -> None:
        while self.pieces and not self.paused:
            self.pieces -= 1
            self.stdin.write(PIECE)
        if not self.pieces:
            # Not at once, inside `resume_writing`: asyncio would lose what is buffered.
            self.call_soon(self.stdin.close)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.feed()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.received += len(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


async def measured(count: int, once: Callable[[], Awaitable[object]]) -> float:
    for _ in range(max(count // 20, 1)):
        await once()
    gc.collect()
    before = time.process_time()
    for _ in range(count):
        await once()
    return (time.process_time() - before) / count * 1e6


async def with_transports(owner: Any, task: str, port: int) -> float:
    async def connect() -> None:
        _, protocol = await owner.create_connection(Ending, HOST, port)
        await protocol.ended.wait()

    async def spawn() -> None:
        _, protocol = await owner.subprocess_exec(Child, "true", stdin=None, stdout=None, stderr=None)
        await protocol.ended.wait()

    async def pipe() -> None:
        _, protocol = await owner.subprocess_exec(lambda: Child(PIECES, owner.call_soon), "cat", stderr=None)
        await protocol.ended.wait()
        assert protocol.received == len(PIECE) * PIECES

    if task == "request":
        transport, asking = await owner.create_connection(Asking, HOST, port)

        async def request() -> None:
            asking.reply = owner.create_future()
            transport.write(MESSAGE)
            await asking.reply

        result = await measured(REQUESTS, request)
        transport.close()
        return result
    if task == "timers":
        later = owner.call_later
        before = time.process_time()
        for _ in range(TIMERS):
            later(60, print).cancel()
        return (time.process_time() - before) / TIMERS * 1e6
    if task == "pending":
        later = owner.call_later
        handles = [later(60, print) for _ in range(TIMERS)]
        before = time.process_time()
        for number, handle in enumerate(handles):
            handle.cancel()
            handles[number] = later(60, print)
        used = time.process_time() - before
        for handle in handles:
            handle.cancel()
        return used / TIMERS * 1e6
    if task == "moved":
        handle = owner.call_later(60, print)
        move = getattr(handle, "reschedule", None)
        before = time.process_time()
        for _ in range(TIMERS):
            if move is None:
                handle.cancel()
                handle = owner.call_later(60, print)
            else:
                move(60)
        used = time.process_time() - before
        handle.cancel()
        return used / TIMERS * 1e6
    count, once = {"connect": (CONNECTIONS, connect), "spawn": (CHILDREN, spawn), "pipe": (3, pipe)}[task]
    return await measured(count, once)


async def in_loop(task: str, port: int) -> float:
    return await with_transports(asyncio.get_running_loop(), task, port)


async def in_group(task: str, port: int) -> float:
    from transports_anyio import TransportGroup

    async with TransportGroup() as group:
        return await with_transports(group, task, port)


async def with_trio_streams(task: str, port: int) -> float:
    import trio

    if task == "request":
        async with await trio.open_tcp_stream(HOST, port) as asking:

            async def request() -> None:
                await asking.send_all(MESSAGE)
                await asking.receive_some()

            return await measured(REQUESTS, request)

    async def connect() -> None:
        await (await trio.open_tcp_stream(HOST, port)).aclose()

    async def spawn() -> None:
        await trio.run_process(["true"], stdin=None)

    async def pipe() -> None:
        received = 0

        async def read(stream: Any) -> None:
            nonlocal received
            async for data in stream:
                received += len(data)

        async with trio.open_nursery() as nursery:
            process = await trio.lowlevel.open_process(["cat"], stdin=-1, stdout=-1)
            nursery.start_soon(read, process.stdout)
            assert process.stdin is not None
            for _ in range(PIECES):
                await process.stdin.send_all(PIECE)
            await process.stdin.aclose()
        await process.wait()
        assert received == len(PIECE) * PIECES

    count, once = {"connect": (CONNECTIONS, connect), "spawn": (CHILDREN, spawn), "pipe": (3, pipe)}[task]
    return await measured(count, once)


async def with_anyio_streams(task: str, port: int) -> float:
    async with await anyio.connect_tcp(HOST, port) as asking:

        async def request() -> None:
            await asking.send(MESSAGE)
            await asking.receive()

        return await measured(REQUESTS, request)


def main(peer: str, task: str, port: int) -> None:
    result: list[float] = []

    async def keep(function: Callable[[str, int], Awaitable[float]]) -> None:
        result.append(await function(task, port))

    if peer == "asyncio":
        asyncio.run(keep(in_loop))
    elif peer == "uvloop":
        import uvloop

        uvloop.run(keep(in_loop))
    elif peer == "trio":
        import trio

        trio.run(keep, with_trio_streams)
    elif peer == "trio-asyncio":
        import trio_asyncio

        trio_asyncio.run(trio_asyncio.aio_as_trio(keep), in_loop)
    elif peer.startswith("anyio streams"):
        with_anyio(lambda _: keep(with_anyio_streams), peer.partition("/")[2], "")
    else:
        with_anyio(lambda _: keep(in_group), peer.partition("/")[2], "")
    print(json.dumps(result[0]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
