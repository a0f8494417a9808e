"""The transports of this package, as types: asyncio's abstract classes with the methods that asyncio does not have.

The endpoint functions return them. A protocol gets the type, and with it the methods, by an `isinstance` check:

    from transports_anyio import Protocol, abc

    class MyProtocol(Protocol):
        def connection_made(self, transport):
            assert isinstance(transport, abc.Transport)
            self.transport = transport

A protocol that is not derived from asyncio's classes can annotate the parameter: `transport: abc.Transport`.

Holds: the abstract classes of the transports.
May know: `_types`, `asyncio`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._types import PosArgsT

__all__ = ["BaseTransport", "DatagramTransport", "ReadTransport", "SubprocessTransport", "Transport", "WriteTransport"]


class BaseTransport(asyncio.BaseTransport):
    """What all transports have."""

    __slots__ = ()

    @abstractmethod
    def start_soon(
        self,
        async_function: Callable[[Unpack[PosArgsT]], Coroutine[Any, Any, object]],
        *args: Unpack[PosArgsT],
        name: object = None,
    ) -> None:
        """Start a task that belongs to the connection and awaits `async_function(*args)`; callbacks may call this.

        The task is cancelled after `connection_lost`. What it raises goes to the exception handler, ends this
        connection and no other, and is what `connection_lost` gets; only a datagram endpoint stays open. The tasks
        survive `start_tls`. `wait_closed` of the server and of the group waits until they have ended. What `drain` of
        this transport raises is not reported. `name` is for debugging; it defaults to the function's name.

        Raises `RuntimeError` if the group is not open and in another thread, `ConnectionError` if the connection is
        lost, `TypeError` if `async_function` is not an async function or does not take these arguments.
        """

    @abstractmethod
    async def wait_closed(self) -> None:
        """Wait until `connection_lost` has been called. Any number of tasks may wait."""


class ReadTransport(BaseTransport, asyncio.ReadTransport):
    """A transport that receives; returned by `connect_read_pipe`."""

    __slots__ = ()

    @abstractmethod
    def is_eof_received(self) -> bool:
        """Return whether the peer has ended the stream: no `data_received` or `eof_received` follows."""


class _SendingTransport(BaseTransport):
    """What all transports have that send."""

    __slots__ = ()

    @abstractmethod
    def is_writing_paused(self) -> bool:
        """Return whether writing is paused: between `pause_writing` and `resume_writing` of the protocol."""

    @abstractmethod
    async def drain(self) -> None:
        """Wait until writing is not paused, so that more can be written.

        Raises `ConnectionError` when the connection is lost; its cause is what `connection_lost` gets, where it gets an
        exception and a task of the connection, or one that waits for it, has been there before.
        """


class WriteTransport(_SendingTransport, asyncio.WriteTransport):
    """A transport that sends; returned by `connect_write_pipe`."""

    __slots__ = ()


class Transport(ReadTransport, WriteTransport, asyncio.Transport):
    """A transport that receives and sends: a connection."""

    __slots__ = ()


class DatagramTransport(_SendingTransport, asyncio.DatagramTransport):
    """A transport for datagrams; returned by `create_datagram_endpoint` and `connect_datagram_socket`."""

    __slots__ = ()

    @abstractmethod
    def get_write_buffer_size(self) -> int:
        """Return how many bytes are buffered."""

    @abstractmethod
    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the watermarks `(low, high)`, in bytes."""

    @abstractmethod
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the watermarks, in bytes, as `asyncio.WriteTransport.set_write_buffer_limits` does.

        `high` defaults to 64 KiB, or to four times `low`; `low` to a quarter of `high`. Raises `ValueError` unless
        `high >= low >= 0`.
        """


class SubprocessTransport(BaseTransport, asyncio.SubprocessTransport):
    """A transport for a child process; returned by `subprocess_exec`, `subprocess_shell` and `connect_process`."""

    __slots__ = ()

    @abstractmethod
    def is_writing_paused(self) -> bool:
        """Return whether writing to standard input is paused."""

    @abstractmethod
    async def drain(self) -> None:
        """Wait until writing to standard input is not paused. Raises `ConnectionError` when it is closed."""

    @abstractmethod
    async def shutdown(self, timeout: float | None) -> None:
        """Terminate the process, let it end, and kill it if it has not ended after `timeout` seconds.

        If the protocol has a method `shutdown_requested`, that is called instead of `terminate`. `None` is no limit.
        Returns when `connection_lost` has been called. Raises `ValueError` for a negative `timeout`.
        """

    if TYPE_CHECKING:
        # The result depends on `fd`. At run time this is asyncio's method.
        @overload
        def get_pipe_transport(self, fd: Literal[0]) -> WriteTransport | None: ...
        @overload
        def get_pipe_transport(self, fd: Literal[1, 2]) -> ReadTransport | None: ...
        @overload
        def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None: ...
        def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None: ...
