"""Child processes and their group: leaving the block, lack of resources, callbacks."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from network import run_main
from support import (
    GUARD,
    Recorder,
    Stack,
    capture_log,
    collect_contexts,
    leaves,
    open_descriptors,
    settle,
    turns,
    until,
)

from transports_anyio import TransportGroup, current_group
from transports_anyio._processes import _anyio as _anyio_child, _popen

if TYPE_CHECKING:
    pass
from process_helpers import Child, Children, gone, own_descriptors

pytestmark = pytest.mark.anyio


@contextlib.contextmanager
def no_more_descriptors(left: int = 0) -> Iterator[None]:
    """Limit the file descriptors that this process may still open to `left`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1 + left, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(2))
        for _ in range(left):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.differs(
    "a child whose transport was never closed",
    asyncio="a `ResourceWarning`, and perhaps an orphan",
    here="killed and reaped when the group ends",
    why="no orphans",
)
async def test_p3_leaving_the_block_kills_running_children(anyio_backend: Any) -> None:
    child = Child()
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(lambda: child, "sleep", "1000")
    assert child.names[-1] == "connection_lost"
    assert transport.get_returncode() == -signal.SIGKILL
    assert gone(transport.get_pid())


@pytest.mark.parametrize("missing", [(), ("pidfd_open",), ("pidfd_open", "waitid")])
@pytest.mark.parametrize("how", ["exception", "cancellation"])
async def test_leaving_by_an_exception_reaps_before_the_block_is_left(
    anyio_backend: Any, how: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)
    children = [Child() for _ in range(10)]
    with anyio.CancelScope() as scope:
        try:
            async with TransportGroup() as group:
                for child in children:
                    transport, _ = await group.subprocess_exec(lambda child=child: child, "cat")
                    transport.get_pipe_transport(0).write(bytes(10 << 20))
                if how == "exception":
                    raise LookupError
                scope.cancel()
                await anyio.sleep_forever()
        except BaseException as error:
            if how == "cancellation":
                raise
            assert [type(leaf) for leaf in leaves(error)] == [LookupError]
    for child in children:
        assert child.names[-1] == "connection_lost"
        assert child.count("process_exited") == 1
        assert gone(child.transport.get_pid())


#: Trace a process without ever waiting for it: when it is killed, its parent does not see its end.
TRACER = """
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
PTRACE_SEIZE = 0x4206
print(libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None), flush=True)
time.sleep(1000)
"""


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Hide the end of a process from its parent until the block is left."""
    command = [sys.executable, "-c", TRACER, str(pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tracer:
        try:
            assert tracer.stdout is not None
            answer = tracer.stdout.readline()
            if answer != b"0\n":
                pytest.skip(f"no process may be traced here: {answer!r}")
            yield
        finally:
            tracer.kill()


needs_tracer = pytest.mark.skipif(sys.platform != "linux", reason="knows how to trace on Linux")


@needs_tracer
@pytest.mark.parametrize("missing", [(), ("pidfd_open",), ("pidfd_open", "waitid")])
@pytest.mark.parametrize("kind", ["program", "AnyIO process"])
async def test_p14_a_child_that_does_not_end_when_it_is_killed(
    anyio_backend: Any, kind: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks run on, and the block is left after a time."""
    if kind == "AnyIO process":
        if missing:
            pytest.skip("AnyIO's own to wait for")
        if anyio_backend != ("asyncio", {"use_uvloop": True}):
            pytest.skip("asyncio and trio wait in the event loop for what the descriptor says has ended")
        process = await anyio.open_process(["cat"])
    for name in missing:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(_popen, "TIME_TO_END", 1.0)
    monkeypatch.setattr(_anyio_child, "TIME_TO_END", 1.0)
    child = Child()
    ticks: list[float] = []
    left: list[float] = []

    async def tick() -> None:
        while True:
            ticks.append(anyio.current_time())
            await anyio.sleep(0.01)

    async def lives_in_a_group(scope: anyio.CancelScope) -> None:
        with scope:
            async with TransportGroup() as group:
                if kind == "program":
                    await group.subprocess_exec(lambda: child, "cat")
                else:
                    await group.connect_process(lambda: child, process)
                await anyio.sleep_forever()
        left.append(anyio.current_time())

    with capture_log(Stack("")) as records:
        async with contextlib.AsyncExitStack() as tracers, anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            tasks.start_soon(lives_in_a_group, scope)
            await until(lambda: child.transport)
            pid = child.transport.get_pid()
            tracers.enter_context(traced(pid))
            tasks.start_soon(tick)
            begin = anyio.current_time()
            scope.cancel()
            await child.end()
            assert anyio.current_time() - begin < 0.5  # `connection_lost` waits for nothing
            await until(lambda: left)
            assert 0.9 < left[0] - begin < GUARD
            # A second in which nothing else ran would be visible as a gap.
            assert max(after - before for before, after in itertools.pairwise(ticks)) < 0.5
            tasks.cancel_scope.cancel()
    assert child.transport.get_returncode() == -signal.SIGKILL
    assert [record.getMessage() for record in records] == [
        f"process {pid} was killed but still runs after 1.0 seconds: the system will reap it"
    ]
    if kind == "program":
        assert child.transport.get_extra_info("subprocess").wait() == -signal.SIGKILL
    else:
        with anyio.fail_after(GUARD):
            assert await process.wait() == -signal.SIGKILL
        await process.aclose()


