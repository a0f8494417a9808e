"""Child processes: `cat`, `sh`, `true`, Python, and what happens when something fails."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import version
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
    pattern,
    turns,
    until,
)

from transports_anyio import TransportGroup, current_group
from transports_anyio._channels import _child

if TYPE_CHECKING:
    from typing_extensions import Self

pytestmark = pytest.mark.anyio

ANYIO = tuple(map(int, version("anyio").split(".")[:2]))


class Child(asyncio.SubprocessProtocol):
    """Record the callbacks of a child, and check their order."""

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
    """Spawn the children of a test, and wait for them at its end, on the oracle too."""

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


async def test_a_transport_takes_attributes(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat")
        transport.started_by = "somebody"
        assert transport.started_by == "somebody"
        transport.close()
        await child.end()


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


async def test_options_of_popen(stack: Stack, tmp_path: Path) -> None:
    read, write = os.pipe()
    program = f"import os; os.write({write}, b'!'); print(os.getcwd(), os.environ['X'], os.getsid(0) == os.getpid())"
    async with stack.open() as group, Children(group) as children:
        _, child = await children.python(
            program,
            cwd=tmp_path,
            env={"X": "y"},
            start_new_session=True,
            pass_fds=[write],
        )
        await child.end()
        # Resolved: some systems have their temporary directory behind a link.
        assert child.output[1].decode().split() == [os.path.realpath(tmp_path), "y", "True"]  # noqa: ASYNC240
        assert os.read(read, 10) == b"!"
    os.close(read)
    os.close(write)


async def test_executable_and_argv_0_may_differ(stack: Stack) -> None:
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("hello", "-c", "echo $0", executable="sh")
        assert transport.get_extra_info("subprocess").args == ("hello", "-c", "echo $0")
        await child.end()
        assert child.output[1] == b"hello\n"


def program(directory: Path, text: str, mode: int = 0o755) -> None:
    """Write a program named `which` into a directory of its own."""
    directory.mkdir()
    (directory / "which").write_text(text)
    (directory / "which").chmod(mode)


@pytest.mark.parametrize(
    "in_the_way",
    ["nothing", "no directory", "not to be run", "no interpreter", "no format", "a directory", "a loop"],
)
async def test_the_first_executable_program_on_the_path_is_run(
    stack: Stack, tmp_path: Path, in_the_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "not to be run", "#!/bin/sh\necho wrong", 0o644)
    program(tmp_path / "no interpreter", "#!/does/not/exist\n")
    program(tmp_path / "no format", "?")
    program(tmp_path / "right", "#!/bin/sh\necho right $0")
    program(tmp_path / "later", "#!/bin/sh\necho later")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a directory" / "which").mkdir(parents=True)
    (tmp_path / "a loop").mkdir()
    (tmp_path / "a loop" / "which").symlink_to("which")
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / each) for each in (in_the_way, "right", "later")))
    async with stack.open() as group, Children(group) as children:
        _, child = await children.exec("which")
        await child.end()
        assert child.output[1].decode() == f"right {tmp_path / 'right' / 'which'}\n"


async def test_a_program_that_appears_and_disappears(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stack.open() as group, Children(group) as children:

        async def told() -> bytes:
            _, child = await children.exec("which")
            await child.end()
            return bytes(child.output[1])

        program(tmp_path / "b", "#!/bin/sh\necho b")
        monkeypatch.setenv("PATH", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
        assert await told() == b"b\n"
        program(tmp_path / "a", "#!/bin/sh\necho a")
        assert await told() == b"a\n"
        monkeypatch.setenv("PATH", str(tmp_path / "b"))
        assert await told() == b"b\n"
        (tmp_path / "b" / "which").unlink()
        with pytest.raises(FileNotFoundError, match="which"):
            await children.exec("which")


async def test_the_search_path_of_a_program(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("ours", "the child's", "below"):
        program(tmp_path / each, f"#!/bin/sh\necho '{each[:3]}'")
    monkeypatch.chdir(tmp_path / "ours")
    async with stack.open() as group, Children(group) as children:
        for path, options, expected in (
            (str(tmp_path / "ours"), {}, b"our"),
            ("", {}, b"our"),  # Where we are.
            (str(tmp_path / "ours"), {"env": {"PATH": str(tmp_path / "the child's")}}, b"the"),
            (f"../below{os.pathsep}/bin", {}, b"bel"),
            (f".{os.pathsep}/bin", {"cwd": tmp_path / "below"}, b"bel"),
        ):
            monkeypatch.setenv("PATH", path)
            _, child = await children.exec("which", **options)
            await child.end()
            assert child.output[1] == expected + b"\n", (path, options)
        monkeypatch.delenv("PATH")
        _, child = await children.exec("true")
        await child.end()


AS_SOMEBODY_ELSE = """
import os
from transports_anyio import *

