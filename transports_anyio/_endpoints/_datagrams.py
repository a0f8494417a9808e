"""Datagrams: `create_datagram_endpoint` and `connect_datagram_socket`.

Holds: the endpoint functions, and the choice of addresses.
May know: `_addresses`, `_base`, `_channels`, `_poller`, `_sockets`, `_transports`, `_types`, `abc`, `anyio`, `socket`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio.lowlevel

from .. import abc
from .._channels._anyio_datagram import AnyDatagramSocket, AnyIODatagramChannel
from .._channels._datagram import DatagramSocketChannel
from .._poller import Poller
from .._sockets import bind, connect, set_option
from .._transports._datagram import DatagramTransport
from .._types import DatagramProtocolT
from ._addresses import resolve
from ._base import CancellationFirst, Endpoints, check_open

#: Family and protocol of a socket, and its local and remote address.
AddressPair = tuple[int, int, Any, Any]


class DatagramEndpoints(Endpoints):
    """`create_datagram_endpoint` and `connect_datagram_socket`."""

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], DatagramProtocolT],
        local_addr: tuple[str, int] | str | None = None,
        remote_addr: tuple[str, int] | str | None = None,
        *,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        reuse_port: bool | None = None,
        allow_broadcast: bool | None = None,
        sock: socket.socket | None = None,
    ) -> tuple[abc.DatagramTransport, DatagramProtocolT]:
        """Make a datagram endpoint and return `(transport, protocol)`.

        `connection_made` runs before this returns. A datagram of more than 256 KiB is dropped, and `error_received`
        gets an `OSError` with `EMSGSIZE`.

        - `protocol_factory`: makes the protocol
        - `local_addr`: the address to bind. A `(host, port)` tuple; with the family `AF_UNIX`, the path of a file, or
          an abstract name, which begins with a NUL character. All addresses of a host are tried until one works.
        - `remote_addr`: the address to connect to, of the same form. With `allow_broadcast` the socket is not
          connected, and only sends there.
        - `family`, `proto`, `flags`: passed to the resolver, `socket.getaddrinfo`. A `family` is required without
          `local_addr` and `remote_addr`.
        - `reuse_port`: allow other sockets, also those of other processes, to bind to the same local port
        - `allow_broadcast`: allow to send to broadcast addresses
        - `sock`: a socket of type `SOCK_DGRAM`, `SOCK_RAW` or `SOCK_RDM` and of any family, used instead of the other
          parameters. If it is connected, its peer is the remote address (not for netlink sockets). The group owns the
          socket from now on, and closes it on every error. The transport empties its error queue (`IP_RECVERR`).

        Raises, and leaves no socket open:

        - `RuntimeError`: the group is not open
        - `ValueError`: `sock` is not a datagram socket or comes with other parameters, the addresses have no family in
          common, or the platform has no `reuse_port`
        - `TypeError`: an address has the wrong type
        - `OSError`: no address works
        - whatever `protocol_factory` raises

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_datagram_endpoint
        """
        await check_open(self._core, "create_datagram_endpoint", protocol_factory)
        remote: Any = None
        if sock is None:
            async with CancellationFirst(self._core):
                pairs = await address_pairs(local_addr, remote_addr, family, proto, flags)
            poller = await check_open(self._core)  # Before a socket file is replaced.
            sock, remote = await first_that_works(poller, pairs, bool(reuse_port), bool(allow_broadcast))
        else:
            check_datagram_socket(
                sock,
                local_addr=local_addr,
                remote_addr=remote_addr,
                family=family,
                proto=proto,
                flags=flags,
                reuse_port=reuse_port,
                allow_broadcast=allow_broadcast,
            )
            await self._adopt(sock)
        try:
            channel = DatagramSocketChannel(await check_open(self._core), sock, self._core.call_later)
        except BaseException:
            sock.close()
            raise
        # With `allow_broadcast` the remote address is only sent to. A socket of the user's may be connected.
        make = partial(DatagramTransport, address=remote or channel.remote_address)
        transport, protocol = self._core.make_transport(make, protocol_factory, channel)
        transport._start()
        return transport, protocol

    async def connect_datagram_socket(
        self, protocol_factory: Callable[[], DatagramProtocolT], datagram_socket: AnyDatagramSocket
    ) -> tuple[abc.DatagramTransport, DatagramProtocolT]:
        """Make a protocol for one of AnyIO's datagram sockets and return `(transport, protocol)`.

        `connection_made` runs before this returns. A socket that is already closed is accepted: `connection_lost` gets
        a `ConnectionAbortedError`.

        Addresses have AnyIO's form: an IPv6 address is a host and a port, and its scope id is part of the host. On
        asyncio AnyIO does not report the error of a UDP datagram (the peer refuses it, or it is too large); on trio,
        and for UNIX sockets, `error_received` gets it. AnyIO receives at most 64 KiB of a datagram. Only UNIX sockets
        have longer ones: a datagram of that size or more is dropped, and `error_received` gets an `OSError` with
        `EMSGSIZE`.

        - `protocol_factory`: makes the protocol
        - `datagram_socket`: a `UDPSocket`, `ConnectedUDPSocket`, `UNIXDatagramSocket` or `ConnectedUNIXDatagramSocket`.
          The transport owns it from now on and closes it.

        Raises, and leaves the socket to the caller:

        - `RuntimeError`: the group is not open, or another transport uses the socket
        - `TypeError`: `datagram_socket` is not one of these sockets
        - whatever `protocol_factory` raises

        Source: https://anyio.readthedocs.io/en/stable/networking.html
        """
        await check_open(self._core, "connect_datagram_socket", protocol_factory)
        await anyio.lowlevel.checkpoint()
        await check_open(self._core)
        self._require_unused(datagram_socket)
        channel = AnyIODatagramChannel(datagram_socket, self._core)
        make = partial(DatagramTransport, address=channel.remote_address)
        transport, protocol = self._core.make_transport(make, protocol_factory, channel)
        self._run_for(datagram_socket, channel.run)
        transport._start()
        return transport, protocol


def check_datagram_socket(sock: socket.socket, **others: Any) -> None:
    """Raise asyncio's `ValueError` for a socket that is not a datagram socket, or comes with other parameters."""
    # The end of a `SOCK_SEQPACKET` connection would be received as an empty datagram again and again.
    if sock.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        raise ValueError(f"A datagram socket was expected, got {sock!r}")
    problems = ", ".join(f"{name}={value}" for name, value in others.items() if value)
    if problems:
        raise ValueError(f"socket modifier keyword arguments can not be used when sock is specified. ({problems})")


