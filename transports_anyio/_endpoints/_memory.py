"""Two transports joined in memory, for `transports_anyio.testing`."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel

from .._channels._memory import pair
from .._channels._tls import TLSChannel
from .._transports._stream import StreamTransport
from ._base import Endpoints, ProtocolT

if TYPE_CHECKING:
    from .._channels._abc import Channel
    from .._channels._tls_engine import TLSOptions

OtherProtocolT = TypeVar("OtherProtocolT")


def _is_consequence(exc: Exception) -> bool:
    """Return whether a failed handshake is the other end's fault: its alert, or the end of the connection."""
    return not isinstance(exc, ssl.SSLError) or "ALERT" in (exc.reason or "")


class MemoryEndpoints(Endpoints):
    """The endpoint function behind `transports_anyio.testing.memory_connection`."""

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
        tls: tuple[TLSOptions, TLSOptions] | None,
    ) -> tuple[tuple[StreamTransport, ProtocolT], tuple[StreamTransport, OtherProtocolT]]:
        """Make both transports, after the handshake with `tls`, the options of `a` and of `b`.

        Raises `RuntimeError` when the group is not open, the error of the handshake, and whatever a factory raises.
        """
        await anyio.lowlevel.checkpoint()
        self._core.require_open()
        core = self._core
        a: Channel
        b: Channel
        a, b = pair(core.call_internal, chunk_size=chunk_size, buffer_size=buffer_size, info_a=info_a, info_b=info_b)
        if tls is not None:
            a, b = await self._encrypt(a, b, *tls)
        transport_a, protocol_a = core.make_transport(StreamTransport, factory_a, a)
        try:
            transport_b, protocol_b = core.make_transport(StreamTransport, factory_b, b)
        except BaseException:
            a.close(aborted=True)
            core.remove_resource(transport_a)
            raise
        try:
            transport_a.start()
        finally:  # A `KeyboardInterrupt` ends the group, which calls `connection_lost` of both protocols.
            transport_b.start()
        return (transport_a, protocol_a), (transport_b, protocol_b)

    async def _encrypt(
        self, a: Channel, b: Channel, client: TLSOptions, server: TLSOptions
    ) -> tuple[TLSChannel, TLSChannel]:
        """Return both channels with TLS over them. A failed handshake closes both."""
        failures: list[Exception] = []

        async def shake_hands(channel: TLSChannel) -> None:
            try:
                await self._shake_hands(channel)
            except Exception as exc:
                failures.append(exc)  # The other end then fails as well.

        try:
            encrypted_a = TLSChannel(a, client, self._core)
            encrypted_b = TLSChannel(b, server, self._core)
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(shake_hands, encrypted_b)
                    await shake_hands(encrypted_a)
                if failures:
                    raise min(failures, key=_is_consequence)
            except BaseException:
                encrypted_a.close(aborted=True)
                encrypted_b.close(aborted=True)
                raise
            finally:
                failures.clear()  # Their tracebacks have this frame: no cycle.
        except BaseException:
            a.close(aborted=True)
            b.close(aborted=True)
            raise
        return encrypted_a, encrypted_b
