"""The line server of the examples over a bare socket: time-outs, pings, and the end."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from support import GUARD, SMALL, LinePeer, Peer, Stack, until

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import line_server
from line_server import Line, Room
from memory_connection import Netstrings

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ours_only("the protocol asks for its group, which asyncio does not have"),
]


class Visitor(LinePeer):
    async def hear_but_pings(self) -> str:
        while (heard := await self.hear()) == "ping":
            pass
        return heard


async def visit(group: Any, room: Room, kind: type[Line] = Line) -> Visitor:
    server = await group.create_server(lambda: kind(room), "127.0.0.1", 0)
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


async def test_a_client_that_does_not_log_in(stack: Stack) -> None:
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


async def test_every_line_postpones_the_time_out(stack: Stack) -> None:
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


def group_lines(group: Any) -> list[Any]:
    return [transport.get_protocol() for transport in group._core.transports]


async def test_an_endless_line(stack: Stack) -> None:
    async with stack.open() as group:
        visitor = await visit(group, Room())
        with visitor.peer:
            await visitor.peer.send(b"x" * 2000)
            assert await visitor.hear() == "your line is too long"
            assert await visitor.hear() == "(the end)"


async def test_a_line_that_is_too_long_but_complete(stack: Stack) -> None:
    async with stack.open() as group:
        visitor = await visit(group, Room())
        with visitor.peer:
            await visitor.peer.send(b"login anna\n" + b"x" * 60_000 + b"\nwho\n")
            for line in ("welcome anna", "your line is too long", "(the end)"):
                assert await visitor.hear() == line


#: The number of messages that arrive at once, and their size in bytes. Copying the rest for each message would copy
#: 180 gigabytes, far more than `GUARD` allows; to copy each message once takes a tenth of a second.
AT_ONCE = 20_000
MESSAGE = 900


async def test_many_lines_at_once(stack: Stack) -> None:
    class Counting(Line):
        lines = 0

        def line_received(self, line: str) -> None:
            self.lines += 1
            if line:
                super().line_received(line)

    async with stack.open() as group:
        visitor = await visit(group, Room(), Counting)
        (line,) = group_lines(group)
        with visitor.peer, anyio.fail_after(GUARD):
            line.data_received((b" " * MESSAGE + b"\n") * AT_ONCE + b"login ")
            await visitor.say("anna")
            assert await visitor.hear() == "welcome anna"
            assert line.lines == AT_ONCE + 1


async def test_many_netstrings_at_once(stack: Stack) -> None:
    """The same for the example that takes its messages apart by their size."""

    class Counting(Netstrings):
        strings = 0

        def string_received(self, string: bytes) -> None:
            self.strings += 1
            if string == b"last":
                self.send(string)

    async with stack.open() as group:
        server = await group.create_server(Counting, "127.0.0.1", 0)
        with Peer.connect(server.sockets[0].getsockname()) as peer, anyio.fail_after(GUARD):
            await until(lambda: group._core.transports)
            (protocol,) = group_lines(group)
            protocol.data_received(b"%d:%s," % (MESSAGE, bytes(MESSAGE)) * AT_ONCE + b"4:")
            await peer.send(b"last,")
            assert await peer.receive_exactly(7) == b"4:last,"
            assert protocol.strings == AT_ONCE + 1
            await peer.send(b"1")
            await peer.send(b"000000:")
            assert await peer.gone()


async def test_a_client_that_does_not_read(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer is bounded; it leaves the chat when its time-out expires, and its connection ends soon after."""
    monkeypatch.setattr(line_server, "GRACE", 0.02)
    room = Room(ping_interval=0.01)
    async with stack.open() as group:
        anna = await visit(group, room)
        address = next(iter(group._core.servers)).sockets[0].getsockname()
        deaf = Visitor(Peer.connect(address, receive_buffer=SMALL))
        with anna.peer, deaf.peer:
            assert await deaf.hear() == "please login"
            for visitor, name in ((deaf, "deaf"), (anna, "anna")):
                await visitor.say(f"login {name}")
                assert await visitor.hear() == f"welcome {name}"
            transport = room.members["deaf"].transport
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            count = 0
            while not room.members["deaf"].paused:
                await anna.say("say " + "x" * 1000)
                assert await anna.hear_but_pings() == "anna: " + "x" * 1000
                count += 1
                assert count < 10_000, "it is never paused"
            size = transport.get_write_buffer_size()
            await anna.say("say anybody there?")
            assert await anna.hear_but_pings() == "anna: anybody there?"
            for _ in range(3):  # One of the others would be due as well.
                assert await anna.hear() == "ping"
            assert transport.get_write_buffer_size() <= size
            group.call_soon(room.members["deaf"].expect_within, 0, "you have been silent for too long")
            await until(lambda: "deaf" not in room.members)
            await until(lambda: transport not in group._core.transports)
            await anna.say("who")
            assert await anna.hear_but_pings() == "anna"
