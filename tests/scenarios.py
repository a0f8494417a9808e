"""The scenarios of `test_differential.py`: scripts for both ends of a connection, as data. See `differential.py`."""

from __future__ import annotations

import array
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from differential import CARRIERS, EVERYWHERE, HUGE, TWO_WAY, Scenario, Step

#: Carriers on which one direction can be closed alone.
HALF_CLOSING = tuple(name for name in TWO_WAY if name != "tls")
#: Carriers on which a reset differs from an end of file.
RESETTING = ("tcp",)

A_WRITES: Step = ("a", "write", 1000)
B_WRITES: Step = ("b", "write", 1000)
A_FILLS: Step = ("a", "write", HUGE)
A_CLOSES: Step = ("a", "close")
B_CLOSES: Step = ("b", "close")
B_PAUSES: Step = ("b", "pause_reading")
UPGRADE: Step = ("both", "start_tls")
B_RESUMES: Step = ("b", "resume_reading")


def over(carriers: Sequence[str], name: str, steps: list[Step], **options: Any) -> Scenario:
    # With small pieces a reaction to the first piece of a message comes at another place in the stream.
    if any(callback in ("received", "get_buffer") for _, callback, _ in options.get("reactions", {})):
        carriers = [carrier for carrier in carriers if carrier != "memory_in_small_pieces"]
    return Scenario(name, steps, carriers=carriers, **options)


def both_ways(name: str, steps: list[Step], **options: Any) -> Scenario:
    return over(TWO_WAY, name, steps, **options)


def everywhere(name: str, steps: list[Step], **options: Any) -> Scenario:
    return over(EVERYWHERE, name, steps, **options)


def half_closing(name: str, steps: list[Step], **options: Any) -> Scenario:
    return over(HALF_CLOSING, name, steps, **options)


