"""Helpers for the tests of the group: exceptions, peers, and ways to cause each callback."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
from support import (
    HOST,
    BufferedRecorder,
    Peer,
    Recorder,
)

from transports_anyio import TransportGroup
from transports_anyio.testing import DatagramRecorder

#: More than the small kernel buffers of both sides and the high watermark together.
MUCH = bytes(1 << 20)


class BoomError(Exception):
    """The exception of the callbacks in these tests."""


def echo() -> Recorder:
    return Recorder(on_data_received=lambda self, data: self.transport.write(data))


async def answers(peer: Peer) -> bool:
    """Return whether the echo at the other end still works."""
    await peer.send(b"are you there?")
    return await peer.receive_exactly(14) == b"are you there?"


def run(backend: Any, main: Callable[[], Awaitable[object]]) -> None:
    """Run `main` in an event loop of its own, for exceptions that end an event loop."""
    name, options = backend
    anyio.run(main, backend=name, backend_options=options)


ENDPOINTS: dict[str, Callable[[TransportGroup, socket.socket], Awaitable[object]]] = {
    "create_connection": lambda group, sock: group.create_connection(Recorder, HOST, 1),
    "create_connection, adopting": lambda group, sock: group.create_connection(Recorder, sock=sock),
    "create_server": lambda group, sock: group.create_server(Recorder, HOST, 0),
    "connect_accepted_socket": lambda group, sock: group.connect_accepted_socket(Recorder, sock),
    "create_unix_connection": lambda group, sock: group.create_unix_connection(Recorder, "/nonexistent"),
    "create_unix_server": lambda group, sock: group.create_unix_server(Recorder, "/nonexistent/path"),
    "create_datagram_endpoint": lambda group, sock: group.create_datagram_endpoint(
        DatagramRecorder, local_addr=(HOST, 0)
    ),
}


class LeavingError(Exception):
    """The exception of the block in these tests."""


async def nothing(transport: Any, peer: Peer) -> None:
    pass


async def send(transport: Any, peer: Peer) -> None:
    await peer.send(b"x")


async def shut_down(transport: Any, peer: Peer) -> None:
    peer.shutdown()


async def clog(transport: Any, peer: Peer) -> None:
    transport.write(MUCH)


async def clog_and_drain(transport: Any, peer: Peer) -> None:
    transport.write(MUCH)
    await peer.gone()


async def close(transport: Any, peer: Peer) -> None:
    transport.close()


#: For each callback, a function that causes it, given the transport and its peer.
TRIGGERS: dict[str, Callable[[Any, Peer], Awaitable[object]]] = {
    "connection_made": nothing,
    "data_received": send,
    "get_buffer": send,
    "buffer_updated": send,
    "eof_received": shut_down,
    "pause_writing": clog,
    "resume_writing": clog_and_drain,
    "connection_lost": close,
}


#: For these callbacks asyncio behaves as we do.
FATAL_IN_ASYNCIO = ["data_received", "get_buffer", "buffer_updated", "eof_received"]


def recorder(callback: str, hook: Callable[..., Any]) -> Any:
    """Return a recorder of the kind that has the callback."""
    return (BufferedRecorder if "buffer" in callback else Recorder)(**{f"on_{callback}": hook})


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail
