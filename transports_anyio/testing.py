"""Helpers for testing protocols: recorders of callbacks, and a connection in memory.

    from transports_anyio.testing import Recorder, memory_connection

    async with TransportGroup() as group:
        (client, client_protocol), (server, recorder) = await memory_connection(
            group, Recorder, lambda: Recorder(MyProtocol()), chunk_size=1
        )
        client.write(b"hello")
        await recorder.wait_received(5)
        client.close()
        await recorder.wait_for("connection_lost")
        recorder.check()

A recorder wraps a protocol, or stands alone. It records every callback with its arguments, checks that the order is one
that asyncio's documentation allows, calls the hook of the callback, if there is one, and passes the callback on to the
protocol. It has a `shutdown_requested` if the protocol has one, or if there is a hook for it. Recorders also work with
asyncio's own transports.

    Recorder(on_data_received=lambda recorder, data: recorder.transport.write(data))

May know: the group, the checks of callbacks, the endpoint function behind `memory_connection`, and asyncio's abstract
classes.
"""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from reprlib import Repr
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import anyio

from . import abc
from ._callbacks import check_given_protocol, check_scheduled
from ._endpoints._memory import connect_in_memory
from ._endpoints._tls import stream_options
from ._transports._stream import StreamTransport

if TYPE_CHECKING:
    from . import abc
    from ._endpoints._memory import OtherProtocolT
    from ._group import TransportGroup
    from ._types import StreamProtocolT

__all__ = ["BufferedRecorder", "Call", "DatagramRecorder", "Recorder", "SubprocessRecorder", "memory_connection"]

#: A callback: its name, followed by its arguments.
Call = tuple[Any, ...]

#: For each callback, the states in which it is legal, each with the state that follows.
_Order: TypeAlias = Mapping[str, Mapping[str, str]]

WrappedT = TypeVar("WrappedT", bound=asyncio.BaseProtocol)

#: Callbacks that a transport may make inside another one: from `write`, `sendto` and `set_write_buffer_limits`.
NESTED = {"pause_writing", "resume_writing", "error_received"}

#: Seconds after which the waits of recorders fail.
TIMEOUT = 10

#: The message of a time-out shows the last callbacks, with long data shortened.
_SHOWN_CALLS = 20
_short = Repr()
_short.maxother = _short.maxstring = 60
_short.maxtuple = 10


def _show(calls: list[Call]) -> str:
    shown = ", ".join(f"{name}({', '.join(map(_short.repr, args))})" for name, *args in calls[-_SHOWN_CALLS:])
    left_out = len(calls) - _SHOWN_CALLS
    return f"[{left_out} more, {shown}]" if left_out > 0 else f"[{shown}]"


