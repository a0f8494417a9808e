"""The workers of the examples: several processes behind one port, from the first client to the last worker's end."""

from __future__ import annotations

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
    async with await anyio.open_process(command, stderr=None) as process:
        assert process.stdout is not None
        output = BufferedByteReceiveStream(process.stdout)

        async def line() -> str:
            with anyio.fail_after(2 * GUARD):
                return (await output.receive_until(b"\n", 1000)).decode()

        first = await line()
        assert first.startswith(f"echoing on {HOST}:")
        address = (HOST, int(first.split(":")[1].split()[0]))
        ready = {(await line()).split()[1] for _ in range(2)}
        assert len(ready) == 2
        # Which one gets a client is a matter of a hash of its port.
        serving = set()
        for _ in range(100):
            with Peer.connect(address) as peer:
                await peer.send(b"hello")
                assert await peer.receive_exactly(5) == b"hello"
                peer.shutdown()
                assert await peer.receive() == b""
            serving.add((await line()).split()[1])
            if serving == ready:
                break
        assert serving == ready
        process.send_signal(end)
        with anyio.fail_after(2 * GUARD):
            assert await process.wait() == 0
        with pytest.raises(ConnectionRefusedError), socket.socket() as sock:
            sock.connect(address)
