"""The scheduler: callbacks and timers, and the iterations of the event loop in which they run.

Holds: the queue of callbacks, the timers, and the order in which one iteration runs them.
May know: `asyncio`, `_callbacks`, `_clock`, `_driver`, `_errors`, `_handles`, `_poller`, `_selector`.
"""

from __future__ import annotations

from asyncio import _get_running_loop  # pyright: ignore[reportPrivateUsage]  # the public one raises if there is none
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from math import inf
from threading import RLock, get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from ._callbacks import CallbackContext, GivenContext, check_scheduled, current
from ._clock import monotonic
from ._driver import RESOLUTION
from ._errors import ExceptionContext, Group, NotOpenError, safe_repr, should_propagate
from ._handles import ABSENT, TAKEN, Handle, TimerHandle, Timers

if TYPE_CHECKING:
    from ._clock import Clock
    from ._driver import Driver
    from ._poller import Poller
    from ._selector import Failed, Registration

# An iteration serves this number of file descriptors, or lasts this number of seconds; then tasks can run.
MAX_SERVED = 64
MAX_SECONDS = 0.002

# How many iterations of the backend a due timer waits for tasks to receive what arrived before it was due. In the first
# one the backend may only poll the system. trio runs tasks in random order, so all of them have run only after a
# second one. A third one is for an AnyIO stream over another stream.
ROUNDS_FOR_TASKS = 3

T = TypeVar("T")


def wrong_thread(name: str, instead: str) -> RuntimeError:
    """Return the error for calling `name` in another thread than the group's."""
    return RuntimeError(
        f"{name}() was called in another thread than the group's: call {instead} in one of AnyIO's worker threads, or "
        "use group.call_soon_threadsafe()"
    )


