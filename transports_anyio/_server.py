"""The server, which listens and accepts connections.

Holds: listening sockets, and the connections accepted from them.
May know: `_channels`, `_core`, `_errors`, `_handles`, `_resources`, `_selector`, `_sockets`, `_statistics`,
`_transports`, `_types`, `_waiters`, `anyio`, `asyncio`, `socket`.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from asyncio.trsock import TransportSocket
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any

import anyio.lowlevel

from ._channels._socket import SocketChannel, is_tcp, name_or_none, set_nodelay
from ._channels._tls import TLSChannel
from ._errors import log_debug, logger
from ._selector import READ, Registration
from ._sockets import address_error
from ._statistics import ServerStatistics, describe_flow
from ._transports._stream import StreamTransport
from ._waiters import Waiters, check_shutdown_timeout, wait_or_abort

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._channels._abc import StreamChannel
    from ._channels._tls_engine import TLSOptions
    from ._core import Core
    from ._handles import TimerHandle
    from ._resources import PendingHandshake
    from ._types import AnyProtocol

# Out of file descriptors or memory. To accept again at once would fail again and block all other work, so wait as
# asyncio does (ACCEPT_RETRY_DELAY, in seconds), while the connections stay in the backlog. epoll raises ENOSPC if it
# cannot watch the listener again.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC}
RETRY_DELAY = 1.0

# The client closed the connection before `accept`. accept(2) also reports pending network errors of the new
# connection; none of them concerns the listening socket.
CLIENT_LEFT = {
    errno.ECONNABORTED, errno.ECONNRESET, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.EPERM,
}  # fmt: skip


def check_limits(max_connections: int | None, max_handshakes: int | None, *, tls: bool) -> None:
    """Raise `TypeError` and `ValueError` for limits of a server that are no positive numbers, or make no sense."""
    limit: Any  # Whatever the user gave.
    for name, limit in (("max_connections", max_connections), ("max_handshakes", max_handshakes)):
        if limit is None:
            continue
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise TypeError(f"{name} should be a whole number or None, got {limit!r}")
        if limit < 1:
            raise ValueError(f"{name} should be at least 1, got {limit}")
    if max_handshakes is not None and not tls:
        raise ValueError("max_handshakes is only meaningful with ssl")


def is_clients_failure(exc: Exception) -> bool:
    """Return whether a TLS handshake failed because of what the client did, and not for lack of a resource here.

    `UnicodeError` is for a certificate with a name that Python cannot read.
    """
    return isinstance(exc, UnicodeError) or (isinstance(exc, OSError) and exc.errno not in EXHAUSTED)


def peername_of(channel: StreamChannel) -> Any:
    return channel.extra_info().get("peername")


class Server(asyncio.AbstractServer):
    """Listening sockets and the connections accepted from them; made by `TransportGroup.create_server`.

    The server is closed when the block of its group is left. `async with server:` closes it earlier: at the end of that
    block the server is closed, and the block waits until all of its connections are lost.

    Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.Server
    """

    def __init__(
        self,
        core: Core,
        protocol_factory: Callable[[], AnyProtocol],
        sockets: list[socket.socket],
        backlog: int,
        tls: TLSOptions | None,
        *,
        start_serving: bool,
        max_connections: int | None = None,
        max_handshakes: int | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> None:
        # The server owns the bound sockets from here on, and closes them on any error.
        self._core = core
        self._poller = core.poller
        self._tls = tls
        self._on_close = on_close
        # Connections see the context variables of the code that created the server, as in asyncio. The group is current
        # in it already, and not only in the copy of each connection, which would cost that much more memory.
        self._context = core.callback_context().context
        self._sockets = sockets
        self._protocol_factory = protocol_factory
        self._backlog = backlog
        self._is_tcp = any(map(is_tcp, sockets))  # Once, not for each connection.
        self._registrations = {sock: Registration(sock.fileno()) for sock in sockets}
        self._serving = False
        self._serving_forever = False
        self._closed = False
        self._addresses: list[Any] = []  # Of a closed server.
        self._connections: set[StreamTransport] = set()
        self._on_lost = self._lost  # One bound method for all connections.
        self._handshakes: set[PendingHandshake] = set()
        self._max_connections = inf if max_connections is None else max_connections
        self._max_handshakes = inf if max_handshakes is None else max_handshakes
        self._limited = max_connections is not None or max_handshakes is not None
        self._held: set[socket.socket] = set()  # Listening sockets that are not watched while a limit is reached.
        self._retries: dict[socket.socket, TimerHandle] = {}  # The last timer of each that could not accept.
        self._accepted = 0
        self._failed_handshakes = 0
        self._changed = Waiters()
        try:
            for registration in self._registrations.values():
                self._poller.register(registration)
            core.servers.add(self)
            if start_serving:
                self._listen()
        except BaseException:
            self.close()
            raise

    @property
    def sockets(self) -> tuple[TransportSocket, ...]:
        """The listening sockets, read-only; empty after the server is closed."""
        return () if self._closed else tuple(TransportSocket(sock) for sock in self._sockets)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop that runs the server, on asyncio and uvloop.

        Raises `RuntimeError` on trio, which has no event loop: a portable program uses its group instead.
        """
        loop = self._poller.loop
        if loop is None:
            msg = "no event loop runs this server: use current_group() instead"
            raise RuntimeError(msg)
        return loop

    def is_serving(self) -> bool:
        """Return whether the server accepts connections."""
        return self._serving

    async def start_serving(self) -> None:
        """Accept connections from now on. Does nothing if the server already does.

        Raises:
        - `RuntimeError`: the server is closed
        - `OSError`: the system refuses to listen (another socket listens on the address, for example)
        """
        await self._require_open("start_serving")
        self._listen()
        await anyio.lowlevel.checkpoint()

    async def serve_forever(self) -> None:
        """Accept connections until this call is cancelled or the server is closed.

        A cancellation closes the server and its connections, and does not wait until they are lost.

        Raises:
        - `RuntimeError`: the server is closed, or another `serve_forever` runs
        - `OSError`: as for `start_serving`
        """
        if self._serving_forever:
            msg = f"server {self!r} is already being awaited on serve_forever()"
            raise RuntimeError(msg)
        await self._require_open("serve_forever")
        self._listen()
        self._serving_forever = True
        try:
            while not self._closed:
                await self._changed.wait()
        except BaseException:
            self.close()
            self.close_clients()
            raise
        finally:
            self._serving_forever = False

    def close(self) -> None:
        """Stop listening. Accepted connections stay open. Does nothing if the server is closed."""
        if self._closed:
            return
        log_debug(self._core.group, "%r: closing", self)
        self._addresses = self._names()
        self._closed = True
        self._serving = False
        if self._on_close is not None:
            self._on_close()
        for sock in self._sockets:
            self._poller.unregister(self._registrations[sock])
            sock.close()
        self._held.clear()
        for timer in self._retries.values():
            timer.cancel()
        self._retries.clear()
        self._core.servers.discard(self)
        self._changed.notify()

    def close_clients(self) -> None:
        """Close the transports of all accepted connections."""
        for pending in tuple(self._handshakes):
            pending.abort()
        for transport in tuple(self._connections):
            transport.close()

    def abort_clients(self) -> None:
        """Abort the transports of all accepted connections."""
        for pending in tuple(self._handshakes):
            pending.abort()
        for transport in tuple(self._connections):
            transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the server is closed and all accepted connections are lost."""
        await anyio.lowlevel.checkpoint()
        while not self._closed or self._connections or self._handshakes:
            await self._changed.wait()

    async def shutdown(self, timeout: float | None) -> None:
        """Close the server, let its connections end, and abort those that are left after `timeout` seconds.

        A protocol that has a method `shutdown_requested` is asked by it: it closes its transport at once or when it
        has finished what it is doing. The transport of any other protocol is closed, which sends what is buffered. TLS
        handshakes are aborted. With 0 seconds the connections are aborted at once; `None` is no limit.

        This returns when all connections are lost; if it is cancelled, they go on ending.

        Raises `ValueError` for a negative `timeout`.

        Source: https://pkg.go.dev/net/http#Server.Shutdown
        """
        timeout = check_shutdown_timeout(timeout)
        self.close()
        for pending in tuple(self._handshakes):
            pending.abort()
        for transport in tuple(self._connections):
            transport._request_shutdown()
        await wait_or_abort(timeout, self.wait_closed, self.abort_clients)

    def statistics(self) -> ServerStatistics:
        """Return how many connections are open and were accepted, and whether a limit holds up further ones.

        May be called from any thread.
        """
        return ServerStatistics(
            open_connections=len(self._connections),
            pending_handshakes=len(self._handshakes),
            accepted_connections=self._accepted,
            failed_handshakes=self._failed_handshakes,
            at_limit=self._is_full(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await self.wait_closed()

    async def _require_open(self, name: str) -> None:
        if self._closed:
            # While the group is being left, its tasks get their cancellation instead of this error.
            await anyio.lowlevel.checkpoint_if_cancelled()
            if not self._core.open:
                raise self._core.not_open(name)
            msg = f"server {self!r} is closed"
            raise RuntimeError(msg)

    def _listen(self) -> None:
        if self._serving:
            return
        for sock in self._sockets:
            try:
                sock.listen(self._backlog)
            except OSError as exc:
                raise address_error("error while attempting to listen on address", sock.getsockname(), exc) from None
        self._serving = True
        log_debug(self._core.group, "%r: listening", self)
        try:
            for sock in self._sockets:
                self._resume(sock)
        except OSError:  # The system cannot watch more file descriptors.
            self._serving = False
            for sock in self._sockets:
                self._pause(sock)
            raise

    def _resume(self, sock: socket.socket) -> None:
        registration = self._registrations[sock]
        if self._serving and not registration.interest:
            registration.read_ready = lambda: self._context.run(self._accept_ready, sock)
            self._poller.set_interest(registration, READ)

    def _pause(self, sock: socket.socket) -> None:
        if self._registrations[sock].interest:
            self._poller.set_interest(self._registrations[sock], 0)

    def _accept_ready(self, listener: socket.socket) -> None:
        """Accept up to `backlog + 1` connections (Linux queues one more), then let other callbacks run."""
        for _ in range(max(self._backlog, 0) + 1):
            if not self._serving:
                return  # A callback of the previous connection closed the server.
            if self._limited and self._is_full():
                self._pause(listener)
                self._held.add(listener)
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in CLIENT_LEFT:
                    continue
                self._accept_failed(listener, exc)
                return
            except BaseException as exc:  # No memory, for example.
                if self._core.leaves(exc):
                    raise
                self._accept_failed(listener, exc)
                return
            self._connect(sock, address)

    def _accept_failed(self, listener: socket.socket, exc: BaseException) -> None:
        # The listener stays readable, so the next iteration would fail again.
        self._pause(listener)
        if not isinstance(exc, OSError) or exc.errno in EXHAUSTED:
            why = "out of system resource" if isinstance(exc, (OSError, MemoryError)) else "failed"
            message = f"socket.accept() {why}: trying again in {RETRY_DELAY:g} s"
            self._retries[listener] = self._core.call_later(RETRY_DELAY, self._try_again, listener)
        else:
            message = "socket.accept() failed: this socket accepts no more connections"
        self._core.group.call_exception_handler(
            {"message": message, "exception": exc, "socket": TransportSocket(listener)}
        )

    def _is_full(self) -> bool:
        handshakes = len(self._handshakes)
        return handshakes >= self._max_handshakes or len(self._connections) + handshakes >= self._max_connections

    def _one_has_gone(self) -> None:
        """Accept again if a limit was reached: a connection or a handshake has ended."""
        self._changed.notify()
        if self._held and not self._is_full():
            held, self._held = self._held, set()
            for listener in held:
                self._try_again(listener)

    def _try_again(self, listener: socket.socket) -> None:
        try:
            self._resume(listener)
        except OSError as exc:
            self._accept_failed(listener, exc)

    def _connect(self, sock: socket.socket, peername: Any) -> None:
        try:
            log_debug(self._core.group, "%r: accepted %r", self, peername)
            sock.setblocking(False)
            if self._is_tcp:
                set_nodelay(sock)
            channel = SocketChannel(self._poller, sock, peername)
        except OSError as exc:  # The client has already closed the connection.
            logger.debug("an accepted connection was lost before its transport was made: %r", exc)
            sock.close()
            return
        except BaseException as exc:
            sock.close()
            if self._core.leaves(exc):
                raise
            self._report_lost_client(exc, peername)
            return
        self._accepted += 1
        if self._tls is None:
            self._begin(channel)
        else:
            self._shake_hands(channel, self._tls)

    def _shake_hands(self, inner: SocketChannel, tls: TLSOptions) -> None:
        try:
            channel = TLSChannel(inner, tls, self._core)
        except BaseException as exc:
            inner.close(aborted=True)
            if self._core.leaves(exc):
                raise
            self._report_lost_client(exc, peername_of(inner))
            return

        def done(pending: PendingHandshake, failure: Exception | None) -> None:
            if failure is None:
                self._context.copy().run(self._begin, channel)
            elif not pending.aborted:
                self._handshake_failed(failure, peername_of(inner))
            self._one_has_gone()

        self._core.handshake(channel, done, self._handshakes)

    def _begin(self, channel: StreamChannel) -> None:
        try:
            transport, _ = self._core.make_transport(StreamTransport, self._protocol_factory, channel, self._on_lost)
        except BaseException as exc:
            if self._core.leaves(exc):
                raise
            self._report_lost_client(exc, peername_of(channel))
            return
        self._connections.add(transport)
        try:
            transport._start()
        except OSError as exc:
            self._report_lost_client(exc, peername_of(channel))

    def _handshake_failed(self, exc: Exception, peername: Any) -> None:
        self._failed_handshakes += 1
        if is_clients_failure(exc):
            self._core.report_handshake(
                {"message": "TLS handshake failed", "exception": exc, "peername": peername, "handshake": True}
            )
        else:
            self._report_lost_client(exc, peername)

    def _report_lost_client(self, exc: BaseException, peername: Any) -> None:
        self._core.group.call_exception_handler(
            {
                "message": "Error on transport creation for incoming connection",
                "exception": exc,
                "peername": peername,  # There is no transport yet that has it.
            }
        )

    def _lost(self, transport: StreamTransport) -> None:
        self._connections.discard(transport)
        self._core.remove_resource(transport)
        self._one_has_gone()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "serving" if self._serving else "not serving"
        flow = describe_flow("connections", self._connections, self._handshakes)
        return f"<Server {state} on {self._names()} {flow}>"

    def _names(self) -> list[Any]:
        return self._addresses if self._closed else [name_or_none(sock.getsockname) for sock in self._sockets]
