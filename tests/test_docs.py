"""The documentation names tests as evidence; these tests must exist."""

from __future__ import annotations

import re
from pathlib import Path

from scenarios import DIFFERENCES, SCENARIOS

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PARAMETERS = {
    "test_scenario": {scenario.name for scenario in SCENARIOS},
    "test_difference": set(DIFFERENCES),
}


def all_tests() -> set[str]:
    return {name for file in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}


def named_tests(text: str) -> list[str]:
    """Every test between backticks, one or two."""
    return [two or one for two, one in re.findall(r"``(test_.+?)``|`(test_[^`]+)`", text)]


def exists(test: str, tests: set[str]) -> bool:
    function, _, parameter = test.partition("[")
    if function.endswith("…"):  # All tests with this prefix.
        return any(each.startswith(function[:-1]) for each in tests)
    return function in tests and (not parameter or parameter.removesuffix("]") in PARAMETERS[function])


def test_every_row_names_tests_that_exist() -> None:
    tests = all_tests()
    rows = [line for line in (DOCS / "proof.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| what ", "| ---"))]
    assert rows
    assert [row for row in rows if not named_tests(row.rsplit(" | ", 1)[1])] == []
    assert [test for row in rows for test in named_tests(row) if not exists(test, tests)] == []


def test_every_link_to_a_test_leads_to_its_file() -> None:
    """`[words](../tests/test_x.py "test_y")`."""
    links = re.findall(r'\(\.\./tests/(\S+) "([^"]+)"\)', (DOCS / "differences.md").read_text())
    assert links
    for file, test in links:
        assert f"def {test.partition('[')[0]}(" in (TESTS / file).read_text(), test
