"""Child processes, real ones: `cat`, `sh`, `true`, Python, and what they do when things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from support import GUARD, Stack, collect_contexts, leaves, pattern, until

from transports_anyio import TransportGroup, current_group

if TYPE_CHECKING:
    from typing_extensions import Self

pytestmark = pytest.mark.anyio


class Child(asyncio.SubprocessProtocol):
    """Record what a child tells, and check the order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.transport: Any = None
        self.output: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self.finished = anyio.Event()
        self.exited = anyio.Event()

    def record(self, name: str, *args: Any) -> None:
        assert name == "connection_made" or self.transport is not None, (name, self.calls)
        assert ("connection_lost", None) not in self.calls, (name, self.calls)
        self.calls.append((name, *args))

    def connection_made(self, transport: Any) -> None:
        self.record("connection_made")
        self.transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        assert data
        assert ("pipe_connection_lost", fd) not in self.calls
        self.record("pipe_data_received", fd)
        self.output[fd] += data

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.record("pipe_connection_lost", fd)
        self.lost_pipe(fd, exc)

    def lost_pipe(self, fd: int, exc: Exception | None) -> None: ...

    def process_exited(self) -> None:
        self.record("process_exited")
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.record("connection_lost", exc)
        self.finished.set()

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    async def end(self) -> None:
        with anyio.fail_after(4 * GUARD):
            await self.finished.wait()
        assert self.names().count("process_exited") == 1
        assert self.names().count("connection_lost") == 1
        assert self.names()[0] == "connection_made"
        self.transport.close()  # asyncio warns of one that was never closed, even of a child that has ended