@pytest.mark.differs(
    "a child that has exited and whose tracer holds it back",
    asyncio="the event loop blocks until it can be reaped",
    here="other tasks run on",
    why="an event loop must not block",
)
@needs_tracer
@pytest.mark.ours_only
@pytest.mark.parametrize("missing", [(), ("pidfd_open",), ("pidfd_open", "waitid")])
async def test_p14_a_child_held_by_a_tracer_does_not_block(
    stack: Stack, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pidfd is ready, but there is nothing to reap yet."""
    for name in missing:
        monkeypatch.delattr(os, name)
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        with traced(transport.get_pid()):
            transport.get_pipe_transport(0).close()
            await until(lambda: 1 in child.lost_pipes())
            begin = time.process_time()
            await anyio.sleep(0.5)
            assert time.process_time() - begin < 0.05
            assert not child.exited.is_set()
        await child.end()
        assert transport.get_returncode() == 0


async def test_p1_cancelled_at_every_checkpoint(anyio_backend: Any) -> None:
    """`subprocess_exec` is cancelled before the spawn or not at all: nothing is half-way."""
    for count in range(4):
        child = Child()
        async with TransportGroup() as group:
            with anyio.CancelScope() as scope:

                async def cancel(count: int = count, scope: anyio.CancelScope = scope) -> None:
                    await turns(count)
                    scope.cancel()

                group.start_soon(cancel)
                await group.subprocess_exec(lambda child=child: child, "sleep", "1000")
        if child.transport is None:
            assert child.names == []
        else:
            assert gone(child.transport.get_pid())
            assert child.names[0] == "connection_made"
            assert child.names[-1] == "connection_lost"


@pytest.mark.needs_polling("a thread waits")
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs descriptors of processes")
async def test_no_thread_waits_for_a_child_with_a_pidfd(anyio_backend: Any) -> None:
    threads = set(threading.enumerate())
    made = [Child() for _ in range(20)]
    async with TransportGroup() as group:
        for child in made:
            await group.subprocess_exec(lambda child=child: child, "cat")
        # Idle threads of earlier tests may end at any time.
        assert threads.issuperset(threading.enumerate())
        assert sum("pidfd" in what for what in open_descriptors().values()) == len(made)
        for child in made:
            child.transport.kill()
        for child in made:
            await child.end()
            assert child.transport.get_returncode() == -signal.SIGKILL
        assert threads.issuperset(threading.enumerate())


WITHOUT_PIDFD = """
import os, signal, sys
for module, name in (os, "pidfd_open"), (signal, "pidfd_send_signal"):
    if hasattr(module, name):
        delattr(module, name)

import anyio
from transports_anyio import *

class Cat(SubprocessProtocol):
    def __init__(self): self.done = anyio.Event()
    def pipe_data_received(self, fd, data): self.transport.terminate()
    def connection_made(self, transport):
        self.transport = transport
        transport.get_pipe_transport(0).write(b"through")
    def connection_lost(self, exc): self.done.set()

async def main():
    with anyio.fail_after(15):
        async with TransportGroup() as group:
            transport, cat = await group.subprocess_exec(Cat, "cat")
            await cat.done.wait()
            print(transport.get_returncode())
"""


async def test_a_python_that_was_built_without_pidfd(anyio_backend: Any) -> None:
    """With old headers both functions are missing, also on Linux. They must be missing at import, hence another
    process."""
    result = await run_main(WITHOUT_PIDFD, anyio_backend, stderr=None)
    assert int(result.stdout) == -signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs descriptors of processes")
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize("how", ["kill", "close", "leave"])
async def test_a_sandbox_without_pidfd_send_signal(
    anyio_backend: Any, how: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    child = Child()
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(lambda: child, "sleep", "1000")
        if how != "leave":
            getattr(transport, how)()
            await child.end()
            with pytest.raises(ProcessLookupError):
                transport.kill()
    assert gone(transport.get_pid())
    assert transport.get_returncode() == -signal.SIGKILL


@contextlib.contextmanager
def full_list(number: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The descriptor that comes after `number` others of its kind is one more than the user may have in epoll."""
    from transports_anyio._selector import EpollSelector

    refused: list[int] = []
    seen: list[int] = []
    add = EpollSelector.add

    def limited(self: EpollSelector, descriptor: int, interest: int) -> None:
        if kind in open_descriptors()[descriptor]:
            seen.append(descriptor)
            if len(seen) == number + 1:
                refused.append(descriptor)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, descriptor, interest)

    with monkeypatch.context() as patch:
        patch.setattr(EpollSelector, "add", limited)
        yield refused


