"""A result that becomes available later.

Holds: futures.
May know: `_waiters`, `asyncio`.
"""

from __future__ import annotations

from asyncio import InvalidStateError
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from contextvars import Context, copy_context
from reprlib import repr as short_repr  # Bounded, and never raises: results are the user's.
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from ._waiters import Waiters

T = TypeVar("T")


class Group(Protocol):
    """The part of `TransportGroup` that a future needs."""

    def call_soon(self, callback: Callable[..., object], /, *args: Any, context: Context | None = None) -> object: ...
    def call_exception_handler(self, context: dict[str, Any]) -> None: ...


class Future(Generic[T]):
    """A result that becomes available later: `asyncio.Future` on every backend; made by `TransportGroup.create_future`.

    Any number of tasks may await it: each gets its result, or has its exception raised. A task that is cancelled while
    it waits does not cancel the future. As in asyncio, `await` on a future that is done returns at once.

    After `cancel`, `result` and waiting tasks raise `concurrent.futures.CancelledError`, which is an `Exception`.
    asyncio raises its own `CancelledError`, which would look like a cancellation of the task itself.

    A future belongs to the thread of its group, as one of asyncio's belongs to the thread of its event loop. From
    another thread call `group.call_soon_threadsafe(future.set_result, ...)`.

    Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_exception",
        "_exception_unseen",
        "_group",
        "_result",
        "_state",
        "_traceback",
        "_waiters",
    )

    def __init__(self, group: Group) -> None:
        self._group = group
        self._state = "pending"  # Or "finished", or "cancelled".
        self._result: Any = None  # The message of `cancel`, if that has ended it.
        self._exception: BaseException | None = None
        self._traceback: TracebackType | None = None
        self._exception_unseen = False
        self._callbacks: list[tuple[Callable[[Any], object], Context]] = []
        self._waiters = Waiters()

    def done(self) -> bool:
        """Return whether there is a result or an exception, or the future is cancelled.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.done
        """
        return self._state != "pending"

    def cancelled(self) -> bool:
        """Return whether `cancel` has ended the future.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.cancelled
        """
        return self._state == "cancelled"

    def result(self) -> T:
        """Return the result, or raise the exception that was set.

        Raises `asyncio.InvalidStateError` while the future is pending, and `concurrent.futures.CancelledError` when it
        was cancelled.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.result
        """
        exc = self.exception()
        if exc is not None:
            try:
                # Each task sees where it was raised first and its own part, not the parts of the others.
                raise exc.with_traceback(self._traceback)
            finally:
                del exc, self  # The traceback has this frame: no cycle.
        result: T = self._result
        return result

    def exception(self) -> BaseException | None:
        """Return the exception that was set, or `None` for a future with a result. Raises as `result` does.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.exception
        """
        if self._state == "finished":
            self._exception_unseen = False
            return self._exception
        if self._state == "cancelled":
            raise CancelledError if self._result is None else CancelledError(self._result)
        raise InvalidStateError("the future has no result yet")

    def set_result(self, result: T) -> None:
        """End the future with `result`. Raises `asyncio.InvalidStateError` when it is done.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.set_result
        """
        self._require_pending()
        self._end("finished", result)

    def set_exception(self, exception: BaseException | type[BaseException]) -> None:
        """End the future with `exception`, or an instance of it when it is a class.

        `StopIteration` would end the coroutine that awaits, so it becomes the cause of a `RuntimeError`. An exception
        that is never retrieved is reported to the group's exception handler.

        Raises `asyncio.InvalidStateError` when the future is done, `TypeError` when `exception` is not an exception.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.set_exception
        """
        self._require_pending()
        if isinstance(exception, type):
            exception = exception()
        if not isinstance(exception, BaseException):
            raise TypeError(f"an exception or a class of exceptions was expected, got {exception!r}")
        if isinstance(exception, StopIteration):
            error = RuntimeError("a coroutine cannot raise StopIteration, so it became the cause of this error")
            error.__cause__ = exception
            exception = error
        self._end("finished", None, exception)

    def cancel(self, msg: object = None) -> bool:
        """Cancel the future and return `True`; do nothing and return `False` when it is done.

        `msg` becomes the argument of the `concurrent.futures.CancelledError`.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.cancel
        """
        if self._state != "pending":
            return False
        self._end("cancelled", msg)
        return True

    def add_done_callback(self, callback: Callable[[Future[T]], object], *, context: Context | None = None) -> None:
        """Call `callback(future)` by the group's `call_soon` when the future is done, or soon if it is done already.

        `callback` runs in `context`, or in a copy of the caller's context. Raises `TypeError` when it is not callable.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.add_done_callback
        """
        if not callable(callback):
            raise TypeError(f"a callable object was expected, got {callback!r}")
        if context is None:
            context = copy_context()
        if self._state != "pending":
            self._group.call_soon(callback, self, context=context)
        else:
            self._callbacks.append((callback, context))

    def remove_done_callback(self, callback: Callable[[Future[T]], object], /) -> int:
        """Remove every addition of `callback` and return how many there were.

        Source: https://docs.python.org/3/library/asyncio-future.html#asyncio.Future.remove_done_callback
        """
        kept = [each for each in self._callbacks if each[0] != callback]
        removed = len(self._callbacks) - len(kept)
        self._callbacks = kept
        return removed

    def __await__(self) -> Generator[Any, Any, T]:
        while self._state == "pending":
            yield from self._waiters.wait().__await__()
        try:
            return self.result()
        finally:
            del self  # As in `result`.

    def _require_pending(self) -> None:
        if self._state != "pending":
            raise InvalidStateError(f"the future is done already: {self!r}")

    def _end(self, state: str, result: Any, exception: BaseException | None = None) -> None:
        self._waiters.notify()  # First: if it raises, in another thread for example, the future is still pending.
        self._state = state
        self._result = result
        if exception is not None:
            self._exception = exception
            self._traceback = exception.__traceback__
            self._exception_unseen = True
        if self._callbacks:
            callbacks, self._callbacks = self._callbacks, []
            for callback, context in callbacks:
                self._group.call_soon(callback, self, context=context)

    def __repr__(self) -> str:
        if self._state != "finished":
            return f"<Future {self._state}>"
        if self._exception is not None:
            return f"<Future finished exception={short_repr(self._exception)}>"
        return f"<Future finished result={short_repr(self._result)}>"

    def __del__(self) -> None:
        # Not set yet where `__init__` was not called as it should be.
        if getattr(self, "_exception_unseen", False):
            self._group.call_exception_handler(
                {"message": "Future exception was never retrieved", "exception": self._exception, "future": self}
            )
