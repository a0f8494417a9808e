"""asyncio's Transports and Protocols on asyncio, uvloop and trio, through AnyIO."""

from asyncio import (
    BaseProtocol,
    BaseTransport,
    BufferedProtocol,
    DatagramProtocol,
    DatagramTransport,
    Protocol,
    ReadTransport,
    SubprocessProtocol,
    SubprocessTransport,
    Transport,
    WriteTransport,
)
from asyncio.trsock import TransportSocket

from . import abc, from_asyncio, to_asyncio
from ._event_loop._opening import open_event_loop, run_asyncio
from ._futures import Future
from ._group import TransportGroup, current_group
from ._handles import Handle, TimerHandle
from ._server import Server
from ._statistics import GroupStatistics, ServerStatistics
from ._transport_stream import TransportDatagrams, TransportStream

__all__ = [
    "BaseProtocol",
    "BaseTransport",
    "BufferedProtocol",
    "DatagramProtocol",
    "DatagramTransport",
    "Future",
    "GroupStatistics",
    "Handle",
    "Protocol",
    "ReadTransport",
    "Server",
    "ServerStatistics",
    "SubprocessProtocol",
    "SubprocessTransport",
    "TimerHandle",
    "Transport",
    "TransportDatagrams",
    "TransportGroup",
    "TransportSocket",
    "TransportStream",
    "WriteTransport",
    "abc",
    "current_group",
    "from_asyncio",
    "open_event_loop",
    "run_asyncio",
    "to_asyncio",
]
