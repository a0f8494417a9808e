"""What `BufferedProtocol` costs beside `Protocol`, message by message: `python buffered.py [MESSAGES]`.

One process echoes to itself over two connections that differ in the protocol only, in turns: what disturbs the machine
disturbs both, so that a tenth of a microsecond shows where servers in processes of their own differ by more from one
minute to the next. A figure is the median of what a message took, from before it was sent until its echo was there, and
the median of the differences between neighbours. The time is the clock's, not the processor's, and has the loop's own
rounds in it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import anyio.lowlevel
import trustme
from servers import BufferedEcho, Echo, tls_context, with_anyio

MESSAGES = 10_000
KIB = 1024


async def connected(owner: Any, protocol: Any, *, tls: bool) -> Any:
    """Return the other end of an echoing connection: a socket that does not block."""
    near, far = socket.socketpair()
    wrapped: list[Any] = [far]
    if not tls:
        await owner.connect_accepted_socket(protocol, near)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        shaking = threading.Thread(target=lambda: wrapped.append(context.wrap_socket(far)))
        shaking.start()
        await owner.connect_accepted_socket(protocol, near, ssl=tls_context())
        shaking.join()
    wrapped[-1].setblocking(False)
    return wrapped[-1]


async def echoed(sock: Any, data: bytes) -> float:
    """Return the seconds until `data` has come back."""
    left = len(data)
    begin = perf_counter()
    sock.send(data)
    while left:
        await anyio.lowlevel.checkpoint()
        try:
            left -= len(sock.recv(left))
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
    return perf_counter() - begin


async def compare(owner: Any, peer: str, messages: int) -> None:
    for tls in (False, True):
        plain = await connected(owner, Echo, tls=tls)
        buffered = await connected(owner, BufferedEcho, tls=tls)
        for size in (KIB, 16 * KIB, 64 * KIB):
            data = bytes(size)
            count = messages * 4 * KIB // (size + 3 * KIB)
            pairs = [(await echoed(plain, data), await echoed(buffered, data)) for _ in range(count)]
            first = statistics.median(one for one, _ in pairs) * 1e6
            difference = statistics.median(other - one for one, other in pairs) * 1e6
            name = f"{'tls' if tls else 'plain'} {size // KIB} KiB"
            print(f"{peer:14}{name:14}{first:10.2f}{difference:+10.2f}", flush=True)
        plain.close()
        buffered.close()
        await anyio.sleep(0.05)


def main() -> None:
    messages = int(sys.argv[1]) if len(sys.argv) > 1 else MESSAGES

    async def in_loop(peer: str) -> None:
        await compare(asyncio.get_running_loop(), peer, messages)

    async def in_group(peer: str) -> None:
        from transports_anyio import TransportGroup

        async with TransportGroup() as group:
            await compare(group, peer, messages)

    print(f"{'':28}{'Protocol':>10}{'Buffered':>10}")
    with tempfile.TemporaryDirectory() as folder:
        certificate = Path(folder) / "certificate.pem"
        trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(certificate)
        os.environ["BENCHMARK_CERTIFICATE"] = str(certificate)
        for backend in ("asyncio", "uvloop"):
            with_anyio(in_loop, backend, backend)
        for backend in ("asyncio", "uvloop", "trio"):
            with_anyio(in_group, backend, f"ours/{backend}")


if __name__ == "__main__":
    main()
