"""Which side calls, asyncio code or backend code, and which event loop it means."""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from contextvars import ContextVar
from threading import get_ident
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._loop import EventLoop

library: Any
#: Where `anyio.run` says which backend runs.
library_variable: ContextVar[Any]
try:
    # trio says so here, and our own event loop, too: in trio's guest mode there is a running event loop that backend
    # code has nothing to do with.
    import sniffio

    library = sniffio.thread_local
    library_variable = sniffio.current_async_library_cvar
except ImportError:  # Then there is no trio.
    library = SimpleNamespace(name=None)
    library_variable = ContextVar("current_async_library_cvar", default=None)

#: The event loop that `open_event_loop` has made for backend code.
current_loop: ContextVar[EventLoop] = ContextVar("transports_anyio.current_event_loop")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop if asyncio code calls, `None` for anything else."""
    return _get_running_loop() if library.name in (None, "asyncio") else None


def loop_of_backend_code(name: str) -> EventLoop:
    """Return the event loop that backend code means. Raises `RuntimeError`, for the function `name`, without one."""
    loop = current_loop.get(None)
    if loop is None or loop.is_closed():
        raise RuntimeError(
            f"{name}() found no event loop: call it inside `async with transports_anyio.open_event_loop():`, or let "
            "transports_anyio.run_asyncio() run the program"
        )
    if get_ident() != loop._core.thread:
        raise RuntimeError(
            f"{name}() was called in another thread than the event loop's: use asyncio.run_coroutine_threadsafe(), "
            "loop.call_soon_threadsafe(), or one of anyio.from_thread's functions"
        )
    return loop
