"""The group: owner of every transport, server, timer and task made through it.

Holds: what users see of a group. How it works inside is `_core`'s.
May know: every room below it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from contextvars import Context, copy_context
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio.lowlevel

from ._callbacks import call_with_current, current
from ._core import Core
from ._endpoints._anyio_streams import AnyIOStreamEndpoints
from ._endpoints._datagrams import DatagramEndpoints
from ._endpoints._pipes import PipeEndpoints
from ._endpoints._processes import ProcessEndpoints
from ._endpoints._sendfile import FileEndpoints
from ._endpoints._start_tls import StartTLSEndpoints
from ._endpoints._tcp import TCPEndpoints
from ._endpoints._unix import UNIXEndpoints
from ._errors import ExceptionContext, log_debug, logger, should_propagate
from ._resources import PendingHandshake
from ._scheduling import Handle, ThreadSafeHandle, TimerHandle
from ._statistics import GroupStatistics, describe_flow

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._types import PosArgsT

ExceptionHandler: TypeAlias = "Callable[[TransportGroup, ExceptionContext], object]"


def current_group() -> TransportGroup:
    """Return the group that the running callback or task belongs to.

    Raises `RuntimeError` outside any group.
    """
    try:
        group: TransportGroup = current.get()
    except LookupError:
        msg = "no transport group is current: call this from a callback or task of a group, or within `async with`"
        raise RuntimeError(msg) from None
    return group


class TransportGroup(
    TCPEndpoints,
    UNIXEndpoints,
    DatagramEndpoints,
    PipeEndpoints,
    ProcessEndpoints,
    AnyIOStreamEndpoints,
    StartTLSEndpoints,
    FileEndpoints,
):
    """Makes transports and owns them: an async context manager on an AnyIO task group, entered once.

    Leaving the block normally closes the servers, closes the transports (buffered data is flushed) and waits for
    their `connection_lost`. Leaving it by an exception or a cancellation aborts them, and their `connection_lost`
    still runs before the block is left. Exceptions of the block and of the group's tasks come out as an
    `ExceptionGroup`, as from any AnyIO task group.

    Endpoint functions make connections. They take a `protocol_factory`: a protocol class, or a function without
    parameters that returns a protocol. They raise `RuntimeError` outside the block and in another thread than the
    group's, `TypeError` for a factory that can return no protocol (a coroutine function, or a protocol instead of its
    class), and `AttributeError` when what it has returned is none.
    """

    def __init__(self) -> None:
        self._core = Core(self)
        self._exception_handler: ExceptionHandler | None = None

    # Life

    async def __aenter__(self) -> Self:
        core = self._core
        if core.poller is not None:
            msg = "a TransportGroup is entered once: make a new one"
            raise RuntimeError(msg)
        async with AsyncExitStack() as stack:
            stack.callback(self._left)
            await core.enter(stack)
            # Twice, because trio lets a `KeyboardInterrupt` come between any two lines: what it keeps one of them from,
            # the next one does.
            stack.callback(current.reset, current.set(self))
            stack.callback(core.abort_all)
            stack.callback(core.abort_all)
            stack.push_async_exit(self._leave)
            self._stack = stack.pop_all()
        core.opened()
        log_debug(self, "%r: entered", self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(exc_type, exc, traceback)

    async def _leave(self, _: type[BaseException] | None, exc: BaseException | None, __: TracebackType | None) -> None:
        self._core.open = False
        if exc is not None:
            log_debug(self, "%r: leaving by %r, everything is aborted", self, exc)
            return
        log_debug(self, "%r: leaving, once everything is flushed and closed", self)
        self._core.close_all()
        await self._core.until_empty()

    def _left(self) -> None:
        log_debug(self, "%r: left", self)

    def is_closing(self) -> bool:
        """Whether the block is being left, or has been: no more connections can be made.

        For a protocol that connects again in `connection_lost`, say.
        """
        return self._core.poller is not None and not self._core.open

    async def wait_closed(self) -> None:
        """Wait until every transport of the group has closed, its `connection_lost` delivered."""
        await anyio.lowlevel.checkpoint()
        while self._core.transports:
            await self._core.changed.wait()

    # Tasks

    def start_soon(
        self,
        async_function: Callable[[Unpack[PosArgsT]], Coroutine[Any, Any, object]],
        *args: Unpack[PosArgsT],
        name: object = None,
    ) -> None:
        """Start a task that belongs to the group and awaits `async_function(*args)`.

        May be called from a callback: a task that `data_received` starts has its first turn before its connection
        receives more. The failure of a task cancels the group, as in any AnyIO task group. `name` is for debugging, the
        function's by default.

        Raises `RuntimeError` when the group is not open and in another thread, `TypeError` when `async_function` is
        none, or does not take these arguments.
        """
        self._core.require_alive("start_soon")
        self._core.require_own_thread("start_soon", "anyio.from_thread.run_sync(group.start_soon, ...)")
        if not callable(async_function):
            msg = f"start_soon() takes an async function and its arguments, got {async_function!r}"
            raise TypeError(msg)
        context = copy_context()
        context.run(current.set, self)
        context.run(self._core.start_task, async_function, args, name)

    # Time

    def time(self) -> float:
        """Return the time of the group's clock, in seconds: the backend's, as `anyio.current_time`.

        Raises `RuntimeError` before the group is entered.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.time
        """
        return self._core.live_poller("time").time()

    def call_soon(
        self, callback: Callable[[Unpack[PosArgsT]], object], *args: Unpack[PosArgsT], context: Context | None = None
    ) -> Handle:
        """Call `callback(*args)` in the group's next turn, in `context` or a copy of the caller's.

        First in, first out. What the callback raises goes to the exception handler. Raises `RuntimeError` when the
        group is not open, `TypeError` when `callback` cannot be called.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon
        """
        core = self._core
        poller = core.require_alive("call_soon")
        handle = Handle(callback, args, core.context_for(callback, context))
        core.ready.append(handle)
        poller.wake()
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[PosArgsT]], object], *args: Unpack[PosArgsT], context: Context | None = None
    ) -> Handle:
        """Call `callback(*args)` in the group's next turn, as `call_soon` does, from any thread.

        `context` defaults to a copy of the caller's. When `cancel` of the handle returns, in whatever thread, the
        callback has run to its end, or will never run. Raises as `call_soon` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon_threadsafe
        """
        core = self._core
        handle = ThreadSafeHandle(callback, args, core.context_for(callback, context))
        with core.handing_over:
            poller = core.require_alive("call_soon_threadsafe")
            core.ready.append(handle)
        try:
            poller.wake_threadsafe()
        except RuntimeError as exc:
            if core.alive:  # It was never left, and nothing runs any more that could call anything.
                raise core.not_open("call_soon_threadsafe") from exc
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[PosArgsT]], object],
        *args: Unpack[PosArgsT],
        context: Context | None = None,
    ) -> TimerHandle:
        """Call `callback(*args)` after `delay` seconds, in `context` or a copy of the caller's.

        Timers run by time, then in the order in which they were made. One that is pending when the group ends never
        runs. Raises as `call_soon` does, `TypeError` also when `delay` is no number, `ValueError` when it is NaN.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_later
        """
        core = self._core
        poller = core.poller
        if poller is None:
            raise core.not_open("call_later")
        return core.set_timer(poller.time() + delay, callback, args, context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[PosArgsT]], object],
        *args: Unpack[PosArgsT],
        context: Context | None = None,
    ) -> TimerHandle:
        """Call `callback(*args)` at `when`, in seconds of `time`, otherwise as `call_later` does.

        `context` and what is raised are as for `call_later`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_at
        """
        return self._core.set_timer(when, callback, args, context)

    # Errors

    def set_exception_handler(self, handler: ExceptionHandler | None) -> None:
        """Call `handler(group, context)` for every error of a callback; `None` restores the default.

        Raises `TypeError` when `handler` is neither callable nor `None`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_exception_handler
        """
        if handler is not None and not callable(handler):
            msg = f"a callable object or None is expected, got {handler!r}"
            raise TypeError(msg)
        self._exception_handler = handler

    def get_exception_handler(self) -> ExceptionHandler | None:
        """Return the handler that was set, or `None` while the default one is in use.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.get_exception_handler
        """
        return self._exception_handler

    def call_exception_handler(self, context: ExceptionContext) -> None:
        """Report `context` to the exception handler: `message`, and perhaps `exception`, `transport` and others.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_exception_handler
        """
        if self._exception_handler is None:
            self._report_at_last(context)
            return
        try:
            call_with_current(self, self._exception_handler, self, context)
        except BaseException as exc:
            if should_propagate(exc):
                raise
            self._report_at_last(
                {"message": "Unhandled error in exception handler", "exception": exc, "context": context}
            )

    def _report_at_last(self, context: ExceptionContext) -> None:
        # What is logged has the `repr` of the user's objects in it, and a derived group may have a handler of its own.
        try:
            self.default_exception_handler(context)
        except BaseException as exc:
            if should_propagate(exc):
                raise
            logger.exception("Exception in default exception handler")

    def default_exception_handler(self, context: ExceptionContext) -> None:
        """Log `context` as an error, to the logger `transports_anyio`, with the traceback of its `exception`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.default_exception_handler
        """
        lines = [context.get("message") or "Unhandled exception in a transport group"]
        lines += [f"{key}: {context[key]!r}" for key in sorted(context) if key not in {"message", "exception"}]
        exc = context.get("exception")
        logger.error("\n".join(lines), exc_info=exc if isinstance(exc, BaseException) else None)

    # Looking at it

    def statistics(self) -> GroupStatistics:
        """Return what is open, buffered and pending, and how much has been moved; as AnyIO's `statistics` methods.

        May be called from any thread.
        """
        core = self._core
        owned = tuple(core.transports)  # Whoever looks may be another thread.
        transports = [each for each in owned if not isinstance(each, PendingHandshake)]
        traffic = [transport.traffic() for transport in transports]
        return GroupStatistics(
            open_transports=dict(Counter(type(transport).__name__ for transport in transports)),
            pending_handshakes=len(owned) - len(transports),
            open_servers=len(core.servers),
            running_tasks=core.tasks_running,
            bytes_received=core.bytes_received + sum(received for received, _, _ in traffic),
            bytes_sent=core.bytes_sent + sum(sent for _, sent, _ in traffic),
            bytes_buffered=sum(buffered for _, _, buffered in traffic),
            pending_timers=len(core.timers),
        )

    def __repr__(self) -> str:
        core = self._core
        state = "open" if core.open else "new" if core.poller is None else "closing" if core.alive else "closed"
        return (
            f"<TransportGroup {state} {describe_flow('transports', core.transports)} servers={len(core.servers)} "
            f"tasks={core.tasks_running} timers={len(core.timers)}>"
        )