async def address_pairs(local: Any, remote: Any, family: int, proto: int, flags: int) -> list[AddressPair]:
    """Return all pairs of a local and a remote address, in the resolver's order."""
    if not (local or remote):
        if family == 0:
            raise ValueError("unexpected address family: give local_addr, remote_addr, a family or a sock")
        await anyio.lowlevel.checkpoint()
        return [(family, proto, None, None)]
    if hasattr(socket, "AF_UNIX") and family == socket.AF_UNIX:
        for address in (local, remote):
            if address is not None and not isinstance(address, str):
                raise TypeError(f"string is expected, the path of a UNIX socket, got {address!r}")
        await anyio.lowlevel.checkpoint()
        return [(family, proto, local, remote)]
    found: list[list[tuple[int, int, Any]]] = []
    await anyio.lowlevel.checkpoint()  # Numeric addresses have no other checkpoint.
    for address in (local, remote):
        if address is None:
            continue
        if not (isinstance(address, tuple) and len(address) == 2):
            raise TypeError(f"2-tuple is expected, of host and port, got {address!r}")
        infos = await resolve(*address, family=family, kind=socket.SOCK_DGRAM, proto=proto, flags=flags)
        found.append([(f, p, a) for f, _, p, a in infos])
    if remote is None:
        return [(f, p, a, None) for f, p, a in found[0]]
    if local is None:
        return [(f, p, None, a) for f, p, a in found[0]]
    pairs = [(f, p, here, there) for f, p, here in found[0] for *kind, there in found[1] if kind == [f, p]]
    if not pairs:
        raise ValueError(
            f"can not get address information: {local!r} and {remote!r} have no family of addresses in common"
        )
    return pairs


async def first_that_works(
    poller: Poller, pairs: list[AddressPair], reuse_port: bool, allow_broadcast: bool
) -> tuple[socket.socket, Any]:
    """Return a non-blocking socket with the first pair of addresses that works, and its remote address."""
    errors: list[OSError] = []
    for family, proto, local, remote in pairs:
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM, proto)
        except OSError as exc:
            errors.append(exc)
            continue
        try:
            sock.setblocking(False)
            if reuse_port:
                set_option(sock, "SO_REUSEPORT")
            if allow_broadcast:
                set_option(sock, "SO_BROADCAST")
            if local:
                bind(sock, local)
            if remote and not allow_broadcast:
                await connect(poller, sock, remote)
        except OSError as exc:
            sock.close()
            errors.append(exc)
        except BaseException:
            sock.close()
            raise
        else:
            return sock, remote or None
    try:
        raise errors[0]
    finally:
        errors.clear()  # Break the cycles: their tracebacks refer to this frame.
