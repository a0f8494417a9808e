"""Generated scripts: hypothesis makes them, and shrinks the first that shows a difference from asyncio.

The operations are those of `differential.py`, step by step on asyncio's own transports and on ours side by side.
The conditions of each rule leave out the known differences (docs/differences.md).

`TRANSPORTS_ANYIO_FUZZ`, a number, is how many scripts are tried on each backend; `nox -s fuzz` sets it.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

import anyio.from_thread
import pytest
from differential import CARRIERS, HUGE, Step, World
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from support import ORACLE, Stack

from transports_anyio.testing import BufferedRecorder

FUZZ = os.environ.get("TRANSPORTS_ANYIO_FUZZ")

#: With another buffer size, flow control acts at other moments.
CARRIED_BY = [
    name
    for name, carrier in CARRIERS.items()
    if name != "memory_in_small_pieces" and CARRIERS[carrier.oracle or name].available
]
#: Seconds to wait: shorter than elsewhere, because every shrinking of a script that hangs waits that long.
PATIENCE = 5

ENDS = st.sampled_from("ab")
CALLBACKS = st.sampled_from(["connection_made", "received", "eof_received", "connection_lost", "pause_writing"])
#: The operations of an end in a callback. No exceptions: we end the connection after each, asyncio after some.
REACTIONS = st.sampled_from(
    [
        ("self", "write", 700),
        ("self", "close"),
        ("self", "end"),
        ("self", "pause_reading"),
        ("self", "is_closing"),
        ("self", "get_write_buffer_limits"),
        ("self", "set_write_buffer_limits", 5000),
    ]
)
#: An exception in these ends the connection on both.
FATAL_CALLBACKS = st.sampled_from(["received", "eof_received"])


class TwoWorlds(RuleBasedStateMachine):
    """The same script on asyncio's own transports and on ours."""

    backend: tuple[str, dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[tuple[anyio.from_thread.BlockingPortal, World]] = []
        #: The ends from which something waited after a step.
        self.waited: set[str] = set()
        self.exits = ExitStack()

    @initialize(
        carrier=st.sampled_from(CARRIED_BY),
        kinds=st.tuples(*[st.sampled_from(["plain", "buffered"])] * 2),
        reactions=st.dictionaries(st.tuples(ENDS, CALLBACKS, st.integers(1, 2)), st.tuples(REACTIONS), max_size=2),
        fatal=st.dictionaries(
            st.tuples(ENDS, FATAL_CALLBACKS, st.integers(1, 2)), st.just((("self", "raise"),)), max_size=1
        ),
    )
    def connect(self, carrier: str, kinds: tuple[str, str], reactions: Any, fatal: Any) -> None:
        ours = CARRIERS[carrier]
        if ours.one_way:
            kinds = ("plain", "plain")  # asyncio's pipes have no buffered protocols, and survive what callbacks raise.
            fatal = {}
        reactions = {key: steps for key, steps in (fatal | reactions).items() if self.is_common(carrier, key, steps[0])}
        if ours.has_shutdown:
            # See `pause_reading`.
            reactions = {
                (end, callback, count): steps
                for (end, callback, count), steps in reactions.items()
                if steps[0][1] != "pause_reading" or self.received_by(end, reactions) == 1
            }
            kinds = tuple(  # type: ignore[assignment]
                "plain" if self.received_by(end, reactions) else kind for end, kind in zip("ab", kinds, strict=True)
            )
        for backend, stack, where in (
            (("asyncio", {}), Stack(ORACLE), CARRIERS[ours.oracle or carrier]),
            (self.backend, Stack("ours"), ours),
        ):
            portal = self.exits.enter_context(anyio.from_thread.start_blocking_portal(*backend))
            world = World(where, reactions, PATIENCE)
            self.exits.enter_context(portal.wrap_async_context_manager(world.open(stack, kinds)))
            self.worlds.append((portal, world))
        self.compare()

    @staticmethod
    def received_by(end: str, reactions: Any) -> int:
        """Return the number of reactions to `data_received` of an end."""
        return sum(key[:2] == (end, "received") for key in reactions)

    @staticmethod
    def is_common(carrier: str, key: tuple[str, str, int], step: Step) -> bool:
        """Return whether the reaction is possible over the carrier, and equal on both."""
        end, callback, _ = key
        operation = step[1]
        if callback == "connection_made" and operation in ("close", "end"):
            return False  # The two ends are made at once: a race.
        if callback == "connection_lost" and operation == "write" and not CARRIERS[carrier].one_way:
            return False  # After a `close` that flushed asyncio sends it.
        if carrier == "tls" and (callback != "received" or "limits" in operation or operation == "close"):
            return False  # asyncio's TLS has other limits, and while it closes it reads, and takes data for an error.
        if CARRIERS[carrier].one_way and callback == "connection_lost" and operation == "end":
            return False  # `abort` is then an error.
        if not CARRIERS[carrier].writes(end) and operation not in ("close", "end", "pause_reading", "raise"):
            return False
        return not (operation == "pause_reading" and (callback == "eof_received" or not CARRIERS[carrier].reads(end)))

    @property
    def carrier(self) -> Any:
        return self.worlds[1][1].carrier

    @property
    def has_shutdown(self) -> bool:
        """Whether there is TLS, from the beginning or by now."""
        return self.worlds[1][1].has_shutdown

    def end(self, name: str) -> Any:
        """Return the end of our connection, for the conditions of the script."""
        return self.worlds[1][1].ends[name]

    def step(self, *step: Any) -> None:
        for portal, world in self.worlds:
            portal.call(world.step, step)
        self.waited |= {end for end in "ab" if self.worlds[1][1].recording[-1][end].get("buffered")}
        self.compare()

    def compare(self) -> None:
        theirs, ours = (world.recording[-1] for _, world in self.worlds)
        assert ours == theirs

    def writes(self, end: str) -> bool:
        if self.has_shutdown and self.end(end).other.lost:
            return False  # asyncio's TLS, while reading is paused, differs from asyncio over TCP.
        this = self.end(end)
        if this.lost and (self.carrier.one_way or end in self.waited or "pause_writing" in this.counts):
            return False  # asyncio's pipes warn later; and after a `close` that flushed, its `write` raises.
        return bool(self.carrier.writes(end))

    def pieces_do_not_matter(self, end: str) -> bool:
        """Whether the receiver does nothing in `data_received`, which comes anywhere in what is in pieces."""
        return not self.reacts_to_data(self.end(end).other)

    @staticmethod
    def reacts_to_data(script: Any) -> bool:
        return any(callback == "received" for callback, _ in script.reactions)

    @rule(end=ENDS, size=st.sampled_from([0, 1, 1000]))
    def write(self, end: str, size: int) -> None:
        if self.writes(end):
            self.step(end, "write", size)

    @precondition(lambda self: not self.has_shutdown)  # asyncio's TLS has other watermarks.
    @rule(end=ENDS)
    def fill(self, end: str) -> None:
        if self.writes(end) and self.pieces_do_not_matter(end):
            self.step(end, "write", HUGE)

    @rule(end=ENDS, sizes=st.lists(st.sampled_from([1, 500]), max_size=3))
    def writelines(self, end: str, sizes: list[int]) -> None:
        # asyncio's `writelines` does not pause, raises after a close, and keeps an empty chunk in its buffer.
        transport = self.end(end).transport
        if self.writes(end) and not transport.is_closing() and not transport.get_write_buffer_size():
            self.step(end, "writelines", *sizes)

    @rule(end=ENDS)
    def pause_reading(self, end: str) -> None:
        this = self.end(end)
        if self.has_shutdown and (self.reacts_to_data(this) or isinstance(this.recorders[-1], BufferedRecorder)):
            # asyncio's TLS cuts buffered data differently, ends later after an exception, and loses the bytes that do
            # not fit into a protocol's buffer.
            return
        if self.carrier.reads(end):
            self.step(end, "pause_reading")

    @rule(end=ENDS)
    def resume_reading(self, end: str) -> None:
        # asyncio brings `eof_received` again.
        if self.carrier.reads(end) and not self.end(end).eof_seen:
            self.step(end, "resume_reading")

    @rule(end=ENDS)
    def close(self, end: str) -> None:
        this, other = self.end(end), self.end(end).other
        if self.has_shutdown and (this.received < other.accepted or (other.lost and not this.transport.is_reading())):
            # asyncio's TLS treats data in flight as an error, and does not notice while paused that the peer has gone.
            return
        if self.has_shutdown and not other.lost and not other.transport.is_reading():
            return  # asyncio's TLS says that it is reading as long as it closes.
        self.step(end, "close")

    @rule(end=ENDS)
    def end_it(self, end: str) -> None:
        if self.has_shutdown and self.end(end).received < self.end(end).other.accepted:
            return  # Whether that is a reset depends on how much ciphertext was read ahead.
        if not self.end(end).lost:
            self.step(end, "end")

    @precondition(lambda self: self.carrier.name == "tcp")
    @rule(end=ENDS)
    def reset(self, end: str) -> None:
        other = self.end(end).other
        if self.has_shutdown and not other.lost and not other.transport.is_reading():
            return  # asyncio's TLS reports it at once, ours when it reads.
        if not self.end(end).lost:
            self.step(end, "reset")

    @rule(end=ENDS)
    def write_eof(self, end: str) -> None:
        this = self.end(end)
        if this.other.aborted or this.wrote_after_loss_of_other:
            return  # asyncio's raises what the system says of a connection that was reset.
        if self.writes(end) and not this.transport.is_closing():
            self.step(end, "write_eof")

    @rule(end=ENDS, answer=st.booleans())
    def keep_open(self, end: str, answer: bool) -> None:
        if answer and self.has_shutdown:
            return  # asyncio's TLS warns even an end that has closed by itself.
        self.step(end, "keep_open", answer)

    @rule(end=ENDS, high=st.sampled_from([None, 0, 1000, 100_000]))
    def set_write_buffer_limits(self, end: str, high: int | None) -> None:
        if self.writes(end) and not self.has_shutdown:
            self.step(end, "set_write_buffer_limits", high)

    @precondition(lambda self: not self.carrier.one_way and not self.has_shutdown)
    @rule()
    def start_tls(self) -> None:
        for script in (self.end("a"), self.end("b")):
            if script.reactions or script.keep_open:
                return  # Over TLS some are not the same: see `is_common` and `keep_open`.
            if script.transport.is_closing() or script.eof_sent or script.eof_seen:
                return  # An error, or a handshake without end.
            if not script.transport.is_reading() or script.transport.get_write_buffer_size():
                return
        self.step("both", "start_tls")

    @rule(end=ENDS, kind=st.sampled_from(["plain", "buffered"]))
    def set_protocol(self, end: str, kind: str) -> None:
        this = self.end(end)
        if self.carrier.one_way or this.lost:
            return
        if self.has_shutdown and kind == "buffered" and (self.reacts_to_data(this) or not this.transport.is_reading()):
            return  # See `pause_reading`.
        self.step(end, "set_protocol", kind)

    def teardown(self) -> None:
        with self.exits:
            if len(self.worlds) == 2 and self.has_shutdown:
                for end in "ab":
                    self.resume_reading(end=end)
        if len(self.worlds) == 2:
            theirs, ours = (world.recording for _, world in self.worlds)
            assert ours == theirs


@pytest.mark.skipif(sys.version_info < (3, 13), reason="asyncio of an older Python is no oracle")
# Hypothesis says so of its own generator, which Python 3.14 does not let it see in the thread's variables.
@pytest.mark.filterwarnings("ignore:It looks like `register_random`")
def test_generated_scripts_show_no_difference(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    run_state_machine_as_test(
        type("Machine", (TwoWorlds,), {"backend": anyio_backend}),
        settings=settings(
            max_examples=int(FUZZ or 40),
            stateful_step_count=12,
            deadline=None,
            derandomize=FUZZ is None,  # In the ordinary test run the scripts are the same every time.
            database=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
