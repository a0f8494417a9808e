"""`asyncio.subprocess` over our children."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import pytest
from support import pattern

PYTHON = sys.executable
PIPE = asyncio.subprocess.PIPE

ECHO = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
LINES = "import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)"


def test_communicate(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(PYTHON, "-c", ECHO, stdin=PIPE, stdout=PIPE)
        data = pattern(1_000_000)
        assert await process.communicate(data) == (data, None)
        assert process.returncode == 0

    run(main)


def test_the_output_and_the_errors_of_a_shell(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_shell("echo out; echo err >&2; exit 3", stdout=PIPE, stderr=PIPE)
        assert await process.communicate() == (b"out\n", b"err\n")
        assert process.returncode == 3
        assert await process.wait() == 3

    run(main)


def test_a_conversation(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(PYTHON, "-u", "-c", LINES, stdin=PIPE, stdout=PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        for word in (b"one", b"two", b"three"):
            process.stdin.write(word + b"\n")
            await process.stdin.drain()
            assert await process.stdout.readline() == word.upper() + b"\n"
        process.stdin.close()
        await process.stdin.wait_closed()
        assert await process.stdout.read() == b""
        assert await process.wait() == 0

    run(main)


@pytest.mark.parametrize(("end", "sig"), [("kill", signal.SIGKILL), ("terminate", signal.SIGTERM)])
def test_end_a_child(run, end, sig):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("sleep", "60")
        assert process.returncode is None
        assert process.pid > 0
        getattr(process, end)()
        assert await process.wait() == -sig
        assert process.returncode == -sig

    run(main)


def test_send_a_signal(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            PYTHON, "-u", "-c",
            # Not by a handler and `pause`: the handler might run just before it, which then never ends.
            "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\nprint('ready')\n"
            "signal.sigwait([signal.SIGUSR1])\nexit(7)",
            stdout=PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGUSR1)
        assert await process.wait() == 7
        await process.stdout.read()

    run(main)


def test_wait_in_several_tasks(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("sh", "-c", "read line; exit 5", stdin=PIPE)
        waiting = [asyncio.create_task(process.wait()) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting)
        assert process.stdin is not None
        process.stdin.close()
        assert await asyncio.gather(*waiting) == [5, 5, 5]

    run(main)


def test_a_wait_that_times_out(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("sleep", "60")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0.01)
        process.kill()
        await process.wait()

    run(main)


def test_a_child_that_ends_before_it_has_read_everything(run):
    if run.is_uvloop:
        pytest.skip("uvloop raises RuntimeError if the child has ended before the first write")

    async def main() -> None:
        process = await asyncio.create_subprocess_exec("true", stdin=PIPE, stdout=PIPE)
        assert (await process.communicate(bytes(5_000_000)))[0] == b""
        assert process.returncode == 0

    run(main)


def test_a_program_that_is_not_there(run):
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await asyncio.create_subprocess_exec("/there is/no such program")

    run(main)


def test_many_children(run):
    async def main() -> None:
        async def child(number: int) -> bytes:
            process = await asyncio.create_subprocess_exec("echo", str(number), stdout=PIPE)
            output, _ = await process.communicate()
            return output

        assert await asyncio.gather(*map(child, range(15))) == [f"{number}\n".encode() for number in range(15)]

    run(main)


def test_the_environment_and_the_directory_of_a_child(run, tmp_path):
    path = os.path.realpath(tmp_path)

    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", "pwd; echo $WORD", stdout=PIPE, cwd=tmp_path, env={**os.environ, "WORD": "word"}
        )
        output, _ = await process.communicate()
        assert output.decode().split() == [path, "word"]

    run(main)


def test_devnull_and_one_pipe_for_both(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_shell(
            "echo out; echo err >&2; cat", stdin=asyncio.subprocess.DEVNULL, stdout=PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert sorted((await process.communicate())[0].split()) == [b"err", b"out"]

    run(main)


def test_the_transport_and_protocol_of_a_child(run):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        calls: list[Any] = []
        lost = loop.create_future()

        class Protocol(asyncio.SubprocessProtocol):
            def pipe_data_received(self, fd: int, data: bytes) -> None:
                assert asyncio.get_running_loop() is loop
                calls.append((fd, data))

            def process_exited(self) -> None:
                calls.append("exited")

            def connection_lost(self, exc: BaseException | None) -> None:
                lost.set_result(exc)

        transport, _ = await loop.subprocess_exec(Protocol, "echo", "word", stdin=None, stderr=None)
        assert await lost is None
        assert sorted(map(str, calls)) == ["(1, b'word\\n')", "exited"]
        assert transport.get_returncode() == 0
        transport.close()

    run(main)


def test_a_cancelled_task_leaves_a_child_that_can_be_ended(run):
    async def main() -> None:
        process = await asyncio.create_subprocess_exec("sleep", "60", stdout=PIPE)
        task = asyncio.create_task(process.communicate())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        process.kill()
        assert await process.wait() == -signal.SIGKILL

    run(main)