async def main():
    async with TransportGroup() as group:
        os.setreuid(65534, 0)
        transport, _ = await group.subprocess_exec(SubprocessProtocol, "which")
        await group.wait_closed()
        print(transport.get_returncode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_effective_rights_decide_what_can_be_run(anyio_backend: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:  # Not `tmp_path`, which other users may not read.
        roots, everybodys = Path(directory, "root's"), Path(directory, "everybody's")
        for each, copied, mode in ((roots, "true", 0o700), (everybodys, "false", 0o755)):
            each.mkdir()
            shutil.copy(str(shutil.which(copied)), each / "which")
            (each / "which").chmod(mode)
        os.chmod(directory, 0o755)
        environment = {**os.environ, "PATH": f"{roots}{os.pathsep}{everybodys}"}
        result = await run_main(AS_SOMEBODY_ELSE, anyio_backend, stderr=None, env=environment)
    assert int(result.stdout) == 0


AUDITED = """
import sys
from transports_anyio import *

async def main():
    audited = []
    sys.addaudithook(lambda event, args: event == "subprocess.Popen" and audited.append(args[0]))
    async with TransportGroup() as group:
        for program in "true", "/bin/sh":
            await group.subprocess_exec(SubprocessProtocol, program)
    print(*audited)
"""


@pytest.mark.parametrize("in_the_way", [False, True])
async def test_an_audit_hook_gets_the_program(anyio_backend: Any, in_the_way: bool, tmp_path: Path) -> None:
    broken, true = tmp_path / "true", shutil.which("true")
    if in_the_way:
        broken.write_text("#!/does/not/exist\n")
        broken.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = await run_main(AUDITED, anyio_backend, stderr=None, env={**os.environ, "PATH": path})
    assert result.stdout.decode().split() == [*([str(broken), "true"] if in_the_way else [true]), "/bin/sh"]


async def test_user_group_and_process_group_of_a_child(stack: Stack) -> None:
    """`user` and `group` (users may name their own), `process_group`, `umask` and `preexec_fn`."""
    root = os.getuid() == 0
    user, group_id = (65534, 65533) if root else (os.getuid(), os.getgid())
    options: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {}
    read, write = os.pipe()
    program = "umask; id -u; id -g; read x"
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec(
            "sh", "-c", program, user=user, group=group_id, extra_groups=[] if root else None, umask=0o137,
            preexec_fn=lambda: os.write(write, b"in the child"), **options,
        )  # fmt: skip
        await until(lambda: child.output[1].count(b"\n") == 3)
        umask, *numbers = child.output[1].split()
        assert (int(umask, 8), *map(int, numbers)) == (0o137, user, group_id)
        assert not options or os.getpgid(transport.get_pid()) == transport.get_pid()
        assert os.read(read, 100) == b"in the child"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    "options",
    [
        {"universal_newlines": True},
        {"bufsize": 1},
        {"bufsize": None},
        {"text": True},
        {"encoding": "utf-8"},
        {"errors": "strict"},
    ],
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
async def test_a_program_that_cannot_be_run(stack: Stack, args: Any, options: Any, error: Any) -> None:
    async with stack.open() as group:
        with pytest.raises(error):
            await group.subprocess_exec(Child, *args, **options)


#: Programs with an impossible name, or that do not exist: the error is `Popen`'s.
ODD_PROGRAMS = [
    "",
    " ",
    "true ",
    "\n",
    ".",
    "..",
    "/",
    "./",
    "true/",
    "/bin/",
    "\0",
    "tr\0ue",
    "\ud800",
    "\udcff",
    "x" * 5000,
    b"",
    b".",
    b"tr\0ue",
    Path(),
    Path("/bin"),
    None,
    1,
    True,
    1.5,
    [],
    ["true"],
    object,
    bytearray(b"true"),
]


@pytest.mark.parametrize("args", [(), ("",)], ids=["alone", "with an argument"])
@pytest.mark.parametrize("program", ODD_PROGRAMS, ids=lambda program: ascii(program)[:12])
async def test_p13_an_invalid_program_raises_popens_error(stack: Stack, program: Any, args: Any) -> None:
    with pytest.raises(Exception) as expected, subprocess.Popen([program, *args]):
        pass
    async with stack.open() as group:
        protocol = Child()
        with pytest.raises(type(expected.value)) as caught:
            await group.subprocess_exec(lambda: protocol, program, *args)
    assert str(caught.value) == str(expected.value)
    assert protocol.calls == []


async def test_p13_a_directory_is_passed_over(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first" / "program").mkdir(parents=True)
    (tmp_path / "second").mkdir()
    script = tmp_path / "second" / "program"
    script.write_text("#!/bin/sh\nexit 5\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/first{os.pathsep}{tmp_path}/second")
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("program")
        await child.end()
        assert transport.get_returncode() == 5


# -- the end -------------------------------------------------------------------------------------------------


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


@pytest.mark.ours_only("asyncio signals any process with this PID")
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
        stdin.write(bytes(1 << 20))  # more than the pipe takes: the rest waits
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


@pytest.mark.ours_only("asyncio waits for the grandchild")
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
            await turns(10)
            assert "connection_lost" not in child.names()
            transport.close()
        else:
            transport.close()
        await child.end()
        assert child.names().count("pipe_connection_lost") == 3
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
        assert child.names()[-1] == "connection_lost"
        if kind == "program":
            assert own_descriptors() == descriptors
    await until(lambda: own_descriptors() == descriptors)


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


@pytest.mark.parametrize("told", ["after the look", "during the look"])
@pytest.mark.parametrize("missing", [(), ("pidfd_open",)])
async def test_a_child_that_another_thread_waits_for(
    anyio_backend: Any, missing: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
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
            if options & os.WNOHANG and told == "after the look":
                group.call_soon(looked_in_vain.set)  # Not before the group has handled the exit.
            raise

    def poll() -> int | None:
        """`Popen` when the thread comes in between, after the poll of the child and of the known status."""
        if reaped.is_set() and told == "during the look":
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


# -- much ----------------------------------------------------------------------------------------------------


class Feeder(Child):
    """Feed the child with flow control, and record the largest buffer size."""

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


async def test_w15_bulk_data_through_cat(stack: Stack) -> None:
    if stack.is_oracle:
        pytest.skip("asyncio loses what is buffered when resume_writing closes")
    data = pattern(16 << 20)
    async with stack.open() as group, Children(group) as children:
        _, child = await children.exec("cat", protocol=Feeder(data))
        await child.end()
        assert child.output[1] == data
        assert child.greatest <= 64 * 1024 + 50_000
        assert child.flow[:2] == ["pause", "resume"]


@pytest.mark.exhaustive
async def test_bulk_data_on_both_outputs_at_once(stack: Stack) -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pipes of any size")
async def test_pipes_keep_a_requested_size(stack: Stack) -> None:
    """We enlarge busy pipes of a child, but never shrink these."""
    import fcntl

    # Enough to count as bulk data, but not more than the smaller pipe holds.
    data = pattern(100_000)
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat", pipesize=1 << 20)
        transport.get_pipe_transport(0).write(data)
        await until(lambda: len(child.output[1]) == len(data))
        popen = transport.get_extra_info("subprocess")
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            assert fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) == 1 << 20


#: Pipes are of 16 pages to begin with, and ours know that for the most frequent size of these.
with_usual_pipes = pytest.mark.skipif(
    sys.platform != "linux" or os.sysconf("SC_PAGE_SIZE") != 4096, reason="pipes are of another size here"
)


@with_usual_pipes
async def test_a_requested_small_pipe_stays_small(stack: Stack) -> None:
    import fcntl

    size = 4096
    data = pattern(1 << 20)
    async with stack.open() as group, Children(group) as children:
        transport, child = await children.exec("cat", pipesize=size)
        transport.get_pipe_transport(0).write(data)
        await until(lambda: len(child.output[1]) == len(data))
        popen = transport.get_extra_info("subprocess")
        for pipe in (popen.stdin, popen.stdout):
            assert fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) == size


@with_usual_pipes
@pytest.mark.parametrize("method", ["write", "writelines"])
async def test_a_full_pipe_is_enlarged(anyio_backend: Any, method: str) -> None:
    import fcntl

    data = pattern(1 << 20)
    child = Child()
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            await group.subprocess_exec(lambda: child, "cat", stderr=None)
            stdin = child.transport.get_pipe_transport(0)
            if method == "write":
                stdin.write(data)
            else:
                stdin.writelines([data[: 1 << 19], data[1 << 19 :]])
            assert fcntl.fcntl(stdin.get_extra_info("pipe"), fcntl.F_GETPIPE_SZ) == 512 << 10
            stdin.close()
            await child.end()
            assert child.output[1] == data


@with_usual_pipes
async def test_the_number_of_enlarged_pipes_is_limited(anyio_backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's programs have 64 MiB in all: beyond that, every new pipe of each of them holds two pages."""
    import fcntl

    from transports_anyio._channels import _pipe

    def size(pipe: Any) -> int:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)

    monkeypatch.setattr(_pipe, "BULK_PIPES", 3)
    monkeypatch.setattr(_pipe, "enlarged", set())
    data = pattern(1 << 20)

    async def pipes_after_bulk(group: TransportGroup, count: int) -> list[int]:
        children = [Child() for _ in range(count)]
        for child in children:
            await group.subprocess_exec(lambda child=child: child, "cat", stderr=None)
            child.transport.get_pipe_transport(0).write(data)
        await until(lambda: all(len(child.output[1]) == len(data) for child in children))
        sizes = []
        for child in children:
            popen = child.transport.get_extra_info("subprocess")
            sizes += [size(popen.stdin), size(popen.stdout)]
            child.transport.get_pipe_transport(0).close()
            await child.end()
            assert bytes(child.output[1]) == data
        return sizes

    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            before = await pipes_after_bulk(group, 5)
            usual = min(before)
            assert sorted(before) == [usual] * 7 + [max(before)] * 3
            assert max(before) > usual
            # Children that have ended free their share.
            assert max(before) in await pipes_after_bulk(group, 1)


# -- the group -----------------------------------------------------------------------------------------------


def own_descriptors() -> dict[int, str]:
    # uvloop keeps one file descriptor in reserve from its first stream on.
    return {fd: what for fd, what in open_descriptors().items() if what != os.devnull}


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


def gone(pid: int) -> bool:
    """Return whether no child of ours has this PID, not even a zombie."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


async def test_p3_leaving_the_block_kills_running_children(anyio_backend: Any) -> None:
    child = Child()
    async with TransportGroup() as group:
        transport, _ = await group.subprocess_exec(lambda: child, "sleep", "1000")
    assert child.names()[-1] == "connection_lost"
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
        assert child.names()[-1] == "connection_lost"
        assert child.names().count("process_exited") == 1
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
    monkeypatch.setattr(_child, "TIME_TO_END", 1.0)
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
        f"process {pid} was killed and still runs after 1.0 seconds: it is left to the system"
    ]
    if kind == "program":
        assert child.transport.get_extra_info("subprocess").wait() == -signal.SIGKILL
    else:
        with anyio.fail_after(GUARD):
            assert await process.wait() == -signal.SIGKILL
        await process.aclose()


@needs_tracer
@pytest.mark.ours_only("asyncio waits in its event loop, and nothing else runs")
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
            await until(lambda: ("pipe_connection_lost", 1) in child.calls)
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
            assert child.names() == []
        else:
            assert gone(child.transport.get_pid())
            assert child.names()[0] == "connection_made"
            assert child.names()[-1] == "connection_lost"


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
        await turns()
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
                assert child.names() == []
                results.add("refused")
            else:
                await child.end()
                assert child.transport.get_returncode() == 0
                results.add("spawned")
            assert own_descriptors() == descriptors
            with pytest.raises(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222  # it does not wait
    assert results == {"refused", "spawned"}


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
    assert child.names().count("process_exited") == 1
    assert child.names().count("pipe_connection_lost") == 3
    assert child.names()[-1] == "connection_lost"
    assert gone(child.transport.get_pid())


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


async def test_one_context_for_all_callbacks_of_a_child(anyio_backend: Any) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    values: dict[str, str] = {}

    class Asking(Child):
        def record(self, name: str, *args: Any) -> None:
            super().record(name, *args)
            if name == "connection_made":
                variable.set("set in connection_made")
            values[name] = variable.get()

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.get_pipe_transport(0).write(bytes(1 << 20))  # More than the pipe takes.

        def pause_writing(self) -> None:
            self.record("pause_writing")

        def resume_writing(self) -> None:
            self.record("resume_writing")
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

        def record(self, name: str, *args: Any) -> None:
            super().record(name, *args)
            values.add(variable.get())

    async with TransportGroup() as group:
        if kind == "program":
            _, child = await group.subprocess_exec(Asking, "true")
        else:
            _, child = await group.connect_process(Asking, await anyio.open_process(["true"]))
        await child.end()
        assert values == {"set by the factory"}
        assert variable.get() == "unset"


async def test_a_pipe_that_was_given_another_protocol(anyio_backend: Any) -> None:
    """The child's protocol gets no more callbacks of that pipe, but all others; asyncio's never gets the end."""
    with anyio.fail_after(GUARD):
        async with TransportGroup() as group:
            child, other = Child(), Recorder()
            transport, _ = await group.subprocess_exec(lambda: child, "cat")
            stdin, stdout = map(transport.get_pipe_transport, range(2))
            stdout.set_protocol(other)
            assert stdout.get_protocol() is other
            other.connection_made(stdout)
            stdin.write(b"for the other")
            assert await other.wait_received(13) == b"for the other"
            stdin.write_eof()
            await other.wait_for("connection_lost")
            await child.end()
    assert child.output[1] == b""
    assert {call[1] for call in child.calls if call[0] == "pipe_connection_lost"} == {0, 2}
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


async def test_an_anyio_process_in_use_by_another_transport(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        process = await anyio.open_process(["cat"])
        transport, child = await group.connect_process(Child, process)
        second = Child()
        with pytest.raises(RuntimeError, match="used already, by another transport"):
            await group.connect_process(lambda: second, process)
        for stream in (process.stdin, process.stdout, process.stderr):
            with pytest.raises(RuntimeError, match="used already, by another transport"):
                await group.connect_stream(Recorder, stream)
        transport.get_pipe_transport(0).write(b"data")
        transport.get_pipe_transport(0).write_eof()
        await child.end()
        assert child.output[1] == b"data"
        assert second.calls == []


async def test_an_anyio_process_with_a_pipe_in_use(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        process = await anyio.open_process(["cat"])
        _, reader = await group.connect_stream(Recorder, process.stdout)
        with pytest.raises(RuntimeError, match="used already, by another transport"):
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
    assert child.names()[-1] == "connection_lost"
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
    assert child.names()[-1] == "connection_lost"


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
            assert ("pipe_connection_lost", 1) not in child.calls
            if how == "cancellation":
                scope.cancel()
                await anyio.sleep_forever()
    try:
        assert own_descriptors() == descriptors
        assert transport.get_returncode() == 4
        assert child.names()[-1] == "connection_lost"
        assert child.names().count("pipe_connection_lost") == 3
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
    assert child.names()[-1] == "connection_lost"
    assert process.returncode == -signal.SIGKILL
    assert gone(process.pid)
