"""Child processes where nothing but sockets can be polled, as on Windows: threads read, write and wait.

`--descriptors threads` runs all other tests of children so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import anyio
import pytest
from process_helpers import Child, gone, own_descriptors
from support import GUARD, BaseExceptionGroup, leaves, pattern, until

from transports_anyio import TransportGroup, _capabilities

pytestmark = pytest.mark.anyio

# Ends with the status 7 when its input has ended.
COPY = [
    sys.executable,
    "-c",
    "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer); sys.exit(7)",
]
SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]


@pytest.fixture(autouse=True, params=["selector of the system", "as on Windows"])
def _in_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has neither a selector that can be waited for, nor calls that look at a child without reaping it."""
    monkeypatch.setattr(_capabilities, "polls_files", False)
    if request.param == "as on Windows":
        monkeypatch.setattr("transports_anyio._poller.make_system_selector", lambda: None)
        for name in ("pidfd_open", "waitid"):
            monkeypatch.delattr(os, name, raising=False)


async def test_bulk_data_through_a_child(anyio_backend: Any) -> None:
    data = pattern(1 << 20)
    descriptors = own_descriptors()
    async with TransportGroup() as group:
        child = Child()
        transport, _ = await group.subprocess_exec(lambda: child, *COPY)
        assert isinstance(transport.get_extra_info("subprocess"), subprocess.Popen)
        stdin = transport.get_pipe_transport(0)
        stdin.write(data)
        assert child.names[-1] == "pause_writing"
        stdin.write_eof()
        await child.end()
        assert child.output[1] == data
        assert sorted(child.lost_pipes()) == [0, 1, 2]
        assert transport.get_returncode() == 7
        with pytest.raises(ProcessLookupError):
            transport.kill()
    await until(lambda: own_descriptors() == descriptors)


async def test_the_shell(anyio_backend: Any) -> None:
    async with TransportGroup() as group:
        child = Child()
        transport, _ = await group.subprocess_shell(
            lambda: child, "echo out; echo err >&2; exit 3", stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        await child.end()
        assert child.output[1].split() == [b"out", b"err"]
        assert transport.get_returncode() == 3


@pytest.mark.parametrize("method", ["terminate", "kill", "send_signal", "close"])
async def test_ending_a_child(anyio_backend: Any, method: str) -> None:
    number = signal.SIGTERM if method in {"terminate", "send_signal"} else signal.SIGKILL
    async with TransportGroup() as group:
        child = Child()
        transport, _ = await group.subprocess_exec(lambda: child, *SLEEP)
        getattr(transport, method)(*([number] if method == "send_signal" else []))
        await child.end()
        assert transport.get_returncode() == -number
    assert gone(transport.get_pid())


@pytest.mark.parametrize("how", ["normally", "by an exception", "by a cancellation"])
async def test_leaving_the_block_kills_the_child(anyio_backend: Any, how: str) -> None:
    descriptors = own_descriptors()
    child = Child()
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        try:
            async with TransportGroup() as group:
                transport, _ = await group.subprocess_exec(lambda: child, *SLEEP)
                transport.get_pipe_transport(0).write(bytes(1 << 20))  # It never reads.
                if how == "by an exception":
                    raise LookupError
                if how == "by a cancellation":
                    scope.cancel()
                    await anyio.sleep_forever()
        except BaseExceptionGroup as group_of_one:
            assert [type(leaf) for leaf in leaves(group_of_one)] == [LookupError]
        except LookupError:
            pass
    assert child.names[-1] == "connection_lost"
    assert transport.get_returncode() == -signal.SIGKILL
    assert gone(transport.get_pid())
    # The threads end with the pipes, which end with the child.
    await until(lambda: own_descriptors() == descriptors)
    await until(lambda: not any(each.name.startswith("transports_anyio: pipe") for each in threading.enumerate()))


async def test_a_program_that_does_not_exist(anyio_backend: Any) -> None:
    descriptors = own_descriptors()
    async with TransportGroup() as group:
        with pytest.raises(FileNotFoundError):
            await group.subprocess_exec(Child, "/nonexistent/program")
    assert own_descriptors() == descriptors
