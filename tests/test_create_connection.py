"""`create_connection`: hosts and ports, local addresses, Happy Eyeballs, adopted sockets, and their errors."""

from __future__ import annotations

import enum
import errno
import gc
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from network import (
    HOST,
    HOST_6,
    Echo,
    a_link_local_address,
    black_hole,
    bound,
    cancelled_after,
    few_descriptors,
    linux_only,
    names,
    needs_descriptors,
    needs_ipv6,
    unused_port,
)
from support import GUARD, Peer, Recorder, Stack, connected, leaves, open_descriptors, turns, until

from transports_anyio import TransportGroup, TransportSocket

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio


async def visit(group: Any, listener: socket.socket, *address: Any, **options: Any) -> Any:
    """Connect, exchange a word with the listener, close; return `sockname` and `peername`."""
    with anyio.fail_after(GUARD):
        transport, protocol = await group.create_connection(Recorder, *address, **options)
    sock, _ = listener.accept()
    with Peer(sock) as peer:
        transport.write(b"hello")
        assert await peer.receive_exactly(5) == b"hello"
        info = {name: transport.get_extra_info(name) for name in ("sockname", "peername")}
        assert info == {"sockname": sock.getpeername(), "peername": sock.getsockname()}
    await protocol.wait_for("connection_lost")
    return info


# -- host and port ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [int, str, lambda port: str(port).encode()], ids=["int", "str", "bytes"])
@pytest.mark.parametrize("host", ["127.0.0.1", b"127.0.0.1", "localhost", b"localhost"])
async def test_the_forms_of_host_and_port(stack: Stack, host: Any, port: Callable[[int], Any]) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            await visit(group, listener, host, port(listener.getsockname()[1]), family=socket.AF_INET)


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", b"::1", "0:0:0:0:0:0:0:1"])
async def test_ipv6(stack: Stack, host: Any) -> None:
    async with stack.open() as group:
        with bound(HOST_6, backlog=1) as listener:
            info = await visit(group, listener, host, listener.getsockname()[1])
            assert info["peername"] == listener.getsockname()


@pytest.mark.skipif(a_link_local_address() is None, reason="there is no link-local address")
@pytest.mark.parametrize("by", ["name", "number", "server"])
async def test_scope_ids(stack: Stack, by: str) -> None:
    address, interface = a_link_local_address() or ("", "")
    number = socket.if_nametoindex(interface)
    host = f"{address}%{interface if by == 'name' else number}"
    async with stack.open() as group:
        if by == "server":
            server = await group.create_server(Echo, host, 0)
            name = server.sockets[0].getsockname()
            assert name == (address, name[1], 0, number)
            _, protocol = await group.create_connection(Recorder, host, name[1])
            assert protocol.transport.get_extra_info("peername") == name
            server.close()
            return
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind((address, 0, 0, number))
            listener.listen()
            info = await visit(group, listener, host, listener.getsockname()[1])
            assert info["peername"] == (address, listener.getsockname()[1], 0, number)


async def test_a_host_of_none_means_the_loopback(stack: Stack) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            info = await visit(group, listener, None, listener.getsockname()[1])
            assert info["peername"] == listener.getsockname()


@pytest.mark.differs(
    "`proto` of another type of socket, with a numeric host",
    asyncio="ignored",
    here="`gaierror`, as with a name",
    why="such a socket does not exist",
)
@pytest.mark.parametrize("host", ["localhost", HOST])
async def test_a_protocol_number(stack: Stack, host: str) -> None:
    """A protocol by its number. Other numbers than that of TCP depend on the system."""
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            port = listener.getsockname()[1]
            transport, _ = await group.create_connection(
                Recorder, host, port, family=socket.AF_INET, proto=socket.IPPROTO_TCP
            )
            assert transport.get_extra_info("socket").proto == socket.IPPROTO_TCP
            listener.accept()[0].close()
            if stack.is_oracle and host == HOST:
                return  # uvloop uses TCP whatever it is given, for numeric addresses.
            with pytest.raises(socket.gaierror):  # UDP has no streams.
                await group.create_connection(Recorder, host, port, family=socket.AF_INET, proto=socket.IPPROTO_UDP)


@needs_ipv6
@pytest.mark.parametrize("host", [HOST, HOST.encode()])
async def test_flags_are_passed_to_the_resolver(stack: Stack, host: Any) -> None:
    """IPv4 by way of an IPv6 socket: without the flag the host has no address of the family."""
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            port = listener.getsockname()[1]
            options: dict[str, Any] = {"family": socket.AF_INET6}
            with pytest.raises(socket.gaierror):
                await group.create_connection(Recorder, host, port, **options)
            options["flags"] = socket.AI_V4MAPPED
            transport, protocol = await group.create_connection(Recorder, host, port, local_addr=(HOST, 0), **options)
            assert transport.get_extra_info("peername") == (f"::ffff:{HOST}", port, 0, 0)
            assert transport.get_extra_info("sockname")[0] == f"::ffff:{HOST}"
            with Peer(listener.accept()[0]) as peer:
                await peer.send(b"hello")
                assert await protocol.wait_received(5) == b"hello"


