"""Writes docs/names.md, the list of public names with their signatures: `python docs/list_names.py`.

The test `test_the_list_of_names_is_up_to_date` compares what this makes with the page.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))  # For the imports in `page`.

HEAD = """\
# Every public name

One line each; [the reference](reference.md) has the parameters, the errors and the sources. `python docs/list_names.py`
makes this page from the docstrings.
"""

#: What asyncio documents, and `transports_anyio` only passes on.
FROM_ASYNCIO = {
    "BaseProtocol": "What all protocols have: `connection_made`, `connection_lost`, `pause_writing`, `resume_writing`.",
    "Protocol": "For streams: also `data_received` and `eof_received`.",
    "BufferedProtocol": "For streams, with a buffer of its own: `get_buffer`, `buffer_updated`, `eof_received`.",
    "DatagramProtocol": "For datagrams: also `datagram_received` and `error_received`.",
    "SubprocessProtocol": "For child processes: `pipe_data_received`, `pipe_connection_lost`, `process_exited`.",
    "BaseTransport": "What all transports have.",
    "ReadTransport": "What every transport has that reads a stream.",
    "WriteTransport": "What every transport has that writes a stream.",
    "Transport": "A connection, which reads and writes a stream.",
    "DatagramTransport": "A datagram endpoint.",
    "SubprocessTransport": "A child process.",
    "TransportSocket": "A socket for reading its state and setting options.",
}


#: What instances of recorders have.
ATTRIBUTES = ["`protocol`", "`transport`", "`hooks`", "`calls`", "`received`", "`violations`", "`writing_paused`"]


def methods(abstract: type) -> set[str]:
    """The names that asyncio's abstract class has, and those that all our transports have beside them."""
    ours = {"drain", "is_writing_paused", "start_soon", "wait_closed"}
    return {name for name in dir(abstract) if name[0] != "_"} | ours


def definition(function: Any) -> ast.FunctionDef | ast.AsyncFunctionDef:
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(found, (ast.FunctionDef, ast.AsyncFunctionDef))
    return found


def signature(name: str, function: Any) -> str:
    """The parameters as the source has them, without their types: those differ in print from Python to Python."""
    found = definition(inspect.unwrap(function))
    arguments = found.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    if arguments.args and arguments.args[0].arg == "self":
        del arguments.args[0]
    prefix = "await " if isinstance(found, ast.AsyncFunctionDef) else ""
    # `ast.unparse` writes `a=1, /`: the marks of positional and keyword-only parameters stay.
    return f"{prefix}{name}({ast.unparse(arguments)})"


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring, up to the first full stop."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def row(name: str, thing: Any) -> str:
    if isinstance(thing, property):
        return f"| `{name}` | {first_sentence(thing)} |"
    return f"| `{signature(name, thing)}` | {first_sentence(thing)} |"


def table(title: str, rows: list[str], text: str = "") -> str:
    lines = [f"## {title}", "", *([text, ""] if text else []), "| name | what it is |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


def members(cls: type, names: set[str] | None = None) -> list[str]:
    """A row for each public method and property that has a docstring, or for those with these names."""
    found = ((name, inspect.getattr_static(cls, name)) for name in sorted(names or dir(cls)) if name[0] != "_")
    return [
        row(name, thing)
        for name, thing in found
        if (isinstance(thing, property) or inspect.isfunction(thing)) and thing.__doc__
    ]


def fields(cls: type) -> list[str]:
    """A row for each field of a dataclass; the comment above it says what it is."""
    source = inspect.getsource(cls)
    rows = []
    for field in dataclasses.fields(cls):
        comment = re.search(rf"((?: *#: .*\n)+) *{field.name}:", source)
        assert comment, f"{field.name} has no comment"
        rows.append(f"| `{field.name}` | {' '.join(re.sub(r'^ *#: ', '', comment[1], flags=re.MULTILINE).split())} |")
    return rows


def page() -> str:
    import transports_anyio as package
    from transports_anyio import from_asyncio, testing, to_asyncio
    from transports_anyio._transports._datagram import DatagramTransport
    from transports_anyio._transports._stream import StreamTransport
    from transports_anyio._transports._subprocess import SubprocessTransport

    recorders = [getattr(testing, name) for name in testing.__all__ if name.endswith("Recorder")]
    streams_only = {"write", "writelines", "write_eof", "can_write_eof"}
    functions = [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]
    return "\n".join(
        [
            HEAD,
            table(
                "The package",
                [row(name, getattr(package, name)) for name in functions]
                + [
                    f"| `{name}` | {FROM_ASYNCIO.get(name) or first_sentence(getattr(package, name))} |"
                    for name in package.__all__
                    if name not in functions
                ],
                "`from transports_anyio import …`. Protocols and transports are asyncio's own abstract classes.",
            ),
            table("TransportGroup", members(package.TransportGroup)),
            table("GroupStatistics", fields(package.GroupStatistics), "What `TransportGroup.statistics()` returns."),
            table("ServerStatistics", fields(package.ServerStatistics), "What `Server.statistics()` returns."),
            table("Server", members(package.Server)),
            table(
                "Handle and TimerHandle",
                [
                    *members(package.Handle),
                    *(each for each in members(package.TimerHandle) if "`when" in each or "`reschedule" in each),
                ],
                "What `call_soon`, `call_later` and `call_at` return.",
            ),
            table("to_asyncio", [row(name, getattr(to_asyncio, name)) for name in to_asyncio.__all__]),
            table("from_asyncio", [row(name, getattr(from_asyncio, name)) for name in from_asyncio.__all__]),
            table("Transports of streams", members(StreamTransport, methods(asyncio.Transport) | {"is_eof_received"})),
            table(
                "Datagram transports",
                members(DatagramTransport, methods(asyncio.WriteTransport) - streams_only | {"sendto"}),
            ),
            table(
                "Transports of child processes",
                members(SubprocessTransport, methods(asyncio.SubprocessTransport) | {"shutdown"}),
            ),
            table(
                "transports_anyio.testing",
                [
                    row("memory_connection", testing.memory_connection),
                    *(f"| `{each.__name__}` | {first_sentence(each)} |" for each in recorders),
                    "| `Call` | A callback: its name, and behind it its arguments. |",
                ],
            ),
            table("Recorder", members(testing.Recorder), f"Attributes: {', '.join(ATTRIBUTES)}."),
        ]
    )


if __name__ == "__main__":
    (DOCS / "names.md").write_text(page(), encoding="utf-8")
