"""Two transports joined in memory, for `transports_anyio.testing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio.lowlevel

from .._channels._memory import pair
from .._transports._stream import StreamTransport
from ._base import Endpoints, ProtocolT

OtherProtocolT = TypeVar("OtherProtocolT")


class MemoryEndpoints(Endpoints):
    """What `transports_anyio.testing.memory_connection` does; by that name, which error messages tell."""

    _called_as = "{}, group"

    def __init__(self, group: Endpoints) -> None:
        self._core = group._core  # noqa: SLF001  # every family has it

    async def memory_connection(
        self,
        factory_a: Callable[[], ProtocolT],
        factory_b: Callable[[], OtherProtocolT],
        *,
        chunk_size: int | None,
        buffer_size: int,
        info_a: Mapping[str, Any],
        info_b: Mapping[str, Any],
    ) -> tuple[tuple[StreamTransport, ProtocolT], tuple[StreamTransport, OtherProtocolT]]:
        """Make both transports. Raises `RuntimeError` when the group is not open, and whatever a factory raises."""
        await anyio.lowlevel.checkpoint()
        self._core.check_open()
        core = self._core
        a, b = pair(core.call_internal, chunk_size=chunk_size, buffer_size=buffer_size, info_a=info_a, info_b=info_b)
        transport_a, protocol_a = core.make_transport(StreamTransport, factory_a, a)
        try:
            transport_b, protocol_b = core.make_transport(StreamTransport, factory_b, b)
        except BaseException:
            a.close(aborted=True)
            core.remove_resource(transport_a)
            raise
        try:
            transport_a.start()
        finally:  # A `KeyboardInterrupt` ends the group, which tells both protocols of the end.
            transport_b.start()
        return (transport_a, protocol_a), (transport_b, protocol_b)
