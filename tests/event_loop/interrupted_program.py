"""A program on trio that a test interrupts by Ctrl-C at any moment: `python interrupted_program.py`.

It counts what begins and what ends, callbacks for example, and prints the differences.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import anyio

from transports_anyio import from_asyncio, run_asyncio

counts: Counter[str] = Counter()


class Counting(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        counts["made"] += 1
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[attr-defined]

    def connection_lost(self, exc: BaseException | None) -> None:
        counts["lost"] += 1


def called() -> None:
    counts["run"] += 1


async def backend_work() -> None:
    counts["open_scopes"] += 1
    try:
        await anyio.sleep(0.0005)
    finally:
        counts["open_scopes"] -= 1


async def work() -> None:
    loop = asyncio.get_running_loop()
    while True:
        counts["scheduled"] += 1
        loop.call_soon(called)
        await asyncio.sleep(0)
        await from_asyncio.run(backend_work)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Counting, "127.0.0.1", 0)
    transport, _ = await loop.create_connection(Counting, *server.sockets[0].getsockname()[:2])
    transport.write(b"x")
    tasks = [loop.create_task(work()) for _ in range(3)]
    sys.stdout.write("running\n")
    sys.stdout.flush()
    try:
        await asyncio.gather(*tasks)
    finally:
        await asyncio.sleep(0.001)
        counts["cleaned up"] += 1


try:
    run_asyncio(main)
except KeyboardInterrupt:
    print("KeyboardInterrupt")
print("callbacks lost:", counts["scheduled"] - counts["run"])
print("connections lost:", counts["lost"], "of", counts["made"])
print("scopes open:", counts["open_scopes"])
print("cleaned up:", counts["cleaned up"])
