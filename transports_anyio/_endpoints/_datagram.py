"""Datagrams: `create_datagram_endpoint` and `connect_datagram_socket`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio.lowlevel

from .._channels._anyio_datagram import AnyDatagramSocket, AnyIODatagramChannel
from .._channels._datagram import DatagramSocketChannel
from .._sockets import bind, connect, set_option
from .._transports._datagram import DatagramTransport
from ._addresses import resolve
from ._base import Endpoints, ProtocolT

#: Family and protocol of a socket, and its local and remote address.
AddressPair = tuple[int, int, Any, Any]


class DatagramEndpoints(Endpoints):
    """`create_datagram_endpoint` and `connect_datagram_socket`."""

    async def create_datagram_endpoint(
        self,
        protocol_factory: Callable[[], ProtocolT],
        local_addr: tuple[str, int] | str | None = None,
        remote_addr: tuple[str, int] | str | None = None,
        *,
        family: int = 0,
        proto: int = 0,
        flags: int = 0,
        reuse_port: bool | None = None,
        allow_broadcast: bool | None = None,
        sock: socket.socket | None = None,
    ) -> tuple[asyncio.DatagramTransport, ProtocolT]:
        """Make a datagram endpoint and return `(transport, protocol)`.

        `local_addr` is bound, `remote_addr` connected to (with `allow_broadcast` only sent to): a host and a port, or
        with the family `AF_UNIX` a path, an abstract one (behind a NUL) included. Without either, a `family` is needed.
        Every address that the names have is tried; `family`, `proto` and `flags` are the resolver's
        (`socket.getaddrinfo`). `reuse_port` lets several sockets, also of other processes, share the local port.

        `sock` is a socket that was made elsewhere, and that exchanges datagrams: of type `SOCK_DGRAM`, `SOCK_RAW` or
        `SOCK_RDM`, of any family. It belongs to the group from now on, which closes it whatever happens. If it is
        connected, its peer is the remote address; a netlink socket has none. The transport empties its error queue
        (`IP_RECVERR`). `connection_made` runs before this returns.

        A datagram of more than 256 KiB is dropped, and `error_received` gets an `OSError` with `EMSGSIZE`.

        Raises `RuntimeError` when the group is not open; `ValueError` for a `sock` that is no datagram socket, for one
        together with parameters of a new one, for addresses that do not go together and for `reuse_port` where the
        platform has none; `TypeError` for an address that is none; `OSError` when no address works, and then leaves
        nothing open; and whatever `protocol_factory` raises.

        Source: https://docs.python.org/3/library/asyncio-eventloop.html#asyncio.loop.create_datagram_endpoint
        """
        remote: Any = None
        if sock is None:
            pairs = await address_pairs(local_addr, remote_addr, family, proto, flags)
            self._core.check_open()  # Before anything is replaced.
            sock, remote = await first_that_works(pairs, bool(reuse_port), bool(allow_broadcast))
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
            await self._take_over(sock)
        try:
            channel = DatagramSocketChannel(self._core.check_open(), sock, self._core.call_later)
        except BaseException:
            sock.close()
            raise
        # With `allow_broadcast` the remote address is only sent to; a socket that came from elsewhere may be connected.
        make = partial(DatagramTransport, address=remote or channel.remote_address)
        transport, protocol = self._core.make_transport(make, protocol_factory, channel)
        transport.start()
        return transport, protocol

    async def connect_datagram_socket(
        self, protocol_factory: Callable[[], ProtocolT], datagram_socket: AnyDatagramSocket
    ) -> tuple[asyncio.DatagramTransport, ProtocolT]:
        """Give one of AnyIO's datagram sockets a protocol and return `(transport, protocol)`.

        `datagram_socket` is a `UDPSocket`, `ConnectedUDPSocket`, `UNIXDatagramSocket` or `ConnectedUNIXDatagramSocket`;
        the transport owns it from now on and closes it. Addresses are AnyIO's: an IPv6 one has host and port only, its
        scope behind the host. On asyncio AnyIO keeps to itself what goes wrong with a UDP datagram (the peer refuses
        it, or it is too large); on trio, and for UNIX sockets, `error_received` is told. A socket that is closed
        already is no error of the call: `connection_lost` gets a `ConnectionAbortedError`.

        AnyIO receives 64 KiB of a datagram. One that fills them, which only UNIX sockets have, may be longer: it is
        dropped, and `error_received` gets an `OSError` with `EMSGSIZE`.

        Raises `RuntimeError` when the group is not open and when another transport uses the socket, `TypeError` for
        anything else than such a socket, and whatever `protocol_factory` raises; the socket is then left to the caller.

        Source: https://anyio.readthedocs.io/en/stable/networking.html
        """
        await anyio.lowlevel.checkpoint()
        self._core.check_open()
        self._require_unused(datagram_socket)
        channel = AnyIODatagramChannel(datagram_socket, self._core.time)
        make = partial(DatagramTransport, address=channel.remote_address)
        transport, protocol = self._core.make_transport(make, protocol_factory, channel)
        self._run_for(datagram_socket, channel.run)
        transport.start()
        return transport, protocol


def check_datagram_socket(sock: socket.socket, **others: Any) -> None:
    """Raise asyncio's `ValueError` for a socket that is no datagram socket, or comes with what is for a new one."""
    # A `SOCK_SEQPACKET` has connections, whose end would be received as an empty datagram again and again.
    if sock.type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        raise ValueError(f"A datagram socket was expected, got {sock!r}")
    problems = ", ".join(f"{name}={value}" for name, value in others.items() if value)
    if problems:
        raise ValueError(f"socket modifier keyword arguments can not be used when sock is specified. ({problems})")


async def address_pairs(local: Any, remote: Any, family: int, proto: int, flags: int) -> list[AddressPair]:
    """Return every pair of addresses that `local` and `remote` make together, in the resolver's order."""
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
    await anyio.lowlevel.checkpoint()  # Numbers need no other.
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
    pairs: list[AddressPair], reuse_port: bool, allow_broadcast: bool
) -> tuple[socket.socket, Any]:
    """Return a non-blocking socket with the first pair of addresses that can be had, and its remote address."""
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
                await connect(sock, remote)
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
        errors.clear()  # Their tracebacks have this frame: no cycle.