def a_service() -> tuple[str, int] | None:
    """Return a service with a free port that an ordinary user may bind."""
    for name in ("nfs", "x11", "git", "svn", "postgresql", "mysql", "ircd", "irc", "sip", "openvpn", "rfb", "amqp"):
        try:
            port = socket.getservbyname(name, "tcp")
            with bound(port=port):
                return name, port
        except OSError:
            continue
    return None


@pytest.mark.skipif(a_service() is None, reason="no service is known here")
async def test_a_service_name_as_port(stack: Stack) -> None:
    name, port = a_service() or ("", 0)
    async with stack.open() as group:
        with bound(port=port, backlog=1) as listener:
            for host in (HOST, "localhost"):
                await visit(group, listener, host, name, family=socket.AF_INET)


@pytest.mark.skipif(a_service() is None, reason="no service is known here")
@pytest.mark.skipif(a_link_local_address() is None, reason="there is no link-local address")
async def test_a_service_name_with_a_scoped_address(stack: Stack) -> None:
    name, port = a_service() or ("", 0)
    address, interface = a_link_local_address() or ("", "")
    number = socket.if_nametoindex(interface)
    async with stack.open() as group:
        with socket.socket(socket.AF_INET6) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port, 0, number))
            listener.listen()
            info = await visit(group, listener, f"{address}%{interface}", name)
            assert info["peername"] == (address, port, 0, number)


@pytest.mark.parametrize(
    ("host", "port", "options"),
    [
        ("", 1, {}),
        ("localhost", "no such service", {}),
        (HOST, b"\xe9", {}),
        ("localhost", -1, {"flags": socket.AI_NUMERICSERV}),
        ("localhost", 1, {"flags": socket.AI_NUMERICHOST}),
        (HOST_6, 1, {"family": socket.AF_INET}),
        (f"{HOST_6}%nowhere", 1, {}),
        (f"{HOST_6}%nowhere".encode(), "http", {}),
        (HOST, 1, {"proto": 12345}),
    ],
)
async def test_hosts_and_ports_that_cannot_be_resolved(
    stack: Stack, host: str, port: Any, options: dict[str, Any]
) -> None:
    expected = socket.gaierror
    if port == -1 and not stack.is_oracle:
        expected = OverflowError  # type: ignore[assignment]
    async with stack.open() as group:
        with pytest.raises(expected):
            await group.create_connection(Recorder, host, port, **options)


