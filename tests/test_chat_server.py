"""The chat server of the examples: several guests, and one that does not read."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support import HOST, SMALL, LinePeer, Peer, Stack, until

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from chat_server import Room, Visitor

pytestmark = pytest.mark.anyio


class Door:
    def __init__(self, stack: AsyncExitStack, address: Any) -> None:
        self.stack = stack
        self.address = address

    def knock(self, *, receive_buffer: int | None = None) -> LinePeer:
        return LinePeer(self.stack.enter_context(Peer.connect(self.address, receive_buffer=receive_buffer)))

    async def enter(self, name: str, *others: LinePeer, receive_buffer: int | None = None) -> LinePeer:
        """Log a guest in and wait until the others have been notified."""
        guest = self.knock(receive_buffer=receive_buffer)
        assert await guest.hear() == "* your name, please"
        await guest.say(name)
        assert (await guest.hear()).startswith("* here: ")
        for each in (guest, *others):
            assert await each.hear() == f"* {name} is here"
        return guest


@asynccontextmanager
async def chatting(stack: Stack, room: Room) -> AsyncIterator[Door]:
    async with stack.open() as group, AsyncExitStack() as guests:
        server = await group.create_server(lambda: Visitor(room), HOST, 0)
        yield Door(guests, server.sockets[0].getsockname())
        await guests.aclose()
        await until(lambda: not room.members)


async def test_every_guest_gets_every_message(stack: Stack) -> None:
    async with chatting(stack, Room()) as door:
        anna = await door.enter("anna")
        bert = await door.enter("bert", anna)
        await anna.say("good day")
        await bert.say("and to you")
        for guest in (anna, bert):
            assert {await guest.hear(), await guest.hear()} == {"anna: good day", "bert: and to you"}
        bert.peer.shutdown()
        assert await bert.hear() == "(the end)"
        assert await anna.hear() == "* bert has left"


async def test_rules_for_names(stack: Stack) -> None:
    async with chatting(stack, Room()) as door:
        anna = await door.enter("anna")
        guest = door.knock()
        assert await guest.hear() == "* your name, please"
        for name, answer in {
            "": "* letters and digits only, please",
            "x y": "* letters and digits only, please",
            "x" * 33: "* letters and digits only, please",
            "anna": "* that name is taken",
            "bert": "* here: anna",
        }.items():
            await guest.say(name)
            assert await guest.hear() == answer
        assert await anna.hear() == "* bert is here"
        # There is no notice when a guest without a name leaves.
        door.knock().peer.close()
        await anna.say("alone?")
        assert await anna.hear() == "anna: alone?"


async def test_lines_in_pieces_and_together(stack: Stack) -> None:
    async with chatting(stack, Room()) as door:
        anna = await door.enter("anna")
        await anna.peer.send(b"on")
        await anna.peer.send(b"e\ntwo\n\nth")
        await anna.peer.send("réé\n".encode() + b"\xff\n")
        expected = ["one", "two", "thréé", "\N{REPLACEMENT CHARACTER}"]
        assert [await anna.hear() for _ in expected] == [f"anna: {line}" for line in expected]
        await anna.peer.send(b"x" * 2000)
        assert await anna.hear() == "* your line is too long"
        assert await anna.hear() == "(the end)"


async def test_a_line_that_is_too_long_but_complete(stack: Stack) -> None:
    async with chatting(stack, Room()) as door:
        anna = await door.enter("anna")
        bert = await door.enter("bert", anna)
        await bert.peer.send(b"first\n" + b"x" * 60_000 + b"\nlast\n")
        for line in ("bert: first", "* bert has left"):
            assert await anna.hear() == line
        for line in ("bert: first", "* your line is too long", "(the end)"):
            assert await bert.hear() == line


async def test_a_reset(stack: Stack) -> None:
    async with chatting(stack, Room()) as door:
        anna = await door.enter("anna")
        bert = await door.enter("bert", anna)
        bert.peer.reset()
        assert (await anna.hear()).startswith("* bert has left (")


async def test_a_slow_reader_does_not_delay_the_others(stack: Stack) -> None:
    """Its buffer is bounded, it is disconnected beyond that, and the others miss nothing."""
    room = Room(limit=128 * 1024)
    async with chatting(stack, room) as door:
        anna = await door.enter("anna")
        bert = await door.enter("bert", anna)
        slow = await door.enter("slow", anna, bert, receive_buffer=SMALL)
        visitor = room.members["slow"]
        visitor.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        peak = count = 0
        while not visitor.too_slow:
            await anna.say(f"{count:06} " + "x" * 1000)
            for guest in (anna, bert):
                # The notice comes after the line that exceeded the limit.
                assert await guest.hear() == f"anna: {count:06} " + "x" * 1000
            peak = max(peak, visitor.transport.get_write_buffer_size())
            count += 1
            assert count < 50_000, "it is never dropped"
        for guest in (anna, bert):
            assert await guest.hear() == "* slow has left (too slow)"
        assert 64 * 1024 < peak <= room.limit + 2000
        await bert.say("better")
        for guest in (anna, bert):
            assert await guest.hear() == "bert: better"
        assert await slow.peer.gone()
