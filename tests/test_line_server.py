"""The line server of the examples, visited over a bare socket: its time-outs, its pings, its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from support import GUARD, Peer, Stack

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from line_server import Line, Room

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("the protocol asks for its group, which asyncio does not have"),
]


class Visitor:
    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.pending = b""

    async def say(self, line: str) -> None:
        await self.peer.send(line.encode() + b"\n")

    async def hear(self) -> str:
        while b"\n" not in self.pending:
            more = await self.peer.receive()
            if not more:
                return "(the end)"
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode()


async def visit(group: Any, room: Room) -> Visitor:
    server = await group.create_server(lambda: Line(room), "127.0.0.1", 0)
    visitor = Visitor(Peer.connect(server.sockets[0].getsockname()))
    assert await visitor.hear() == "please login"
    return visitor


async def test_a_conversation(stack: Stack) -> None:
    room = Room()
    async with stack.open() as group:
        visitor = await visit(group, room)
        with visitor.peer:
            await visitor.say("hello")
            assert await visitor.hear() == "login NAME, please"
            changed = room.changed
            await visitor.say("login anna")
            assert await visitor.hear() == "welcome anna"
            with anyio.fail_after(GUARD):
                await changed.wait()  # a task waits for what the protocol signals
            await visitor.say("say good day\nwho\npong\nnonsense")
            assert [await visitor.hear() for _ in range(3)] == ["anna: good day", "anna", "what?"]
            await visitor.say("quit")
            assert await visitor.hear() == "goodbye"
            assert await visitor.hear() == "(the end)"
        await group.wait_closed()
        assert room.members == {}


async def test_no_login(stack: Stack) -> None:
    async with stack.open() as group:
        visitor = await visit(group, Room(login_timeout=0.02))
        with visitor.peer:
            assert await visitor.hear() == "you did not log in"
            assert await visitor.hear() == "(the end)"


async def test_pings_and_then_silence(stack: Stack) -> None:
    async with stack.open() as group:
        visitor = await visit(group, Room(idle_timeout=0.2, ping_interval=0.02))
        with visitor.peer:
            await visitor.say("login anna")
            assert await visitor.hear() == "welcome anna"
            assert await visitor.hear() == "ping"
            heard = await visitor.hear()
            while heard == "ping":
                heard = await visitor.hear()
            assert heard == "you have been silent for too long"
            assert await visitor.hear() == "(the end)"


async def test_every_line_moves_the_time_out_on(stack: Stack) -> None:
    async with stack.open() as group:
        visitor = await visit(group, Room(idle_timeout=3600))
        with visitor.peer:
            await visitor.say("login anna")
            assert await visitor.hear() == "welcome anna"
            (line,) = group_lines(group)
            before = line.timeout
            await visitor.say("who")
            assert await visitor.hear() == "anna"
            assert before.cancelled()
            assert line.timeout.when() >= before.when()
            assert not line.timeout.cancelled()


def group_lines(group: Any) -> list[Line]:
    return [transport.get_protocol() for transport in group._transports]


async def test_a_line_without_an_end(stack: Stack) -> None:
    async with stack.open() as group:
        visitor = await visit(group, Room())
        with visitor.peer:
            await visitor.peer.send(b"x" * 2000)
            assert await visitor.hear() == "your line is too long"
            assert await visitor.hear() == "(the end)"