SCENARIOS = [
    # -- BaseTransport ------------------------------------------------------------------------------------------
    everywhere("close", [A_CLOSES]),
    everywhere("close_twice", [A_CLOSES, A_CLOSES, ("a", "abort")]),
    both_ways("close_by_the_other_end", [B_CLOSES]),
    everywhere("close_flushes", [A_FILLS, A_CLOSES]),
    everywhere("close_flushes_to_a_slow_reader", [B_PAUSES, A_FILLS, A_CLOSES, B_RESUMES]),
    everywhere("close_receives_no_more", [A_WRITES, B_CLOSES, A_WRITES]),
    both_ways(
        "close_with_data_under_way",
        [B_PAUSES, A_WRITES, B_CLOSES],
    ),
    everywhere("close_is_told_later", [A_CLOSES], reactions={("a", "connection_lost", 1): [("self", "is_closing")]}),
    everywhere("write_after_a_close_that_flushed", [B_PAUSES, A_FILLS, A_CLOSES, B_RESUMES, A_WRITES]),
    everywhere("use_after_close", [A_CLOSES, A_WRITES, ("a", "close"), ("a", "abort"), ("a", "is_closing")]),
    both_ways("use_for_reading_after_close", [B_CLOSES, B_PAUSES, B_RESUMES, ("b", "is_reading")]),
    everywhere("extra_info", [("a", "has", "nothing of the kind"), ("a", "default", "nothing of the kind")]),
    Scenario(
        "extra_info_of_sockets",
        [
            *[("a", "has", name) for name in ("peername", "socket", "sockname")],
            A_CLOSES,
            *[("a", "has", name) for name in ("peername", "socket", "sockname")],
        ],
        carriers=("tcp", "tls"),
    ),
    Scenario(
        "extra_info_of_tls",
        [("a", "has", name) for name in ("compression", "cipher", "peercert", "sslcontext", "ssl_object")],
        carriers=("tls",),
    ),
    Scenario("extra_info_of_pipes", [("a", "has", "pipe"), ("b", "has", "pipe")], carriers=("pipe",)),
    everywhere("set_protocol", [("b", "set_protocol", "plain"), A_WRITES, ("b", "protocol_number"), A_CLOSES]),
    everywhere("set_protocol_while_writing_is_paused", [B_PAUSES, A_FILLS, ("a", "set_protocol", "plain"), B_RESUMES]),
    everywhere(
        "set_protocol_to_a_buffered_one",
        [A_WRITES, ("b", "set_protocol", "buffered"), A_WRITES, ("b", "set_protocol", "plain"), A_WRITES, A_CLOSES],
    ),
    both_ways(
        "set_protocol_in_a_callback",
        [A_WRITES, A_WRITES, B_WRITES, A_CLOSES],
        reactions={("b", "received", 1): [("self", "set_protocol", "buffered")]},
    ),
    both_ways(
        "set_protocol_in_connection_made",
        [A_WRITES, A_CLOSES],
        reactions={("b", "connection_made", 1): [("self", "set_protocol", "plain")]},
    ),
    # -- ReadTransport ------------------------------------------------------------------------------------------
    everywhere("receive", [A_WRITES, ("a", "write", 1), ("a", "write", HUGE)]),
    both_ways("receive_both_ways", [A_WRITES, B_WRITES, ("b", "write", HUGE), ("a", "write", HUGE)]),
    everywhere("pause_reading", [B_PAUSES, A_WRITES, ("b", "is_reading"), B_RESUMES, ("b", "is_reading")]),
    everywhere("pause_reading_is_idempotent", [B_PAUSES, B_PAUSES, A_WRITES, B_RESUMES, B_RESUMES, A_WRITES]),
    everywhere("pause_reading_holds_the_end_back", [B_PAUSES, A_WRITES, A_CLOSES, B_RESUMES]),
    both_ways("close_while_paused_and_the_other_end_is_gone", [B_PAUSES, ("a", "abort"), B_CLOSES]),
    both_ways("pause_reading_and_close", [B_PAUSES, B_CLOSES, B_RESUMES]),
    everywhere(
        "pause_reading_in_connection_made",
        [A_WRITES, B_RESUMES],
        reactions={("b", "connection_made", 1): [("self", "pause_reading")]},
    ),
    everywhere(
        "pause_reading_in_data_received",
        [A_WRITES, A_WRITES, B_RESUMES, A_WRITES],
        reactions={("b", "received", 1): [("self", "pause_reading")]},
        kinds=("plain", "plain"),
    ),
    both_ways(
        "pause_and_resume_in_data_received",
        [A_WRITES, A_WRITES],
        reactions={("b", "received", 1): [("self", "pause_reading"), ("self", "resume_reading")]},
    ),
    half_closing(
        "resume_reading_after_the_end",
        [("b", "keep_open", True), ("a", "write_eof"), B_PAUSES, B_RESUMES, B_WRITES, B_CLOSES],
    ),
    # -- WriteTransport -----------------------------------------------------------------------------------------
    everywhere("abort", [("a", "abort")]),
    both_ways("abort_by_the_other_end", [("b", "abort")]),
    everywhere("abort_twice", [("a", "abort"), ("a", "abort"), A_CLOSES]),
    everywhere("abort_loses_what_is_buffered", [B_PAUSES, A_FILLS, ("a", "abort"), B_RESUMES]),
    everywhere("abort_ends_a_close", [B_PAUSES, A_FILLS, A_CLOSES, ("a", "abort"), B_RESUMES]),
    everywhere("can_write_eof", [("a", "can_write_eof")]),
    half_closing("write_eof", [A_WRITES, ("a", "write_eof"), B_WRITES, B_CLOSES], reactions={}),
    half_closing(
        "write_eof_keeps_receiving",
        [("b", "keep_open", True), A_WRITES, ("a", "write_eof"), B_WRITES, B_WRITES, B_CLOSES],
    ),
    half_closing(
        "write_eof_flushes",
        [("b", "keep_open", True), B_PAUSES, A_FILLS, ("a", "write_eof"), B_RESUMES, B_WRITES, B_CLOSES],
    ),
    half_closing("write_eof_twice", [("b", "keep_open", True), ("a", "write_eof"), ("a", "write_eof"), A_CLOSES]),
    half_closing(
        "write_after_write_eof", [("b", "keep_open", True), ("a", "write_eof"), A_WRITES, ("a", "writelines", 1)]
    ),
    half_closing("write_eof_on_a_closed_transport", [A_CLOSES, ("a", "write_eof"), A_WRITES]),
    half_closing(
        "write_eof_then_close_flushes",
        [("b", "keep_open", True), B_PAUSES, A_FILLS, ("a", "write_eof"), A_CLOSES, B_RESUMES],
    ),
    half_closing(
        "both_ends_write_eof",
        [("a", "keep_open", True), ("b", "keep_open", True), ("a", "write_eof"), ("b", "write_eof"), A_CLOSES],
    ),
    Scenario("write_eof_over_tls", [("a", "write_eof"), A_WRITES, A_CLOSES], carriers=("tls",)),
    Scenario("write_eof_on_a_pipe", [A_WRITES, ("a", "write_eof")], carriers=("pipe",)),
    everywhere(
        "limits",
        [
            ("a", "get_write_buffer_limits"),
            ("a", "set_write_buffer_limits", 1000),
            ("a", "set_write_buffer_limits", None, 1000),
            ("a", "set_write_buffer_limits", 0),
            ("a", "set_write_buffer_limits", 1000, 1000),
            ("a", "set_write_buffer_limits", 1000, 1001),
            ("a", "set_write_buffer_limits", -1),
            ("a", "set_write_buffer_limits", 10, -1),
            ("a", "set_write_buffer_limits"),
        ],
    ),
    everywhere("pause_writing", [B_PAUSES, A_FILLS, ("a", "get_write_buffer_size_is_positive"), B_RESUMES]),
    everywhere(
        "pause_writing_with_limits_of_zero",
        [("a", "set_write_buffer_limits", 0), B_PAUSES, A_FILLS, B_RESUMES, A_WRITES],
    ),
    everywhere(
        "pause_writing_happens_once", [B_PAUSES, A_FILLS, A_WRITES, A_WRITES, B_RESUMES, B_PAUSES, A_FILLS, B_RESUMES]
    ),
    everywhere(
        "pause_writing_inside_write",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "pause_writing", 1): [("self", "is_closing")]},
    ),
    everywhere("no_pause_below_the_limit", [("a", "set_write_buffer_limits", 64 * HUGE), B_PAUSES, A_FILLS, B_RESUMES]),
    everywhere(
        "lowering_the_limits_pauses",
        [
            ("a", "set_write_buffer_limits", 64 * HUGE),
            B_PAUSES,
            A_FILLS,
            ("a", "set_write_buffer_limits", 1000),
            B_RESUMES,
        ],
    ),
    everywhere("limits_after_an_abort", [B_PAUSES, A_FILLS, ("a", "abort"), ("a", "set_write_buffer_limits", 100_000)]),
    everywhere("no_resume_writing_on_abort", [B_PAUSES, A_FILLS, ("a", "abort")]),
    everywhere(
        "writing_in_resume_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "resume_writing", 1): [("self", "write", 1000)]},
    ),
    everywhere(
        "writing_in_pause_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "pause_writing", 1): [("self", "write", 700)]},
    ),
    everywhere(
        "filling_again_in_resume_writing",
        [B_PAUSES, A_FILLS, B_RESUMES, A_CLOSES],
        reactions={("a", "resume_writing", 1): [("self", "write", HUGE)]},
    ),
    everywhere("write_nothing", [("a", "write", 0), ("a", "writelines"), ("a", "writelines", 0, 0), A_WRITES]),
    everywhere("write_of_every_type", [("a", "write", 1000, bytearray), ("a", "write", 1000, memoryview)]),
    everywhere(
        "write_of_no_type",
        [
            ("a", "write_anything", "text"),
            ("a", "write_anything", None),
            ("a", "write_anything", 5),
            ("a", "write_anything", [b"x"]),
            ("a", "write_anything", array.array("b", b"x")),
            A_WRITES,
        ],
    ),
    everywhere(
        "writelines",
        [
            ("a", "writelines", 1, 2, 3),
            ("a", "writelines", 0, 5, 0),
            ("a", "writelines", *[100] * 100),
            ("a", "writelines", *[50, 0, 99] * 400),
        ],
    ),
    everywhere("writelines_pauses", [B_PAUSES, ("a", "writelines", HUGE // 2, HUGE // 2), B_RESUMES]),
    everywhere(
        "writelines_of_no_type",
        [
            ("a", "writelines_anything", ["text"]),
            ("a", "writelines_anything", None),
            ("a", "writelines_anything", [None]),
            A_WRITES,
        ],
    ),
    everywhere("writelines_after_close", [A_CLOSES, ("a", "writelines", 1, 2)]),
    everywhere(
        "a_buffer_that_changes_after_write",
        [B_PAUSES, ("a", "write_then_change", 100), A_FILLS, ("a", "write_then_change", 100), B_RESUMES],
    ),
    everywhere("many_writes_keep_their_order", [("a", "write", size) for size in (1, 10, 100, 1000, 10_000)]),
    everywhere("writing_to_a_lost_connection_warns", [("a", "abort"), *[A_WRITES] * 7]),
    # -- BaseProtocol -------------------------------------------------------------------------------------------
    both_ways(
        "writing_in_connection_made", [A_CLOSES], reactions={("a", "connection_made", 1): [("self", "write", 1000)]}
    ),
    both_ways(
        "closing_in_connection_made",
        [],
        reactions={("b", "connection_made", 1): [("self", "write", 1000), ("self", "close")]},
    ),
    both_ways("aborting_in_connection_made", [], reactions={("b", "connection_made", 1): [("self", "abort")]}),
    both_ways("raising_in_connection_made", [], reactions={("b", "connection_made", 1): [("self", "raise")]}),
    everywhere("raising_in_connection_lost", [A_CLOSES], reactions={("a", "connection_lost", 1): [("self", "raise")]}),
    both_ways(
        "closing_in_connection_lost",
        [A_CLOSES],
        reactions={("a", "connection_lost", 1): [("self", "close"), ("self", "abort")]},
    ),
    both_ways(
        "writing_in_connection_lost", [A_CLOSES], reactions={("a", "connection_lost", 1): [("self", "write", 1000)]}
    ),
    everywhere(
        "writing_in_connection_lost_after_a_close_that_flushed",
        [B_PAUSES, A_FILLS, A_CLOSES, B_RESUMES],
        reactions={("a", "connection_lost", 1): [("self", "write", 700)]},
    ),
    everywhere(
        "raising_in_pause_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "pause_writing", 1): [("self", "raise")]},
    ),
    everywhere(
        "raising_in_resume_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "resume_writing", 1): [("self", "raise")]},
    ),
    everywhere(
        "closing_in_pause_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "pause_writing", 1): [("self", "close")]},
    ),
    everywhere(
        "closing_in_resume_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "resume_writing", 1): [("self", "close")]},
    ),
    everywhere(
        "aborting_in_pause_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "pause_writing", 1): [("self", "abort")]},
    ),
    everywhere(
        "aborting_in_resume_writing",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "resume_writing", 1): [("self", "abort")]},
    ),
    # -- streaming protocols ------------------------------------------------------------------------------------
    both_ways("echo", [A_WRITES, A_CLOSES], reactions={("b", "received", 1): [("self", "write", 500)]}),
    everywhere("closing_in_data_received", [A_WRITES], reactions={("b", "received", 1): [("self", "close")]}),
    both_ways(
        "closing_with_an_answer_in_data_received",
        [A_WRITES],
        reactions={("b", "received", 1): [("self", "write", HUGE), ("self", "close")]},
    ),
    everywhere("aborting_in_data_received", [A_WRITES], reactions={("b", "received", 1): [("self", "abort")]}),
    everywhere("raising_in_data_received", [A_WRITES], reactions={("b", "received", 1): [("self", "raise")]}),
    half_closing(
        "raising_in_data_received_and_an_abort_of_the_other_end",
        [B_PAUSES, A_FILLS, B_RESUMES],
        reactions={("a", "pause_writing", 1): [("self", "abort")], ("b", "received", 1): [("self", "raise")]},
    ),
    both_ways(
        "raising_in_data_received_with_the_end_behind_it",
        [B_PAUSES, ("a", "write", 1), ("a", "abort"), B_RESUMES],
        reactions={("b", "received", 1): [("self", "raise")]},
    ),
    both_ways(
        "raising_in_data_received_drops_the_buffer",
        [("a", "pause_reading"), A_WRITES, ("a", "resume_reading")],
        reactions={("b", "received", 1): [("self", "write", HUGE), ("self", "raise")]},
    ),
    both_ways(
        "ending_the_other_end_in_data_received", [A_WRITES], reactions={("b", "received", 1): [("other", "close")]}
    ),
    half_closing("eof_received_answers_nothing", [("a", "write_eof")]),
    half_closing(
        "eof_received_answers_something_true", [("b", "keep_open", 5), ("a", "write_eof"), B_WRITES, B_CLOSES]
    ),
    half_closing("eof_received_answers_something_false", [("b", "keep_open", 0), ("a", "write_eof")]),
    half_closing(
        "eof_received_flushes",
        [("a", "pause_reading"), ("b", "write", HUGE), ("a", "write_eof"), ("a", "resume_reading")],
    ),
    half_closing(
        "writing_in_eof_received",
        [A_WRITES, ("a", "write_eof")],
        reactions={("b", "eof_received", 1): [("self", "write", 1000)]},
    ),
    half_closing(
        "raising_in_eof_received", [("a", "write_eof")], reactions={("b", "eof_received", 1): [("self", "raise")]}
    ),
    half_closing(
        "closing_in_eof_received",
        [("b", "keep_open", True), ("a", "write_eof")],
        reactions={("b", "eof_received", 1): [("self", "close")]},
    ),
    half_closing(
        "aborting_in_eof_received",
        [("b", "keep_open", True), ("a", "write_eof")],
        reactions={("b", "eof_received", 1): [("self", "abort")]},
    ),
    half_closing(
        "pausing_in_eof_received",
        [("b", "keep_open", True), ("a", "write_eof"), B_RESUMES, B_CLOSES],
        reactions={("b", "eof_received", 1): [("self", "pause_reading")]},
    ),
    Scenario(
        "eof_received_over_tls_closes_whatever_it_answers", [("b", "keep_open", True), A_CLOSES], carriers=("tls",)
    ),
    Scenario(
        "eof_received_on_a_pipe_closes_whatever_it_answers", [("b", "keep_open", True), A_CLOSES], carriers=("pipe",)
    ),
    half_closing(
        "the_other_end_goes_while_half_closed",
        [("b", "keep_open", True), ("a", "write_eof"), A_CLOSES, B_WRITES, B_WRITES],
    ),
    both_ways(
        "writing_to_an_end_that_closes", [("a", "pause_reading"), B_CLOSES, A_WRITES, A_WRITES, ("a", "resume_reading")]
    ),
    everywhere("the_other_end_goes_while_something_waits", [B_PAUSES, A_FILLS, ("b", "abort")]),
    # -- buffered protocols -------------------------------------------------------------------------------------
    *[
        Scenario(
            f"buffered_{scenario.name}",
            scenario.steps,
            scenario.reactions,
            scenario.carriers,
            kinds=("plain", "buffered"),
        )
        for scenario in [
            everywhere("receive", [A_WRITES, ("a", "write", 1), ("a", "write", HUGE), A_CLOSES]),
            everywhere("pause_reading", [B_PAUSES, A_WRITES, B_RESUMES, A_WRITES, A_CLOSES]),
            half_closing(
                "eof_received_answers_something_true",
                [("b", "keep_open", True), ("a", "write_eof"), B_WRITES, B_CLOSES],
            ),
            everywhere("closing_in_get_buffer", [A_WRITES], reactions={("b", "get_buffer", 1): [("self", "close")]}),
            everywhere("aborting_in_get_buffer", [A_WRITES], reactions={("b", "get_buffer", 1): [("self", "abort")]}),
            everywhere("raising_in_get_buffer", [A_WRITES], reactions={("b", "get_buffer", 1): [("self", "raise")]}),
            everywhere("raising_in_buffer_updated", [A_WRITES], reactions={("b", "received", 1): [("self", "raise")]}),
            both_ways(
                "raising_in_buffer_updated_with_more_behind_it",
                [("a", "write", 1001)],
                reactions={("b", "received", 1): [("self", "raise")]},
            ),
            both_ways(
                "the_end_behind_more_than_the_buffer", [B_PAUSES, ("a", "write", 3001), ("a", "abort"), B_RESUMES]
            ),
            everywhere("closing_in_buffer_updated", [A_WRITES], reactions={("b", "received", 1): [("self", "close")]}),
            everywhere("an_empty_buffer", [("b", "use_buffer", bytearray()), A_WRITES]),
            everywhere("something_that_is_no_buffer", [("b", "use_buffer", 5), A_WRITES]),
            everywhere(
                "set_protocol_in_a_callback",
                [A_WRITES, A_WRITES],
                reactions={("b", "received", 1): [("self", "set_protocol", "plain")]},
            ),
        ]
    ],
    # -- resets -------------------------------------------------------------------------------------------------
    Scenario("a_reset", [("a", "reset")], carriers=RESETTING),
    Scenario("a_reset_behind_data", [A_WRITES, B_PAUSES, A_WRITES, ("a", "reset"), B_RESUMES], carriers=RESETTING),
    Scenario(
        "a_reset_while_something_waits",
        [("a", "pause_reading"), ("b", "write", HUGE), ("a", "reset")],
        carriers=RESETTING,
    ),
    Scenario("a_reset_of_an_end_that_is_paused", [B_PAUSES, ("a", "reset")], carriers=("tcp", "tls")),
    Scenario("write_eof_after_a_reset", [B_PAUSES, ("a", "reset"), ("b", "write_eof")], carriers=RESETTING),
    Scenario("a_reset_while_paused", [B_PAUSES, ("a", "reset"), B_WRITES, B_WRITES], carriers=RESETTING),
    Scenario(
        "a_reset_while_half_closed",
        [("b", "keep_open", True), ("a", "write_eof"), ("a", "reset"), B_WRITES, B_WRITES],
        carriers=RESETTING,
    ),
]


