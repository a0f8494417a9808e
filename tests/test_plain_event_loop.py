"""Programs that asyncio or uvloop has started itself.

There, with sniffio installed (trio needs it), AnyIO finds the backend only through the current task, and a callback
of the loop has none. No other test covers this, because `anyio.run` and AnyIO's pytest plugin set the backend in
the context.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeAlias

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
from network import needs_selector
from support import GUARD, HOST, Peer, Recorder, collect_contexts, connected, fill, raises_inside, settle, turns, until

from transports_anyio import TransportGroup, current_group

#: More than small kernel buffers of a connection hold, and the high watermark.
MUCH = bytes(4 << 20)

Main: TypeAlias = "Callable[[], Awaitable[None]]"
Run: TypeAlias = "Callable[[Main], None]"


def skip_unless_chosen(request: pytest.FixtureRequest, backend: str) -> None:
    chosen = request.config.getoption("--backend")
    if chosen and backend not in chosen:
        pytest.skip("another --backend")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """What runs a program."""
    skip_unless_chosen(request, request.param)
    start = asyncio.run if request.param == "asyncio" else pytest.importorskip("uvloop").run
    return lambda main: start(asyncio.wait_for(main(), GUARD))


async def answers(peer: Peer) -> bool:
    await peer.send(b"are you there?")
    return await peer.receive_exactly(14) == b"are you there?"


def echo() -> Recorder:
    return Recorder(on_data_received=lambda self, data: self.transport.write(data))


#: For each place in which a group calls user code, how to get a function called there.
PLACES = ["call_soon", "call_later", "connection_made", "data_received", "pause_writing", "connection_lost"]
every_place = pytest.mark.parametrize("place", PLACES)


async def called_from(group: TransportGroup, place: str, function: Callable[[], object]) -> None:
    """Get `function` called in a callback of the group, and wait for the call."""
    called = False

    def callback(*_: object) -> None:
        nonlocal called
        called = True
        function()

    if place == "call_soon":
        group.call_soon(callback)
    elif place == "call_later":
        group.call_later(0.001, callback)
    else:
        async with connected(group, Recorder(**{f"on_{place}": callback}), small=True) as (transport, _, peer):
            if place == "data_received":
                await peer.send(b"x")
            elif place == "pause_writing":
                group.call_soon(transport.write, MUCH)
            elif place == "connection_lost":
                peer.close()
            await until(lambda: called)
            transport.abort()
    await until(lambda: called)


@every_place
def test_an_error_is_reported_and_the_group_lives_on(run: Run, place: str) -> None:
    async def main() -> None:
        async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
            contexts = collect_contexts(group)
            await called_from(group, place, lambda: 1 / 0)
            await until(lambda: contexts)
            assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError]
            assert await answers(peer)

    run(main)


@every_place
def test_a_callback_starts_a_task(run: Run, place: str) -> None:
    seen: list[object] = []

    async def main() -> None:
        async def task(argument: str) -> None:
            await anyio.sleep(0.001)
            seen.append((argument, current_group()))

        async with TransportGroup() as group:
            await called_from(group, place, lambda: group.start_soon(task, "an argument"))
        assert seen == [("an argument", group)]

    run(main)


@every_place
def test_a_callback_uses_anyio(run: Run, place: str) -> None:
    """The operations with which a protocol communicates with tasks."""
    made: list[Any] = []

    def use() -> None:
        made.append(anyio.get_cancelled_exc_class())
        made.append(anyio.current_time())
        made.append(anyio.CancelScope(deadline=anyio.current_time() + GUARD))
        event = anyio.Event()
        event.set()
        made.append(event)
        sender, receiver = anyio.create_memory_object_stream[bytes](1)
        sender.send_nowait(b"hello")
        made.extend((sender, receiver))

    async def main() -> None:
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            await called_from(group, place, use)
            assert contexts == []
            error, _, scope, event, sender, receiver = made
            assert error is asyncio.CancelledError
            with scope:
                await event.wait()
                with sender, receiver:
                    assert await receiver.receive() == b"hello"

    run(main)


def test_a_callback_wakes_a_task(run: Run) -> None:
    async def main() -> None:
        async with TransportGroup() as group:
            heard = anyio.Event()
            async with connected(group, Recorder(on_data_received=lambda *_: heard.set())) as (_, _, peer):
                await peer.send(b"x")
                await heard.wait()

    run(main)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_keyboard_interrupt_and_system_exit_propagate(run: Run, error: type[BaseException]) -> None:
    protocol = Recorder()
    contexts: list[Any] = []

    def fail() -> None:
        raise error

    async def main() -> None:
        async with TransportGroup() as group, connected(group, protocol):
            group.set_exception_handler(lambda *args: contexts.append(args))
            group.call_later(0.001, fail)
            await anyio.sleep(GUARD)

    with raises_inside(error):
        run(main)
    assert contexts == []
    assert protocol.lost


@pytest.mark.parametrize("place", ["call_soon", "call_later", "data_received"])
def test_the_transport_of_a_stream_is_used_in_callbacks(run: Run, place: str) -> None:
    """Its channel has tasks that receive and send; callbacks wake, pause and end them."""

    async def main() -> None:
        async with TransportGroup() as group:
            server = await group.create_server(echo, HOST, 0)
            stream = await anyio.connect_tcp(*server.sockets[0].getsockname())
            transport, protocol = await group.connect_stream(Recorder, stream)
            await called_from(group, place, lambda: transport.write(b"one "))
            await protocol.wait_received(4)
            await called_from(group, place, transport.pause_reading)
            transport.write(b"two ")
            await called_from(group, place, transport.resume_reading)
            await protocol.wait_received(8)
            await called_from(group, place, lambda: transport.writelines([b"thr", b"ee"]))
            await called_from(group, place, transport.write_eof)
            await protocol.wait_for("connection_lost")
            assert protocol.received == b"one two three"
            assert protocol.exception is None
            server.close()

    run(main)


def test_the_transport_of_a_stream_is_closed_in_a_callback(run: Run) -> None:
    async def main() -> None:
        for end in ("close", "abort"):
            async with TransportGroup() as group:
                server = await group.create_server(echo, HOST, 0)
                stream = await anyio.connect_tcp(*server.sockets[0].getsockname())
                transport, protocol = await group.connect_stream(Recorder, stream)
                transport.write(b"hello")
                await protocol.wait_received(5)
                await called_from(group, "data_received", getattr(transport, end))
                await protocol.wait_for("connection_lost")
                assert protocol.exception is None

    run(main)


def test_a_protocol_on_a_stream_fails(run: Run) -> None:
    def fail(*_: object) -> None:
        raise LookupError

    async def main() -> None:
        async with TransportGroup() as group, connected(group, echo()) as (_, _, peer):
            contexts = collect_contexts(group)
            server = await group.create_server(echo, HOST, 0)
            stream = await anyio.connect_tcp(*server.sockets[0].getsockname())
            transport, protocol = await group.connect_stream(lambda: Recorder(on_data_received=fail), stream)
            transport.write(b"hello")
            await protocol.wait_for("connection_lost")
            assert [type(context["exception"]) for context in contexts] == [LookupError]
            assert isinstance(protocol.exception, LookupError)
            assert await answers(peer)

    run(main)


def test_a_child_process(run: Run) -> None:
    """The exit of a child is noticed and reported without a task too."""

    class Output(asyncio.SubprocessProtocol):
        def __init__(self) -> None:
            self.received = b""
            self.exited: anyio.Event | None = None

        def pipe_data_received(self, fd: int, data: bytes) -> None:
            self.received += data

        def process_exited(self) -> None:
            self.exited = anyio.Event()

    async def main() -> None:
        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            _, protocol = await group.subprocess_exec(Output, sys.executable, "-c", "print('hello')")
            await until(lambda: protocol.exited)
            await group.wait_closed()
            assert protocol.received == b"hello\n"
            assert contexts == []

    run(main)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="such task factories are new in Python 3.12")
@pytest.mark.parametrize("run", ["asyncio"], indirect=True)  # uvloop's own shutdown fails with such a factory.
@every_place
def test_a_callback_starts_a_task_that_begins_at_once(run: Run, place: str) -> None:
    """A task factory of the user's may run a new task's first step inside the call, which is a callback's here."""
    seen: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)

        async def task() -> None:
            assert current_group() is group
            seen.append("begun")
            await anyio.sleep(0.001)
            seen.append("done")

        async with TransportGroup() as group:
            await called_from(group, place, lambda: group.start_soon(task))
        assert seen == ["begun", "done"]

    run(main)


