"""Draw the state machines of `state_machines.md` from the tables that the code runs on.

    python docs/draw_states.py           writes the drawings beside this file
    python docs/draw_states.py --check   says which are out of date

`transport.svg` is drawn from the transitions of a transport, the others from the orders of callbacks that the recorders
of `transports_anyio.testing` check.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from transports_anyio._transports._state import TRANSITIONS
from transports_anyio.testing import DatagramRecorder, Recorder, SubprocessRecorder

HERE = Path(__file__).resolve().parent

BOX_WIDTH = 116
BOX_HEIGHT = 46
LEAST_GAP = 40  # Between two boxes.
LETTER = 7  # The width of a letter.
MARGIN = 20
LINE = 17  # The height of a line of text.

STYLE = """\
    .paper { fill: #fff; stroke: #ccc; }
    .state { fill: #eef4fb; stroke: #36648b; stroke-width: 1.5; }
    .end { fill: #f1f1f1; stroke: #777; stroke-width: 1.5; }
    .arrow { fill: none; stroke: #333; stroke-width: 1.3; marker-end: url(#head); }
    text { font: 13px sans-serif; fill: #222; text-anchor: middle; }
    .name { font-size: 14px; font-weight: bold; }"""

#: From one state to another, and the reasons.
Arrows = Mapping[tuple[str, str], list[str]]


def arrows_of_transitions() -> Arrows:
    """Return the arrows of a transport's life."""
    return {
        (words(state.name), words(to.name)): [why]
        for state, following in TRANSITIONS.items()
        for to, why in following.items()
    }


def arrows_of_order(order: Mapping[str, Mapping[str, str]]) -> Arrows:
    """Return the arrows of a recorder's order of callbacks."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for callback, moves in order.items():
        for state, to in moves.items():
            arrows.setdefault((state, to), []).append(callback)
    return arrows


def words(name: str) -> str:
    return name.lower().replace("_", " ")


def text(x: float, y: float, said: str, kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'  <text{mark} x="{x:g}" y="{y:g}">{escape(said)}</text>'


def draw(title: str, states: list[str], arrows: Arrows) -> str:
    """Return an SVG: the states in a row, loops and arrows forward above them, longer arrows below."""
    at: dict[str, int] = {}
    x = MARGIN
    for state, following in zip(states, [*states[1:], ""], strict=True):
        at[state] = x
        longest = max(map(len, arrows.get((state, following), [])), default=0)
        x += BOX_WIDTH + max(LEAST_GAP, longest * LETTER + 24)
    unknown = {state for arrow in arrows for state in arrow} - set(states)
    if unknown:
        raise ValueError(f"states without a place in {title!r}: {unknown}")
    loops = max((len(said) for (state, to), said in arrows.items() if state == to), default=0)
    top = MARGIN + loops * LINE + (50 if loops else LINE * max(len(said) for said in arrows.values()))
    middle = top + BOX_HEIGHT / 2
    bottom = top + BOX_HEIGHT
    parts: list[str] = []
    far = sorted(
        (pair for pair in arrows if pair[0] != pair[1] and states.index(pair[1]) - states.index(pair[0]) > 1),
        key=lambda pair: (states.index(pair[1]) - states.index(pair[0]), states.index(pair[0])),
    )
    for (state, to), said in arrows.items():
        x = at[state]
        if state == to:
            loop = f"M{x + 35} {top} C{x} {top - 55} {x + BOX_WIDTH} {top - 55} {x + 85} {top - 2}"
            parts.append(f'  <path class="arrow" d="{loop}"/>')
            parts += column(x + BOX_WIDTH / 2, top - 48, said)
        elif (state, to) not in far:
            parts.append(f'  <path class="arrow" d="M{x + BOX_WIDTH} {middle:g} H{at[to] - 2}"/>')
            parts += column((x + BOX_WIDTH + at[to]) / 2, middle - 8, said)
    for depth, (state, to) in enumerate(far, 1):
        start, end = at[state] + 40 + 8 * depth, at[to] + 30 + 9 * depth
        low = bottom + 12 + depth * (LINE + 16)
        parts.append(f'  <path class="arrow" d="M{start} {bottom} V{low} H{end} V{bottom + 2}"/>')
        parts.append(text((start + end) / 2, low - 6, ", ".join(arrows[state, to])))
    final = {state for state in states if not any(here == state for here, _ in arrows)}
    for state in states:
        kind = "end" if state in final else "state"
        parts.append(
            f'  <rect class="{kind}" x="{at[state]}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="10"/>'
        )
        parts.append(text(at[state] + BOX_WIDTH / 2, middle + 5, state, "name"))
    width = at[states[-1]] + BOX_WIDTH + MARGIN
    height = bottom + 12 + len(far) * (LINE + 16) + MARGIN
    size = f'width="{width}" height="{height}"'
    head = 'viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} role="img">',
            f"  <title>{escape(title)}</title>",
            "  <style>",
            STYLE,
            "  </style>",
            f'  <defs><marker id="head" {head}>',
            '    <path d="M0 0 L10 5 L0 10 z" fill="#333"/>',
            "  </marker></defs>",
            f'  <rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def column(x: float, y: float, lines: list[str]) -> Iterable[str]:
    """Return lines of text, the last of them at `y`."""
    return [text(x, y - LINE * (len(lines) - 1 - number), line) for number, line in enumerate(lines)]


def drawings() -> dict[str, str]:
    """Return every drawing by its file's name."""
    return {
        "transport.svg": draw(
            "The states of a transport",
            ["open", "closing", "shutting down", "lost", "upgraded", "closed"],
            arrows_of_transitions(),
        ),
        "stream.svg": draw(
            "The callbacks of a stream protocol", ["new", "open", "ended", "lost"], arrows_of_order(Recorder.ORDER)
        ),
        "datagram.svg": draw(
            "The callbacks of a datagram protocol", ["new", "open", "lost"], arrows_of_order(DatagramRecorder.ORDER)
        ),
        "subprocess.svg": draw(
            "The callbacks of a subprocess protocol",
            ["new", "open", "exited", "lost"],
            arrows_of_order(SubprocessRecorder.ORDER),
        ),
    }


def main() -> int:
    """Write the drawings, or check them; return the exit status."""
    outdated = [
        name for name, svg in drawings().items() if not (HERE / name).exists() or (HERE / name).read_text() != svg
    ]
    if "--check" not in sys.argv[1:]:
        for name in outdated:
            (HERE / name).write_text(drawings()[name])
        return 0
    for name in outdated:
        sys.stderr.write(f"docs/{name} is out of date: run docs/draw_states.py\n")
    return bool(outdated)


if __name__ == "__main__":
    sys.exit(main())
