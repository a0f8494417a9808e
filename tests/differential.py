"""Run one script for both ends of a connection on asyncio's own transports and on ours, and record the callbacks.

A *step* is `(end, operation, *arguments)`: the end is `"a"` or `"b"`, the operation one of `Script`'s methods or of the
transport's. A *reaction* is a list of steps that an end takes inside its n-th callback of a name. A *carrier* makes the
connection; a new kind of connection is one new maker in `CARRIERS`.

After every step the world settles: it waits until everything that the step causes has happened (`World.owes` says
what is still missing), so that nothing depends on the order in which a backend serves the two ends.

The normalisation. For each step, a recording has the result of the operation, and for each end its callbacks and
the state of its transport. Two recordings are equal up to these points, and no others:

- *Chunks.* Bytes received in one step count together: the system decides where the stream is cut. That they
  are the right bytes in order is checked as they come. `get_buffer` and `buffer_updated` are one event with them.
- *Flow control beside reading.* `pause_writing` and `resume_writing` are a list of their own in each step: whether the
  system reports "writable" or "readable" first is a race.
- *Sizes of buffers.* Whether something waits is compared, not how much: the system decides how much it takes.
- *The state of a transport after `connection_lost`.* It is closing. asyncio's transports forget the rest by then.
- *What an abort cuts off.* The system decides how much of a buffer it had taken by then.
- *The words of errors.* An exception counts by its class, a report by the class of its exception and the names of its
  keys. (With TLS also not by whose transport it names: asyncio has two on top of each other there.)
"""

from __future__ import annotations

import asyncio
import functools
import os
import select
import socket
import ssl
import struct
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.lowlevel
import trustme
from network import AF_UNIX
from support import GUARD, HOST, SMALL, Stack, capture_log, collect_contexts, turns

from transports_anyio.testing import BufferedRecorder, Recorder, memory_connection

Step = tuple[Any, ...]

#: More than the system's buffers of any carrier and the transport's high watermark together.
HUGE = 1 << 20

NAME = "differential.example"


class Boom(Exception):  # noqa: N818  # not an error
    """What a script raises in a callback."""


