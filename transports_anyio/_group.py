"""The group: owner of every transport, server, timer and task made through it.

Holds: ownership, lifetimes, the group's turn, and the one door to the user's code.
May know: every room below it (endpoints, transports, channels, scheduling, poller).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from contextvars import Context, Token, copy_context
from math import inf
from threading import RLock, get_ident
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import anyio.lowlevel

from ._door import Door, GivenContext, current
from ._endpoints._datagram import DatagramEndpoints
from ._endpoints._memory import MemoryEndpoints
from ._endpoints._pipes import PipeEndpoints
from ._endpoints._processes import ProcessEndpoints
from ._endpoints._sendfile import FileEndpoints
from ._endpoints._start_tls import StartTLSEndpoint
from ._endpoints._stream import StreamEndpoints
from ._endpoints._tcp import TCPEndpoints
from ._endpoints._unix import UNIXEndpoints
from ._errors import ErrorReporter, ExceptionContext, ExceptionHandler, leaves_through_the_group, logger
from ._loop_poller import make_poller
from ._owned import Owned, PendingHandshake
from ._poller import RESOLUTION, Poller
from ._scheduling import Handle, TimerHandle, Timers
from ._statistics import GroupStatistics, describe_flow
from ._waiters import Waiters

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._channels._contract import Channel
    from ._channels._tls import TLSChannel
    from ._server import Server
    from ._transports._stream import StreamTransport


AsyncFunction: TypeAlias = "Callable[..., Coroutine[Any, Any, object]]"

# How many descriptors a turn serves, and for how many seconds it goes on, before it lets the tasks have theirs.
SERVED_IN_A_TURN = 64
LENGTH_OF_A_TURN = 0.002


class TransportGroup(
    TCPEndpoints,
    UNIXEndpoints,
    DatagramEndpoints,
    PipeEndpoints,
    ProcessEndpoints,
    StreamEndpoints,
    StartTLSEndpoint,
    FileEndpoints,
    MemoryEndpoints,
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
        self._poller: Poller | None = None
        self._ready: deque[Callable[[], object]] = deque()
        self._timers = Timers(self._first_timer_cancelled)
        self._errors = ErrorReporter(self)
        self._transports: set[Owned] = set()
        self._servers: set[Server] = set()
        self._tasks_running = 0
        self.tasks_started: bool = False  # Since the turn began.
        self._bytes_received = 0  # By transports that have ended; as sent.
        self._bytes_sent = 0
        self._changed = Waiters()
        self._open = False  # Between entering and leaving the block: connections can be made.
        self._alive = False  # Until the last `connection_lost`: callbacks can be scheduled.
        # Held while another thread hands something over: before the end, or not at all. Signal handlers may do so, too.
        self._handing_over = RLock()
        self._thread = 0  # Where it was entered; no thread has this number.

    # Life

    async def __aenter__(self) -> Self:
        if self._poller is not None:
            msg = "a TransportGroup is entered once: make a new one"
            raise RuntimeError(msg)
        async with AsyncExitStack() as stack:
            self._poller = make_poller()
            stack.callback(self._poller.close)
            self._dispatch = self._poller.dispatch
            self._turns = anyio.CancelScope(shield=True)
            self._task_group = await stack.enter_async_context(anyio.create_task_group())
            self._task_group.start_soon(self._run, name="transports_anyio: turns of a group")
            stack.callback(self._turns.cancel)
            stack.callback(self._left, current.set(self))
            # Steps of their own, because trio lets a `KeyboardInterrupt` come between any two lines: what it keeps one
            # of them from, the next one does.
            stack.callback(self._end)
            stack.callback(self._end)
            stack.push_async_exit(self._leave)
            self._stack = stack.pop_all()
        self._thread = get_ident()
        self._open = self._alive = True
        logger.debug("%r: entered", self)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(exc_type, exc, traceback)

    async def _leave(self, _: type[BaseException] | None, exc: BaseException | None, __: TracebackType | None) -> None:
        self._open = False
        if exc is not None:
            logger.debug("%r: leaving by %r, everything is aborted", self, exc)
            return
        logger.debug("%r: leaving, once everything is flushed and closed", self)
        self._close_all()
        await self._until_empty()

    def _left(self, token: Token[TransportGroup]) -> None:
        logger.debug("%r: left", self)
        current.reset(token)

    def _close_all(self) -> None:
        for server in tuple(self._servers):
            server.close()
        for transport in tuple(self._transports):
            transport.close()

    def _end(self) -> None:
        """Abort what is left and deliver every `connection_lost`; raises what the user's code raises to leave."""
        self._open = False
        for server in tuple(self._servers):
            server.close()
        for transport in tuple(self._transports):
            transport.abort()
        leaving: BaseException | None = None
        while self._transports and self._ready:
            try:
                self._run_ready()
            except BaseException as error:
                leaving = leaving or error
        with self._handing_over:
            self._alive = False
        try:
            self._run_ready()  # What `call_soon` was given before the end; timers that are pending never fire.
        except BaseException as error:
            leaving = leaving or error
        self._ready.clear()
        self._timers.clear()
        if leaving is not None:
            raise leaving

    async def _until_empty(self) -> None:
        while self._transports or self._tasks_running:
            await self._changed.wait()

    async def wait_closed(self) -> None:
        """Wait until every transport of the group has closed, its `connection_lost` delivered."""
        await anyio.lowlevel.checkpoint()
        while self._transports:
            await self._changed.wait()

    # The group's turn

    async def _run(self) -> None:
        with self._turns:
            await self._live_poller().run(self)

    def turn(self) -> float:
        """Run what was scheduled, let everything that is ready move its bytes once, then run the timers that are due.

        That is asyncio's order. Return when the next turn is due: minus infinity for at once.
        """
        dispatch = self._dispatch
        timers = self._timers
        ready = self._ready
        served = 0
        self.tasks_started = False
        until = monotonic() + LENGTH_OF_A_TURN
        while True:
            if ready:
                self._run_ready()
            count = dispatch()
            if timers.heap:
                self._run_due()
            served += count
            # What came in meanwhile can be had for one system call, where another wait costs a round through the
            # backend; but tasks want their turn too, and a new one its first: it may be about to call `start_tls`, and
            # what comes in is the handshake then.
            if not count or served >= SERVED_IN_A_TURN or self.tasks_started or monotonic() >= until:
                break
        if ready or self.tasks_started:
            return -inf
        return timers.next_deadline() if timers.heap else inf

    def _run_ready(self) -> None:
        """Run what is ready now; what it schedules waits for the next turn, so that I/O gets its turn."""
        ready = self._ready
        for _ in range(len(ready)):
            self._run_callback(ready.popleft())

    def _run_due(self) -> None:
        """Run the timers that are due; what I/O has scheduled before them waits for the next turn, as in asyncio."""
        timers = self._timers
        deadline = timers.next_deadline()
        if deadline != inf:
            now = self.time() + RESOLUTION
            if deadline <= now:
                for handle in timers.take_due(now):
                    self._run_callback(handle)

    def _run_callback(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except BaseException as exc:
            if leaves_through_the_group(exc):
                raise
            context: ExceptionContext = {"message": f"Exception in callback {callback!r}", "exception": exc}
            if isinstance(callback, Handle):
                context["handle"] = callback
                # A copy: what failed may be to enter a context that is entered already.
                callback.get_context().copy().run(self.call_exception_handler, context)
            else:
                self.call_exception_handler(context)

    def call_internal(self, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` in the group's next turn, without a context or a handle."""
        self._ready.append(lambda: callback(*args) if args else callback())
        if self._poller is not None:
            self._poller.wake()

    # Ownership, for the endpoints

    def _not_open(self, name: str = "") -> RuntimeError:
        """Return what to raise for a call of `name` outside the group's life."""
        call = f"{name}(): " if name else ""
        if self._poller is None:
            return RuntimeError(
                f"{call}the group is not open yet: enter it first, with `async with TransportGroup() as group:`"
            )
        return RuntimeError(
            f"{call}the group is not open any more: do this before its `async with` block is left, or in a new "
            "TransportGroup"
        )

    def _live_poller(self, name: str = "") -> Poller:
        if self._poller is None:
            raise self._not_open(name)
        return self._poller

    def _require_open(self) -> Poller:
        if not self._open:
            raise self._not_open()
        return self._live_poller()

    def _require_alive(self, name: str) -> Poller:
        if not self._alive:
            raise self._not_open(name)
        return self._live_poller()

    def _require_callable(self, name: str, called_as: str) -> None:
        if not self._open:
            raise self._not_open(name)
        self._require_own_thread(name, f"anyio.from_thread.run({called_as}, ...)")

    def _require_own_thread(self, name: str, instead: str) -> None:
        if get_ident() != self._thread:
            raise RuntimeError(
                f"{name}() was called in another thread than the group's: call {instead} in one of AnyIO's worker "
                "threads, or hand the call over with group.call_soon_threadsafe()"
            )

    def _as_group(self) -> TransportGroup:
        return self

    def _door(self) -> Door:
        return Door(self)

    def user_call(self) -> Callable[..., Any]:
        """Return what calls the user's code that belongs to no transport yet."""
        return Door(self).run

    def _own(self, transport: Owned) -> None:
        self._transports.add(transport)

    def _disown(self, transport: Owned) -> None:
        self._transports.discard(transport)
        received, sent, _ = transport.traffic()
        self._bytes_received += received
        self._bytes_sent += sent
        self._changed.notify()

    def accepted(
        self, protocol_factory: Callable[[], Any], channel: Channel, on_lost: Callable[[StreamTransport], None]
    ) -> StreamTransport:
        """Make the transport of a connection that a server accepted."""
        return self._make_transport(protocol_factory, channel, on_lost)[0]

    def pending_handshake(self, channel: TLSChannel) -> PendingHandshake:
        """Own the handshake of a connection that a server accepted."""
        return PendingHandshake(channel, self._own, self._disown)

    def forget_transport(self, transport: Owned) -> None:
        """Take note that `transport` has ended."""
        self._disown(transport)

    def forget_server(self, server: Server) -> None:
        """Take note that `server` is closed."""
        self._servers.discard(server)

    # Tasks

    def start_soon(self, async_function: AsyncFunction, *args: Any, name: object = None) -> None:
        """Start a task that belongs to the group and awaits `async_function(*args)`.

        May be called from a callback: a task that `data_received` starts has its first turn before its connection
        receives more. The failure of a task cancels the group, as in any AnyIO task group. `name` is for debugging, the
        function's by default.

        Raises `RuntimeError` when the group is not open and in another thread, `TypeError` when `async_function` is
        none, or does not take these arguments.
        """
        self._require_alive("start_soon")
        self._require_own_thread("start_soon", "anyio.from_thread.run_sync(group.start_soon, ...)")
        if not callable(async_function):
            msg = f"start_soon() takes an async function and its arguments, got {async_function!r}"
            raise TypeError(msg)
        context = copy_context()
        context.run(current.set, self)
        context.run(self._start_task, async_function, args, name)

    def _start_task(self, async_function: AsyncFunction, args: tuple[Any, ...], name: object) -> None:
        name = getattr(async_function, "__qualname__", None) if name is None else str(name)
        # Called here, so that a mistake comes out where it was made.
        coroutine = async_function(*args)
        if not isinstance(coroutine, Coroutine):
            raise TypeError(f"start_soon() takes an async function, but {async_function!r} returned {coroutine!r}")
        try:
            self._task_group.start_soon(self._run_task, coroutine, name=name)
        except BaseException:
            coroutine.close()
            raise
        self._tasks_running += 1
        self.tasks_started = True

    async def _run_task(self, coroutine: Coroutine[Any, Any, object]) -> None:
        try:
            await coroutine
        finally:
            self._tasks_running -= 1
            self._changed.notify()

    # Time

    def time(self) -> float:
        """Return the time of the group's clock, in seconds: the backend's, as `anyio.current_time`.

        Raises `RuntimeError` before the group is entered.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.time
        """
        return self._live_poller("time").time()

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:
        """Call `callback(*args)` in the group's next turn, in `context` or a copy of the caller's.

        First in, first out. What the callback raises goes to the exception handler. Raises `RuntimeError` when the
        group is not open, `TypeError` when `callback` cannot be called.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon
        """
        poller = self._require_alive("call_soon")
        handle = Handle(callback, args, self._context_for(callback, context))
        self._ready.append(handle)
        poller.wake()
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Call `callback(*args)` in the group's next turn, as `call_soon` does, from any thread.

        `context` defaults to a copy of the caller's. Raises as `call_soon` does.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_soon_threadsafe
        """
        handle = Handle(callback, args, self._context_for(callback, context))
        with self._handing_over:
            poller = self._require_alive("call_soon_threadsafe")
            self._ready.append(handle)
        try:
            poller.wake_threadsafe()
        except RuntimeError as exc:
            if self._alive:  # It was never left, and nothing runs any more that could call anything.
                raise self._not_open("call_soon_threadsafe") from exc
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        """Call `callback(*args)` after `delay` seconds, in `context` or a copy of the caller's.

        Timers run by time, then in the order in which they were made. One that is pending when the group ends never
        runs. Raises as `call_soon` does, `TypeError` also when `delay` is no number, `ValueError` when it is NaN.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_later
        """
        poller = self._poller
        if poller is None:
            raise self._not_open("call_later")
        return self._set_timer(poller.time() + delay, callback, args, context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        """Call `callback(*args)` at `when`, in seconds of `time`, otherwise as `call_later` does.

        `context` and what is raised are as for `call_later`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_at
        """
        return self._set_timer(when, callback, args, context)

    def _set_timer(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> TimerHandle:
        poller = self._poller
        if poller is None or not self._alive:
            raise self._not_open("call_later() or call_at")
        if not -inf <= when <= inf:
            raise ValueError(f"a time was expected, got {when!r}")
        when = float(when)  # `OverflowError` for an integer that is too large.
        timers = self._timers
        handle = TimerHandle(when, callback, args, self._context_for(callback, context), timers)
        if poller.waiting and timers.next_deadline() == when:
            poller.wait_until(when)
        return handle

    def _first_timer_cancelled(self) -> None:
        poller = self._poller
        if poller is not None and poller.waiting:
            poller.wait_until(self._timers.next_deadline())

    def _context_for(self, callback: object, given: Context | None) -> Context | GivenContext:
        """Return where `callback` runs. Raises `TypeError` when it cannot be called."""
        if not callable(callback):
            msg = f"a callable object was expected, got {callback!r}"
            raise TypeError(msg)
        if given is not None:
            return GivenContext(given, self)
        context = copy_context()
        if context.get(current) is not self:
            context.run(current.set, self)
        return context

    # Errors

    def set_exception_handler(self, handler: ExceptionHandler | None) -> None:
        """Call `handler(group, context)` for every error of a callback; `None` restores the default.

        Raises `TypeError` when `handler` is neither callable nor `None`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.set_exception_handler
        """
        if handler is not None and not callable(handler):
            msg = f"a callable object or None is expected, got {handler!r}"
            raise TypeError(msg)
        self._errors.handler = handler

    def get_exception_handler(self) -> ExceptionHandler | None:
        """Return the handler that was set, or `None` while the default one is in use.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.get_exception_handler
        """
        return self._errors.handler

    def call_exception_handler(self, context: ExceptionContext) -> None:
        """Report `context` to the exception handler: `message`, and perhaps `exception`, `transport` and others.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.call_exception_handler
        """
        self._errors.report(context)

    def default_exception_handler(self, context: ExceptionContext) -> None:
        """Log `context` as an error, to the logger `transports_anyio`, with the traceback of its `exception`.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.default_exception_handler
        """
        self._errors.report_by_default(context)

    # Looking at it

    def statistics(self) -> GroupStatistics:
        """Return what is open, buffered and pending, and how much has been moved; as AnyIO's `statistics` methods.

        May be called from any thread.
        """
        owned = tuple(self._transports)  # Whoever looks may be another thread.
        transports = [each for each in owned if not isinstance(each, PendingHandshake)]
        traffic = [transport.traffic() for transport in transports]
        return GroupStatistics(
            open_transports=dict(Counter(type(transport).__name__ for transport in transports)),
            pending_handshakes=len(owned) - len(transports),
            open_servers=len(self._servers),
            running_tasks=self._tasks_running,
            bytes_received=self._bytes_received + sum(received for received, _, _ in traffic),
            bytes_sent=self._bytes_sent + sum(sent for _, sent, _ in traffic),
            bytes_buffered=sum(buffered for _, _, buffered in traffic),
            pending_timers=len(self._timers),
        )

    def __repr__(self) -> str:
        state = "open" if self._open else "new" if self._poller is None else "closing" if self._alive else "closed"
        return (
            f"<TransportGroup {state} {describe_flow('transports', self._transports)} servers={len(self._servers)} "
            f"tasks={self._tasks_running} timers={len(self._timers)}>"
        )
