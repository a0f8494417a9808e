"""The transports of this package, as types: asyncio's abstract classes with the methods that asyncio does not have.

The endpoint functions return them. A protocol gets the type, and with it the methods, by an `isinstance` check:

    from transports_anyio import Protocol, abc

    class MyProtocol(Protocol):
        def connection_made(self, transport):
            assert isinstance(transport, abc.Transport)
            self.transport = transport

A protocol that is not derived from asyncio's classes can annotate the parameter: `transport: abc.Transport`.

Holds: the abstract classes of the transports.
May know: `asyncio`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, overload

__all__ = ["DatagramTransport", "ReadTransport", "SubprocessTransport", "Transport", "WriteTransport"]


class ReadTransport(asyncio.ReadTransport):
    """A transport that receives; returned by `connect_read_pipe`."""

    __slots__ = ()

    @abstractmethod
    def is_eof_received(self) -> bool:
        """Return whether the peer has ended the stream: no `data_received` or `eof_received` follows."""


class WriteTransport(asyncio.WriteTransport):
    """A transport that sends; returned by `connect_write_pipe`."""

    __slots__ = ()

    @abstractmethod
    def is_writing_paused(self) -> bool:
        """Return whether writing is paused: between `pause_writing` and `resume_writing` of the protocol."""


class Transport(ReadTransport, WriteTransport, asyncio.Transport):
    """A transport that receives and sends: a connection."""

    __slots__ = ()


class DatagramTransport(asyncio.DatagramTransport):
    """A transport for datagrams; returned by `create_datagram_endpoint` and `connect_datagram_socket`."""

    __slots__ = ()

    @abstractmethod
    def is_writing_paused(self) -> bool:
        """Return whether writing is paused: between `pause_writing` and `resume_writing` of the protocol."""

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


class SubprocessTransport(asyncio.SubprocessTransport):
    """A transport for a child process; returned by `subprocess_exec`, `subprocess_shell` and `connect_process`."""

    __slots__ = ()

    @abstractmethod
    def is_writing_paused(self) -> bool:
        """Return whether writing to standard input is paused."""

    if TYPE_CHECKING:
        # The result depends on `fd`. At run time this is asyncio's method.
        @overload
        def get_pipe_transport(self, fd: Literal[0]) -> WriteTransport | None: ...
        @overload
        def get_pipe_transport(self, fd: Literal[1, 2]) -> ReadTransport | None: ...
        @overload
        def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None: ...
        def get_pipe_transport(self, fd: int) -> asyncio.BaseTransport | None: ...
