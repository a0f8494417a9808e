"""Calls that need the backend while asyncio code runs: on trio, AnyIO would call asyncio then."""

from __future__ import annotations

import asyncio
import os
import socket

import anyio
import anyio.abc
import pytest
from network import needs_pipes
from support import Recorder, until

import transports_anyio._core
from transports_anyio import SubprocessProtocol, TransportGroup, from_asyncio, open_event_loop, to_asyncio
from transports_anyio._driver import TaskDriver
from transports_anyio._poller import Poller
from transports_anyio._task_selector import TaskSelector


class Child(SubprocessProtocol):
    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.calls = []

    def pipe_data_received(self, fd, data):
        assert asyncio.get_running_loop() is self.loop
        self.calls.append(data)

    def process_exited(self):
        assert asyncio.get_running_loop() is self.loop
        self.calls.append("exited")

    def connection_lost(self, exc):
        assert asyncio.get_running_loop() is self.loop
        self.calls.append("lost")


@needs_pipes
async def test_a_child_that_a_thread_waits_for(anyio_backend, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)

    async def use():
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.subprocess_exec(Child, "echo", "hello")
        while "lost" not in protocol.calls:
            await asyncio.sleep(0.001)
        assert protocol.calls[-1] == "lost"
        assert {b"hello\n", "exited"} <= set(protocol.calls)
        assert transport.get_returncode() == 0
        killed, protocol = await loop.subprocess_exec(Child, "sleep", "3600")
        killed.kill()
        while "lost" not in protocol.calls:
            await asyncio.sleep(0.001)
        assert killed.get_returncode() == -9
        await loop.subprocess_exec(Child, "sleep", "3600")

    async with open_event_loop() as loop:
        if anyio_backend[0] != "trio":
            pytest.skip(f"{loop} is asyncio's own")
        await to_asyncio.run(use)


async def test_a_poller_with_tasks(anyio_backend, monkeypatch):
    """Interests change while asyncio code runs."""
    if anyio_backend[0] != "trio":
        pytest.skip("no poller of ours")

    def make_poller():
        from transports_anyio._trio import clock

        selector = TaskSelector()
        return Poller(selector, TaskDriver(selector, clock()))

    monkeypatch.setattr(transports_anyio._core, "make_poller", make_poller)

    async def serve(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def use():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            for _ in range(20):
                writer.write(b"hello\n")
                assert await reader.readline() == b"hello\n"
            writer.transport.pause_reading()
            writer.write(b"x" * 1_000_000 + b"\n")
            await asyncio.sleep(0.01)
            writer.transport.resume_reading()
            writer.write_eof()
            assert len(await reader.read()) == 1_000_001
            writer.close()
            await writer.wait_closed()
        assert await asyncio.to_thread(int, "5") == 5
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            asyncio.get_running_loop().call_later(0.01, theirs.send, b"x")
            assert await asyncio.get_running_loop().sock_recv(ours, 1) == b"x"

    async with open_event_loop():
        await to_asyncio.run(use)


async def test_asyncio_code_uses_a_stream_transport_of_the_backends_group(anyio_backend):
    """Its channel has tasks and scopes of the backend. Either kind of code may close it, at any time."""
    async with TransportGroup() as group, open_event_loop():
        for early in (True, False):
            ours, theirs = socket.socketpair()
            stream = await anyio.abc.SocketStream.from_socket(theirs)
            transport, protocol = await group.connect_stream(Recorder, stream)
            ours.setblocking(False)

            async def write_and_close(transport=transport, early=early):
                transport.write(b"hello")
                if not early:
                    await asyncio.sleep(0.01)
                transport.close()
                await asyncio.sleep(0)

            await to_asyncio.run(write_and_close)
            await protocol.wait_for("connection_lost")
            assert ours.recv(10) == b"hello"
            ours.close()


async def test_backend_code_writes_to_a_transport_of_the_event_loop(anyio_backend):
    """Callbacks that run inside the call find the event loop running."""
    seen = []

    async def connect():
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        paused = Recorder(
            on_pause_writing=lambda *_: seen.append(asyncio.get_running_loop()),
            on_connection_lost=lambda *_: seen.append(asyncio.get_running_loop()),
        )
        transport, _ = await loop.create_connection(lambda: paused, sock=ours)
        return transport, paused, theirs

    async with open_event_loop() as loop:
        transport, protocol, peer = await to_asyncio.run(connect)
        transport.write(bytes(10_000_000))
        assert seen == [loop]
        transport.abort()
        await until(lambda: protocol.lost)
        assert seen == [loop, loop]
        peer.close()


async def test_an_event_may_be_set_from_either_side(anyio_backend):
    """Each task waits for an event of its own kind."""
    async with open_event_loop() as loop:

        async def serve():
            return await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)

        server = await to_asyncio.run(serve)
        waited = []

        async def wait_here():
            await server.wait_closed()
            waited.append("backend")

        async def wait_there():
            await server.wait_closed()
            waited.append("asyncio")

        if anyio_backend[0] == "trio":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait_here)
                tasks.start_soon(to_asyncio.run, wait_there)
                await anyio.sleep(0.01)
                server.close()
            assert sorted(waited) == ["asyncio", "backend"]
        else:
            server.close()


async def test_scopes_of_the_backend_are_cancelled_by_asyncio_code(anyio_backend):
    async with open_event_loop() as loop:
        with anyio.CancelScope() as scope:
            to_asyncio.run_sync(loop.call_later, 0.01, scope.cancel)
            await anyio.sleep(3600)
        assert scope.cancelled_caught
        event = anyio.Event()

        async def set_it():
            await asyncio.sleep(0)
            from_asyncio.run_sync(event.set)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_asyncio.run, set_it)
            await event.wait()
