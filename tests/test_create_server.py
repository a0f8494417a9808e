"""`create_server` and `Server`: addresses, options, accepting, ending, and other programs as clients."""

from __future__ import annotations

import contextvars
import errno
import http.client
import itertools
import os
import shutil
import socket
import ssl
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest
from network import (
    HOST,
    HOST_6,
    Echo,
    Web,
    bound,
    few_descriptors,
    linux_only,
    needs_ipv6,
    needs_reuse_port,
    run_program,
    unused_port,
)
from support import (
    GUARD,
    Peer,
    Recorder,
    Stack,
    collect_contexts,
    open_descriptors,
    turns,
    until,
)

from transports_anyio import Protocol, TransportGroup

pytestmark = pytest.mark.anyio


async def echoes(address: Any) -> Any:
    """Return whether an echo server listens at `address`, by means of a bare socket."""
    with Peer.connect(address) as peer:
        await peer.send(b"anybody there?")
        assert await peer.receive_exactly(14) == b"anybody there?"
        return peer.socket.getpeername()


class Made(list[Recorder]):
    """A protocol factory that keeps the protocols it made."""

    def __init__(self, factory: Any = Recorder) -> None:
        super().__init__()
        self.factory = factory

    def __call__(self) -> Any:
        self.append(self.factory())
        return self[-1]

    @property
    def connected(self) -> list[Recorder]:
        return [protocol for protocol in self if protocol.transport is not None]


def addresses(server: Any) -> list[Any]:
    return [sock.getsockname() for sock in server.sockets]


# -- host and port ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [HOST, "localhost", [HOST], (HOST,), {HOST}, [HOST, HOST], [b"127.0.0.1"]], ids=str)
async def test_forms_of_host(stack: Stack, host: Any) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, host, 0, family=socket.AF_INET)
        (address,) = addresses(server)
        assert address[0] == HOST
        await echoes(address)
        server.close()


@pytest.mark.differs(
    "a server's host in `bytes`",
    asyncio="taken for a sequence of numbers, so `TypeError`",
    here="a host",
    why="as for a client",
)
@pytest.mark.ours_only
async def test_a_host_in_bytes(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, b"127.0.0.1", b"0")
        await echoes(*addresses(server))
        server.close()


@needs_ipv6
@pytest.mark.parametrize("host", [None, "", b"", [None]])
async def test_all_interfaces(stack: Stack, host: Any) -> None:
    if host == b"" and stack.is_oracle:
        pytest.skip("asyncio takes bytes for a sequence of numbers")
    async with stack.open() as group:
        server = await group.create_server(Echo, host, unused_port())
        port = addresses(server)[0][1]
        assert {address[:2] for address in addresses(server)} == {("0.0.0.0", port), ("::", port)}
        await echoes((HOST, port))
        await echoes((HOST_6, port, 0, 0))
        server.close()


@pytest.mark.differs(
    "`port=0` on several addresses",
    asyncio="another port on each",
    here='the same port on all; `OSError` where that is impossible (`["0.0.0.0", "127.0.0.1"]`)',
    why="one service has one port",
)
@needs_ipv6
@pytest.mark.ours_only
@pytest.mark.parametrize("host", [None, [HOST, HOST_6], ["localhost", HOST_6]], ids=str)
async def test_s11_port_0_is_the_same_port_on_every_address(stack: Stack, host: Any) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, host, 0)
        assert len(addresses(server)) == 2
        assert len({address[1] for address in addresses(server)}) == 1
        for sock in server.sockets:
            address = sock.getsockname()
            await echoes((HOST if len(address) == 2 else HOST_6, *address[1:]))
        server.close()


