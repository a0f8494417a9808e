"""Make the table and the chart of docs/performance.md from `results.json`: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, list[float]]]

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

#: Column, and the peers that a backend's row is compared with.
PEERS = [
    "epoll", "asyncio", "ours/asyncio", "uvloop", "ours/uvloop", "trio", "trio-asyncio", "ours/trio",
    "anyio streams/asyncio", "anyio streams/trio",
]  # fmt: skip
RATIOS = [
    ("on asyncio, to asyncio's own", "ours/asyncio", "asyncio"),
    ("on uvloop, to uvloop's own", "ours/uvloop", "uvloop"),
    ("on trio, to trio's own stream", "ours/trio", "trio"),
    ("on trio, to trio-asyncio", "ours/trio", "trio-asyncio"),
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


def median(values: list[float] | None) -> float | None:
    return statistics.median(values) if values else None


def spread(values: list[float]) -> str:
    """How far apart the middle half of what was measured lies: half of it, in per cent of the median."""
    if len(values) < 2 or not statistics.median(values):
        return ""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return f"±{(third - first) / 2 / middle * 100:.0f} %"


def grid(first: str, columns: list[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    """A table in Markdown, without the rows that have nothing to show."""
    lines = [f"| {first} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows if any(cells)]


def figures(row: dict[str, list[float]]) -> list[str]:
    """The median of each peer."""
    medians = (median(row.get(peer)) for peer in PEERS)
    return ["" if value is None else f"{value:.1f}" for value in medians]


def table(results: Rows) -> list[str]:
    def cell(values: list[float] | None) -> str:
        return f"{statistics.median(values):.3g} {spread(values)}".strip() if values else ""

    return grid("workload", PEERS, ((name, [cell(row.get(peer)) for peer in PEERS]) for name, row in results.items()))


def ratio(row: dict[str, list[float]], ours: str, other: str) -> float | None:
    """The median of the ratios of what was measured one after the other."""
    mine, theirs = row.get(ours), row.get(other)
    if not mine or not theirs or not all(theirs):
        return None
    if len(mine) == len(theirs):
        return statistics.median(one / another for one, another in zip(mine, theirs, strict=True))
    return statistics.median(mine) / statistics.median(theirs)  # Something is missing somewhere.


def ratios(results: Rows) -> list[str]:
    def cells(row: dict[str, list[float]]) -> list[str]:
        values = (ratio(row, ours, other) for _, ours, other in RATIOS)
        return ["" if value is None else f"{value:.2f}" for value in values]

    return grid("workload", [title for title, _, _ in RATIOS], ((name, cells(row)) for name, row in results.items()))


#: What was set out to be reached: the greatest ratio for each column of `RATIOS`.
TARGETS: dict[str, tuple[float | None, ...]] = {
    "tcp 1 KiB x 16 (fresh)": (0.40, None, None, None),
    "tcp 1 KiB x 16 (used)": (1.0, 1.6, 0.40, 0.15),
    "tcp 1 KiB x 256 (used)": (1.0, 1.6, 0.40, 0.15),
    "tcp 64 KiB x 16 (used)": (1.05, 1.25, 0.55, 0.32),
    "tcp 1 KiB x 1 (used)": (1.05, 1.25, 0.95, 0.80),
    "tcp 1 KiB x 1, one processor (used)": (1.3, 2.0, 0.90, 0.40),
    "buffered 64 KiB x 16 (used)": (0.95, 1.15, 0.50, 0.30),
    "accept, echo, close (used)": (1.0, 2.7, 0.35, 0.15),
    "outgoing connection": (1.2, 2.2, 0.80, 0.40),
    "tls 256 KiB x 1 (used)": (1.0, 1.25, 0.40, 0.85),
    "tls 1 KiB x 16 (used)": (0.85, 1.5, 0.35, 0.20),
    "udp 512 B (used)": (1.0, 1.7, 0.30, 0.12),
    "writelines 1000 x 100 B (used)": (0.30, 1.2, 1.5, 0.25),
    "memory of an idle connection, KiB": (1.0, 2.0, 0.50, 0.40),
    "spawn of true": (1.1, 0.8, 1.0, 0.35),
    "spawn of true, one processor": (1.1, 0.8, 1.0, 0.35),
    "64 MiB through cat": (0.9, None, 0.9, None),
    "64 MiB through cat, one processor": (0.9, None, 0.9, None),
    "timer": (1.2, 1.4, None, 0.20),
}


def targets(results: Rows) -> list[str]:
    """Each ratio beside its target; one that is missed is in bold, with the ratio of the bare loop."""

    def cells(name: str, limits: tuple[float | None, ...]) -> Iterator[str]:
        row = results.get(name, {})
        for limit, (_, ours, other) in zip(limits, RATIOS, strict=True):
            value = ratio(row, ours, other)
            if limit is None or value is None:
                yield ""
            elif value <= limit:
                yield f"{value:.2f} of {limit:.2f}"
            else:
                bare = ratio(row, "epoll", other)
                digits = 2 if f"{value:.2f}" != f"{limit:.2f}" else 3  # A miss is not rounded away.
                yield f"**{value:.{digits}f} of {limit:.2f}**" + (f" (bare loop {bare:.2f})" if bare else "")

    rows = ((name, list(cells(name, limits))) for name, limits in TARGETS.items())
    return grid("workload", [title for title, _, _ in RATIOS], rows)


def flat(results: Rows) -> list[str]:
    """The cost of one echo by the number of open connections, and the bare loop's beside it."""
    names = {"16": "tcp 1 KiB x 16 (used)", "256": "tcp 1 KiB x 256 (used)", "10,016": "10,000 idle connections (used)"}
    return grid("open connections", PEERS, ((count, figures(results.get(name, {}))) for count, name in names.items()))


