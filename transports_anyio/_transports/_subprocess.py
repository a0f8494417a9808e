"""The transport of a child process.

Holds: what the pipes and the end of the process mean for the child's protocol.
May know: callbacks, errors, waiting, pipe transports, and the child process that it is given.

Callbacks of a protocol, in order: `connection_made [pipe_data_received | pipe_connection_lost | process_exited]*
connection_lost`: `process_exited` once, `pipe_connection_lost` once for each pipe, `connection_lost` after all of them;
with `pause_writing [resume_writing]` pairs, for standard input, anywhere between.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import abc
from .._callbacks import check_given_protocol
from .._errors import failed_callback, has_callback, log_debug
from .._processes._child import KILLED
from .._waiters import InterruptSafeEvent, check_shutdown_timeout, wait_or_abort
from ._pipe import WritePipeTransport
from ._tasks import ConnectionTasks, TaskOwner

if TYPE_CHECKING:
    from .._callbacks import CallbackContext
    from .._processes._child import Child
    from ._stream import StreamTransport


class PipeProtocol(asyncio.Protocol):
    """The protocol of one pipe of a child: passes its callbacks on to the child's protocol."""

    def __init__(self, child: SubprocessTransport, fd: int) -> None:
        self._child = child
        self._fd = fd

    def data_received(self, data: bytes) -> None:
        # The pipe's context is the child's, so the callback is called directly.
        child = self._child
        try:
            child._protocol.pipe_data_received(self._fd, data)
        except BaseException as exc:
            child._callback_failed("pipe_data_received", exc)

    def pause_writing(self) -> None:
        self._child._call_flow("pause_writing")

    def resume_writing(self) -> None:
        self._child._call_flow("resume_writing")

    def connection_lost(self, exc: Exception | None) -> None:
        self._child._call_nested("pipe_connection_lost", self._fd, exc)


