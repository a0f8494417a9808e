"""The workers of the examples: several processes behind one port, from the first client to the last worker's end."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from network import HOST
from support import GUARD, Peer, Stack

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("the example uses a group"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads the connections"),
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "tcp_workers.py"


class Supervisor:
    """The example, once its workers are ready."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self.output = BufferedByteReceiveStream(process.stdout)
        self.workers: set[str] = set()

    async def line(self) -> str:
        with anyio.fail_after(2 * GUARD):
            said = b""
            while not said.strip():  # Two workers that speak at once may put their line ends together.
                said = await self.output.receive_until(b"\n", 1000)
        return said.decode()

    async def until_ready(self) -> None:
        first = await self.line()
        assert first.startswith(f"echoing on {HOST}:")
        self.address = (HOST, int(first.split(":")[1].split()[0]))
        while len(self.workers) < 2:
            # "worker 12 is ready", twice, or both in one line.
            self.workers |= set(re.findall(r"worker (\d+) is", await self.line()))


@asynccontextmanager
async def supervisor(stack: Stack) -> AsyncIterator[Supervisor]:
    command = [sys.executable, str(EXAMPLE), "--backend", stack.name, "--port", "0", "--workers", "2"]
    process = await anyio.open_process(command, stderr=None)
    try:
        made = Supervisor(process)
        await made.until_ready()
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.terminate()  # It ends its workers.
            await process.wait()
            await process.aclose()


def refuses(address: tuple[str, int]) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == errno.ECONNREFUSED


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_workers_share_a_port(stack: Stack, end: signal.Signals) -> None:
    async with supervisor(stack) as supervised:
        # A hash of the client's port decides which worker gets it.
        serving: set[str] = set()
        for _ in range(100):
            with Peer.connect(supervised.address) as peer:
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
                peer.shutdown()
                assert await peer.receive() == b""
            serving |= set(re.findall(r"worker (\d+) serves", await supervised.line()))
            if serving == supervised.workers:
                break
        assert serving == supervised.workers
        supervised.process.send_signal(end)
        with anyio.fail_after(2 * GUARD):
            assert await supervised.process.wait() == 0
        assert refuses(supervised.address)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a client"])
async def test_workers_end_with_a_supervisor_that_is_killed(stack: Stack, busy: bool) -> None:
    async with supervisor(stack) as supervised, AsyncExitStack() as clients:
        watches = [os.pidfd_open(int(pid)) for pid in supervised.workers]
        for watch in watches:
            clients.callback(os.close, watch)
        if busy:
            peer = clients.enter_context(Peer.connect(supervised.address))
            await peer.send(b"hello")
            assert await peer.receive_exactly(5) == b"hello"
        supervised.process.kill()
        try:
            with anyio.fail_after(2 * GUARD):
                for watch in watches:
                    await anyio.wait_readable(watch)
        except BaseException:
            for watch in watches:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(watch, signal.SIGKILL)
            raise
        assert refuses(supervised.address)
        if busy:
            assert await peer.gone()


async def test_one_exiting_worker_ends_the_others(stack: Stack) -> None:
    async with supervisor(stack) as supervised:
        os.kill(int(min(supervised.workers)), signal.SIGKILL)
        with anyio.fail_after(2 * GUARD):
            assert await supervised.process.wait() == 0
        assert refuses(supervised.address)
