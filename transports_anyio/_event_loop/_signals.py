"""Signal handlers that run as callbacks of the event loop.

Holds: a mixin class of the event loop. It needs `call_soon_threadsafe`, which a signal handler may call.
May know: `asyncio`, `signal`.

trio sets a wake-up file descriptor (`signal.set_wakeup_fd`), which is not changed here. So a signal ends the wait of
trio, Python runs the signal handler, and that schedules the callback.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from asyncio import iscoroutine
from collections.abc import Callable
from contextvars import Context, copy_context
from inspect import iscoroutinefunction
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")


class SignalHandler:
    """A callback for a signal, and the handler that was in its place."""

    __slots__ = ("args", "callback", "context", "previous")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], previous: Any) -> None:
        self.callback = callback
        self.args = args
        self.context: Context = copy_context()
        self.previous = previous


class Signals(asyncio.AbstractEventLoop):
    """The signal handlers of an event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._signal_handlers: dict[int, SignalHandler] = {}

    def add_signal_handler(self, sig: int, callback: Callable[[Unpack[Ts]], object], *args: Unpack[Ts]) -> None:
        """Call `callback(*args)` in the event loop whenever the process receives the signal `sig`.

        Raises `RuntimeError` in another thread than the main one, and for a signal that cannot be caught; `ValueError`
        and `TypeError` for what is not a signal, `TypeError` for a coroutine function.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.add_signal_handler
        """
        given: object = callback
        if iscoroutine(given) or iscoroutinefunction(given):
            raise TypeError("coroutines cannot be used with add_signal_handler()")
        check_signal(sig)
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        before = self._signal_handlers.get(sig)
        previous = signal.getsignal(sig) if before is None else before.previous
        # Before the handler is set: the signal may come at once.
        self._signal_handlers[sig] = SignalHandler(callback, args, previous)
        try:
            set_handler(sig, self._received)
            if hasattr(signal, "siginterrupt"):
                signal.siginterrupt(sig, False)  # Restart system calls of C code.
        except BaseException:
            if before is None:
                del self._signal_handlers[sig]
            else:
                self._signal_handlers[sig] = before
            raise

    def _received(self, sig: int, _: FrameType | None) -> None:
        handler = self._signal_handlers.get(sig)
        if handler is not None:  # It is `None` if the signal comes while the handler is being removed.
            self.call_soon_threadsafe(handler.callback, *handler.args, context=handler.context)

    def remove_signal_handler(self, sig: int) -> bool:
        """Restore the handler from before `add_signal_handler`. Return whether there was anything to remove.

        If other code has set a handler since then, that one stays.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.remove_signal_handler
        """
        check_signal(sig)
        handler = self._signal_handlers.get(sig)
        if handler is None:
            return False
        if signal.getsignal(sig) == self._received:
            # `None` is a handler that was not set by Python, and cannot be restored.
            set_handler(sig, signal.SIG_DFL if handler.previous is None else handler.previous)
        del self._signal_handlers[sig]
        return True

    def _remove_signal_handlers(self) -> None:
        """Restore all handlers, at the end of the event loop."""
        for sig in tuple(self._signal_handlers):
            self.remove_signal_handler(sig)


def check_signal(sig: Any) -> None:
    """Raise asyncio's `TypeError` or `ValueError` if `sig` is not a signal."""
    if not isinstance(sig, int):
        raise TypeError(f"sig must be an int, not {sig!r}")
    if sig not in signal.valid_signals():
        raise ValueError(f"invalid signal number {sig}")


def set_handler(sig: int, handler: Any) -> None:
    """Call `signal.signal`. Raises `RuntimeError` outside the main thread, and if the signal cannot be caught."""
    try:
        signal.signal(sig, handler)
    except ValueError as exc:
        raise RuntimeError(str(exc)) from exc
    except OSError as exc:
        if exc.errno == errno.EINVAL:
            raise RuntimeError(f"sig {sig} cannot be caught") from exc
        raise
