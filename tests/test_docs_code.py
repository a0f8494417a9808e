"""The documentation is true: every code block of README.md, CONTRIBUTING.md and docs/*.md runs, on every backend.

A page is run from top to bottom.

- A `python` block is run in its place, in one namespace for the page. It may await. What the reader need not see stands
  in a comment, and is run in its place too:

      <!-- python
      assert answer == 42
      -->

- A `python` block under `<!-- file: NAME -->` is saved as NAME, in a folder of the page's own.
- A block under `<!-- needs: MODULE MODULE -->` (above `file`, if it has both) runs where these modules are installed.
- A `console` block has commands (`$ python NAME`, `$ curl URL`) and exactly what they print. A command with `&` stays
  in the background until `kill %1` (`%2` …) or the end of the page; one that prints nothing listens on port 8888, which
  is waited for. Times (`0.03s`) may differ. A file that no command names is run by itself.
- `sh` blocks are commands that change the reader's machine, `text` blocks are pictures: neither runs. There is no other
  language, so no block is left out unnoticed.

`anyio.run` and `run_asyncio` run on the backend under test, whatever the block says, except in `examples/`;
`asyncio.run`, in code "before", on asyncio. Port 8888 is replaced by one that is free.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import anyio
import pytest
from network import unused_port
from support import GUARD, HOST

import transports_anyio
import transports_anyio.testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: How a link begins that leads to a file of this repository.
REPOSITORY = "https://github.com/transports-anyio/transports-anyio/blob/main/"
PROGRAM = Path(__file__).with_name("docs_program.py")
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*ROOT.glob("*.md"), *DOCS.glob("*.md")]}

BLOCK = re.compile(
    r"""
    ^<!--\ python\n (?P<hidden>.*?) ^-->$
    | (?: ^<!--\ needs:\ (?P<needs>[\w\ ]+)\ -->\n )?  (?: ^<!--\ file:\ (?P<file>\S+)\ -->\n )?
      ^(?P<fence>`{3,})(?P<language>[^\n]*)\n (?P<code>.*?) ^(?P=fence)$
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
#: What is not run: see above. What begins with a brace is Sphinx's business.
NOT_RUN = {"sh", "text"}


@dataclass
class Block:
    kind: str
    code: str
    line: int
    hidden: bool
    file: str | None
    needs: str | None

    def can_run(self) -> bool:
        return all(importlib.util.find_spec(module) for module in (self.needs or "").split())


def blocks_of(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        hidden = match["hidden"] is not None
        line = text.count("\n", 0, match.start("hidden" if hidden else "code")) + 1
        kind, code = ("python", match["hidden"]) if hidden else (match["language"], match["code"])
        blocks.append(Block(kind, code, line, hidden, match["file"], match["needs"]))
    return blocks


def has_code(page: str) -> bool:
    return any(block.kind in ("python", "console") for block in blocks_of(page))


@pytest.mark.parametrize("page", list(PAGES))
def test_every_block_is_of_a_known_kind(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    blocks = blocks_of(page)
    for block in blocks:
        assert block.kind in {"python", "console", *NOT_RUN} or block.kind.startswith("{"), (page, block.line)
        assert block.file is None or block.kind == "python", (page, block.line)
    # No block and no marker was missed.
    assert len(re.findall(r"^\s*(?:`{3,}|~{3,})", text, re.MULTILINE)) == 2 * sum(not block.hidden for block in blocks)
    markers = [marker for block in blocks for marker in (block.hidden, block.file, block.needs) if marker]
    generated = re.findall(r"^<!-- (?:begin: python docs/\w+\.py|end) -->$", text, re.MULTILINE)
    assert text.count("<!--") == len(markers) + len(generated)


def normal(output: str) -> list[str]:
    """Return the lines of the output, with all times replaced."""
    return re.sub(r"\d+\.\d+s", "0.00s", output).rstrip().splitlines()


