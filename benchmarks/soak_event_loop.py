"""Send requests through uvicorn and aiohttp, half of them from clients that give up, and check that nothing is left.

    nox -s soak_event_loop                                   on trio, two minutes
    nox -s soak_event_loop -- --backend asyncio --seconds 600

In one event loop: uvicorn and an aiohttp server, and two kinds of clients: an aiohttp session in asyncio tasks, and the
same session called from backend tasks with time-outs. In another process: blocking sockets that send half a request,
read half an answer, or reset the connection. After each round, when all requests have ended, it collects garbage and
counts what is left: memory, objects, file descriptors, asyncio tasks, backend tasks and threads. The program fails if
there is more in the last third of the time than in the middle one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import anyio
import uvicorn
from aiohttp import web
from soak import BACKENDS, HOST, OBJECTS_ALLOWED, RESIDENT_ALLOWED, resident

from transports_anyio import from_asyncio, open_event_loop, to_asyncio

CLIENTS_AT_ONCE = 8
BIG = 300_000
#: How long the slow handler takes, in seconds. Its clients give up before.
LONG = 5.0


@dataclass(frozen=True)
class Sample:
    """What is left after a round."""

    seconds: float
    requests: int
    objects: int
    resident: int
    #: File descriptors, asyncio tasks, tasks of the backend, threads.
    kept: tuple[int, int, int, int]


@dataclass
class Service:
    """The handlers of the two servers, and how often they were called."""

    done: Counter[str] = field(default_factory=Counter)

    async def asgi(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        self.done["uvicorn"] += 1
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        path = scope["path"]
        if path == "/slow":
            waiting = asyncio.ensure_future(receive())
            await asyncio.wait({waiting}, timeout=LONG)
            waiting.cancel()
        elif path == "/native":
            body = await from_asyncio.run(self.in_the_backend, body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10 if path == "/big" else 1):
            await send(
                {"type": "http.response.body", "body": bytes(BIG) if path == "/big" else body, "more_body": True}
            )
        await send({"type": "http.response.body"})

    @staticmethod
    async def in_the_backend(body: bytes) -> bytes:
        with anyio.move_on_after(0.001):
            await anyio.sleep(random.random() * 0.002)
        return body

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.done["aiohttp"] += 1
        body = await request.read()
        if request.path == "/slow":
            await asyncio.sleep(LONG)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(10 if request.path == "/big" else 1):
            await response.write(bytes(BIG) if request.path == "/big" else body)
        return response


@contextlib.asynccontextmanager
async def servers(service: Service) -> Any:
    config = uvicorn.Config(
        service.asgi,
        interface="asgi3",
        host=HOST,
        port=0,
        log_config=None,
        lifespan="off",
        timeout_keep_alive=1,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 -- it has no event
        await asyncio.sleep(0.001)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.handle)
    # A client that goes away cancels its handler.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1, keepalive_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    try:
        yield server.servers[0].sockets[0].getsockname()[1], runner.addresses[0][1]
    finally:
        await runner.cleanup()
        server.should_exit = True
        await serving


def kept() -> tuple[int, int, int, int]:
    return (
        len(os.listdir("/proc/self/fd")),  # noqa: PTH208 -- a path makes objects
        len(to_asyncio.run_sync(asyncio.all_tasks)),
        len(anyio.get_running_tasks()),
        # trio keeps threads that have nothing to do for some seconds.
        sum(not thread.name.lower().startswith("trio") for thread in threading.enumerate()),
    )


async def until_left(what: tuple[int, ...]) -> None:
    """Wait until the numbers of descriptors and tasks are `what`, or for ten seconds."""
    with anyio.move_on_after(10):
        while kept()[:3] != what:  # noqa: ASYNC110 -- the servers do not report it
            await anyio.sleep(0.02)


async def run(seconds: float, round_seconds: float) -> tuple[list[Sample], Counter[str]]:
    """Return what was there after each round, and how often each thing was done."""
    service = Service()
    samples: list[Sample] = []
    async with open_event_loop(), to_asyncio.wrap_async_context_manager(servers(service)) as ports:
        await anyio.sleep(0.1)  # Until the event loop's own tasks have begun.
        idle = kept()
        began = time.monotonic()
        command = [sys.executable, __file__, "--clients", *map(str, ports)]
        async with await anyio.open_process(command, stderr=None) as clients:
            assert clients.stdin is not None
            assert clients.stdout is not None
            between = kept()
            while time.monotonic() - began < seconds:
                await clients.stdin.send(f"{round_seconds}\n".encode())
                await one_round(service, ports, round_seconds)
                await clients.stdout.receive()
                # Until the servers know of every client that has gone: both give up their idle connections.
                await until_left(between[:3])
                gc.collect()
                requests = service.done.total()
                samples.append(Sample(time.monotonic() - began, requests, len(gc.get_objects()), resident(), kept()))
            await clients.stdin.aclose()
        await until_left(idle[:3])
        # Libraries start threads that stay with the process: these have to be the same after each round.
        assert kept()[:3] == idle[:3], (idle, kept())
    return samples, service.done


async def one_round(service: Service, ports: Any, seconds: float) -> None:
    """Use both servers for `seconds`, from asyncio tasks and from backend tasks."""
    until = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=30)
    make = to_asyncio.run_sync(lambda: aiohttp.ClientSession(timeout=timeout))
    async with to_asyncio.wrap_async_context_manager(make) as session:

        async def request(path: str, body: bytes = b"") -> None:
            async with session.post(f"http://{HOST}:{random.choice(ports)}{path}", data=body) as response:
                got = await response.read()
                assert response.status == 200, (response, got)
                assert path != "/echo" or got == body

        async def asyncio_clients() -> None:
            async def client() -> None:
                while time.monotonic() < until:
                    way = random.randrange(4)
                    if way == 0:
                        await request("/echo", random.randbytes(random.randrange(20_000)))
                        service.done["echo"] += 1
                    elif way == 1:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(random.random() * 0.02):
                                await request(random.choice(("/slow", "/big")))
                        service.done["asyncio.timeout"] += 1
                    elif way == 2:
                        task = asyncio.create_task(request(random.choice(("/slow", "/big", "/native"))))
                        await asyncio.sleep(random.random() * 0.01)
                        task.cancel()
                        await asyncio.wait({task})
                        service.done["cancelled"] += 1
                    else:
                        await request("/native", b"native")

            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS_AT_ONCE):
                    group.create_task(client())

        async def backend_client() -> None:
            while time.monotonic() < until:
                with anyio.move_on_after(random.random() * 0.02) as scope:
                    await to_asyncio.run(request, random.choice(("/slow", "/big", "/native", "/echo")), b"from outside")
                service.done["move_on_after" if scope.cancelled_caught else "from outside"] += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_asyncio.run, asyncio_clients)
            for _ in range(CLIENTS_AT_ONCE):
                tasks.start_soon(backend_client)


# The clients that give up, in a process of their own


def impatient_client(ports: list[int], until: float, done: Counter[str]) -> None:
    while time.monotonic() < until:
        how = random.choice(("reset", "half a request", "half an answer", "reset while it waits", "polite"))
        with contextlib.suppress(OSError), socket.create_connection((HOST, random.choice(ports)), timeout=30) as sock:
            path = {"half an answer": "big", "reset": "big", "reset while it waits": "slow"}.get(how, "echo")
            length = 100 if how == "half a request" else 5
            head = f"POST /{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
            sock.sendall(f"{head}hello".encode())
            if how == "polite":
                while sock.recv(65536):
                    pass
            elif how == "half an answer":
                sock.recv(1000)
            else:
                time.sleep(random.random() * 0.01)
            if how.startswith("reset"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        done[how] += 1


def impatient_clients(ports: list[int]) -> None:
    """For each line of standard input, work for that number of seconds. Then write a line to standard output."""
    done: Counter[str] = Counter()
    for line in sys.stdin:
        until = time.monotonic() + float(line)
        threads = [threading.Thread(target=impatient_client, args=(ports, until, done)) for _ in range(CLIENTS_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("done", flush=True)
    print("impatient clients:", ", ".join(f"{name} {count}" for name, count in sorted(done.items())), file=sys.stderr)


# The figure


def report(backend: str, samples: list[Sample], done: Counter[str]) -> bool:
    print("   s  requests  objects  resident MiB  descriptors  asyncio tasks  backend tasks  threads")
    step = max(1, len(samples) // 20)
    for number, sample in enumerate(samples):
        if number % step == 0 or number == len(samples) - 1:
            counts = "{:12} {:14} {:14} {:8}".format(*sample.kept)
            size = sample.resident / (1 << 20)
            print(f"{sample.seconds:4.0f}  {sample.requests:8}  {sample.objects:7}  {size:12.2f} {counts}")
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    objects = min(each.objects for each in last) - min(each.objects for each in middle)
    size = min(each.resident for each in last) - min(each.resident for each in middle)
    same = len({each.kept for each in samples}) == 1
    flat = same and objects <= OBJECTS_ALLOWED and size <= RESIDENT_ALLOWED << 20
    print(
        f"{backend}: {'flat' if flat else 'NOT FLAT'}: {objects:+} objects and {size / 1024:+.0f} KiB in "
        f"{samples[-1].requests - samples[third].requests} requests; descriptors, tasks and threads are "
        f"{'the same' if same else 'NOT THE SAME'} after every round\n"
        f"{backend}: {', '.join(f'{name} {count}' for name, count in sorted(done.items()))}",
        flush=True,
    )
    return flat


def main() -> None:
    if sys.argv[1:2] == ["--clients"]:
        impatient_clients([int(port) for port in sys.argv[2:]])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=list(BACKENDS), default="trio")
    parser.add_argument("--seconds", type=float, default=120, help="how long")
    parser.add_argument("--round", type=float, default=3, help="seconds between two looks at what is left")
    arguments = parser.parse_args()
    # They log every client that has gone.
    for logger in ("aiohttp.server", "asyncio", "transports_anyio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    samples, done = anyio.run(run, arguments.seconds, arguments.round, **BACKENDS[arguments.backend])
    sys.exit(not report(arguments.backend, samples, done))


if __name__ == "__main__":
    main()