class Children:
    """Spawns the children of a test, and sees them gone at its end, on the oracle too."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.made: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for protocol in self.made:
            protocol.transport.close()
            await protocol.end()
            with pytest.raises(ProcessLookupError):
                os.kill(protocol.transport.get_pid(), 0)

    async def exec(self, *args: Any, protocol: Any = None, **options: Any) -> tuple[Any, Any]:
        protocol = protocol or Child()
        transport, made = await self.group.subprocess_exec(lambda: protocol, *args, **options)
        assert made is protocol
        self.made.append(protocol)
        await until(lambda: protocol.transport)
        return transport, protocol

    async def python(self, program: str, **options: Any) -> tuple[Any, Any]:
        return await self.exec(sys.executable, "-c", program, **options)


# -- what children are given, and give -----------------------------------------------------------------------


async def test_input_and_output(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        assert isinstance(transport, asyncio.SubprocessTransport)
        assert isinstance(transport.get_extra_info("subprocess"), subprocess.Popen)
        assert transport.get_pid() == transport.get_extra_info("subprocess").pid
        assert transport.get_returncode() is None
        stdin = transport.get_pipe_transport(0)
        stdin.write(b"hello")
        stdin.writelines([b" ", b"world"])
        stdin.write_eof()
        await child.end()
        assert child.output[1] == b"hello world"
        assert transport.get_returncode() == 0
        assert sorted(call for call in child.calls if call[0] == "pipe_connection_lost") == [
            ("pipe_connection_lost", fd) for fd in range(3)
        ]


async def test_pipe_transports(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, _ = await children.exec("cat", stderr=subprocess.DEVNULL)
        assert isinstance(transport.get_pipe_transport(0), asyncio.WriteTransport)
        assert isinstance(transport.get_pipe_transport(1), asyncio.ReadTransport)
        assert transport.get_pipe_transport(2) is None
        assert transport.get_pipe_transport(3) is None
        transport.get_pipe_transport(1).pause_reading()
        assert not transport.get_pipe_transport(1).is_reading()
        transport.get_pipe_transport(1).resume_reading()


async def test_a_shell(stack: Stack) -> None:
    async with stack.open() as group:
        child = Child()
        transport, _ = await group.subprocess_shell(lambda: child, "echo out; echo err >&2; exit 7")
        await child.end()
        assert (child.output[1], child.output[2]) == (b"out\n", b"err\n")
        assert transport.get_returncode() == 7


async def test_error_output_with_the_output(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("sh", "-c", "echo a; echo b >&2", stderr=subprocess.STDOUT)
        await child.end()
        assert child.output[1] == b"a\nb\n"
        assert transport.get_pipe_transport(2) is None


async def test_files_and_descriptors(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    async with stack.open() as group, Children(group) as children:
        with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:
            transport, child = await children.exec("cat", stdin=source, stdout=target.fileno(), stderr=None)
            await child.end()
        assert [transport.get_pipe_transport(fd) for fd in range(3)] == [None] * 3
    assert (tmp_path / "out").read_bytes() == b"from a file"


async def test_the_options_of_popen(stack: Stack, tmp_path: Path) -> None:
    read, write = os.pipe()
    program = f"import os; os.write({write}, b'!'); print(os.getcwd(), os.environ['X'], os.getsid(0) == os.getpid())"
    async with stack.open() as group, Children(group) as children:
        _, child = await children.python(
            program,
            cwd=tmp_path,
            env={"X": "y"},
            start_new_session=True,
            pass_fds=[write],
            umask=0o22,
        )
        await child.end()
        # Resolved: some systems have their temporary directory behind a link.
        assert child.output[1].decode().split() == [os.path.realpath(tmp_path), "y", "True"]  # noqa: ASYNC240
        assert os.read(read, 10) == b"!"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    "options",
    [{"universal_newlines": True}, {"bufsize": 1}, {"text": True}, {"encoding": "utf-8"}, {"errors": "strict"}],
)
async def test_options_that_make_no_sense_are_refused(stack: Stack, options: Any) -> None:
    (name,) = options
    async with stack.open() as group:
        with pytest.raises(ValueError, match=name):
            await group.subprocess_exec(Child, "true", **options)
        with pytest.raises(ValueError, match=name):
            await group.subprocess_shell(Child, "true", **options)


async def test_a_wrong_shell_or_command_is_refused(stack: Stack) -> None:
    async with stack.open() as group:
        with pytest.raises(ValueError, match="shell"):
            await group.subprocess_exec(Child, "true", shell=True)
        with pytest.raises(ValueError, match="shell"):
            await group.subprocess_shell(Child, "true", shell=False)
        with pytest.raises(ValueError, match="cmd"):
            await group.subprocess_shell(Child, ["true"])


@pytest.mark.parametrize(
    ("args", "options", "error"),
    [
        (["/does/not/exist"], {}, FileNotFoundError),
        (["/etc/passwd"], {}, PermissionError),
        (["true"], {"cwd": "/does/not/exist"}, FileNotFoundError),
        ([3], {}, TypeError),
    ],
)
async def test_what_cannot_be_run_raises_and_leaves_nothing(stack: Stack, args: Any, options: Any, error: Any) -> None:
    async with stack.open() as group:
        with pytest.raises(error):
            await group.subprocess_exec(Child, *args, **options)


# -- the end -------------------------------------------------------------------------------------------------


async def test_signals(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        for send, number in (
            (lambda transport: transport.terminate(), signal.SIGTERM),
            (lambda transport: transport.kill(), signal.SIGKILL),
            (lambda transport: transport.send_signal(signal.SIGHUP), signal.SIGHUP),
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
        assert ("connection_lost", None) in child.calls


async def test_a_child_that_closes_its_output_early(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        _, child = await children.python("import os, sys; os.close(1); sys.stdin.read()")
        await until(lambda: ("pipe_connection_lost", 1) in child.calls)
        assert "process_exited" not in child.names()


async def test_p10_a_child_that_closes_its_input(stack: Stack) -> None:
    class Counting(Child):
        def __init__(self) -> None:
            super().__init__()
            self.errors: dict[int, Any] = {}

        def lost_pipe(self, fd: int, exc: Exception | None) -> None:
            self.errors[fd] = exc

    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec(
            sys.executable, "-c", "import os, time; os.close(0); print('x', flush=True); time.sleep(999)",
            protocol=Counting(),
        )  # fmt: skip
        stdin = transport.get_pipe_transport(0)
        stdin.write(bytes(1 << 20))  # more than the pipe takes: a part of it waits
        await until(lambda: 0 in child.errors)
        assert isinstance(child.errors[0], BrokenPipeError)
        for _ in range(3):
            stdin.write(b"more")  # dropped, and nothing is raised


async def test_p2_a_grandchild_that_keeps_the_pipes_does_not_hide_the_exit(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("sh", "-c", "sleep 1000 & echo $!")
        await until(lambda: "process_exited" in child.names())
        await until(lambda: child.output[1])
        assert ("pipe_connection_lost", 1) not in child.calls
        assert "connection_lost" not in child.names()
        transport.close()
        await child.end()
        os.kill(int(child.output[1]), signal.SIGKILL)


@pytest.mark.exhaustive
async def test_p5_a_child_that_ends_at_once(stack: Stack) -> None:
    async with stack.open() as group:
        for _ in range(1000):
            child = Child()
            await group.subprocess_exec(lambda child=child: child, "true")
            await child.end()


async def test_hundreds_at_once(stack: Stack) -> None:
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
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        async with stack.open() as group:
            child = Child()
            await group.subprocess_exec(lambda: child, "true")
            await child.end()
            assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_a_child_that_somebody_else_reaps(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        pid = transport.get_pid()
        # In one go, so that nobody else can have come first.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # noqa: ASYNC222
        await child.end()
        assert transport.get_returncode() == 255


# -- much ----------------------------------------------------------------------------------------------------


class Feeder(Child):
    """Feed the child with back-pressure, and remember the greatest amount that ever waited."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.rest = memoryview(data)
        self.paused = False
        self.greatest = 0
        self.flow: list[str] = []

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.stdin = transport.get_pipe_transport(0)
        self.feed()

    def feed(self) -> None:
        while self.rest and not self.paused:
            self.stdin.write(self.rest[:50_000])
            self.rest = self.rest[50_000:]
            self.greatest = max(self.greatest, self.stdin.get_write_buffer_size())
        if not self.rest:
            self.stdin.write_eof()

    def pause_writing(self) -> None:
        self.flow.append("pause")
        self.paused = True

    def resume_writing(self) -> None:
        self.flow.append("resume")
        self.paused = False
        self.feed()


