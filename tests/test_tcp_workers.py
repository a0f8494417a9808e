"""The workers of the examples: several processes behind one port, from the first client to the last worker's end."""

from __future__ import annotations

import re
import signal
import socket
import sys
from pathlib import Path

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from network import HOST
from support import GUARD, Peer, Stack

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("an example of ours"),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads the connections"),
]

EXAMPLE = Path(__file__).parents[1] / "examples" / "tcp_workers.py"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_workers_share_a_port(stack: Stack, end: signal.Signals) -> None:
    command = [sys.executable, str(EXAMPLE), "--backend", stack.name, "--port", "0", "--workers", "2"]
    process = await anyio.open_process(command, stderr=None)
    try:
        assert process.stdout is not None
        output = BufferedByteReceiveStream(process.stdout)

        async def line() -> str:
            with anyio.fail_after(2 * GUARD):
                said = b""
                while not said.strip():  # Two workers that speak at once may put their line ends together.
                    said = await output.receive_until(b"\n", 1000)
            return said.decode()

        first = await line()
        assert first.startswith(f"echoing on {HOST}:")
        address = (HOST, int(first.split(":")[1].split()[0]))
        ready: set[str] = set()
        while len(ready) < 2:
            # "worker 12 is ready", twice, or both in one line.
            ready |= set(re.findall(r"worker (\d+) is", await line()))
        # Which one gets a client is a matter of a hash of its port.
        serving: set[str] = set()
        for _ in range(100):
            with Peer.connect(address) as peer:
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
                peer.shutdown()
                assert await peer.receive() == b""
            serving |= set(re.findall(r"worker (\d+) serves", await line()))
            if serving == ready:
                break
        assert serving == ready
        process.send_signal(end)
        with anyio.fail_after(2 * GUARD):
            assert await process.wait() == 0
        with pytest.raises(ConnectionRefusedError), socket.socket() as sock:
            sock.connect(address)
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.terminate()  # It ends its workers.
            await process.wait()
            await process.aclose()
