"""System calls that fail or do only a part: a layer between the package and the operating system.

The calls are the real ones, on real descriptors, except for the one at the chosen position. Only calls that the package
itself makes pass through the layer: those of the tests' own peers, of AnyIO and of the backends do not. For
transports over AnyIO's own objects the layer wraps these objects instead.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.abc
import pytest

#: The fault that replaces the call. `ONE_BYTE` is no error: the call moves a single byte.
ONE_BYTE = "one byte"
FAULTS = ["EAGAIN", "EINTR", ONE_BYTE, "ECONNRESET", "EPIPE", "ENOBUFS", "EMFILE"]
#: After these faults the call is made again, and nothing else has changed.
TRANSIENT = {"EAGAIN", "EINTR", ONE_BYTE}

#: The highest position of a call that is tried. A scenario has fewer; a bug may have more.
MAX_CALLS = 400


class Layer:
    """Count the package's calls, and make those fail that `chosen` picks by name and number (from 0)."""

    def __init__(self, fault: str, chosen: Callable[[str, int], bool] = lambda name, number: False) -> None:
        self.fault = fault
        self.chosen = chosen
        self.calls: Counter[str] = Counter()
        self.spoiled: list[tuple[str, int]] = []

    def error(self) -> OSError:
        code = getattr(errno, self.fault)
        return OSError(code, os.strerror(code))  # Python picks the subclass, such as `BlockingIOError`.

    def spoils(self, name: str) -> bool:
        caller = sys._getframe(2).f_globals["__name__"]
        # The calls by which a driver wakes itself do not belong to a transport.
        if not caller.startswith("transports_anyio.") or caller.endswith(("_driver", "_poller")):
            return False
        number = self.calls[name]
        self.calls[name] += 1
        if not self.chosen(name, number):
            return False
        self.spoiled.append((name, number))
        return True


def _first_byte(chunks: list[Any]) -> list[Any]:
    return next([memoryview(chunk)[:1]] for chunk in chunks if len(chunk))


def _is_stream(sock: socket.socket) -> bool:
    return sock.type == socket.SOCK_STREAM


