"""The inside of a group: all that the rooms below the group are given of it.

Holds: the group's turn, what the group owns, when it may be asked for something, and timers.
May know: the door, the poller, timers, what is owned, what every channel can. Knows no endpoint and no transport.
"""

from __future__ import annotations

from asyncio import AbstractServer, _get_running_loop  # pyright: ignore[reportPrivateUsage]  # for those who make loops
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from contextvars import Context, copy_context
from functools import partial
from math import inf
from threading import RLock, get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from ._callbacks import CallbackContext, GivenContext, current
from ._errors import ExceptionContext, Group, NotOpenError, is_refusal, logger, safe_repr, should_propagate
from ._loop_poller import make_poller
from ._poller import RESOLUTION, Poller
from ._resources import Resource
from ._scheduling import Handle, TimerHandle, Timers
from ._selector import Failed, Registration
from ._waiters import Waiters

if TYPE_CHECKING:
    from anyio import CancelScope
    from anyio.abc import TaskGroup

    from ._channels._abc import Channel
    from ._channels._datagram import DatagramChannel

# How many descriptors a turn serves, and for how many seconds it goes on, before it lets the tasks have theirs.
SERVED_IN_A_TURN = 64
LENGTH_OF_A_TURN = 0.002

# How many rounds of the backend tasks get, before a timer runs, to receive what had arrived when it fell due. In the
# first the backend may only ask the system; trio runs tasks in any order, so it takes a second until all have run; one
# more is for an AnyIO stream over another one.
ROUNDS_FOR_TASKS = 3

# How often callbacks may go on handing over other callbacks when nothing else is left to wait for.
LAST_TURNS = 100

T = TypeVar("T")
ProtocolT = TypeVar("ProtocolT")
ChannelT = TypeVar("ChannelT", bound="Channel | DatagramChannel")
TransportT = TypeVar("TransportT", bound=Resource)


def in_another_thread(name: str, instead: str) -> RuntimeError:
    """Return what to raise for a call of `name` in another thread than the group's."""
    return RuntimeError(
        f"{name}() was called in another thread than the group's: call {instead} in one of AnyIO's worker threads, or "
        "hand the call over with group.call_soon_threadsafe()"
    )


