"""A line server with timers: a login time-out, an idle time-out, and pings that keep a connection alive.

    python examples/line_server.py --backend trio

Then `nc 127.0.0.1 8888`: enter `login NAME`, then `say SOMETHING`, `who`, `pong` or `quit`. The protocol is a plain
class. It finds its group with `current_group()`, and it does not depend on a backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import _backend
import anyio

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup, current_group

MAX_LINE = 1024
#: Seconds that a client has to read the last line before the connection is aborted.
GRACE = 5.0


@dataclass
class Room:
    """The members, the time-outs in seconds, and an event for tasks that wait for a change."""

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
        self.paused = False  # The client does not read what we send.
        #: Ends an idle connection: one timer, which every line replaces.
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
        self.is_fine(self.buffer)  # The start of the next line.

    def pause_writing(self) -> None:
        self.paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        self.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.clean_up()

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
                    if not member.paused:  # Its buffer would grow. A member that does not read times out as idle.
                        member.send(f"{self.name}: {rest}")
            elif word == "who":
                self.send(" ".join(sorted(self.room.members)))
            elif word != "pong":
                self.send("what?")

    def is_fine(self, line: bytes) -> bool:
        """Close, and return False, if the line is too long."""
        if len(line) > MAX_LINE and not self.transport.is_closing():
            self.leave("your line is too long")
        return not self.transport.is_closing()

    def login(self, word: str, name: str) -> None:
        if word != "login" or not name:
            self.send("login NAME, please")
        elif name in self.room.members:
            self.send("that name is taken")
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
        """Send the reason and close; abort after a time-out, for a client that does not read would delay the close."""
        self.clean_up()
        self.send(reason)
        self.transport.close()
        self.timeout = current_group().call_later(GRACE, self.transport.abort)

    def clean_up(self) -> None:
        for timer in filter(None, (self.timeout, self.ping)):
            timer.cancel()
        if self.room.members.get(self.name) is self:
            del self.room.members[self.name]
            self.room.notify()


async def report(room: Room) -> None:
    """Wait in a task for changes that the protocols signal."""
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
    parser = _backend.make_parser("Serve lines, with time-outs.")
    for name in ("login_timeout", "idle_timeout", "ping_interval"):
        default = getattr(Room, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help="seconds")
    options = parser.parse_args()

    async def serve() -> None:
        room = Room(options.login_timeout, options.idle_timeout, options.ping_interval)
        await main(options.host, options.port, room)

    _backend.run(options.backend, serve)
