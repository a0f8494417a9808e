"""What several families of endpoint functions need: to adopt sockets, to own AnyIO objects, to wait for handshakes.

Holds: the base class of the families, and the AnyIO objects in use.
May know: `_callbacks`, `_capabilities`, `_channels`, `_core`, `_errors`, `_poller`, `_resources`, `_selector`,
`_transports`, `_types`, `_waiters`, `anyio`, `socket`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from threading import get_ident
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from .. import _capabilities
from .._callbacks import check_factory
from .._channels._pipe import ChildPipeChannel, PipeChannel
from .._channels._socket import SocketChannel, is_tcp, set_nodelay
from .._channels._threaded_pipe import ThreadedPipeChannel
from .._channels._tls import TLSChannel
from .._channels._tls_engine import TLSOptions
from .._errors import NotOpenError, safe_repr
from .._selector import Registration
from .._transports._stream import StreamTransport
from .._types import StreamProtocolT
from .._waiters import Outcome

if TYPE_CHECKING:
    from .._channels._abc import StreamChannel
    from .._core import Core
    from .._poller import Poller
    from .._resources import PendingHandshake

#: The `id` of each AnyIO object that a transport uses: the objects need not be hashable. Groups in several threads
#: share this set, so only its methods change it, which are atomic.
in_use: set[int] = set()


async def check_open(core: Core, name: str = "", *factories: object, called_as: str = "") -> Poller:
    """Return the poller if an endpoint function may make a connection now, or may still do so after a wait.

    `name` is the endpoint function, and `factories` are its protocol factories. `called_as` is how users call it, if
    that is not `group.name`.

    Raises:
    - `RuntimeError`: the group is not open, or this is another thread than the group's
    - `TypeError`: a factory can never return a protocol
    - the cancellation of the caller, instead of a `RuntimeError`, if it is cancelled because the group is being left
    """
    try:
        poller = core.check_open(name, called_as)
    except RuntimeError:
        await check_cancelled(core)
        raise
    for factory in factories:
        check_factory(name, factory, core.task_starter)
    return poller


async def check_cancelled(core: Core) -> None:
    """Raise the cancellation of a task of a group that is being left, which explains any other error."""
    if not core.open and get_ident() == core.thread:
        await anyio.lowlevel.checkpoint_if_cancelled()


class CancellationFirst:
    """Around a wait of an endpoint function: a caller that is cancelled because the group is being left gets no error.

    The end of the group may itself cause the error: it has closed the server that a connection was made to, for
    example. And a thread that resolves a name may fail when the caller is cancelled already.
    """

    __slots__ = ("_core",)

    def __init__(self, core: Core) -> None:
        self._core = core

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, Exception):
            await check_cancelled(self._core)


class Endpoints:
    """The base class of each family of endpoint functions.

    The first line of an endpoint function is `await check_open(self._core, name, protocol_factory)`.
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

    def _pipe_channel(self, pipe: Any, *, writing: bool, of_child: bool = False) -> StreamChannel:
        """Return a channel over one end of a pipe, which it owns; `of_child`, if the pipe was made for a child."""
        core = self._core
        kind = ChildPipeChannel if of_child else PipeChannel
        if _capabilities.polls_files:
            return kind(core.poller, pipe, writing=writing)
        return ThreadedPipeChannel(
            core.call_internal, core.call_from_thread, pipe, writing=writing, kept_open=kind.kept_open
        )

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
            poller = await check_open(self._core)
            if is_tcp(sock):
                set_nodelay(sock)
            channel: StreamChannel = SocketChannel(poller, sock)
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
        transport._start()
        return transport, protocol

    async def _adopt(self, sock: socket.socket) -> None:
        """Make a socket of the user's non-blocking. The group owns it from here on, and closes it on any error.

        Raises `RuntimeError` if the group uses the socket already; it is not closed then.
        """
        poller = await check_open(self._core)
        owner = poller.owner(sock.fileno())
        if owner is not None:
            raise RuntimeError(f"{sock!r} is already in use by another transport or server of the group: {owner!r}")
        reservation = Registration(sock.fileno())
        poller.register(reservation)  # Another task may try to adopt the same socket.
        try:
            sock.setblocking(False)
            await anyio.lowlevel.checkpoint()
            await check_open(self._core)
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
        core = self._core
        outcome = Outcome()

        def done(pending: PendingHandshake, exc: Exception | None) -> None:
            outcome.set(core.not_open() if pending.aborted and not core.open else exc)

        try:
            core.handshake(channel, done)
            await outcome.wait()
            await check_open(core)  # The group may have ended before this task runs again.
        except NotOpenError:
            channel.close(aborted=True)
            await check_cancelled(core)
            raise
        except BaseException:
            channel.close(aborted=True)
            raise