@linux_only
@pytest.mark.ours_only("asyncio gives them two ports")
async def test_port_0_chooses_again_if_taken_on_another_address(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port chosen for the first address is taken on the second: another one is chosen."""
    bind = socket.socket.bind
    taken: list[int] = []

    def taken_three_times(sock: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.2" and len(taken) < 3:
            taken.append(address[1])
            raise OSError(errno.EADDRINUSE, "as the system would")
        bind(sock, address)

    async with stack.open() as group:
        before = open_descriptors()
        monkeypatch.setattr(socket.socket, "bind", taken_three_times)
        server = await group.create_server(Echo, [HOST, "127.0.0.2"], 0)
        assert len(taken) == 3
        assert [address[0] for address in addresses(server)] == [HOST, "127.0.0.2"]
        assert len({address[1] for address in addresses(server)}) == 1
        assert len(open_descriptors()) == len(before) + 2
        server.close()


@pytest.mark.differs("`port=0` on several addresses")
@linux_only
@pytest.mark.ours_only
async def test_port_0_on_an_address_and_on_all_of_them(stack: Stack) -> None:
    """There is no common port, and different ports would be wrong."""
    async with stack.open() as group:
        before = open_descriptors()
        with pytest.raises(OSError) as caught:
            await group.create_server(Echo, ["0.0.0.0", HOST], 0)
        assert caught.value.errno == errno.EADDRINUSE
        assert open_descriptors() == before


@needs_ipv6
async def test_ipv6_sockets_take_no_ipv4(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, "::", 0)
        (sock,) = server.sockets
        assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
        with pytest.raises(ConnectionRefusedError):
            Peer.connect((HOST, sock.getsockname()[1]))
        server.close()


async def test_the_family_parameter(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, None, 0, family=socket.AF_INET)
        assert [sock.family for sock in server.sockets] == [socket.AF_INET]
        server.close()
        with pytest.raises(socket.gaierror):
            await group.create_server(Echo, HOST_6, 0, family=socket.AF_INET)


async def test_flags_without_passive_are_the_loopback(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, None, 0, family=socket.AF_INET, flags=0)
        assert addresses(server)[0][0] == HOST
        server.close()


async def test_a_host_without_addresses(stack: Stack) -> None:
    stack.needs_python(3, 13, why="it makes a server that serves nothing")
    async with stack.open() as group:
        with pytest.raises(OSError, match="could not bind on any address"):
            await group.create_server(Echo, [], 0)


# -- what cannot be bound ---------------------------------------------------------------------------------------------


@linux_only
async def test_s7_one_failing_bind_closes_all_listeners(stack: Stack) -> None:
    async with stack.open() as group:
        with bound("127.0.0.5", backlog=1) as taken:
            before = open_descriptors()
            port = taken.getsockname()[1]
            with pytest.raises(OSError, match=rf"bind on address \('127\.0\.0\.5', {port}\)") as caught:
                await group.create_server(Echo, ["127.0.0.4", "127.0.0.5"], port)
            assert caught.value.errno == errno.EADDRINUSE
            assert open_descriptors() == before


@pytest.mark.ours_only("asyncio takes another port for each address")
async def test_s7_the_search_for_a_common_port_is_bounded(stack: Stack) -> None:
    """All interfaces conflict with any bound one, whichever port the system chooses."""
    async with stack.open() as group:
        before = open_descriptors()
        with pytest.raises(OSError, match=r"bind on address \('0\.0\.0\.0'") as caught:
            await group.create_server(Echo, [HOST, "0.0.0.0"], 0, reuse_address=False)
        assert caught.value.errno == errno.EADDRINUSE
        assert open_descriptors() == before


@linux_only
async def test_binding_to_an_address_of_another_machine(stack: Stack) -> None:
    """As asyncio: a name may have addresses of a family that is turned off."""
    stack.needs_python(3, 13, why="it is an error: bpo-30945")
    elsewhere = "198.51.100.1"  # Reserved for documentation (RFC 5737).
    async with stack.open() as group:
        server = await group.create_server(Echo, [HOST, elsewhere], 0)
        await echoes(*addresses(server))
        server.close()
        with pytest.raises(OSError, match=r"could not bind on any address out of.*198\.51\.100\.1"):
            await group.create_server(Echo, elsewhere, 0)


@pytest.mark.differs(
    "too many open files, for a listening socket",
    asyncio="that address is left out",
    here="`OSError`",
    why="the address exists",
)
@pytest.mark.ours_only
async def test_no_descriptor_for_a_listener(stack: Stack) -> None:
    async with stack.open() as group:
        with few_descriptors(), pytest.raises(OSError) as caught:
            await group.create_server(Echo, HOST, 0)
        assert caught.value.errno == errno.EMFILE


@pytest.mark.differs(
    "an address that another program takes between `bind` and `listen`",
    asyncio="the error names no address, and the sockets leak",
    here="the error names the address, and the sockets are closed",
    why="as for `bind`",
)
@linux_only
@pytest.mark.ours_only
async def test_an_address_that_is_taken_between_bind_and_listen(stack: Stack) -> None:
    """With SO_REUSEADDR, Linux reports it only in `listen`."""
    async with stack.open() as group:
        first = await group.create_server(Echo, HOST, 0, start_serving=False)
        (address,) = addresses(first)
        second = await group.create_server(Echo, *address, start_serving=False)
        await first.start_serving()
        with pytest.raises(OSError, match=rf"listen on address \('127\.0\.0\.1', {address[1]}\)") as caught:
            await second.start_serving()
        assert caught.value.errno == errno.EADDRINUSE
        assert not second.is_serving()
        before = open_descriptors()
        with pytest.raises(OSError):
            await group.create_server(Echo, *address)
        assert open_descriptors() == before


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, ["SO_REUSEADDR"] if os.name == "posix" else []),
        ({"reuse_address": True}, ["SO_REUSEADDR"]),
        ({"reuse_address": False}, []),
        pytest.param({"reuse_address": False, "reuse_port": True}, ["SO_REUSEPORT"], marks=needs_reuse_port),
        pytest.param({"reuse_port": True}, ["SO_REUSEADDR", "SO_REUSEPORT"], marks=needs_reuse_port),
        ({"reuse_address": False, "keep_alive": True}, ["SO_KEEPALIVE"]),
        ({"reuse_address": False, "keep_alive": False, "reuse_port": False}, []),
    ],
    ids=str,
)
async def test_socket_options(stack: Stack, given: dict[str, bool], options: list[str]) -> None:
    if "keep_alive" in given:
        stack.needs_python(3, 13, why="there is no keep_alive")
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0, **given)
        (sock,) = server.sockets
        for name in filter(partial(hasattr, socket), ("SO_REUSEADDR", "SO_REUSEPORT", "SO_KEEPALIVE")):
            assert bool(sock.getsockopt(socket.SOL_SOCKET, getattr(socket, name))) == (name in options), name
        server.close()


async def test_keep_alive_is_inherited(stack: Stack) -> None:
    stack.needs_python(3, 13, why="there is no keep_alive")
    made = Made()
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0, keep_alive=True)
        with Peer.connect(*addresses(server)):
            await until(lambda: made.connected)
            sock = made[0].transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        server.close()


@needs_reuse_port
async def test_reuse_port_lets_two_servers_share_a_port(stack: Stack) -> None:
    async with stack.open() as group:
        first = await group.create_server(Echo, HOST, 0, reuse_port=True)
        second = await group.create_server(Echo, *addresses(first)[0], reuse_port=True)
        assert addresses(first) == addresses(second)
        with pytest.raises(OSError):
            await group.create_server(Echo, *addresses(first)[0])
        first.close()
        await echoes(*addresses(second))
        second.close()


async def test_reuse_port_on_a_system_without_it(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack.open() as group:
        monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
        with pytest.raises(ValueError, match="not supported"):
            await group.create_server(Echo, HOST, 0, reuse_port=True)


async def test_start_serving_false(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0, start_serving=False)
        (address,) = addresses(server)
        assert not server.is_serving()
        with pytest.raises(ConnectionRefusedError):
            Peer.connect(address)
        await server.start_serving()
        await server.start_serving()
        assert server.is_serving()
        await echoes(address)
        server.close()
        assert not server.is_serving()
        assert server.sockets == ()


# -- adopted sockets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backlog", [None, 5], ids=["bound", "listening"])
async def test_an_adopted_listener(stack: Stack, backlog: int | None) -> None:
    async with stack.open() as group:
        with bound(backlog=backlog) as sock:
            name = sock.getsockname()
            server = await group.create_server(Echo, sock=sock)
            assert sock.gettimeout() == 0
            await echoes(name)
            server.close()
            await until(lambda: sock.fileno() == -1)


@pytest.mark.ours_only("asyncio leaves the socket open")
async def test_an_adopted_listener_is_closed_by_a_cancellation(stack: Stack) -> None:
    async with stack.open() as group:
        with bound() as sock:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await group.create_server(Echo, sock=sock)
            assert sock.fileno() == -1


@pytest.mark.differs(
    "a listening socket that two servers adopt",
    asyncio="the second server replaces the first",
    here="`RuntimeError`, and the first server goes on",
    why="a socket has one owner",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("start_serving", [False, True])
async def test_a_listener_in_use_by_another_server(stack: Stack, start_serving: bool) -> None:
    """The first server goes on, and so does a connection: either may own the socket."""
    made, others = Made(Echo), Made()
    async with stack.open() as group:
        with bound() as sock:
            name = sock.getsockname()
            server = await group.create_server(made, sock=sock, start_serving=start_serving)
            for serve in (False, True):
                with pytest.raises(RuntimeError, match="is already in use by another transport"):
                    await group.create_server(others, sock=sock, start_serving=serve)
            with pytest.raises(RuntimeError, match="is already in use by another transport"):
                await group.connect_accepted_socket(others, sock)
            assert sock.fileno() != -1
            await server.start_serving()
            await echoes(name)
            server.close()
            assert sock.fileno() == -1
            with pytest.raises(ConnectionRefusedError):
                Peer.connect(name)
        assert len(made) == 1
        assert others == []


async def test_sockets_that_cannot_be_adopted(stack: Stack) -> None:
    context = ssl.create_default_context()
    async with stack.open() as group:
        with bound() as sock, ExitStack() as sockets:
            datagram = sockets.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            tls = sockets.enter_context(context.wrap_socket(socket.socket(), server_hostname="localhost"))
            with pytest.raises(ValueError, match="A Stream Socket was expected, got <socket"):
                await group.create_server(Echo, sock=datagram)
            for address in ((HOST, 0), (HOST,), (None, 0)):
                with pytest.raises(ValueError, match="can not be specified at the same time"):
                    await group.create_server(Echo, *address, sock=sock)
            with pytest.raises(TypeError, match="SSLSocket"):
                await group.create_server(Echo, sock=tls)
            assert -1 not in (sock.fileno(), datagram.fileno(), tls.fileno())


async def test_bad_arguments(stack: Stack) -> None:
    async with stack.open() as group:
        with pytest.raises(ValueError, match="Neither host/port nor sock were specified"):
            await group.create_server(Echo)
        for ssl_ in (True, False):
            with pytest.raises(TypeError, match="ssl argument must be an SSLContext or None"):
                await group.create_server(Echo, HOST, 0, ssl=ssl_)
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await group.create_server(Echo, HOST, 0, ssl_handshake_timeout=1)
        if not stack.is_oracle or sys.version_info >= (3, 11):
            with pytest.raises(ValueError, match="only meaningful with ssl"):
                await group.create_server(Echo, HOST, 0, ssl_shutdown_timeout=1)
        with pytest.raises(TypeError):
            await group.create_server(Echo, 12345, 0)


# -- accepting --------------------------------------------------------------------------------------------------------


async def test_accepts_up_to_the_backlog_in_one_iteration(stack: Stack) -> None:
    """Twenty clients wait; each iteration accepts as many as the backlog holds, and then yields."""
    stack.needs_python(3, 14, 10, why="it takes one less than Linux lets wait")
    made = Made()
    seen = []
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0, backlog=8, start_serving=False)
        with ExitStack() as peers:
            (sock,) = server.sockets
            # A duplicate of the listener sets a longer backlog, so that all clients can connect at once.
            with socket.socket(fileno=socket.dup(sock.fileno())) as listener:
                listener.listen(50)
                for _ in range(20):
                    peers.enter_context(Peer.connect(sock.getsockname()))

            def look() -> None:
                seen.append(len(made))
                if len(made) < 20:
                    group.call_soon(look)

            look()
            await server.start_serving()
            await until(lambda: len(made.connected) == 20)
            steps = [after - before for before, after in itertools.pairwise(seen) if after > before]
            assert steps[:2] == [9, 9]
        server.close()


async def test_a_client_that_left_before_it_was_accepted(stack: Stack) -> None:
    """Its name stays known, and its data is not lost."""
    made = Made()
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        with Peer.connect(*addresses(server)) as peer:
            name = peer.socket.getsockname()
            peer.reset()
        await until(lambda: made.connected)
        assert made[0].transport.get_extra_info("peername") == name
        assert made[0].transport.get_extra_info("sockname") == addresses(server)[0]
        await made[0].wait_for("connection_lost")
        assert isinstance(made[0].exception, ConnectionResetError)
        with Peer.connect(*addresses(server)) as peer:
            peer.socket.send(b"last data")
        await until(lambda: len(made.connected) == 2)
        await made[1].wait_for("connection_lost")
        assert made[1].received == b"last data"
        assert made[1].transport.get_extra_info("peername") is not None
        server.close()


@pytest.mark.differs(
    "`accept` when too many files are open",
    asyncio="reported as often as the backlog is long",
    here="reported once a second",
    why="it must not fill the log",
)
@pytest.mark.ours_only
async def test_s6_no_descriptor_for_a_connection(stack: Stack) -> None:
    made = Made(Echo)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(made, HOST, 0)
        with ExitStack() as peers:
            first = peers.enter_context(Peer.connect(*addresses(server)))
            await until(lambda: len(made.connected) == 1)
            sock = peers.enter_context(socket.socket())
            with few_descriptors() as lift:
                sock.connect(*addresses(server))
                second = Peer(sock)
                await until(lambda: contexts)
                (context,) = contexts
                assert context["message"].startswith("socket.accept() out of system resource")
                assert context["exception"].errno == errno.EMFILE
                assert context["socket"].getsockname() == addresses(server)[0]
                # Other connections go on, and accept is not retried in every iteration.
                for _ in range(50):
                    await first.send(b"x")
                    assert await first.receive() == b"x"
                assert len(contexts) == 1
                assert len(made) == 1
                lift()
                await second.send(b"at last")
                assert await second.receive_exactly(7) == b"at last"
        server.close()


@pytest.mark.ours_only("asyncio keeps the timers, and has no statistics")
async def test_s6_closing_a_server_cancels_its_next_attempt_to_accept(stack: Stack) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        servers = [await group.create_server(Echo, HOST, 0) for _ in range(2)]
        with ExitStack() as peers:
            socks = [peers.enter_context(socket.socket()) for _ in servers]
            with few_descriptors():
                for sock, server in zip(socks, servers, strict=True):
                    sock.connect(*addresses(server))
                await until(lambda: len(contexts) == 2)
            assert group.statistics().pending_timers == 2
            servers[0].close()
            assert group.statistics().pending_timers == 1
            assert servers[1].is_serving()
            servers[1].close()
            assert group.statistics().pending_timers == 0


@pytest.mark.differs("`accept` when too many files are open")
@pytest.mark.parametrize("name", ["ENFILE", "ENOBUFS", "ENOMEM"])
@pytest.mark.ours_only
async def test_s6_accept_fails_for_lack_of_resources(stack: Stack, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transports_anyio._server.RETRY_DELAY", 0.01)
    failures = [OSError(getattr(errno, name), "as the system would")]
    accept = socket.socket.accept

    def failing_once(sock: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(sock)

    made = Made(Echo)
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(made, HOST, 0)
        with Peer.connect(*addresses(server)) as first:
            await first.send(b"x")
            assert await first.receive() == b"x"
            monkeypatch.setattr(socket.socket, "accept", failing_once)
            with Peer.connect(*addresses(server)) as second:
                await until(lambda: contexts)
                assert contexts[0]["exception"].errno == getattr(errno, name)
                assert len(made) == 1
                await first.send(b"y")
                assert await first.receive() == b"y"
                await second.send(b"at last")
                assert await second.receive_exactly(7) == b"at last"
                assert len(contexts) == 1
        server.close()


def test_a_server_without_descriptors_tries_again_after_a_second() -> None:
    """Neither earlier nor much later, by a clock that only the test moves."""
    trio = pytest.importorskip("trio")
    clock = pytest.importorskip("trio.testing").MockClock()

    async def run(until_time: float) -> None:
        clock.jump(until_time - group_time())
        await turns(50)

    def group_time() -> float:
        return float(anyio.current_time()) - started

    async def settle(condition: Any) -> None:
        for _ in range(100_000):  # Checkpoints, because no time passes by this clock.
            if condition():
                return
            await anyio.lowlevel.checkpoint()
        raise AssertionError("it never happens")

    started = 0.0

    async def main() -> None:
        nonlocal started
        made = Made(Echo)
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            server = await group.create_server(made, HOST, 0)
            with socket.socket() as sock:
                with few_descriptors():
                    sock.connect(*addresses(server))
                    await settle(lambda: contexts)
                    started = anyio.current_time()
                    assert contexts[0]["exception"].errno == errno.EMFILE
                    assert "1 s" in contexts[0]["message"]
                    assert group.statistics().pending_timers == 1
                    await run(0.99)
                    assert group.statistics().pending_timers == 1
                    await run(1.01)
                    await settle(lambda: len(contexts) == 2)  # No client has been accepted yet.
                    started = anyio.current_time()
                await run(0.99)
                assert made == []
                await run(1.01)
                await settle(lambda: made.connected)
                assert len(contexts) == 2
                assert group.statistics().pending_timers == 0

    trio.run(main, clock=clock)  # AnyIO 4.10 does not export the clock.


@linux_only
@pytest.mark.ours_only("asyncio keeps its listeners in the selector")
async def test_s6_epoll_refuses_the_listener_after_a_pause(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC of epoll after the server has waited for a file descriptor: it waits again."""
    from transports_anyio._selector import EpollSelector

    failures = [OSError(errno.ENOSPC, "as the system would")]
    add = EpollSelector.add

    def failing_once(readiness: EpollSelector, descriptor: int, interest: int) -> None:
        if failures:
            raise failures.pop()
        add(readiness, descriptor, interest)

    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(Echo, HOST, 0)
        with socket.socket() as sock:
            with few_descriptors():
                sock.connect(*addresses(server))
                await until(lambda: contexts)
                monkeypatch.setattr(EpollSelector, "add", failing_once)
                monkeypatch.setattr("transports_anyio._server.RETRY_DELAY", 0.01)  # The second time.
            peer = Peer(sock)
            await peer.send(b"at last")
            assert await peer.receive_exactly(7) == b"at last"
        assert [context["exception"].errno for context in contexts] == [errno.EMFILE, errno.ENOSPC]
        server.close()


@linux_only
@pytest.mark.ours_only("asyncio has no poller")
async def test_epoll_refuses_the_listener(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "as the system would")

    async with stack.open() as group:
        server = await group.create_server(Echo, HOST, 0, start_serving=False)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="as the system would"):
            patch.setattr("transports_anyio._selector.EpollSelector.add", full)
            await server.start_serving()
        assert not server.is_serving()
        await server.start_serving()  # epoll accepts file descriptors again.
        with Peer.connect(*addresses(server)) as peer:
            await peer.send(b"hello")
            assert await peer.receive_exactly(5) == b"hello"
        server.close()