def test_backend_hint_is_set_only_during_callbacks(run: Run) -> None:
    """All other code in this thread, before, after and in between, sees its own library."""
    sniffio = pytest.importorskip("sniffio")
    seen: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def look() -> None:
            seen.append(sniffio.thread_local.name)
            if len(seen) < 20:
                loop.call_soon(look)

        async with TransportGroup() as group:
            contexts = collect_contexts(group)
            look()
            for place in PLACES:
                await called_from(group, place, lambda: 1 / 0)
            await until(lambda: len(seen) == 20)
            assert len(contexts) == len(PLACES)
        assert sniffio.thread_local.name is None

    run(main)
    assert set(seen) == {None}


@pytest.mark.differs(
    "`serve_forever` is cancelled",
    asyncio="until 3.14 leaves the clients alone; since then closes them and waits until the last has left",
    here="closes the clients and returns at once; the group waits for them, or ends them",
    why="a cancellation must not wait for clients",
)
def test_a_cancelled_serve_forever_does_not_wait_for_its_clients(run: Run) -> None:
    """asyncio waits until the last client has read everything. Here the group owns the clients and can end them."""

    async def main() -> None:
        made: list[Recorder] = []

        def factory() -> Recorder:
            made.append(echo())
            return made[-1]

        async with TransportGroup() as group:
            server = await group.create_server(factory, HOST, 0)
            with Peer.connect(server.sockets[0].getsockname()) as peer:
                assert await answers(peer)
                fill(made[0].transport, len(MUCH))
                forever = asyncio.create_task(server.serve_forever())
                await until(server.is_serving)
                await turns()
                forever.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await forever
                assert not server.is_serving()
                (protocol,) = made
                assert protocol.transport.is_closing()
                await settle(group)
                assert not protocol.lost
                protocol.transport.abort()
        assert [protocol.exception for protocol in made] == [None]

    run(main)