def upgrading(name: str, steps: list[Step], **options: Any) -> Scenario:
    return over(HALF_CLOSING, name, steps, **options)


SCENARIOS += [
    # -- start_tls --------------------------------------------------------------------------------------
    upgrading("start_tls", [UPGRADE, A_WRITES, B_WRITES, A_CLOSES]),
    upgrading("start_tls_behind_data", [A_WRITES, B_WRITES, UPGRADE, B_WRITES, A_WRITES, B_CLOSES]),
    upgrading("start_tls_and_abort", [UPGRADE, A_WRITES, ("a", "abort")]),
    upgrading("start_tls_and_set_protocol", [UPGRADE, ("b", "set_protocol", "plain"), A_WRITES, A_CLOSES]),
    upgrading("start_tls_and_keep_open", [UPGRADE, ("b", "keep_open", True), A_CLOSES]),
    upgrading("start_tls_and_raise", [UPGRADE, A_WRITES], reactions={("b", "received", 1): [("self", "raise")]}),
    upgrading("start_tls_with_a_buffered_protocol", [UPGRADE, A_WRITES, A_CLOSES], kinds=("plain", "buffered")),
]


# -- where asyncio is not the oracle --------------------------------------------------------------------------

SOCKETS = ("tcp", "unix", "memory", "memory_in_small_pieces")

