"""Helpers for the tests of TLS: contexts, TLS peers, and other TLS implementations."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import pytest
from support import GUARD, HOST, BufferedRecorder, Peer, Recorder, listening

if TYPE_CHECKING:
    import trustme
    from typing_extensions import Self

#: The name in the certificate of `Certificates.server`.
NAME = "server.example"

#: The errors of a peer whose connection ends without `close_notify`; the last if it still has session tickets to send.
DROPPED = (ssl.SSLEOFError, ConnectionResetError, BrokenPipeError)

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class ViewRecorder(BufferedRecorder):
    """A recorder that gives a `memoryview`: asyncio's TLS loses bytes with any other buffer (see T14)."""

    def __init__(self, *, buffer_size: int = 4096, **hooks: Callable[..., Any]) -> None:
        super().__init__(buffer_size=buffer_size, **hooks)
        self.buffer = memoryview(self.buffer)


class Certificates:
    """Contexts of one authority."""

    def __init__(self, authority: trustme.CA) -> None:
        self.authority = authority
        self._certificate = authority.issue_cert(NAME)

    def server(self, *names: str, version: str | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate = self.authority.issue_cert(*names) if names else self._certificate
        certificate.configure_cert(context)
        return self._limited(context, version)

    def client(self, *, version: str | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # The default loads the system's authorities, which is slow.
        self.authority.configure_trust(context)
        return self._limited(context, version)

    def _limited(self, context: ssl.SSLContext, version: str | None) -> ssl.SSLContext:
        if version is not None:
            context.minimum_version = context.maximum_version = VERSIONS[version]
        return context

    @contextmanager
    def files(self) -> Iterator[dict[str, str]]:
        """Write the authority's certificate and the server's chain and key to files, for other programs."""
        with tempfile.TemporaryDirectory() as directory:
            found = {"ca": self.authority.cert_pem, "server": self._certificate.private_key_and_cert_chain_pem}
            paths = {name: Path(directory, f"{name}.pem") for name in found}
            for name, blob in found.items():
                blob.write_to_path(paths[name])
            yield {name: str(path) for name, path in paths.items()}


class TLSPeer(Peer):
    """The other end of a TLS connection: Python's own `ssl.SSLSocket`, non-blocking, driven by the test."""

    socket: ssl.SSLSocket

    @classmethod
    async def wrap(cls, sock: Any, context: ssl.SSLContext, **options: Any) -> TLSPeer:
        sock.setblocking(False)
        peer = cls(
            context.wrap_socket(
                sock, do_handshake_on_connect=False, suppress_ragged_eofs=options.pop("suppress_ragged_eofs", False),
                **options,
            )
        )  # fmt: skip
        try:
            await peer.attempt(peer.socket.do_handshake)
        except BaseException:
            peer.close()
            raise
        return peer

    @classmethod
    async def connect_to(cls, address: Any, context: ssl.SSLContext, name: str | None = NAME, **options: Any) -> Self:
        plain = Peer.connect(address, receive_buffer=options.pop("receive_buffer", None))
        return await cls.wrap(plain.socket, context, server_hostname=name, **options)  # type: ignore[return-value]

    async def attempt(self, call: Callable[..., Any], *args: Any) -> Any:
        with anyio.fail_after(GUARD):
            while True:
                try:
                    return call(*args)
                except ssl.SSLWantReadError:
                    await anyio.wait_readable(self.socket)
                except ssl.SSLWantWriteError:
                    await anyio.wait_writable(self.socket)

    async def send(self, data: bytes) -> None:  # type: ignore[override]
        view = memoryview(data)
        while view:
            view = view[await self.attempt(self.socket.send, view[:262144]) :]

    async def receive(self, size: int = 65536) -> bytes:
        try:
            result: bytes = await self.attempt(self.socket.recv, size)
        except ssl.SSLZeroReturnError:  # The other end's `close_notify` when ours is already sent.
            return b""
        return result

    async def shut_down_tls(self) -> None:
        """Send `close_notify` and wait for the other end's, throwing away what still comes."""
        await self.attempt(self.socket.unwrap)

    def send_close_notify_and_close(self) -> None:
        """Send `close_notify` without waiting."""
        try:
            self.socket.unwrap()
        except ssl.SSLWantReadError:
            pass
        self.close()

    def cut(self) -> None:
        """End the stream of bytes below, without `close_notify`."""
        socket.socket.shutdown(self.socket, socket.SHUT_WR)

    async def receive_raw(self, size: int = 65536) -> bytes:
        """Receive the bytes below TLS."""
        with anyio.fail_after(GUARD):
            while True:
                try:
                    return socket.socket.recv(self.socket, size)
                except BlockingIOError:
                    await anyio.wait_readable(self.socket)


async def together(*functions: Callable[[], Any]) -> list[Any]:
    """Run async functions concurrently and return their results; raise a single failure without a group.

    Each has reached its first wait before the next one begins: a peer cannot answer what has not begun.
    """
    results: list[Any] = [None] * len(functions)
    failures: list[BaseException] = []

    async def run(index: int, begun: anyio.Event) -> None:
        begun.set()
        try:
            results[index] = await functions[index]()
        except Exception as exc:
            failures.append(exc)
            tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for index in range(len(functions)):
            begun = anyio.Event()
            tasks.start_soon(run, index, begun)
            await begun.wait()
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()
    return results


@asynccontextmanager
async def tls_client(
    group: Any, certificates: Certificates, protocol: Any = None, *, version: str | None = None, small: bool = False,
    **options: Any,
) -> AsyncIterator[tuple[Any, Any, TLSPeer]]:  # fmt: skip
    """A client of the group's, connected to a server that the test drives: `(transport, protocol, peer)`."""
    protocol = Recorder() if protocol is None else protocol
    options.setdefault("ssl", certificates.client())
    options.setdefault("server_hostname", NAME)
    with listening(receive_buffer=65536 if small else None) as listener:
        listener.setblocking(False)

        async def connect() -> Any:
            return await group.create_connection(lambda: protocol, *listener.getsockname(), **options)

        async def accept() -> TLSPeer:
            with anyio.fail_after(GUARD):
                await anyio.wait_readable(listener)
            sock, _ = listener.accept()
            return await TLSPeer.wrap(sock, certificates.server(version=version), server_side=True)

        (transport, made), peer = await together(connect, accept)
    assert made is protocol
    if small:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    with peer:
        yield transport, protocol, peer


class Serving:
    """A TLS server of the group's that keeps the protocols it made."""

    def __init__(self, server: Any, protocols: list[Any]) -> None:
        self.server = server
        self.protocols = protocols
        self.address = server.sockets[0].getsockname()
        self.port = self.address[1]

    async def protocol(self, number: int = 0) -> Any:
        with anyio.fail_after(GUARD):
            while len(self.protocols) <= number or self.protocols[number].transport is None:
                await anyio.sleep(0.001)
        return self.protocols[number]


async def serve(
    group: Any, context: ssl.SSLContext, factory: Callable[[], Any] = Recorder, host: str = HOST, **options: Any
) -> Serving:
    protocols: list[Any] = []

    def make() -> Any:
        protocols.append(factory())
        return protocols[-1]

    return Serving(await group.create_server(make, host, 0, ssl=context, **options), protocols)


def echo(protocol: Any, data: bytes) -> None:
    """For a recorder's `on_data_received`."""
    protocol.transport.write(data)


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@asynccontextmanager
async def running(*command: str, stderr: int | None = None) -> AsyncIterator[anyio.abc.Process]:
    """Run a program with pipes for its input and output, and end it at the end."""
    process = await anyio.open_process(command, stderr=stderr)
    try:
        yield process
    finally:
        with anyio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            await process.aclose()


@asynccontextmanager
async def tls_peer_process(task: str, *args: object) -> AsyncIterator[Output]:
    """Run one of the peers of `tls_peers.py`."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("tls_peers.py")), task, *map(str, args)]
    async with running(*command) as process:
        yield Output(process)


class Output:
    """The output of a process, as it comes."""

    def __init__(self, process: anyio.abc.Process, stream: anyio.abc.ByteReceiveStream | None = None) -> None:
        self.process = process
        self.stream = stream or process.stdout
        self.seen = b""

    async def until(self, *ends: bytes) -> bytes:
        """Read until the output holds one of `ends`; return all of it, and begin anew after that."""
        assert self.stream is not None
        with anyio.fail_after(4 * GUARD):
            while True:
                for end in ends:
                    if end in self.seen:
                        cut = self.seen.index(end) + len(end)
                        found, self.seen = self.seen[:cut], self.seen[cut:]
                        return found
                try:
                    self.seen += await self.stream.receive()
                except anyio.EndOfStream:
                    raise AssertionError(f"{ends} never came: {self.seen!r}") from None

    async def line(self) -> str:
        return (await self.until(b"\n")).decode().rstrip("\n")

    async def say(self, data: bytes) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send(data)


DEVNULL = subprocess.DEVNULL