class SubprocessTransport(TaskOwner, abc.SubprocessTransport):
    """A child process, as asyncio's documentation describes `asyncio.SubprocessTransport`.

    `TransportGroup.subprocess_exec`, `subprocess_shell` and `connect_process` create it. Every method is synchronous.

    Source: https://docs.python.org/3/library/asyncio-protocol.html#subprocess-transports
    """

    __slots__ = (
        "__dict__",  # As in every transport, for attributes of the user's.
        "__weakref__",
        "_callback_context",
        "_child",
        "_closed",
        "_ended",
        "_failure",
        "_lost",
        "_on_lost",
        "_open_pipes",
        "_paused_protocol",
        "_pipes",
        "_protocol",
        "_returncode",
        "_tasks",
        "_writing_paused",
    )

    def __init__(
        self,
        callback_context: CallbackContext,
        child: Child,
        protocol: Any,
        on_lost: Callable[[SubprocessTransport], None],
    ) -> None:
        self._callback_context = callback_context
        self._child = child
        self._protocol: Any = protocol
        self._on_lost = on_lost
        self._pipes: dict[int, StreamTransport] = {}
        self._open_pipes = 0
        self._returncode: int | None = None
        self._ended = InterruptSafeEvent()
        self._closed = False
        self._writing_paused = False
        self._paused_protocol: Any = None  # As in the other transports.
        self._lost = False  # `connection_lost` has been called.
        self._tasks: ConnectionTasks | None = None
        self._failure: BaseException | None = None  # The first exception in a callback: `connection_lost` gets it.

    def _start(self, pipes: dict[int, StreamTransport]) -> None:
        """Call `connection_made`, then start reading from the pipes. The end of the process is watched from now on."""
        self._pipes = pipes
        self._open_pipes = len(pipes)
        log_debug(self._callback_context.group, "%r: spawned, with a %s", self, type(self._protocol).__qualname__)
        # Before `connection_made`, which may raise what leaves through the group. `_exited` is called in a later turn.
        self._child.watch(self._exited)
        try:
            self._call_protocol("connection_made", self)
        finally:
            for pipe in pipes.values():
                pipe._start()

    # Methods of every subprocess transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what is known under `name`, or `default`; `subprocess` is the `Popen`, or AnyIO's process."""
        return self._child.process if name == "subprocess" else default

    def set_protocol(self, protocol: Any) -> None:
        """Make `protocol` the receiver of all later callbacks.

        If writing is paused, its `pause_writing` is called soon, and `resume_writing` when writing resumes. Raises
        `TypeError` for an object that cannot be a protocol, such as a protocol class.
        """
        check_given_protocol(protocol, "set_protocol")
        self._protocol = protocol
        if self._missed_pause:
            self._callback_context.call_soon(self._call_missed_pause)

    def get_protocol(self) -> Any:
        """Return the current protocol; `None` after its `connection_lost`, as in asyncio."""
        return self._protocol

    def get_pid(self) -> int:
        """Return the process ID."""
        return self._child.pid

    def get_pipe_transport(self, fd: int) -> Any:
        """Return the transport of standard input, output or error (`fd` 0, 1 or 2), `None` unless it is a pipe."""
        return self._pipes.get(fd)

    def get_returncode(self) -> int | None:
        """Return the exit status, negative for a signal; `None` until `process_exited`."""
        return self._returncode

    def send_signal(self, signal: int) -> None:
        """Send `signal` to the process. Raises `ProcessLookupError` once it has ended: its ID may be reused."""
        self._require_running()
        self._child.send_signal(signal)

    def _require_running(self) -> None:
        if self._child.has_ended():
            raise ProcessLookupError("the process has ended")

    def terminate(self) -> None:
        """Send `SIGTERM`. Raises as `send_signal`."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send `SIGKILL`. Raises as `send_signal`."""
        self._require_running()
        self._child.kill()

    def is_closing(self) -> bool:
        """Return whether the transport is closing or closed."""
        return self._closed

    def close(self) -> None:
        """Close the pipes, standard input after what is buffered, and kill the process if it still runs.

        What is still buffered for standard input when the process has ended is dropped.
        """
        if self._closed:
            return
        log_debug(self._callback_context.group, "%r: closing", self)
        self._closed = True
        for pipe in self._pipes.values():
            pipe.close()
        try:
            self.kill()
        except (ProcessLookupError, PermissionError):
            pass  # It has ended already, or runs as another user.
        self._drop_input()

    async def shutdown(self, timeout: float | None) -> None:
        """Terminate the process, let it end, and kill it if it has not ended after `timeout` seconds.

        If the protocol has a method `shutdown_requested`, that is called instead of `terminate`: it ends the process in
        another way, by closing standard input for example. Output is received until the end. What is left after
        `timeout` seconds is aborted: the process is killed, and its pipes are closed. With 0 seconds that is done at
        once; `None` is no limit.

        This returns when `connection_lost` has been called; if it is cancelled, the process goes on ending.

        Raises `ValueError` for a negative `timeout`.
        """
        timeout = check_shutdown_timeout(timeout)
        if not self._lost:
            log_debug(self._callback_context.group, "%r: shutting down", self)
            self._request_shutdown()
        await wait_or_abort(timeout, self.wait_closed, self._abort)

    def _abort(self) -> None:
        """Kill the process, wait for its end, and drop what is buffered. The end of the group calls this."""
        self._closed = True
        for pipe in self._pipes.values():
            pipe.abort()
        if self._returncode is None:
            returncode = self._child.kill_and_reap()
            self._callback_context.call_soon(self._exited, KILLED if returncode is None else returncode)

    def _request_shutdown(self) -> None:
        """Have the protocol end the process if it has `shutdown_requested`, terminate the process if not."""
        self._callback_context.call_soon(self._shutdown_requested)

    def _shutdown_requested(self) -> None:
        if self._closed:
            return
        if has_callback(self._protocol, "shutdown_requested"):
            self._call_protocol("shutdown_requested")
            return
        try:
            self.terminate()
        except (ProcessLookupError, PermissionError):
            pass  # As for `close`.

    def _traffic(self) -> tuple[int, int, int]:
        """Return how many bytes were received and were sent over the pipes, and are buffered."""
        received = sent = waiting = 0
        for pipe in self._pipes.values():
            more_received, more_sent, more_waiting = pipe._traffic()
            received += more_received
            sent += more_sent
            waiting += more_waiting
        return received, sent, waiting

    def is_writing_paused(self) -> bool:
        """Return whether writing is paused: `pause_writing` has been called or is about to be."""
        return self._writing_paused

    async def _wait(self) -> int | None:
        """Wait for the end of the process, and return its exit status: for `asyncio.subprocess`, which calls this."""
        if self._returncode is None:
            await self._ended.wait()
        return self._returncode

    # The protocol

    def _call_protocol(self, name: str, *args: Any) -> None:
        """Call one of the protocol's callbacks. An exception in it is reported and ends the child."""
        try:
            self._callback_context.context.run(getattr(self._protocol, name), *args)
        except BaseException as exc:
            self._callback_failed(name, exc)

    def _call_nested(self, name: str, *args: Any) -> None:
        """As `_call_protocol`, in the caller's context, which may be the protocol's: from a method or callback."""
        try:
            self._callback_context.run_nested(getattr(self._protocol, name), *args)
        except BaseException as exc:
            self._callback_failed(name, exc)

    def _call_flow(self, name: str) -> None:
        """Call `pause_writing` or `resume_writing`. The protocol may have been set between the two."""
        if name == "resume_writing" and self._missed_pause:
            self._paused_protocol = self._protocol
            self._call_nested("pause_writing")
        self._writing_paused = name == "pause_writing"
        self._paused_protocol = self._protocol if self._writing_paused else None
        self._call_nested(name)

    @property
    def _missed_pause(self) -> bool:
        return self._writing_paused and self._paused_protocol is not self._protocol

    def _call_missed_pause(self) -> None:
        if self._missed_pause and self._protocol is not None:
            self._paused_protocol = self._protocol
            self._call_protocol("pause_writing")

    def _callback_failed(self, name: str, exc: BaseException) -> None:
        self._fail(exc)
        if self._callback_context.leaves(exc):
            raise exc
        self._callback_context.report(failed_callback(self._protocol, name), exc, self, self._protocol)

    def _task_failed(self, exc: BaseException, name: str) -> None:
        self._fail(exc)
        message = f"Fatal error: the task {name} of the connection failed."
        self._callback_context.report(message, exc, self, self._protocol)

    def _fail(self, exc: BaseException) -> None:
        """End the child because of `exc`, raised by user code."""
        if self._failure is None and isinstance(exc, Exception):
            self._failure = exc
        self.close()

    def _is_lost(self) -> bool:
        return self._lost

    _is_closed = _is_lost

    async def drain(self) -> None:
        """Wait until writing to standard input is not paused.

        Raises `ConnectionError` when standard input is closed, or is not a pipe and the child is gone.
        """
        stdin = self._pipes.get(0)
        if stdin is None:
            await super().drain()
        else:
            await stdin.drain()

    def _pipe_closed(self, pipe: StreamTransport) -> None:
        """Note that `pipe` is closed. Its protocol need not be a `PipeProtocol` any more."""
        self._open_pipes -= 1
        self._finish()

    def _exited(self, returncode: int) -> None:
        if self._returncode is not None:
            return  # `_abort` has ended it already.
        self._returncode = returncode
        self._ended.set()
        log_debug(self._callback_context.group, "%r: exited", self)
        stdin = self._pipes.get(0)
        if isinstance(stdin, WritePipeTransport) and not stdin._can_notice_hangup:
            stdin.close()  # Nothing else would end it.
        self._drop_input()
        try:
            self._call_protocol("process_exited")
        finally:
            self._finish()

    def _drop_input(self) -> None:
        """Drop what is buffered for the process, once it has ended and the transport is closed.

        Only a grandchild that has inherited the pipe could receive it, and a grandchild need never read.
        """
        stdin = self._pipes.get(0)
        if self._closed and self._returncode is not None and isinstance(stdin, WritePipeTransport):
            stdin._reader_gone()

    def _finish(self) -> None:
        if self._returncode is not None and not self._open_pipes:
            self._callback_context.call_soon(self._connection_lost)

    def _connection_lost(self) -> None:
        self._closed = True
        if self._tasks is not None:
            self._tasks.error = self._failure
        log_debug(self._callback_context.group, "%r: lost", self)
        try:
            self._call_protocol("connection_lost", self._failure)
        finally:
            # No reference cycles: the protocol most likely refers to the transport.
            self._failure = self._protocol = self._paused_protocol = None
            self._lost = True
            self._child.close()
            self._end_tasks(partial(self._on_lost, self))

    def __repr__(self) -> str:
        state = "running" if self._returncode is None else f"returncode={self._returncode}"
        pipes = " ".join(f"{('stdin', 'stdout', 'stderr')[fd]}={pipe!r}" for fd, pipe in self._pipes.items())
        closed = " closed" if self._closed else ""
        return f"<SubprocessTransport{closed} pid={self._child.pid} {state}{' ' if pipes else ''}{pipes}>"
