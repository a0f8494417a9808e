"""asyncio's own streams, children, synchronisation and threads."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import contextvars
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from peers import GUARD, HOST, Tls, command, program

DEVNULL, PIPE = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("encrypted", [False, True])
async def test_streams(encrypted: bool, tls: Tls) -> None:
    context = {"ssl": tls.server} if encrypted else {}
    async with await asyncio.start_server(echo, HOST, 0, **context) as server:
        port = server.sockets[0].getsockname()[1]
        sent = os.urandom(3_000_000)

        async def talk() -> None:
            reader, writer = await asyncio.open_connection(HOST, port, ssl=tls.client if encrypted else None)

            async def send() -> None:
                for start in range(0, len(sent), 100_000):
                    writer.write(sent[start : start + 100_000])
                    await writer.drain()

            sending = asyncio.create_task(send())
            assert await reader.readexactly(len(sent)) == sent
            await sending
            writer.write(b"one line\nanother")
            assert await reader.readline() == b"one line\n"
            assert await reader.readexactly(7) == b"another"
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(talk() for _ in range(5)))


async def test_openssl_with_a_server_of_streams(tls: Tls) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, HOST, 0, ssl=tls.server) as server:
        port = server.sockets[0].getsockname()[1]
        # With -quiet it goes on after the end of its input, until the server closes.
        argv = ["openssl", "s_client", "-quiet", "-verify_return_error", "-CAfile", tls.authority]
        assert await command(*argv, "-connect", f"{HOST}:{port}", data=b"hello\n") == b"HELLO\n"


async def test_start_tls_on_both_sides(tls: Tls) -> None:
    async def upgrade(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"upgrade\n"
        writer.write(b"go ahead\n")
        await writer.start_tls(tls.server)
        await echo(reader, writer)

    async with await asyncio.start_server(upgrade, HOST, 0) as server:
        for _ in range(20):
            reader, writer = await asyncio.open_connection(HOST, server.sockets[0].getsockname()[1])
            writer.write(b"upgrade\n")
            assert await reader.readline() == b"go ahead\n"
            await writer.start_tls(tls.client, server_hostname=HOST)
            writer.write(b"secret\n")
            assert await reader.readline() == b"secret\n"
            writer.close()
            await writer.wait_closed()


async def test_unix_streams(tmp_path: Path) -> None:
    async with await asyncio.start_unix_server(echo, tmp_path / "socket"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(b"hello")
        writer.write_eof()
        assert await reader.read() == b"hello"
        writer.close()
        await writer.wait_closed()


async def test_children() -> None:
    child = await asyncio.create_subprocess_exec(program("cat"), stdin=PIPE, stdout=PIPE)
    sent = os.urandom(2_000_000)
    assert await child.communicate(sent) == (sent, None)
    assert child.returncode == 0
    shell = await asyncio.create_subprocess_shell("echo out; echo err >&2; exit 7", stdout=PIPE, stderr=PIPE)
    assert await shell.communicate() == (b"out\n", b"err\n")
    assert shell.returncode == 7
    sleeping = await asyncio.create_subprocess_exec("sleep", str(GUARD), stdin=DEVNULL)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(sleeping.wait(), 0.02)
    sleeping.terminate()
    assert await sleeping.wait() == -signal.SIGTERM
    with pytest.raises(FileNotFoundError):
        await asyncio.create_subprocess_exec("/nowhere")


async def test_a_conversation_with_a_child() -> None:
    code = "import sys\nfor line in sys.stdin: print(line.strip().upper(), flush=True)"
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=PIPE, stdout=PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    for number in range(50):
        child.stdin.write(b"line %d\n" % number)
        await child.stdin.drain()
        assert await child.stdout.readline() == b"LINE %d\n" % number
    child.stdin.close()
    await child.stdin.wait_closed()
    assert await child.wait() == 0
    assert await child.stdout.read() == b""


async def test_many_children_at_once() -> None:
    async def one(number: int) -> bytes:
        child = await asyncio.create_subprocess_exec("echo", str(number), stdout=PIPE)
        out, _ = await child.communicate()
        return out

    assert await asyncio.gather(*map(one, range(20))) == [b"%d\n" % number for number in range(20)]


async def test_datagrams() -> None:
    loop = asyncio.get_running_loop()

    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.transport.sendto(data.upper(), addr)

    transport, _ = await loop.create_datagram_endpoint(Echo, (HOST, 0))

    def client() -> list[bytes]:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(GUARD)
            answers = []
            for number in range(50):
                sock.sendto(b"message %d" % number, transport.get_extra_info("sockname"))
                answers.append(sock.recv(100))
            return answers

    assert await asyncio.to_thread(client) == [b"MESSAGE %d" % number for number in range(50)]
    transport.close()


async def test_tasks_and_synchronisation() -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(3)
    semaphore, barrier, lock, condition = asyncio.Semaphore(2), asyncio.Barrier(5), asyncio.Lock(), asyncio.Condition()
    done: list[int] = []

    async def worker(number: int) -> None:
        await barrier.wait()
        async with semaphore, lock:
            await queue.put(number)
            await asyncio.sleep(0)
        async with condition:
            done.append(number)
            condition.notify_all()

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(worker(number))
        got = {await queue.get() for _ in range(5)}
        async with condition:
            await condition.wait_for(lambda: len(done) == 5)
    assert got == set(range(5))

    async def fail() -> None:
        raise ValueError("on purpose")

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="on purpose")):
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(GUARD))
            group.create_task(fail())
    order = [await each for each in asyncio.as_completed([asyncio.sleep(t, t) for t in (0.03, 0.01, 0.02)])]
    assert order == [0.01, 0.02, 0.03]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asyncio.sleep(0.05)), 0.01)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_threads() -> None:
    loop = asyncio.get_running_loop()
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("inside")
    assert await asyncio.to_thread(variable.get) == "inside"
    assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()

    async def in_the_loop(number: int) -> int:
        await asyncio.sleep(0)
        return number + threading.get_ident()

    def call() -> list[int]:
        futures = [asyncio.run_coroutine_threadsafe(in_the_loop(number), loop) for number in range(100)]
        return [future.result(GUARD) for future in futures]

    here = threading.get_ident()
    for answers in await asyncio.gather(*(asyncio.to_thread(call) for _ in range(4))):
        assert answers == [number + here for number in range(100)]
    rung = asyncio.Event()
    timer = threading.Timer(0.02, loop.call_soon_threadsafe, (rung.set,))
    timer.start()
    began = time.monotonic()
    await rung.wait()
    assert time.monotonic() - began < GUARD / 2


async def test_signals() -> None:
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[str] = asyncio.Queue()
    loop.add_signal_handler(signal.SIGUSR1, came.put_nowait, "usr1")
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert await came.get() == "usr1"
    assert loop.remove_signal_handler(signal.SIGUSR1)
    assert not loop.remove_signal_handler(signal.SIGUSR1)


async def test_bare_sockets() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server((HOST, 0)) as listener, socket.socket() as client:
        listener.setblocking(False)
        client.setblocking(False)
        accepting = asyncio.create_task(loop.sock_accept(listener))
        await loop.sock_connect(client, listener.getsockname())
        accepted, _ = await accepting
        with accepted:
            sending = asyncio.create_task(loop.sock_sendall(client, bytes(5_000_000)))
            left = 5_000_000
            while left:
                left -= len(await loop.sock_recv(accepted, 1 << 20))
            await sending
            receiving = asyncio.create_task(loop.sock_recv(accepted, 1))
            await asyncio.sleep(0.01)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            await loop.sock_sendall(client, b"x")
            assert await loop.sock_recv(accepted, 10) == b"x"


async def test_names() -> None:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)
    assert (HOST, 80) in [address[:2] for *_, address in found]
    assert (await loop.getnameinfo((HOST, 80), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)) == (HOST, "80")
