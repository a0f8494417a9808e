"""Work in threads: the event loop's executors and its resolver.

Holds: a mixin class of the event loop. It needs futures and `call_soon_threadsafe`.
May know: `asyncio`, `socket`, `_clock`, `_logger`.
"""

from __future__ import annotations

import asyncio
import socket
import warnings
from asyncio import iscoroutine
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from inspect import iscoroutinefunction
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from .._clock import monotonic
from ._logger import logger

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

ResultT = TypeVar("ResultT")


def check_callback(callback: object, method: str) -> None:
    """Raise asyncio's `TypeError` if `method` cannot call `callback`."""
    if iscoroutine(callback) or iscoroutinefunction(callback):
        raise TypeError(f"coroutines cannot be used with {method}()")
    if not callable(callback):
        raise TypeError(f"a callable object was expected by {method}(), got {callback!r}")


class Threads(asyncio.AbstractEventLoop):
    """Executors and the resolver of an event loop."""

    #: In seconds.
    slow_callback_duration: float = 0.1

    def __init__(self) -> None:
        super().__init__()
        self._default_executor: ThreadPoolExecutor | None = None
        self._executor_shut_down = False

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], ResultT], *args: Unpack[Ts]
    ) -> asyncio.Future[ResultT]:
        """Call `func(*args)` in a thread of `executor` (`None`: the default executor). Return a future of the result.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.run_in_executor
        """
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        if self.get_debug():
            check_callback(func, "run_in_executor")
        if executor is None:
            if self._executor_shut_down:
                raise RuntimeError("Executor shutdown has been called")
            executor = self._default_executor
            if executor is None:
                executor = self._default_executor = ThreadPoolExecutor(thread_name_prefix="asyncio")
        return asyncio.wrap_future(executor.submit(func, *args), loop=self)

    def set_default_executor(self, executor: ThreadPoolExecutor) -> None:  # type: ignore[override]  # as asyncio
        """Use `executor` as the default one. Raises `TypeError` unless it is a `ThreadPoolExecutor`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_default_executor
        """
        if not isinstance(executor, ThreadPoolExecutor):
            raise TypeError("executor must be ThreadPoolExecutor instance")
        self._default_executor = executor

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait until the threads of the default executor have ended, for `timeout` seconds at most.

        `run_in_executor(None, …)` raises `RuntimeError` from now on. If the time is over first, a `RuntimeWarning` is
        given.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.shutdown_default_executor
        """
        self._executor_shut_down = True
        executor = self._default_executor
        if executor is None:
            return
        ended: Future[None] = Future()

        def shut_down() -> None:
            try:
                executor.shutdown(wait=True)
            except BaseException as exc:
                ended.set_exception(exc)
            else:
                ended.set_result(None)

        waiter = asyncio.wrap_future(ended, loop=self)
        thread = Thread(target=shut_down)
        thread.start()
        await asyncio.wait([waiter], timeout=timeout)
        if waiter.done():
            thread.join()
            waiter.result()
            return
        warnings.warn(
            f"The threads of the default executor have not ended within {timeout} seconds.",
            RuntimeWarning,
            stacklevel=2,
        )
        executor.shutdown(wait=False)

    async def getaddrinfo(
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002  # asyncio's name
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """Call `socket.getaddrinfo` in a thread. Raises `socket.gaierror` if the name cannot be resolved.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.getaddrinfo
        """
        resolve = self._getaddrinfo_logged if self.get_debug() else socket.getaddrinfo
        return await self.run_in_executor(None, resolve, host, port, family, type, proto, flags)

    def _getaddrinfo_logged(self, host: Any, port: Any, *options: int) -> list[Any]:
        given = zip(("family", "type", "proto", "flags"), options, strict=True)
        safe_repr = ", ".join([f"{host}:{port!r}", *(f"{name}={value!r}" for name, value in given if value)])
        logger.debug("Get address info %s", safe_repr)
        start = monotonic()
        found = socket.getaddrinfo(host, port, *options)
        duration = monotonic() - start
        log = logger.info if duration >= self.slow_callback_duration else logger.debug
        log("Getting address info %s took %.3f ms: %r", safe_repr, duration * 1e3, found)
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
        """Call `socket.getnameinfo` in a thread.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.getnameinfo
        """
        return await self.run_in_executor(None, socket.getnameinfo, sockaddr, flags)
