"""Child processes: bulk data through pipes."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from support import (
    GUARD,
    Stack,
    pattern,
    until,
)

from transports_anyio import TransportGroup

if TYPE_CHECKING:
    pass
from process_helpers import Child, Children

pytestmark = pytest.mark.anyio


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
        super().pause_writing()
        self.flow.append("pause")
        self.paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.flow.append("resume")
        self.paused = False
        self.feed()


@pytest.mark.differs("`close` or `abort` inside `resume_writing`")
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


@pytest.mark.needs_polling("only polled pipes are enlarged")
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


@pytest.mark.needs_polling("only polled pipes are enlarged")
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
