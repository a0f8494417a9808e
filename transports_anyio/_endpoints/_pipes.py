"""Pipes: `connect_read_pipe` and `connect_write_pipe`.

Holds: the endpoint functions for pipes.
May know: `_base`, `_channels`, `_transports`, `_types`, `abc`, `anyio`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from .._transports._pipe import ReadPipeTransport, WritePipeTransport
from .._transports._stream import StreamTransport
from .._types import StreamProtocolT
from ._base import Endpoints, check_open

if TYPE_CHECKING:
    from ..abc import ReadTransport, WriteTransport


class PipeEndpoints(Endpoints):
    """`connect_read_pipe` and `connect_write_pipe`."""

    async def connect_read_pipe(
        self, protocol_factory: Callable[[], StreamProtocolT], pipe: Any
    ) -> tuple[ReadTransport, StreamProtocolT]:
        """Read from `pipe` and return `(transport, protocol)`.

        `connection_made` runs before this returns.

        - `protocol_factory`: makes the protocol
        - `pipe`: a file object of a pipe, FIFO, socket, character device or terminal. The transport makes it
          non-blocking and closes it. Standard input is not closed, and is left as it was. On Windows a thread reads it
          instead; what waits in a read when the transport ends is lost.

        Raises:
        - `RuntimeError`: the group is not open
        - `ValueError`: `pipe` is a regular file, which stays open
        - whatever `protocol_factory` raises

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.connect_read_pipe
        """
        await check_open(self._core, "connect_read_pipe", protocol_factory)
        return await self._connect_pipe(protocol_factory, pipe, ReadPipeTransport)

    async def connect_write_pipe(
        self, protocol_factory: Callable[[], StreamProtocolT], pipe: Any
    ) -> tuple[WriteTransport, StreamProtocolT]:
        """Write to `pipe` and return `(transport, protocol)`.

        `connection_made` runs before this returns. The transport notices that the reader has closed its end even while
        nothing is written, except on Windows.

        - `protocol_factory`: makes the protocol
        - `pipe`: a file object, of the kinds that `connect_read_pipe` takes. The transport makes it non-blocking and
          closes it. Standard output and standard error are not closed, and are left as they were.

        Raises:
        - `RuntimeError`: the group is not open
        - `ValueError`: `pipe` is a regular file, which stays open
        - whatever `protocol_factory` raises

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.connect_write_pipe
        """
        await check_open(self._core, "connect_write_pipe", protocol_factory)
        return await self._connect_pipe(protocol_factory, pipe, WritePipeTransport)

    async def _connect_pipe(
        self,
        protocol_factory: Callable[[], StreamProtocolT],
        pipe: Any,
        transport_class: type[ReadPipeTransport | WritePipeTransport],
    ) -> tuple[StreamTransport, StreamProtocolT]:
        await anyio.lowlevel.checkpoint()
        await check_open(self._core)
        channel = self._pipe_channel(pipe, writing=transport_class is WritePipeTransport)
        transport, protocol = self._core.make_transport(transport_class, protocol_factory, channel)
        transport._start()
        return transport, protocol