class Core:
    """What a group owns, and its turn. `TransportGroup` enters and leaves it."""

    #: Whether a turn goes on for what callbacks have scheduled, too, or only while there is input or output.
    goes_on = False

    # Both once the group is entered.
    dispatch: Callable[[Failed], int]
    time: Callable[[], float]
    task_group: TaskGroup
    turns: CancelScope

    def __init__(self, group: Group) -> None:
        self.group: Group = group
        self.poller: Poller | None = None
        self.ready: deque[Callable[[], object]] = deque()
        self.timers: Timers = Timers(self._first_timer_cancelled)
        self.transports: set[Resource] = set()
        self.servers: set[AbstractServer] = set()
        self.tasks_running: int = 0
        self.tasks_started: bool = False  # Since the turn began.
        self.receiving_tasks: int = 0  # Tasks of ours that receive for a transport, or report what is ready.
        self._rounds_for_tasks = 0  # That due timers have waited for them.
        self._ending = False  # The turns go on only until the tasks of the user have ended.
        self.bytes_received: int = 0  # By transports that have ended; as sent.
        self.bytes_sent: int = 0
        self.changed: Waiters = Waiters()
        self.open: bool = False  # Between entering and leaving the block: connections can be made.
        self.alive: bool = False  # Until the last `connection_lost`: callbacks can be scheduled.
        # Held while another thread hands something over: before the end, or not at all. Signal handlers may do so, too.
        self.handing_over: RLock = RLock()
        self.thread: int = 0  # Where it was entered; no thread has this number.

    def leaves(self, exc: BaseException) -> bool:
        """Whether `exc`, raised in the user's code, ends the group instead of being reported."""
        return should_propagate(exc)

    # A group on asyncio, uvloop or trio calls everything from tasks and callbacks of that backend. The event loop runs
    # asyncio code on trio, and has other answers.

    def as_backend(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, which needs the backend: it starts a task, for example."""
        if self.live_poller().loop is None:
            core: Core | None = getattr(_get_running_loop(), "_core", None)
            if core is not None:  # A group of trio's, which asyncio code in an event loop of ours has called.
                return core.as_backend(function, *args)
        return function(*args)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, which calls the user's code, from a task of ours."""
        return function(*args)

    async def enter(self, stack: AsyncExitStack) -> None:
        """Open the poller and take turns in a task of its own, until `stack` is left."""
        self.poller = poller = make_poller()
        stack.callback(poller.close)
        self.dispatch = poller.dispatch
        poller.as_backend = self.as_backend
        self.time = poller.time
        self.receiving_tasks += poller.needs_tasks
        self.turns = anyio.CancelScope(shield=True)
        self.task_group = await stack.enter_async_context(anyio.create_task_group())
        self._start_turns()
        # Twice, because trio lets a `KeyboardInterrupt` come between any two lines: what it keeps one of them from, the
        # next one does.
        stack.callback(self.end_turns)
        stack.callback(self.end_turns)

    def _start_turns(self) -> None:
        self.task_group.start_soon(self._take_turns, name="transports_anyio: turns of a group")

    def opened(self) -> None:
        """Allow connections and callbacks from now on, in this thread."""
        self.thread = get_ident()
        self.open = self.alive = True

    async def _take_turns(self) -> None:
        with self.turns:
            try:
                await self.live_poller().run(self)
            finally:
                # No wait of a task, shielded perhaps, may need another turn. What ends the group is known first.
                if not self.turns.cancel_called:
                    self.task_group.cancel_scope.cancel()
                self.call(self.finish)

    # The turn

    def turn(self) -> float:
        """Run what was scheduled, let everything that is ready move its bytes once, then run the timers that are due.

        That is asyncio's order. Return when the next turn is due: minus infinity for at once.
        """
        dispatch = self.dispatch
        failed = self._descriptor_failed
        time = self.time
        timers = self.timers
        ready = self.ready
        served = 0
        self.tasks_started = False
        until = monotonic() + LENGTH_OF_A_TURN
        while True:
            if ready:
                self._run_ready()
            # Before the system is asked: what has arrived while callbacks ran comes before what fell due meanwhile.
            now = time() + RESOLUTION if timers.heap else -inf
            count = dispatch(failed)
            if timers.heap and timers.next_deadline() <= now:
                if self.receiving_tasks and self._rounds_for_tasks < ROUNDS_FOR_TASKS:
                    self._rounds_for_tasks += 1
                    return -inf
                self._rounds_for_tasks = 0
                self._run_due(now)
            served += count
            # What came in meanwhile can be had for one system call, where another wait costs a round through the
            # backend; but tasks want their turn too, and a new one its first: it may be about to call `start_tls`, and
            # what comes in is the handshake then.
            if (
                not (count or (ready and self.goes_on))
                or served >= SERVED_IN_A_TURN
                or self.tasks_started
                or monotonic() >= until
            ):
                break
        self._rounds_for_tasks = 0
        if ready or self.tasks_started:
            return -inf
        return timers.next_deadline() if timers.heap else inf

    def _run_ready(self) -> None:
        """Run what is ready now; what it schedules waits for the next turn, so that I/O gets its turn."""
        ready = self.ready
        callback = None
        for _ in range(len(ready)):
            callback = ready.popleft()
            try:
                callback()
            except BaseException as exc:
                self._callback_failed(callback, exc)
        del callback  # The traceback of an exception that a task keeps has this frame behind it: no cycle.

    def _run_due(self, now: float) -> None:
        """Run the timers due at `now`; what I/O has scheduled before them waits for the next turn, as in asyncio."""
        for handle in self.timers.take_due(now):
            self._run_callback(handle)

    def _run_callback(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except BaseException as exc:
            self._callback_failed(callback, exc)

    def _callback_failed(self, callback: Callable[[], object], exc: BaseException) -> None:
        if self.leaves(exc):
            raise exc
        context: ExceptionContext = {"message": f"Exception in callback {safe_repr(callback)}", "exception": exc}
        if isinstance(callback, Handle):
            context["handle"] = callback
            # A copy: what failed may be to enter a context that is entered already.
            callback.get_context().copy().run(self.group.call_exception_handler, context)
        else:
            self.group.call_exception_handler(context)

    def _descriptor_failed(self, registration: Registration, exc: BaseException) -> None:
        """Report what a callback of a descriptor raised; it is called again while the descriptor is ready."""
        if self.leaves(exc):
            raise exc
        self.group.call_exception_handler(
            {"message": f"Exception in callback of file descriptor {registration.fd}", "exception": exc}
        )

    def start_internal_task(self, async_function: Callable[[], Coroutine[Any, Any, None]], name: object = None) -> None:
        """Start a task of ours."""
        self.as_backend(partial(self.task_group.start_soon, async_function, name=name))

    # What waits for a turn

    def call_internal(self, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` in the group's next turn, without a context or a handle."""
        self.ready.append(partial(callback, *args) if args else callback)
        if self.poller is not None:
            self.poller.wake()

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> TimerHandle:
        """Call `callback(*args)` after `delay` seconds, in a copy of the caller's context."""
        return self.set_timer(self.live_poller().time() + delay, callback, args, None)

    def set_timer(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> TimerHandle:
        poller = self.poller
        if poller is None or not self.alive:
            raise self.not_open("call_later() or call_at")
        if not -inf <= when <= inf:
            raise ValueError(f"a time was expected, got {when!r}")
        when = float(when)  # `OverflowError` for an integer that is too large.
        timers = self.timers
        handle = TimerHandle(when, callback, args, self.context_for(callback, context), timers)
        if poller.waiting and timers.next_deadline() == when:
            poller.wait_until(when)
        return handle

    def _first_timer_cancelled(self) -> None:
        poller = self.poller
        if poller is not None and poller.waiting:
            poller.wait_until(self.timers.next_deadline())

    def context_for(self, callback: object, given: Context | None) -> Context | GivenContext:
        """Return where `callback` runs. Raises `TypeError` when it cannot be called."""
        if not callable(callback):
            msg = f"a callable object was expected, got {callback!r}"
            raise TypeError(msg)
        if given is not None:
            return GivenContext(given, self.group)
        context = copy_context()
        if context.get(current) is not self.group:
            context.run(current.set, self.group)
        return context

    # When what can be asked for

    def not_open(self, name: str = "") -> NotOpenError:
        """Return what to raise for a call of `name` outside the group's life."""
        call = f"{name}(): " if name else ""
        if self.poller is None:
            return NotOpenError(
                f"{call}the group is not open yet: enter it first, with `async with TransportGroup() as group:`",
                self.group,
            )
        return NotOpenError(
            f"{call}the group is not open any more: do this before its `async with` block is left, or in a new "
            "TransportGroup",
            self.group,
        )

    def live_poller(self, name: str = "") -> Poller:
        """Return the poller, or raise `RuntimeError` before the group is entered."""
        if self.poller is None:
            raise self.not_open(name)
        return self.poller

    def require_open(self) -> Poller:
        """Return the poller, or raise `RuntimeError` when no connections can be made."""
        poller = self.poller
        if poller is None or not self.open:
            raise self.not_open()
        return poller

    def require_alive(self, name: str) -> Poller:
        """Return the poller, or raise `RuntimeError` when no callbacks can be scheduled."""
        poller = self.poller
        if poller is None or not self.alive:
            raise self.not_open(name)
        return poller

    def require_callable(self, name: str, called_as: str) -> None:
        """Raise `RuntimeError` when the endpoint function `name` is called too early or late, or in another thread."""
        if not self.open:
            raise self.not_open(name)
        if get_ident() != self.thread:
            raise in_another_thread(name, f"anyio.from_thread.run({called_as}, ...)")

    def require_own_thread(self, name: str, instead: str) -> None:
        """Raise `RuntimeError`, which says what to call `instead`, in another thread than the group's."""
        if get_ident() != self.thread:
            raise in_another_thread(name, instead)

    # Ownership

    def callback_context(self) -> CallbackContext:
        """Make the door of one connection."""
        return CallbackContext(self.group, self.call_internal, self.leaves)

    def new_user_call(self) -> Callable[..., Any]:
        """Return what calls the user's code that belongs to no transport yet."""
        return self.callback_context().run

    def make_transport(
        self,
        transport_class: Callable[[CallbackContext, ChannelT, Any, Callable[[TransportT], None]], TransportT],
        protocol_factory: Callable[[], ProtocolT],
        channel: ChannelT,
        on_lost: Callable[[TransportT], None] | None = None,
    ) -> tuple[TransportT, ProtocolT]:
        """Give `channel` a protocol and a transport that the group owns; the caller starts it.

        `on_lost`, if any, calls `disown`. What the factory raises is the caller's to handle; the channel is closed
        first.
        """
        callback_context = self.callback_context()
        try:
            protocol = callback_context.make_protocol(protocol_factory)
            transport = transport_class(callback_context, channel, protocol, on_lost or self.remove_resource)
        except BaseException:
            channel.close(aborted=True)
            raise
        self.add_resource(transport)
        return transport, protocol

    def add_resource(self, transport: Resource) -> None:
        """End `transport` when the group ends."""
        self.transports.add(transport)

    def remove_resource(self, transport: Resource) -> None:
        """Forget `transport`: its `connection_lost` has been delivered."""
        self.transports.discard(transport)
        received, sent, _ = transport.traffic()
        self.bytes_received += received
        self.bytes_sent += sent
        self.changed.notify()

    def start_task(self, async_function: Callable[..., object], args: tuple[Any, ...], name: object) -> None:
        """Start a task of the user's, in the caller's context."""
        name = getattr(async_function, "__qualname__", None) if name is None else str(name)
        # Called here, so that a mistake comes out where it was made.
        coroutine = async_function(*args)
        if not isinstance(coroutine, Coroutine):
            raise TypeError(f"start_soon() takes an async function, but {async_function!r} returned {coroutine!r}")
        try:
            self.as_backend(partial(self.task_group.start_soon, self._run_task, coroutine, name=name))
        except BaseException:
            coroutine.close()
            raise
        self.tasks_running += 1
        self.tasks_started = True

    async def _run_task(self, coroutine: Coroutine[Any, Any, object]) -> None:
        try:
            await coroutine
        except Exception as exc:
            if self.open or not is_refusal(exc, self.group):
                raise
            # It wanted a new connection, say, when all are being closed: no failure of a block that is left normally.
            logger.info("%s has ended, for the group is being left: %s", safe_repr(coroutine), exc)
        finally:
            self.tasks_running -= 1
            self.changed.notify()
            if self._ending:
                self.end_turns()

    # The end

    async def until_empty(self) -> None:
        """Wait until no transport is left, no task of the user's, and no callback that may start one."""
        turns = LAST_TURNS
        while True:
            while self.transports or self.tasks_running:
                await self.changed.wait()
            if not self.ready or not turns:
                return
            turns -= 1
            self.call(self._run_ready)

    def close_all(self) -> None:
        """Close the servers and the transports."""
        for server in tuple(self.servers):
            server.close()
        for transport in tuple(self.transports):
            transport.close()

    def abort_transports(self) -> None:
        """Close the servers and abort the transports."""
        for server in tuple(self.servers):
            server.close()
        for transport in tuple(self.transports):
            transport.abort()

    def abort_all(self) -> None:
        """Abort what is left and deliver every `connection_lost`; raises what the user's code raises to leave."""
        self.open = False
        self.abort_transports()
        leaving: BaseException | None = None
        while self.transports and self.ready:
            try:
                self._run_ready()
            except BaseException as error:
                leaving = leaving or error
        try:
            self._run_all_ready()
        except BaseException as error:
            leaving = leaving or error
        self.timers.clear()  # Those that are pending never fire.
        if leaving is not None:
            raise leaving

    def finish(self) -> None:
        """Abort what is left, and take no more callbacks."""
        try:
            self.abort_all()
        finally:
            self.end()

    def end_turns(self) -> None:
        """Take turns only until the tasks of the user have ended: their cleaning up may still need some."""
        self._ending = True
        if not self.tasks_running:
            self.turns.cancel()

    def end(self) -> None:
        """Take no more callbacks, for no turn comes any more; run those that were taken."""
        with self.handing_over:
            self.alive = False
        try:
            self._run_all_ready()
        finally:
            self.ready.clear()
            self.timers.clear()

    def _run_all_ready(self) -> None:
        """Run what is ready now, all of it; raises the first thing that leaves through the group."""
        leaving: BaseException | None = None
        for _ in range(len(self.ready)):
            try:
                self._run_callback(self.ready.popleft())
            except BaseException as error:
                leaving = leaving or error
        if leaving is not None:
            raise leaving
