"""What a group has open, buffered and pending, at a glance."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._resources import PendingHandshake

if TYPE_CHECKING:
    from ._resources import Resource


@dataclass(frozen=True)
class GroupStatistics:
    """What `TransportGroup.statistics` returns."""

    #: How many transports are open, by the name of their class.
    open_transports: dict[str, int]
    #: How many connections that a server has accepted, or that are being made, are still at their TLS handshake.
    pending_handshakes: int
    #: How many servers are open.
    open_servers: int
    #: How many tasks of `start_soon` run.
    running_tasks: int
    #: Bytes that the protocols of the group have been given so far.
    bytes_received: int
    #: Bytes that the system has taken from them so far.
    bytes_sent: int
    #: Bytes that are written but not yet sent, over all open transports.
    bytes_buffered: int
    #: Timers that have neither run nor been cancelled.
    pending_timers: int


def describe_flow(name: str, owned: Collection[Resource]) -> str:
    """Say for a `repr` how many transports there are, how much they buffer, and how many have paused their protocol."""
    owned = tuple(owned)  # Whoever looks may be another thread.
    transports = [each for each in owned if not isinstance(each, PendingHandshake)]
    buffered = sum(transport._traffic()[2] for transport in transports)
    paused = sum(transport.is_writing_paused() for transport in transports)
    said = f"{name}={len(transports)} buffered={buffered}"
    if paused:
        said += f" paused={paused}"
    if len(owned) > len(transports):
        said += f" handshakes={len(owned) - len(transports)}"
    return said