async def test_s6_a_server_that_is_closed_while_it_waits_for_descriptors(stack: Stack) -> None:
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(Echo, HOST, 0)
        with socket.socket() as sock:
            with few_descriptors():
                sock.connect(*addresses(server))
                await until(lambda: contexts)
            server.close()
            if not stack.is_oracle:  # A retry would accept from the closed socket after a second, and report it.
                await server.wait_closed()


@pytest.mark.differs(
    "a listening socket that is broken",
    asyncio="reported in every iteration",
    here="reported once, and no longer watched",
    why="it stays broken",
)
@linux_only
@pytest.mark.ours_only
async def test_a_listener_that_is_broken(stack: Stack) -> None:
    """The other one goes on."""
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(Echo, [HOST, "127.0.0.2"], 0)
        broken, sound = server.sockets
        with socket.socket(fileno=socket.dup(broken.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        await until(lambda: contexts)
        for _ in range(3):
            await echoes(sound.getsockname())
        (context,) = contexts
        assert context["exception"].errno == errno.EINVAL
        assert context["socket"].fileno() == broken.fileno()
        server.close()


@pytest.mark.differs(
    "a protocol factory that raises for an accepted connection",
    asyncio="reported in debug mode only; the socket is left to the garbage collector",
    here="reported, and the socket is closed",
    why="a hidden error is never fixed",
)
@pytest.mark.ours_only
async def test_s10_a_factory_that_raises_every_other_time(stack: Stack) -> None:
    made: list[Recorder] = []
    attempts: list[Any] = []

    def factory() -> Recorder:
        attempts.append(None)
        if len(attempts) % 2:
            raise ZeroDivisionError
        made.append(Echo())
        return made[-1]

    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(factory, HOST, 0)
        refused = []
        for number in range(1, 11):
            with Peer.connect(*addresses(server)) as peer:
                if number % 2:
                    refused.append(peer.socket.getsockname())
                    assert await peer.receive() == b""
                else:
                    await peer.send(b"x")
                    assert await peer.receive() == b"x"
        assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError] * 5
        assert {context["message"] for context in contexts} == {"Error on transport creation for incoming connection"}
        assert [context["peername"] for context in contexts] == refused
        server.close()


@pytest.mark.ours_only("asyncio goes on after an exception in connection_made")
async def test_s10_connection_made_that_raises(stack: Stack) -> None:
    def fail(protocol: Recorder, transport: Any) -> None:
        raise ZeroDivisionError

    made = Made(lambda: Recorder(on_connection_made=fail) if len(made) % 2 == 0 else Echo())
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(made, HOST, 0)
        for number in range(4):
            with Peer.connect(*addresses(server)) as peer:
                if number % 2 == 0:
                    assert await peer.receive() == b""
                else:
                    await peer.send(b"x")
                    assert await peer.receive() == b"x"
        assert len(contexts) == 2
        server.close()


@pytest.mark.differs(
    "a protocol factory that closes the server",
    asyncio="an assertion fails",
    here="the connection stays",
    why="a server may be for one client only",
)
@pytest.mark.ours_only
async def test_a_factory_may_close_the_server(stack: Stack) -> None:
    """The first of the waiting clients is still served."""
    made = Made(Echo)

    def factory() -> Any:
        server.close()
        return made()

    async with stack.open() as group:
        server = await group.create_server(factory, HOST, 0, backlog=1)
        (address,) = addresses(server)
        with Peer.connect(address) as peer:
            await peer.send(b"x")
            assert await peer.receive() == b"x"
            with pytest.raises(ConnectionRefusedError):
                Peer.connect(address)
        assert not server.is_serving()


@pytest.mark.ours_only("asyncio accepts all that wait before it makes the first connection")
async def test_a_connection_may_close_the_server_while_others_wait(stack: Stack) -> None:
    made = Made(lambda: Recorder(on_connection_made=lambda *_: server.close()))
    async with stack.open() as group:
        contexts = collect_contexts(group)
        server = await group.create_server(made, HOST, 0)
        (address,) = addresses(server)
        with Peer.connect(address) as peer, Peer.connect(address) as other:
            assert await other.gone()
            peer.close()
            await made[0].wait_for("connection_lost")
        assert len(made) == 1
        assert contexts == []


async def test_connections_run_in_the_context_of_create_server(stack: Stack) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    seen = []
    made = Made(lambda: Recorder(on_connection_made=lambda *_: seen.append(variable.get())))
    async with stack.open() as group:
        variable.set("the server's")
        server = await group.create_server(made, HOST, 0)
        variable.set("set later")
        with Peer.connect(*addresses(server)):
            await until(lambda: made.connected)
        assert seen == ["the server's"]
        server.close()


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["close, wait, last client", "close, last client, wait", "last client, close, wait"])
async def test_s1_wait_closed(stack: Stack, order: str) -> None:
    stack.needs_python(3, 12, 1, why="wait_closed returns too early: CPython 79033")
    made = Made()
    states = []
    async with stack.open() as group, anyio.create_task_group() as tasks:
        stack.expected_tasks = 1
        server = await group.create_server(made, HOST, 0)
        with Peer.connect(*addresses(server)) as peer:
            await until(lambda: made.connected)
            finished = anyio.Event()

            async def wait() -> None:
                await server.wait_closed()
                states.append(made[0].lost)
                finished.set()

            for step in order.split(", "):
                if step == "close":
                    server.close()
                elif step == "last client":
                    peer.close()
                    await made[0].wait_for("connection_lost")
                elif step == "wait":
                    tasks.start_soon(wait)
                    await turns()
            with anyio.fail_after(GUARD):
                await finished.wait()
        assert states == [True]


