"""Datagram endpoints: arguments of `create_datagram_endpoint`, and calls that fail."""

from __future__ import annotations

import errno
import gc
import socket
from contextlib import suppress
from typing import Any

import pytest
from datagram_helpers import Endpoint, Endpoints, udp_peer
from network import AF_UNIX, needs_reuse_port, needs_unix
from support import HOST, Stack, open_descriptors

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"local_addr": "localhost"}, TypeError),
        ({"local_addr": ("localhost", 0, 0)}, TypeError),
        ({"remote_addr": "nowhere"}, TypeError),
        ({"local_addr": (HOST, 0), "remote_addr": ("::1", 9)}, ValueError),
        pytest.param({"family": AF_UNIX, "local_addr": (HOST, 0)}, TypeError, marks=needs_unix),
        ({"local_addr": ("192.0.2.1", 0)}, OSError),
        ({"local_addr": ("no such host.invalid", 0)}, socket.gaierror),
        pytest.param({"family": AF_UNIX, "remote_addr": "/nonexistent/socket"}, FileNotFoundError, marks=needs_unix),
    ],
)
async def test_invalid_arguments(stack: Stack, options: Any, error: type[Exception]) -> None:
    async with stack.open() as group:
        with pytest.raises(error):
            await group.create_datagram_endpoint(Endpoint, **options)


@pytest.mark.differs(
    "errors of `bind` and `connect` for datagrams",
    asyncio="do not name the address",
    here="name the address",
    why="as for TCP",
)
@pytest.mark.ours_only
async def test_errors_name_the_address(stack: Stack) -> None:
    async with stack.open() as group:
        with udp_peer() as taken:
            name = taken.getsockname()
            with pytest.raises(OSError, match=rf"bind on address \('127\.0\.0\.1', {name[1]}\)") as caught:
                await group.create_datagram_endpoint(Endpoint, local_addr=name)
            assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(PermissionError, match=r"Connect call failed \('127\.255\.255\.255', 9\)"):
            await group.create_datagram_endpoint(Endpoint, remote_addr=("127.255.255.255", 9))


@pytest.mark.ours_only("asyncio's errors are freed by the garbage collector only")
async def test_errors_leave_no_reference_cycle(stack: Stack) -> None:
    def errors() -> int:
        return sum(issubclass(type(thing), OSError) for thing in gc.get_objects())

    async with stack.open() as group:
        with udp_peer() as taken:
            gc.collect()
            gc.disable()
            try:
                before = errors()
                with suppress(OSError):
                    await group.create_datagram_endpoint(Endpoint, local_addr=taken.getsockname())
                assert errors() == before
            finally:
                gc.enable()


@needs_unix
@pytest.mark.differs(
    "an adopted socket of type `SOCK_SEQPACKET`",
    asyncio="accepted; its end is received as an empty datagram, in every iteration",
    here="`ValueError`, as for a stream socket",
    why="it is a connection",
)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
async def test_an_adopted_socket_of_the_wrong_kind(stack: Stack, kind: int) -> None:
    if stack.is_oracle and kind == socket.SOCK_SEQPACKET:
        pytest.skip("asyncio takes it, and its end for an empty datagram, in every turn")
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    async with stack.open() as group:
        with ours, theirs, pytest.raises(ValueError, match="A datagram socket was expected, got <socket"):
            await group.create_datagram_endpoint(Endpoint, sock=ours)


@pytest.mark.parametrize(
    "option", ["local_addr", "remote_addr", "family", "proto", "flags", "reuse_port", "allow_broadcast"]
)
async def test_sock_excludes_other_parameters(stack: Stack, option: str) -> None:
    async with stack.open() as group:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            with pytest.raises(ValueError, match=option):
                await group.create_datagram_endpoint(Endpoint, sock=sock, **{option: 1})


@pytest.mark.differs(
    "an adopted datagram socket, when the factory raises or the call is cancelled",
    asyncio="left open",
    here="closed",
    why="nothing leaks",
)
async def test_a_factory_that_raises_leaves_nothing_open(stack: Stack) -> None:
    def factory() -> Any:
        raise LookupError

    if stack.is_oracle:
        pytest.skip("asyncio leaves the socket open")
    async with stack.open() as group:
        with pytest.raises(LookupError):
            await group.create_datagram_endpoint(factory, local_addr=(HOST, 0))


@needs_reuse_port
async def test_reuse_port_lets_endpoints_share_a_port(stack: Stack) -> None:
    async with stack.open() as group, Endpoints(group) as endpoints:
        first, _ = await endpoints.make(local_addr=(HOST, 0), reuse_port=True)
        address = first.get_extra_info("sockname")
        second, _ = await endpoints.make(local_addr=address, reuse_port=True)
        assert second.get_extra_info("sockname") == address
        with pytest.raises(OSError, match="in use"):
            await group.create_datagram_endpoint(Endpoint, local_addr=address)


async def test_reuse_port_on_a_system_without_it(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack.open() as group:
        monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
        before = open_descriptors()
        with pytest.raises(ValueError, match="not supported"):
            await group.create_datagram_endpoint(Endpoint, local_addr=(HOST, 0), reuse_port=True)
        if not stack.is_oracle:
            assert open_descriptors() == before
