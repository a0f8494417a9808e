"""TLS peers made with Python's `ssl` and asyncio, each in a process of its own: `python tls_peers.py TASK …`."""

from __future__ import annotations

import asyncio
import hashlib
import select
import socket
import ssl
import sys
import time
from typing import Any


def client_context(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca)


def server_context(chain: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return context


def blocking_client(port: str, ca: str, name: str, size: str) -> None:
    """Send `size` bytes in blocks, reading each back; then close in order."""
    left = int(size)
    sock = client_context(ca).wrap_socket(
        socket.create_connection(("127.0.0.1", int(port))), server_hostname=name, suppress_ragged_eofs=False
    )
    number = 0
    while left:
        block = (number.to_bytes(8, "big") * 8192)[:left]
        sock.sendall(block)
        back = b""
        while len(back) < len(block):
            back += sock.recv(65536)
        assert back == block
        left -= len(block)
        number += 1
    sock.unwrap().close()
    print("done", number)


def blocking_server(chain: str) -> None:
    """Echo to one client until it closes in order."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1])
        plain, _ = listener.accept()
    sock = server_context(chain).wrap_socket(plain, server_side=True, suppress_ragged_eofs=False)
    count = 0
    while data := sock.recv(65536):
        sock.sendall(data)
        count += len(data)
    sock.unwrap().close()
    print("done", count)


def exchange(port: str, ca: str, name: str, size: str, version: str) -> None:
    """Send `size` bytes and read until the end, both at the same time with small buffers; print both hashes."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    plain.connect(("127.0.0.1", int(port)))
    context = client_context(ca)
    context.maximum_version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[version]
    sock = context.wrap_socket(plain, server_hostname=name, suppress_ragged_eofs=False)
    sock.setblocking(False)
    left = int(size)
    sent = hashlib.sha256()
    received = hashlib.sha256()
    count = number = 0
    block = b""
    ended = False
    while left or not ended:
        moved = False
        if left:
            if not block:
                block = (number.to_bytes(8, "big") * 2000)[:left]
                number += 1
            try:
                done = sock.send(block)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            else:
                sent.update(block[:done])
                block = block[done:]
                left -= done
                moved = True
        if not ended:
            try:
                data = sock.recv(5000)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            else:
                ended = not data
                received.update(data)
                count += len(data)
                moved = True
        if not moved:
            select.select([sock], [sock] if left else [], [], 30)
    sock.setblocking(True)
    sock.unwrap().close()
    print(sent.hexdigest(), received.hexdigest(), count)


async def asyncio_client(port: str, ca: str, name: str, size: str) -> None:
    """Echo through asyncio's own TLS."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port), ssl=client_context(ca), server_hostname=name)
    data = bytes(range(256)) * (int(size) // 256)

    async def send() -> None:
        for start in range(0, len(data), 50000):
            writer.write(data[start : start + 50000])
            await writer.drain()

    sending = asyncio.ensure_future(send())
    back = await reader.readexactly(len(data))
    await sending
    assert back == data
    writer.close()
    await writer.wait_closed()
    print("done", len(back))


async def asyncio_server(chain: str) -> None:
    """Echo to one client through asyncio's own TLS."""
    done: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def handle(reader: Any, writer: Any) -> None:
        count = 0
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
            count += len(data)
        writer.close()
        await writer.wait_closed()
        done.set_result(count)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=server_context(chain))
    print(server.sockets[0].getsockname()[1])
    print("done", await done)


async def asyncio_starttls_client(port: str, ca: str, name: str) -> None:
    """Talk in plaintext, then upgrade with asyncio's own `start_tls`."""
    loop = asyncio.get_running_loop()

    class Client(asyncio.Protocol):
        def __init__(self) -> None:
            self.received = b""
            self.changed = asyncio.Event()
            self.lost = loop.create_future()

        def data_received(self, data: bytes) -> None:
            self.received += data
            self.changed.set()

        def connection_lost(self, exc: Exception | None) -> None:
            self.lost.set_result(exc)

        async def line(self) -> bytes:
            while b"\n" not in self.received:
                self.changed.clear()
                await self.changed.wait()
            line, self.received = self.received.split(b"\n", 1)
            return line

    transport, protocol = await loop.create_connection(Client, "127.0.0.1", int(port))
    transport.write(b"STARTTLS\n")
    assert await protocol.line() == b"go ahead"
    upgraded = await loop.start_tls(transport, protocol, client_context(ca), server_hostname=name)
    assert upgraded is not None
    upgraded.write(b"hello\n")
    print((await protocol.line()).decode())
    upgraded.close()
    print("lost", await protocol.lost)


def wait_for_close(port: str) -> None:
    """Connect, send nothing, and print a line when the other side ends the connection."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(port))) as sock:
        print("connected")
        try:
            data = sock.recv(1)
        except ConnectionResetError:
            data = b""
    print("closed", data, time.monotonic() - started)


if __name__ == "__main__":
    task = globals()[sys.argv[1]]
    if asyncio.iscoroutinefunction(task):
        asyncio.run(task(*sys.argv[2:]))
    else:
        task(*sys.argv[2:])
