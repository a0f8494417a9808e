"""A server that stops in order: SIGTERM or Ctrl-C lets each client finish what it is doing.

    python examples/graceful_stop.py --backend trio --grace 5

Connect with `nc 127.0.0.1 8888` and type a line; the answer takes a second. Then stop the server with `kill`: it
accepts no more clients, idle ones are closed at once, and busy ones when they have their answer. What is left after
`--grace` seconds is aborted. A second signal ends the program at once.
"""

from __future__ import annotations

import signal

import _backend
import anyio

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup, current_group


class Worker(Protocol):
    """Answers each line a moment later."""

    transport: Transport

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.lines_in_work = 0
        self.stopping = False
        self.received = b""

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            if self.stopping:
                return  # The client gets no answer to these, and can ask another server.
            self.lines_in_work += 1
            self.transport.write(b"working on " + line + b"\n")
            current_group().call_later(self.seconds, self.answer, line)

    def answer(self, line: bytes) -> None:
        self.transport.write(line.upper() + b"\n")
        self.lines_in_work -= 1
        self.close_when_done()

    def shutdown_requested(self) -> None:
        self.stopping = True
        self.close_when_done()

    def close_when_done(self) -> None:
        if self.stopping and not self.lines_in_work:
            self.transport.close()  # Sends first what is buffered.


async def main(host: str, port: int, seconds: float, grace: float) -> None:
    async with TransportGroup() as group:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            server = await group.create_server(lambda: Worker(seconds), host, port)
            print(f"working on {server.sockets[0].getsockname()}; SIGTERM or Ctrl-C ends it", flush=True)
            async for _ in signals:
                break
        await server.shutdown(grace)


if __name__ == "__main__":
    parser = _backend.make_parser("Answer each line after a while, and stop in order.")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a line takes")
    parser.add_argument("--grace", type=float, default=5.0, help="how many seconds clients have to finish")
    options = parser.parse_args()
    _backend.run(options.backend, main, options.host, options.port, options.seconds, options.grace)