class Scheduler:
    """Runs callbacks, timers and the callbacks of file descriptors, in asyncio's order."""

    #: Whether an iteration continues while callbacks schedule callbacks, and not only while descriptors are ready.
    goes_on = False

    # These exist once the poller is open.
    poller: Poller
    driver: Driver
    dispatch: Callable[[Failed], int]

    def __init__(self, group: Group) -> None:
        self.group: Group = group
        self.ready: deque[Callable[[], object]] = deque()
        self.timers: Timers = Timers()
        self.entered: bool = False  # The poller has been opened.
        self.alive: bool = False  # Callbacks can be scheduled.
        self.thread: int = 0  # The thread that runs the iterations. No thread has the number 0.
        # Makes scheduling from other threads atomic with the end. Reentrant, for signal handlers.
        self.handing_over: RLock = RLock()
        self.tasks_started: bool = False  # Since the iteration began.
        self.receiving_tasks: int = 0  # Our tasks that receive for a transport, or wait for a file descriptor.
        self._rounds_for_tasks = 0  # How many iterations of the backend due timers have waited for these tasks.

    def open_poller(self, poller: Poller) -> None:
        """Use `poller` from now on."""
        self.poller = poller
        self.driver = poller.driver
        self.dispatch = poller.dispatch
        self.clock: Clock = poller.clock
        self.receiving_tasks += poller.selector.needs_tasks
        poller.selector.as_backend = self.as_backend
        self.entered = True

    # A group on asyncio, uvloop or trio calls everything from tasks and callbacks of that backend. The event loop on
    # trio, where two kinds of code run, overrides these methods.

    def as_backend(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, which needs the backend: it starts a task, for example."""
        if self.poller.loop is None:
            # A group on trio, and perhaps asyncio code in our event loop has called it.
            running = scheduler_of(_get_running_loop())
            if running is not None:
                return running.as_backend(function, *args)
        return function(*args)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, which runs user code. A task of ours calls this."""
        return function(*args)

    # One iteration

    def run_once(self) -> float:
        """Run scheduled callbacks, then the callbacks of file descriptors that are ready, then the timers that are due.

        That is asyncio's order. Return the deadline of the next iteration: minus infinity means at once. It may be too
        early, if timers were cancelled or moved: `next_deadline` looks for the exact one.
        """
        dispatch = self.dispatch
        failed = self._fd_callback_failed
        clock = self.clock
        timers = self.timers
        ready = self.ready
        served = 0
        self.tasks_started = False
        until = monotonic() + MAX_SECONDS
        while True:
            # The time before callbacks run: what they schedule, and data that arrives meanwhile, comes before timers
            # that fall due then.
            now = clock.time() + RESOLUTION if timers.heap else -inf
            if ready:
                self._run_ready()
            count = dispatch(failed)
            if timers.heap and timers.heap[0][0] <= now and timers.next_deadline() <= now:
                if self.receiving_tasks and self._rounds_for_tasks < ROUNDS_FOR_TASKS:
                    self._rounds_for_tasks += 1
                    return -inf
                self._rounds_for_tasks = 0
                self._run_due(min(now, clock.time() + RESOLUTION))  # A callback may have set back the clock, in a test.
            served += count
            # Polling again costs one system call, while another wait costs an iteration of the backend. But tasks have
            # to run, too. A new task runs before more is received: it may be about to call `start_tls`, and what
            # arrives then belongs to the handshake.
            if (
                not (count or (ready and self.goes_on))
                or served >= MAX_SERVED
                or self.tasks_started
                or monotonic() >= until
            ):
                break
        self._rounds_for_tasks = 0
        if ready or self.tasks_started:
            return -inf
        return timers.heap[0][0] if timers.heap else inf

    def _run_ready(self) -> None:
        """Run the callbacks scheduled so far. Those that they schedule run after I/O."""
        ready = self.ready
        callback = None
        for _ in range(len(ready)):
            callback = ready.popleft()
            try:
                callback()
            except BaseException as exc:
                self._callback_failed(callback, exc)
        del callback  # Break a cycle: a task may keep an exception, whose traceback has this frame.

    def _run_due(self, now: float) -> None:
        """Run the timers that are due at `now`; as in asyncio, before the callbacks that I/O has scheduled."""
        for handle in self.timers.take_due(now):
            if handle._entry == TAKEN:  # No callback before it has cancelled or moved it.
                handle._entry = ABSENT
                self._run_callback(handle)

    def next_deadline(self) -> float:
        """Return the deadline of the first timer, or infinity without one."""
        return self.timers.next_deadline()

    def wait_at_most_until(self, when: float) -> None:
        """Let the driver not wait beyond the deadline of a new or moved timer.

        A deadline that is not needed any more stays: that costs the driver one look, while each change costs more.
        """
        driver = self.driver
        if driver.waiting and when < driver.deadline:
            driver.wait_until(when)

    def _run_all_ready(self) -> None:
        """Run all callbacks scheduled so far, whatever they raise; raise the first exception that propagates."""
        first: BaseException | None = None
        for _ in range(len(self.ready)):
            try:
                self._run_callback(self.ready.popleft())
            except BaseException as exc:
                first = first or exc
        if first is not None:
            raise first

    def _run_callback(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except BaseException as exc:
            self._callback_failed(callback, exc)

    # Errors

    def leaves(self, exc: BaseException) -> bool:
        """Whether `exc`, raised by user code, ends the group instead of being reported."""
        return should_propagate(exc)

    def report(self, exc: BaseException, message: str, **details: object) -> None:
        """Report `exc`, raised by user code, to the exception handler, or raise it if it ends the group."""
        if self.leaves(exc):
            raise exc
        self.group.call_exception_handler({"message": message, "exception": exc, **details})

    def _callback_failed(self, callback: Callable[[], object], exc: BaseException) -> None:
        if self.leaves(exc):
            raise exc
        context: ExceptionContext = {"message": f"Exception in callback {safe_repr(callback)}", "exception": exc}
        if isinstance(callback, Handle):
            context["handle"] = callback
            # In a copy: the callback may have failed because its context is in use.
            callback.get_context().copy().run(self.group.call_exception_handler, context)
        else:
            self.group.call_exception_handler(context)

    def _fd_callback_failed(self, registration: Registration, exc: BaseException) -> None:
        """Report an exception of a file descriptor's callback. It is called again while the descriptor is ready."""
        self.report(exc, f"Exception in callback of file descriptor {registration.fd}")

    # Scheduling

    def call_internal(self, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` in the next iteration, without a context or a handle."""
        scheduled = partial(callback, *args) if args else callback
        self.driver.wake()  # First: if it raises, at the recursion limit for example, nothing has been scheduled.
        self.ready.append(scheduled)

    def call_from_thread(self, callback: Callable[..., object], *args: Any) -> None:
        """As `call_internal`, from any thread. Does nothing after the end."""
        with self.handing_over:
            if not self.alive:
                return
            self.ready.append(partial(callback, *args))
        with suppress(RuntimeError):  # The backend has stopped without leaving the group.
            self.driver.wake_threadsafe()

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> TimerHandle:
        """Call `callback(*args)` after `delay` seconds, in a copy of the caller's context."""
        return self.set_timer(self.clock.time() + delay, callback, args, None)

    def set_timer(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> TimerHandle:
        """Call `callback(*args)` at `when`, in `context` or a copy of the caller's."""
        if not self.alive:
            raise self.not_open("call_later() or call_at")
        if not -inf <= when <= inf:
            raise ValueError(f"a time was expected, got {when!r}")
        when = float(when)  # `OverflowError` for an integer that is too large.
        check_scheduled(callback)
        # The group becomes current in a copy when the timer is due: most timers are cancelled before that.
        context_of_call = copy_context() if context is None else GivenContext(context, self.group)
        driver = self.driver
        if driver.waiting and when < driver.deadline:  # `wait_at_most_until`, for speed.
            driver.wait_until(when)  # First: if it raises, there is no timer.
        return TimerHandle(when, callback, args, context_of_call, self)

    def context_for(self, callback: object, given: Context | None) -> Context | GivenContext:
        """Return the context that `callback` runs in. Raises `TypeError` if it is not callable."""
        check_scheduled(callback)
        if given is not None:
            return GivenContext(given, self.group)
        context = copy_context()
        self.make_current(context)
        return context

    def make_current(self, context: Context) -> None:
        """Set the group as the current one in `context`, a copy of the caller's."""
        if context.get(current) is not self.group:
            context.run(current.set, self.group)

    def callback_context(self) -> CallbackContext:
        """Return a new callback context, for one connection."""
        return CallbackContext(self)

    def new_user_call(self) -> Callable[..., Any]:
        """Return a function that calls user code which belongs to no transport yet."""
        return self.callback_context().context.run

    # Life-cycle checks

    def not_open(self, name: str = "") -> NotOpenError:
        """Return the error for calling `name` before or after the group is open."""
        call = f"{name}(): " if name else ""
        if not self.entered:
            return NotOpenError(
                f"{call}the group is not open yet: enter it first, with `async with TransportGroup() as group:`",
                self.group,
            )
        return NotOpenError(
            f"{call}the group is not open any more: do this before its `async with` block is left, or in a new "
            "TransportGroup",
            self.group,
        )

    def check_alive(self, name: str, instead: str = "") -> None:
        """Raise `RuntimeError` if `name` cannot schedule anything: the group is not open, or not any more.

        With `instead`, which says what other threads call, also in another thread.
        """
        if not self.alive:
            raise self.not_open(name)
        if instead and get_ident() != self.thread:
            raise wrong_thread(name, instead)

    # The end

    def end(self) -> None:
        """Accept no more callbacks, and run those that were accepted."""
        with self.handing_over:
            self.alive = False
        try:
            self._run_all_ready()
        finally:
            self.ready.clear()
            self.timers.clear()


def scheduler_of(loop: object) -> Scheduler | None:
    """Return the scheduler of an event loop of this package, `None` for any other."""
    core = getattr(loop, "_core", None)
    return core if isinstance(core, Scheduler) else None
