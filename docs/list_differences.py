"""Writes the tables of docs/differences.md: `python docs/list_differences.py`.

A row is a marker `@pytest.mark.differs(what, asyncio=..., here=..., why=...)` of the test that shows the difference, or
a `Difference` of `tests/scenarios.py`. The tests are parsed, not run.

The test `test_the_list_of_differences_is_up_to_date` compares what this makes with the page.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "differences.md"
TESTS = DOCS.parent / "tests"

BEGIN = "<!-- begin: python docs/list_differences.py -->\n"
END = "<!-- end -->\n"

#: The sections, and the files or folders of tests that their rows come from, in order.
SECTIONS = {
    "Groups, callbacks and time": [
        "group", "test_error_messages.py", "test_refused_async_functions.py", "scheduling", "test_futures.py",
        "test_unexpected_errors.py",
    ],
    "Streams": [
        "scenarios.py", "test_bulk.py", "test_flow_control.py", "test_set_protocol.py",
        "test_stream_transport.py", "test_write_failures.py",
    ],
    "Connecting and listening": [
        "test_create_connection.py", "test_create_server.py", "test_server.py", "test_plain_event_loop.py",
        "test_adopted_sockets.py", "test_unix.py",
    ],
    "TLS": ["tls", "test_tls_peers.py"],
    "Sending files": ["sendfile/test_sendfile_content.py", "sendfile/test_sendfile_order.py", "sendfile"],
    "Datagrams": ["datagrams/test_datagram_exchange.py", "datagrams", "test_readiness_states.py"],
    "Pipes and child processes": [
        "pipes/test_pipe_reading.py", "pipes/test_pipe_writing.py", "pipes/test_pipe_descriptors.py", "pipes",
        "processes",
    ],
    "The event loop on trio": [
        "event_loop/factory/test_loop_factory_leaving.py", "event_loop/factory/test_loop_factory_ctrl_c.py",
        "event_loop",
    ],
}  # fmt: skip
HEAD = "| what | asyncio | here | why | shown by |\n| --- | --- | --- | --- | --- |\n"


@dataclass
class Row:
    what: str
    file: str = ""
    cells: list[str] = field(default_factory=list)
    tests: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        links = ", ".join(f'[test](../tests/{file} "{test}")' for file, test in self.tests)
        return f"| {' | '.join([self.what, *self.cells, links])} |\n"


def arguments(call: ast.Call) -> tuple[list[str], dict[str, ast.expr]]:
    return [ast.literal_eval(each) for each in call.args], {each.arg or "": each.value for each in call.keywords}


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call, str]]:
    """What differs, the call that has the cells, and the test."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for each in node.decorator_list:
                if isinstance(each, ast.Call) and ast.unparse(each.func) == "pytest.mark.differs":
                    yield arguments(each)[0][0], each, node.name
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key and isinstance(value, ast.Call) and ast.unparse(value.func) == "Difference":
                    what = ast.literal_eval(key)
                    yield what, value, f"test_difference[{what}]"


def rows() -> dict[str, Row]:
    """Every difference by what differs, in the order in which the files describe them."""
    found: dict[str, Row] = {}
    for path in sorted(TESTS.rglob("*.py")):
        file = path.relative_to(TESTS).as_posix()
        for what, call, test in calls(ast.parse(path.read_text(encoding="utf-8"))):
            row = found.setdefault(what, Row(what))
            row.tests.append(("test_differential.py" if file == "scenarios.py" else file, test))
            given = arguments(call)[1]
            if given:
                if row.cells:
                    raise ValueError(f"{what!r} is described twice, in {row.file} and {file}")
                row.file = file
                found[what] = found.pop(what)  # Its place is that of its description.
                row.cells = [ast.literal_eval(given[name]) for name in ("asyncio", "here", "why")]
    for row in found.values():
        if not row.cells:
            raise ValueError(f"{row.what!r} is described by no test")
    return found


def tables() -> str:
    left = rows()
    text = ""
    for title, files in SECTIONS.items():
        text += f"\n## {title}\n\n{HEAD}"
        for file in files:
            for what in [what for what, row in left.items() if row.file == file or row.file.startswith(f"{file}/")]:
                text += str(left.pop(what))
    if left:
        raise ValueError(f"no section has the file of {[*left.values()]}")
    return f"{text}\n"


def page() -> str:
    """The page, with what is between the two comments replaced."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