@pytest.mark.differs(
    "a host name with a label that is empty or too long (`..localhost`)",
    asyncio="`UnicodeError`",
    here="`gaierror`, as for `bytes`",
    why="such a name does not exist",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("host", [".", "..localhost", f"{'a' * 64}.localhost"])
async def test_a_name_with_a_label_of_a_wrong_length(stack: Stack, host: str) -> None:
    async with stack.open() as group:
        for form in (host, host.encode()):
            with pytest.raises(socket.gaierror):
                await group.create_connection(Recorder, form, 1)


@pytest.mark.differs(
    "a host name beyond ASCII",
    asyncio="IDNA 2003: `straße` means `strasse`",
    here="IDNA 2008: `straße` means itself, and `☃` is a `UnicodeError`",
    why="AnyIO resolves names",
)
@pytest.mark.ours_only
async def test_non_ascii_host_names(stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """IDNA 2008, which has a sharp s, and no snowman."""
    async with stack.open() as group:
        known = {"stra\xdfe.test": [HOST], "xn--strae-oqa.test": [HOST]}  # The first form is for uvloop's resolver.
        with bound(backlog=1) as listener, names(monkeypatch, known, anyio_backend):
            await visit(group, listener, "stra\xdfe.test", listener.getsockname()[1])
        with pytest.raises(UnicodeError):
            await group.create_connection(Recorder, "\u2603.test", 1)


@pytest.mark.parametrize("port", [-1, 65536, "70000", b"70000"])
async def test_ports_out_of_range(stack: Stack, port: Any) -> None:
    async with stack.open() as group:
        with pytest.raises(OverflowError):
            await group.create_connection(Recorder, HOST, port)
        with pytest.raises(OverflowError):
            await group.create_server(Recorder, HOST, port)


@pytest.mark.differs(
    "a port out of range, with a host name",
    asyncio="the C library takes it modulo 65536",
    here="`OverflowError`, as with a numeric host",
    why="70000 does not mean port 4464",
)
@pytest.mark.ours_only
async def test_ports_out_of_range_with_a_name(stack: Stack) -> None:
    async with stack.open() as group:
        with pytest.raises(OverflowError, match="65536"):
            await group.create_connection(Recorder, "localhost", 65536)


class Ports(enum.IntEnum):
    """A port by its name: an `int`, but not a plain one."""

    TOP = 65535


@pytest.mark.parametrize("port", [Ports.TOP, " 65535", "+65535"], ids=repr)
async def test_ports_of_other_number_types(stack: Stack, port: Any) -> None:
    async with stack.open() as group:
        with bound(port=65535, backlog=1) as listener:
            await visit(group, listener, HOST, port)


@pytest.mark.parametrize("host", [f"{HOST}\0.example", f"{HOST}\0.example".encode()])
async def test_a_nul_in_a_host(stack: Stack, host: Any) -> None:
    """A listener at the part before the NUL must not be reached: the host does not end where a C string would."""
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            with pytest.raises(ValueError, match="null"):
                await group.create_connection(Recorder, host, listener.getsockname()[1])
            with pytest.raises(ValueError, match="null"):
                await group.create_server(Recorder, [host], 0)


@pytest.mark.differs(
    "a NUL character in a host or port",
    asyncio="the C library stops at it",
    here="`ValueError`, as with a numeric host",
    why="it would be another host",
)
@pytest.mark.ours_only
async def test_a_nul_in_a_name_or_a_port(stack: Stack) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            port = listener.getsockname()[1]
            for address in (("localhost\0.example", port), (HOST, f"{port}\0"), (HOST, f"{port}\0".encode())):
                with pytest.raises(ValueError, match="null"):
                    await group.create_connection(Recorder, *address)
                with pytest.raises(ValueError, match="null"):
                    await group.create_datagram_endpoint(Recorder, remote_addr=address)


@pytest.mark.differs(
    "an IPv6 address with a scope (`fe80::1%eth0`)",
    asyncio="resolved in a thread",
    here="needs no thread",
    why="it is numeric",
)
@pytest.mark.ours_only
async def test_numeric_addresses_need_no_thread(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    original = socket.getaddrinfo

    def spy(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return original(*args, **options)

    scoped = [f"{address}%{name}" for address, name in [a_link_local_address() or ("fe80::1", "lo")]]
    async with stack.open() as group:
        with bound(backlog=5) as listener, monkeypatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", spy)
            before = threading.enumerate()
            port = listener.getsockname()[1]
            await visit(group, listener, HOST, port, local_addr=(HOST, 0))
            await visit(group, listener, HOST.encode(), str(port))
            server = await group.create_server(Recorder, [HOST, HOST_6], 0)
            server.close()
            for host in (HOST_6, *scoped):
                with pytest.raises(OSError):
                    await group.create_connection(Recorder, host, unused_port())
            assert threading.enumerate() == before
        assert set(threads) == {threading.current_thread()}


# -- several addresses ------------------------------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("options", [{}, {"happy_eyeballs_delay": 1000}, {"interleave": 2}], ids=str)
async def test_the_next_address_is_tried_without_delay_after_a_refusal(
    stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """With the delay of an hour: the second attempt begins as soon as the first has failed."""
    async with stack.open() as group:
        with bound(backlog=1) as listener, names(monkeypatch, {"two.test": ["127.0.0.77", HOST]}, anyio_backend):
            info = await visit(group, listener, "two.test", listener.getsockname()[1], **options)
            assert info["peername"] == listener.getsockname()


@needs_ipv6
@pytest.mark.parametrize("options", [{}, {"happy_eyeballs_delay": 1000}], ids=str)
async def test_the_second_address_when_the_first_refuses(stack: Stack, options: dict[str, Any]) -> None:
    async with stack.open() as group:
        for host in (HOST, HOST_6):  # The order depends on the system.
            with bound(host, backlog=1) as listener:
                await visit(group, listener, None, listener.getsockname()[1], **options)


@linux_only
async def test_happy_eyeballs_does_not_wait_for_a_black_hole(
    stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would wait for minutes. Both addresses have one family, so only the delay can help."""
    async with stack.open() as group:
        with bound(backlog=1) as listener, black_hole("127.0.0.77", listener.getsockname()[1]) as port:
            before = open_descriptors()
            with names(monkeypatch, {"two.test": ["127.0.0.77", HOST]}, anyio_backend):
                with anyio.fail_after(GUARD):
                    transport, _ = await group.create_connection(Recorder, "two.test", port, happy_eyeballs_delay=0.01)
                assert transport.get_extra_info("peername") == listener.getsockname()
            # The losing attempt is closed as soon as another one has connected.
            after = open_descriptors()
            assert set(after) - set(before) == {transport.get_extra_info("socket").fileno()}
            listener.accept()[0].close()


@needs_ipv6
@linux_only
async def test_address_families_alternate(stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the addresses in the order in which they were tried."""
    addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "::1", "127.0.0.4"]
    port = unused_port()
    async with stack.open() as group:
        for options, order in (
            ({}, [1, 2, 3, 6, 4]),
            ({"interleave": 0}, [1, 2, 3, 6, 4]),
            ({"interleave": 1}, [1, 6, 2, 3, 4]),
            ({"interleave": 2}, [1, 2, 6, 3, 4]),
            ({"interleave": 9}, [1, 2, 3, 4, 6]),
            ({"happy_eyeballs_delay": 1000}, [1, 6, 2, 3, 4]),
            ({"happy_eyeballs_delay": 1000, "interleave": 0}, [1, 2, 3, 6, 4]),
        ):
            with names(monkeypatch, {"many.test": addresses}, anyio_backend), pytest.raises(OSError) as caught:
                await group.create_connection(Recorder, "many.test", port, **options)
            message = str(caught.value)
            tried = [f"'{HOST_6}'" if number == 6 else f"'127.0.0.{number}'" for number in order]
            assert sorted(tried, key=message.index) == tried, options


@needs_ipv6
@pytest.mark.parametrize("delay", [None, 0, 0.001])
async def test_the_error_names_every_address(stack: Stack, delay: float | None) -> None:
    port = unused_port()
    async with stack.open() as group:
        with pytest.raises(OSError, match="Multiple exceptions") as caught:
            await group.create_connection(Recorder, None, port, happy_eyeballs_delay=delay)
        assert f"'{HOST}', {port}" in str(caught.value)
        assert f"'{HOST_6}', {port}" in str(caught.value)


async def test_a_single_failure_is_raised_unchanged(stack: Stack) -> None:
    port = unused_port()
    async with stack.open() as group:
        with pytest.raises(ConnectionRefusedError, match=rf"Connect call failed.*127\.0\.0\.1', {port}") as caught:
            await group.create_connection(Recorder, HOST, port)
        assert caught.value.errno == errno.ECONNREFUSED


@needs_ipv6
@pytest.mark.parametrize("delay", [None, 0.001])
async def test_all_errors_raises_an_exception_group(stack: Stack, delay: float | None) -> None:
    stack.needs_python(3, 12, why="there is no all_errors")
    async with stack.open() as group:
        with pytest.raises(ExceptionGroup) as caught:
            await group.create_connection(
                Recorder, None, unused_port(), all_errors=True, happy_eyeballs_delay=delay, interleave=1
            )
        assert [type(error) for error in caught.value.exceptions] == [ConnectionRefusedError] * 2
        with pytest.raises(ExceptionGroup) as caught:
            await group.create_connection(Recorder, HOST, unused_port(), all_errors=True)
        assert [type(error) for error in caught.value.exceptions] == [ConnectionRefusedError]


@needs_ipv6
@pytest.mark.parametrize("listening", [False, True])
@pytest.mark.parametrize("options", [{}, {"all_errors": True}, {"happy_eyeballs_delay": 0.001}], ids=str)
async def test_errors_leave_no_reference_cycle(stack: Stack, options: dict[str, Any], listening: bool) -> None:
    """Not even until the garbage collector runs: retrying would pile up errors and their frames."""
    if stack.is_oracle and (options or listening):
        pytest.skip("asyncio lets go of them where every address fails, one after the other")

    def errors() -> int:
        return sum(issubclass(type(thing), OSError) for thing in gc.get_objects())

    async with stack.open() as group:
        gc.collect()
        gc.disable()
        try:
            before = errors()
            for host in (HOST, HOST_6):  # The order depends on the system; the other address refuses.
                with bound(host, backlog=1 if listening else None) as listener, suppress(OSError, ExceptionGroup):
                    await visit(group, listener, None, listener.getsockname()[1], **options)
                await turns()  # The event loop's own callbacks release their references.
            assert errors() == before
        finally:
            gc.enable()


@needs_ipv6
@pytest.mark.ours_only("asyncio raises IndexError: CPython 135836")
@pytest.mark.parametrize("delay", [0, 0.001, 1000])
async def test_s3_every_attempt_fails_at_every_point(stack: Stack, delay: float) -> None:
    """Refused at once, refused later, and no file descriptor for a socket: an `OSError` that names the addresses."""
    async with stack.open() as group:
        for more in range(3):
            with few_descriptors(more), pytest.raises(OSError) as caught:
                await group.create_connection(Recorder, None, 1, happy_eyeballs_delay=delay)
            assert f"'{HOST}'" in str(caught.value)
            assert f"'{HOST_6}'" in str(caught.value)


@needs_ipv6
@pytest.mark.ours_only("asyncio of older Pythons leaks sockets")
@pytest.mark.parametrize("delay", [None, 0, 0.001])
async def test_s4_cancelled_at_every_checkpoint(stack: Stack, delay: float | None) -> None:
    outcomes = set()
    async with stack.open() as group:
        server = await group.create_server(Echo, None, 0)
        port = server.sockets[0].getsockname()[1]
        await until(server.is_serving)
        for checkpoints in range(40):
            connection: Any = None
            before = set(open_descriptors())
            async with cancelled_after(checkpoints):
                connection = await group.create_connection(Recorder, None, port, happy_eyeballs_delay=delay)
            outcomes.add(connection is not None)
            if connection is not None:
                connection[0].abort()
                await connection[1].wait_for("connection_lost")
            server.abort_clients()
            await until(lambda: set(open_descriptors()) <= before)  # noqa: B023
        server.close()
    assert outcomes == {True, False}


@needs_ipv6
@pytest.mark.ours_only("the test replaces a method of the driver")
@needs_descriptors
async def test_s4_two_winners_in_the_same_turn(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = []
    connected = anyio.Event()

    async def wait_writable(sock: socket.socket) -> None:
        waiting.append(sock)
        await connected.wait()

    async with stack.open() as group:
        with ExitStack() as listeners:
            port = listeners.enter_context(bound(backlog=1)).getsockname()[1]
            listeners.enter_context(bound(HOST_6, port, backlog=1))
            before = open_descriptors()
            made: list[Any] = []

            async def connect() -> None:
                made.extend(await group.create_connection(Recorder, None, port, happy_eyeballs_delay=0))

            async with anyio.create_task_group() as tasks:
                with monkeypatch.context() as patch:
                    patch.setattr(group._core.driver, "wait_writable", wait_writable)
                    tasks.start_soon(connect)
                    await until(lambda: len(waiting) == 2)
                connected.set()
            transport, _ = made
            number = transport.get_extra_info("socket").fileno()
            assert set(open_descriptors()) - set(before) == {number}
            assert sorted(sock.fileno() for sock in waiting) == [-1, number]
            transport.abort()


@linux_only
async def test_s4_cancelled_while_every_attempt_hangs(
    stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stack.open() as group:
        with black_hole("127.0.0.77") as port, black_hole("127.0.0.78", port):
            before = open_descriptors()
            with names(monkeypatch, {"two.test": ["127.0.0.77", "127.0.0.78"]}, anyio_backend):
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(
                            lambda: group.create_connection(Recorder, "two.test", port, happy_eyeballs_delay=0)
                        )
                        await until(lambda: len(open_descriptors()) >= len(before) + 2)
                        scope.cancel()
            await until(lambda: open_descriptors() == before)


@pytest.mark.differs(
    "a socket that cannot be made: too many open files, no route",
    asyncio="the system's error alone",
    here="the error names the address",
    why="one error lists everything that was tried",
)
@pytest.mark.ours_only
async def test_s5_a_socket_that_cannot_be_made_counts_as_a_failed_address(stack: Stack) -> None:
    async with stack.open() as group:
        with few_descriptors(), pytest.raises(OSError, match=r"127\.0\.0\.1.*too many open files") as caught:
            await group.create_connection(Recorder, HOST, 1)
        assert caught.value.errno == errno.EMFILE


@needs_ipv6
async def test_s5_a_socket_that_cannot_be_made_among_others(stack: Stack) -> None:
    """Only one socket can be opened: of two concurrent attempts, one fails."""
    async with stack.open() as group:
        with bound(HOST, backlog=1) as listener, bound(HOST_6, listener.getsockname()[1], backlog=1):
            with few_descriptors(1):
                transport, _ = await group.create_connection(
                    Recorder, None, listener.getsockname()[1], happy_eyeballs_delay=0
                )
            transport.close()


@pytest.mark.differs(
    "`happy_eyeballs_delay` that is not a number, with a single address",
    asyncio="not checked",
    here="`TypeError` or `OverflowError`, as with several addresses",
    why="the traceback shows the line with the mistake",
)
@needs_ipv6
@pytest.mark.ours_only
@pytest.mark.parametrize(
    ("delay", "error"), [("soon", TypeError), ([1], TypeError), (10**400, OverflowError)], ids=["str", "list", "huge"]
)
async def test_invalid_happy_eyeballs_delay(stack: Stack, delay: Any, error: type[Exception]) -> None:
    """The error is raised alone, not in the exception group of the racing tasks."""
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            before = open_descriptors()
            with pytest.raises(error):
                await group.create_connection(Recorder, None, listener.getsockname()[1], happy_eyeballs_delay=delay)
            with pytest.raises(error):  # With a single address, too, where there is nothing to wait for.
                await group.create_connection(Recorder, *listener.getsockname(), happy_eyeballs_delay=delay)
            assert open_descriptors() == before


@needs_ipv6
@pytest.mark.parametrize("delay", [float("nan"), float("inf"), -1, True, 1e300], ids=str)
async def test_unusual_but_valid_happy_eyeballs_delay(stack: Stack, delay: float) -> None:
    """Each is a number, and so a valid delay."""
    async with stack.open() as group:
        for host in (HOST, HOST_6):
            with bound(host, backlog=1) as listener:
                await visit(group, listener, None, listener.getsockname()[1], happy_eyeballs_delay=delay)


@pytest.mark.differs(
    "an invalid `local_addr`, with `happy_eyeballs_delay`",
    asyncio="another error is raised instead",
    here="raised, as without a delay",
    why="it is the caller's mistake",
)
@needs_ipv6
@pytest.mark.ours_only
@pytest.mark.parametrize("delay", [None, 0, 0.25])
@pytest.mark.parametrize(
    ("scope", "error"), [((1 << 21, 0), OverflowError), ((0, "lo"), TypeError)], ids=["flow", "scope"]
)
async def test_an_invalid_local_address(
    stack: Stack, scope: tuple[Any, ...], error: type[Exception], delay: float | None
) -> None:
    """It is the caller's mistake, so no other address is tried; it is raised alone."""
    async with stack.open() as group:
        with bound(HOST_6, backlog=1) as listener:
            before = open_descriptors()
            with pytest.raises(error):
                await group.create_connection(
                    Recorder,
                    None,
                    listener.getsockname()[1],
                    local_addr=(HOST_6, 0, *scope),
                    happy_eyeballs_delay=delay,
                )
            assert open_descriptors() == before


# -- local addresses --------------------------------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("host", ["127.0.0.5", b"127.0.0.5"])
async def test_a_local_address(stack: Stack, host: Any) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            info = await visit(group, listener, HOST, listener.getsockname()[1], local_addr=(host, 0))
            assert info["sockname"][0] == "127.0.0.5"
            port = unused_port()
            info = await visit(group, listener, HOST, listener.getsockname()[1], local_addr=("127.0.0.5", port))
            assert info["sockname"] == ("127.0.0.5", port)


@needs_ipv6
async def test_the_local_address_of_the_matching_family_is_used(stack: Stack) -> None:
    """`None` is both loopback addresses."""
    async with stack.open() as group:
        for host in (HOST, HOST_6):
            with bound(host, backlog=1) as listener:
                address = listener.getsockname()
                info = await visit(group, listener, *address[:2], local_addr=(None, 0))
                assert info["sockname"][0] == host
                if host == HOST_6:
                    await visit(group, listener, *address[:2], local_addr=(HOST_6, 0, 0, 0))


@linux_only
@pytest.mark.parametrize("options", [{}, {"happy_eyeballs_delay": 0.01}], ids=str)
async def test_every_local_address_is_tried(
    stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    local = {"here.test": ["127.0.0.5", "::1", "127.0.0.6"]}
    async with stack.open() as group:
        with bound(backlog=1) as listener, bound("127.0.0.5") as taken:
            port = taken.getsockname()[1]
            with names(monkeypatch, local, anyio_backend):
                info = await visit(
                    group, listener, HOST, listener.getsockname()[1], local_addr=("here.test", port), **options
                )
            assert info["sockname"] == ("127.0.0.6", port)


async def test_an_unavailable_local_address(stack: Stack) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            name = listener.getsockname()
            with pytest.raises(OSError, match=rf"bind on address.*'{HOST}', {name[1]}") as caught:
                await group.create_connection(Recorder, *name, local_addr=name)
            assert caught.value.errno == errno.EADDRINUSE


@linux_only
async def test_a_local_address_that_fails_for_every_remote_address(
    stack: Stack, anyio_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a single failure, with its errno."""
    async with stack.open() as group:
        with bound(backlog=1) as listener, names(monkeypatch, {"two.test": ["127.0.0.77", HOST]}, anyio_backend):
            name = listener.getsockname()
            with pytest.raises(OSError, match=rf"bind on address.*'{HOST}', {name[1]}") as caught:
                await group.create_connection(Recorder, "two.test", name[1], local_addr=name)
            assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("local_addr", "error"),
    [((HOST,), ValueError), ((), ValueError), (HOST, TypeError), (5, TypeError), ((HOST, 0, 0, 0, 0), TypeError)],
    ids=str,
)
async def test_malformed_local_address(stack: Stack, local_addr: Any, error: type[Exception]) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener, pytest.raises(error):
            await group.create_connection(Recorder, *listener.getsockname(), local_addr=local_addr)


@needs_ipv6
async def test_no_local_address_of_a_matching_family(stack: Stack) -> None:
    stack.needs_python(3, 12, why="it connects as if there were no local_addr")
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            with pytest.raises(OSError, match="no matching local address"):
                await group.create_connection(Recorder, *listener.getsockname(), local_addr=(HOST_6, 0))


@pytest.mark.ours_only("asyncio has all_errors since Python 3.12")
async def test_all_errors_includes_failures_to_bind(stack: Stack) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener:
            name = listener.getsockname()
            with pytest.raises(ExceptionGroup) as caught:
                await group.create_connection(Recorder, *name, local_addr=name, all_errors=True)
            assert [error.errno for error in leaves(caught.value)] == [errno.EADDRINUSE]  # type: ignore[attr-defined]


# -- adopted sockets --------------------------------------------------------------------------------------------------


def connected_socket(listener: socket.socket) -> socket.socket:
    sock = socket.socket()
    sock.connect(listener.getsockname())
    return sock


async def test_an_adopted_socket(stack: Stack) -> None:
    async with stack.open() as group:
        with bound(backlog=1) as listener, connected_socket(listener) as sock:
            transport, protocol = await group.create_connection(Recorder, sock=sock)
            assert sock.gettimeout() == 0
            assert transport.get_extra_info("socket").fileno() == sock.fileno()
            with Peer(listener.accept()[0]) as peer:
                await peer.send(b"hello")
                assert await protocol.wait_received(5) == b"hello"
                transport.close()
                assert await peer.receive() == b""
            await protocol.wait_for("connection_lost")
            await until(lambda: sock.fileno() == -1)


async def test_an_adopted_unix_socket(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        transport, protocol = await group.create_connection(Recorder, sock=ours)
        transport.write(b"hello")
        with Peer(theirs) as peer:
            assert await peer.receive_exactly(5) == b"hello"
        await protocol.wait_for("connection_lost")


async def test_an_adopted_socket_that_is_not_connected(stack: Stack) -> None:
    """As asyncio: it cannot be distinguished from a connection that the peer has just reset."""
    async with stack.open() as group:
        _, protocol = await group.create_connection(Recorder, sock=socket.socket())
        await protocol.wait_for("connection_lost")
        assert protocol.names == ["connection_made", "connection_lost"]
        assert protocol.transport.get_extra_info("peername") is None
        assert protocol.exception.errno == errno.ENOTCONN


async def test_sockets_that_cannot_be_adopted(stack: Stack) -> None:
    context = ssl.create_default_context()
    async with stack.open() as group:
        with bound(backlog=1) as listener, ExitStack() as sockets:
            datagram = sockets.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            stream = sockets.enter_context(socket.socket())
            tls = sockets.enter_context(context.wrap_socket(socket.socket(), server_hostname="localhost"))
            closed = socket.socket()
            closed.close()
            with pytest.raises(ValueError, match="A Stream Socket was expected, got <socket"):
                await group.create_connection(Recorder, sock=datagram)
            with pytest.raises(ValueError, match="can not be specified at the same time"):
                await group.create_connection(Recorder, *listener.getsockname(), sock=stream)
            with pytest.raises(ValueError, match="can not be specified at the same time"):
                await group.create_connection(Recorder, port=1, sock=stream)
            with pytest.raises(TypeError, match="SSLSocket"):
                await group.create_connection(Recorder, sock=tls)
            with pytest.raises(OSError) as caught:
                await group.create_connection(Recorder, sock=closed)
            assert caught.value.errno == errno.EBADF
            # They still belong to the caller.
            assert -1 not in (datagram.fileno(), stream.fileno(), tls.fileno())


@pytest.mark.differs(
    "an adopted socket, when the call fails or is cancelled",
    asyncio="left open; since 3.14 closed if no transport can be made",
    here="closed, once the arguments have been checked",
    why="a socket has one owner",
)
@pytest.mark.ours_only
async def test_an_adopted_socket_is_closed_whatever_happens(stack: Stack) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        ours, theirs = socket.socketpair()
        with theirs, pytest.raises(ZeroDivisionError):
            await group.create_connection(fail, sock=ours)
        assert ours.fileno() == -1
        ours, theirs = socket.socketpair()
        with theirs, anyio.CancelScope() as scope:
            scope.cancel()
            await group.create_connection(Recorder, sock=ours)
        assert ours.fileno() == -1


@pytest.mark.differs(
    "epoll cannot register one more file descriptor (`ENOSPC`), for a connection or datagram endpoint",
    asyncio="reported, and the connection never receives anything",
    here="raised by the call, and `connection_lost` gets it",
    why="a connection that cannot receive is useless",
)
@linux_only
@pytest.mark.ours_only
@pytest.mark.parametrize("adopted", [False, True])
async def test_epoll_refuses_the_socket(stack: Stack, monkeypatch: pytest.MonkeyPatch, adopted: bool) -> None:
    """ENOSPC of epoll (`max_user_watches`) ends the connection, not the group."""
    failure = OSError(errno.ENOSPC, "as the system would")
    refused = Recorder()

    def full(*_: object) -> None:
        raise failure

    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        with bound(backlog=1) as listener:
            address = listener.getsockname()
            before = open_descriptors()
            with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
                patch.setattr("transports_anyio._selector.EpollSelector.add", full)
                if adopted:
                    await group.create_connection(lambda: refused, sock=connected_socket(listener))
                else:
                    await group.create_connection(lambda: refused, *address)
            assert caught.value is failure
            await refused.wait_for("connection_lost")
            assert refused.names == ["connection_made", "connection_lost"]
            assert refused.exception is failure
            listener.accept()[0].close()
            await until(lambda: open_descriptors() == before)
            assert group.statistics().open_transports == {"StreamTransport": 1}
            await peer.send(b"alive")
            assert await protocol.wait_received(5) == b"alive"
            transport.write(b"answer")
            assert await peer.receive_exactly(6) == b"answer"
            await visit(group, listener, *address)  # epoll accepts file descriptors again.


# -- what goes wrong, and what is set ---------------------------------------------------------------------------------


async def test_neither_an_address_nor_a_socket(stack: Stack) -> None:
    async with stack.open() as group:
        with pytest.raises(ValueError, match="no sock specified"):
            await group.create_connection(Recorder)


@pytest.mark.parametrize(
    ("name", "value", "version"),
    [("server_hostname", "x", (3, 10)), ("ssl_handshake_timeout", 1, (3, 10)), ("ssl_shutdown_timeout", 1, (3, 11))],
)
async def test_tls_parameters_without_ssl(stack: Stack, name: str, value: Any, version: tuple[int, int]) -> None:
    stack.needs_python(*version, why=f"there is no {name}")
    async with stack.open() as group:
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await group.create_connection(Recorder, HOST, 1, **{name: value})


async def test_tls_needs_a_server_name(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        with ours, theirs, pytest.raises(ValueError, match="server_hostname"):
            await group.create_connection(Recorder, sock=ours, ssl=True)


@pytest.mark.differs(
    "a client's protocol factory that raises",
    asyncio="the socket is left to the garbage collector (until 3.14 without TLS too)",
    here="the socket is closed",
    why="nothing leaks",
)
@pytest.mark.ours_only(before=(3, 14, 10))
async def test_a_factory_that_raises(stack: Stack) -> None:
    def fail() -> Any:
        raise ZeroDivisionError

    async with stack.open() as group:
        with bound(backlog=1) as listener:
            with pytest.raises(ZeroDivisionError):
                await group.create_connection(fail, *listener.getsockname())
            with Peer(listener.accept()[0]) as peer:
                assert await peer.receive() == b""


@pytest.mark.ours_only("asyncio has no group")
async def test_a_group_that_ends_while_it_connects(stack: Stack) -> None:
    errors: list[Any] = []

    async def connect(address: Any) -> None:
        try:
            await group.create_connection(Recorder, *address)
        except RuntimeError as exc:
            errors.append(exc)

    with bound(backlog=1) as listener:
        async with anyio.create_task_group() as tasks:
            async with TransportGroup() as group:
                tasks.start_soon(connect, listener.getsockname())
                await anyio.lowlevel.checkpoint()
        assert ["the group is not open any more" in str(error) for error in errors] == [True]


async def test_nagles_algorithm_is_off_on_both_sides(stack: Stack) -> None:
    made: list[Recorder] = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with stack.open() as group:
        server = await group.create_server(factory, HOST, 0)
        _, protocol = await group.create_connection(factory, *server.sockets[0].getsockname())
        await until(lambda: len(made) == 2 and made[0].transport and made[1].transport)
        for protocol in made:
            sock = protocol.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        server.close()


async def test_a_transport_socket_cannot_do_io(stack: Stack) -> None:
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        sock = transport.get_extra_info("socket")
        assert sock.family == socket.AF_INET
        assert sock.type == socket.SOCK_STREAM
        assert sock.proto in (0, socket.IPPROTO_TCP)
        assert sock.gettimeout() == 0
        assert sock.get_inheritable() is False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        sock.settimeout(0)
        sock.setblocking(False)
        with pytest.raises(ValueError):
            sock.settimeout(1)
        with pytest.raises(ValueError):
            sock.setblocking(True)
        if sys.version_info >= (3, 11):  # Python 3.10 still has the deprecated methods.
            for name in ("recv", "recv_into", "recvfrom", "recvmsg", "send", "sendall", "sendto", "sendmsg", "close"):
                assert not hasattr(sock, name), name
            assert not hasattr(sock, "detach")
        peer.close()
        await protocol.wait_for("connection_lost")
        await until(lambda: sock.fileno() == -1)
        with pytest.raises(OSError):
            sock.getpeername()


async def test_a_transport_socket_behaves_as_asyncios(stack: Stack) -> None:
    """It has asyncio's class name, and `shutdown` and `dup` work."""
    async with stack.open() as group, connected(group) as (transport, protocol, peer):
        sock = transport.get_extra_info("socket")
        assert type(sock) is TransportSocket
        with sock.dup() as copy:
            assert copy.getpeername() == peer.socket.getsockname()
        sock.shutdown(socket.SHUT_WR)
        assert await peer.receive() == b""
        await peer.send(b"still received")
        await protocol.wait_received(14)
        transport.write(b"x")
        await protocol.wait_for("connection_lost")
        assert isinstance(protocol.exception, BrokenPipeError)
