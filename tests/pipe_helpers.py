"""Helpers for the tests of pipes: pairs of files, and transports that read or write them."""

from __future__ import annotations

import os
import pty
import socket
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from support import GUARD, Recorder, listening, until

#: Why some tests need polling.
HANGUP = "only a write shows that the reader has gone"


@contextmanager
def pipe() -> Iterator[tuple[Any, Any]]:
    read, write = os.pipe()
    with open(read, "rb", 0) as reader, open(write, "wb", 0) as writer:
        yield reader, writer


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection."""
    with listening() as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            yield near, far


@contextmanager
def unix_connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@contextmanager
def terminal() -> Iterator[tuple[Any, Any]]:
    """Yield both ends of a pseudo-terminal: the program's and the user's."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    with open(master, "r+b", 0) as user, open(slave, "r+b", 0) as program:
        os.set_blocking(user.fileno(), False)
        yield program, user


async def connect_reader(group: Any, reader: Any, protocol: Any = None) -> tuple[Any, Any]:
    protocol = protocol or Recorder()
    transport, made = await group.connect_read_pipe(lambda: protocol, reader)
    assert made is protocol
    await until(lambda: protocol.transport is transport)
    return transport, protocol


async def connect_writer(group: Any, writer: Any, protocol: Any = None) -> tuple[Any, Any]:
    protocol = protocol or Recorder()
    transport, made = await group.connect_write_pipe(lambda: protocol, writer)
    assert made is protocol
    await until(lambda: protocol.transport is transport)
    return transport, protocol


async def drain(reader: Any, size: int | None = None) -> bytes:
    """Read that many bytes, or everything, from a pipe without another reader."""
    os.set_blocking(reader.fileno(), False)
    data = bytearray()
    with anyio.fail_after(GUARD):
        while size is None or len(data) < size:
            try:
                more = os.read(reader.fileno(), 1 << 16)
            except BlockingIOError:
                await anyio.wait_readable(reader.fileno())
                continue
            if not more:
                break
            data += more
    return bytes(data)
