"""The servers that are measured, each run as a process of its own: `python servers.py PEER WORKLOAD`.

A peer is a way to serve: asyncio's or uvloop's own transports, trio's streams, AnyIO's streams, trio-asyncio, ours on
each backend, and a bare epoll loop, which is the physical limit. A server prints its port and serves until its standard
input ends. For each line of it, it prints `REPORT` and forgets what was in it.

The workload "http" is served by libraries: uvicorn with h11 on asyncio's transports, hypercorn on trio, and on ours by
`examples/http_server.py`, which uses h11 too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import resource
import select
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypedDict

HOST = "127.0.0.1"
HERE = Path(__file__).parent

# The timers of the workload "mixed": how many, how many seconds each waits before it starts anew.
TIMERS = 8
TIMER_DELAY = 0.005


class Report(TypedDict):
    """What the load generator and the benchmark ask a server for."""

    tls_port: int
    lateness: list[float]
    """By how many seconds the timers of the workload "mixed" were late."""


REPORT: Report = {"tls_port": 0, "lateness": []}


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
    "mixed": Echo,
}


def tls_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.environ["BENCHMARK_CERTIFICATE"])
    return context


class Ticker:
    """A timer that starts anew each time, and notes how late it was."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.start()

    def start(self) -> None:
        self.due = self.owner.time() + TIMER_DELAY
        self.owner.call_later(TIMER_DELAY, self.fired)

    def fired(self) -> None:
        REPORT["lateness"].append(self.owner.time() - self.due)
        self.start()


async def tick(time: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
    """As `Ticker`, in a task."""
    while True:
        due = time() + TIMER_DELAY
        await sleep(TIMER_DELAY)
        REPORT["lateness"].append(time() - due)


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
    if workload == "mixed":
        tls_server = await owner.create_server(Echo, HOST, 0, backlog=1024, ssl=tls_context())
        REPORT["tls_port"] = tls_server.sockets[0].getsockname()[1]
        for number in range(TIMERS):
            owner.call_later(TIMER_DELAY * number / TIMERS, Ticker, owner)
    options = {"ssl": tls_context()} if workload.startswith("tls") else {}
    server = await owner.create_server(PROTOCOLS[workload], HOST, 0, backlog=1024, **options)
    announce(server.sockets[0].getsockname()[1])


async def run_loop(workload: str) -> None:
    if workload == "http":
        await serve_uvicorn()
        return
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
        elif workload == "http":
            await serve_example(group)
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


# -- HTTP --------------------------------------------------------------------------------------------------

BODY = b"Hello, world!"
HEADERS = [(b"content-type", b"text/plain"), (b"content-length", str(len(BODY)).encode())]


async def hello(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """An ASGI application that needs no library."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})


async def serve_uvicorn(http: str = "h11", application: Any = hello) -> None:
    import uvicorn

    sock = bound()
    config = uvicorn.Config(application, http=http, ws="none", lifespan="off", log_level="error", access_log=False)  # type: ignore[arg-type]
    announce(sock.getsockname()[1])
    await uvicorn.Server(config).serve(sockets=[sock])


async def serve_hypercorn(application: Any = hello) -> None:
    from hypercorn.config import Config
    from hypercorn.trio import serve

    sock = bound()
    config = Config()
    config.keep_alive_max_requests = 1 << 60
    config.loglevel = "ERROR"
    config.bind = [f"fd://{sock.fileno()}"]
    announce(sock.getsockname()[1])
    await serve(application, config)


async def serve_example(group: Any) -> None:
    sys.path.append(str(HERE.parent / "examples"))
    import http_server

    def application(_: object) -> http_server.Response:
        headers = [(name.decode(), value.decode()) for name, value in HEADERS]
        return http_server.Response(200, headers, [BODY])

    server = await group.create_server(lambda: http_server.HTTP(application), HOST, 0, backlog=1024)
    announce(server.sockets[0].getsockname()[1])


# -- streams -----------------------------------------------------------------------------------------------


async def run_trio(workload: str) -> None:
    import trio

    if workload == "http":
        await serve_hypercorn()
        return
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
    async with trio.open_nursery() as nursery:
        if workload == "mixed":
            (tls_listener,) = await trio.open_tcp_listeners(0, host=HOST, backlog=1024)
            REPORT["tls_port"] = tls_listener.socket.getsockname()[1]
            listeners.append(trio.SSLListener(tls_listener, tls_context(), https_compatible=True))
            for _ in range(TIMERS):
                nursery.start_soon(tick, trio.current_time, trio.sleep)
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
    async with anyio.create_task_group() as tasks:
        if workload == "mixed":
            tls_sock = bound()
            REPORT["tls_port"] = tls_sock.getsockname()[1]
            plain: Any = await anyio.abc.SocketListener.from_socket(tls_sock)
            tasks.start_soon(TLSListener(plain, tls_context(), standard_compatible=False).serve, handle)
            for _ in range(TIMERS):
                tasks.start_soon(tick, anyio.current_time, anyio.sleep)
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
    connections: dict[int, tuple[socket.socket, memoryview]] = {}
    shared = pages(256 * 1024)
    pending: dict[int, bytes] = {}
    data: Any
    while True:
        for descriptor, events in poller.poll():
            if descriptor == listener.fileno():
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A buffer for each connection, as its protocols have them: the caches hold that much less.
                buffer = pages(256 * 1024) if workload == "buffered" else shared
                connections[sock.fileno()] = sock, buffer
                poller.register(sock.fileno(), select.EPOLLIN)
                continue
            sock, buffer = connections[descriptor]
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
                del connections[descriptor]
                sock.close()
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
    """Answer each line of the standard input with the report, and end when the input ends."""
    import threading

    def wait() -> None:
        for _ in sys.stdin:
            report = Report(tls_port=REPORT["tls_port"], lateness=REPORT["lateness"][:])
            del REPORT["lateness"][: len(report["lateness"])]
            print(json.dumps(report), flush=True)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_standard_input()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    PEERS[sys.argv[1]](sys.argv[2])
