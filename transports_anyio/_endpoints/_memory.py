"""Connect two transports in memory, for `transports_anyio.testing`.

Holds: the implementation of `memory_connection`.
May know: `_base`, `_channels`, `_transports`, `_types`, `anyio`, `ssl`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel

from .._channels._memory import pair
from .._channels._tls import TLSChannel
from .._transports._stream import StreamTransport
from .._types import AnyProtocol, StreamProtocolT
from ._base import Endpoints, check_open

if TYPE_CHECKING:
    from .._channels._abc import StreamChannel
    from .._channels._tls_engine import TLSOptions

OtherProtocolT = TypeVar("OtherProtocolT", bound=AnyProtocol)


def is_consequence(exc: Exception) -> bool:
    """Return whether a failed handshake is the other end's fault: its alert, or the end of the connection."""
    return not isinstance(exc, ssl.SSLError) or "ALERT" in (exc.reason or "")


async def connect_in_memory(
    group: Endpoints,
    factory_a: Callable[[], StreamProtocolT],
    factory_b: Callable[[], OtherProtocolT],
    *,
    chunk_size: int | None,
    buffer_size: int,
    info_a: Mapping[str, Any],
    info_b: Mapping[str, Any],
    tls: tuple[TLSOptions, TLSOptions] | None,
) -> tuple[tuple[StreamTransport, StreamProtocolT], tuple[StreamTransport, OtherProtocolT]]:
    """Make both transports, after the handshake with `tls`, the options of `a` and of `b`.

    Raises `RuntimeError` if the group is not open, the error of the handshake, and what a factory raises.
    """
    core = group._core
    await check_open(core, "memory_connection", factory_a, factory_b, called_as="memory_connection, group")
    await anyio.lowlevel.checkpoint()
    await check_open(core)
    a: StreamChannel
    b: StreamChannel
    a, b = pair(core.call_internal, chunk_size=chunk_size, buffer_size=buffer_size, info_a=info_a, info_b=info_b)
    if tls is not None:
        a, b = await encrypt(group, a, b, *tls)
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


async def encrypt(
    group: Endpoints, a: StreamChannel, b: StreamChannel, client: TLSOptions, server: TLSOptions
) -> tuple[TLSChannel, TLSChannel]:
    """Return both channels with TLS over them. A failed handshake closes both."""
    core = group._core
    failures: list[Exception] = []

    async def shake_hands(channel: TLSChannel) -> None:
        try:
            await group._shake_hands(channel)
        except Exception as exc:
            failures.append(exc)  # The other end then fails as well.

    try:
        encrypted_a = TLSChannel(a, client, core)
        encrypted_b = TLSChannel(b, server, core)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(shake_hands, encrypted_b)
                await shake_hands(encrypted_a)
            if failures:
                raise min(failures, key=is_consequence)
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