class _Recorder(Generic[WrappedT]):
    """The part that all recorders share. Each kind has a table with the legal order of its callbacks."""

    #: A connection begins as "new" and ends as "lost".
    ORDER: ClassVar[_Order]

    def __init__(
        self,
        protocol: WrappedT | None = None,
        *,
        transport: asyncio.BaseTransport | None = None,
        **hooks: Callable[..., Any],
    ) -> None:
        """Record the callbacks of a connection.

        protocol: gets every callback after it has been recorded. Without one the callbacks are only recorded.
        transport: for a recorder that takes over a connection with `set_protocol`, and so gets no `connection_made`.
        on_data_received, on_connection_lost, ...: a hook for the callback of this name. It is called with the recorder
            and the callback's arguments, after the callback has been recorded and before `protocol` gets it. Without a
            `protocol`, the callback returns what the hook returns.

        Raises `TypeError` for a hook on a callback that this kind of recorder does not have, a hook that is no plain
        function, and a `protocol` that is none, such as a protocol class.
        """
        if protocol is not None:
            check_given_protocol(protocol, type(self).__name__)
        for name, hook in hooks.items():
            check_scheduled(hook)
            if name.removeprefix("on_") not in self.ORDER or not name.startswith("on_"):
                known = ", ".join(f"on_{callback}" for callback in self.ORDER)
                raise TypeError(f"{type(self).__name__}() got an unknown hook {name!r}: its hooks are {known}")
        #: The protocol that gets every callback, or `None`.
        self.protocol = protocol
        #: The hooks by the names of their callbacks; may be changed at any time.
        self.hooks: dict[str, Callable[..., Any]] = {name.removeprefix("on_"): hook for name, hook in hooks.items()}
        #: The transport of `connection_made`.
        self.transport: Any = transport
        #: Every callback in order: `("data_received", b"hello")`.
        self.calls: list[Call] = []
        #: A sentence for every callback that came in an illegal order.
        self.violations: list[str] = []
        #: Whether the protocol is to stop writing: `pause_writing` came later than `resume_writing`.
        self.writing_paused: bool = False
        self._state = "new" if transport is None else "open"
        self._counts: Counter[str] = Counter()  # Waiting tasks ask for them after every callback.
        self._running: list[str] = []
        self._changed: anyio.Event | None = None

    @property
    def names(self) -> list[str]:
        """The names of the callbacks in order."""
        return [name for name, *_ in self.calls]

    def count(self, name: str) -> int:
        """Return how often the callback `name` came."""
        return self._counts[name]

    @property
    def lost(self) -> bool:
        """Whether `connection_lost` has come."""
        return self._state == "lost"

    @property
    def exception(self) -> BaseException | None:
        """The argument of `connection_lost`. Raises `ValueError` before it has come."""
        for name, *args in self.calls:
            if name == "connection_lost":
                exception: BaseException | None = args[0]
                return exception
        raise ValueError("connection_lost() has not come yet")

    async def wait_until(self, condition: Callable[[], object], *, timeout: float | None = TIMEOUT) -> None:
        """Wait until `condition()` is true. It is called now and after every callback.

        timeout: in seconds; `None` waits without a limit.

        Raises `TimeoutError`, with the callbacks that were recorded, when the time is over, and `RuntimeError` when
        `connection_lost` has come, because no callback follows it.
        """
        with anyio.move_on_after(timeout) as scope:
            while not condition():
                if self.lost:
                    raise RuntimeError(f"the connection was lost before that: {_show(self.calls)}")
                if self._changed is None:
                    self._changed = anyio.Event()
                await self._changed.wait()
        if scope.cancelled_caught:
            raise TimeoutError(f"the wait took more than {timeout:g} s, recorded so far: {_show(self.calls)}")

    async def wait_for(self, name: str, count: int = 1, *, timeout: float | None = TIMEOUT) -> None:
        """Wait until the callback `name` has come `count` times. `timeout` and errors as of `wait_until`.

        Raises `ValueError` for a callback that this kind of recorder does not have.
        """
        if name not in self.ORDER:
            raise ValueError(
                f"{type(self).__name__} has no callback {name!r}: its callbacks are {', '.join(self.ORDER)}"
            )
        await self.wait_until(lambda: self.count(name) >= count, timeout=timeout)

    def check(self, *, finished: bool = True) -> None:
        """Raise `AssertionError` if callbacks came in an order that asyncio's documentation does not allow.

        finished: also raise if `connection_made` came and `connection_lost` did not, unless another protocol has taken
            over with `set_protocol`.
        """
        problems = list(self.violations)
        if finished and self._state not in ("new", "lost") and self.transport.get_protocol() is self:
            problems.append(f"connection_lost() never came: {_show(self.calls)}")
        if problems:
            raise AssertionError("\n".join(problems))

    def _record(self, name: str, *args: Any) -> None:
        following = self.ORDER[name]
        state = self._state
        if state not in following:
            self.violations.append(f"{name}() after {self.names}")
        if self._running and name not in NESTED:
            self.violations.append(f"{name}() inside {self._running[-1]}()")
        self._state = following.get(state, "lost" if name == "connection_lost" else state)
        self.calls.append((name, *args))
        self._counts[name] += 1

    def _pass_on(self, name: str, *args: Any) -> Any:
        self._record(name, *args)
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        self._running.append(name)
        try:
            hook = self.hooks.get(name)
            returned = None if hook is None else hook(self, *args)
            return returned if self.protocol is None else getattr(self.protocol, name)(*args)
        finally:
            self._running.pop()

    # The callbacks of every protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._pass_on("connection_made", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pass_on("connection_lost", exc)

    def pause_writing(self) -> None:
        self._flow("pause_writing", paused=True)

    def resume_writing(self) -> None:
        self._flow("resume_writing", paused=False)

    if not TYPE_CHECKING:  # A derived class may define the method.

        def __getattr__(self, name: str) -> Any:
            # A transport looks whether its protocol has this callback, and closes if not.
            if name == "shutdown_requested" and (name in self.hooks or hasattr(self.protocol, name)):
                return partial(self._pass_on, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _flow(self, name: str, *, paused: bool) -> None:
        if paused == self.writing_paused:
            problem = "twice in a row" if name in self.names else "without pause_writing()"
            self.violations.append(f"{name}() {problem}: {self.names}")
        self.writing_paused = paused
        self._pass_on(name)

    def __repr__(self) -> str:
        wrapped = "" if self.protocol is None else f" of {self.protocol!r}"
        return f"<{type(self).__name__}{wrapped} {self._state} calls={len(self.calls)}>"


_OPEN = {"open": "open"}
_BETWEEN = {"open": "open", "ended": "ended"}


class _StreamRecorder(_Recorder[WrappedT]):
    """The part that `Recorder` and `BufferedRecorder` share."""

    def __init__(
        self,
        protocol: WrappedT | None = None,
        *,
        transport: asyncio.BaseTransport | None = None,
        **hooks: Callable[..., Any],
    ) -> None:
        super().__init__(protocol, transport=transport, **hooks)
        #: Every byte that was received.
        self.received: bytearray = bytearray()
        if isinstance(transport, StreamTransport) and transport.is_eof_received():
            self._state = "ended"

    async def wait_received(self, size: int, *, timeout: float | None = TIMEOUT) -> bytes:
        """Wait until at least `size` bytes have been received in all; return them.

        `timeout` and errors as of `wait_until`.
        """
        await self.wait_until(lambda: len(self.received) >= size, timeout=timeout)
        return bytes(self.received)

    def eof_received(self) -> bool | None:
        keep_open: bool | None = self._pass_on("eof_received")
        return keep_open


class Recorder(_StreamRecorder[asyncio.Protocol], asyncio.Protocol):
    """Record the callbacks of a `Protocol`."""

    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "data_received": _OPEN,
        "eof_received": {"open": "ended"},
        "pause_writing": _BETWEEN,
        "resume_writing": _BETWEEN,
        "shutdown_requested": _BETWEEN,
        "connection_lost": {"open": "lost", "ended": "lost"},
    }

    def data_received(self, data: bytes) -> None:
        self.received.extend(data)
        self._pass_on("data_received", data)