#: Where ours follows one rule over every carrier and asyncio does not, so that asyncio over TCP is the oracle. Its TLS
#: counts neither what waits in the transport below, nor, with a limit of zero, the way its plain transports do (T12).
TLS_AS_TCP = {
    "a_reset_of_an_end_that_is_paused",
    "abort_ends_a_close",
    "abort_loses_what_is_buffered",
    "aborting_in_pause_writing",
    "buffered_the_end_behind_more_than_the_buffer",
    "limits_after_an_abort",
    "no_resume_writing_on_abort",
    "pause_reading_in_connection_made",
    "receive",
    "receive_both_ways",
    "limits",
    "pause_writing",
    "pause_writing_with_limits_of_zero",
    "pause_writing_happens_once",
    "pause_writing_inside_write",
    "no_pause_below_the_limit",
    "lowering_the_limits_pauses",
    "the_other_end_goes_while_something_waits",
    "writing_in_pause_writing",
    "writing_in_resume_writing",
}
AS_TCP = {
    "tls": TLS_AS_TCP,
    "unix": {"closing_in_resume_writing"},
    "memory": {"closing_in_resume_writing"},
    "memory_in_small_pieces": {"closing_in_resume_writing"},
}


@dataclass
class Difference:
    """A row of docs/differences.md (see the marker `differs`), and the scenarios and carriers that show it."""

    asyncio: str
    here: str
    why: str
    shows: Mapping[str, Sequence[str]]


