"""A line server with time: a time-out for logging in, one for idling, and pings that keep a connection alive.

    python examples/line_server.py --backend trio

Then `nc 127.0.0.1 8888`: say `login NAME`, then `say SOMETHING`, `who`, `pong` or `quit`. The protocol is a plain
class; the group that it finds with `current_group()` is all it knows of the machinery, and no backend is in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import _backend
import anyio

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup, current_group

MAX_LINE = 1024
#: Seconds that somebody has to read the last words, once we have said that this is the end.
GRACE = 5.0


@dataclass
class Room:
    """Who is here, the times that matter (seconds), and a way to wait in a task for something to happen."""

    login_timeout: float = 10
    idle_timeout: float = 60
    ping_interval: float = 20
    members: dict[str, Line] = field(default_factory=dict)
    changed: anyio.Event = field(default_factory=anyio.Event)

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class Line(Protocol):
    """One visitor."""

    transport: Transport

    def __init__(self, room: Room) -> None:
        self.room = room
        self.name = ""
        self.buffer = b""
        self.paused = False  # Does not read what we say.
        #: What ends the connection if nothing happens: one timer, moved on by every line.
        self.timeout: Any = None
        self.ping: Any = None

    # Callbacks of the transport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport
        self.send("please login")
        self.expect_within(self.room.login_timeout, "you did not log in")

    def data_received(self, data: bytes) -> None:
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            if self.is_fine(line):
                self.line_received(line.decode(errors="replace").strip())
        self.is_fine(self.buffer)  # The last one is still to be completed.

    def pause_writing(self) -> None:
        self.paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.be_gone()

    # Time

    def expect_within(self, seconds: float, otherwise: str) -> None:
        if self.timeout is not None:
            self.timeout.cancel()
        self.timeout = current_group().call_later(seconds, self.leave, otherwise)

    def keep_alive(self) -> None:
        if not self.paused:
            self.send("ping")
        self.ping = current_group().call_later(self.room.ping_interval, self.keep_alive)

    # Words

    def line_received(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "quit":
            self.leave("goodbye")
        elif not self.name:
            self.login(word, rest)
        else:
            self.expect_within(self.room.idle_timeout, "you have been silent for too long")
            if word == "say":
                for member in self.room.members.values():
                    if not member.paused:  # Or else it would pile up. Whoever reads nothing is silent, too: see Time.
                        member.send(f"{self.name}: {rest}")
            elif word == "who":
                self.send(" ".join(sorted(self.room.members)))
            elif word != "pong":
                self.send("what?")

    def is_fine(self, line: bytes) -> bool:
        """Whether to listen to a line, or else this is the end."""
        if len(line) > MAX_LINE and not self.transport.is_closing():
            self.leave("your line is too long")
        return not self.transport.is_closing()

    def login(self, word: str, name: str) -> None:
        if word != "login" or not name:
            self.send("login NAME, please")
        elif name in self.room.members:
            self.send("somebody has that name")
        else:
            self.name = name
            self.room.members[name] = self
            self.room.notify()
            self.send(f"welcome {name}")
            self.expect_within(self.room.idle_timeout, "you have been silent for too long")
            self.ping = current_group().call_later(self.room.ping_interval, self.keep_alive)

    def send(self, line: str) -> None:
        self.transport.write(line.encode() + b"\n")

    def leave(self, reason: str) -> None:
        """Say why, and go. The words are flushed, which takes for ever if nobody reads them: hence the time-out."""
        self.be_gone()
        self.send(reason)
        self.transport.close()
        self.timeout = current_group().call_later(GRACE, self.transport.abort)

    def be_gone(self) -> None:
        for timer in filter(None, (self.timeout, self.ping)):
            timer.cancel()
        if self.room.members.get(self.name) is self:
            del self.room.members[self.name]
            self.room.notify()


async def report(room: Room) -> None:
    """A task that waits for what the protocols signal."""
    while True:
        await room.changed.wait()
        print("here:", " ".join(sorted(room.members)) or "nobody", flush=True)


async def main(host: str, port: int, room: Room) -> None:
    async with TransportGroup() as group:
        group.start_soon(report, room)
        server = await group.create_server(lambda: Line(room), host, port)
        for sock in server.sockets:
            print(f"listening on {sock.getsockname()}; Ctrl-C ends it", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    parser = _backend.make_parser("Serve lines, and mind the time.")
    for name in ("login_timeout", "idle_timeout", "ping_interval"):
        default = getattr(Room, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help="seconds")
    options = parser.parse_args()

    async def serve() -> None:
        room = Room(options.login_timeout, options.idle_timeout, options.ping_interval)
        await main(options.host, options.port, room)

    _backend.run(options.backend, serve)
