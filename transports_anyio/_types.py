"""Types of parameters: what protocol factories, callbacks and streams of a child may be.

Holds: structural types of protocols, so that type checkers accept every object that works and reject what never does.
May know: nothing.
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple

    #: The positional arguments of a callback or a task.
    PosArgsT = TypeVarTuple("PosArgsT")

#: A child's standard input, output or error: `PIPE`, `DEVNULL`, a file descriptor, a file, or `None` for ours.
Stdio: TypeAlias = "int | IO[Any] | None"


class AnyProtocol(Protocol):
    """What every protocol needs. A protocol that lacks another callback is reported when that callback is due."""

    def connection_made(self, transport: Any, /) -> None: ...


class AnyDatagramProtocol(AnyProtocol, Protocol):
    """What a protocol for datagrams needs."""

    def datagram_received(self, data: bytes, addr: Any, /) -> None: ...


class AnySubprocessProtocol(AnyProtocol, Protocol):
    """What a protocol for a child process needs."""

    def process_exited(self) -> None: ...


StreamProtocolT = TypeVar("StreamProtocolT", bound=AnyProtocol)
DatagramProtocolT = TypeVar("DatagramProtocolT", bound=AnyDatagramProtocol)
SubprocessProtocolT = TypeVar("SubprocessProtocolT", bound=AnySubprocessProtocol)