#: By name. `docs/list_differences.py` puts these into the page.
DIFFERENCES = {
    "an exception in a callback": Difference(
        asyncio=(
            "an exception in `data_received`, `eof_received` or `get_buffer` ends the connection; in other callbacks, "
            "and in every callback of a reading pipe, it is only reported"
        ),
        here="it ends the connection, from every callback",
        why="a protocol that failed half-way is in an unknown state",
        shows={
            "raising_in_connection_made": SOCKETS,
            "raising_in_connection_lost": EVERYWHERE,
            "raising_in_pause_writing": EVERYWHERE,
            "raising_in_resume_writing": EVERYWHERE,
            "raising_in_data_received": ("pipe",),
        },
    ),
    "`eof_received` twice": Difference(
        asyncio="after `eof_received` has returned true, `pause_reading` and `resume_reading` cause it again",
        here="called once",
        why="the documentation says so",
        shows={
            "resume_reading_after_the_end": HALF_CLOSING,
            "pausing_in_eof_received": HALF_CLOSING,
        },
    ),
    "data after `close` or `abort` in `get_buffer`": Difference(
        asyncio="`buffer_updated` is called once more",
        here="no more data",
        why="the documentation of `close` says so",
        shows={
            "buffered_closing_in_get_buffer": ("tcp", "unix", "memory", "tls"),
            "buffered_aborting_in_get_buffer": ("tcp", "unix", "memory", "tls"),
        },
    ),
    "`close` or `abort` inside `resume_writing`": Difference(
        asyncio=(
            "`connection_lost` comes twice, or a callback raises (until 3.14 over TCP too); a pipe loses its buffer"
        ),
        here="`connection_lost` comes once, and `close` flushes",
        why="nothing that was written is lost",
        shows={
            "closing_in_resume_writing": ("unix", "pipe", "memory", "memory_in_small_pieces", "tls"),
            "aborting_in_resume_writing": EVERYWHERE,
        },
    ),
    "`writelines`": Difference(
        asyncio=(
            "until 3.14 never pauses the protocol, and raises after `close`; accepts `None` on a lost connection; with"
            " TLS accepts chunks that are not bytes, which break the connection later"
        ),
        here="behaves as `write`",
        why="one rule for both",
        shows={
            "writelines_pauses": (*SOCKETS, "tls"),
            "writelines_of_no_type": (*SOCKETS, "tls"),
            "writelines_after_close": SOCKETS,
        },
    ),
    "`write` after a `close` that flushed": Difference(
        asyncio="until 3.14 `AttributeError` once the connection is lost; inside `connection_lost` the data is sent",
        here="dropped",
        why="as after any other `close`",
        shows={
            "write_after_a_close_that_flushed": SOCKETS,
            "writing_in_connection_lost_after_a_close_that_flushed": SOCKETS,
        },
    ),
    "`set_protocol` while writing is paused": Difference(
        asyncio="the new protocol gets `resume_writing` without a `pause_writing`",
        here=(
            "it gets `pause_writing` in the next iteration of the event loop, then `resume_writing`; "
            "`is_writing_paused()` returns true at once"
        ),
        why="the two callbacks come in pairs",
        shows={"set_protocol_while_writing_is_paused": EVERYWHERE},
    ),
    "`write_eof` after a reset": Difference(
        asyncio="raises the system's `OSError`, and the transport stays open",
        here="`connection_lost` gets that error",
        why="as when `write` meets the error",
        shows={"write_eof_after_a_reset": RESETTING},
    ),
    "a buffer that its owner changes after `write`": Difference(
        asyncio="the changed bytes are sent, or the owner gets `BufferError` on resizing it",
        here="the bytes that were written are sent",
        why="the documentation promises it",
        shows={
            "a_buffer_that_changes_after_write": (*SOCKETS, "tls"),
        },
    ),
    "pipes: `abort`": Difference(
        asyncio="missing on reading pipes; on a writing pipe that is closed, a callback raises",
        here="available on both, and harmless",
        why="one interface for all transports",
        shows={
            "close_twice": ("pipe",),
            "abort_twice": ("pipe",),
            "use_after_close": ("pipe",),
            "aborting_in_data_received": ("pipe",),
            "the_other_end_goes_while_something_waits": ("pipe",),
        },
    ),
    "pipes: `BufferedProtocol`": Difference(
        asyncio="not supported: an error for each message",
        here="supported",
        why="one interface for all transports",
        shows=dict.fromkeys(
            (
                "set_protocol_to_a_buffered_one",
                "buffered_receive",
                "buffered_pause_reading",
                "buffered_closing_in_get_buffer",
                "buffered_aborting_in_get_buffer",
                "buffered_raising_in_get_buffer",
                "buffered_raising_in_buffer_updated",
                "buffered_closing_in_buffer_updated",
                "buffered_an_empty_buffer",
                "buffered_something_that_is_no_buffer",
                "buffered_set_protocol_in_a_callback",
            ),
            ("pipe",),
        ),
    ),
    "pipes: data of a wrong type": Difference(
        asyncio="`AssertionError`, or no error with `python -O`",
        here="`TypeError`",
        why="as `write` elsewhere",
        shows={"write_of_no_type": ("pipe",)},
    ),
    "pipes: the first warning of a write that is dropped": Difference(
        asyncio="at the sixth dropped write",
        here="at the fifth, as over sockets",
        why="one rule",
        shows={"writing_to_a_lost_connection_warns": ("pipe",)},
    ),
    "TLS: watermarks": Difference(
        asyncio=(
            "the limits are 128 and 512 KiB; the protocol is paused when the size reaches the high limit; data in the "
            "TCP transport below does not count"
        ),
        here="16 and 64 KiB, paused above the high limit, and everything counts, as over TCP",
        why="one rule",
        shows=dict.fromkeys(
            (
                "close_flushes",
                "close_flushes_to_a_slow_reader",
                "write_after_a_close_that_flushed",
                "abort_loses_what_is_buffered",
                "abort_ends_a_close",
                "limits_after_an_abort",
                "no_resume_writing_on_abort",
                "filling_again_in_resume_writing",
                "closing_in_pause_writing",
                "aborting_in_pause_writing",
                "closing_with_an_answer_in_data_received",
                "raising_in_data_received_drops_the_buffer",
                "the_other_end_goes_while_something_waits",
                "writing_in_connection_lost_after_a_close_that_flushed",
                "writing_in_pause_writing",
                "buffered_receive",
            ),
            ("tls",),
        ),
    ),
    "TLS: a transport that was closed": Difference(
        asyncio="`is_reading` stays true; extra info is gone, or `get_extra_info` raises",
        here="`is_reading` is false; extra info stays available",
        why="as over TCP",
        shows=dict.fromkeys(
            (
                "use_for_reading_after_close",
                "extra_info_of_sockets",
                "pause_reading_holds_the_end_back",
            ),
            ("tls",),
        ),
    ),
    "TLS: data that arrives after `close`": Difference(
        asyncio="`connection_lost` gets an `SSLError`",
        here="the data is dropped, 1 MiB at most, and `connection_lost` gets `None`",
        why="an orderly close is not an error",
        shows={"close_with_data_under_way": ("tls",)},
    ),
    "TLS: `close` while reading is paused and the other end has gone": Difference(
        asyncio="waits for the whole `ssl_shutdown_timeout`",
        here="ends at once",
        why="an answer can no longer come",
        shows={"close_while_paused_and_the_other_end_is_gone": ("tls",)},
    ),
    "TLS: a reset while reading is paused": Difference(
        asyncio="`connection_lost(ConnectionResetError)` at once",
        here="no callback until the protocol reads or writes, as over TCP",
        why="one rule",
        shows={"a_reset_of_an_end_that_is_paused": ("tls",)},
    ),
    "TLS: callbacks after an exception in `data_received`": Difference(
        asyncio="data or the end of file that arrived with it is still delivered",
        here="only `connection_lost` is called, as over TCP",
        why="a protocol that has failed is in an unknown state",
        shows=dict.fromkeys(
            (
                "raising_in_data_received_with_the_end_behind_it",
                "buffered_raising_in_buffer_updated_with_more_behind_it",
            ),
            ("tls",),
        ),
    ),
    "TLS: the end of the data for a `BufferedProtocol`": Difference(
        asyncio=(
            "data that arrived while reading was paused is lost if it is larger than the protocol's buffer and the end"
            " of file came too"
        ),
        here="the data is delivered, as over TCP",
        why="nothing that has arrived is lost",
        shows={"buffered_the_end_behind_more_than_the_buffer": ("tls",)},
    ),
    "TLS: writing to an end that has gone": Difference(
        asyncio="`connection_lost` comes even while reading is paused",
        here="no callback until reading resumes, as over TCP",
        why="one rule",
        shows={"writing_to_an_end_that_closes": ("tls",)},
    ),
    "TLS: `get_buffer`": Difference(
        asyncio=(
            "called before any data has come, and again after `eof_received`; an empty buffer is an `SSLError` that is"
            " not reported"
        ),
        here="as over TCP",
        why="one rule",
        shows=dict.fromkeys(
            ("buffered_raising_in_get_buffer", "buffered_an_empty_buffer", "buffered_something_that_is_no_buffer"),
            ("tls",),
        ),
    ),
}

