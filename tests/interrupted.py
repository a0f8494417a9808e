"""Press Ctrl-C at the worst moment; a test runs this: `python interrupted.py WHERE`.

A task of trio's can be interrupted after it has put itself on an event's list of waiters, and before it waits.
Setting that event later breaks trio. It can also be interrupted between any two lines.
"""

from __future__ import annotations

import signal
import socket
import ssl
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import anyio

from transports_anyio import DatagramProtocol, Protocol, TransportDatagrams, TransportGroup, TransportStream

#: The functions of ours that are interrupted while the block is left by an exception: owner and name.
FUNCTIONS = {"aborting": "abort_all", "losing": "set_reading"}


class Loud(Protocol):
    def connection_lost(self, exc: Exception | None) -> None:
        print("connection_lost")


def interrupt(when: Callable[[FrameType], object]) -> None:
    """Press Ctrl-C when a function is called for which `when` is true."""

    def trace(frame: FrameType, event: str, argument: object) -> None:
        if when(frame):
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)

    sys.settrace(trace)


#: The functions of ours that begin a wait of trio's.
WAITING = {"wait_in", "receive", "_while_paused"}


def waits(frame: FrameType) -> bool:
    return bool(
        frame.f_code.co_name == "wait_task_rescheduled" and frame.f_back and frame.f_back.f_code.co_name in WAITING
    )


async def main(where: str) -> None:
    with socket.socket() as peer:
        async with TransportGroup() as group:
            server = await group.create_server(Loud, "127.0.0.1", 0)
            peer.connect(server.sockets[0].getsockname())
            while not server.is_serving() or "connections=1" not in repr(server):
                await anyio.sleep(0.001)
            if where in ("leaving", "sendfile"):
                (transport,) = server_transports(server)
                while not transport.get_write_buffer_size():
                    transport.write(bytes(1 << 20))
            if where in FUNCTIONS:
                interrupt(lambda frame: frame.f_code.co_name == FUNCTIONS[where])
                raise LookupError
            if where.startswith("future"):
                await future_interrupted(group, where)
            if where != "aclose":
                interrupt(waits)
            if where == "serve_forever":
                await server.serve_forever()
            elif where == "wait_closed of the server":
                await server.wait_closed()
            elif where == "wait_closed of the group":
                await group.wait_closed()
            elif where == "sendfile":
                with open(__file__, "rb") as file:
                    await group.sendfile(transport, file)
            elif where == "handshake":
                context = ssl.create_default_context()
                await group.create_connection(Protocol, *server.sockets[0].getsockname(), ssl=context)
            elif where == "start_tls":
                client, protocol = await group.create_connection(Protocol, *server.sockets[0].getsockname())
                await group.start_tls(client, protocol, ssl.create_default_context(), server_hostname="localhost")
            elif where in ("receive", "async for", "send", "aclose"):
                (transport,) = server_transports(server)
                await stream_interrupted(TransportStream(transport), where)
            elif where == "datagrams":
                endpoint, _ = await group.create_datagram_endpoint(DatagramProtocol, local_addr=("127.0.0.1", 0))
                await TransportDatagrams(endpoint).receive()


async def stream_interrupted(stream: TransportStream, where: str) -> None:
    if where == "receive":
        await stream.receive()
    elif where == "async for":
        async for _ in stream:
            pass
    elif where == "send":
        while True:
            await stream.send(bytes(1 << 20))
    else:

        async def receive() -> None:
            try:
                await stream.receive()
            except anyio.ClosedResourceError:
                print("closed")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.sleep(0.001)
            interrupt(lambda frame: frame.f_code.co_name == "notify")
            try:
                await stream.aclose()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.001)


async def future_interrupted(group: TransportGroup, where: str) -> None:
    """Be interrupted while another task waits too: as this one begins to wait, or in the middle of waking the other."""
    future = group.create_future()

    async def wait() -> None:
        print("the other task got", await future)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.sleep(0.001)
        if where == "future":
            interrupt(waits)
            try:
                await future
            finally:
                future.set_result(1)
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.001)
        else:
            interrupt(lambda frame: frame.f_code.co_name == "notify")
            try:
                future.set_result(1)
                await anyio.sleep(1)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.001)


def server_transports(server: Any) -> list[Any]:
    return list(server._connections)


if __name__ == "__main__":
    try:
        anyio.run(main, sys.argv[1], backend="trio")
    except BaseException as exc:
        while hasattr(exc, "exceptions"):
            (exc,) = exc.exceptions
        print(type(exc).__name__)
