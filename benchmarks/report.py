"""Make docs/performance.svg and the tables of docs/performance.md from `summary.json`: `python benchmarks/report.py`.

With `--print` it prints all that the summary has instead: each workload's figures, ratios and targets, and what of the
time is the server's own code.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SUMMARY = HERE / "summary.json"

PEERS = [
    "epoll", "asyncio", "ours/asyncio", "uvloop", "ours/uvloop", "trio", "trio-asyncio", "ours/trio",
    "anyio streams/asyncio", "anyio streams/uvloop", "anyio streams/trio",
]  # fmt: skip
RATIOS = [
    ("on asyncio, to asyncio's own", "ours/asyncio", "asyncio"),
    ("on uvloop, to uvloop's own", "ours/uvloop", "uvloop"),
    ("on trio, to trio's own stream", "ours/trio", "trio"),
    ("on trio, to trio-asyncio", "ours/trio", "trio-asyncio"),
    ("on asyncio, to AnyIO's stream", "ours/asyncio", "anyio streams/asyncio"),
    ("on uvloop, to AnyIO's stream", "ours/uvloop", "anyio streams/uvloop"),
    ("on trio, to AnyIO's stream", "ours/trio", "anyio streams/trio"),
]
#: The workloads that the chart shows, and what it calls them.
CHART = {
    "tcp 1 KiB x 16 (used)": "TCP 1 KiB, 16 connections",
    "tcp 1 KiB x 1, one processor (used)": "TCP 1 KiB, lock-step",
    "accept, echo, close (used)": "accept, echo, close",
    "tls 1 KiB x 16 (used)": "TLS 1 KiB, 16 connections",
    "udp 512 B (used)": "UDP 512 B",
}
COLOURS = {
    "asyncio": "#9aa5b1", "ours/asyncio": "#2563eb", "uvloop": "#b8a9c9", "ours/uvloop": "#7c3aed",
    "trio": "#c3b59b", "ours/trio": "#059669", "trio-asyncio": "#d9b8b0",
}  # fmt: skip
#: Ours, and the peer whose figure it is divided by.
OURS = {"ours/asyncio": "asyncio", "ours/uvloop": "uvloop", "ours/trio": "trio"}


class Table(NamedTuple):
    """A table of the page."""

    unit: str
    """The head of its first column, by which its place in the page is found."""
    rows: dict[str, str]
    """What its rows are called here and there."""
    columns: dict[str, str]
    """The peers, and what their columns are called."""
    ratios: dict[str, str] = OURS
    """For ours, by which peer's figure it is divided: the quotient is in the cell, too."""