class Terminal:
    """Run the commands of `console` blocks in a folder, and compare their output."""

    def __init__(self, folder: Path, backend: tuple[str, Any], port: int, ending: ExitStack) -> None:
        self.folder = folder
        self.port = port
        self.backend = json.dumps(backend)
        self.ending = ending
        self.jobs: list[subprocess.Popen[str]] = []
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}

    def run(self, block: str) -> None:
        for command in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, expected = command.partition("\n")
            if line.startswith("kill %"):
                self.end(int(line.removeprefix("kill %")))
            elif line.endswith("&"):
                self.start(shlex.split(line[:-1]), normal(expected))
            else:
                self.expect(shlex.split(line), normal(expected))

    def command(self, words: list[str]) -> list[str]:
        if words[0] == "curl":
            return ["curl", "--silent", "--show-error", *words[1:]]
        assert words[0] == "python", words
        if words[1] == "-m" or words[1].startswith("examples/"):
            return [sys.executable, *words[1:]]
        return [sys.executable, "-W", "always::ResourceWarning", str(PROGRAM), self.backend, *words[1:]]

    def expect(self, words: list[str], expected: list[str] | None) -> None:
        done = subprocess.run(
            self.command(words),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=4 * GUARD,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        if expected is not None:
            assert normal(done.stdout) == expected

    def start(self, words: list[str], expected: list[str]) -> None:
        process = subprocess.Popen(
            self.command(words), cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        self.jobs.append(process)
        self.ending.callback(self.end, len(self.jobs))
        guard = threading.Timer(4 * GUARD, process.kill)
        guard.start()
        assert process.stdout is not None
        try:
            printed = [process.stdout.readline().rstrip("\n") for _ in expected]
            if not expected:
                self.wait_until_it_listens(process)
        finally:
            guard.cancel()
            guard.join()
        assert printed == expected

    def wait_until_it_listens(self, process: subprocess.Popen[str]) -> None:
        while True:
            with socket.socket() as sock:
                if not sock.connect_ex((HOST, self.port)):
                    return
            assert process.poll() is None, "ended by itself"
            time.sleep(0.01)

    def end(self, number: int) -> None:
        process = self.jobs[number - 1]
        if process.returncode is None:
            assert process.poll() is None, "ended by itself"
            process.kill()
            process.communicate()


async def run_in_place(blocks: list[Block], page: str, namespace: dict[str, Any], terminal: Terminal) -> None:
    """Run the page's blocks in order: Python in this task, commands in a thread."""
    for block in blocks:
        if block.kind == "console":
            await anyio.to_thread.run_sync(terminal.run, block.code)
        elif block.file is None:
            # Tracebacks show the lines of the page.
            code = compile(
                "\n" * (block.line - 1) + block.code, page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
            )
            waiting = eval(code, namespace)
            if waiting is not None:
                await waiting


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", list(filter(has_code, PAGES)))  # type: ignore[arg-type]
def test_page(page: str, anyio_backend: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    name, options = anyio_backend
    blocks = [block for block in blocks_of(page) if block.kind in ("python", "console") and block.can_run()]
    port = unused_port()
    for block in blocks:
        block.code = block.code.replace("8888", str(port))
    commands = " ".join(block.code for block in blocks if block.kind == "console")
    if "examples/tour.py" in commands:  # It leaves out what is not installed.
        pytest.importorskip("trio")
        pytest.importorskip("uvloop")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in blocks:
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")

    async def run() -> None:
        async with AsyncExitStack() as stack:
            await run_in_place(blocks, page, {"__name__": page, "stack": stack}, terminal)

    with ExitStack() as ending:
        terminal = Terminal(tmp_path, (name, options), port, ending)
        if any(block.kind == "console" or block.file is None for block in blocks):
            anyio.run(run, backend=name, backend_options=options)
        for block in blocks:
            if block.file is not None and block.file not in commands:
                terminal.expect(["python", block.file], None)


@pytest.mark.parametrize("page", list(PAGES))
def test_every_link_has_a_target(page: str) -> None:
    """In the checkout too, where Sphinx does not look. Links to the project's own repository are looked up here."""
    text = PAGES[page].read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    links = {one or two for one, two in targets}
    own = {ROOT / link.removeprefix(REPOSITORY).partition("#")[0] for link in links if link.startswith(REPOSITORY)}
    relative = {PAGES[page].parent / link.partition("#")[0] for link in links if "://" not in link}
    assert {target for target in own | relative if not target.exists()} == set()


def test_the_links_of_the_readme_work_on_a_package_index() -> None:
    """There is no checkout around it there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link and link[0] != "#"] == []


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("[!_]*.py")))
def test_every_example_has_a_docstring_in_the_documentation(example: str) -> None:
    """Its docstring is part of docs/examples.md, which lists every example."""
    docstring = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text(encoding="utf-8")))
    assert docstring
    assert f"| [{example}](../examples/{example}) | " in (DOCS / "examples.md").read_text(encoding="utf-8")
    assert docstring.split("\n\n")[0].endswith((".", ":"))


# -- the reference ----------------------------------------------------------------------------------------


def described_names() -> set[str]:
    """What the reference has an entry for."""
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    entries = re.finditer(
        r"^\.\. (?:auto|py:)(?:class|method|function|data|module):: ([\w.]+).*\n((?:   .*\n)*)", text, re.MULTILINE
    )
    names = set()
    for name, options in (entry.groups() for entry in entries):
        module = re.search(r":module: (\S+)", options)
        names.add(f"{module[1]}.{name}" if module else name)
        members = re.search(r":members: (.*(?:\n {6}.*)*)", options)
        if members:
            names.update(f"{name}.{member}" for member in re.findall(r"\w+", members[1]))
    return names


@pytest.mark.parametrize(
    "module",
    [
        transports_anyio,
        transports_anyio.abc,
        transports_anyio.testing,
        transports_anyio.to_asyncio,
        transports_anyio.from_asyncio,
    ],
)
def test_every_public_name_is_in_the_reference(module: Any) -> None:
    missing = {f"{module.__name__}.{name}" for name in module.__all__} - described_names()
    assert missing == set()


@pytest.mark.parametrize("each", [transports_anyio.TransportGroup(), transports_anyio.Server])
def test_every_attribute_is_in_the_reference(each: Any) -> None:
    name = getattr(each, "__name__", type(each).__name__)
    attributes = {f"transports_anyio.{name}.{attribute}" for attribute in dir(each) if not attribute.startswith("_")}
    assert attributes - described_names() == set()


def script(name: str) -> Any:
    """Import a script of the documentation."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where its dataclasses look up their annotations.
    spec.loader.exec_module(module)
    return module


def test_the_list_of_differences_is_up_to_date() -> None:
    """If it is not: `python docs/list_differences.py`."""
    assert script("list_differences").page() == (DOCS / "differences.md").read_text(encoding="utf-8")


def test_the_list_of_names_is_up_to_date() -> None:
    """If it is not: `python docs/list_names.py`."""
    text = (DOCS / "names.md").read_text(encoding="utf-8")
    assert text == script("list_names").page()
    # A method without a docstring would be left out.
    methods = {name for each in (transports_anyio.TransportGroup, transports_anyio.Server) for name in dir(each)}
    named = {name for name in methods if not name.startswith("_")} | set(transports_anyio.__all__)
    assert {name for name in named if not re.search(rf"^\| `(?:await )?{name}\b", text, re.MULTILINE)} == set()


def resolve(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except AttributeError:  # An attribute that only instances have.
        return None


FUNCTIONS = {name: function for name in sorted(described_names()) if inspect.isroutine(function := resolve(name))}
ENDPOINTS = {
    name: function
    for name, function in FUNCTIONS.items()
    if ".TransportGroup." in name and inspect.iscoroutinefunction(function) and not name.endswith("wait_closed")
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_parameter_is_described(function: Any) -> None:
    docstring = inspect.getdoc(function) or ""
    # Between backticks, or at the beginning of a line of a list: `name, name: ...`.
    quoted = " ".join(a or b for a, b in re.findall(r"`([^`]+)`|^((?:\w+(?:, )?)+): ", docstring, re.MULTILINE))
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    assert [name for name in parameters if not re.search(rf"\b{name}\b", quoted)] == []


@pytest.mark.parametrize("function", ENDPOINTS.values(), ids=ENDPOINTS)
def test_every_endpoint_function_says_what_it_raises_and_where_that_is_specified(function: Any) -> None:
    docstring = inspect.getdoc(function) or ""
    assert re.search(r"\n\nRaises\b", docstring)
    assert "\n\nSource: https://" in docstring


def test_every_module_is_in_the_architecture() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    package = Path(transports_anyio.__file__).parent
    modules = {path.stem for path in package.rglob("*.py")} - {"__init__"}
    assert {module for module in modules if not re.search(rf"`(?:\w+/)?{module}`", text)} == set()


PACKAGE = Path(transports_anyio.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

#: The modules of the standard library that "May know" names, beside layers and packages: those that do I/O.
IO_MODULES = {"asyncio", "os", "select", "selectors", "signal", "socket", "ssl", "subprocess"}
#: Packages that are imported for annotations only.
FOR_TYPES = {"_typeshed", "typing_extensions"}


def imports_of(name: str) -> dict[str, int]:
    """The first component of each name that a module imports, with the number of leading dots."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update((alias.name.partition(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update((each.partition(".")[0], node.level) for each in names)
    return found


def known_by(name: str) -> tuple[set[str], set[str]]:
    """The layers, packages and I/O modules that a module imports, and the other modules of its own folder."""
    depth = name.count("/") + 1
    outside = {
        each
        for each, level in imports_of(name).items()
        if level == depth
        or (level == 0 and each not in FOR_TYPES and (each in IO_MODULES or each not in sys.stdlib_module_names))
    }
    return outside, {each for each, level in imports_of(name).items() if 0 < level < depth}


def layers() -> dict[str, set[str]]:
    """What the modules of each layer import from outside the layer. A layer is a module or a folder."""
    found: dict[str, set[str]] = {}
    for name in MODULES:
        if name != "__init__.py":
            layer = name.partition("/")[0].removesuffix(".py")
            found.setdefault(layer, set()).update(known_by(name)[0] - {layer})
    return found


def test_modules_import_only_lower_layers() -> None:
    """No layer imports one that imports it, not for annotations either."""
    order = [*TopologicalSorter(layers()).static_order()]
    assert {"_core", "_channels", "_endpoints"} < set(order)
    assert {*[each for each in order if each.startswith("_")][-2:]} == {"_group", "_event_loop"}


def test_the_architecture_lists_what_each_layer_imports() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| layer |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)/?` \|[^|]*\|([^|]*)\|$", table, re.MULTILINE)
    assert {layer: set(re.findall(r"`(\w+)`", known)) for layer, known in rows} == layers()


def may_know(name: str) -> set[str] | None:
    """The names after "May know:" in the docstring of a module, if it has such a line."""
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""
    line = re.search(r"^May know: (`.*(?:\n\S.*)*)", docstring, re.MULTILINE)
    return None if line is None else set(re.findall(r"`(\w+)`", line[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if may_know(name) is not None])
def test_a_module_imports_only_what_it_may_know(name: str) -> None:
    """Its docstring names layers, packages, I/O modules, and modules of the same folder."""
    outside, inside = known_by(name)
    assert (outside | inside) - (may_know(name) or set()) == set()


# -- the package ------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_that_is_not_needed() -> None:
    """Only asyncio, for its abstract classes, and nothing that only tests or other programs need."""
    heavy = ["trio", "uvloop", "anyio._backends._asyncio", "pytest", "multiprocessing", "transports_anyio.testing"]
    program = "import sys, transports_anyio; print(*set(sys.argv[1:]) & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program, *heavy],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=4 * GUARD,
        check=True,
    )
    assert done.stdout.split() == []
