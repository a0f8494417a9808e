"""Statistics of a group and of a server.

Holds: `GroupStatistics`, `ServerStatistics`, and the summary that the `repr` of groups and servers shows.
May know: `_resources`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._resources import PendingHandshake, Resource


@dataclass(frozen=True)
class GroupStatistics:
    """The result of `TransportGroup.statistics`."""

    #: How many transports are open, by the name of their class.
    open_transports: dict[str, int]
    #: How many connections, accepted or being made, have not finished their TLS handshake.
    pending_handshakes: int
    #: How many servers are open.
    open_servers: int
    #: How many tasks of `start_soon` are running.
    running_tasks: int
    #: How many bytes the protocols of the group have received so far.
    bytes_received: int
    #: How many of the bytes that they have written have been sent so far.
    bytes_sent: int
    #: How many bytes are written but not yet sent, on all open transports.
    bytes_buffered: int
    #: How many timers have neither run nor been cancelled.
    pending_timers: int


@dataclass(frozen=True)
class ServerStatistics:
    """The result of `Server.statistics`."""

    #: How many accepted connections are open, without those in `pending_handshakes`.
    open_connections: int
    #: How many accepted connections have not finished their TLS handshake.
    pending_handshakes: int
    #: How many connections were accepted so far.
    accepted_connections: int
    #: How many TLS handshakes have failed so far, without those that this side has ended.
    failed_handshakes: int
    #: Whether `max_connections` or `max_handshakes` is reached: further connections wait in the backlog.
    at_limit: bool


def describe_flow(name: str, transports: Collection[Resource], handshakes: Collection[PendingHandshake]) -> str:
    """Return the part of a `repr` about transports: how many, what they buffer, how many have paused their protocol."""
    transports = tuple(transports)  # Another thread may call this while the set changes.
    buffered = sum(transport._traffic()[2] for transport in transports)
    paused = sum(transport.is_writing_paused() for transport in transports)
    description = f"{name}={len(transports)} buffered={buffered}"
    if paused:
        description += f" paused={paused}"
    if handshakes:
        description += f" handshakes={len(handshakes)}"
    return description
