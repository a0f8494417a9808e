"""A protocol over a stream of another library: here AnyIO's, through a command and optionally through TLS.

    python examples/tcp_echo_server.py &
    python examples/foreign_stream.py --backend trio nc -N 127.0.0.1 8888
    python examples/foreign_stream.py --tls example.org nc example.org 443

The command is what OpenSSH calls a ProxyCommand: its standard input and output are the connection. AnyIO makes one
stream of the two pipes (`StapledByteStream`), and a second stream that encrypts it (`TLSStream`). `connect_stream`
takes any `ByteStream`, and the protocol is the same one that other examples use over TCP.
"""

from __future__ import annotations

import argparse
import ssl

import _backend
import anyio
from anyio.abc import ByteStream, Process
from anyio.streams.stapled import StapledByteStream
from anyio.streams.tls import TLSStream
from tcp_echo_client import Caller

from transports_anyio import BaseTransport, Transport, TransportGroup


class Line(Caller):
    """Send one line and wait for one line: a TLS stream has no half-close that would mark the end of a message."""

    transport: Transport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport
        transport.write(self.message.encode() + b"\n")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if data.endswith(b"\n"):
            self.transport.close()


def as_stream(process: Process) -> ByteStream:
    """The two pipes of a process as one stream."""
    assert process.stdin is not None
    assert process.stdout is not None
    return StapledByteStream(process.stdin, process.stdout)


async def ask(message: str, stream: ByteStream) -> str:
    """Send a line over any byte stream, and return the line that comes back."""
    async with TransportGroup() as group:
        on_con_lost = group.create_future()
        _, line = await group.connect_stream(lambda: Line(message, on_con_lost), stream)
        error = await on_con_lost
    if error is not None:
        raise error
    return line.answer.decode(errors="replace").rstrip("\n")


async def ask_through(command: list[str], message: str, context: ssl.SSLContext | None, name: str | None) -> str:
    """Run a command, and ask over its pipes; with a context, over TLS to the server `name`."""
    async with await anyio.open_process(command, stderr=None) as process:
        stream = as_stream(process)
        if context is not None:
            stream = await TLSStream.wrap(stream, hostname=name, ssl_context=context, standard_compatible=False)
        return await ask(message, stream)


async def main(command: list[str], message: str, name: str | None) -> None:
    context = None if name is None else ssl.create_default_context()
    print(f"sent      {message!r}")
    print(f"received  {await ask_through(command, message, context, name)!r}")


if __name__ == "__main__":
    parser = _backend.make_parser("Send a line through a command, and print the line that comes back.")
    parser.add_argument("--message", default="Hello, is this an echo?", help="what to send")
    parser.add_argument("--tls", metavar="NAME", help="speak TLS, with a server of this name")
    parser.add_argument("program", help="what connects")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args()
    _backend.run(options.backend, main, [options.program, *options.arguments], options.message, options.tls)
