"""The group: owner of every transport, server, timer and task made through it.

Holds: ownership, lifetimes, the group's turn, and the one door to the user's code.
May know: every room below it (endpoints, transports, channels, scheduling, poller).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from contextvars import Context, copy_context
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from ._door import Door, current
from ._endpoints._base import Owned
from ._endpoints._stream import StreamEndpoints
from ._endpoints._tcp import TCPEndpoints
from ._errors import ErrorReporter, ExceptionContext, ExceptionHandler, leaves_through_the_group
from ._poller import Poller
from ._scheduling import Handle, TimerHandle, Timers

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._channels._contract import Channel
    from ._server import Server
    from ._transports._stream import StreamTransport


class TransportGroup(TCPEndpoints, StreamEndpoints):
    """Makes transports and owns them: an async context manager on an AnyIO task group.

    Leaving the block normally closes the servers, closes the transports (buffered data is flushed) and waits for
    their `connection_lost`. Leaving it by an exception or a cancellation aborts them, and their `connection_lost`
    still runs before the block is left. Exceptions of the block and of the group's tasks come out as an
    `ExceptionGroup`, as from any AnyIO task group.
    """

    def __init__(self) -> None:
        self._poller: Poller | None = None
        self._ready: deque[Callable[[], object]] = deque()
        self._timers = Timers()
        self._errors = ErrorReporter(self)
        self._transports: set[Owned] = set()
        self._servers: set[Server] = set()
        self._tasks_running = 0
        self._idle: anyio.Event | None = None
        self._open = False
        self._used = False

    # Life

    async def __aenter__(self) -> Self:
        if self._used:
            msg = "a TransportGroup is entered once: make a new one"
            raise RuntimeError(msg)
        self._used = True
        async with AsyncExitStack() as stack:
            self._poller = Poller()
            stack.callback(self._poller.close)
            self._turns = anyio.CancelScope(shield=True)
            self._task_group = await stack.enter_async_context(anyio.create_task_group())
            self._task_group.start_soon(self._run, name="transports_anyio: turns of a group")
            self._stack = stack.pop_all()
        self._token = current.set(self)
        self._open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._open = False
        leaving = exc
        if exc is None:
            try:
                self._close_all()
                await self._until_empty()
            except BaseException as error:
                leaving = error
        leaving = self._end() or leaving
        current.reset(self._token)
        if leaving is None:
            return await self._stack.__aexit__(None, None, None)
        suppressed = await self._stack.__aexit__(type(leaving), leaving, leaving.__traceback__)
        if leaving is not exc and not suppressed:
            raise leaving
        return suppressed

    def _close_all(self) -> None:
        for server in tuple(self._servers):
            server.close()
        for transport in tuple(self._transports):
            transport.close()

    def _end(self) -> BaseException | None:
        """Abort what is left and deliver every `connection_lost`; return what the user's code raised to leave."""
        for server in tuple(self._servers):
            server.close()
        for transport in tuple(self._transports):
            transport.abort()
        leaving: BaseException | None = None
        self._timers.clear()
        while self._transports and self._ready:
            try:
                self._run_ready()
            except BaseException as error:
                leaving = leaving or error
        self._ready.clear()
        self._turns.cancel()
        return leaving

    async def _until_empty(self) -> None:
        while self._transports or self._tasks_running:
            self._idle = self._idle or anyio.Event()
            await self._idle.wait()

    def _changed(self) -> None:
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    async def wait_closed(self) -> None:
        """Wait until every transport of the group has closed, its `connection_lost` delivered."""
        while self._transports:
            self._idle = self._idle or anyio.Event()
            await self._idle.wait()

    # The group's turn

    async def _run(self) -> None:
        poller = self._live_poller()
        with self._turns:
            while True:
                deadline = self._timers.next_deadline()
                if self._ready or deadline <= anyio.current_time():
                    await anyio.lowlevel.checkpoint()
                else:
                    await poller.wait(deadline)
                poller.dispatch()
                if deadline != inf:
                    self._take_due()
                if self._ready:
                    self._run_ready()

    def _take_due(self) -> None:
        due: deque[Handle] = deque()
        self._timers.take_due(anyio.current_time(), due)
        self._ready.extend(handle.run for handle in due)

    def _run_ready(self) -> None:
        """Run what was ready when this turn began; what it schedules waits for the next, so that I/O gets its turn."""
        ready = self._ready
        for _ in range(len(ready)):
            callback = ready.popleft()
            try:
                callback()
            except BaseException as exc:
                if leaves_through_the_group(exc):
                    raise
                self.call_exception_handler({"message": f"Exception in callback {callback!r}", "exception": exc})

    def call_internal(self, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` in the group's next turn, without a context or a handle."""
        self._ready.append(lambda: callback(*args) if args else callback())
        if self._poller is not None:
            self._poller.wake()

    # Ownership, for the endpoints

    def _live_poller(self) -> Poller:
        if self._poller is None:
            msg = "the group is not open: use it within `async with TransportGroup() as group:`"
            raise RuntimeError(msg)
        return self._poller

    def _require_open(self) -> Poller:
        if not self._open:
            msg = "the group is not open: use it within `async with TransportGroup() as group:`"
            raise RuntimeError(msg)
        return self._live_poller()

    def _as_group(self) -> TransportGroup:
        return self

    def _door(self) -> Door:
        return Door(self)

    def _own(self, transport: Owned) -> None:
        self._transports.add(transport)

    def _disown(self, transport: Owned) -> None:
        self._transports.discard(transport)
        self._changed()

    def accepted(
        self, protocol_factory: Callable[[], Any], channel: Channel, on_lost: Callable[[StreamTransport], None]
    ) -> StreamTransport:
        """Make the transport of a connection that a server accepted."""
        return self._make_transport(protocol_factory, channel, on_lost)[0]

    def forget_transport(self, transport: Owned) -> None:
        """Take note that `transport` has ended."""
        self._disown(transport)

    def forget_server(self, server: Server) -> None:
        """Take note that `server` is closed."""
        self._servers.discard(server)

    # Tasks

    def start_soon(self, async_function: Callable[..., Awaitable[object]], *args: Any, name: object = None) -> None:
        """Start a task that belongs to the group; its failure cancels the group, as in any AnyIO task group.

        May be called from a callback. Raises `RuntimeError` when the group is not open.
        """
        self._require_open()
        self._tasks_running += 1
        context = copy_context()
        context.run(current.set, self)
        context.run(
            lambda: self._task_group.start_soon(
                self._run_task, async_function, args, name=name or getattr(async_function, "__qualname__", None)
            )
        )

    async def _run_task(self, async_function: Callable[..., Awaitable[object]], args: tuple[Any, ...]) -> None:
        try:
            await async_function(*args)
        finally:
            self._tasks_running -= 1
            self._changed()

    # Time

    def time(self) -> float:
        """Return the time of the group's clock, in seconds: the backend's, as `anyio.current_time`."""
        return anyio.current_time()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:
        """Call `callback(*args)` in the group's next turn, in `context` or a copy of the caller's."""
        handle = self.call_soon_threadsafe(callback, *args, context=context, _wake=False)
        self._live_poller().wake()
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
        _wake: bool = True,
    ) -> Handle:
        """As `call_soon`, from any thread."""
        poller = self._require_open()
        handle = Handle(callback, args, self._context(context))
        self._ready.append(handle.run)
        if _wake:
            poller.wake_threadsafe()
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        """Call `callback(*args)` after `delay` seconds, in `context` or a copy of the caller's."""
        return self.call_at(anyio.current_time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        """Call `callback(*args)` at `when`, in seconds of `time`, in `context` or a copy of the caller's."""
        poller = self._require_open()
        handle = TimerHandle(when, callback, args, self._context(context), self._timers)
        if when < self._timers.next_deadline():
            poller.wake()
        self._timers.push(handle)
        return handle

    def _context(self, context: Context | None) -> Context:
        if context is None:
            context = copy_context()
            context.run(current.set, self)
        return context

    # Errors

    def set_exception_handler(self, handler: ExceptionHandler | None) -> None:
        """Call `handler(group, context)` for every error of a callback; `None` restores the default.

        Raises `TypeError` when `handler` is neither callable nor `None`.
        """
        if handler is not None and not callable(handler):
            msg = f"a callable object or None is expected, got {handler!r}"
            raise TypeError(msg)
        self._errors.handler = handler

    def get_exception_handler(self) -> ExceptionHandler | None:
        """Return the handler that was set, or `None` while the default one is in use."""
        return self._errors.handler

    def call_exception_handler(self, context: ExceptionContext) -> None:
        """Report `context`: `message`, and perhaps `exception`, `transport`, `protocol` and others."""
        self._errors.report(context)

    def default_exception_handler(self, context: ExceptionContext) -> None:
        """Log `context` to the logger `transports_anyio`."""
        self._errors.report_by_default(context)

    def __repr__(self) -> str:
        state = "open" if self._open else "closed" if self._used else "not entered"
        return f"<TransportGroup {state} transports={len(self._transports)} servers={len(self._servers)}>"