#: How most columns are called.
COLUMNS = {
    "asyncio": "asyncio",
    "ours/asyncio": "ours on asyncio",
    "uvloop": "uvloop",
    "ours/uvloop": "ours on uvloop",
    "trio": "trio",
    "anyio streams/trio": "AnyIO stream on trio",
    "trio-asyncio": "trio-asyncio",
    "ours/trio": "ours on trio",
}
COSTS = {
    "tcp 1 KiB x 16 (used)": "TCP 1 KiB, 16 connections",
    "tcp 1 KiB x 1 (used)": "TCP 1 KiB, 1 connection",
    "tcp 1 KiB x 1, one processor (used)": "the same, client on the same processor",
    "tcp 64 KiB x 16 (used)": "TCP 64 KiB, 16 connections",
    "accept, echo, close (used)": "accept, echo, close",
    "outgoing connection": "connect, close",
    "tls 1 KiB x 16 (used)": "TLS 1 KiB, 16 connections",
    "tls 256 KiB x 1 (used)": "TLS 256 KiB, 1 connection",
    "udp 512 B (used)": "UDP 512 B",
    "writelines 1000 x 100 B (used)": "`writelines`, 1,000 pieces of 100 B",
    "spawn of true": "start a child and reap it",
    "request and awaited reply": "send a request, await its reply",
    "timer": "make and cancel a timer",
    "timer, moved": "move a timer",
    "memory of an idle connection, KiB": "memory of an idle connection, KiB",
}
#: Who serves HTTP, in the words of the page.
HTTP_COLUMNS = {
    "asyncio": "uvicorn on asyncio",
    "ours/asyncio": "ours on asyncio",
    "uvloop": "uvicorn on uvloop",
    "ours/uvloop": "ours on uvloop",
    "trio": "hypercorn on trio",
    "trio-asyncio": "uvicorn on trio-asyncio",
    "ours/trio": "ours on trio",
}
#: Async code over connections: AnyIO's own streams, trio's, and ours.
ASYNC_COLUMNS = {
    "anyio streams/asyncio": "AnyIO stream on asyncio",
    "ours/asyncio": "ours on asyncio",
    "anyio streams/uvloop": "AnyIO stream on uvloop",
    "ours/uvloop": "ours on uvloop",
    "anyio streams/trio": "AnyIO stream on trio",
    "trio": "trio",
    "ours/trio": "ours on trio",
}
TABLES = [
    Table("microseconds for", COSTS, COLUMNS),
    Table(
        "microseconds in async code",
        {
            "async code, 1 KiB x 16 (used)": "TCP 1 KiB, 16 connections",
            "async code, 1 KiB x 1 (used)": "TCP 1 KiB, 1 connection",
        },
        ASYNC_COLUMNS,
        {"ours/asyncio": "anyio streams/asyncio", "ours/uvloop": "anyio streams/uvloop", "ours/trio": "trio"},
    ),
    Table(
        "microseconds of waiting",
        {
            f"{measured} beside 8 bulk streams, {late}{name}": f"{title}, {name}"
            for measured, late, title in (
                ("1 KiB echo", "", "echo of 1 KiB"),
                ("5 ms timer", "late by, ", "a timer of 5 ms is late by"),
            )
            for name in ("p50", "p99", "p99.9")
        },
        COLUMNS,
    ),
    Table(
        "requests for each second of processor time",
        {"http, requests for each second of processor time (used)": "HTTP/1.1, 16 connections"},
        HTTP_COLUMNS,
    ),
]
#: What was set out to be reached: the greatest ratio for each column of `RATIOS`, the last ones left out without one.
TARGETS: dict[str, tuple[float | None, ...]] = {
    "tcp 1 KiB x 16 (fresh)": (0.40, None, None, None),
    "tcp 1 KiB x 16 (used)": (1.0, 1.6, 0.40, 0.15),
    "tcp 1 KiB x 256 (used)": (1.0, 1.6, 0.40, 0.15),
    "tcp 64 KiB x 16 (used)": (1.05, 1.25, 0.55, 0.32),
    "tcp 1 KiB x 1 (used)": (1.05, 1.20, 0.95, 0.80),
    "tcp 1 KiB x 1, one processor (used)": (1.3, 2.0, 0.90, 0.40),
    "buffered 64 KiB x 16 (used)": (0.92, 1.15, 0.50, 0.30),
    "accept, echo, close (used)": (1.0, 1.35, 0.35, 0.15),
    "outgoing connection": (1.0, 1.8, 0.80, 0.40),
    "tls 256 KiB x 1 (used)": (1.0, 1.25, 0.40, 0.85),
    "tls 1 KiB x 16 (used)": (0.85, 1.5, 0.35, 0.20),
    "udp 512 B (used)": (1.0, 1.7, 0.30, 0.12),
    "writelines 1000 x 100 B (used)": (0.30, 1.2, 1.5, 0.25),
    "memory of an idle connection, KiB": (1.0, 1.3, 0.50, 0.40),
    "spawn of true": (1.1, 0.8, 0.9, 0.35),
    "spawn of true, one processor": (1.1, 0.8, 0.9, 0.35),
    "64 MiB through cat": (0.9, None, 0.9, None),
    "64 MiB through cat, one processor": (0.9, None, 0.9, None),
    "timer": (1.2, 1.4, None, 0.20),
    "request and awaited reply": (1.1, None, None, None, None, None, 1.0),
    "async code, 1 KiB x 16 (used)": (None, None, 0.60, None, 1.0, 1.0),
    "async code, 1 KiB x 1 (used)": (None, None, None, None, 1.0, 1.0),
}

Raw = dict[str, dict[str, list[float]]]


class Figure(NamedTuple):
    """What the bursts to one peer gave."""

    median: float
    spread: float
    """Half of how far apart the middle half lies, in per cent of the median."""
    count: int