async def test_w15_much_through_cat(stack: Stack) -> None:
    if stack.is_oracle:
        pytest.skip("asyncio loses what is buffered when resume_writing closes")
    data = pattern(16 << 20)
    async with stack.open() as group, Children(group) as children:
        _, child = await children.exec("cat", protocol=Feeder(data))
        await child.end()
        assert child.output[1] == data
        assert child.greatest <= 64 * 1024 + 50_000
        assert child.flow[:2] == ["pause", "resume"]


async def test_much_on_both_outputs_at_once(stack: Stack) -> None:
    size = 100 << 20
    program = f"""
import os, threading
def work(fd):
    left = {size}
    while left:
        left -= os.write(fd, b"12345678" * min(8192, left // 8))
threads = [threading.Thread(target=work, args=[fd]) for fd in (1, 2)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    async with stack.open() as group, Children(group) as children:
        _, child = await children.python(program)
        await child.end()
        for fd in (1, 2):
            assert len(child.output[fd]) == size
            assert child.output[fd].count(b"12345678") == size // 8


# -- the group -----------------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    """Whether no process of ours has this number any more, not even a zombie."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


async def test_p3_leaving_the_block_kills_what_runs(anyio_backend: Any) -> None:
    child = Child()
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(lambda: child, "sleep", "1000")
    assert child.names()[-1] == "connection_lost"
    assert transport.get_returncode() == -signal.SIGKILL
    assert gone(transport.get_pid())


@pytest.mark.parametrize("pidfd", [True, False])
@pytest.mark.parametrize("how", ["exception", "cancellation"])
async def test_leaving_by_an_exception_reaps_before_the_block_is_left(
    anyio_backend: Any, how: str, pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
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
        assert child.names()[-1] == "connection_lost"
        assert child.names().count("process_exited") == 1
        assert gone(child.transport.get_pid())


async def test_p1_cancelled_at_every_checkpoint(anyio_backend: Any) -> None:
    """`subprocess_exec` is cancelled before the spawn or not at all: nothing is half-way."""
    for turns in range(4):
        child = Child()
        async with TransportGroup() as group:
            with anyio.CancelScope() as scope:

                async def cancel(turns: int = turns, scope: anyio.CancelScope = scope) -> None:
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                group.start_soon(cancel)
                await group.subprocess_exec(lambda child=child: child, "sleep", "1000")
        if child.transport is None:
            assert child.names() == []
        else:
            assert gone(child.transport.get_pid())
            assert child.names()[0] == "connection_made"
            assert child.names()[-1] == "connection_lost"


async def test_without_pidfd(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
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


async def test_the_current_group_in_callbacks(anyio_backend: Any) -> None:
    groups: dict[str, Any] = {}

    class Asking(Child):
        def record(self, name: str, *args: Any) -> None:
            super().record(name, *args)
            groups[name] = current_group()

    async with TransportGroup() as group:
        child = Asking()
        await group.subprocess_exec(lambda: child, "echo", "x")
        await child.end()
        assert set(groups.values()) == {group}
        assert len(groups) == 5


async def test_a_factory_that_raises_spawns_nothing(anyio_backend: Any, tmp_path: Path) -> None:
    def factory() -> Any:
        raise LookupError

    async with TransportGroup() as group:
        with pytest.raises(LookupError):
            await group.subprocess_exec(factory, "touch", str(tmp_path / "spawned"))
    assert not (tmp_path / "spawned").exists()


async def test_a_telling_repr(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        transport, child = await group.subprocess_exec(Child, "cat")
        assert f"pid={transport.get_pid()} running" in repr(transport)
        assert "stdin=<WritePipeTransport" in repr(transport)
        transport.close()
        await child.end()
        assert "returncode=-9" in repr(transport)


# -- AnyIO's processes ---------------------------------------------------------------------------------------


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


async def test_cancelling_the_group_reaps_an_anyio_process(anyio_backend: Any) -> None:
    child = Child()
    with anyio.CancelScope() as scope:
        async with TransportGroup() as group:
            process = await anyio.open_process(["cat"])
            transport, _ = await group.connect_process(lambda: child, process)
            transport.get_pipe_transport(0).write(bytes(10 << 20))
            scope.cancel()
            await anyio.sleep_forever()
    assert child.names()[-1] == "connection_lost"
    assert process.returncode == -signal.SIGKILL
    assert gone(process.pid)
