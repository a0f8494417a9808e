"""Tasks that belong to a connection, and tasks that wait for it.

Holds: the tasks of one connection, and the methods of transports that start them and wait.
May know: `_callbacks`, `_core`, `_errors`, `_types`, `_waiters`, `anyio`, `exceptiongroup`.
"""

from __future__ import annotations

import errno
import sys
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextvars import copy_context
from math import inf
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from .._callbacks import current
from .._errors import is_refusal, log_debug
from .._waiters import Waiters

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._callbacks import CallbackContext
    from .._core import Core
    from .._types import PosArgsT


class ConnectionLostError(ConnectionResetError):
    """Raised by `drain` when the connection is lost."""

    def __init__(self, tasks: ConnectionTasks) -> None:
        super().__init__(errno.ECONNRESET, "the connection is lost")
        self.tasks = tasks


class ConnectionTasks:
    """The tasks of one connection, and those that wait for it. `start_tls` passes it on to the new transport."""

    __slots__ = ("_ended", "_running", "_scopes", "changed", "error", "lost", "transport")

    def __init__(self, transport: TaskOwner) -> None:
        self.transport = transport
        self.changed = Waiters()  # Notified when writing resumes, and when the connection is lost.
        self.error: BaseException | None = None  # What `connection_lost` gets.
        self.lost = False  # `connection_lost` has been called.
        self._scopes: set[anyio.CancelScope] = set()
        self._running = 0
        self._ended: Callable[[], None] | None = None

    def start(self, async_function: Callable[..., object], args: tuple[Any, ...], name: object) -> None:
        """Start a task, in the caller's context."""
        self._running += 1
        try:
            self.transport._core.start_task(async_function, args, name, self._run)
        except BaseException:
            self._running -= 1
            raise

    async def _run(self, coroutine: Coroutine[Any, Any, object]) -> None:
        scope = anyio.CancelScope()
        self._scopes.add(scope)
        if self.lost:
            scope.cancel()
        try:
            with scope:
                await coroutine
        except BaseException as exc:
            core = self.transport._core
            leaving, failure = self._divide(exc)
            refused = not core.open and failure is not None and is_refusal(failure, core.group)
            if failure is not None and not refused:
                core.call(self._failed, coroutine, failure)
            if leaving is exc or (refused and leaving is None):
                raise
            if leaving is not None:
                raise leaving from None
        finally:
            self._scopes.discard(scope)
            self._running -= 1
            self._end()

    def _divide(self, exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
        """Return the part of `exc` that ends the group, as for a callback, and the part that ends this connection."""
        if isinstance(exc, Exception):
            return None, exc
        if isinstance(exc, BaseExceptionGroup):

            def leaves(each: BaseException) -> bool:  # Python 3.11 takes no bound method.
                return self._leaves(each)

            return exc.split(leaves)
        if isinstance(exc, anyio.get_cancelled_exc_class()) and anyio.current_effective_deadline() > -inf:
            # By no cancel scope: AnyIO would cancel the whole group without a word.
            if self.lost:
                return None, None  # It was about to end anyway.
            failure = CancelledError("asyncio has cancelled the task, or something that it waits for")
            failure.__cause__ = exc
            return None, failure
        return (exc, None) if self._leaves(exc) else (None, exc)

    def _leaves(self, exc: BaseException) -> bool:
        if isinstance(exc, Exception):
            return False
        return isinstance(exc, GeneratorExit) or self.transport._callback_context.leaves(exc)

    def _is_own_loss(self, exc: BaseException) -> bool:
        """Whether `exc` is what `drain` of this connection raises, or an exception group of nothing else."""
        if isinstance(exc, BaseExceptionGroup):
            return all(map(self._is_own_loss, exc.exceptions))
        return isinstance(exc, ConnectionLostError) and exc.tasks is self

    def _failed(self, coroutine: Coroutine[Any, Any, object], exc: BaseException) -> None:
        transport = self.transport
        if self._is_own_loss(exc):
            # The task has waited for this connection, whose protocol gets the error.
            log_debug(transport._callback_context.group, "%r: a task has ended with the connection", transport)
            return
        transport._task_failed(exc, getattr(coroutine, "__qualname__", repr(coroutine)))

    def connection_lost(self, ended: Callable[[], None]) -> None:
        """Cancel the tasks, and call `ended` after the last one: `connection_lost` has been called."""
        self.lost = True
        self._ended = ended
        self.changed.notify()
        for scope in tuple(self._scopes):
            scope.cancel()
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._running:
            ended, self._ended = self._ended, None
            ended()

    async def drain(self) -> None:
        """Wait until writing is not paused. Raises `ConnectionLostError` if the connection is lost."""
        await anyio.lowlevel.checkpoint()
        while True:
            if self.transport._is_lost():
                raise ConnectionLostError(self) from self.error
            if not self.transport.is_writing_paused():
                return
            await self.changed.wait()

    async def wait_closed(self) -> None:
        """Wait until `connection_lost` has been called."""
        if self.lost or self.transport._is_closed():
            await anyio.lowlevel.checkpoint()
        # No checkpoint before: a task of the connection that comes to wait after `close` is always woken before it is
        # cancelled.
        while not (self.lost or self.transport._is_closed()):
            await self.changed.wait()


class TaskOwner:
    """The methods that start tasks of a connection, and wait for it."""

    __slots__ = ()

    _callback_context: CallbackContext
    _tasks: ConnectionTasks | None

    @property
    def _group(self) -> Any:
        """The group, or the event loop, that the transport belongs to."""
        return self._callback_context.group

    @property
    def _core(self) -> Core:
        core: Core = self._group._core
        return core

    @abstractmethod
    def is_writing_paused(self) -> bool:
        """Return whether writing is paused."""

    @abstractmethod
    def _is_lost(self) -> bool:
        """Whether nothing can be sent any more; `connection_lost` is called soon, or has been."""

    @abstractmethod
    def _is_closed(self) -> bool:
        """Whether `connection_lost` has been called."""

    @abstractmethod
    def _task_failed(self, exc: BaseException, name: str) -> None:
        """Report `exc`, raised by the task `name`, and end the connection, as for a callback."""

    def _get_tasks(self) -> ConnectionTasks:
        tasks = self._tasks
        if tasks is None:  # Few transports need one.
            tasks = self._tasks = ConnectionTasks(self)  # type: ignore[misc]  # Derived classes have the slot.
        return tasks

    def _end_tasks(self, ended: Callable[[], None]) -> None:
        """Cancel the tasks, and call `ended` after the last one."""
        if self._tasks is None:
            ended()
        else:
            self._tasks.connection_lost(ended)

    def start_soon(
        self,
        async_function: Callable[[Unpack[PosArgsT]], Coroutine[Any, Any, object]],
        *args: Unpack[PosArgsT],
        name: object = None,
    ) -> None:
        """Start a task that belongs to the connection and awaits `async_function(*args)`.

        Callbacks may call this. The task is cancelled after `connection_lost`; the connection is gone, for
        `wait_closed` of its server and group, when its last task has ended. `start_tls` passes the tasks on to the new
        transport. An exception of the task is treated as one of a callback: it goes to the exception handler, the
        transport is aborted, and `connection_lost` gets it (a datagram endpoint stays open). It is a
        `concurrent.futures.CancelledError` if asyncio itself has cancelled the task, or what the task awaits. What
        `drain` of this transport raises is not reported, because `connection_lost` reports the loss. `name` is for
        debugging; it defaults to the function's name.

        Raises `RuntimeError` if the group is not open and in another thread, `ConnectionError` if the connection is
        lost, `TypeError` if `async_function` is not an async function or does not take these arguments.
        """
        self._core.check_alive("start_soon", "anyio.from_thread.run_sync(transport.start_soon, ...)")
        if not callable(async_function):
            msg = f"start_soon() takes an async function and its arguments, got {async_function!r}"
            raise TypeError(msg)
        tasks = self._get_tasks()
        if tasks.transport._is_lost():
            raise ConnectionResetError(
                errno.ECONNRESET, "the connection is lost: use group.start_soon() for a task that goes on without it"
            )
        context = copy_context()
        context.run(current.set, self._group)
        context.run(tasks.start, async_function, args, name)

    async def drain(self) -> None:
        """Wait until writing is not paused, so that more can be written.

        Any number of tasks may wait. Raises `ConnectionError` when the connection is lost; its cause is the exception
        that `connection_lost` gets, if it gets one and this transport's `drain`, `wait_closed` or `start_soon` was
        called before.
        """
        await self._get_tasks().drain()

    async def wait_closed(self) -> None:
        """Wait until `connection_lost` has been called. Any number of tasks may wait."""
        await self._get_tasks().wait_closed()