class Row(TypedDict):
    """A workload."""

    figures: dict[str, Figure]
    ratios: dict[str, float]
    """By our name: the median of the ratios of what was measured one after the other, by the other's name."""
    own: dict[str, float]
    """Microseconds in the server's own code."""


# From what was measured to the summary


def figure(values: list[float]) -> Figure:
    middle = statistics.median(values)
    spread = 0.0
    if len(values) > 1 and middle:
        first, _, third = statistics.quantiles(values, n=4, method="inclusive")
        spread = (third - first) / 2 / middle * 100
    return Figure(significant(middle), round(spread), len(values))


def significant(value: float) -> float:
    return float(f"{value:.5g}")


def ratio(row: dict[str, list[float]], ours: str, other: str) -> float | None:
    mine, theirs = row.get(ours), row.get(other)
    if not mine or not theirs or not all(theirs):
        return None
    if len(mine) == len(theirs):
        return statistics.median(one / another for one, another in zip(mine, theirs, strict=True))
    return statistics.median(mine) / statistics.median(theirs)  # Something is missing somewhere.


def summarise(results: Raw, own: Raw) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name, row in results.items():
        ratios = {f"{ours} : {other}": ratio(row, ours, other) for _, ours, other in RATIOS}
        rows[name] = Row(
            figures={peer: figure(values) for peer, values in row.items()},
            ratios={pair: significant(value) for pair, value in ratios.items() if value is not None},
            own={peer: significant(statistics.median(values)) for peer, values in own.get(name, {}).items()},
        )
    return rows


def merge(before: Row, after: Row) -> Row:
    """Return a row that some peers were measured again for. Ratios to the others are those of the medians."""
    figures = before["figures"] | after["figures"]
    ratios = before["ratios"] | after["ratios"]
    for _, ours, other in RATIOS:
        pair = f"{ours} : {other}"
        if pair in ratios and pair not in after["ratios"] and {ours, other} & set(after["figures"]):
            ratios[pair] = significant(figures[ours].median / figures[other].median)
    return Row(figures=figures, ratios=ratios, own=before["own"] | after["own"])


