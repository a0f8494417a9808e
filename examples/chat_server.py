"""A chat server in which nobody has to wait for the slowest.

    python examples/chat_server.py --backend trio

Then `nc 127.0.0.1 8888`: the first line is your name, every other one goes to everybody. Whoever does not read what the
others say has it kept for them up to a limit, and is then dropped: the room neither waits nor grows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import _backend

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup

MAX_LINE = 1024
MAX_NAME = 32


@dataclass
class Room:
    """Who is here, and how many bytes wait at most for one of them."""

    limit: int = 256 * 1024
    members: dict[str, Visitor] = field(default_factory=dict)

    def tell(self, line: str) -> None:
        """Say a line to everybody. It never waits: what a member cannot take yet is in the transport's buffer."""
        data = line.encode() + b"\n"
        for member in tuple(self.members.values()):
            member.transport.write(data)
            if member.transport.get_write_buffer_size() > self.limit:
                member.too_slow = True
                member.transport.abort()  # Frees what waits; the others hear of it from `connection_lost`.


class Visitor(Protocol):
    """Somebody with a name, or about to say it."""

    transport: Transport

    def __init__(self, room: Room) -> None:
        self.room = room
        self.name = ""
        self.buffer = b""
        self.too_slow = False

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport
        self.send("* your name, please")

    def data_received(self, data: bytes) -> None:
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            if self.is_fine(line):
                self.line_received(line.decode(errors="replace").strip())
        self.is_fine(self.buffer)  # The last one is still to be completed.

    def connection_lost(self, exc: Exception | None) -> None:
        if self.room.members.get(self.name) is self:
            del self.room.members[self.name]
            why = " (too slow)" if self.too_slow else f" ({exc})" if exc else ""
            self.room.tell(f"* {self.name} has left{why}")

    def pause_writing(self) -> None:
        # Somebody who does not listen may not speak: nobody can make the answers to their own noise pile up.
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def is_fine(self, line: bytes) -> bool:
        """Whether to listen to a line, or else this is the end."""
        if len(line) > MAX_LINE and not self.transport.is_closing():
            self.send("* your line is too long")
            self.transport.close()
        return not self.transport.is_closing()

    def line_received(self, line: str) -> None:
        if self.name:
            if line:
                self.room.tell(f"{self.name}: {line}")
        elif not line.isalnum() or len(line) > MAX_NAME:
            self.send("* letters and digits only, please")
        elif line in self.room.members:
            self.send("* somebody has that name")
        else:
            self.send("* here: " + (" ".join(sorted(self.room.members)) or "nobody"))
            self.name = line
            self.room.members[line] = self
            self.room.tell(f"* {line} is here")

    def send(self, line: str) -> None:
        self.transport.write(line.encode() + b"\n")


async def main(host: str, port: int, limit: int) -> None:
    async with TransportGroup() as group:
        room = Room(limit)
        server = await group.create_server(lambda: Visitor(room), host, port)
        for sock in server.sockets:
            print(f"chatting on {sock.getsockname()}; Ctrl-C ends it", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    parser = _backend.make_parser("Pass on to everybody what anybody says.")
    parser.add_argument("--limit", type=int, default=Room.limit, help="bytes that wait at most for one visitor")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.limit)