class BufferedRecorder(_StreamRecorder[asyncio.BufferedProtocol], asyncio.BufferedProtocol):
    """Record the callbacks of a `BufferedProtocol`.

    Without a `protocol`, data is received into `buffer`, or into the buffer that a hook `on_get_buffer` returns.
    `get_buffer` may come again before the buffer is filled.
    """

    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "get_buffer": {"open": "waiting", "waiting": "waiting"},
        "buffer_updated": {"waiting": "open"},
        "eof_received": {"open": "ended", "waiting": "ended"},
        "pause_writing": {**_BETWEEN, "waiting": "waiting"},
        "resume_writing": {**_BETWEEN, "waiting": "waiting"},
        "shutdown_requested": {**_BETWEEN, "waiting": "waiting"},
        "connection_lost": {"open": "lost", "waiting": "lost", "ended": "lost"},
    }

    def __init__(
        self,
        protocol: asyncio.BufferedProtocol | None = None,
        *,
        transport: asyncio.BaseTransport | None = None,
        buffer_size: int = 65536,
        **hooks: Callable[..., Any],
    ) -> None:
        """Record the callbacks of a connection. The parameters are those of `Recorder`, and one more.

        buffer_size: the size of `buffer`, in bytes.
        """
        super().__init__(protocol, transport=transport, **hooks)
        #: The buffer for received data where neither `protocol` nor a hook gives one; may be replaced.
        self.buffer: bytearray | memoryview = bytearray(buffer_size)
        self._given: Any = b""

    def get_buffer(self, sizehint: int) -> Any:
        given = self._pass_on("get_buffer", sizehint)
        self._given = self.buffer if given is None and self.protocol is None else given
        return self._given

    def buffer_updated(self, nbytes: int) -> None:
        given, self._given = self._given, b""
        self.received.extend(memoryview(given).cast("B")[:nbytes])
        self._pass_on("buffer_updated", nbytes)


class DatagramRecorder(_Recorder[asyncio.DatagramProtocol], asyncio.DatagramProtocol):
    """Record the callbacks of a `DatagramProtocol`."""

    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "datagram_received": _OPEN,
        "error_received": _OPEN,
        "pause_writing": _OPEN,
        "resume_writing": _OPEN,
        "shutdown_requested": _OPEN,
        "connection_lost": {"open": "lost"},
    }

    @property
    def received(self) -> list[tuple[bytes, Any]]:
        """Every datagram that was received, with its sender's address."""
        return [
            (data, address) for name, *rest in self.calls if name == "datagram_received" for data, address in [rest]
        ]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._pass_on("datagram_received", data, addr)

    def error_received(self, exc: Exception) -> None:
        self._pass_on("error_received", exc)


