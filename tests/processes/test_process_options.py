"""Child processes: programs, options, standard streams."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from network import run_main
from support import (
    Stack,
    until,
)

if TYPE_CHECKING:
    pass
from process_helpers import Child, Children, program

pytestmark = pytest.mark.anyio


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
        assert sorted(child.lost_pipes()) == [0, 1, 2]


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
        assert (child.output[1], child.output[2]) == (b"out\n", b"err\n")  # type: ignore[comparison-overlap]
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

        async def printed() -> bytes:
            _, child = await children.exec("which")
            await child.end()
            return bytes(child.output[1])

        program(tmp_path / "b", "#!/bin/sh\necho b")
        monkeypatch.setenv("PATH", f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}")
        assert await printed() == b"b\n"
        program(tmp_path / "a", "#!/bin/sh\necho a")
        assert await printed() == b"a\n"
        monkeypatch.setenv("PATH", str(tmp_path / "b"))
        assert await printed() == b"b\n"
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


AS_ANOTHER_USER = """
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
        result = await run_main(AS_ANOTHER_USER, anyio_backend, stderr=None, env=environment)
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


@pytest.mark.differs(
    "the path that an audit hook gets for a program without a path",
    asyncio="its name",
    here="its path along `PATH`; and then its name too, if the first program found cannot be run",
    why="looking it up beforehand costs less",
)
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
