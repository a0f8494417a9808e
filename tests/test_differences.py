"""The table of differences names a test for each, and each of these exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = (HERE.parent / "docs" / "differences.md").read_text(encoding="utf-8")
TESTS = {
    name
    for path in HERE.glob("test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith(("| what ", "| ---"))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_every_difference_has_a_test_that_exists(row: str) -> None:
    named = re.findall(r"`(test_\w+)(…?)`", row.rsplit("|", 2)[1])
    assert named, row
    for name, is_prefix in named:
        assert name in TESTS or (is_prefix and any(test.startswith(name) for test in TESTS)), name
