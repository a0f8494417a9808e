"""Mistakes that type checkers must find: nothing here runs.

Each mistake has a `type: ignore` comment with mypy's error code. If mypy or pyright accepts the mistake, the comment
suppresses nothing, which is an error (mypy: `warn_unused_ignores`, pyright: `reportUnnecessaryTypeIgnoreComment`).
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import socket

import anyio

from transports_anyio import DatagramProtocol, Protocol, SubprocessProtocol, TransportGroup, abc
from transports_anyio.testing import memory_connection


class Stream(Protocol):
    """A protocol for streams."""


class Datagrams(DatagramProtocol):
    """A protocol for datagrams."""


class Child(SubprocessProtocol):
    """A protocol for a child process."""


class Asynchronous:
    async def connection_made(self, transport: object) -> None: ...


async def make_protocol() -> Stream:
    return Stream()


def one(number: int) -> None: ...


async def wait(seconds: float) -> None: ...


async def factories(group: TransportGroup, sock: socket.socket) -> None:
    """What can never be the factory of such an endpoint."""
    await group.create_connection(dict, "localhost", 80)  # type: ignore[type-var]
    await group.create_connection(Stream(), "localhost", 80)  # type: ignore[arg-type]
    await group.create_connection(Asynchronous, "localhost", 80)  # type: ignore[type-var]
    await group.create_connection(make_protocol, "localhost", 80)  # type: ignore[type-var]
    await group.create_connection(lambda: None, "localhost", 80)  # type: ignore[type-var]
    await group.create_unix_connection(dict, "path")  # type: ignore[type-var]
    await group.connect_accepted_socket(int, sock)  # type: ignore[type-var]
    await group.create_server(int, "localhost", 0)  # type: ignore[arg-type]
    await group.create_unix_server(int, "path")  # type: ignore[arg-type]
    await group.create_datagram_endpoint(Stream, ("localhost", 0))  # type: ignore[type-var]
    await group.create_datagram_endpoint(Child, ("localhost", 0))  # type: ignore[type-var]
    await group.connect_read_pipe(dict, 0)  # type: ignore[type-var]
    await group.connect_write_pipe(dict, 0)  # type: ignore[type-var]
    await group.subprocess_exec(Stream, "cat")  # type: ignore[type-var]
    await group.subprocess_shell(Datagrams, "cat")  # type: ignore[type-var]
    await memory_connection(group, Stream, dict)  # type: ignore[type-var]


async def streams_of_a_child(group: TransportGroup) -> None:
    await group.subprocess_exec(Child, "cat", stdin=3.5)  # type: ignore[arg-type]
    await group.subprocess_exec(Child, "cat", stdout="file")  # type: ignore[arg-type]
    await group.subprocess_shell(Child, "cat", stderr=b"file")  # type: ignore[arg-type]
    await group.subprocess_exec(Child, 5)  # type: ignore[arg-type]


def callbacks(group: TransportGroup) -> None:
    group.call_soon(one)  # type: ignore[arg-type]
    group.call_soon(one, "1")  # type: ignore[arg-type]
    group.call_soon_threadsafe(one, 1, 2)  # type: ignore[arg-type]
    group.call_later(1, one, 3, 4)  # type: ignore[arg-type]
    group.call_at(1, one, None)  # type: ignore[arg-type]
    group.call_later("1", one, 3)  # type: ignore[arg-type]
    group.start_soon(wait, 1, 2)  # type: ignore[arg-type]
    group.start_soon(anyio.sleep, "x", 1, 2, 3)  # type: ignore[arg-type]
    group.start_soon(one, 1)  # type: ignore[arg-type]
    group.start_soon(wait(1))  # type: ignore[arg-type]


async def transports(group: TransportGroup) -> None:
    connection, _ = await group.create_connection(Stream, "localhost", 80)
    connection.is_paused()  # type: ignore[attr-defined]
    endpoint, _ = await group.create_datagram_endpoint(Datagrams, ("localhost", 0))
    endpoint.is_eof_received()  # type: ignore[attr-defined]
    reading: abc.ReadTransport
    reading, _ = await group.connect_write_pipe(Stream, 0)  # type: ignore[assignment]
    reading.write(b"")  # type: ignore[attr-defined]
