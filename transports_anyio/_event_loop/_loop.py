"""The event loop: the methods of `asyncio.AbstractEventLoop`.

Holds: scheduling, futures and tasks, error handling, the debug mode. The other modules of this folder and the endpoint
functions add the rest as mixin classes.
May know: `anyio`, `asyncio`, `os`, `_core`, `_crossing`, `_driver`, `_endpoints`, `_handles`, `_logger`, `_mistakes`,
`_poller`, `_readers`, `_signals`, `_sock_methods`, `_threads`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
import warnings
from asyncio import iscoroutine
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import AsyncExitStack
from contextvars import Context
from functools import partial
from math import inf
from threading import get_ident
from types import ModuleType
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

import anyio

from .._driver import Driver
from .._endpoints._datagrams import DatagramEndpoints
from .._endpoints._pipes import PipeEndpoints
from .._endpoints._processes import ProcessEndpoints
from .._endpoints._sendfile import FileEndpoints
from .._endpoints._start_tls import StartTLSEndpoints
from .._endpoints._tcp import TCPEndpoints
from .._endpoints._unix import UNIXEndpoints
from .._poller import Poller
from ._core import LoopCore
from ._crossing import Answer, with_loop
from ._handles import DebugHandle, DebugTimerHandle, Handle, ThreadSafeHandle, TimerHandle
from ._logger import logger
from ._mistakes import advise
from ._readers import Readers
from ._signals import Signals
from ._sock_methods import SockMethods
from ._threads import Threads, check_callback

T = TypeVar("T")

# How many lines of the stack that a coroutine was made on are recorded in debug mode: asyncio's figure.
ORIGIN_DEPTH = 10

ExceptionHandler = Callable[[asyncio.AbstractEventLoop, "dict[str, Any]"], object]
TaskFactory = Callable[..., "asyncio.Future[Any]"]


class EventLoop(  # type: ignore[misc]  # the endpoint functions are asyncio's, with narrower results
    TCPEndpoints,
    UNIXEndpoints,
    DatagramEndpoints,
    PipeEndpoints,
    ProcessEndpoints,
    StartTLSEndpoints,
    FileEndpoints,
    SockMethods,
    Readers,
    Threads,
    Signals,
    asyncio.AbstractEventLoop,
):
    """asyncio's event loop on another backend; `open_event_loop` makes it, runs it and ends it.

    `open_event_loop` owns it, as `asyncio.run` owns its event loop. Methods for the owner (`run_forever`, `stop`,
    `close` …) raise `RuntimeError`.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html
    """

    _core_class: type[LoopCore] = LoopCore

    _debug_handle: Any = None  # The one that runs, in debug mode.
    _origins_before: int | None = None  # What `_track_origins` has changed.

    _poller: Poller  # Set when it is opened.
    _driver: Driver

    def __init__(self, backend: ModuleType) -> None:
        self._trio = backend
        self._spawner: Any = backend.Spawner()
        self._core: LoopCore = self._core_class(self)  # pyright: ignore[reportIncompatibleVariableOverride]
        self._append = self._core.ready.append
        self._timers = self._core.timers
        super().__init__()
        self._closed = False
        self._debug = False
        self._exception_handler: ExceptionHandler | None = None
        self._task_factory: TaskFactory | None = None
        self._asyncgens: WeakSet[AsyncGenerator[Any, Any]] = WeakSet()
        self._asyncgens_shut_down = False
        #: When a crossing that waits for nothing lets other tasks of the backend run, in seconds of `monotonic`.
        self._next_checkpoint: float = 0
        #: In debug mode, callbacks that take at least so long are logged, in seconds.
        self.slow_callback_duration: float = 0.1
        self.set_debug(
            bool(sys.flags.dev_mode or (not sys.flags.ignore_environment and os.environ.get("PYTHONASYNCIODEBUG")))
        )

    def _use_poller(self, poller: Poller) -> None:
        """Use the poller that the core has opened."""
        poller.loop = self
        self._poller = poller
        self._driver = poller.driver
        if type(self).time is EventLoop.time:  # A subclass has not replaced it.
            self.time = poller.clock.time  # type: ignore[method-assign]  # without the cost of a call
        self._core.clock = self._driver.clock = self

    async def _open(self, stack: AsyncExitStack) -> None:
        """Begin to run iterations. They end when `stack` is left."""
        core = self._core
        await self._spawner.enter(stack)
        await core.enter(stack)
        core.opened()
        self._use_poller(core.poller)
        self._track_origins(self._debug)
        core.call(anyio.get_cancelled_exc_class)  # Loads AnyIO's asyncio backend now: an iteration would be slow.

    def _start_backend_task(
        self, answer: Answer[Any], async_function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
    ) -> None:
        """Start a backend task that settles `answer`."""
        answer.scope = self._trio.Scope()
        settle = partial(self._core.call, self._settle, answer)
        with_loop(self, self._spawner.spawn, (async_function, args, answer.scope, settle))

    def _settle(self, answer: Answer[Any], exc: BaseException | None, result: Any) -> None:
        if not self._closed:
            answer.settle(exc, result)
        elif exc is not None and not isinstance(exc, asyncio.CancelledError):
            # The function began too late for the end of the event loop. The task that waits for it never goes on.
            self._core.report(exc, "A backend function failed after the end of the event loop")

    def _wait_for(
        self, future: asyncio.Future[Any], cancel: Callable[[], object]
    ) -> Awaitable[Callable[[], NoReturn] | None]:
        """Wait for `future` in backend code: see `Spawner.wait_for`."""
        wait: Awaitable[Callable[[], NoReturn] | None]
        wait = self._spawner.wait_for(future, cancel, self.call_soon)
        return wait

    # Time and callbacks

    def time(self) -> float:
        """Return the time of the backend's clock, in seconds.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.time
        """
        return self._poller.clock.time()

    def call_soon(  # type: ignore[override]  # typeshed binds the types of the arguments to the callback's
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Call `callback(*args)` in the next event loop iteration, in `context` or a copy of the caller's.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon
        """
        if self._checks:
            self._check(callback, "call_soon")
        handle = self._new_handle(callback, args, self, context)
        driver = self._driver
        if driver.waiting:
            driver.wake()  # First, as in `Scheduler.call_internal`.
        self._append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # as `call_soon`
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Call `callback(*args)` in the next event loop iteration, as `call_soon` does, from any thread.

        When `cancel` of the handle returns, in whatever thread, the callback has run to its end, or will never run.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon_threadsafe
        """
        core = self._core
        if self._debug:
            check_callback(callback, "call_soon_threadsafe")
        handle = (DebugHandle if self._debug else ThreadSafeHandle)(callback, args, self, context)
        with core.handing_over:
            core.check_alive("call_soon_threadsafe")
            self._append(handle)
        try:
            core.driver.wake_threadsafe()
        except RecursionError:
            handle._callback = None  # As in `TransportGroup.call_soon_threadsafe`.
            raise
        except RuntimeError as exc:
            # Closed since the check, and the callback has run before that, or never runs: asyncio raises nothing.
            if core.alive:
                raise core.not_open() from exc
        return handle

    def call_later(  # type: ignore[override]  # as `call_soon`
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call `callback(*args)` after `delay` seconds, in `context` or a copy of the caller's.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_later
        """
        if delay is None:
            raise TypeError("delay must not be None")
        return self._set_timer(self.time() + delay, callback, args, context)

    def call_at(  # type: ignore[override]  # as `call_soon`
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call `callback(*args)` at `when`, in seconds of `time`, otherwise as `call_later` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_at
        """
        if when is None:
            raise TypeError("when cannot be None")
        return self._set_timer(when, callback, args, context)

    def _set_timer(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> asyncio.TimerHandle:
        if self._checks:
            self._check(callback, "call_at")
        if not -inf <= when <= inf:
            raise ValueError(f"a time was expected, got {when!r}")
        when = float(when)  # `OverflowError` for an integer that is too large.
        driver = self._driver
        if driver.waiting and when < driver.deadline:  # `wait_at_most_until`, for speed.
            driver.wait_until(when)  # First: if it raises, there is no timer.
        return self._new_timer_handle(when, callback, args, self, context, self._timers)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: a cancelled handle removes itself. asyncio's code calls this."""

    def _make_handle(self, callback: Callable[..., object], args: tuple[Any, ...]) -> asyncio.Handle:
        return self._new_handle(callback, args, self, None)

    def _run_handle(self, handle: Any) -> None:
        self._core.run_callback(handle)

    def _check(self, callback: object, method: str) -> None:
        """Raise asyncio's error if the loop is closed, or if `callback` cannot be scheduled."""
        if not self._core.alive:
            raise self._core.not_open()
        if self._core.thread not in (0, get_ident()):  # 0: it does not run now.
            raise RuntimeError("Non-thread-safe operation invoked on an event loop other than the current one")
        check_callback(callback, method)

    # Futures and tasks

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future of this event loop.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_future
        """
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
        **options: Any,
    ) -> asyncio.Task[T]:
        """Run `coro` in a task. `options` go to the task factory, or to `asyncio.Task`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_task
        """
        if not self._core.alive:
            raise self._core.not_open()
        factory = self._task_factory
        if factory is not None:
            made: asyncio.Task[T] = self._task_of_factory(factory, coro, name, context, options)
            return made
        if context is not None:
            if sys.version_info >= (3, 11):
                options["context"] = context
            else:
                return context.run(lambda: asyncio.Task(coro, loop=self, name=name, **options))
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=name, **options)
        if self._debug:
            del task._source_traceback[-1]  # type: ignore[attr-defined]  # this line
        return task

    def _task_of_factory(
        self, factory: TaskFactory, coro: Any, name: str | None, context: Context | None, options: dict[str, Any]
    ) -> Any:
        if sys.version_info >= (3, 13, 3):  # Since then the factory sets the name.
            if context is not None:
                options["context"] = context
            return factory(self, coro, name=name, **options)
        if context is not None:
            options["context"] = context
        task: Any = factory(self, coro, **options)
        if name is not None:
            task.set_name(name)
        return task

    def set_task_factory(self, factory: TaskFactory | None) -> None:
        """Make tasks by `factory(loop, coro, **options)`; `None` restores the default.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_task_factory
        """
        if factory is not None and not callable(factory):
            raise TypeError("task factory must be a callable or None")
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        """Return the task factory, or `None` for the default one.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.get_task_factory
        """
        return self._task_factory

    # Errors

    def set_exception_handler(self, handler: ExceptionHandler | None) -> None:
        """Call `handler(loop, context)` for every error of a callback; `None` restores the default.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_exception_handler
        """
        if handler is not None and not callable(handler):
            raise TypeError(f"A callable object or None is expected, got {handler!r}")
        self._exception_handler = handler

    def get_exception_handler(self) -> Any:
        """Return the exception handler, or `None` for the default one.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.get_exception_handler
        """
        return self._exception_handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Report `context` to the exception handler, in the context of the task, future or handle that it names.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_exception_handler
        """
        handler = self._exception_handler
        advise(context.get("exception"))
        try:
            if handler is None:
                self.default_exception_handler(context)
                return
            where = context_of(context)
            if where is None:
                handler(self, context)
            else:
                # A copy: what failed may be to enter a context that is entered already.
                where.copy().run(handler, self, context)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as exc:
            if handler is None:
                logger.exception("Exception in default exception handler")
                return
            try:
                self.default_exception_handler(
                    {"message": "Unhandled error in exception handler", "exception": exc, "context": context}
                )
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException:
                logger.exception("Exception in default exception handler while handling an unexpected error")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Log `context` as an error, to the logger `asyncio`, with the traceback of its `exception`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.default_exception_handler
        """
        handle = self._debug_handle
        if handle is not None and handle._source_traceback and "source_traceback" not in context:
            context["handle_traceback"] = handle._source_traceback
        lines = [context.get("message") or "Unhandled exception in event loop"]
        for key in sorted(context):
            value = context[key]
            if key in {"message", "exception"}:
                continue
            if key == "source_traceback":
                stack = "".join(traceback.format_list(value)).rstrip()
                lines.append(f"Object created at (most recent call last):\n{stack}")
            elif key == "handle_traceback":
                stack = "".join(traceback.format_list(value)).rstrip()
                lines.append(f"Handle created at (most recent call last):\n{stack}")
            else:
                lines.append(f"{key}: {value!r}")
        exc = context.get("exception")
        logger.error("\n".join(lines), exc_info=exc if isinstance(exc, BaseException) else None)

    # Debug mode

    def get_debug(self) -> bool:
        """Whether the debug mode is on, by `PYTHONASYNCIODEBUG`, Python's development mode, or `set_debug`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.get_debug
        """
        return self._debug

    def set_debug(self, enabled: bool) -> None:
        """Turn the debug mode on or off.

        In debug mode, callbacks that take `slow_callback_duration` seconds or longer are logged; calls in another
        thread raise `RuntimeError`; error reports say where a callback, task or future was made, and Python's warnings
        where a coroutine was made that was never awaited.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_debug
        """
        self._debug = enabled
        self._checks = enabled or self._closed  # One attribute, because it is read in each call.
        self._new_handle: type[Handle | DebugHandle] = DebugHandle if enabled else Handle
        self._new_timer_handle: type[TimerHandle | DebugTimerHandle] = DebugTimerHandle if enabled else TimerHandle
        if self.is_running():
            self.call_soon_threadsafe(self._track_origins, enabled)  # The setting belongs to the thread.

    def _track_origins(self, enabled: bool) -> None:
        """Have Python record where coroutines are made, or restore its setting."""
        if enabled and self._origins_before is None:
            self._origins_before = sys.get_coroutine_origin_tracking_depth()
            sys.set_coroutine_origin_tracking_depth(ORIGIN_DEPTH)
        elif not enabled and self._origins_before is not None:
            sys.set_coroutine_origin_tracking_depth(self._origins_before)
            self._origins_before = None

    # Asynchronous generators

    def _asyncgen_begun(self, generator: AsyncGenerator[Any, Any]) -> None:
        if self._asyncgens_shut_down:
            warnings.warn(
                f"asynchronous generator {generator!r} was scheduled after loop.shutdown_asyncgens() call",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
        self._asyncgens.add(generator)

    def _asyncgen_dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._asyncgens.discard(generator)
        if self._core.alive:
            self.call_soon_threadsafe(self.create_task, generator.aclose())

    async def shutdown_asyncgens(self) -> None:
        """Close all asynchronous generators that were begun and have not ended.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.shutdown_asyncgens
        """
        self._asyncgens_shut_down = True
        generators = list(self._asyncgens)
        self._asyncgens.clear()
        results = await asyncio.gather(*(each.aclose() for each in generators), return_exceptions=True)
        for generator, result in zip(generators, results, strict=True):
            if isinstance(result, Exception):
                self.call_exception_handler(
                    {
                        "message": f"an error occurred during closing of asynchronous generator {generator!r}",
                        "exception": result,
                        "asyncgen": generator,
                    }
                )

    # Methods for the owner

    def is_running(self) -> bool:
        """Whether the event loop is open. It runs as long as it is open.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.is_running
        """
        return self._core.alive

    def is_closed(self) -> bool:
        """Whether the block of `open_event_loop` has been left.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.is_closed
        """
        return self._closed

    def run_forever(self) -> NoReturn:
        """Raise `RuntimeError`: the event loop runs already, or is closed."""
        self._refuse_to_run()

    def run_until_complete(self, future: Any) -> NoReturn:
        """Raise `RuntimeError`: the event loop runs already, or is closed. Await `future` instead."""
        if iscoroutine(future):
            future.close()  # No warning that it was never awaited.
        self._refuse_to_run()

    def _refuse_to_run(self) -> NoReturn:
        if self._closed:
            raise self._core.not_open()
        raise RuntimeError("This event loop is already running")

    def stop(self) -> None:
        """Raise `RuntimeError`: the event loop ends with the block of `open_event_loop`."""
        raise RuntimeError("Cannot stop an event loop of open_event_loop(): it ends when its block is left")

    def close(self) -> None:
        """Raise `RuntimeError`: the event loop ends with the block of `open_event_loop`. Does nothing after that."""
        if not self._closed:
            raise RuntimeError("Cannot close a running event loop")

    def _close(self) -> None:
        """Close the event loop, after everything in it has ended."""
        core = self._core
        self._remove_signal_handlers()
        self._remove_readers()
        self._track_origins(False)
        with core.handing_over:
            core.open = core.alive = False
        self._closed = self._checks = self._spawner.ending = True
        core.ready.clear()
        core.timers.clear()

    def __repr__(self) -> str:
        return f"<EventLoop running={self.is_running()} closed={self._closed} debug={self._debug}>"


def context_of(report: dict[str, Any]) -> Context | None:
    """Return the context of the task, future or handle that a report names, or `None`."""
    for name in ("task", "future", "handle"):
        get_context = getattr(report.get(name), "get_context", None)
        if get_context is not None:
            context: Context | None = get_context()
            return context
    return None
