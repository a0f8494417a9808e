"""The servers that are measured, each run as a process of its own: `python servers.py PEER WORKLOAD`.

A peer is a way to serve: asyncio's or uvloop's own transports, trio's streams, AnyIO's streams, trio-asyncio, ours on
each backend, and a bare epoll loop, which is the physical limit. A server prints its port and serves until its standard
input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import resource
import select
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
HERE = Path(__file__).parent

Announce = Callable[[int], None]


def pages(size: int) -> memoryview:
    """Return memory that begins with a page, for every peer alike: elsewhere a copy costs several times as much."""
    return memoryview(mmap.mmap(-1, size))


# -- protocols, the same for every peer that has transports ------------------------------------------------


class Echo(asyncio.Protocol):
    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class BufferedEcho(asyncio.BufferedProtocol):
    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = pages(256 * 1024)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(self.buffer[:nbytes])

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Lines(Echo):
    """Answer every request with a thousand small pieces, as a template engine would."""

    pieces = [b"x" * 100] * 1000

    def __init__(self) -> None:
        self.received = 0

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        while self.received >= 100_000:
            self.received -= 100_000
            self.transport.writelines(self.pieces)


class Push(asyncio.Protocol):
    """Send 64 MiB as fast as flow control lets it; the peer closes."""

    transport: Any
    chunk = bytes(64 * 1024)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.left = 1024
        self.paused = False
        self.push()

    def push(self) -> None:
        while self.left and not self.paused:
            self.left -= 1
            self.transport.write(self.chunk)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.push()


class UDPEcho(asyncio.DatagramProtocol):
    transport: Any

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


PROTOCOLS: dict[str, type[asyncio.BaseProtocol]] = {
    "echo": Echo,
    "tls": Echo,
    "buffered": BufferedEcho,
    "tls buffered": BufferedEcho,
    "lines": Lines,
    "push": Push,
    "stream": Echo,
}


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.environ["BENCHMARK_CERTIFICATE"])
    return context


def announce(port: int) -> None:
    print(port, flush=True)


def bound() -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    sock.listen(1024)
    return sock


# -- event loops with transports ---------------------------------------------------------------------------


async def serve_with_transports(owner: Any, workload: str) -> None:
    """`owner` is an event loop or a `TransportGroup`: both have the endpoint functions."""
    if workload == "udp":
        transport, _ = await owner.create_datagram_endpoint(UDPEcho, local_addr=(HOST, 0))
        announce(transport.get_extra_info("sockname")[1])
        return
    options = {"ssl": tls_context()} if workload.startswith("tls") else {}
    server = await owner.create_server(PROTOCOLS[workload], HOST, 0, backlog=1024, **options)
    announce(server.sockets[0].getsockname()[1])


async def run_loop(workload: str) -> None:
    await serve_with_transports(asyncio.get_running_loop(), workload)
    await asyncio.Event().wait()


async def run_group(workload: str) -> None:
    import anyio

    from transports_anyio import TransportGroup

    async with TransportGroup() as group:
        if workload == "stream":
            sock = bound()
            listener = await anyio.abc.SocketListener.from_socket(sock)
            announce(sock.getsockname()[1])

            async def handle(stream: Any) -> None:
                await group.connect_stream(Echo, stream)

            await listener.serve(handle)
        elif workload == "async":
            await serve_async_code(group)
        else:
            await serve_with_transports(group, workload)
        await anyio.sleep_forever()


async def serve_async_code(group: Any) -> None:
    """Echo in a task for each connection, over the transport as an AnyIO stream."""
    import anyio

    from transports_anyio import TransportStream

    class Handing(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            group.start_soon(echo_over_stream, TransportStream(transport))

    async def echo_over_stream(stream: Any) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with stream:
                async for data in stream:
                    await stream.send(data)

    server = await group.create_server(Handing, HOST, 0, backlog=1024)
    announce(server.sockets[0].getsockname()[1])


# -- streams -----------------------------------------------------------------------------------------------


async def run_trio(workload: str) -> None:
    import trio

    if workload == "udp":
        udp = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await udp.bind((HOST, 0))
        announce(udp.getsockname()[1])
        while True:
            data, address = await udp.recvfrom(65536)
            await udp.sendto(data, address)

    lines = b"".join(Lines.pieces)

    async def handle(stream: Any) -> None:
        received = 0
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                if workload == "push":
                    for _ in range(1024):
                        await stream.send_all(Push.chunk)
                    return
                while data := await stream.receive_some():
                    if workload != "lines":
                        await stream.send_all(data)
                        continue
                    received += len(data)
                    while received >= len(lines):
                        received -= len(lines)
                        await stream.send_all(lines)

    (listener,) = await trio.open_tcp_listeners(0, host=HOST, backlog=1024)
    listeners: list[Any] = [listener]
    if workload == "tls":
        listeners = [trio.SSLListener(listener, tls_context(), https_compatible=True)]
    announce(listener.socket.getsockname()[1])
    await trio.serve_listeners(handle, listeners)


async def run_anyio_streams(workload: str) -> None:
    import anyio
    from anyio.streams.tls import TLSListener

    if workload == "udp":
        async with await anyio.create_udp_socket(local_host=HOST) as udp:
            announce(udp.extra(anyio.abc.SocketAttribute.local_port))
            async for data, address in udp:
                await udp.sendto(data, *address)

    async def handle(stream: Any) -> None:
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async with stream:
                if workload == "push":
                    for _ in range(1024):
                        await stream.send(Push.chunk)
                    return
                async for data in stream:
                    await stream.send(data)

    sock = bound()
    listener: Any = await anyio.abc.SocketListener.from_socket(sock)
    if workload == "tls":
        listener = TLSListener(listener, tls_context(), standard_compatible=False)
    announce(sock.getsockname()[1])
    await listener.serve(handle)


# -- the limit ---------------------------------------------------------------------------------------------


def run_epoll(workload: str) -> None:
    """Receive and send, and nothing else."""
    poller = select.epoll()
    if workload == "udp":
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind((HOST, 0))
        udp.setblocking(False)
        poller.register(udp.fileno(), select.EPOLLIN)
        announce(udp.getsockname()[1])
        while True:
            poller.poll()
            udp.sendto(*udp.recvfrom(65536))
    listener = bound()
    poller.register(listener.fileno(), select.EPOLLIN)
    announce(listener.getsockname()[1])
    connections: dict[int, socket.socket] = {}
    buffer = pages(256 * 1024)
    pending: dict[int, bytes] = {}
    data: Any
    while True:
        for descriptor, events in poller.poll():
            if descriptor == listener.fileno():
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = sock
                poller.register(sock.fileno(), select.EPOLLIN)
                continue
            sock = connections[descriptor]
            try:
                if events & select.EPOLLOUT:
                    data = pending.pop(descriptor)
                else:
                    data = buffer[: sock.recv_into(buffer)]
                    if workload != "buffered":
                        data = data.tobytes()
                sent = sock.send(data) if data else -1
            except BlockingIOError:
                sent = 0
            except ConnectionError:
                sent = -1
            if sent < 0:
                poller.unregister(descriptor)
                connections.pop(descriptor).close()
            elif sent < len(data):
                pending[descriptor] = bytes(data[sent:])
                poller.modify(descriptor, select.EPOLLOUT)
            elif events & select.EPOLLOUT:
                poller.modify(descriptor, select.EPOLLIN)


# -- peers -------------------------------------------------------------------------------------------------


def with_anyio(function: Callable[[str], Awaitable[object]], backend: str, workload: str) -> None:
    import anyio

    options = {"use_uvloop": backend == "uvloop"} if backend != "trio" else {}
    anyio.run(function, workload, backend="trio" if backend == "trio" else "asyncio", backend_options=options)


def with_uvloop(workload: str) -> None:
    import uvloop

    uvloop.run(run_loop(workload))


def with_trio(workload: str) -> None:
    import trio

    trio.run(run_trio, workload)


def with_trio_asyncio(workload: str) -> None:
    import trio_asyncio

    trio_asyncio.run(trio_asyncio.aio_as_trio(run_loop), workload)


PEERS: dict[str, Callable[[str], object]] = {
    "epoll": run_epoll,
    "asyncio": lambda workload: asyncio.run(run_loop(workload)),
    "uvloop": with_uvloop,
    "trio": with_trio,
    "trio-asyncio": with_trio_asyncio,
    "anyio streams/asyncio": lambda workload: with_anyio(run_anyio_streams, "asyncio", workload),
    "anyio streams/uvloop": lambda workload: with_anyio(run_anyio_streams, "uvloop", workload),
    "anyio streams/trio": lambda workload: with_anyio(run_anyio_streams, "trio", workload),
    "ours/asyncio": lambda workload: with_anyio(run_group, "asyncio", workload),
    "ours/uvloop": lambda workload: with_anyio(run_group, "uvloop", workload),
    "ours/trio": lambda workload: with_anyio(run_group, "trio", workload),
}


def end_with_standard_input() -> None:
    import threading

    def wait() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_standard_input()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    PEERS[sys.argv[1]](sys.argv[2])
