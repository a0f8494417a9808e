"""The transport group, which makes and owns transports, servers, timers and tasks.

Holds: the public methods of a group that are not endpoint functions. `_core` has its inside.
May know: `_callbacks`, `_core`, `_endpoints`, `_errors`, `_futures`, `_handles`, `_statistics`, `_types`,
`_waiters`, `anyio`.
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
from ._errors import ExceptionContext, log_debug, logger, run_user_code
from ._futures import Future
from ._handles import Handle, ThreadSafeHandle, TimerHandle
from ._statistics import GroupStatistics, describe_flow
from ._waiters import check_shutdown_timeout, wait_or_abort

if TYPE_CHECKING:
    from anyio import CancelScope
    from typing_extensions import Self, Unpack

    from ._types import PosArgsT

ExceptionHandler: TypeAlias = "Callable[[TransportGroup, ExceptionContext], object]"


def current_group() -> TransportGroup:
    """Return the group that the running callback or task belongs to.

    The block of a group is not in it: a library may open a group in the block of its user's. Raises `RuntimeError`
    outside the callbacks and tasks of groups.
    """
    try:
        group: TransportGroup = current.get()
    except LookupError:
        msg = (
            "no transport group is current: call this from a callback or task of a group. In the block of a group use "
            "the group itself: `async with TransportGroup() as group:`"
        )
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
    their `connection_lost`. Leaving it by an exception or a cancellation aborts them; their `connection_lost` still
    runs before the block is left. Exceptions of the block and of the group's tasks are raised as an
    `ExceptionGroup`, as by any AnyIO task group.

    Endpoint functions make connections. They take a `protocol_factory`: a protocol class, or a function without
    parameters that returns a protocol. They raise

    - `RuntimeError` outside the block, and in another thread than the group's,
    - `TypeError` for a factory that cannot return a protocol (an async function, or a protocol instead of its class),
    - `AttributeError` if the object that it returns is not a protocol.
    """

    def __init__(self) -> None:
        self._core = Core(self)
        self._exception_handler: ExceptionHandler | None = None

    # Life cycle

    async def __aenter__(self) -> Self:
        core = self._core
        if core.entered:
            msg = "a TransportGroup can only be entered once: make a new one"
            raise RuntimeError(msg)
        async with AsyncExitStack() as stack:
            stack.callback(self._left)
            await core.enter(stack)
            # Registered twice on purpose: a `KeyboardInterrupt` may interrupt the first call on trio.
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
            log_debug(self, "%r: leaving, aborting all transports: %r", self, exc)
            return
        log_debug(self, "%r: leaving, closing all transports", self)
        self._core.close_all()
        await self._core.until_empty()

    def _left(self) -> None:
        log_debug(self, "%r: left", self)

    @property
    def cancel_scope(self) -> CancelScope:
        """The cancel scope around the block and the group's tasks, as every AnyIO task group has it.

        `group.cancel_scope.cancel()` ends the group from a callback, a task or the block: transports are aborted, tasks
        cancelled, and the program goes on after the block. `deadline`, in seconds of `time`, does so at that time.
        Raises `RuntimeError` before the group is entered.

        Source: https://anyio.readthedocs.io/en/stable/api.html#anyio.abc.TaskGroup.cancel_scope
        """
        core = self._core
        if not core.entered:
            raise core.not_open()
        return core.task_group.cancel_scope

    def is_closing(self) -> bool:
        """Whether the block is being left, or has been left, so that no more connections can be made.

        A protocol that connects again in `connection_lost` asks this first, for example.
        """
        return self._core.entered and not self._core.open

    async def wait_closed(self) -> None:
        """Wait until every transport of the group has closed and its `connection_lost` has been called."""
        await anyio.lowlevel.checkpoint()
        while self._core.has_connections:
            await self._core.changed.wait()

    async def shutdown(self, timeout: float | None) -> None:
        """Close the servers, let all connections end, and abort those that are left after `timeout` seconds.

        A protocol that has a method `shutdown_requested` is asked by it: it closes its transport at once or when it
        has finished what it is doing. The transport of any other protocol is closed, which sends what is buffered; a
        child process gets `SIGTERM`, and `SIGKILL` after `timeout` seconds. TLS handshakes are aborted. With 0 seconds
        everything is aborted at once; `None` is no limit.

        This returns when all connections are lost; if it is cancelled, they go on ending. From the call on the group
        makes no more connections (`is_closing` is true). Its callbacks and tasks go on until the block is left.

        Raises `ValueError` for a negative `timeout`, `RuntimeError` if the group is not open.

        Source: https://pkg.go.dev/net/http#Server.Shutdown
        """
        timeout = check_shutdown_timeout(timeout)
        core = self._core
        core.check_alive("shutdown", "anyio.from_thread.run(group.shutdown, ...)")
        log_debug(self, "%r: shutting down", self)
        core.request_shutdown()
        await wait_or_abort(timeout, self.wait_closed, core.abort_transports)

    # Tasks

    def start_soon(
        self,
        async_function: Callable[[Unpack[PosArgsT]], Coroutine[Any, Any, object]],
        *args: Unpack[PosArgsT],
        name: object = None,
    ) -> None:
        """Start a task that belongs to the group and awaits `async_function(*args)`.

        Callbacks may call this: a task that `data_received` starts takes its first step before its connection receives
        more. An exception of a task cancels the group, as in any AnyIO task group. `name` is for debugging; it defaults
        to the function's name.

        Raises `RuntimeError` if the group is not open and in another thread, `TypeError` if `async_function` is not an
        async function or does not take these arguments.
        """
        self._core.check_alive("start_soon", "anyio.from_thread.run_sync(group.start_soon, ...)")
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
        core = self._core
        if not core.entered:
            raise core.not_open("time")
        return core.clock.time()

    def call_soon(
        self, callback: Callable[[Unpack[PosArgsT]], object], *args: Unpack[PosArgsT], context: Context | None = None
    ) -> Handle:
        """Call `callback(*args)` in the next iteration, in `context` or a copy of the caller's.

        Callbacks run in the order of the calls. What they raise is passed to the exception handler. Raises
        `RuntimeError` if the group is not open, `TypeError` if `callback` is not callable.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon
        """
        core = self._core
        if not core.alive:
            raise core.not_open("call_soon")
        handle = Handle(callback, args, core.context_for(callback, context))
        core.driver.wake()  # First, as in `Scheduler.call_internal`.
        core.ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[PosArgsT]], object], *args: Unpack[PosArgsT], context: Context | None = None
    ) -> Handle:
        """Call `callback(*args)` in the next iteration, as `call_soon` does, from any thread.

        `context` defaults to a copy of the caller's. The handle may be cancelled in any thread: once `cancel` returns,
        the callback has finished or never runs. Raises as `call_soon` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon_threadsafe
        """
        core = self._core
        handle = ThreadSafeHandle(callback, args, core.context_for(callback, context))
        with core.handing_over:
            core.check_alive("call_soon_threadsafe")
            core.ready.append(handle)
        try:
            core.driver.wake_threadsafe()
        except RecursionError:
            handle._callback = None  # A call that raises schedules nothing. `cancel` could not be called either.
            raise
        except RuntimeError as exc:
            if core.alive:  # The backend has stopped without leaving the group.
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

        Timers run in the order of their times, and of the calls for equal times. Timers that are pending when the group
        ends never run. Raises as `call_soon` does, `TypeError` also if `delay` is not a number, `ValueError` if it is
        NaN.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_later
        """
        core = self._core
        if not core.entered:
            raise core.not_open("call_later")
        return core.set_timer(core.clock.time() + delay, callback, args, context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[PosArgsT]], object],
        *args: Unpack[PosArgsT],
        context: Context | None = None,
    ) -> TimerHandle:
        """Call `callback(*args)` at `when`, in seconds of `time`; otherwise like `call_later`.

        `context` and the exceptions are those of `call_later`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_at
        """
        return self._core.set_timer(when, callback, args, context)

    def create_future(self) -> Future[Any]:
        """Return a future of this group, to be awaited by any of its tasks.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_future
        """
        return Future(self)

    # Errors

    def set_exception_handler(self, handler: ExceptionHandler | None) -> None:
        """Call `handler(group, context)` for each error of a callback; `None` restores the default.

        Raises `TypeError` if `handler` is neither callable nor `None`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_exception_handler
        """
        if handler is not None and not callable(handler):
            msg = f"a callable object or None is expected, got {handler!r}"
            raise TypeError(msg)
        self._exception_handler = handler

    def get_exception_handler(self) -> ExceptionHandler | None:
        """Return the exception handler, or `None` if the default one is in use.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.get_exception_handler
        """
        return self._exception_handler

    def call_exception_handler(self, context: ExceptionContext) -> None:
        """Report an error to the exception handler.

        `context` is a dictionary with `message`, and possibly `exception`, `transport` and others. It has `handshake`,
        and the client's `peername`, if a server's TLS handshake with a client failed.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_exception_handler
        """
        if self._exception_handler is None:
            self._report_by_default(context)
            return

        def failed(exc: BaseException) -> None:
            self._report_by_default(
                {"message": "Unhandled error in exception handler", "exception": exc, "context": context}
            )

        run_user_code(call_with_current, self, self._exception_handler, self, context, failed=failed)

    def _report_by_default(self, context: ExceptionContext) -> None:
        # This runs user code, too: the `repr` of objects in the context, and a handler that a derived class overrides.
        def failed(exc: BaseException) -> None:
            logger.error("Exception in default exception handler", exc_info=exc)

        run_user_code(self.default_exception_handler, context, failed=failed)

    def default_exception_handler(self, context: ExceptionContext) -> None:
        """Log the error that `context` describes to the logger `transports_anyio`, with the exception's traceback.

        A failed TLS handshake with a client is one line at level INFO: on the internet it is no event.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.default_exception_handler
        """
        if context.get("handshake"):
            logger.info("TLS handshake with %r failed: %r", context.get("peername"), context.get("exception"))
            return
        lines = [context.get("message") or "Unhandled exception in a transport group"]
        lines += [f"{key}: {context[key]!r}" for key in sorted(context) if key not in {"message", "exception"}]
        exc = context.get("exception")
        logger.error("\n".join(lines), exc_info=exc if isinstance(exc, BaseException) else None)

    # Introspection

    def statistics(self) -> GroupStatistics:
        """Return what is open, buffered and pending, and how much was transferred, like AnyIO's `statistics` methods.

        May be called from any thread.
        """
        core = self._core
        transports = tuple(core.transports)  # Another thread may call this while the set changes.
        traffic = [transport._traffic() for transport in transports]
        return GroupStatistics(
            open_transports=dict(Counter(type(transport).__name__ for transport in transports)),
            pending_handshakes=len(core.handshakes),
            open_servers=len(core.servers),
            running_tasks=core.tasks_running,
            bytes_received=core.bytes_received + sum(received for received, _, _ in traffic),
            bytes_sent=core.bytes_sent + sum(sent for _, sent, _ in traffic),
            bytes_buffered=sum(buffered for _, _, buffered in traffic),
            pending_timers=core.pending_timers,
        )

    def __repr__(self) -> str:
        core = self._core
        state = "open" if core.open else "new" if not core.entered else "closing" if core.alive else "closed"
        return (
            f"<TransportGroup {state} {describe_flow('transports', core.transports, core.handshakes)} "
            f"servers={len(core.servers)} "
            f"tasks={core.tasks_running} timers={core.pending_timers}>"
        )
