"""The servers of bench_adapters.py, each run as a process of its own: `python adapter_servers.py PEER KIND`.

A peer is `stream` or `adapter`, a slash, and the backend. Both echo what comes on the same AnyIO objects: `stream` in a
task for each connection, `adapter` in a protocol that `connect_stream` or `connect_datagram_socket` puts over it. A
server prints its port and serves until its standard input ends. Connections in memory have their clients in the same
process: `python adapter_servers.py PEER KIND CONNECTIONS SIZE SECONDS` prints microseconds of processor time for each
echo.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream, ByteSendStream, SocketAttribute, SocketListener
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSListener
from servers import HOST, Echo, UDPEcho, announce, bound, end_with_standard_input, tls_context, with_anyio

from transports_anyio import TransportGroup

Handle = Callable[[Any], Awaitable[object]]


class MemoryReceiver(ByteReceiveStream):
    def __init__(self, items: Any) -> None:
        self.items = items

    async def receive(self, max_bytes: int = 65536) -> bytes:
        data: bytes = await self.items.receive()
        return data

    async def aclose(self) -> None:
        self.items.close()


class MemorySender(ByteSendStream):
    def __init__(self, items: Any) -> None:
        self.items = items

    async def send(self, item: bytes) -> None:
        await self.items.send(item)

    async def aclose(self) -> None:
        self.items.close()


def memory_pair() -> tuple[StapledByteStream, StapledByteStream]:
    there = anyio.create_memory_object_stream[bytes](1)
    back = anyio.create_memory_object_stream[bytes](1)
    return (
        StapledByteStream(MemorySender(there[0]), MemoryReceiver(back[1])),
        StapledByteStream(MemorySender(back[0]), MemoryReceiver(there[1])),
    )


async def echo(stream: Any) -> None:
    with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with stream:
            async for data in stream:
                await stream.send(data)


def bound_unix() -> tuple[socket.socket, int]:
    """Return a listening UNIX socket, and the number in its abstract name, which the load generator knows."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0transports_anyio {os.getpid()}")
    sock.listen(1024)
    return sock, os.getpid()


async def serve_streams(kind: str, handle: Handle) -> None:
    sock, port = bound_unix() if kind == "unix" else (bound(), 0)
    listener: Any = await SocketListener.from_socket(sock)
    if kind == "tls":
        listener = TLSListener(listener, tls_context(), standard_compatible=False)
    announce(port or sock.getsockname()[1])
    if kind == "stapled":
        await listener.serve(lambda stream: handle(StapledByteStream(stream, stream)))
    else:
        await listener.serve(handle)


async def serve(is_adapter: bool, kind: str) -> None:
    if not is_adapter:
        if kind != "udp":
            await serve_streams(kind, echo)
        async with await anyio.create_udp_socket(local_host=HOST) as udp:
            announce(udp.extra(SocketAttribute.local_port))
            async for data, address in udp:
                await udp.sendto(data, *address)
    async with TransportGroup() as group:
        if kind == "udp":
            udp = await anyio.create_udp_socket(local_host=HOST)
            announce(udp.extra(SocketAttribute.local_port))
            await group.connect_datagram_socket(UDPEcho, udp)
        else:
            await serve_streams(kind, lambda stream: group.connect_stream(Echo, stream))
        await anyio.sleep_forever()


async def measure_memory(is_adapter: bool, connections: int, size: int, seconds: float) -> float:
    answers = 0
    message = bytes(size)

    async def ask(stream: Any) -> None:
        nonlocal answers
        while time.monotonic() < end:
            await stream.send(message)
            left = size
            while left:
                left -= len(await stream.receive())
            answers += 1
        await stream.aclose()

    async with contextlib.AsyncExitStack() as stack:
        group = await stack.enter_async_context(TransportGroup()) if is_adapter else None
        async with anyio.create_task_group() as tasks:
            end = time.monotonic() + seconds
            for _ in range(connections):
                ours, theirs = memory_pair()
                if group is None:
                    tasks.start_soon(echo, ours)
                else:
                    await group.connect_stream(Echo, ours)
                tasks.start_soon(ask, theirs)
            before = time.process_time()
        return (time.process_time() - before) / answers * 1e6


def main() -> None:
    peer, kind, *arguments = sys.argv[1:]
    role, _, backend = peer.partition("/")

    async def run(_: str) -> None:
        if arguments:
            connections, size, seconds = arguments
            print(await measure_memory(role != "stream", int(connections), int(size), float(seconds)))
        else:
            await serve(role != "stream", kind)

    with_anyio(run, backend, "")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        end_with_standard_input()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    main()
