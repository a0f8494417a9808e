"""The inside of a group, which endpoint functions and servers use.

Holds: what a group owns, its life cycle, and its tasks.
May know: `anyio`, `asyncio`, `_callbacks`, `_channels`, `_errors`, `_poller`, `_resources`, `_scheduler`, `_waiters`.
Knows neither endpoint functions nor transports.
"""

from __future__ import annotations

from asyncio import AbstractServer
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from ._channels._anyio import SlowSends
from ._errors import ExceptionContext, Group, is_refusal, logger, safe_repr
from ._poller import make_poller
from ._resources import PendingHandshake, Resource
from ._scheduler import Scheduler, wrong_thread
from ._waiters import Waiters, asyncio_loop, trio_functions

if TYPE_CHECKING:
    from anyio import CancelScope
    from anyio.abc import TaskGroup

    from ._callbacks import CallbackContext
    from ._channels._abc import Channel
    from ._channels._tls import TLSChannel
    from ._poller import Poller

# How many times callbacks may schedule other callbacks after everything else has ended.
LAST_ITERATIONS = 100

ProtocolT = TypeVar("ProtocolT")
ChannelT = TypeVar("ChannelT", bound="Channel")
TransportT = TypeVar("TransportT", bound=Resource)


class Core(Scheduler):
    """The scheduler of a group, with all that the group owns. `TransportGroup` enters and leaves it."""

    # These exist once the group is entered.
    task_group: TaskGroup
    scheduler_scope: CancelScope

    # Defaults of the class: an instance with 30 or more attributes makes all of them slower to look up in CPython.
    bytes_received: int = 0  # By transports that have ended.
    bytes_sent: int = 0
    _ending = False  # The scheduler stops after the last task of the user.

    #: The call that starts a task in a callback, for messages.
    task_starter = "current_group().start_soon()"

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.transports: set[Resource] = set()
        self.handshakes: set[PendingHandshake] = set()
        self.servers: set[AbstractServer] = set()
        self.open: bool = False  # Connections can be made: the block has been entered and not been left.
        self.tasks_running: int = 0

        self.slow_sends: SlowSends = SlowSends(self)
        self.changed: Waiters = Waiters()  # Notified when a transport, handshake or task ends.

    # Life cycle

    async def enter(self, stack: AsyncExitStack) -> None:
        """Open the poller, and run the scheduler in a task until `stack` is left."""
        if asyncio_loop() is None:
            trio_functions()  # Ctrl-C must not interrupt the first wait either.
        poller = make_poller()
        stack.callback(poller.close)
        self.open_poller(poller)
        self.scheduler_scope = anyio.CancelScope(shield=True)
        self.task_group = await stack.enter_async_context(anyio.create_task_group())
        self._start_scheduler()
        # Registered twice on purpose: a `KeyboardInterrupt` may interrupt the first call on trio.
        stack.callback(self.stop_after_tasks)
        stack.callback(self.stop_after_tasks)

    def _start_scheduler(self) -> None:
        self.task_group.start_soon(self._run_scheduler, name="transports_anyio: scheduler of a group")

    def opened(self) -> None:
        """Accept connections and callbacks from now on, in this thread."""
        self.thread: int = get_ident()
        self.open = self.alive = True

    async def _run_scheduler(self) -> None:
        with self.scheduler_scope:
            try:
                await self.driver.run(self)
            finally:
                # The scheduler has failed: end the tasks, perhaps shielded ones, that wait for it.
                if not self.scheduler_scope.cancel_called:
                    self.task_group.cancel_scope.cancel()
                self.call(self.finish)

    def check_open(self, name: str = "", called_as: str = "") -> Poller:
        """Return the poller. Raises `RuntimeError` if the endpoint function `name` cannot make connections.

        That is before the group is open, once it is being left, and in another thread. `called_as` is how users call
        the function, if that is not `group.name`.
        """
        if not self.open:
            raise self.not_open(name)
        if get_ident() != self.thread:
            raise wrong_thread(name, f"anyio.from_thread.run({called_as or f'group.{name}'}, ...)")
        return self.poller

    # Ownership

    def make_transport(
        self,
        transport_class: Callable[[CallbackContext, ChannelT, Any, Callable[[TransportT], None]], TransportT],
        protocol_factory: Callable[[], ProtocolT],
        channel: ChannelT,
        on_lost: Callable[[TransportT], None] | None = None,
    ) -> tuple[TransportT, ProtocolT]:
        """Return a new transport, which the group owns and the caller starts, and its protocol.

        `on_lost` is called after `connection_lost`, and has to call `remove_resource`, which is the default. Raises
        what the factory raises; `channel` is closed then.
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
        """Own `transport`: it ends with the group."""
        self.transports.add(transport)

    def remove_resource(self, transport: Resource) -> None:
        """Forget `transport`, whose `connection_lost` has been called."""
        self.transports.discard(transport)
        received, sent, _ = transport._traffic()
        self.bytes_received += received
        self.bytes_sent += sent
        self.changed.notify()

    def handshake(
        self,
        channel: TLSChannel,
        done: Callable[[PendingHandshake, Exception | None], None],
        *members: set[PendingHandshake],
    ) -> None:
        """Begin the TLS handshake of `channel`, which ends with the group.

        Call `done` once, perhaps before this returns, with the error, or `None`. After an error `channel` is closed.
        The sets in `members` have the pending handshake until then.
        """
        PendingHandshake(channel, (self.handshakes, *members), partial(self._handshake_done, done)).begin()

    def _handshake_done(
        self,
        done: Callable[[PendingHandshake, Exception | None], None],
        pending: PendingHandshake,
        exc: Exception | None,
    ) -> None:
        self.changed.notify()
        done(pending, exc)

    def report_handshake(self, context: ExceptionContext) -> None:
        """Report the failed TLS handshake of an accepted connection to the exception handler."""
        self.group.call_exception_handler(context)

    @property
    def has_connections(self) -> bool:
        """Whether any transport or handshake is left."""
        return bool(self.transports or self.handshakes)

    @property
    def pending_timers(self) -> int:
        """How many timers of the user are pending."""
        return len(self.timers) - self.slow_sends.is_pending

    # Tasks

    def start_task(
        self,
        async_function: Callable[..., object],
        args: tuple[Any, ...],
        name: object,
        around: Callable[[Coroutine[Any, Any, object]], Coroutine[Any, Any, object]] | None = None,
    ) -> None:
        """Start a task of the user, in the caller's context. It runs inside of `around`, if that is given."""
        name = getattr(async_function, "__qualname__", None) if name is None else str(name)
        # Called here, so that wrong arguments raise in the caller.
        coroutine = async_function(*args)
        if not isinstance(coroutine, Coroutine):
            raise TypeError(f"start_soon() takes an async function, but {async_function!r} returned {coroutine!r}")
        try:
            self.as_backend(partial(self.task_group.start_soon, partial(self._run_task, coroutine, around), name=name))
        except BaseException:
            coroutine.close()
            raise
        self.tasks_running += 1
        self.tasks_started = True

    async def _run_task(
        self,
        coroutine: Coroutine[Any, Any, object],
        around: Callable[[Coroutine[Any, Any, object]], Coroutine[Any, Any, object]] | None,
    ) -> None:
        try:
            await (coroutine if around is None else around(coroutine))
        except Exception as exc:
            if self.open or not is_refusal(exc, self.group):
                raise
            # The group refused a new connection because it is being left normally: that is not an error of the block.
            logger.info("%s ended because the group is being left: %s", safe_repr(coroutine), exc)
        finally:
            self.tasks_running -= 1
            self.changed.notify()
            if self._ending:
                self.stop_after_tasks()

    def start_internal_task(self, async_function: Callable[[], Coroutine[Any, Any, None]], name: object = None) -> None:
        """Start a task of ours."""
        self.as_backend(partial(self.task_group.start_soon, async_function, name=name))

    # The end

    async def until_empty(self) -> None:
        """Wait until no connection is left, no task of the user, and no callback that may start one."""
        iterations = LAST_ITERATIONS
        while True:
            while self.has_connections or self.tasks_running:
                await self.changed.wait()
            if not self.ready or not iterations:
                return
            iterations -= 1
            self.call(self._run_ready)

    def close_all(self) -> None:
        """Close the servers and the transports, and abort the handshakes."""
        for server in tuple(self.servers):
            server.close()
        for pending in tuple(self.handshakes):
            pending.abort()
        for transport in tuple(self.transports):
            transport.close()

    def request_shutdown(self) -> None:
        """Close the servers, abort the handshakes, and have the transports end. No new connections can be made."""
        self.open = False
        for server in tuple(self.servers):
            server.close()
        for pending in tuple(self.handshakes):
            pending.abort()
        for transport in tuple(self.transports):
            transport._request_shutdown()

    def abort_transports(self) -> None:
        """Close the servers, and abort the handshakes and transports."""
        for server in tuple(self.servers):
            server.close()
        for pending in tuple(self.handshakes):
            pending.abort()
        for transport in tuple(self.transports):
            transport._abort()

    def abort_all(self) -> None:
        """Abort what is left, and call every `connection_lost`.

        Re-raises `KeyboardInterrupt` and `SystemExit` of callbacks, after all of them have run.
        """
        self.open = False
        self.abort_transports()
        first: BaseException | None = None
        while self.has_connections and self.ready:
            try:
                self._run_ready()
            except BaseException as exc:
                first = first or exc
        try:
            self._run_all_ready()
        except BaseException as exc:
            first = first or exc
        self.timers.clear()  # Pending timers never run.
        if first is not None:
            raise first

    def finish(self) -> None:
        """Abort what is left, and accept no more callbacks."""
        try:
            self.abort_all()
        finally:
            self.end()

    def stop_after_tasks(self) -> None:
        """Stop the scheduler after the last task of the user: tasks may need it while they clean up."""
        self._ending = True
        if not self.tasks_running:
            self.scheduler_scope.cancel()