@contextmanager
def installed(layer: Layer) -> Iterator[Layer]:
    """Install the layer under the package."""
    sock_type = socket.socket
    real = {
        name: getattr(sock_type, name)
        for name in "send recv recv_into sendmsg sendto recvfrom_into accept connect_ex shutdown".split()
    }
    system = {name: getattr(os, name) for name in ("read", "readv", "write", "writev", "sendfile") if hasattr(os, name)}

    def send(sock: socket.socket, data: Any) -> int:
        if layer.spoils("send"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            if _is_stream(sock):
                data = memoryview(data)[:1]
        return real["send"](sock, data)

    def sendmsg(sock: socket.socket, chunks: Any) -> int:
        chunks = list(chunks)
        if layer.spoils("sendmsg"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            chunks = _first_byte(chunks)
        return real["sendmsg"](sock, chunks)

    def recv(sock: socket.socket, size: int, *args: Any) -> bytes:
        if layer.spoils("recv"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            size = 1
        return real["recv"](sock, size, *args)

    def recv_into(sock: socket.socket, buffer: Any, *args: Any) -> int:
        if layer.spoils("recv_into"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            buffer = memoryview(buffer)[:1]
        return real["recv_into"](sock, buffer, *args)

    def sendto(sock: socket.socket, *args: Any) -> int:
        if layer.spoils("sendto") and layer.fault != ONE_BYTE:
            raise layer.error()
        return real["sendto"](sock, *args)

    def recvfrom_into(sock: socket.socket, *args: Any, **options: Any) -> Any:
        if layer.spoils("recvfrom_into") and layer.fault != ONE_BYTE:
            raise layer.error()
        return real["recvfrom_into"](sock, *args, **options)

    def accept(sock: socket.socket) -> Any:
        if layer.spoils("accept") and layer.fault != ONE_BYTE:
            raise layer.error()
        return real["accept"](sock)

    def connect_ex(sock: socket.socket, address: Any) -> int:
        if layer.spoils("connect_ex") and layer.fault != ONE_BYTE:
            if layer.fault == "EINTR":
                # The system continues to connect (connect(2)).
                real["connect_ex"](sock, address)
            return getattr(errno, layer.fault)
        code: int = real["connect_ex"](sock, address)
        return code

    def shutdown(sock: socket.socket, how: int) -> None:
        if layer.spoils("shutdown") and layer.fault != ONE_BYTE:
            raise layer.error()
        real["shutdown"](sock, how)

    def read(fd: int, size: int) -> bytes:
        if layer.spoils("read"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            size = 1
        return system["read"](fd, size)

    def readv(fd: int, buffers: Any) -> int:
        if layer.spoils("readv"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            buffers = _first_byte(buffers)
        return system["readv"](fd, buffers)

    def write(fd: int, data: Any) -> int:
        if layer.spoils("write"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            data = memoryview(data)[:1]
        return system["write"](fd, data)

    def writev(fd: int, chunks: Any) -> int:
        if layer.spoils("writev"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            chunks = _first_byte(chunks)
        return system["writev"](fd, chunks)

    def sendfile(to: int, fd: int, offset: int, count: int) -> int:
        if layer.spoils("sendfile"):
            if layer.fault != ONE_BYTE:
                raise layer.error()
            count = 1
        return system["sendfile"](to, fd, offset, count)

    with pytest.MonkeyPatch.context() as patch:
        for function in (send, sendmsg, recv, recv_into, sendto, recvfrom_into, accept, connect_ex, shutdown):
            patch.setattr(sock_type, function.__name__, function)
        for function in (read, readv, write, writev, sendfile):  # type: ignore[assignment]
            if function.__name__ in system:
                patch.setattr(os, function.__name__, function)
        yield layer


class _InFront:
    """Wrap one of AnyIO's objects, which makes its own system calls: the layer is between it and us.

    Its faults are those that such an object can have.
    """

    def __init__(self, real: Any, layer: Layer) -> None:
        self._real = real
        self._layer = layer

    @property
    def extra_attributes(self) -> Any:
        return self._real.extra_attributes

    def _spoils(self, name: str) -> bool:
        layer = self._layer
        number = layer.calls[name]
        layer.calls[name] += 1
        if not layer.chosen(name, number):
            return False
        layer.spoiled.append((name, number))
        if layer.fault != ONE_BYTE:
            raise anyio.BrokenResourceError from layer.error()
        return True

    async def aclose(self) -> None:
        await self._real.aclose()


class FaultyReceiveStream(_InFront, anyio.abc.ByteReceiveStream):
    async def receive(self, max_bytes: int = 65536) -> bytes:
        data: bytes = await self._real.receive(1 if self._spoils("receive") else max_bytes)
        return data


class FaultySendStream(_InFront, anyio.abc.ByteSendStream):
    async def send(self, item: bytes) -> None:
        if self._spoils("send"):
            await self._real.send(item[:1])
            item = item[1:]
        await self._real.send(item)


class FaultyStream(FaultyReceiveStream, FaultySendStream, anyio.abc.ByteStream):
    async def send_eof(self) -> None:
        self._spoils("send_eof")
        await self._real.send_eof()


class FaultyDatagrams(_InFront, anyio.abc.ConnectedUDPSocket):
    """A datagram is sent whole or not at all."""

    @property
    def _raw_socket(self) -> socket.socket:
        sock: socket.socket = self._real.extra(anyio.abc.SocketAttribute.raw_socket)
        return sock

    async def receive(self) -> bytes:
        self._spoils("receive")
        data: bytes = await self._real.receive()
        return data

    async def send(self, item: bytes) -> None:
        self._spoils("send")
        await self._real.send(item)


class FaultyProcess(_InFront, anyio.abc.Process):
    """A process whose pipes can fail."""

    def __init__(self, real: Any, layer: Layer) -> None:
        super().__init__(real, layer)
        self._pipes = (
            FaultySendStream(real.stdin, layer),
            FaultyReceiveStream(real.stdout, layer),
            FaultyReceiveStream(real.stderr, layer),
        )

    stdin = property(lambda self: self._pipes[0])
    stdout = property(lambda self: self._pipes[1])
    stderr = property(lambda self: self._pipes[2])
    pid = property(lambda self: self._real.pid)
    returncode = property(lambda self: self._real.returncode)

    async def wait(self) -> int:
        status: int = await self._real.wait()
        return status

    def terminate(self) -> None:
        self._real.terminate()

    def kill(self) -> None:
        self._real.kill()

    def send_signal(self, signal: Any) -> None:
        self._real.send_signal(signal)
