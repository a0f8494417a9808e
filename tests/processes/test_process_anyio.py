"""`connect_process`: AnyIO's processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from support import (
    GUARD,
    Recorder,
    collect_contexts,
    leaves,
    pattern,
    turns,
    until,
)

from transports_anyio import TransportGroup

if TYPE_CHECKING:
    pass
from process_helpers import Child, gone, own_descriptors

pytestmark = pytest.mark.anyio


ANYIO = tuple(map(int, version("anyio").split(".")[:2]))


async def test_an_anyio_process(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        process = await anyio.open_process(["cat"])
        transport, child = await group.connect_process(Child, process)
        assert transport.get_extra_info("subprocess") is process
        assert transport.get_pid() == process.pid
        data = pattern(1 << 20)
        transport.get_pipe_transport(0).write(data)
        transport.get_pipe_transport(0).write_eof()
        await child.end()
        assert child.output[1] == data
        assert transport.get_returncode() == 0


async def test_an_anyio_process_in_use_by_another_transport(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        process = await anyio.open_process(["cat"])
        transport, child = await group.connect_process(Child, process)
        second = Child()
        with pytest.raises(RuntimeError, match="is already in use by another transport"):
            await group.connect_process(lambda: second, process)
        for stream in (process.stdin, process.stdout, process.stderr):
            with pytest.raises(RuntimeError, match="is already in use by another transport"):
                await group.connect_stream(Recorder, stream)  # type: ignore[arg-type]
        transport.get_pipe_transport(0).write(b"data")
        transport.get_pipe_transport(0).write_eof()
        await child.end()
        assert child.output[1] == b"data"
        assert second.calls == []


async def test_an_anyio_process_with_a_pipe_in_use(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        process = await anyio.open_process(["cat"])
        _, reader = await group.connect_stream(Recorder, process.stdout)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="is already in use by another transport"):
            await group.connect_process(Child, process)
        await process.stdin.send(b"data")
        await reader.wait_received(4)
        await process.aclose()


async def test_an_anyio_process_with_pipes_of_its_own(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        with tempfile.TemporaryFile() as target:
            process = await anyio.open_process(["sh", "-c", "echo x"], stdin=None, stdout=target, stderr=None)
            transport, child = await group.connect_process(Child, process)
            await child.end()
            assert [transport.get_pipe_transport(fd) for fd in range(3)] == [None] * 3
            target.seek(0)
            assert target.read() == b"x\n"


async def test_an_anyio_process_is_signalled_and_closed(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, child = await group.connect_process(Child, await anyio.open_process(["sleep", "1000"]))
        transport.send_signal(signal.SIGTERM)
        await child.end()
        assert transport.get_returncode() == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            transport.kill()
        transport, child = await group.connect_process(Child, await anyio.open_process(["sleep", "1000"]))
        transport.close()
        await child.end()
        assert transport.get_returncode() == -signal.SIGKILL


@pytest.mark.parametrize("number", [0, signal.SIGRTMIN + 1])
async def test_every_signal_reaches_an_anyio_process(anyio_backend: Any, number: int) -> None:
    async with TransportGroup() as group:
        transport, child = await group.connect_process(Child, await anyio.open_process(["cat"]))
        transport.send_signal(number)
        if not number:
            transport.get_pipe_transport(0).close()
        await child.end()
        assert transport.get_returncode() == -number


@contextlib.asynccontextmanager
async def about_to_exit(status: int) -> AsyncIterator[tuple[anyio.abc.Process, Callable[[], None]]]:
    """Yield an AnyIO process, and a function that blocks until it has ended: the backend does not run in between."""
    read, write = os.pipe()

    def end() -> None:
        os.write(write, b"\n")
        # On Pythons before 3.12 a thread of asyncio's waits for the child, and may have been faster.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    try:
        process = await anyio.open_process(["sh", "-c", f"read x; exit {status}"], stdin=read)
        yield process, end
    finally:
        os.close(read)
        os.close(write)


async def test_an_anyio_process_with_an_unnoticed_exit(anyio_backend: Any) -> None:
    child = Child()
    with pytest.raises(BaseException) as caught:
        async with about_to_exit(3) as (process, end), TransportGroup() as group:
            transport, _ = await group.connect_process(lambda: child, process)
            end()
            with pytest.raises(ProcessLookupError):
                transport.send_signal(signal.SIGTERM)
            raise LookupError
    assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
    assert child.names[-1] == "connection_lost"
    # If such a thread has reaped it, the status is unknown until asyncio runs.
    assert transport.get_returncode() in ({3} if sys.version_info >= (3, 12) else {3, 255})
    assert gone(process.pid)


# uvloop keeps what it has of such a process until its loop is closed, and warns of it then.
@pytest.mark.filterwarnings("ignore:unclosed resource <UVProcessTransport:ResourceWarning")
async def test_an_anyio_process_reaped_by_other_code(anyio_backend: Any) -> None:
    """uvloop then never notices its end: leaving the group must not wait for that."""
    child = Child()
    with pytest.raises(BaseException) as caught, anyio.fail_after(GUARD):
        async with about_to_exit(3) as (process, end), TransportGroup() as group:
            transport, _ = await group.connect_process(lambda: child, process)
            end()
            with contextlib.suppress(ChildProcessError):  # A thread of asyncio's may have been faster.
                os.waitpid(process.pid, 0)  # noqa: ASYNC222  # it has ended
            with pytest.raises(ProcessLookupError):
                transport.send_signal(signal.SIGTERM)
            raise LookupError
    assert [type(leaf) for leaf in leaves(caught.value)] == [LookupError]
    assert child.names[-1] == "connection_lost"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="asyncio has no such thread")
async def test_an_anyio_process_reaped_by_asyncios_thread(anyio_backend: Any) -> None:
    if anyio_backend != ("asyncio", {"use_uvloop": False}):
        pytest.skip("only asyncio has such a thread")
    async with about_to_exit(3) as (process, end), TransportGroup() as group:
        transport, child = await group.connect_process(Child, process)
        end()
        with pytest.raises(ChildProcessError):
            while True:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # noqa: ASYNC222
                time.sleep(0.001)  # noqa: ASYNC251  # asyncio must not run
        with pytest.raises(ProcessLookupError):
            transport.send_signal(signal.SIGTERM)
        transport.close()
        await child.end()
        assert transport.get_returncode() == 3


@pytest.mark.skipif(ANYIO < (4, 15), reason="AnyIO of before 4.15 leaves them to the garbage collector on asyncio")
@pytest.mark.parametrize("how", ["normally", "cancellation"])
async def test_a_grandchild_that_keeps_the_outputs_of_an_anyio_process(anyio_backend: Any, how: str) -> None:
    """Their end of file never comes: the file descriptors are closed at the end of the block all the same."""
    descriptors = own_descriptors()
    with anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            process = await anyio.open_process(["sh", "-c", "sleep 1000 & echo $!; exit 4"])
            transport, child = await group.connect_process(Child, process)
            await until(lambda: child.exited.is_set() and child.output[1].endswith(b"\n"))
            assert 1 not in child.lost_pipes()
            if how == "cancellation":
                scope.cancel()
                await anyio.sleep_forever()
    try:
        assert own_descriptors() == descriptors
        assert transport.get_returncode() == 4
        assert child.names[-1] == "connection_lost"
        assert child.count("pipe_connection_lost") == 3
    finally:
        os.kill(int(child.output[1]), signal.SIGKILL)


#: Write much to one output, with or without a reader, and then report on the other.
WRITES_ON = """
import os, sys
fd = int(sys.argv[1])
try:
    for _ in range(64):
        os.write(fd, bytes(65536))