@pytest.mark.parametrize("how", ["close_clients", "abort_clients"])
async def test_s2_ending_the_clients(stack: Stack, how: str) -> None:
    stack.needs_python(3, 13, why=f"there is no {how}")
    made = Made()
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        with ExitStack() as peers:
            for _ in range(10):
                peers.enter_context(Peer.connect(*addresses(server)))
            await until(lambda: len(made.connected) == 10)
            server.close()
            getattr(server, how)()
            with anyio.fail_after(GUARD):
                await server.wait_closed()
            assert all(protocol.lost for protocol in made)


@pytest.mark.ours_only("asyncio has no group")
async def test_s9_leaving_the_block_ends_a_server_whose_client_is_silent(stack: Stack) -> None:
    made = Made()
    with ExitStack() as peers:
        async with TransportGroup() as group:
            server = await group.create_server(made, HOST, 0)
            (address,) = addresses(server)
            peer = peers.enter_context(Peer.connect(address))
            await until(lambda: made.connected)
        assert made[0].lost
        assert await peer.receive() == b""
        with pytest.raises(ConnectionRefusedError):
            Peer.connect(address)


# -- other programs as clients ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@needs_ipv6
async def test_curl(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_server(Web, [HOST, HOST_6], unused_port())
        for sock in server.sockets:
            host, port = sock.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}/index.html"
            assert await run_program("curl", "-sS", "--noproxy", "*", url) == b"GET /index.html HTTP/1.1"
        server.close()


