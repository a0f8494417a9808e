"""For people who test their protocols: recorders of callbacks, and a connection in memory.

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

A recorder wraps a protocol, or stands alone. It notes every callback with its arguments before it passes it on, and
whether the order is one that asyncio's documentation allows. The recorders work over asyncio's own transports too.

May know: the group, the endpoint function behind `memory_connection`, and asyncio's abstract classes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import anyio

from . import abc
from ._endpoints._memory import connect_in_memory
from ._transports._stream import StreamTransport

if TYPE_CHECKING:
    from . import abc
    from ._endpoints._memory import OtherProtocolT
    from ._group import TransportGroup
    from ._types import StreamProtocolT

__all__ = ["BufferedRecorder", "Call", "DatagramRecorder", "Recorder", "SubprocessRecorder", "memory_connection"]

#: A callback: its name, and behind it its arguments.
Call = tuple[Any, ...]

#: For each callback, the states in which it is legal and those that it leads to.
_Order: TypeAlias = Mapping[str, Mapping[str, str]]

WrappedT = TypeVar("WrappedT", bound=asyncio.BaseProtocol)

#: Callbacks that a transport may make inside another one: from `write`, `sendto` and `set_write_buffer_limits`.
NESTED = {"pause_writing", "resume_writing", "error_received"}


class _Recorder(Generic[WrappedT]):
    """What every recorder has; the legal order of callbacks is a table in each kind."""

    #: A connection begins as "new" and ends as "lost".
    ORDER: ClassVar[_Order]

    def __init__(self, protocol: WrappedT | None = None, *, transport: asyncio.BaseTransport | None = None) -> None:
        """Record what `protocol` is told, or nobody at all.

        `transport` is needed where the recorder takes over with `set_protocol`, and so sees no `connection_made`.
        """
        #: Who is told of everything, if anybody.
        self.protocol = protocol
        #: The transport of `connection_made`.
        self.transport: Any = transport
        #: Every callback in order: `("data_received", b"hello")`.
        self.calls: list[Call] = []
        #: Every callback that came in an illegal order, as a sentence.
        self.violations: list[str] = []
        #: Whether the last of `pause_writing` and `resume_writing` was the first.
        self.writing_paused: bool = False
        self._state = "new" if transport is None else "open"
        self._counts: Counter[str] = Counter()  # Asked by those who wait, after every callback.
        self._under_way: list[str] = []
        self._changed: anyio.Event | None = None

    @property
    def names(self) -> list[str]:
        """The names of the callbacks in order."""
        return [name for name, *_ in self.calls]

    def count(self, name: str) -> int:
        """How often the callback `name` came."""
        return self._counts[name]

    @property
    def lost(self) -> bool:
        """Whether `connection_lost` has come."""
        return self._state == "lost"

    @property
    def exception(self) -> BaseException | None:
        """What `connection_lost` was given. Raises `ValueError` before it has come."""
        for name, *args in self.calls:
            if name == "connection_lost":
                exception: BaseException | None = args[0]
                return exception
        raise ValueError("connection_lost() has not come yet")

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until `condition()` is true. It is asked now, and after every callback.

        Raises `RuntimeError` when `connection_lost` has come, after which it would be for ever. Otherwise there is no
        time-out: use `anyio.fail_after`.
        """
        while not condition():
            if self.lost:
                raise RuntimeError(f"the connection was lost before that: {self.names}")
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()

    async def wait_for(self, name: str, count: int = 1) -> None:
        """Wait until the callback `name` has come `count` times. As `wait_until`."""
        await self.wait_until(lambda: self.count(name) >= count)

    def check(self, *, finished: bool = True) -> None:
        """Raise `AssertionError` if callbacks came in an order that asyncio's documentation does not allow.

        If `finished` also when `connection_made` came and `connection_lost` did not, unless another protocol has taken
        over with `set_protocol` meanwhile.
        """
        problems = list(self.violations)
        if finished and self._state not in ("new", "lost") and self.transport.get_protocol() is self:
            problems.append(f"connection_lost() never came: {self.names}")
        if problems:
            raise AssertionError("\n".join(problems))

    def _record(self, name: str, *args: Any) -> None:
        following = self.ORDER[name]
        state = self._state
        if state not in following:
            self.violations.append(f"{name}() after {self.names}")
        if self._under_way and name not in NESTED:
            self.violations.append(f"{name}() inside {self._under_way[-1]}()")
        self._state = following.get(state, "lost" if name == "connection_lost" else state)
        self.calls.append((name, *args))
        self._counts[name] += 1

    def _pass_on(self, name: str, *args: Any) -> Any:
        self._record(name, *args)
        self._tell()
        self._under_way.append(name)
        try:
            return None if self.protocol is None else getattr(self.protocol, name)(*args)
        finally:
            self._under_way.pop()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # What every protocol has.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._pass_on("connection_made", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pass_on("connection_lost", exc)

    def pause_writing(self) -> None:
        self._flow("pause_writing", paused=True)

    def resume_writing(self) -> None:
        self._flow("resume_writing", paused=False)

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
    """What `Recorder` and `BufferedRecorder` share."""

    def __init__(self, protocol: WrappedT | None = None, *, transport: asyncio.BaseTransport | None = None) -> None:
        super().__init__(protocol, transport=transport)
        #: Every byte that came.
        self.received: bytearray = bytearray()
        if isinstance(transport, StreamTransport) and transport.is_eof_received():
            self._state = "ended"

    async def wait_received(self, size: int) -> bytes:
        """Wait until `size` bytes have come in all, and return every byte that has. As `wait_until`."""
        await self.wait_until(lambda: len(self.received) >= size)
        return bytes(self.received)

    def eof_received(self) -> bool | None:
        keep_open: bool | None = self._pass_on("eof_received")
        return keep_open