except BrokenPipeError:
    pass
os.write(3 - fd, b"written")
assert sys.stdin.buffer.read() == b"input"
sys.exit(7)
"""


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("fd", [1, 2])
@pytest.mark.parametrize("kind", ["program", "AnyIO process"])
async def test_a2_a_child_does_not_block_on_an_output_that_is_closed(
    anyio_backend: Any, kind: str, fd: int, end: str
) -> None:
    """The other pipes go on."""
    descriptors = own_descriptors()
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        command = [sys.executable, "-c", WRITES_ON, str(fd)]
        if kind == "program":
            transport, child = await group.subprocess_exec(Child, *command)
        else:
            transport, child = await group.connect_process(Child, await anyio.open_process(command))
        await until(lambda: child.output[fd])
        getattr(transport.get_pipe_transport(fd), end)()
        received = len(child.output[fd])
        await until(lambda: child.output[3 - fd] == b"written")
        transport.get_pipe_transport(0).write(b"input")
        transport.get_pipe_transport(0).write_eof()
        await child.end()
        assert transport.get_returncode() == 7
        assert len(child.output[fd]) == received  # no callback after `close`
        assert contexts == []
    assert own_descriptors() == descriptors


@pytest.mark.differs(
    "`connect_process` on asyncio and uvloop: the child writes to an output whose transport is closed",
    asyncio="the child gets `SIGPIPE` (with `subprocess_exec`)",
    here="the data is dropped; on trio, and with `subprocess_exec` everywhere, the child gets `SIGPIPE`",
    why="AnyIO closes the pipes of a process together",
)
async def test_a2_writing_to_a_closed_output(anyio_backend: Any) -> None:
    """A signal ends the child where AnyIO can close one descriptor alone, which is not on asyncio and uvloop."""
    async with TransportGroup() as group:
        for process in None, await anyio.open_process(["yes"]):
            if process is None:
                transport, child = await group.subprocess_exec(Child, "yes")
            else:
                transport, child = await group.connect_process(Child, process)
            await until(lambda child=child: child.output[1])
            transport.get_pipe_transport(1).close()
            if process is not None and anyio_backend[0] == "asyncio":
                with anyio.move_on_after(0.1):
                    await child.exited.wait()
                assert not child.exited.is_set()
                transport.close()
                await child.end()
                assert transport.get_returncode() == -signal.SIGKILL
            else:
                with anyio.fail_after(GUARD):
                    await child.exited.wait()
                transport.close()
                await child.end()
                assert transport.get_returncode() == -signal.SIGPIPE


@pytest.mark.skipif(ANYIO < (4, 15), reason="AnyIO of before 4.15 leaves them to the garbage collector on asyncio")
@pytest.mark.parametrize("how", ["normally", "cancellation"])
async def test_a2_a_grandchild_that_keeps_a_closed_output(anyio_backend: Any, how: str) -> None:
    """The discarded output has no end: the end of the child is enough."""
    descriptors = own_descriptors()
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            process = await anyio.open_process(["sh", "-c", "sleep 1000 & echo $!; exit 4"])
            transport, child = await group.connect_process(Child, process)
            await until(lambda: child.exited.is_set() and child.output[1].endswith(b"\n"))
            transport.get_pipe_transport(1).close()
            transport.get_pipe_transport(2).close()
            await child.end()
            await turns(10)
            if how == "cancellation":
                scope.cancel()
                await anyio.sleep_forever()
    try:
        assert own_descriptors() == descriptors
        assert transport.get_returncode() == 4
    finally:
        os.kill(int(child.output[1]), signal.SIGKILL)


async def test_cancelling_the_group_reaps_an_anyio_process(anyio_backend: Any) -> None:
    child = Child()
    with anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            process = await anyio.open_process(["cat"])
            transport, _ = await group.connect_process(lambda: child, process)
            transport.get_pipe_transport(0).write(bytes(10 << 20))
            scope.cancel()
            await anyio.sleep_forever()
    assert child.names[-1] == "connection_lost"
    assert process.returncode == -signal.SIGKILL
    assert gone(process.pid)