def own_code(own: Rows) -> list[str]:
    """What of a request's time is the server's own, for the rows that have a target."""
    return grid("workload", PEERS, ((name, figures(own.get(name, {}))) for name in TARGETS))


def repetitions(results: Rows) -> str:
    counts = {len(values) for row in results.values() for values in row.values()}
    return f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"


def chart(results: Rows) -> str:
    """Bars of microseconds for each request; the shorter, the better. Long ones are cut, with their number."""
    width, left, bar, gap = 760, 190, 12, 26
    parts, y = [], 20
    for name, title in CHART.items():
        row = {peer: median(results.get(name, {}).get(peer)) for peer in COLOURS}
        known = {peer: value for peer, value in row.items() if value}
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


def page(document: dict[str, Any]) -> str:
    results = document["results"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join([
        "# Performance",
        "",
        "Processor time of the server, user plus system as the operating system accounts it, in microseconds for",
        "each request. Server and load generator run in a process of their own, each on a processor of its own; the",
        "load generator is a C program that is faster than any server here. Bursts of load go to one server after the",
        "other, while all of them live; the figures are medians, and the middle half of the bursts lies within the",
        "per cents beside them. A server is measured *fresh*, before any connection has ended, and *used*, after some",
        "have. *epoll* is a bare loop that receives and sends: the limit for Python.",
        "",
        f"{document['machine']}; {versions}; {repetitions(results)} bursts of {document['seconds']} s each.",
        "Make it again with `nox -s benchmarks`; the raw figures are in `benchmarks/results.json`.",
        "",
        "![Microseconds for each request](performance.svg)",
        "",
        "## Targets",
        "",
        "The ratio to what the peer cost just before or after, the median of all such, and what it was to reach;",
        "**bold** where it did not, with what the bare loop reaches: nothing written in Python can do with less.",
        "",
        *targets(results),
        "",
        (HERE / "notes.md").read_text().strip(),
        "",
        "## Where the time goes",
        "",
        "Microseconds of a request that the server spends in its own code and its libraries', as the kernel's clock",
        "samples it; the rest is the kernel's, copying, waking up and handling packets.",
        "",
        *own_code(document["own"]),
        "",
        "## Many connections",
        "",
        "Microseconds for one echo of 1 KiB, by the number of connections that are open. 16 of them are busy; of 256,",
        "all. The rows are not of the same time: what the peers beside ours cost tells how far these lie apart.",
        "",
        *flat(results),
        "",
        "## Ratios",
        "",
        "Ours to the peer, in neighbouring bursts: below 1 is cheaper.",
        "",
        *ratios(results),
        "",
        "## Figures",
        "",
        *table(results),
        "",
    ])  # fmt: skip


def main() -> None:
    document = json.loads((HERE / "results.json").read_text())
    (DOCS / "performance.md").write_text(page(document))
    (DOCS / "performance.svg").write_text(chart(document["results"]))


if __name__ == "__main__":
    main()
