"""An event loop for those who make, run and close event loops by themselves."""

# The event loop's own modules know what it hides from users.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import warnings
from asyncio import _get_running_loop
from collections.abc import Awaitable, Callable
from threading import get_ident
from typing import Any, TypeVar

import anyio

from .._clock import monotonic
from .._poller import assemble
from .._waiters import trio_functions
from ._crossing import Answer
from ._loop import EventLoop as OpenEventLoop
from ._pausing import PausingCore

T = TypeVar("T")


class EventLoop(OpenEventLoop):
    """asyncio's event loop on trio, for everything that takes a loop factory.

    Give this class, or `new_event_loop`, to `asyncio.run(main(), loop_factory=EventLoop)`, `asyncio.Runner`,
    `unittest.IsolatedAsyncioTestCase`, AnyIO's pytest plugin, `uvicorn --loop transports_anyio:new_event_loop` and the
    like. It is made, run any number of times, and closed, as asyncio's own; transports, servers, tasks and timers live
    from one call to the next. `from_asyncio` reaches trio from asyncio code.

    trio runs only if asyncio code calls it: from the first `from_asyncio` on, until the call of the event loop ends.
    If trio tasks are under way then, their run pauses until the next call. As trio runs once at a time in a thread, no
    other trio run can begin in that thread until these tasks have ended, and this event loop can neither run nor be
    closed in another: `RuntimeError`.

    While trio runs, it waits in a thread of its own (its guest mode), so that the first event after an idle wait costs
    more than with `run_asyncio`.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html
    """

    _core_class = PausingCore
    _core: PausingCore  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self) -> None:
        from .. import _trio  # Here, because it imports trio.

        trio_functions()  # Ctrl-C must not interrupt the first wait of a trio task either.
        super().__init__(_trio)
        core = self._core
        poller = assemble(None, monotonic.func)
        core.open_poller(poller)
        self._use_poller(poller)
        core.open = core.alive = True
        core.call(anyio.get_cancelled_exc_class)  # Loads AnyIO's asyncio backend, which takes long, not in a turn.

    def _start_backend_task(
        self, answer: Answer[Any], async_function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
    ) -> None:
        self._core.need_trio()
        super()._start_backend_task(answer, async_function, args)

    # Running

    def is_running(self) -> bool:
        """Whether `run_forever` or `run_until_complete` is under way.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.is_running
        """
        return self._core.thread != 0

    def run_forever(self) -> None:  # type: ignore[override]  # what no other event loop of ours can do
        """Run until `stop` is called.

        What a callback raises to leave, `KeyboardInterrupt` or `SystemExit`, comes out after the other callbacks of the
        iteration; the event loop can be run again.

        Raises `RuntimeError` when it runs already or is closed, where another event loop or trio runs, and for what the
        class says about trio tasks.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.run_forever
        """
        self._check_may_run()
        self._core.run()

    def run_until_complete(self, future: Awaitable[T]) -> T:  # type: ignore[override]  # as above
        """Run until `future` is done, and return its result. A coroutine is run in a task.

        Raises what the future raises, and what `run_forever` raises; `RuntimeError` when the event loop is stopped
        before.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.run_until_complete
        """
        self._check_may_run()
        made_here = not asyncio.isfuture(future)
        awaited: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)
        if made_here:
            awaited._log_destroy_pending = False  # type: ignore[attr-defined]  # the caller has the error
        waiting = True

        def done(_: asyncio.Future[T]) -> None:
            # What is about to leave by itself needs no stop; and this may be late, after something else has left.
            if waiting and (awaited.cancelled() or not self._core.leaves(awaited.exception())):
                self.stop()

        awaited.add_done_callback(done)
        try:
            self._core.run()
        except BaseException:
            if made_here and awaited.done() and not awaited.cancelled():
                awaited.exception()  # It is this one: no need to report it again.
            raise
        finally:
            waiting = False
            awaited.remove_done_callback(done)
        if not awaited.done():
            raise RuntimeError("Event loop stopped before Future completed.")
        return awaited.result()

    def _check_may_run(self) -> None:
        if self._closed:
            raise self._core.not_open()
        if self.is_running():
            raise RuntimeError("This event loop is already running")
        if _get_running_loop() is not None:
            raise RuntimeError("Cannot run the event loop while another loop is running")

    def stop(self) -> None:
        """End `run_forever` after this iteration, or after the first of the next call if none is under way.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.stop
        """
        self._core.stop()

    def close(self) -> None:
        """Close the event loop, in any thread. Nothing is called any more, `connection_lost` included.

        Servers are closed. Transports that are left are aborted, with a `ResourceWarning` for each. Asyncio tasks stay
        pending. trio tasks are cancelled and awaited; one that is shielded and waits for asyncio code gets
        `RuntimeError`. Does nothing if closed already. Raises `RuntimeError` while running, and in another thread for
        what the class says about trio tasks.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.close
        """
        core = self._core
        if self.is_running():
            raise RuntimeError("Cannot close a running event loop")
        if self._closed:
            return
        core.calls.guest.check()
        core.abandon()
        core.end_trio()
        self._close()
        self._poller.close()
        self._executor_shut_down = True
        if self._default_executor is not None:
            self._default_executor.shutdown(wait=False)

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or not hasattr(self, "_poller"):
            return
        warnings.warn(f"unclosed event loop {self!r}", ResourceWarning, source=self, stacklevel=2)
        if not self.is_running() and self._core.calls.guest.thread in (0, get_ident()):
            self.close()


def new_event_loop() -> EventLoop:
    """Return a new `EventLoop`: a function, for those who do not take a class.

    As in `uvicorn --loop transports_anyio:new_event_loop`.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.new_event_loop
    """
    return EventLoop()