class Recorder(_StreamRecorder[asyncio.Protocol], asyncio.Protocol):
    """Records what a `Protocol` is told."""

    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "data_received": _OPEN,
        "eof_received": {"open": "ended"},
        "pause_writing": _BETWEEN,
        "resume_writing": _BETWEEN,
        "connection_lost": {"open": "lost", "ended": "lost"},
    }

    def data_received(self, data: bytes) -> None:
        self.received.extend(data)
        self._pass_on("data_received", data)


class BufferedRecorder(_StreamRecorder[asyncio.BufferedProtocol], asyncio.BufferedProtocol):
    """Records what a `BufferedProtocol` is told; a buffer may be asked for again before it is filled."""

    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "get_buffer": {"open": "waiting", "waiting": "waiting"},
        "buffer_updated": {"waiting": "open"},
        "eof_received": {"open": "ended", "waiting": "ended"},
        "pause_writing": {**_BETWEEN, "waiting": "waiting"},
        "resume_writing": {**_BETWEEN, "waiting": "waiting"},
        "connection_lost": {"open": "lost", "waiting": "lost", "ended": "lost"},
    }

    def __init__(
        self,
        protocol: asyncio.BufferedProtocol | None = None,
        *,
        transport: asyncio.BaseTransport | None = None,
        buffer_size: int = 65536,
    ) -> None:
        """As the others; `buffer_size` is that of the buffer, in bytes, where there is no `protocol` to give one."""
        super().__init__(protocol, transport=transport)
        self._own_buffer = bytearray(buffer_size)
        self._given: Any = b""

    def get_buffer(self, sizehint: int) -> Any:
        given = self._pass_on("get_buffer", sizehint)
        self._given = self._own_buffer if self.protocol is None else given
        return self._given

    def buffer_updated(self, nbytes: int) -> None:
        given, self._given = self._given, b""
        self.received.extend(memoryview(given).cast("B")[:nbytes])
        self._pass_on("buffer_updated", nbytes)


class DatagramRecorder(_Recorder[asyncio.DatagramProtocol], asyncio.DatagramProtocol):
    """Records what a `DatagramProtocol` is told."""

    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "datagram_received": _OPEN,
        "error_received": _OPEN,
        "pause_writing": _OPEN,
        "resume_writing": _OPEN,
        "connection_lost": {"open": "lost"},
    }

    @property
    def received(self) -> list[tuple[bytes, Any]]:
        """Every datagram that came, with its sender's address."""
        return [
            (data, address) for name, *rest in self.calls if name == "datagram_received" for data, address in [rest]
        ]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._pass_on("datagram_received", data, addr)

    def error_received(self, exc: Exception) -> None:
        self._pass_on("error_received", exc)


class SubprocessRecorder(_Recorder[asyncio.SubprocessProtocol], asyncio.SubprocessProtocol):
    """Records what a `SubprocessProtocol` is told: a pipe may outlive the process, the connection neither."""

    _ALIVE: ClassVar = {"open": "open", "exited": "exited"}
    ORDER: ClassVar[_Order] = {
        "connection_made": {"new": "open"},
        "pipe_data_received": _ALIVE,
        "pipe_connection_lost": _ALIVE,
        "process_exited": {"open": "exited"},
        "pause_writing": _ALIVE,
        "resume_writing": _ALIVE,
        "connection_lost": {"exited": "lost"},
    }

    def __init__(
        self, protocol: asyncio.SubprocessProtocol | None = None, *, transport: asyncio.BaseTransport | None = None
    ) -> None:
        super().__init__(protocol, transport=transport)
        #: Every byte that came out of each descriptor of the child.
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
) -> tuple[tuple[abc.Transport, StreamProtocolT], tuple[abc.Transport, OtherProtocolT]]:
    """Join two protocols in memory and return `((transport_a, protocol_a), (transport_b, protocol_b))`.

    `factory_a` and `factory_b` are protocol factories, as the endpoint functions of `group` take them.

    Both transports are the group's and behave as over any other connection; underneath is no operating system, which
    makes tests quick and repeatable. It is the likeness of a pair of UNIX stream sockets, so that an end that is closed
    with something unread resets the other one.

    At most `chunk_size` bytes are received at a time: 1 shows whether a protocol minds where the stream is cut. By
    default it is all that there is. `buffer_size` is how many bytes each direction holds under way before writing
    fills the transport's own buffer. `info_a` and `info_b` are what `get_extra_info` of each transport knows.

    Both `connection_made` run before this returns. Raises `RuntimeError` when the group is not open, `TypeError` and
    `ValueError` for a size that is no number of bytes or below 1, and whatever a factory raises; no connection is made
    then.
    """
    sizes = {"buffer_size": buffer_size}
    if chunk_size is not None:
        sizes["chunk_size"] = chunk_size
    for name, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name} must be a number of bytes, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size!r}")
    return await connect_in_memory(
        group,
        factory_a,
        factory_b,
        chunk_size=chunk_size,
        buffer_size=buffer_size,
        info_a=info_a or {},
        info_b=info_b or {},
    )
