"""Connect two transports in memory, for `transports_anyio.testing`.

Holds: the implementation of `memory_connection`.
May know: `_base`, `_channels`, `_transports`, `_types`, `anyio`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio.lowlevel

from .._channels._memory import pair
from .._transports._stream import StreamTransport
from .._types import AnyProtocol, StreamProtocolT
from ._base import Endpoints, check_open

OtherProtocolT = TypeVar("OtherProtocolT", bound=AnyProtocol)


async def connect_in_memory(
    group: Endpoints,
    factory_a: Callable[[], StreamProtocolT],
    factory_b: Callable[[], OtherProtocolT],
    *,
    chunk_size: int | None,
    buffer_size: int,
    info_a: Mapping[str, Any],
    info_b: Mapping[str, Any],
) -> tuple[tuple[StreamTransport, StreamProtocolT], tuple[StreamTransport, OtherProtocolT]]:
    """Make both transports. Raises `RuntimeError` if the group is not open, and what a factory raises."""
    core = group._core  # pyright: ignore[reportPrivateUsage]
    await check_open(core, "memory_connection", factory_a, factory_b, called_as="memory_connection, group")
    await anyio.lowlevel.checkpoint()
    await check_open(core)
    a, b = pair(core.call_internal, chunk_size=chunk_size, buffer_size=buffer_size, info_a=info_a, info_b=info_b)
    transport_a, protocol_a = core.make_transport(StreamTransport, factory_a, a)
    try:
        transport_b, protocol_b = core.make_transport(StreamTransport, factory_b, b)
    except BaseException:
        a.close(aborted=True)
        core.remove_resource(transport_a)
        raise
    try:
        transport_a._start()
    finally:  # After a `KeyboardInterrupt`, too: it ends the group, and both protocols get `connection_lost`.
        transport_b._start()
    return (transport_a, protocol_a), (transport_b, protocol_b)
