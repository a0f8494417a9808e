"""UNIX domain sockets: paths and abstract names, files that are replaced and removed, credentials, other programs."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import ssl
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import Echo, Web, cancelled_after, few_descriptors, run_program
from support import GUARD, Peer, Recorder, Stack, capture_log, open_descriptors, until

from transports_anyio import DatagramProtocol, Protocol, TransportGroup

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no UNIX sockets here")]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="a matter of Linux")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: the path of a UNIX socket may have about a hundred characters."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ta") as name:
        yield Path(name)


def dial(path: Any) -> Peer:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(os.fspath(path))
    except BaseException:
        sock.close()
        raise
    return Peer(sock)


async def echoes(path: Any) -> None:
    with dial(path) as peer:
        await peer.send(b"anybody there?")
        assert await peer.receive_exactly(14) == b"anybody there?"


def is_socket(path: Path) -> bool:
    return path.exists() and stat.S_ISSOCK(path.stat().st_mode)


def listening(path: Any, backlog: int = 5) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.fspath(path))
    sock.listen(backlog)
    return sock


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, os.fsencode, Path], ids=["str", "bytes", "PathLike"])
async def test_forms_of_a_path(stack: Stack, folder: Path, form: Callable[[str], Any]) -> None:
    path = form(str(folder / "socket"))
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, path)
        assert [sock.getsockname() for sock in server.sockets] == [str(folder / "socket")]
        transport, protocol = await group.create_unix_connection(Recorder, path)
        assert transport.get_extra_info("peername") == str(folder / "socket")
        assert transport.get_extra_info("sockname") == ""
        transport.write(b"hello")
        assert await protocol.wait_received(5) == b"hello"
        transport.close()
        await protocol.wait_for("connection_lost")
        server.close()


@linux_only
@pytest.mark.parametrize("form", [str, str.encode], ids=["str", "bytes"])
async def test_abstract_names(stack: Stack, form: Callable[[str], Any]) -> None:
    name = form(f"\0transports_anyio {os.getpid()}")
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, name)
        (sock,) = server.sockets
        assert sock.getsockname() == f"\0transports_anyio {os.getpid()}".encode()
        transport, protocol = await group.create_unix_connection(Recorder, name)
        transport.write(b"hello")
        assert await protocol.wait_received(5) == b"hello"
        transport.close()
        with pytest.raises(OSError, match="already in use") as caught:
            await group.create_unix_server(Echo, name)
        assert caught.value.errno == errno.EADDRINUSE
        server.close()
        with pytest.raises(ConnectionRefusedError):
            await group.create_unix_connection(Recorder, name)


@pytest.mark.differs(
    "an empty path for a UNIX server",
    asyncio="`IndexError`",
    here="passed to the system: Linux chooses an abstract name",
    why="it is valid on Linux",
)
@linux_only
@pytest.mark.ours_only
async def test_the_system_chooses_a_name_for_an_empty_path(stack: Stack) -> None:
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, "")
        name = server.sockets[0].getsockname()
        assert name[0] == 0
        await echoes(name)
        server.close()


async def test_a_path_of_the_wrong_kind(stack: Stack) -> None:
    async with stack.open() as group:
        with pytest.raises(TypeError):
            await group.create_unix_server(Echo, 5)
        with pytest.raises(TypeError):
            await group.create_unix_connection(Echo, 5)


@pytest.mark.differs(
    "errors of `bind` and `connect` for UNIX sockets",
    asyncio="do not name the path",
    here="name the path",
    why="one needs the name to find the cause",
)
@pytest.mark.ours_only
async def test_paths_that_cannot_be_bound(stack: Stack, folder: Path) -> None:
    async with stack.open() as group:
        before = open_descriptors()
        for path in (folder / "missing" / "socket", folder / ("long" * 50)):
            with pytest.raises(OSError, match=f"bind on address '{path}'"):
                await group.create_unix_server(Echo, path)
        (folder / "file").touch()
        with capture_log(stack) as records:
            with pytest.raises(NotADirectoryError, match="file/socket"):
                await group.create_unix_server(Echo, folder / "file" / "socket")
        assert [record.levelname for record in records] == ["ERROR"]
        assert open_descriptors() == before


async def test_a_path_that_is_too_long(stack: Stack, folder: Path) -> None:
    """Python raises it, not the system: the error has no errno, and its message does not mention one."""
    path = str(folder / ("long" * 50))
    async with stack.open() as group:
        for function, options in (
            (group.create_unix_server, {"path": path}),
            (group.create_unix_connection, {"path": path}),
            (group.create_datagram_endpoint, {"family": socket.AF_UNIX, "local_addr": path}),
            (group.create_datagram_endpoint, {"family": socket.AF_UNIX, "remote_addr": path}),
        ):
            with pytest.raises(OSError, match="AF_UNIX path too long") as caught:
                await function(Recorder, **options)
            assert caught.value.errno is None
            assert "None" not in str(caught.value)
            assert stack.is_oracle or path in str(caught.value)


# -- existing files, and files that are left --------------------------------------------------------------------


async def test_a_stale_socket_is_replaced(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    listening(path).close()
    assert is_socket(path)
    async with stack.open() as group:
        with pytest.raises(ConnectionRefusedError):
            await group.create_unix_connection(Recorder, path)
        server = await group.create_unix_server(Echo, path)
        await echoes(path)
        server.close()


async def test_any_other_file_is_an_error(stack: Stack, folder: Path) -> None:
    (folder / "file").write_text("precious")
    (folder / "folder").mkdir()
    async with stack.open() as group:
        for path in (folder / "file", folder / "folder"):
            with pytest.raises(OSError, match=f"'{path}' is already in use") as caught:
                await group.create_unix_server(Echo, str(path))
            assert caught.value.errno == errno.EADDRINUSE
    assert (folder / "file").read_text() == "precious"
    assert (folder / "folder").is_dir()


async def test_the_file_is_removed_with_the_server(stack: Stack, folder: Path) -> None:
    stack.needs_python(3, 13, why="it leaves the file")
    path = folder / "socket"
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, path, start_serving=False)
        assert is_socket(path)
        server.close()
        assert not path.exists()
        server.close()


@pytest.mark.ours_only("asyncio has no group")
@pytest.mark.parametrize("how", ["normally", "by an exception"])
async def test_the_file_is_removed_when_the_block_is_left(stack: Stack, folder: Path, how: str) -> None:
    path = folder / "socket"
    try:
        async with TransportGroup() as group:
            await group.create_unix_server(Echo, path)
            assert is_socket(path)
            if how != "normally":
                raise ZeroDivisionError
    except BaseException:
        assert how != "normally"
    assert not path.exists()


@pytest.mark.ours_only("asyncio has no group")
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["stream", "datagram"])
async def test_a_group_that_ends_during_create_server_touches_no_file(
    stack: Stack, folder: Path, kind: int, stale: bool
) -> None:
    """The group ends at each iteration until the socket would exist."""

    def look() -> Any:
        return (path.stat().st_ino, path.stat().st_ctime_ns) if path.exists() else None

    async def bind() -> None:
        try:
            if kind == socket.SOCK_STREAM:
                await group.create_unix_server(Echo, path)
            else:
                await group.create_datagram_endpoint(DatagramProtocol, str(path), family=socket.AF_UNIX)
        except RuntimeError as exc:
            assert "the group is not open any more" in str(exc)  # and not as an error of another kind
            assert look() == before
            outcomes.append("too late")
        else:
            outcomes.append("in time")

    outcomes: list[str] = []
    for checkpoints in range(6):
        path = folder / str(checkpoints)
        if stale:
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.bind(str(path))
        before = look()
        async with anyio.create_task_group() as tasks:
            async with TransportGroup() as group:
                tasks.start_soon(bind)
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
        if outcomes[-1] == "too late":
            assert look() == before
    assert set(outcomes) == {"too late", "in time"}


async def test_cleanup_socket_false_leaves_the_file(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    async with stack.open() as group:
        if stack.is_oracle and sys.version_info < (3, 13):
            server = await group.create_unix_server(Echo, path)
        else:
            server = await group.create_unix_server(Echo, path, cleanup_socket=False)
        server.close()
    assert is_socket(path)


async def test_s8_two_servers_in_turn_on_one_path(stack: Stack, folder: Path) -> None:
    """Each server removes its own file, and never its successor's."""
    stack.needs_python(3, 13, why="it leaves the file")
    path = folder / "socket"
    async with stack.open() as group:
        first = await group.create_unix_server(Echo, path)
        second = await group.create_unix_server(Echo, path)
        first.close()
        await echoes(path)
        second.close()
        assert not path.exists()


