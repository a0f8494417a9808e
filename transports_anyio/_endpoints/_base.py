"""What several families of endpoint functions need: to adopt sockets, to own AnyIO objects, to wait for handshakes.

Holds: the base class of the families, and the AnyIO objects in use.
May know: `_callbacks`, `_channels`, `_core`, `_errors`, `_resources`, `_selector`, `_transports`, `_types`, `_waiters`,
anyio.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from .._channels._socket import SocketChannel, is_tcp, set_nodelay
from .._channels._tls import TLSChannel
from .._channels._tls_engine import TLSOptions
from .._errors import safe_repr
from .._resources import PendingHandshake
from .._selector import Registration
from .._transports._stream import StreamTransport
from .._types import StreamProtocolT
from .._waiters import InterruptSafeEvent

if TYPE_CHECKING:
    from .._channels._abc import Channel
    from .._core import Core

#: The `id` of each AnyIO object that a transport uses: the objects need not be hashable. Groups in several threads
#: share this set, so only its methods change it, which are atomic.
in_use: set[int] = set()


class Endpoints:
    """The base class of each family of endpoint functions.

    The first line of an endpoint function is `await self._check_open(name, protocol_factory)`.
    """

    _core: Core

    def _run_for(
        self,
        resource: object,
        run: Callable[[Callable[[Exception], None]], Coroutine[Any, Any, None]],
        name: str | None = None,
    ) -> None:
        """Start the task `run` of a channel or child over the AnyIO object `resource`.

        `run` gets a function that reports an error of closing: the object may be the user's own class.
        """
        name = name or safe_repr(resource)
        core = self._core
        in_use.add(id(resource))

        def report(exc: Exception) -> None:
            context = {"message": f"Closing {name} failed", "exception": exc}
            core.call(core.group.call_exception_handler, context)

        async def use() -> None:
            core.receiving_tasks += 1
            try:
                await run(report)
            finally:
                core.receiving_tasks -= 1
                in_use.discard(id(resource))

        core.start_internal_task(use, name=f"transports_anyio: {name}")

    def _require_unused(self, *resources: object) -> None:
        """Raise `RuntimeError` if a transport of any group uses one of the AnyIO objects."""
        for resource in resources:
            if id(resource) in in_use:
                raise RuntimeError(f"{safe_repr(resource)} is already in use by another transport")

    async def _connect_socket(
        self, protocol_factory: Callable[[], StreamProtocolT], sock: socket.socket, tls: TLSOptions | None = None
    ) -> tuple[StreamTransport, StreamProtocolT]:
        """Make the protocol and the transport of a connected, non-blocking socket; with `tls`, do the handshake first.

        The group owns the socket from here on, and closes it on any error.
        """
        try:
            poller = await self._check_open()
            if is_tcp(sock):
                set_nodelay(sock)
            channel: Channel = SocketChannel(poller, sock)
        except BaseException:
            sock.close()
            raise
        if tls is not None:
            try:
                encrypted = TLSChannel(channel, tls, self._core)
            except BaseException:  # OpenSSL refuses the name of the server, for example.
                channel.close(aborted=True)
                raise
            await self._shake_hands(encrypted)
            channel = encrypted
        transport, protocol = self._core.make_transport(StreamTransport, protocol_factory, channel)
        transport.start()
        return transport, protocol

    async def _adopt(self, sock: socket.socket) -> None:
        """Make a socket of the user's non-blocking. The group owns it from here on, and closes it on any error.

        Raises `RuntimeError` if the group uses the socket already; it is not closed then.
        """
        poller = await self._check_open()
        owner = poller.owner(sock.fileno())
        if owner is not None:
            raise RuntimeError(f"{sock!r} is already in use by another transport or server of the group: {owner!r}")
        reservation = Registration(sock.fileno())
        poller.register(reservation)  # Another task may try to adopt the same socket.
        try:
            sock.setblocking(False)
            await anyio.lowlevel.checkpoint()
            await self._check_open()
        except BaseException:
            sock.close()
            raise
        finally:
            poller.unregister(reservation)

    async def _shake_hands(self, channel: TLSChannel) -> None:
        """Wait for the handshake of `channel`. An error or a cancellation closes the channel.

        Raises:
        - `ssl.SSLError`: the peers do not agree on TLS
        - `ConnectionResetError`: the peer closed the connection
        - `ConnectionAbortedError`: the handshake timed out
        - `RuntimeError`: the group has ended
        """
        over = InterruptSafeEvent()
        pending = PendingHandshake(channel, self._core.add_resource, self._core.remove_resource)
        try:
            pending.begin(over.set)
            await over.wait()
            if pending.failure is None or pending.aborted:
                await self._check_open()  # The group may have ended before this task ran.
            if pending.failure is not None:
                raise pending.failure
        except BaseException:
            pending.abort()
            raise
        finally:
            pending.failure = None  # Break the cycle: its traceback refers to this frame.
