"""Libraries that have descriptors of their own, and only ask to be called when these are ready."""

from __future__ import annotations

import asyncio
import os
import socket
import tty
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiodns
import aiomqtt
import dnslib
import dnslib.server
import grpc
import grpc.aio
import peers
import pycares
import pytest
import serial_asyncio
import zmq
import zmq.asyncio
from peers import GUARD, HOST
from prompt_toolkit import PromptSession
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.output import DummyOutput


@contextmanager
def terminal() -> Iterator[tuple[int, str]]:
    """A pseudo-terminal: the descriptor of one end, the path of the other."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        yield ours, os.ttyname(theirs)
    finally:
        os.close(ours)
        os.close(theirs)


# pyserial-asyncio: add_reader and add_writer


async def test_a_serial_line() -> None:
    with terminal() as (device, path):

        def echo(size: int) -> None:
            left = size
            while left:
                data = os.read(device, 1000)
                left -= len(data)
                while data:
                    data = data[os.write(device, data) :]

        reader, writer = await serial_asyncio.open_serial_connection(url=path, baudrate=115200)
        sent = bytes(range(256)) * 400
        echoing = asyncio.create_task(asyncio.to_thread(echo, len(sent)))
        sending = asyncio.create_task(_send(writer, sent))
        assert await reader.readexactly(len(sent)) == sent
        await asyncio.gather(sending, echoing)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.02)
        os.write(device, b"later")
        assert await reader.readexactly(5) == b"later"
        writer.close()
        await asyncio.sleep(0.01)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    for start in range(0, len(data), 1000):
        writer.write(data[start : start + 1000])
        await writer.drain()


# prompt_toolkit: the terminal's descriptor, a signal handler, threads


async def test_a_prompt() -> None:
    # A line discipline like a person's, but without an echo.
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    try:
        with os.fdopen(os.dup(theirs), "r") as stdin:
            session: PromptSession[str] = PromptSession(input=Vt100Input(stdin), output=DummyOutput())
            with warnings.catch_warnings():
                asking = asyncio.create_task(session.prompt_async("> "))
                for part in (b"hello", b"\x7f\x7f", b"p me", b"\r"):
                    os.write(ours, part)
                    await asyncio.sleep(0.02)
                assert await asking == "help me"
                asking = asyncio.create_task(session.prompt_async("> "))
                await asyncio.sleep(0.02)
                os.write(ours, b"\x1b[A!\r")  # The line before, from the history.
                assert await asking == "help me!"
                asking = asyncio.create_task(session.prompt_async("> "))
                await asyncio.sleep(0.02)
                os.write(ours, b"\x04")
                with pytest.raises(EOFError):
                    await asking
                asking = asyncio.create_task(session.prompt_async("> "))
                await asyncio.sleep(0.02)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
    finally:
        os.close(ours)
        os.close(theirs)


# pyzmq, in Cython around a library in C++


async def test_zeromq() -> None:
    def server(context: zmq.Context[Any]) -> int:
        with context.socket(zmq.REP) as sock:
            ports.put_nowait_threadsafe(sock.bind_to_random_port(f"tcp://{HOST}"))
            count = 0
            while (message := sock.recv()) != b"end":
                sock.send(message.upper())
                count += 1
            sock.send(b"")
            return count

    loop = asyncio.get_running_loop()

    class Ports(asyncio.Queue[int]):
        def put_nowait_threadsafe(self, port: int) -> None:
            loop.call_soon_threadsafe(self.put_nowait, port)

    ports = Ports()
    with zmq.Context() as blocking, zmq.asyncio.Context() as context:
        serving = asyncio.create_task(asyncio.to_thread(server, blocking))
        with context.socket(zmq.REQ) as sock:
            sock.connect(f"tcp://{HOST}:{await ports.get()}")
            for number in range(200):
                await sock.send(b"message %d" % number)
                assert await sock.recv() == b"MESSAGE %d" % number
            await sock.send_multipart([b"end"])
            await sock.recv()
        assert await serving == 200
        with context.socket(zmq.PUB) as publisher, context.socket(zmq.SUB) as subscriber:
            port = publisher.bind_to_random_port(f"tcp://{HOST}")
            subscriber.connect(f"tcp://{HOST}:{port}")
            subscriber.subscribe(b"news")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(subscriber.recv(), 0.05)
            while not await subscriber.poll(10):
                await publisher.send(b"news first")
            assert (await subscriber.recv()).startswith(b"news")


# grpcio, in Cython around a library in C++: its threads wake the loop through a socket that add_reader watches


async def test_grpc() -> None:
    async def shout(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0)
        return request.upper()

    async def count(request: bytes, context: Any) -> Any:
        for number in range(int(request)):
            await asyncio.sleep(0)
            yield b"%d" % number

    async def slow(request: bytes, context: Any) -> bytes:
        began.set()
        try:
            await asyncio.sleep(GUARD)
        finally:
            cancelled.set()
        return b""

    async def fail(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.NOT_FOUND, "nothing here")
        return b""

    began, cancelled = asyncio.Event(), asyncio.Event()
    handlers = {
        "Shout": grpc.unary_unary_rpc_method_handler(shout),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Slow": grpc.unary_unary_rpc_method_handler(slow),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()

    def blocking() -> bytes:
        with grpc.insecure_channel(f"{HOST}:{port}") as channel:
            answer: bytes = channel.unary_unary("/Test/Shout")(b"from a blocking client", timeout=GUARD)
            return answer

    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        call = channel.unary_unary("/Test/Shout")
        assert await asyncio.gather(*(call(b"message %d" % n) for n in range(100))) == [
            b"MESSAGE %d" % n for n in range(100)
        ]
        assert [each async for each in channel.unary_stream("/Test/Count")(b"200")] == [b"%d" % n for n in range(200)]
        assert await asyncio.to_thread(blocking) == b"FROM A BLOCKING CLIENT"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary("/Test/Fail")(b"")
        assert failed.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary("/Test/Slow")(b"", timeout=0.1)
        assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await cancelled.wait()
        began.clear()
        cancelled.clear()
        request = asyncio.ensure_future(channel.unary_unary("/Test/Slow")(b""))
        await began.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await cancelled.wait()
    await server.stop(0)


# aiodns, around c-ares in C


class Names(dnslib.server.BaseResolver):
    def resolve(self, request: Any, handler: Any) -> Any:
        reply = request.reply()
        name = str(request.q.qname)
        if name.startswith("host"):
            reply.add_answer(*dnslib.RR.fromZone(f"{name} 60 IN A 192.0.2.{int(name[4:].split('.', maxsplit=1)[0])}"))
        elif name.startswith("text"):
            reply.add_answer(*dnslib.RR.fromZone(f'{name} 60 IN TXT "{"x" * 200}"'))
        else:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        return reply


async def test_dns() -> None:
    server = dnslib.server.DNSServer(Names(), address=HOST, port=0, logger=dnslib.server.DNSLogger(logf=lambda _: None))
    port = server.server.server_address[1]
    server.start_thread()
    try:
        async with aiodns.DNSResolver(nameservers=[f"{HOST}:{port}"], timeout=2, tries=2) as resolver:
            answers = await asyncio.gather(*(resolver.query_dns(f"host{n}.example.", "A") for n in range(1, 50)))
            assert [answer.answer[0].data.addr for answer in answers] == [f"192.0.2.{n}" for n in range(1, 50)]
            (text,) = (await resolver.query_dns("text.example.", "TXT")).answer
            assert text.data.data == b"x" * 200
            with pytest.raises(aiodns.error.DNSError) as failed:
                await resolver.query_dns("nowhere.example.", "A")
            assert failed.value.args[0] == pycares.errno.ARES_ENOTFOUND
        with socket.socket(type=socket.SOCK_DGRAM) as silent:
            silent.bind((HOST, 0))
            address = f"{HOST}:{silent.getsockname()[1]}"
            async with aiodns.DNSResolver(nameservers=[address], timeout=0.1, tries=1) as resolver:
                with pytest.raises(aiodns.error.DNSError) as failed:
                    await resolver.query_dns("host1.example.", "A")
                assert failed.value.args[0] == pycares.errno.ARES_ETIMEOUT
    finally:
        server.stop()
        server.server.server_close()


# aiomqtt: paho's socket, by add_reader and add_writer, with mosquitto


async def test_mqtt(mosquitto: int) -> None:
    async with aiomqtt.Client(HOST, mosquitto) as client:
        await client.subscribe("test/#")
        payload = bytes(range(256)) * 1000
        await client.publish("test/big", payload, qos=1)
        message = await anext(client.messages)
        assert (str(message.topic), message.payload) == ("test/big", payload)
        argv = [
            "mosquitto_pub",
            "-h",
            HOST,
            "-p",
            str(mosquitto),
            "-t",
            "test/cli",
            "-q",
            "1",
            "-m",
            "from mosquitto_pub",
        ]
        await peers.command(*argv)
        assert (await anext(client.messages)).payload == b"from mosquitto_pub"
        for number in range(50):
            await client.publish("test/many", str(number), qos=2)
        assert [(await anext(client.messages)).payload for _ in range(50)] == [b"%d" % number for number in range(50)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(client.messages)