async def test_s8_a_file_that_replaced_the_socket_is_not_removed(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, path)
        path.unlink()
        path.write_text("precious")
        server.close()
        assert path.read_text() == "precious"
        path.unlink()
        server = await group.create_unix_server(Echo, path)
        path.unlink()
        server.close()  # No file, no report.


@pytest.mark.differs(
    "a relative path for a UNIX server, when the working directory changes later",
    asyncio="another file is looked at",
    here="the server's own file is removed",
    why="the server knows its file",
)
@pytest.mark.ours_only
async def test_a_relative_path_and_another_working_directory(
    stack: Stack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, "socket")
        assert is_socket(folder / "socket")
        monkeypatch.chdir(folder / "elsewhere")
        server.close()
        assert not (folder / "socket").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is kept out by nothing but this")
@pytest.mark.ours_only("asyncio logs this in other words")
async def test_a_file_that_cannot_be_removed(stack: Stack, folder: Path) -> None:
    """The folder turns into a file: the removal fails, and that is reported."""
    path = folder / "within" / "socket"
    path.parent.mkdir()
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, path)
        shutil.rmtree(path.parent)
        path.parent.touch()
        with capture_log(stack) as records:
            server.close()
        assert [record.levelname for record in records] == ["ERROR"]
        assert str(path) in records[0].getMessage()


