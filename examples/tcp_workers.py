"""Echo on every core: workers in processes of their own share one port, and the system spreads the clients.

python examples/tcp_workers.py --backend trio --workers 4

Every worker has a listening socket of its own on the same port (`reuse_port`). Linux gives each new connection to one
of them; a worker that ends takes only its own clients along. Other systems share the port too, but may give all the
connections to one socket: FreeBSD has SO_REUSEPORT_LB for it, macOS has nothing.

No worker outlives its supervisor, not even one that is killed: its standard input is a pipe from the supervisor, and
ends with it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import _backend
import anyio
from tcp_echo_server import Echo

from transports_anyio import BaseTransport, Protocol, TransportGroup


class Worker(Echo):
    """Echo, and say who serves whom."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        print(f"worker {os.getpid()} serves {transport.get_extra_info('peername')}", flush=True)


class Supervisor(Protocol):
    """Ends the work when the pipe from the supervisor ends; nothing is ever sent on it."""

    def __init__(self, work: anyio.CancelScope) -> None:
        self.work = work

    def connection_lost(self, exc: Exception | None) -> None:
        self.work.cancel()


async def serve(host: str, port: int) -> None:
    """What each worker does: it is an ordinary server but for `reuse_port`, and ends with its supervisor."""
    with anyio.CancelScope() as work:
        async with TransportGroup() as group:
            await group.connect_read_pipe(lambda: Supervisor(work), sys.stdin)
            server = await group.create_server(Worker, host, port, reuse_port=True)
            print(f"worker {os.getpid()} is ready", flush=True)
            await server.serve_forever()


def supervise(host: str, port: int, backend: str, count: int) -> None:
    """Reserve the port, start the workers on it, and end all of them as soon as one has ended."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as reserved:
        # Bound but never listening: with port 0 the system chooses one here, and keeps it while workers come and go.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((host, port))
        port = reserved.getsockname()[1]
        print(f"echoing on {host}:{port} with {count} workers; Ctrl-C ends it", flush=True)
        command = [sys.executable, __file__, "--backend", backend, "--host", host, "--port", str(port), "--work"]
        # In sessions of their own, so that Ctrl-C comes here alone, and each worker is told once. However this process
        # ends, the system closes its ends of the pipes; no other process has them.
        workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 -- ourselves
            for _ in range(count)
        ]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            os.wait()
            print("a worker has ended: so do the others", flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGINT)
            for worker in workers:
                worker.communicate()  # Closes the pipe, and waits.


if __name__ == "__main__":
    parser = _backend.make_parser("Send back whatever comes in over TCP, on several cores.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="how many processes")
    parser.add_argument("--work", action="store_true", help="be one of them")
    options = parser.parse_args()
    if options.work:
        # It is ignored by what a shell has started in the background, and by the children of that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _backend.run(options.backend, serve, options.host, options.port)
    else:
        supervise(options.host, options.port, options.backend, options.workers)