class SubprocessRecorder(_Recorder[asyncio.SubprocessProtocol], asyncio.SubprocessProtocol):
    """Record the callbacks of a `SubprocessProtocol`.

    A pipe may outlive the process; `connection_lost` comes after both.
    """

    _ALIVE: ClassVar = {"open": "open", "exited": "exited"}
    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "pipe_data_received": _ALIVE,
        "pipe_connection_lost": _ALIVE,
        "process_exited": {"open": "exited"},
        "pause_writing": _ALIVE,
        "resume_writing": _ALIVE,
        "shutdown_requested": _ALIVE,
        "connection_lost": {"exited": "lost"},
    }

    def __init__(
        self,
        protocol: asyncio.SubprocessProtocol | None = None,
        *,
        transport: asyncio.BaseTransport | None = None,
        **hooks: Callable[..., Any],
    ) -> None:
        super().__init__(protocol, transport=transport, **hooks)
        #: Every byte that was received, by the child's file descriptor (1 is its output, 2 its error output).
        self.received: dict[int, bytearray] = {}
        self._lost_pipes: set[int] = set()

    def _check_pipe(self, name: str, fd: int) -> None:
        if fd in self._lost_pipes:
            self.violations.append(f"{name}({fd}) after pipe_connection_lost({fd}): {self.names}")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._check_pipe("pipe_data_received", fd)
        self.received.setdefault(fd, bytearray()).extend(data)
        self._pass_on("pipe_data_received", fd, data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._check_pipe("pipe_connection_lost", fd)
        self._lost_pipes.add(fd)
        self._pass_on("pipe_connection_lost", fd, exc)

    def process_exited(self) -> None:
        self._pass_on("process_exited")


async def memory_connection(
    group: TransportGroup,
    factory_a: Callable[[], StreamProtocolT],
    factory_b: Callable[[], OtherProtocolT],
    *,
    chunk_size: int | None = None,
    buffer_size: int = 65536,
    info_a: Mapping[str, Any] | None = None,
    info_b: Mapping[str, Any] | None = None,
    ssl: ssl_module.SSLContext | None = None,
    server_ssl: ssl_module.SSLContext | None = None,
    server_hostname: str | None = None,
) -> tuple[tuple[abc.Transport, StreamProtocolT], tuple[abc.Transport, OtherProtocolT]]:
    """Connect two protocols in memory and return `((transport_a, protocol_a), (transport_b, protocol_b))`.

    Both transports belong to `group` and behave as over any other connection. The operating system is not involved, so
    tests are quick and repeatable. The connection behaves like a pair of UNIX stream sockets: an end that is closed
    with unread data resets the other one. Both `connection_made` run before this returns.

    factory_a, factory_b: protocol factories, as for the endpoint functions of `group`.
    chunk_size: the most bytes that are received at a time; by default everything that is there. With 1 a test shows
        whether a protocol depends on where the stream is cut.
    buffer_size: how many bytes each direction holds before writing fills the transport's own buffer.
    info_a, info_b: the extra info of each transport.
    ssl, server_ssl: with these the connection is encrypted: `a` is the client with the context `ssl`, `b` the server
        with the context `server_ssl`. Certificates are the caller's business. `chunk_size` and `buffer_size` then count
        encrypted bytes.
    server_hostname: the name that the client verifies, or `""` for none, which `ssl` has to allow.

    Raises `RuntimeError` when the group is not open; `TypeError` and `ValueError` for a size that is no number of bytes
    or below 1, for extra info that is no mapping, and for TLS parameters of which one is missing; `ssl.SSLError` when
    the ends do not agree on TLS; and whatever a factory raises. No connection is made then.
    """
    sizes = {"buffer_size": buffer_size}
    if chunk_size is not None:
        sizes["chunk_size"] = chunk_size
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name} must be a number of bytes, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")
    for name, info in {"info_a": info_a, "info_b": info_b}.items():
        if info is not None and not isinstance(info, Mapping):
            raise TypeError(f"{name} must be a mapping or None, got {info!r}")
    for name, context in {"ssl": ssl, "server_ssl": server_ssl}.items():
        if context is not None and not isinstance(context, ssl_module.SSLContext):
            raise TypeError(f"{name} must be an SSLContext or None, got {context!r}")
    if (ssl is None) != (server_ssl is None):
        raise ValueError("ssl, the client's context, and server_ssl, the server's, must be given together")
    timeouts = {"handshake_timeout": None, "shutdown_timeout": None}
    client = stream_options(ssl, server_side=False, server_hostname=server_hostname, **timeouts)
    server = stream_options(server_ssl, server_side=True, server_hostname=None, **timeouts) if client else None
    return await connect_in_memory(
        group,
        factory_a,
        factory_b,
        chunk_size=chunk_size,
        buffer_size=buffer_size,
        info_a=info_a or {},
        info_b=info_b or {},
        tls=(client, server) if client and server else None,
    )
