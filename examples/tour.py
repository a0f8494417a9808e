"""The tour: the callbacks of one echo server and its client on every backend, side by side.

The first column has the callbacks on asyncio's own transports. The others say for transports_anyio on each backend
whether the callback and its argument are the same, and show them if they are not. The exit status is 0 if all are
equal, otherwise 1.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol as Interface

import anyio
from _backend import BACKENDS
from tcp_echo_server import Echo

from transports_anyio import BaseTransport, Protocol, Transport, TransportGroup
from transports_anyio.testing import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HOST = "127.0.0.1"
GREETING = b"hello!\n"
#: More than the kernel takes at once, so that one write of it has to be buffered and pauses the writer.
PAYLOAD = bytes(range(256)) * (16 * 2**20 // 256)
#: Seconds after which a visit counts as hanging. It takes a fraction of a second.
PATIENCE = 60

ORACLE = "asyncio's own transports"


# -- the protocols ---------------------------------------------------------------------------------------


@dataclass
class Call:
    """One callback with its argument. Adjacent pieces of one message are joined: TCP keeps no boundaries."""

    name: str
    argument: str = ""
    data: bytearray = field(default_factory=bytearray)

    def __str__(self) -> str:
        return f"{self.name}({self.argument or describe(self.data)})"


def describe(data: bytearray) -> str:
    if len(data) <= len(GREETING):
        return repr(bytes(data)) if data else ""
    size = f"{len(data) >> 20} MiB" if len(data) % 2**20 == 0 else f"{len(data)} B"
    return f"{size} #{hashlib.sha256(data).hexdigest()[:5]}"


def story(recorder: Recorder) -> list[Call]:
    """The callbacks that a recorder has recorded, in a form that can be compared."""
    calls: list[Call] = []
    for name, *arguments in recorder.calls:
        if name == "connection_made":
            # The port differs each time, so only the address is compared.
            calls.append(Call(name, f"{arguments[0].get_extra_info('peername')[0]}:*"))
        elif name == "data_received":
            if calls[-1].name != name or len(calls[-1].data) in (len(GREETING), len(PAYLOAD)):
                calls.append(Call(name))
            calls[-1].data += arguments[0]
        else:
            calls.append(Call(name, ", ".join(map(repr, arguments))))
    return calls


class Host(Echo):
    """The echo server of tcp_echo_server.py; here it may buffer all that the visitor sends."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=2 * len(PAYLOAD))


class Guest(Protocol):
    """Send a greeting and the payload, then an end of file, and only then read the echo."""

    transport: Transport

    def connection_made(self, transport: BaseTransport) -> None:
        assert isinstance(transport, Transport)
        self.transport = transport
        self.greeted = 0
        transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        if self.greeted < len(GREETING):
            self.greeted += len(data)
            if self.greeted == len(GREETING):
                self.transport.write(PAYLOAD)  # calls pause_writing before it returns

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.write_eof()
        self.transport.resume_reading()


# -- the visits ------------------------------------------------------------------------------------------


class Stack(Interface):
    """What asyncio's event loop and a `TransportGroup` have in common: endpoint functions."""

    @property
    def create_server(self) -> Callable[..., Any]: ...

    @property
    def create_connection(self) -> Callable[..., Any]: ...


async def visit(stack: Stack) -> dict[str, list[Call]]:
    """Serve one visitor, and return what both ends saw."""
    hosts: list[Recorder] = []

    def make_host() -> Recorder:
        hosts.append(Recorder(Host()))
        return hosts[-1]

    with anyio.fail_after(PATIENCE):
        server = await stack.create_server(make_host, HOST, 0)
        _, port = server.sockets[0].getsockname()
        visitor = Recorder(Guest())
        await stack.create_connection(lambda: visitor, HOST, port)
        await visitor.wait_for("connection_lost", timeout=PATIENCE)
        (host,) = hosts
        await host.wait_for("connection_lost", timeout=PATIENCE)
        server.close()
        await server.wait_closed()
    return {"server": story(host), "client": story(visitor)}


async def visit_asyncio() -> dict[str, list[Call]]:
    return await visit(asyncio.get_running_loop())


async def visit_group() -> dict[str, list[Call]]:
    async with TransportGroup() as group:
        return await visit(group)


def tour() -> dict[str, dict[str, list[Call]]]:
    """Return the callbacks of both ends for each stack that is installed."""
    seen = {ORACLE: anyio.run(visit_asyncio, **BACKENDS["asyncio"])}
    for backend, arguments in BACKENDS.items():
        if importlib.util.find_spec(backend) is None:
            print(f"{backend} is not installed: skipped")
            continue
        seen[f"ours on {backend}"] = anyio.run(visit_group, **arguments)
    return seen


# -- the table -------------------------------------------------------------------------------------------

BOLD, GREEN, RED, DIM = 1, 32, 31, 2


def paint(text: str, style: int) -> str:
    """The text in a colour, on a terminal that may have colours (https://no-color.org)."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return f"\x1b[{style}m{text}\x1b[0m"
    return text


#: The width of the first column. With the others the table has less than 80 columns.
WIDTH = 28


def line(cells: Sequence[str], widths: Sequence[int], style: int) -> str:
    return paint("  ".join(map(str.ljust, cells, widths)).rstrip(), style)


def main() -> int:
    seen = tour()
    others = list(seen)[1:]
    widths = [WIDTH, *map(len, others)]
    print(line(list(seen), widths, BOLD))
    total = different = 0
    for end in ("server", "client"):
        print(line([f"-- {end} ".ljust(WIDTH, "-"), *("-" * len(name) for name in others)], widths, DIM))
        for calls in zip_longest(*(ends[end] for ends in seen.values()), fillvalue="(nothing)"):
            expected, *ours = map(str, calls)
            equal = set(ours) <= {expected}
            cells = ["the same" if call == expected else "different" for call in ours]
            print(line([expected, *cells], widths, GREEN if equal else RED))
            for name, call in zip(others, ours, strict=True):
                if call != expected:
                    print(paint(f"    {name}: {call}", RED))
            total += 1
            different += not equal
    print()
    count = {1: "one", 2: "two", 3: "three", 4: "four"}[len(seen)]
    if different:
        print(paint(f"{different} of {total} callbacks differ", RED))
        return 1
    print(paint(f"the same {total} callbacks on all {count}: equal", GREEN))
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description="Show one protocol on every backend, side by side.").parse_args()
    sys.exit(main())
