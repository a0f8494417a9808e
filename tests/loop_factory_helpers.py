"""Helpers for the tests of `EventLoop` in `event_loop/factory/`: its variants, and what a server does."""

from __future__ import annotations

import asyncio

from transports_anyio import EventLoop


class EventLoopOnTrio(EventLoop):
    """trio runs from the beginning of each call on, as it does after the first call of backend code."""

    def _check_may_run(self) -> None:
        super()._check_may_run()
        self._core.ready.appendleft(self._core.need_trio)


FACTORIES = {"oracle": asyncio.SelectorEventLoop, "without trio": EventLoop, "with trio": EventLoopOnTrio}


async def echo_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line.upper())
    writer.close()