#: Former differences: asyncio behaves as we do, since Python 3.14.10 at the latest.
MENDED = {
    "closing_in_resume_writing": ("unix", "memory", "memory_in_small_pieces"),
    "aborting_in_resume_writing": ("tcp", "unix", "memory", "memory_in_small_pieces"),
    "writelines_pauses": SOCKETS,
    "writelines_after_close": SOCKETS,
    "write_after_a_close_that_flushed": SOCKETS,
    "writing_in_connection_lost_after_a_close_that_flushed": SOCKETS,
}
MENDED_BY = (3, 14, 10)


def is_mended(scenario: str, carrier: str) -> bool | None:
    """Return whether this is a former difference; `None` for a Python in which that is not certain."""
    if carrier not in MENDED.get(scenario, ()):
        return False
    version = sys.version_info[:3]
    return True if version >= MENDED_BY else False if version == (3, 13, 0) else None


def difference(scenario: str, carrier: str) -> str | None:
    """Return the difference that is visible here."""
    if is_mended(scenario, carrier):
        return None
    for name, each in DIFFERENCES.items():
        if carrier in each.shows.get(scenario, ()):
            return name
    return None


def nearest(carrier: str) -> str:
    """Return the carrier over which asyncio comes nearest to ours over this one."""
    return CARRIERS[carrier].oracle or carrier


def oracle(scenario: str, carrier: str) -> str | None:
    """Return the carrier over which asyncio is the oracle; `None` where we differ."""
    if scenario in AS_TCP.get(carrier, ()):
        return "tcp"
    return None if difference(scenario, carrier) else nearest(carrier)
