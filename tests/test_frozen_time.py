"""freezegun, which gives a test another date and stops the clocks of the process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from freezegun import freeze_time
from support import GUARD

from transports_anyio import EventLoop, Protocol, TransportGroup, current_group, from_asyncio, run_asyncio
from transports_anyio.testing import Recorder

DATE = "2040-02-29"


def frozen() -> Any:
    """Stop the clocks, except for asyncio's own timers and for what trio calls."""
    return freeze_time(DATE, real_asyncio=True, ignore=["trio"])


class Late(Protocol):
    """Answers a little later."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        current_group().call_later(0.01, self.answer)

    def answer(self) -> None:
        self.transport.write(b"now")
        self.transport.close()


async def exchange(within: Callable[[], Any]) -> None:
    async with TransportGroup() as group:
        server = await group.create_server(Late, "127.0.0.1", 0)
        with within():
            transport, recorder = await group.create_connection(Recorder, *server.sockets[0].getsockname())
            transport.write(b"when?")
            with anyio.fail_after(GUARD):
                assert await recorder.wait_received(3) == b"now"
                await recorder.wait_for("connection_lost")
        server.close()


def test_a_group_that_is_opened_before(anyio_backend: Any) -> None:
    name, options = anyio_backend
    anyio.run(exchange, frozen, backend=name, backend_options=options)


def test_a_group_that_is_opened_meanwhile(anyio_backend: Any) -> None:
    name, options = anyio_backend
    with frozen():
        anyio.run(exchange, frozen, backend=name, backend_options=options)


async def use_timers() -> None:
    await asyncio.sleep(0.01)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.sleep(GUARD), 0.01)


async def freeze_and_use_timers() -> None:
    with frozen():
        await use_timers()


def test_an_event_loop_that_runs_before(anyio_backend: Any) -> None:
    name, options = anyio_backend
    run_asyncio(freeze_and_use_timers, backend=name, backend_options=options)


def test_an_event_loop_that_begins_meanwhile(anyio_backend: Any) -> None:
    name, options = anyio_backend
    with frozen():
        run_asyncio(use_timers, backend=name, backend_options=options)


@pytest.mark.parametrize("real_asyncio", [False, True])
def test_an_event_loop_that_is_made_meanwhile(real_asyncio: bool) -> None:
    trio = pytest.importorskip("trio")

    async def main() -> None:
        await use_timers()
        await from_asyncio.run(trio.sleep, 0.01)

    with freeze_time(DATE, real_asyncio=real_asyncio):
        loop = EventLoop()
        try:
            loop.run_until_complete(main())
        finally:
            loop.close()
