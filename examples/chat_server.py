"""A chat server that never waits for its slowest client.

    python examples/chat_server.py --backend trio

Then `nc 127.0.0.1 8888`: the first line is your name, and each further line is sent to all members. The server
buffers up to a limit for a member that does not read, and then drops the member. So no member waits for another, and
memory stays bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import _backend

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup

MAX_LINE = 1024
MAX_NAME = 32


@dataclass
class Room:
    """The members, and how many bytes the server buffers for one of them at most."""

    limit: int = 256 * 1024
    members: dict[str, Visitor] = field(default_factory=dict)

    def tell(self, line: str) -> None:
        """Send a line to all members. This never waits: the transport buffers what a member does not read yet."""
        data = line.encode() + b"\n"
        for member in tuple(self.members.values()):
            member.transport.write(data)
            if member.transport.get_write_buffer_size() > self.limit:
                member.too_slow = True
                member.transport.abort()  # Frees the buffer; `connection_lost` tells the others.


class Visitor(Protocol):
    """A connection: a member, or a client that has not sent its name yet."""

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
        self.is_fine(self.buffer)  # The start of the next line.

    def connection_lost(self, exc: Exception | None) -> None:
        if self.room.members.get(self.name) is self:
            del self.room.members[self.name]
            why = " (too slow)" if self.too_slow else f" ({exc})" if exc else ""
            self.room.tell(f"* {self.name} has left{why}")

    def pause_writing(self) -> None:
        # A client that does not read is not read: it cannot make the replies to its own lines pile up.
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def is_fine(self, line: bytes) -> bool:
        """Close, and return False, if the line is too long."""
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
            self.send("* that name is taken")
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
    parser = _backend.make_parser("Send each line of a member to all members.")
    parser.add_argument("--limit", type=int, default=Room.limit, help="bytes that are buffered for one member at most")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.limit)
