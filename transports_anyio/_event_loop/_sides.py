"""Which code calls, asyncio code or backend code, and which event loop it means.

Holds: the context variable with the event loop of backend code, and the checks.
May know: `asyncio`, `sniffio`, `_loop`.
"""

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
#: In it `anyio.run` names the backend.
library_variable: ContextVar[Any]
try:
    # trio and our event loop set their names in it. `asyncio.get_running_loop` is not enough: in trio's guest mode a
    # loop is running that has nothing to do with backend code.
    import sniffio

    library = sniffio.thread_local
    library_variable = sniffio.current_async_library_cvar
except ImportError:  # Then there is no trio.
    library = SimpleNamespace(name=None)
    library_variable = ContextVar("current_async_library_cvar", default=None)

#: The event loop that backend code finds. `open_event_loop` sets it.
current_loop: ContextVar[EventLoop] = ContextVar("transports_anyio.current_event_loop")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop if asyncio code calls this, otherwise `None`."""
    return _get_running_loop() if library.name in (None, "asyncio") else None


def loop_of_backend_code(name: str) -> EventLoop:
    """Return the event loop of backend code. Raises `RuntimeError`, which names the function, if there is none."""
    loop = current_loop.get(None)
    if loop is None or loop.is_closed():
        raise RuntimeError(
            f"{name}() found no event loop: call it inside `async with transports_anyio.open_event_loop():`, or let "
            "transports_anyio.run_asyncio() run the program"
        )
    if get_ident() != loop._core.thread and not loop._spawner.ending:  # The caller checks that.
        raise RuntimeError(
            f"{name}() was called in another thread than the event loop's: use asyncio.run_coroutine_threadsafe(), "
            "loop.call_soon_threadsafe(), or one of anyio.from_thread's functions"
        )
    return loop
