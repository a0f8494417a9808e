"""Pipes: `connect_read_pipe` and `connect_write_pipe`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from .._channels._pipe import PipeChannel, require_pipes
from .._transports._pipe import ReadPipeTransport, WritePipeTransport
from .._transports._stream import StreamTransport
from ._base import Endpoints, ProtocolT

if TYPE_CHECKING:
    from asyncio import ReadTransport, WriteTransport


class PipeEndpoints(Endpoints):
    """`connect_read_pipe` and `connect_write_pipe`."""

    async def connect_read_pipe(
        self, protocol_factory: Callable[[], ProtocolT], pipe: Any
    ) -> tuple[ReadTransport, ProtocolT]:
        """Read from `pipe` and return `(transport, protocol)`.

        `pipe` is a file object: a pipe, FIFO, socket, character device or terminal. The transport makes it
        non-blocking and closes it, standard input excepted: that is left as it was. `connection_made` runs before this
        returns.

        Raises `RuntimeError` when the group is not open, `ValueError` for a regular file, which is left open,
        `NotImplementedError` on Windows, and whatever `protocol_factory` raises.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.connect_read_pipe
        """
        return await self._connect_pipe(protocol_factory, pipe, ReadPipeTransport)

    async def connect_write_pipe(
        self, protocol_factory: Callable[[], ProtocolT], pipe: Any
    ) -> tuple[WriteTransport, ProtocolT]:
        """Write to `pipe` and return `(transport, protocol)`.

        `pipe` is a file object, of the kinds that `connect_read_pipe` takes. The transport makes it non-blocking and
        closes it, standard output and error excepted: they are left as they were. That the reader has gone is noticed
        while nothing is written, too. `connection_made` runs before this returns.

        Raises `RuntimeError` when the group is not open, `ValueError` for a regular file, which is left open,
        `NotImplementedError` on Windows, and whatever `protocol_factory` raises.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.connect_write_pipe
        """
        return await self._connect_pipe(protocol_factory, pipe, WritePipeTransport)

    async def _connect_pipe(
        self,
        protocol_factory: Callable[[], ProtocolT],
        pipe: Any,
        transport_class: type[ReadPipeTransport | WritePipeTransport],
    ) -> tuple[StreamTransport, ProtocolT]:
        require_pipes()
        await anyio.lowlevel.checkpoint()
        channel = PipeChannel(self._core.check_open(), pipe, writing=transport_class is WritePipeTransport)
        transport, protocol = self._core.make_transport(transport_class, protocol_factory, channel)
        transport.start()
        return transport, protocol
