"""Child processes: signals, the exit, grandchildren, and reaping."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from support import (
    GUARD,
    Stack,
    collect_contexts,
    settle,
    until,
)

from transports_anyio import TransportGroup, _capabilities

if TYPE_CHECKING:
    pass
from process_helpers import Child, Children, own_descriptors

pytestmark = pytest.mark.anyio


async def test_signals(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        for send, number in (
            (lambda transport: transport.terminate(), signal.SIGTERM),
            (lambda transport: transport.kill(), signal.SIGKILL),
            (lambda transport: transport.send_signal(signal.SIGUSR1), signal.SIGUSR1),
        ):
            transport, child = await children.exec("sleep", "1000")
            send(transport)
            await child.end()
            assert transport.get_returncode() == -number


async def test_signals_after_the_end(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("true")
        await child.end()
        for send in (transport.terminate, transport.kill, lambda: transport.send_signal(signal.SIGINT)):
            with pytest.raises(ProcessLookupError):
                send()


@pytest.mark.differs("`send_signal` when the child has exited and this is not yet noticed")
@pytest.mark.ours_only
@pytest.mark.parametrize("reaped", ["not yet", "by somebody else"])
@pytest.mark.parametrize("missing", [(), ("pidfd_open",)])
async def test_signals_after_an_unnoticed_exit(
    stack: Stack, reaped: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        pid = transport.get_pid()
        # Without a checkpoint: the group does not run before the signal.
        os.kill(pid, signal.SIGKILL)
        if reaped == "not yet":
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
        else:
            os.waitpid(pid, 0)  # noqa: ASYNC222
        with pytest.raises(ProcessLookupError):
            transport.send_signal(signal.SIGINT)
        assert transport.get_returncode() is None  # until the protocol has been notified
        await child.end()
        assert transport.get_returncode() == (-signal.SIGKILL if reaped == "not yet" else 255)


async def test_a_child_that_ignores_sigterm(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        program += "; print('deaf', flush=True); time.sleep(999)"
        transport, child = await children.python(program)
        await until(lambda: child.output[1] == b"deaf\n")
        transport.terminate()
        transport.close()
        await child.end()
        assert transport.get_returncode() == -signal.SIGKILL


async def test_a_child_that_is_killed_from_outside(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("sleep", "1000")
        os.kill(transport.get_pid(), signal.SIGUSR1)
        await child.end()
        assert transport.get_returncode() == -signal.SIGUSR1


async def test_close_kills_and_closes_the_pipes(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("sleep", "1000")
        assert not transport.is_closing()
        transport.close()
        transport.close()
        assert transport.is_closing()
        await child.end()
        assert transport.get_returncode() == -signal.SIGKILL
        assert child.exception is None


async def test_a_child_that_closes_its_output_early(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        _, child = await children.python("import os, sys; os.close(1); sys.stdin.read()")
        await until(lambda: 1 in child.lost_pipes())
        assert "process_exited" not in child.names


async def test_p10_a_child_that_closes_its_input(stack: Stack) -> None:
    class Counting(Child):
        def __init__(self) -> None:
            super().__init__()
            self.errors: dict[int, Any] = {}

        def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
            super().pipe_connection_lost(fd, exc)
            self.errors[fd] = exc

    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec(
            sys.executable, "-c", "import os, time; os.close(0); print('x', flush=True); time.sleep(999)",
            protocol=Counting(),
        )  # fmt: skip
        stdin = transport.get_pipe_transport(0)
        stdin.write(bytes(1 << 20))  # more than the pipe takes: the rest waits
        await until(lambda: 0 in child.errors)
        assert isinstance(child.errors[0], BrokenPipeError)
        for _ in range(3):
            stdin.write(b"more")  # dropped, and nothing is raised


async def test_p2_a_grandchild_that_keeps_the_pipes_does_not_hide_the_exit(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("sh", "-c", "sleep 1000 & echo $!")
        await until(lambda: "process_exited" in child.names)
        await until(lambda: child.output[1])
        assert 1 not in child.lost_pipes()
        assert "connection_lost" not in child.names
        transport.close()
        await child.end()
        os.kill(int(child.output[1]), signal.SIGKILL)


#: Starts a grandchild that has all three pipes, never reads, and outlives its parent.
WITH_GRANDCHILD = """
import subprocess, sys, time
print(subprocess.Popen(["sleep", "1000"]).pid, flush=True)
"""


@contextlib.asynccontextmanager
async def with_grandchild(group: Any, kind: str, program: str) -> AsyncIterator[tuple[Any, Child]]:
    """Yield a child whose grandchild keeps its pipes, with more data written than the pipe holds."""
    command = [sys.executable, "-c", WITH_GRANDCHILD + program]
    child = Child()
    if kind == "program":
        transport, _ = await group.subprocess_exec(lambda: child, *command)
    else:
        transport, _ = await group.connect_process(lambda: child, await anyio.open_process(command))
    try:
        await until(lambda: child.output[1].endswith(b"\n"))
        transport.get_pipe_transport(0).write(bytes(4 << 20))
        yield transport, child
    finally:
        os.kill(int(child.output[1]), signal.SIGKILL)  # Raises if the grandchild has not kept the pipes until now.


@pytest.mark.differs(
    "a child that has ended, when its standard input has a buffer to flush",
    asyncio="after `close`, waits for a grandchild that inherited the pipe",
    here="the buffer is dropped",
    why="a grandchild may never read",
)
@pytest.mark.ours_only
@pytest.mark.parametrize("when", ["closed while it runs", "closed after its end", "closed in process_exited"])
@pytest.mark.parametrize("kind", ["program", "AnyIO process"])
async def test_p12_a_grandchild_that_keeps_stdin_is_not_waited_for(stack: Stack, kind: str, when: str) -> None:
    program = "" if when == "closed after its end" else "time.sleep(1000)"
    descriptors = own_descriptors()
    async with stack.open() as group, with_grandchild(group, kind, program) as (transport, child):
        contexts = collect_contexts(group)
        if when == "closed in process_exited":

            def close() -> None:
                Child.process_exited(child)
                transport.close()

            child.process_exited = close  # type: ignore[method-assign]
            transport.terminate()
        elif when == "closed after its end":
            with anyio.fail_after(GUARD):
                await child.exited.wait()
            await settle(group)
            assert "connection_lost" not in child.names
            transport.close()
        else:
            transport.close()
        await child.end()
        assert child.count("pipe_connection_lost") == 3
        assert contexts == []
    # asyncio and uvloop keep the pipe of an AnyIO process until the grandchild has gone: AnyIO only closes it.
    await until(lambda: own_descriptors() == descriptors)


@pytest.mark.parametrize("how", ["normally", "by a cancellation"])
@pytest.mark.parametrize("kind", ["program", "AnyIO process"])
@pytest.mark.parametrize("program", ["time.sleep(1000)", ""], ids=["child runs", "child has ended"])
async def test_p12_leaving_the_block_does_not_wait_for_a_grandchild(
    anyio_backend: Any, program: str, kind: str, how: str
) -> None:
    descriptors = own_descriptors()
    async with contextlib.AsyncExitStack() as grandchildren:
        with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
            async with TransportGroup() as group:
                _, child = await grandchildren.enter_async_context(with_grandchild(group, kind, program))
                if not program:
                    await child.exited.wait()
                if how != "normally":
                    scope.cancel()
                    await anyio.sleep_forever()
        assert child.names[-1] == "connection_lost"
        if kind == "program" and _capabilities.polls_files:
            assert own_descriptors() == descriptors
    await until(lambda: own_descriptors() == descriptors)


@pytest.mark.needs_polling("standard input is closed when the child has ended")
async def test_p12_a_grandchild_receives_what_was_written_before_the_close(stack: Stack, tmp_path: Path) -> None:
    """Nothing is dropped before `close`: a grandchild that reads gets it all, as on asyncio."""
    result = tmp_path / "result"
    program = f"""
