"""What a group has open, buffered and pending, at a glance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupStatistics:
    """What `TransportGroup.statistics` returns."""

    #: How many transports are open, by the name of their class.
    open_transports: dict[str, int]
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
