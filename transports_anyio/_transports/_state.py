"""The states of a connection, as a table.

Holds: the states, which may follow which and why.
May know: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import TypeVar

StateT = TypeVar("StateT", bound=Enum)


class State(IntEnum):
    """The life of a transport. The order is that of time: a later state is a larger number."""

    OPEN = 0
    #: No more is read; what is buffered is being sent.
    CLOSING = 1
    #: Everything is sent. The channel ends the connection in order, by a TLS shutdown for example.
    SHUTTING_DOWN = 2
    #: `connection_lost` is scheduled. Nothing is sent or received any more.
    LOST = 3
    #: `start_tls` has passed the connection on to a new transport.
    UPGRADED = 4
    #: `connection_lost` has been called and the channel is closed.
    CLOSED = 5


#: Every legal transition, with what causes it.
TRANSITIONS: Mapping[State, Mapping[State, str]] = {
    State.OPEN: {
        State.CLOSING: "close",
        State.LOST: "abort or error",
        State.UPGRADED: "start_tls",
    },
    State.CLOSING: {
        State.SHUTTING_DOWN: "all is sent",
        State.LOST: "abort or error",
        State.UPGRADED: "start_tls",
    },
    State.SHUTTING_DOWN: {State.LOST: "shut down or error"},
    State.LOST: {State.CLOSED: "connection_lost"},
    State.UPGRADED: {State.CLOSED: "new transport closed"},
    State.CLOSED: {},
}


class IllegalTransitionError(RuntimeError):
    """Raised for a transition that its table does not have: a defect of this library."""


def check_transition(transitions: Mapping[StateT, Mapping[StateT, str]], state: StateT, to: StateT) -> None:
    """Raise `IllegalTransitionError` unless `to` may follow `state`."""
    if to not in transitions[state]:
        raise IllegalTransitionError(f"{state.name} cannot become {to.name}")