@pytest.mark.needs_polling("epoll is not asked")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is epoll's")
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs descriptors of processes")
async def test_epoll_refuses_the_pidfd(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with TransportGroup() as group:
        descriptors = own_descriptors()
        child = Child()
        with full_list(0, "pidfd", monkeypatch) as refused:
            transport, _ = await group.subprocess_exec(lambda: child, "sh", "-c", "read x; exit 3")
        assert len(refused) == 1
        assert not any("pidfd" in what for what in open_descriptors().values())
        transport.send_signal(0)
        transport.get_pipe_transport(0).write(b"\n")
        await child.end()
        assert transport.get_returncode() == 3
        assert gone(transport.get_pid())
        assert own_descriptors() == descriptors


@pytest.mark.needs_polling("epoll is not asked")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is epoll's")
@pytest.mark.parametrize("missing", [(), ("pidfd_open",)])
@pytest.mark.parametrize("fd", range(3))
async def test_epoll_refuses_a_pipe(
    anyio_backend: Any, fd: int, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would never be read, and its end not noticed: the spawn fails as a whole."""
    for name in missing:
        monkeypatch.delattr(os, name)
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        descriptors = own_descriptors()
        child = Child()
        with full_list(fd, "pipe", monkeypatch) as refused, pytest.raises(OSError, match="No space left") as caught:
            await group.subprocess_exec(lambda: child, "cat")
        assert len(refused) == 1
        assert caught.value.errno == errno.ENOSPC
        assert gone(child.transport.get_pid())
        await child.end()
        assert own_descriptors() == descriptors
        assert contexts == []  # It has been raised.


@pytest.mark.parametrize("waitid", [True, False])
async def test_without_pidfd(anyio_backend: Any, waitid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    if not waitid:  # macOS, before Python 3.13
        monkeypatch.delattr(os, "waitid")
    async with TransportGroup() as group:
        made = [Child() for _ in range(60)]
        for number, child in enumerate(made):
            await group.subprocess_exec(lambda child=child: child, "sh", "-c", f"read x; exit {number}")
        for child in made:
            child.transport.get_pipe_transport(0).write(b"\n")
        for number, child in enumerate(made):
            await child.end()
            assert child.transport.get_returncode() == number
            assert gone(child.transport.get_pid())


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="a thread reaps the child there")
async def test_p11_a_child_that_is_stopped_has_not_ended(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS `waitid` finds it when it is asked for children that have ended: here it is asked for both."""
    waitid = os.waitid
    stops: list[int] = []

    def waitid_of_macos(kind: Any, number: int, options: int) -> Any:
        found = waitid(kind, number, options | (os.WSTOPPED if options & os.WEXITED else 0))
        if found is not None and found.si_code == os.CLD_STOPPED:
            stops.append(number)
        return found

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(os, "waitid", waitid_of_macos)
    async with TransportGroup() as group:
        child = Child()
        await group.subprocess_exec(lambda: child, "cat")
        child.transport.send_signal(signal.SIGSTOP)
        await until(lambda: stops)
        await settle(group)
        assert not child.exited.is_set()
        child.transport.send_signal(signal.SIGCONT)  # Refused, were it taken to have ended.
        child.transport.get_pipe_transport(0).write(b"alive")
        await until(lambda: child.output[1] == b"alive")
        child.transport.get_pipe_transport(0).write_eof()
        await child.end()
        assert child.transport.get_returncode() == 0
        assert gone(child.transport.get_pid())


@pytest.mark.parametrize("missing", [(), ("pidfd_open",), ("pidfd_open", "waitid")])
async def test_the_exit_reaches_a_shielded_task_of_a_cancelled_block(
    anyio_backend: Any, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)
    before, after = Child(), Child()
    with anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            await group.subprocess_exec(lambda: before, "cat")
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await group.subprocess_exec(lambda: after, "cat")
                for child in (before, after):
                    child.transport.get_pipe_transport(0).write_eof()
                    await child.end()
                    assert child.transport.get_returncode() == 0


async def test_no_thread_can_be_started_for_the_child(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system starts no more threads: the exit is noticed all the same, and no other child is reaped."""

    async def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    async with TransportGroup() as group:
        other = Child()
        await group.subprocess_exec(lambda: other, "cat")
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
        for how in ("ends", "is closed"):
            child = Child()
            transport, _ = await group.subprocess_exec(lambda child=child: child, "sh", "-c", "read x; exit 3")
            await turns()
            if how == "ends":
                transport.get_pipe_transport(0).write(b"\n")
            else:
                transport.close()
            await child.end()
            assert transport.get_returncode() == (3 if how == "ends" else -signal.SIGKILL)
            assert gone(transport.get_pid())
        assert not other.exited.is_set()


async def test_no_fd_for_the_pidfd(anyio_backend: Any) -> None:
    """No file descriptor is left: the child is spawned all the same, and a thread waits for it."""
    descriptors = own_descriptors()
    async with TransportGroup() as group:
        child = Child()
        with no_more_descriptors():
            # Without pipes, and without closing what it inherits, a spawn needs no descriptor on any Python.
            transport, _ = await group.subprocess_exec(
                lambda: child, "/bin/sh", "-c", "exit 3", stdin=None, stdout=None, stderr=None, close_fds=False
            )
            await child.end()
        assert transport.get_returncode() == 3
        assert gone(transport.get_pid())
    assert own_descriptors() == descriptors


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Popen of Python 3.10 leaks pipes then")
async def test_no_fds_for_the_pipes(anyio_backend: Any) -> None:
    """At whatever step of the spawn they run out, it fails or succeeds as a whole."""
    results = set()
    async with TransportGroup() as group:
        descriptors = own_descriptors()
        for left in range(12):
            child = Child()
            try:
                with no_more_descriptors(left):
                    await group.subprocess_exec(lambda child=child: child, "true")
            except OSError as exc:
                assert exc.errno == errno.EMFILE
                assert child.names == []
                results.add("refused")
            else:
                await child.end()
                assert child.transport.get_returncode() == 0
                results.add("spawned")
            assert own_descriptors() == descriptors
            with pytest.raises(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222  # it does not wait
    assert results == {"refused", "spawned"}


@pytest.mark.differs(
    "a child's protocol that raises in a callback",
    asyncio="reported, and the child runs on",
    here="reported, the child is killed, and `connection_lost` gets the exception",
    why="one rule for every callback",
)
@pytest.mark.parametrize(
    "callback", ["connection_made", "pipe_data_received", "pipe_connection_lost", "process_exited", "connection_lost"]
)
async def test_a_callback_that_raises_is_reported_and_ends_the_child(anyio_backend: Any, callback: str) -> None:
    class Failing(Child):
        failed = False

    def fail(self: Failing, *args: Any) -> None:
        getattr(Child, callback)(self, *args)
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError(callback)

    setattr(Failing, callback, fail)
    async with TransportGroup() as group:
        contexts = collect_contexts(group)
        child, other = Failing(), Child()
        await group.subprocess_exec(lambda: other, "cat")
        program = "import os, time; os.write(1, b'x'); os.close(2); "
        program += "time.sleep(0 if %r else 999)" % (callback in ("process_exited", "connection_lost"))
        await group.subprocess_exec(lambda: child, sys.executable, "-c", program)
        await child.end()
        await until(lambda: contexts)
        (context,) = contexts
        assert str(context["exception"]) == callback
        assert context["protocol"] is child
        assert context["transport"] is child.transport
        if callback != "connection_lost":
            assert child.calls[-1] == ("connection_lost", context["exception"])
        other.transport.get_pipe_transport(0).write(b"alive")
        await until(lambda: other.output[1] == b"alive")


@pytest.mark.parametrize("kind", ["program", "program without pidfd", "AnyIO process"])
@pytest.mark.parametrize("caught", [False, True])
async def test_system_exit_in_connection_made_propagates(
    anyio_backend: Any, kind: str, caught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "program without pidfd":
        monkeypatch.delattr(os, "pidfd_open")

    class Leaving(Child):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            raise SystemExit(3)

    child = Leaving()

    async def spawn(group: TransportGroup) -> None:
        if kind == "AnyIO process":
            await group.connect_process(lambda: child, await anyio.open_process(["cat"]))
        else:
            await group.subprocess_exec(lambda: child, "cat")

    with anyio.fail_after(GUARD):
        try:
            async with TransportGroup() as group:
                try:
                    await spawn(group)
                except SystemExit:
                    if not caught:
                        raise
        except BaseException as error:
            assert [type(leaf) for leaf in leaves(error)] == [SystemExit]
            assert not caught
        else:
            assert caught
    assert child.count("process_exited") == 1
    assert child.count("pipe_connection_lost") == 3
    assert child.names[-1] == "connection_lost"
    assert gone(child.transport.get_pid())


async def test_the_current_group_in_callbacks(anyio_backend: Any) -> None:
    groups: dict[str, Any] = {}

    class Asking(Child):
        def _record(self, name: str, *args: Any) -> None:
            super()._record(name, *args)
            groups[name] = current_group()

    async with TransportGroup() as group:
        child = Asking()
        await group.subprocess_exec(lambda: child, "echo", "x")
        await child.end()
        assert set(groups.values()) == {group}
        assert len(groups) == 5


async def test_one_context_for_all_callbacks_of_a_child(anyio_backend: Any) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    values: dict[str, str] = {}

    class Asking(Child):
        def _record(self, name: str, *args: Any) -> None:
            super()._record(name, *args)
            if name == "connection_made":
                variable.set("set in connection_made")
            values[name] = variable.get()

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.get_pipe_transport(0).write(bytes(1 << 20))  # More than the pipe takes.

        def resume_writing(self) -> None:
            super().resume_writing()
            self.transport.get_pipe_transport(0).close()

    async with TransportGroup() as group:
        child = Asking()
        await group.subprocess_exec(lambda: child, "cat")
        await child.end()
    assert len(child.output[1]) == 1 << 20
    assert set(values) == {
        "connection_made", "pause_writing", "resume_writing", "pipe_data_received", "pipe_connection_lost",
        "process_exited", "connection_lost",
    }  # fmt: skip
    assert set(values.values()) == {"set in connection_made"}


@pytest.mark.parametrize("kind", ["program", "AnyIO process"])
async def test_the_callbacks_share_the_context_of_the_factory(anyio_backend: Any, kind: str) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    values = set()

    class Asking(Child):
        def __init__(self) -> None:
            super().__init__()
            variable.set("set by the factory")

        def _record(self, name: str, *args: Any) -> None:
            super()._record(name, *args)
            values.add(variable.get())

    async with TransportGroup() as group:
        if kind == "program":
            _, child = await group.subprocess_exec(Asking, "true")
        else:
            _, child = await group.connect_process(Asking, await anyio.open_process(["true"]))
        await child.end()
        assert values == {"set by the factory"}
        assert variable.get() == "unset"


@pytest.mark.differs(
    "`set_protocol` on a child's pipe",
    asyncio="the child's `connection_lost` never comes",
    here="it comes; the pipe's own goes to the new protocol",
    why="exactly one `connection_lost`",
)
async def test_a_pipe_that_was_given_another_protocol(anyio_backend: Any) -> None:
    """The child's protocol gets no more callbacks of that pipe, but all others; asyncio's never gets the end."""
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            child, other = Child(), Recorder()
            transport, _ = await group.subprocess_exec(lambda: child, "cat")
            stdin, stdout = map(transport.get_pipe_transport, range(2))
            stdout.set_protocol(other)
            assert stdout.get_protocol() is other
            other.connection_made(stdout)  # type: ignore[arg-type]
            stdin.write(b"for the other")
            assert await other.wait_received(13) == b"for the other"
            stdin.write_eof()
            await other.wait_for("connection_lost")
            await child.end()
    assert child.output[1] == b""
    assert sorted(child.lost_pipes()) == [0, 2]
    assert transport.get_returncode() == 0


async def test_an_output_of_a_child_sends_no_file(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        with open(tmp_path / "file", "rb") as file:
            for fd in (1, 2):
                with pytest.raises(RuntimeError, match="sendfile is not supported"):
                    await group.sendfile(transport.get_pipe_transport(fd), file)
        transport.get_pipe_transport(0).write(b"goes on")
        await until(lambda: child.output[1] == b"goes on")


@pytest.mark.parametrize("kind", ["program", "AnyIO process"])
async def test_an_output_of_a_child_does_not_write(anyio_backend: Any, kind: str) -> None:
    async with TransportGroup() as group:
        if kind == "program":
            transport, child = await group.subprocess_exec(Child, "cat")
        else:
            transport, child = await group.connect_process(Child, await anyio.open_process(["cat"]))
        for fd in (1, 2):
            output = transport.get_pipe_transport(fd)
            with pytest.raises(NotImplementedError):
                output.write(b"x")
            with pytest.raises(NotImplementedError):
                output.writelines([b"x"])
        transport.get_pipe_transport(0).write(b"goes on")
        await until(lambda: child.output[1] == b"goes on")


async def test_a_factory_that_raises_spawns_nothing(anyio_backend: Any, tmp_path: Path) -> None:
    def factory() -> Any:
        raise LookupError

    async with TransportGroup() as group:
        with pytest.raises(LookupError):
            await group.subprocess_exec(factory, "touch", str(tmp_path / "spawned"))
    assert not (tmp_path / "spawned").exists()


LOW_NUMBERS = """
import os, sys, anyio
from transports_anyio import *

class Cat(SubprocessProtocol):
    def __init__(self): self.done = anyio.Event()
    def connection_made(self, transport):
        stdin = transport.get_pipe_transport(0)
        os.write(2, b"%d" % stdin.get_extra_info("pipe").fileno())
        stdin.write(b"through")
        stdin.write_eof()
    def pipe_data_received(self, fd, data): os.write(2, data)
    def connection_lost(self, exc): self.done.set()

async def main():
    async with TransportGroup() as group:
        os.close(0)
        os.close(1)
        with anyio.fail_after(15):
            await (await group.subprocess_exec(Cat, "cat", stderr=None))[1].done.wait()
        try:
            os.fstat(1)
        except OSError:
            os.write(2, b" closed")
"""


async def test_pipes_with_fds_0_to_2_are_closed_in_the_child(anyio_backend: Any) -> None:
    """In a process whose standard streams are closed; `cat` would never see its end of file."""
    result = await run_main(LOW_NUMBERS, anyio_backend, check=False)
    assert result.stderr == b"1through closed"


async def test_repr_of_a_subprocess_transport(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, child = await group.subprocess_exec(Child, "cat")
        assert f"pid={transport.get_pid()} running" in repr(transport)
        assert "stdin=<WritePipeTransport" in repr(transport)
        transport.close()
        await child.end()
        assert "returncode=-9" in repr(transport)