def test_an_asyncio_time_out_ends_a_group(run: Run) -> None:
    """The time-out comes in the block, or during the flush that a peer holds up by not reading."""

    async def main() -> None:
        for leaving in (False, True):

            async def serve(peers: AsyncExitStack, protocol: Recorder, leaving: bool = leaving) -> None:
                async with TransportGroup() as group:
                    transport, _, _ = await peers.enter_async_context(connected(group, protocol, small=True))
                    transport.write(MUCH)
                    if not leaving:
                        await anyio.sleep(GUARD)

            for seconds in (0.02, 0.5, 10):  # It takes a busy machine longer to connect.
                protocol = Recorder()
                async with AsyncExitStack() as peers:
                    with pytest.raises(asyncio.TimeoutError):
                        await asyncio.wait_for(serve(peers, protocol), seconds)
                if protocol.count("connection_made"):
                    break
            assert protocol.exception is None

    run(main)


@needs_selector
def test_a_group_on_trio_as_a_guest_of_asyncio(request: pytest.FixtureRequest) -> None:
    """Both run in one thread, and each of the two groups has to know which is its own."""
    skip_unless_chosen(request, "trio")
    trio = pytest.importorskip("trio")
    kinds: list[type] = []

    async def serve(peers: list[bytes]) -> None:
        async with TransportGroup() as group:
            kinds.append(type(group._core.driver))
            contexts = collect_contexts(group)
            async with connected(group, echo()) as (_, _, peer):
                for place in PLACES:
                    await called_from(group, place, lambda: 1 / 0)
                    started = anyio.Event()

                    async def task(started: anyio.Event = started) -> None:
                        await anyio.lowlevel.checkpoint()
                        started.set()

                    await called_from(group, place, lambda task=task: group.start_soon(task))
                    await started.wait()
                    assert await answers(peer)
            assert [type(context["exception"]) for context in contexts] == [ZeroDivisionError] * len(PLACES)
            peers.append(b"done")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop._core = object()  # type: ignore[attr-defined]  # Our own event loop has an attribute of this name.
        over: asyncio.Future[Any] = loop.create_future()
        done: list[bytes] = []
        trio.lowlevel.start_guest_run(
            serve, done, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=over.set_result
        )
        await serve(done)
        (await over).unwrap()
        assert done == [b"done"] * 2
        assert {kind.__name__ for kind in kinds} == {"LoopDriver", "TrioDriver"}

    asyncio.run(asyncio.wait_for(main(), GUARD))
