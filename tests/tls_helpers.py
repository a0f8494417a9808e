"""Helpers for the tests of TLS in `tls/`; those of other tests too are in `tls_support`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support import (
    GUARD,
    HOST,
    Peer,
    Recorder,
    Stack,
    until,
)
from tls_support import (
    NAME,
    Certificates,
    TLSPeer,
    together,
)

variable: ContextVar[str] = ContextVar("variable")


def legal(stack: Stack, recorder: type[Any]) -> None:
    if stack.is_oracle and recorder is not Recorder:
        pytest.skip("asyncio's TLS calls get_buffer() after eof_received(), and buffer_updated() from inside close()")


def peers_contexts(contexts: list[dict[str, Any]]) -> list[BaseException]:
    return [context["exception"] for context in contexts]


RECORD = 16384


async def connect_to(group: Any, address: Any, **options: Any) -> BaseException:
    """Connect and return the error."""
    options.setdefault("server_hostname", NAME)
    with anyio.fail_after(GUARD):
        try:
            transport, _ = await group.create_connection(Recorder, *address, **options)
        except Exception as exc:
            return exc.with_traceback(None)
    transport.abort()
    raise AssertionError("the handshake succeeded")


async def echoes(group: Any, serving: Any, certificates: Certificates) -> bool:
    """Return whether a new client of the server gets an answer."""
    with anyio.fail_after(GUARD):
        peer = await TLSPeer.connect_to(serving.address, certificates.client())
    with peer:
        await peer.send(b"are you there?")
        await until(lambda: any(protocol.received == b"are you there?" for protocol in serving.protocols))
        (protocol,) = [protocol for protocol in serving.protocols if protocol.received]
        protocol.transport.write(b"yes")
        assert await peer.receive_exactly(3) == b"yes"
        peer.send_close_notify_and_close()
    await protocol.wait_for("connection_lost")
    return True


@asynccontextmanager
async def accepted(group: Any, protocol: Any) -> AsyncIterator[Peer]:
    """Accept a connection with a server of the group; yield the client's bare end."""
    server = await group.create_server(lambda: protocol, HOST, 0)
    with Peer.connect(server.sockets[0].getsockname()) as peer:
        await protocol.wait_for("connection_made")
        yield peer
    server.close()


async def upgrade_client(
    group: Any, transport: Any, protocol: Any, peer: Peer, certificates: Certificates, **options: Any
) -> tuple[Any, TLSPeer]:
    """Upgrade both ends of `connected`: the group has the client."""
    new, tls = await together(
        lambda: group.start_tls(transport, protocol, certificates.client(), server_hostname=NAME, **options),
        lambda: TLSPeer.wrap(peer.socket, certificates.server(), server_side=True),
    )
    protocol.transport = new
    return new, tls


async def failed_upgrade(*arguments: Any, **options: Any) -> Exception | None:
    """Upgrade and return the error; asyncio also accepts a transport that has been closed."""
    group, *rest = arguments
    try:
        await group.start_tls(*rest, **options)
    except Exception as exc:
        return exc.with_traceback(None)
    return None