def write_summary(circumstances: dict[str, Any], rows: dict[str, Row]) -> None:
    """Write the summary with a line for each workload, so that a change shows which of them it is about."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    head = json.dumps(circumstances, indent=0)[:-2]
    SUMMARY.write_text(f'{head},\n"workloads": {{\n{lines}\n}}\n}}\n')


def read_summary() -> tuple[dict[str, Any], dict[str, Row]]:
    """Return the circumstances of the summary, and its rows."""
    circumstances = json.loads(SUMMARY.read_text())
    rows = circumstances.pop("workloads")
    for row in rows.values():
        row["figures"] = {peer: Figure(*values) for peer, values in row["figures"].items()}
    return circumstances, rows


# Tables and the chart


def grid(first: str, columns: list[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    """A table in Markdown, without the rows that have nothing to show."""
    lines = [f"| {first} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows if any(cells)]


def readable(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def page_table(table: Table, rows: dict[str, Row]) -> list[str]:
    """Return a table of the page."""

    def cell(row: Row, peer: str) -> str:
        if peer not in row["figures"]:
            return ""
        text = readable(row["figures"][peer].median)
        quotient = row["ratios"].get(f"{peer} : {table.ratios.get(peer)}")
        return text if quotient is None else f"{text} ({quotient:.2f})"

    chosen = ((title, rows[name]) for name, title in table.rows.items() if name in rows)
    cells = ((title, [cell(row, peer) for peer in table.columns]) for title, row in chosen)
    return grid(table.unit, list(table.columns.values()), cells)


def all_figures(rows: dict[str, Row]) -> list[str]:
    def cell(row: Row, peer: str) -> str:
        if peer not in row["figures"]:
            return ""
        found = row["figures"][peer]
        return f"{readable(found.median)} ±{found.spread} %"

    return grid("workload", PEERS, ((name, [cell(row, peer) for peer in PEERS]) for name, row in rows.items()))


def all_ratios(rows: dict[str, Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        values = (row["ratios"].get(f"{ours} : {other}") for _, ours, other in RATIOS)
        return ["" if value is None else f"{value:.2f}" for value in values]

    return grid("workload", [title for title, _, _ in RATIOS], ((name, cells(row)) for name, row in rows.items()))


def targets(rows: dict[str, Row]) -> list[str]:
    """Each ratio beside its target; one that is missed is in bold, with the ratio of the bare loop."""

    def cells(name: str, limits: tuple[float | None, ...]) -> Iterator[str]:
        row = rows[name]
        for limit, (_, ours, other) in zip_longest(limits, RATIOS):
            value = row["ratios"].get(f"{ours} : {other}")
            if limit is None or value is None:
                yield ""
            elif value <= limit:
                yield f"{value:.2f} of {limit:.2f}"
            else:
                digits = 2 if f"{value:.2f}" != f"{limit:.2f}" else 3  # Rounding must not hide a miss.
                bare = row["figures"].get("epoll")
                least = f" (bare loop {bare.median / row['figures'][other].median:.2f})" if bare else ""
                yield f"**{value:.{digits}f} of {limit:.2f}**{least}"

    known = ((name, list(cells(name, limits))) for name, limits in TARGETS.items() if name in rows)
    return grid("workload", [title for title, _, _ in RATIOS], known)


def own_code(rows: dict[str, Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        return [readable(row["own"][peer]) if peer in row["own"] else "" for peer in PEERS]

    return grid("own code, microseconds", PEERS, ((name, cells(row)) for name, row in rows.items()))


def chart(rows: dict[str, Row]) -> str:
    """Bars of microseconds for each request; the shorter, the better. Long ones are cut, with their number."""
    width, left, bar, gap = 760, 190, 12, 26
    parts, y = [], 20
    for name, title in CHART.items():
        figures = rows[name]["figures"] if name in rows else {}
        known = {peer: figures[peer].median for peer in COLOURS if peer in figures}
        if not known:
            continue
        scale = (width - left - 120) / (3 * min(known.values()) * 2)
        parts.append(f'<text x="0" y="{y + 4}" font-weight="bold">{escape(title)}</text>')
        y += 12
        for peer, value in known.items():
            length = min(value * scale, width - left - 90)
            parts.append(f'<text x="{left - 8}" y="{y + bar - 2}" text-anchor="end">{escape(peer)}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar}" fill="{COLOURS[peer]}"/>')
            parts.append(f'<text x="{left + length + 6:.1f}" y="{y + bar - 2}">{value:.3g} µs</text>')
            y += bar + 3
        y += gap
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def measured(circumstances: dict[str, Any], rows: dict[str, Row]) -> str:
    counts = {found.count for row in rows.values() for found in row["figures"].values()}
    versions = ", ".join(f"{name} {version}" for name, version in circumstances["versions"].items())
    return (
        f"Measured on: {circumstances['machine']}; {versions}; "
        f"{min(counts)} to {max(counts)} bursts of {circumstances['seconds']} s."
    )


def update_page(page: str, circumstances: dict[str, Any], rows: dict[str, Row]) -> str:
    """Put each table in the place of the one that is there, and the circumstances in place of theirs."""
    made = {
        **{
            rf"^\| {re.escape(each.unit)} \|(?:.*\n\|)*.*\n": "\n".join([*page_table(each, rows), ""])
            for each in TABLES
        },
        r"^Measured on: .*\n": measured(circumstances, rows) + "\n",
    }
    for pattern, replacement in made.items():
        page, count = re.subn(pattern, lambda _, text=replacement: text, page, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"docs/performance.md should have one place for {pattern}, it has {count}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print all figures instead")
    options = parser.parse_args()
    circumstances, rows = read_summary()
    if options.print:
        tables = [
            *(page_table(each, rows) for each in TABLES),
            all_figures(rows),
            all_ratios(rows),
            targets(rows),
            own_code(rows),
        ]
        print("\n\n".join([measured(circumstances, rows), *("\n".join(lines) for lines in tables)]))
        return
    page = DOCS / "performance.md"
    page.write_text(update_page(page.read_text(), circumstances, rows))
    (DOCS / "performance.svg").write_text(chart(rows))


if __name__ == "__main__":
    main()
