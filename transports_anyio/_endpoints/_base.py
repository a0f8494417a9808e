"""What endpoint functions of several families do: guard their calls, take sockets over, shake hands."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from functools import wraps
from inspect import iscoroutinefunction, signature
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.lowlevel

from .._channels._socket import SocketChannel, is_tcp, set_nodelay
from .._channels._tls import TLSChannel
from .._channels._tls_engine import TLSOptions
from .._errors import safe_repr
from .._selector import Registration
from .._transports._stream import StreamTransport
from .._waiters import Outcome

if TYPE_CHECKING:
    from .._channels._abc import Channel
    from .._core import Core
    from .._resources import PendingHandshake

ProtocolT = TypeVar("ProtocolT")

#: The AnyIO objects that transports use, by their `id`: a user's own need not be hashable. Groups in several threads
#: share it, so it is only changed by methods of the set, which are atomic.
in_use: set[int] = set()


def check_factory(name: str, factory: object, start_task: str) -> None:
    """Raise `TypeError` for what can never be the protocol factory of the endpoint function `name`.

    The message says that `start_task` starts what has to wait.
    """
    if isinstance(factory, type):
        return  # The most frequent one, which need not be looked into.
    if iscoroutinefunction(factory):
        raise TypeError(
            f"{name}() takes a protocol factory that returns a protocol, got the coroutine function {factory!r}: use a "
            f"plain function, and start what has to wait from connection_made(), with {start_task}"
        )
    if callable(factory):
        return
    if hasattr(factory, "connection_made"):
        raise TypeError(
            f"{name}() takes a protocol factory, got the protocol {factory!r} itself, which is not callable: give its "
            "class, or `lambda: protocol` for one that is made already"
        )
    raise TypeError(
        f"{name}() takes a protocol factory, got {factory!r}, which is not callable: give a protocol class, or a "
        "function that returns a protocol"
    )


class Endpoints:
    """What the endpoint functions of every family need."""

    _core: Core

    #: How users call the functions of the family, for error messages.
    _called_as = "group.{}"
    #: What starts a task in a callback, for error messages.
    _start_task = "current_group().start_soon()"

    def __init_subclass__(cls) -> None:
        """Guard the endpoint functions of a family: all the public coroutine functions of its class."""
        super().__init_subclass__()
        if Endpoints in cls.__bases__:
            for name, function in tuple(vars(cls).items()):
                if not name.startswith("_") and iscoroutinefunction(function):
                    setattr(cls, name, cls._guarded(function))

    @classmethod
    def _guarded(cls, function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return the endpoint function with what can be said against a call before anything happens."""
        name = function.__name__
        called_as = cls._called_as.format(name)
        factories = [(at, each) for at, each in enumerate(signature(function).parameters) if "factory" in each]

        @wraps(function)
        async def call(self: Endpoints, *args: Any, **options: Any) -> Any:
            try:
                self._core.check_open(name, called_as)
                for at, parameter in factories:
                    if at <= len(args):
                        check_factory(name, args[at - 1], self._start_task)
                    elif parameter in options:
                        check_factory(name, options[parameter], self._start_task)
                return await function(self, *args, **options)
            except Exception:
                if not self._core.open:
                    # A task of the group may get here before its cancellation, which explains the error.
                    await anyio.lowlevel.checkpoint_if_cancelled()
                raise

        return call

    def _run_for(
        self,
        resource: object,
        run: Callable[[Callable[[Exception], None]], Coroutine[Any, Any, None]],
        name: str | None = None,
    ) -> None:
        """Start the task of a channel or child over an AnyIO object, which may be the user's own and fail to close."""
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
        """Raise `RuntimeError` for an AnyIO object that a transport uses, of whichever group."""
        for resource in resources:
            if id(resource) in in_use:
                raise RuntimeError(f"{safe_repr(resource)} is used already, by another transport")

    async def _connect_socket(
        self, protocol_factory: Callable[[], ProtocolT], sock: socket.socket, tls: TLSOptions | None = None
    ) -> tuple[StreamTransport, ProtocolT]:
        """Give a connected, non-blocking socket a protocol and a transport, after the handshake with `tls`.

        The socket is the group's from here on: whatever goes wrong closes it.
        """
        try:
            poller = self._core.check_open()
            if is_tcp(sock):
                set_nodelay(sock)
            channel: Channel = SocketChannel(poller, sock)
        except BaseException:
            sock.close()
            raise
        if tls is not None:
            try:
                encrypted = TLSChannel(channel, tls, self._core)
            except BaseException:  # OpenSSL does not like the name of the server, for example.
                channel.close(aborted=True)
                raise
            await self._shake_hands(encrypted)
            channel = encrypted
        transport, protocol = self._core.make_transport(StreamTransport, protocol_factory, channel)
        transport.start()
        return transport, protocol

    async def _take_over(self, sock: socket.socket) -> None:
        """Make a socket that somebody else has made non-blocking. It is the group's from here on.

        Raises `RuntimeError` for one that is the group's already, which is left alone.
        """
        poller = self._core.check_open()
        user = poller.owner(sock.fileno())
        if user is not None:
            raise RuntimeError(f"{sock!r} is used already, by another transport or server of the group: {user!r}")
        meanwhile = Registration(sock.fileno())
        poller.register(meanwhile)  # Another task may try the same.
        try:
            sock.setblocking(False)
            await anyio.lowlevel.checkpoint()
        except BaseException:
            sock.close()
            raise
        finally:
            poller.unregister(meanwhile)

    async def _shake_hands(self, channel: TLSChannel) -> None:
        """Wait for the handshake of `channel`, which is closed when that fails or is cancelled.

        Raises `ssl.SSLError` when the ends do not agree, `ConnectionResetError` when the peer leaves,
        `ConnectionAbortedError` when it takes too long, and `RuntimeError` when the group ends.
        """
        core = self._core
        outcome = Outcome()

        def done(pending: PendingHandshake, exc: Exception | None) -> None:
            outcome.set(core.not_open() if pending.aborted and not core.open else exc)

        try:
            core.handshake(channel, done)
            await outcome.wait()
            core.check_open()  # The group may have ended before this task runs again.
        except BaseException:
            channel.close(aborted=True)
            raise