import os
if not os.fork():
    import pathlib, sys
    data = sys.stdin.buffer.read()
    pathlib.Path({str(result)!r}).write_text(str(len(data)))
"""
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.python(program)
        with anyio.fail_after(GUARD):
            await child.exited.wait()
        transport.get_pipe_transport(0).write(bytes(4 << 20))
        transport.get_pipe_transport(0).write_eof()
        await child.end()
        assert result.read_text() == str(4 << 20)


@pytest.mark.exhaustive
async def test_p5_a_child_that_exits_at_once(stack: Stack) -> None:
    async with stack.open() as group:
        for _ in range(1000):
            child = Child()
            await group.subprocess_exec(lambda child=child: child, "true")
            await child.end()


async def test_hundreds_of_children_at_once(stack: Stack) -> None:
    async with stack.open() as group:
        made = [Child() for _ in range(200)]
        for number, child in enumerate(made):
            await group.subprocess_exec(
                lambda child=child: child, "sh", "-c", f"read x; exit {number % 100}",
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        await until(lambda: all(child.transport for child in made))
        for child in made:
            child.transport.get_pipe_transport(0).write(b"\n")
        for number, child in enumerate(made):
            await child.end()
            assert child.transport.get_returncode() == number % 100


@pytest.mark.differs(
    "`send_signal` when the child has exited and this is not yet noticed",
    asyncio="may signal another process with the same PID",
    here="`ProcessLookupError`",
    why="no other process is ever signalled",
)
@pytest.mark.exhaustive
async def test_p4_signals_at_random_moments(stack: Stack) -> None:
    chance = random.Random(4)
    async with stack.open() as group:
        for _ in range(1000):
            child = Child()
            transport, _ = await group.subprocess_exec(
                lambda child=child: child, "true", stdin=None, stdout=None, stderr=None
            )
            await anyio.sleep(chance.random() * 0.003)
            with contextlib.suppress(ProcessLookupError):
                transport.send_signal(signal.SIGTERM)
            await child.end()
            assert transport.get_returncode() in (0, -signal.SIGTERM)


async def test_sigchld_handlers_are_left_alone(stack: Stack) -> None:
    calls: list[int] = []

    def handler(number: int, _: object) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        async with stack.open() as group:
            child = Child()
            await group.subprocess_exec(lambda: child, "true")
            await child.end()
            assert signal.getsignal(signal.SIGCHLD) is handler
            assert calls
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("handler", ["reaps", "ignored"])
@pytest.mark.parametrize("missing", [(), ("pidfd_open",)])
async def test_a_sigchld_handler_that_reaps(
    anyio_backend: Any, handler: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    before = signal.signal(signal.SIGCHLD, reap if handler == "reaps" else signal.SIG_IGN)
    try:
        async with TransportGroup() as group:
            for _ in range(20):
                child = Child()
                await group.subprocess_exec(lambda child=child: child, "sh", "-c", "exit 3")
                await child.end()
                assert child.transport.get_returncode() == 255
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("missing", [(), ("pidfd_open",)])
async def test_a_child_reaped_during_our_poll(
    anyio_backend: Any, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SIGCHLD handler may run between any two steps of ours: the status of a child it reaps is not taken for
    success."""
    for name in missing:
        monkeypatch.delattr(os, name)
    wait = os.waitid

    def waitid(kind: Any, pid: int, options: int) -> Any:
        found = wait(kind, pid, options)
        if options & os.WNOHANG and not gone_now:
            gone_now.append(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return found

    gone_now: list[int] = []
    async with TransportGroup() as group:
        child = Child()
        transport, _ = await group.subprocess_exec(lambda: child, "cat")
        monkeypatch.setattr(os, "waitid", waitid)
        with contextlib.suppress(ProcessLookupError):
            transport.send_signal(signal.SIGCONT)
        assert gone_now == [transport.get_pid()]
        await child.end()
        assert transport.get_returncode() == 255


@pytest.mark.differs(
    "a child that another thread waits for with `Popen.wait`",
    asyncio="reports 255, or the thread gets 0",
    here=(
        "both get the true status, except that a 0 which the thread sees in the instant of our first call becomes 255"
    ),
    why="`Popen` has no public way to tell this from a child that other code has reaped",
)
@pytest.mark.parametrize("reaped_when", ["after the look", "during the look"])
@pytest.mark.parametrize("missing", [(), ("pidfd_open",)])
async def test_a_child_that_another_thread_waits_for(
    anyio_backend: Any, missing: tuple[str, ...], reaped_when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `Popen`, which knows the status only some time after reaping: the exit is reported all the same."""
    for name in missing:
        monkeypatch.delattr(os, name)
    peek, reap = os.waitid, os.waitpid
    reaped, looked_in_vain = threading.Event(), threading.Event()

    def waitpid(pid: int, options: int) -> Any:
        found = reap(pid, options)
        if threading.current_thread() is waiting:
            reaped.set()
            looked_in_vain.wait(GUARD)
        return found

    def waitid(kind: Any, pid: int, options: int) -> Any:
        try:
            return peek(kind, pid, options)
        except ChildProcessError:
            if options & os.WNOHANG and reaped_when == "after the look":
                group.call_soon(looked_in_vain.set)  # Not before the group has handled the exit.
            raise

    def poll() -> int | None:
        """`Popen` when the thread comes in between, after the poll of the child and of the known status."""
        if reaped.is_set() and reaped_when == "during the look":
            looked_in_vain.set()
            waiting.join(GUARD)
        return subprocess.Popen.poll(popen)

    with anyio.fail_after(2 * GUARD):
        async with TransportGroup() as group:
            child = Child()
            transport, _ = await group.subprocess_exec(lambda: child, "cat")
            popen = transport.get_extra_info("subprocess")
            waiting = threading.Thread(target=popen.wait)
            monkeypatch.setattr(os, "waitpid", waitpid)
            monkeypatch.setattr(os, "waitid", waitid)
            monkeypatch.setattr(popen, "poll", poll)
            waiting.start()
            # Without a checkpoint, so that the group cannot be first.
            os.kill(transport.get_pid(), signal.SIGKILL)
            assert reaped.wait(GUARD)
            with pytest.raises(ProcessLookupError):
                transport.send_signal(signal.SIGCONT)  # Its PID may belong to another process by now.
            await child.end()
            assert looked_in_vain.is_set()
            assert transport.get_returncode() == -signal.SIGKILL
            waiting.join()


async def test_a_child_reaped_by_other_code(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        pid = transport.get_pid()
        # Without a checkpoint, so that nothing else can be first.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # noqa: ASYNC222
        await child.end()
        assert transport.get_returncode() == 255