async def test_http_client(stack: Stack) -> None:
    def fetch(address: Any) -> bytes:
        connection = http.client.HTTPConnection(*address, timeout=GUARD)
        try:
            connection.request("POST", "/form", body=b"a=1")
            return connection.getresponse().read()
        finally:
            connection.close()

    async with stack.open() as group:
        server = await group.create_server(Web, HOST, 0)
        assert await anyio.to_thread.run_sync(fetch, *addresses(server)) == b"POST /form HTTP/1.1"
        server.close()


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc")
async def test_nc(stack: Stack) -> None:
    made = Made(Echo)
    async with stack.open() as group:
        server = await group.create_server(made, HOST, 0)
        host, port = addresses(server)[0]
        assert await run_program("nc", "-N", host, str(port), stdin=b"x" * 100_000) == b"x" * 100_000
        assert made[0].exception is None
        server.close()


@pytest.mark.exhaustive
@pytest.mark.ours_only("the test looks for leaks of ours")
async def test_ten_thousand_connections_leave_no_descriptor(stack: Stack) -> None:
    """A hundred at a time; most end by a reset, so that they do not stay in TIME_WAIT."""
    made: list[Any] = []
    lost = []

    class Counted(Protocol):
        def connection_lost(self, exc: BaseException | None) -> None:
            lost.append(exc)

    def factory() -> Any:
        made.append(None)
        return Counted()

    async def visit(number: int) -> None:
        transport, _ = await group.create_connection(factory, *address)
        if number % 10:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        transport.close()

    async with TransportGroup() as group:
        server = await group.create_server(factory, HOST, 0)
        (address,) = addresses(server)
        before = open_descriptors()
        for _ in range(100):
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(visit, number)
        await until(lambda: len(lost) == 20_000)
        assert len(made) == 20_000
        assert open_descriptors() == before
        server.close()
