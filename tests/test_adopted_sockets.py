"""Sockets that were made elsewhere: `connect_accepted_socket`, inetd, systemd, a parent process, another process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest
from network import HOST, HOST_6, Echo, bound, needs_ipv6, unused_port
from support import GUARD, Peer, Recorder, Stack, open_descriptors, until

pytestmark = pytest.mark.anyio

SERVER = Path(__file__).with_name("adopting.py")


# -- connections that were accepted elsewhere -------------------------------------------------------------------------


@pytest.mark.differs(
    "`TCP_NODELAY` on an adopted TCP socket that was made without naming its protocol",
    asyncio="not set",
    here="set",
    why="it is a TCP socket too",
)
@pytest.mark.parametrize("family", [socket.AF_INET, pytest.param(socket.AF_INET6, marks=needs_ipv6), socket.AF_UNIX])
async def test_sockets_accepted_by_a_blocking_server(stack: Stack, family: int) -> None:
    async with stack.open() as group:
        with socket.socket(family) as listener, socket.socket(family) as client:
            listener.bind(
                {socket.AF_INET: (HOST, 0), socket.AF_INET6: (HOST_6, 0)}.get(family, f"\0adopted {id(stack)}")  # type: ignore[call-overload]
            )
            listener.listen()
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            transport, protocol = await group.connect_accepted_socket(Echo, accepted)
            assert accepted.gettimeout() == 0
            assert protocol.transport is transport
            assert transport.get_extra_info("peername") == client.getsockname()
            assert transport.get_extra_info("sockname") == listener.getsockname()
            if family != socket.AF_UNIX:
                nodelay = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert bool(nodelay) or (stack.is_oracle and accepted.proto == 0)
            with Peer(client) as peer:
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
            await protocol.wait_for("connection_lost")
            await until(lambda: accepted.fileno() == -1)


async def test_addresses_stay_known_after_the_peer_has_gone(stack: Stack) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            peer = Peer.connect(listener.getsockname())
            name = peer.socket.getsockname()
            accepted, _ = listener.accept()
            transport, protocol = await group.connect_accepted_socket(Recorder, accepted)
            peer.reset()
            await protocol.wait_for("connection_lost")
            assert isinstance(protocol.exception, ConnectionResetError)
            assert transport.get_extra_info("peername") == name
            assert transport.get_extra_info("sockname") == listener.getsockname()


async def test_sockets_that_cannot_be_adopted(stack: Stack) -> None:
    context = ssl.create_default_context()
    async with stack.open() as group:
        with socket.socket(type=socket.SOCK_DGRAM) as datagram:
            with pytest.raises(ValueError, match="A Stream Socket was expected, got <socket"):
                await group.connect_accepted_socket(Recorder, datagram)
        with context.wrap_socket(socket.socket(), server_hostname="localhost") as tls:
            with pytest.raises(TypeError, match="SSLSocket"):
                await group.connect_accepted_socket(Recorder, tls)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with pytest.raises(ValueError, match="only meaningful with ssl"):
                await group.connect_accepted_socket(Recorder, ours, ssl_handshake_timeout=1)
            if not stack.is_oracle or sys.version_info >= (3, 11):
                with pytest.raises(ValueError, match="only meaningful with ssl"):
                    await group.connect_accepted_socket(Recorder, ours, ssl_shutdown_timeout=1)
            assert ours.fileno() != -1


@pytest.mark.differs(
    "`ssl=True` for `connect_accepted_socket`",
    asyncio="`ValueError`, but a transport was already made",
    here="`ValueError` before any transport is made",
    why="nothing leaks",
)
@pytest.mark.ours_only
async def test_tls_needs_a_certificate(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        with ours, theirs, pytest.raises(ValueError, match="SSLContext"):
            await group.connect_accepted_socket(Recorder, ours, ssl=True)


async def test_ssl_none_and_false_mean_no_tls(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        _, protocol = await group.connect_accepted_socket(Recorder, ours, ssl=False)
        theirs.close()
        await protocol.wait_for("connection_lost")


@pytest.mark.ours_only("asyncio leaves the socket open")
async def test_the_socket_is_closed_whatever_happens(stack: Stack) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        ours, theirs = socket.socketpair()
        with theirs, pytest.raises(ZeroDivisionError):
            await group.connect_accepted_socket(fail, ours)
        assert ours.fileno() == -1
        ours, theirs = socket.socketpair()
        with theirs, anyio.CancelScope() as scope:
            scope.cancel()
            await group.connect_accepted_socket(Recorder, ours)
        assert ours.fileno() == -1


@pytest.mark.ours_only("asyncio has no group")
async def test_a_closed_group_refuses_a_socket(stack: Stack) -> None:
    async with stack.open() as group:
        pass
    ours, theirs = socket.socketpair()
    with theirs, ours:
        with pytest.raises(RuntimeError, match="not open"):
            await group.connect_accepted_socket(Recorder, ours)
        assert ours.fileno() != -1


# -- one owner for each descriptor ------------------------------------------------------------------------------------


@pytest.mark.differs(
    "adopting a socket that another transport uses",
    asyncio="since 3.14 the socket is closed, although the transport uses it",
    here="left to its transport",
    why="its owner does not know of the call",
)
@pytest.mark.parametrize("paused", [False, True], ids=["reading", "paused"])
@pytest.mark.parametrize("again", ["create_connection", "create_unix_connection", "connect_accepted_socket"])
async def test_a_socket_in_use_by_another_transport(stack: Stack, again: str, paused: bool) -> None:
    """Two transports would take each other's bytes, and wait for each other's end. The first one is not affected."""
    stack.only_python_before(3, 14, why="it closes the socket under its first owner")
    ours, theirs = socket.socketpair()
    other = Recorder()
    async with stack.open() as group:
        transport, protocol = await group.create_connection(Recorder, sock=ours)
        if paused:
            transport.pause_reading()
        with pytest.raises(RuntimeError, match=r"is (already in use|used) by"):
            await getattr(group, again)(lambda: other, sock=ours)
        assert other.calls == []
        assert ours.fileno() != -1
        with Peer(theirs) as peer:
            await peer.send(b"hello")
            if paused:
                assert protocol.received == b""
                transport.resume_reading()
            assert await protocol.wait_received(5) == b"hello"
            transport.write(b"answer")
            assert await peer.receive_exactly(6) == b"answer"
            transport.close()
            assert await peer.receive() == b""
        await protocol.wait_for("connection_lost")
        assert protocol.exception is None


@pytest.mark.differs(
    "a socket that two calls adopt at the same time",
    asyncio="two transports, one of which never receives anything",
    here="`RuntimeError` from the second call",
    why="a socket has one owner",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("again", ["create_connection", "create_unix_connection", "connect_accepted_socket"])
async def test_one_socket_adopted_by_two_calls_at_once(stack: Stack, again: str) -> None:
    ours, theirs = socket.socketpair()
    made: list[Any] = []
    refused: list[RuntimeError] = []

    async def adopt(name: str) -> None:
        try:
            made.append(await getattr(group, name)(Recorder, sock=ours))
        except RuntimeError as exc:
            refused.append(exc)

    with Peer(theirs) as peer:
        async with stack.open() as group:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(adopt, "create_connection")
                tasks.start_soon(adopt, again)
            ((transport, protocol),) = made
            assert len(refused) == 1
            await peer.send(b"hello")
            assert await protocol.wait_received(5) == b"hello"
            transport.write(b"answer")
            assert await peer.receive_exactly(6) == b"answer"
            transport.close()


@pytest.mark.differs(
    "a socket that is closed without its transport, when a new connection gets its number",
    asyncio="`RuntimeError` for the new connection",
    here="the new connection works; only adopting a socket with that number is refused",
    why="the new connection did nothing wrong",
)
@pytest.mark.parametrize("end", ["close", "abort", "write", "nothing"])
@pytest.mark.ours_only
async def test_a_reused_fd_after_the_owner_closed_the_socket(stack: Stack, end: str) -> None:
    """A transport whose socket was closed by its maker fails when it is used; a connection that got its fd is not
    affected."""
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            ours, theirs = socket.socketpair()
            with theirs:
                first, closed = await group.create_connection(Recorder, sock=ours)
                number = ours.fileno()
                ours.close()
                second, protocol = await group.create_connection(Recorder, *listener.getsockname())
                assert second.get_extra_info("socket").fileno() == number
                if end != "nothing":
                    getattr(first, end)(*[b"x"] * (end == "write"))
                    await closed.wait_for("connection_lost")
                    assert isinstance(closed.exception, OSError) is (end == "write")
                with Peer(listener.accept()[0]) as peer:
                    await peer.send(b"hello")
                    assert await protocol.wait_received(5) == b"hello"
                    second.write(b"answer")
                    assert await peer.receive_exactly(6) == b"answer"
                    second.close()
                    assert await peer.receive() == b""
                await protocol.wait_for("connection_lost")
                assert protocol.exception is None
                assert number not in open_descriptors()


@pytest.mark.differs("adopting a socket that another transport uses")
async def test_an_fd_still_in_use_by_another_transport(stack: Stack) -> None:
    """The transport cannot know that its socket was closed, so it must be ended first."""
    stack.only_python_before(3, 14, why="it closes the new socket")
    ours, theirs = socket.socketpair()
    with theirs:
        async with stack.open() as group:
            transport, protocol = await group.create_connection(Recorder, sock=ours)
            number = ours.fileno()
            ours.close()
            mine, yours = socket.socketpair()
            assert mine.fileno() == number
            with pytest.raises(RuntimeError, match=r"is (already in use|used) by"):
                await group.create_connection(Recorder, sock=mine)
            assert mine.fileno() == number
            transport.close()
            await protocol.wait_for("connection_lost")
            _, other = await group.create_connection(Echo, sock=mine)
            with Peer(yours) as peer:
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
            await other.wait_for("connection_lost")


# -- handed over to a process -----------------------------------------------------------------------------------------


@asynccontextmanager
async def child(stack: Stack, *arguments: object, command: tuple[str, ...] = (), **options: Any) -> AsyncIterator[Any]:
    """A process that serves the sockets it gets, with a group on the backend of the test."""
    backend = stack.name
    program = [*command, sys.executable, str(SERVER), backend, *map(str, arguments)]
    process = await anyio.open_process(program, stderr=None, **options)
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            await process.aclose()


async def finished(process: anyio.abc.Process) -> int:
    with anyio.fail_after(2 * GUARD):
        return await process.wait()


@pytest.mark.ours_only("the other process uses a group")
async def test_inetd_hands_over_the_connection_as_standard_input(stack: Stack) -> None:
    """With `wait` set to "no": one process for each connection, which is its descriptor 0."""
    with bound(backlog=1) as listener:
        with Peer.connect(listener.getsockname()) as peer:
            accepted, _ = listener.accept()
            async with child(stack, "inetd", stdin=accepted.fileno()) as process:
                accepted.close()
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
                peer.shutdown()
                assert await peer.receive() == b""
                assert await finished(process) == 0


@pytest.mark.ours_only("the other process uses a group")
async def test_a_parent_hands_over_its_listener(stack: Stack) -> None:
    with bound(backlog=5) as listener:
        async with child(stack, "listener", listener.fileno(), pass_fds=[listener.fileno()]) as process:
            name = listener.getsockname()
            listener.close()  # The child's copy lives on.
            for _ in range(3):
                with Peer.connect(name) as peer:
                    await peer.send(b"hello")
                    assert await peer.receive_exactly(5) == b"hello"
            process.send_signal(signal.SIGTERM)
            assert await finished(process) == -signal.SIGTERM


@pytest.mark.ours_only("the other process uses a group")
async def test_another_process_sends_a_connection_over_a_unix_socket(stack: Stack) -> None:
    """SCM_RIGHTS: see unix(7)."""
    ours, theirs = socket.socketpair()
    with ours, bound(backlog=1) as listener:
        async with child(stack, "received", theirs.fileno(), pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            with Peer.connect(listener.getsockname()) as peer:
                accepted, _ = listener.accept()
                socket.send_fds(ours, [b"x"], [accepted.fileno()])
                accepted.close()
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
                peer.shutdown()
                assert await peer.receive() == b""
                assert await finished(process) == 0


@pytest.mark.ours_only("the other process uses a group")
@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="there is no systemd")
@pytest.mark.parametrize("accept", [False, True], ids=["listener", "connection"])
async def test_systemd_hands_over_a_socket(stack: Stack, accept: bool) -> None:
    """`LISTEN_FDS` descriptors from 3 on: see sd_listen_fds(3)."""
    port = unused_port()
    # It passes on only the variables that it is given.
    packages = os.pathsep.join(filter(None, sys.path))
    command = ["systemd-socket-activate", f"--listen={HOST}:{port}", "-E", f"PYTHONPATH={packages}"]
    if accept:
        command += ["--inetd", "--accept"]
    arguments = ("inetd",) if accept else ("systemd",)
    async with child(stack, *arguments, command=tuple(command), stdin=subprocess.DEVNULL) as process:
        with anyio.fail_after(2 * GUARD):
            while True:  # Until systemd listens.
                try:
                    peer = Peer.connect((HOST, port))
                    break
                except ConnectionRefusedError:
                    await anyio.sleep(0.01)
        with peer:
            await peer.send(b"hello")
            assert await peer.receive_exactly(5) == b"hello"
            peer.shutdown()
            assert await peer.receive() == b""
        process.terminate()
        await finished(process)