# -- adopted sockets --------------------------------------------------------------------------------------------------


async def test_an_adopted_listener(stack: Stack, folder: Path) -> None:
    stack.needs_python(3, 13, why="it leaves the file")
    path = folder / "socket"
    async with stack.open() as group:
        for cleanup in (True, False):
            with listening(path) as sock:
                server = await group.create_unix_server(Echo, sock=sock, cleanup_socket=cleanup)
                assert sock.gettimeout() == 0
                await echoes(path)
                server.close()
                await until(lambda: sock.fileno() == -1)
            assert path.exists() is not cleanup


async def test_an_adopted_listener_without_a_file(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    async with stack.open() as group:
        with listening(path) as sock:
            path.unlink()
            server = await group.create_unix_server(Echo, sock=sock)
            server.close()


async def test_an_adopted_connection(stack: Stack) -> None:
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        transport, protocol = await group.create_unix_connection(Recorder, sock=ours)
        transport.write(b"hello")
        with Peer(theirs) as peer:
            assert await peer.receive_exactly(5) == b"hello"
        await protocol.wait_for("connection_lost")


async def test_sockets_that_cannot_be_adopted(stack: Stack, folder: Path) -> None:
    async with stack.open() as group:
        with ExitStack() as sockets:
            stream = sockets.enter_context(socket.socket(socket.AF_UNIX))
            for bad in (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.socket(socket.AF_INET)):
                sockets.enter_context(bad)
                for function in (group.create_unix_connection, group.create_unix_server):
                    with pytest.raises(ValueError, match="A UNIX Domain Stream Socket was expected, got <socket"):
                        await function(Recorder, sock=bad)
            for function in (group.create_unix_connection, group.create_unix_server):
                with pytest.raises(ValueError, match="can not be specified at the same time"):
                    await function(Recorder, folder / "socket", sock=stream)
                with pytest.raises(ValueError, match=r"no (path and )?sock"):
                    await function(Recorder)
            assert stream.fileno() != -1


@pytest.mark.differs(
    "a TLS socket as `sock` of a UNIX connection",
    asyncio="accepted",
    here="`TypeError`",
    why="as for TCP",
)
@pytest.mark.ours_only
async def test_a_tls_socket_cannot_be_adopted(stack: Stack) -> None:
    context = ssl.create_default_context()
    ours, theirs = socket.socketpair()
    async with stack.open() as group:
        with theirs, context.wrap_socket(ours, server_hostname="x", do_handshake_on_connect=False) as tls:
            for function in (group.create_unix_connection, group.create_unix_server):
                with pytest.raises(TypeError, match="SSLSocket"):
                    await function(Recorder, sock=tls)


async def test_parameters_of_tls(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    timeouts = ["ssl_handshake_timeout"]
    if not stack.is_oracle or sys.version_info >= (3, 11):
        timeouts.append("ssl_shutdown_timeout")
    async with stack.open() as group:
        for function in (group.create_unix_connection, group.create_unix_server):
            for name in timeouts:
                with pytest.raises(ValueError, match="only meaningful with ssl"):
                    await function(Recorder, path, **{name: 1})
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await group.create_unix_connection(Recorder, path, server_hostname="x")
        with pytest.raises(ValueError, match="server_hostname"):
            await group.create_unix_connection(Recorder, path, ssl=ssl.create_default_context())
        with pytest.raises(TypeError, match="ssl argument must be an SSLContext or None"):
            await group.create_unix_server(Recorder, path, ssl=True)
        assert not path.exists()


# -- connecting -------------------------------------------------------------------------------------------------------


async def test_a_path_without_a_listener(stack: Stack, folder: Path) -> None:
    async with stack.open() as group:
        with pytest.raises(FileNotFoundError) as caught:
            await group.create_unix_connection(Recorder, folder / "missing")
        if not stack.is_oracle:
            assert str(folder / "missing") in str(caught.value)


@pytest.mark.differs(
    "connecting when the backlog of a UNIX server is full",
    asyncio="returns a transport that is not connected",
    here="`BlockingIOError`",
    why="Linux does not retry by itself (`connect(2)`, `EAGAIN`)",
)
@linux_only
@pytest.mark.ours_only
async def test_a_full_backlog_is_an_error(stack: Stack, folder: Path) -> None:
    """There is nothing to wait for: the system does not retry."""
    path = folder / "socket"
    async with stack.open() as group:
        with listening(path, backlog=0), dial(path):
            with pytest.raises(BlockingIOError, match=str(path)):
                await group.create_unix_connection(Recorder, path)


@pytest.mark.ours_only("asyncio of older Pythons leaks sockets")
async def test_cancelled_at_every_checkpoint(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    connection: Any = None
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, path)
        for checkpoints in range(10):
            connection = None
            before = set(open_descriptors())
            async with cancelled_after(checkpoints):
                connection = await group.create_unix_connection(Recorder, path)
            if connection is not None:
                connection[0].abort()
                await connection[1].wait_for("connection_lost")
            server.abort_clients()
            await until(lambda: set(open_descriptors()) <= before)  # noqa: B023
            other: Any = None
            async with cancelled_after(checkpoints):
                other = await group.create_unix_server(Echo, folder / "other")
            if other is not None:
                other.close()
            assert not (folder / "other").exists()
        server.close()
    assert connection is not None


async def test_no_fd_for_the_socket(stack: Stack, folder: Path) -> None:
    async with stack.open() as group:
        for function in (group.create_unix_connection, group.create_unix_server):
            with few_descriptors(), pytest.raises(OSError) as caught:
                await function(Recorder, folder / "socket")
            assert caught.value.errno == errno.EMFILE


@linux_only
async def test_peer_credentials(stack: Stack, folder: Path) -> None:
    made = []

    def factory() -> Recorder:
        made.append(Recorder())
        return made[-1]

    async with stack.open() as group:
        server = await group.create_unix_server(factory, folder / "socket")
        with dial(folder / "socket"):
            await until(lambda: made and made[0].transport)
            sock = made[0].transport.get_extra_info("socket")
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            assert struct.unpack("3i", credentials) == (os.getpid(), os.getuid(), os.getgid())
        server.close()


@pytest.mark.ours_only("asyncio has another event loop there")
async def test_a_platform_without_unix_sockets(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stack.open() as group:
        with monkeypatch.context() as patch:
            patch.delattr(socket, "AF_UNIX")
            for function in (group.create_unix_connection, group.create_unix_server):
                with pytest.raises(NotImplementedError):
                    await function(Recorder, "path")


# -- other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl(stack: Stack, folder: Path) -> None:
    path = str(folder / "socket")
    async with stack.open() as group:
        server = await group.create_unix_server(Web, path)
        command = ["curl", "-sS", "--noproxy", "*", "--unix-socket", path, "http://localhost/index.html"]
        assert await run_program(*command) == b"GET /index.html HTTP/1.1"
        server.close()


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc")
async def test_nc(stack: Stack, folder: Path) -> None:
    path = str(folder / "socket")
    async with stack.open() as group:
        server = await group.create_unix_server(Echo, path)
        assert await run_program("nc", "-N", "-U", path, stdin=b"x" * 100_000) == b"x" * 100_000
        server.close()


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc")
async def test_nc_as_the_server(stack: Stack, folder: Path) -> None:
    path = folder / "socket"
    async with stack.open() as group:
        process = await anyio.open_process(["nc", "-l", "-U", str(path)])
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            await until(lambda: is_socket(path))
            with anyio.fail_after(GUARD):
                while True:  # The file exists a moment before the socket listens.
                    try:
                        transport, protocol = await group.create_unix_connection(Recorder, path)
                        break
                    except ConnectionRefusedError:
                        await anyio.sleep(0.001)
                transport.write(b"hello")
                assert await process.stdout.receive() == b"hello"
                await process.stdin.send(b"world")
            assert await protocol.wait_received(5) == b"world"
            transport.close()
            await protocol.wait_for("connection_lost")
        finally:
            with anyio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.wait()
                await process.aclose()


@pytest.mark.ours_only("the test looks for leaks of ours")
async def test_thousands_of_connections_leave_no_descriptor(stack: Stack, folder: Path) -> None:
    lost = []

    class Counted(Protocol):
        def connection_lost(self, exc: BaseException | None) -> None:
            lost.append(exc)

    async def visit() -> None:
        transport, _ = await group.create_unix_connection(Counted, path)
        transport.close()

    path = folder / "socket"
    async with TransportGroup() as group:
        server = await group.create_unix_server(Counted, path, backlog=200)
        before = open_descriptors()
        for _ in range(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(100):
                    tasks.start_soon(visit)
        await until(lambda: len(lost) == 4_000)
        assert open_descriptors() == before
        server.close()