def pattern(start: int, size: int) -> bytes:
    """Return a part of an endless stream that does not repeat within any block of a power of two."""
    first = start % 251
    return (bytes(range(251)) * (size // 251 + 2))[first : first + size]


# -- the callbacks of an end-----------------------------------------------------------------------------------


class Script:
    """The operations and callbacks of one end, shared by its protocols."""

    def __init__(self, name: str, reactions: dict[tuple[str, int], Sequence[Step]], world: World) -> None:
        self.name = name
        self.world = world
        self.reactions = reactions
        self.counts: dict[str, int] = {}
        self.transport: Any = None
        self.recorders: list[Any] = []
        self.received_calls: list[Any] = []
        self.flow: list[Any] = []
        self.accepted = 0
        self.received = 0
        self.keep_open = False
        self.buffer: Any = None
        self.eof_sent = self.eof_seen = self.lost = self.aborted = False
        self.wrote_after_loss_of_other = False
        self.truncated = False

    @property
    def other(self) -> Script:
        return self.world.b if self is self.world.a else self.world.a

    def protocol(self, kind: str = "plain", transport: Any = None) -> Any:
        """Return a new protocol of this end, inside a recorder that checks the order of its callbacks."""
        number = len(self.recorders)
        recorder = (
            Recorder(Plain(self, number), transport=transport)
            if kind == "plain"
            else BufferedRecorder(Buffered(self, number), transport=transport)
        )
        self.recorders.append(recorder)
        return recorder

    # What happens to it.

    def tell(self, number: int, name: str, *what: Any) -> Any:
        into = self.flow if name in ("pause_writing", "resume_writing") else self.received_calls
        last = into[-1] if into else None
        if name == "received" and last is not None and last[:2] == (number, name):
            into[-1] = (number, name, last[2] + what[0])
        else:
            into.append((number, name, *what))
        return self.react(name, into)

    def react(self, name: str, into: list[Any]) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        for end, operation, *arguments in self.reactions.get((name, self.counts[name]), ()):
            script = self if end == "self" else self.other if end == "other" else self.world.ends[end]
            if operation == "raise":
                into.append(("raises",))
                script._note_truncation()
                raise Boom
            into.append((end, operation, script.perform(operation, *arguments)))

    def took(self, data: Any) -> None:
        if bytes(data) != pattern(self.received, len(data)):
            message = f"{self.name} got other bytes than were sent, after {self.received}"
            # An exception here would only end the connection, equally on both sides.
            self.world.corrupted.append(message)
            raise AssertionError(message)
        self.received += len(data)

    # What it does.

    def perform(self, operation: str, *arguments: Any) -> Any:
        """Carry out one operation and return its result in a comparable form."""
        try:
            method = getattr(self, f"do_{operation}", None)
            if method is None:
                return plain(getattr(self.transport, operation)(*arguments))
            return plain(method(*arguments))
        except Exception as exc:
            return type(exc).__name__

    def _accept(self, size: int, write: Callable[[bytes], Any]) -> None:
        data = pattern(self.accepted, size)
        takes = not self.lost and not (self.transport.is_closing() and not self.transport.get_write_buffer_size())
        if self.other.lost and size:
            self.wrote_after_loss_of_other = True
        # Before the call: `write` may call `pause_writing`, whose reaction writes the bytes that follow.
        taken = size if takes else 0
        self.accepted += taken
        try:
            write(data)
        except BaseException:
            self.accepted -= taken
            raise

    def do_write(self, size: int, kind: Callable[[bytes], Any] = bytes) -> None:
        self._accept(size, lambda data: self.transport.write(kind(data)))

    def do_write_then_change(self, size: int) -> None:
        """Write a buffer and overwrite it at once."""

        def write(data: bytes) -> None:
            buffer = bytearray(data)
            self.transport.write(buffer)
            buffer[:] = bytes(len(buffer))
            buffer.clear()

        self._accept(size, write)

    def do_writelines(self, *sizes: int) -> None:
        def write(data: bytes) -> None:
            chunks, start = [], 0
            for size in sizes:
                chunks.append(data[start : start + size])
                start += size
            self.transport.writelines(chunks)

        self._accept(sum(sizes), write)

    def do_write_anything(self, data: Any) -> None:
        self.transport.write(data)

    def do_writelines_anything(self, data: Any) -> None:
        self.transport.writelines(data)

    def do_write_eof(self) -> None:
        self.transport.write_eof()
        self.eof_sent = True

    def do_abort(self) -> None:
        self.aborted = True
        self._note_truncation()
        self.transport.abort()

    def _note_truncation(self) -> None:
        if self.world.carrier.writes(self.name) and not self.lost:
            # The system decides how much is left when writing is resumed.
            resuming = any(entry[1:2] == ("resume_writing",) for entry in self.flow[-2:])  # It may have raised.
            if resuming or self.transport.get_write_buffer_size():
                self.truncated = True

    def do_end(self) -> None:
        """Abort; asyncio's transports of reading pipes can only be closed."""
        if hasattr(self.transport, "abort"):
            self.do_abort()
        else:
            self.transport.close()

    def do_reset(self) -> None:
        """End the connection by a reset, whatever has been read."""
        self.aborted = True
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def do_keep_open(self, answer: Any) -> None:
        """Set the return value of `eof_received`."""
        self.keep_open = answer

    def do_use_buffer(self, buffer: Any) -> None:
        """Set the return value of `get_buffer`."""
        self.buffer = buffer

    def do_set_protocol(self, kind: str) -> None:
        self.transport.set_protocol(self.protocol(kind, self.transport))

    def do_protocol_number(self) -> int:
        return self.recorders.index(self.transport.get_protocol())

    def do_get_write_buffer_size_is_positive(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    def do_has(self, name: str) -> bool:
        return self.transport.get_extra_info(name) is not None

    def do_default(self, name: str) -> Any:
        return self.transport.get_extra_info(name, "the default")

    # What it says of itself.

    def state(self) -> dict[str, Any]:
        transport = self.transport
        state = {"closing": transport.is_closing()}
        if not self.lost:
            state["protocol"] = self.do_protocol_number()
            if self.world.carrier.reads(self.name):
                state["reading"] = transport.is_reading()
            if self.world.carrier.writes(self.name):
                state["buffered"] = transport.get_write_buffer_size() > 0
        return state

    def take(self) -> dict[str, Any]:
        """Return the callbacks since the last call, and the transport's state."""
        received_calls = self.received_calls
        if self.other.truncated:
            received_calls = [
                (*entry[:2], "a part") if entry[1:2] == ("received",) else entry for entry in received_calls
            ]
        taken = {"received_calls": received_calls, "flow": self.flow, **self.state()}
        self.received_calls, self.flow = [], []
        return taken


def plain(value: Any) -> Any:
    """Return the result of an operation if it can be compared, and its class otherwise."""
    return value if value is None or isinstance(value, (bool, int, str, bytes, tuple)) else type(value).__name__


class _Scripted:
    def __init__(self, script: Script, number: int) -> None:
        self.script = script
        self.number = number

    def connection_made(self, transport: Any) -> None:
        self.script.transport = transport
        self.script.tell(self.number, "connection_made")

    def eof_received(self) -> Any:
        self.script.eof_seen = True
        self.script.tell(self.number, "eof_received")
        return self.script.keep_open

    def connection_lost(self, exc: BaseException | None) -> None:
        self.script.lost = True
        self.script.tell(self.number, "connection_lost", None if exc is None else type(exc).__name__)

    def pause_writing(self) -> None:
        self.script.tell(self.number, "pause_writing")

    def resume_writing(self) -> None:
        self.script.tell(self.number, "resume_writing")


class Plain(_Scripted, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.script.took(data)
        self.script.tell(self.number, "received", len(data))


class Buffered(_Scripted, asyncio.BufferedProtocol):
    def __init__(self, script: Script, number: int) -> None:
        super().__init__(script, number)
        self.buffer = memoryview(bytearray(1000))

    def get_buffer(self, sizehint: int) -> Any:
        self.script.react("get_buffer", self.script.received_calls)
        return self.buffer if self.script.buffer is None else self.script.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.script.took(self.buffer[:nbytes])
        self.script.tell(self.number, "received", nbytes)


# -- carriers -------------------------------------------------------------------------------------------------

Maker = Callable[[Any, Callable[[], Any], Callable[[], Any]], Any]


@dataclass(frozen=True)
class Carrier:
    """How a connection is made: `make(group, factory_a, factory_b)` is an async context manager around its life."""

    name: str
    make: Maker
    #: The oracle of this carrier; asyncio has no connections in memory.
    oracle: str = ""
    one_way: bool = False
    #: Whether each end tells the other that it closes, and waits for the answer.
    has_shutdown: bool = False
    #: Whether this system has it.
    available: bool = True

    def writes(self, end: str) -> bool:
        return not self.one_way or end == "a"

    def reads(self, end: str) -> bool:
        return not self.one_way or end == "b"


def _shrink(sock: Any) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SMALL)


async def _accepted(group: Any, factory_a: Any, factory_b: Any, server: Any, sock: socket.socket, **tls: Any) -> None:
    with anyio.fail_after(GUARD):
        await group.create_connection(factory_a, sock=sock, **tls)
        while factory_b.made is None or factory_b.made.transport is None:
            await anyio.lowlevel.checkpoint()
    server.close()


class Once:
    """A protocol factory that keeps the protocols it made."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.factory = factory
        self.made: Any = None

    def __call__(self) -> Any:
        assert self.made is None
        self.made = self.factory()
        return self.made


@asynccontextmanager
async def tcp(group: Any, factory_a: Any, factory_b: Any) -> AsyncIterator[None]:
    with socket.socket() as listener, socket.socket() as sock:
        _shrink(listener)
        _shrink(sock)
        listener.bind((HOST, 0))
        server = await group.create_server(factory_b := Once(factory_b), sock=listener)
        sock.connect(listener.getsockname())
        await _accepted(group, factory_a, factory_b, server, sock)
        yield


_authority = trustme.CA()
_client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_authority.configure_trust(_client_context)
_server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
_authority.issue_cert(NAME).configure_cert(_server_context)


@asynccontextmanager
async def tls(group: Any, factory_a: Any, factory_b: Any) -> AsyncIterator[None]:
    with socket.socket() as listener, socket.socket() as sock:
        _shrink(listener)
        _shrink(sock)
        listener.bind((HOST, 0))
        server = await group.create_server(factory_b := Once(factory_b), sock=listener, ssl=_server_context)
        sock.connect(listener.getsockname())
        await _accepted(group, factory_a, factory_b, server, sock, ssl=_client_context, server_hostname=NAME)
        yield


@asynccontextmanager
async def unix(group: Any, factory_a: Any, factory_b: Any) -> AsyncIterator[None]:
    with tempfile.TemporaryDirectory() as directory, socket.socket(AF_UNIX) as sock:
        path = os.path.join(directory, "socket")
        server = await group.create_unix_server(factory_b := Once(factory_b), path)
        sock.connect(path)
        await _accepted(group, factory_a, factory_b, server, sock)
        yield


@asynccontextmanager
async def pipe(group: Any, factory_a: Any, factory_b: Any) -> AsyncIterator[None]:
    reading, writing = os.pipe()
    with open(reading, "rb", 0) as source, open(writing, "wb", 0) as sink:
        await group.connect_read_pipe(factory_b, source)
        await group.connect_write_pipe(factory_a, sink)
        yield


def memory(**sizes: Any) -> Maker:
    @asynccontextmanager
    async def make(group: Any, factory_a: Any, factory_b: Any) -> AsyncIterator[None]:
        await memory_connection(group, factory_a, factory_b, **sizes)
        yield

    return make


CARRIERS = {
    carrier.name: carrier
    for carrier in (
        Carrier("tcp", tcp),
        Carrier("unix", unix, available=AF_UNIX != socket.AF_UNSPEC),
        Carrier("tls", tls, has_shutdown=True),
        Carrier("pipe", pipe, one_way=True, available=sys.platform != "win32"),
        Carrier("memory", memory(), oracle="unix"),
        Carrier("memory_in_small_pieces", memory(chunk_size=997, buffer_size=5003), oracle="unix"),
    )
}


# -- the world ------------------------------------------------------------------------------------------------


class World:
    """A connection whose ends follow a script, and its recording."""

    def __init__(
        self, carrier: Carrier, reactions: dict[tuple[str, str, int], Sequence[Step]], patience: float = GUARD
    ) -> None:
        self.carrier = carrier
        self.patience = patience
        self.ends: dict[str, Script] = {}
        for name in "ab":
            mine = {key[1:]: steps for key, steps in reactions.items() if key[0] == name}
            self.ends[name] = Script(name, mine, self)
        self.recording: list[Any] = []
        #: The ends that received bytes that were not sent to them.
        self.corrupted: list[str] = []
        self.has_shutdown = carrier.has_shutdown
        self._group: Any = None
        self._contexts: list[dict[str, Any]] = []
        self._records: list[Any] = []

    @property
    def a(self) -> Script:
        return self.ends["a"]

    @property
    def b(self) -> Script:
        return self.ends["b"]

    @asynccontextmanager
    async def open(self, stack: Stack, kinds: Sequence[str] = ("plain", "plain")) -> AsyncIterator[World]:
        """Make the connection, and end it afterwards, whatever its state."""
        async with stack.open() as group:
            self._group = group
            self._contexts = collect_contexts(group)
            with capture_log(stack) as self._records:
                async with self.carrier.make(
                    group, lambda: self.a.protocol(kinds[0]), lambda: self.b.protocol(kinds[1])
                ):
                    try:
                        await self._record(("connection",), None)
                        yield self
                        for script in self.ends.values():
                            if not script.lost:
                                await self.step((script.name, "end"))
                    finally:
                        for script in self.ends.values():
                            if script.transport is not None and not script.lost:
                                script.do_end()
                        with anyio.CancelScope(shield=True), anyio.fail_after(GUARD):
                            while not all(script.lost for script in self.ends.values() if script.transport):
                                await anyio.lowlevel.checkpoint()
        # The oracle has been seen to call `eof_received` twice, and `get_buffer` after it, and to send what was changed
        # after `write`.
        if not stack.is_oracle:
            assert not self.corrupted, self.corrupted
            for script in self.ends.values():
                for recorder in script.recorders:
                    recorder.check(finished=False)
                script.recorders[-1].check()

    async def step(self, step: Step) -> Any:
        """Take one step, and return its recording."""
        end, operation, *arguments = step
        if end == "both":
            return await self._record(step, await getattr(self, operation)(*arguments))
        return await self._record(step, self.ends[end].perform(operation, *arguments))

    async def start_tls(self) -> None:
        """Encrypt the connection from here on: `a` is the client."""
        self.has_shutdown = True

        async def upgrade(script: Script, context: ssl.SSLContext, **options: Any) -> None:
            script.transport = await self._group.start_tls(script.transport, script.recorders[-1], context, **options)

        with anyio.fail_after(GUARD):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(functools.partial(upgrade, self.a, _client_context, server_hostname=NAME))
                tasks.start_soon(functools.partial(upgrade, self.b, _server_context, server_side=True))

    async def _record(self, step: Step, outcome: Any) -> Any:
        await self.settle()
        entry = {
            "step": step,
            "outcome": outcome,
            "reports": [self._report(context) for context in self._contexts],
            "warnings": sum(record.levelname == "WARNING" for record in self._records),
            "a": self.a.take(),
            "b": self.b.take(),
        }
        self._contexts.clear()
        self._records.clear()
        self.recording.append(entry)
        return entry

    def _report(self, context: dict[str, Any]) -> Any:
        whose = [name for name, script in self.ends.items() if context.get("transport") is script.transport]
        return (
            type(context.get("exception")).__name__,
            sorted(context),
            "either end's" if self.has_shutdown else whose,
        )

    # Waiting for what has to come.

    async def settle(self) -> None:
        debts: list[str] = []
        try:
            with anyio.fail_after(self.patience):
                while debts := [*self.owes(self.a, self.b), *self.owes(self.b, self.a)]:
                    await anyio.lowlevel.checkpoint()
        except TimeoutError:
            raise AssertionError(f"still to come: {debts}\n{self.recording}") from None
        await turns(5)  # Wrong callbacks would come now.

    def owes(self, sender: Script, receiver: Script) -> Iterable[str]:
        """Return what must still arrive from `sender` at `receiver`, or back at `sender`."""
        to, out = receiver.transport, sender.transport
        listens = self.carrier.reads(receiver.name) and not receiver.lost and not receiver.eof_seen and to.is_reading()
        buffered = self.carrier.writes(sender.name) and not sender.lost and out.get_write_buffer_size() > 0
        over = sender.lost or (sender.eof_sent and not buffered)
        if listens:
            if over:
                yield f"the end of {sender.name} reaches {receiver.name}"
            elif buffered:
                yield f"the buffer of {sender.name} drains"
            elif receiver.received < sender.accepted:
                yield f"{receiver.name} receives what {sender.name} wrote"
        if not sender.lost and out.is_closing():
            waits_for_shutdown = self.has_shutdown and not sender.aborted and not listens and not receiver.lost
            if receiver.lost or listens or not (buffered or waits_for_shutdown):
                yield f"{sender.name} is lost"
        if receiver.lost and not sender.lost and self.carrier.writes(sender.name):
            if buffered or self.carrier.one_way:
                yield f"{sender.name} notices that the reader has gone"
            elif sender.wrote_after_loss_of_other and not self._hung_up(out):
                yield f"the system notices that the reader has gone from {sender.name}"

    @staticmethod
    def _hung_up(transport: Any) -> bool:
        sock = transport.get_extra_info("socket") or transport.get_extra_info("pipe")
        if sock is None:
            return True  # In memory it is noticed at once.
        poll = select.poll()
        poll.register(sock.fileno(), 0)
        return bool(poll.poll(0))


# -- scenarios ------------------------------------------------------------------------------------------------

TWO_WAY = ("tcp", "unix", "tls", "memory", "memory_in_small_pieces")
EVERYWHERE = ("tcp", "unix", "tls", "pipe", "memory", "memory_in_small_pieces")


@dataclass(frozen=True)
class Scenario:
    name: str
    steps: Sequence[Step]
    reactions: dict[tuple[str, str, int], Sequence[Step]] = field(default_factory=dict)
    carriers: Sequence[str] = TWO_WAY
    #: Of each end's first protocol.
    kinds: Sequence[str] = ("plain", "plain")


async def run_scenario(
    scenario: Scenario, carrier: Carrier, stack: Stack, patience: float = GUARD
) -> list[dict[str, Any]]:
    """Run a scenario and return its recording. Raise if something is still missing after `patience` seconds."""
    world = World(carrier, scenario.reactions, patience)
    async with world.open(stack, scenario.kinds):
        for step in scenario.steps:
            await world.step(step)
    return world.recording
