"""How Sphinx builds this site: `nox -s docs`. Nothing here needs the network."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "transports_anyio"
author = "the transports_anyio authors"
project_copyright = author
# A `Transport` is one of asyncio's or of `transports_anyio.abc`, which derives from it: either target is right.
suppress_warnings = ["ref.python"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_heading_anchors = 3

# Docstrings write `code` as Markdown does.
default_role = "code"
add_module_names = False
# asyncio's own docstrings are asyncio's to publish.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def list_examples(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put every example into the page of the examples: what its docstring says, and the program."""
    if docname != "examples":
        return
    for path in sorted((ROOT / "examples").glob("[!_]*.py")):
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        program = f"```{{literalinclude}} ../examples/{path.name}\n:language: python\n```"
        source[0] += f"\n## {path.name}\n\n{summary}\n\n{program}\n"


#: How an item of a plain list of parameters begins: `name, name: what it is`. Further lines of it are indented.
ITEM = re.compile(r"((?:[a-z_]\w*|\.\.\.)(?:, (?:[a-z_]\w*|\.\.\.))*): ")


def format_parameters(
    _app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Turn plain lists of parameters into lists of Sphinx's, in place."""
    inside = False
    for number, line in enumerate(lines):
        if (item := ITEM.match(line)) and (inside or not number or not lines[number - 1]):
            inside = True
            lines[number] = f"- `{item[1]}`: {line[item.end() :]}"
        elif inside and line.startswith("    "):
            lines[number] = f"  {line.lstrip()}"
        else:
            inside = False


def separate_lists(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Put an empty line before each list, in place: docutils needs one, readers of the source do not."""
    for number in range(len(lines) - 1, 0, -1):
        before = lines[number - 1]
        if lines[number].startswith("- ") and before and not before.startswith(("- ", "  ")):
            lines.insert(number, "")


def setup(app: Sphinx) -> None:
    app.connect("source-read", list_examples)
    app.connect("autodoc-process-docstring", format_parameters)
    app.connect("autodoc-process-docstring", separate_lists)
