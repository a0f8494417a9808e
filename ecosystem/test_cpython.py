"""Python's own tests of asyncio, with our event loop in place of asyncio's selector loop."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib

HERE = Path(__file__).parent
EXPECTED = tomllib.loads((HERE / "cpython.toml").read_text())
NOT_RUN = EXPECTED.pop("not_run")
#: In seconds, for one module.
GUARD_OF_A_MODULE = 180

MODULES = [
    "test_buffered_proto",
    "test_context",
    "test_eager_task_factory",
    "test_events",
    "test_futures",
    "test_futures2",
    "test_locks",
    "test_pep492",
    "test_protocols",
    "test_queues",
    "test_runners",
    "test_sendfile",
    "test_server",
    "test_sock_lowlevel",
    "test_ssl",
    "test_staggered",
    "test_streams",
    "test_subprocess",
    "test_taskgroups",
    "test_tasks",
    "test_threads",
    "test_timeouts",
    "test_transports",
    "test_unix_events",
    "test_waitfor",
]


@pytest.mark.parametrize("module", MODULES)
def test_module(module: str, backend: Any) -> None:
    """Each test passes, or fails as is expected of it: an unexpected pass is an error, too."""
    if backend.name != "trio":
        pytest.skip("asyncio's own event loop, which has these tests already")
    if sys.version_info[:2] != (3, 13):
        pytest.skip("cpython.toml is about the tests of Python 3.13")
    if importlib.util.find_spec("test.test_asyncio") is None:
        pytest.skip("this Python has come without its tests")
    outcomes, stderr = run(module)
    expected = EXPECTED.get(module, {})
    failed = {name for name, outcome in outcomes.items() if outcome["outcome"] == "failed"}
    may_fail = {name for name in outcomes if any(fnmatch.fnmatchcase(name, pattern) for pattern in expected)}
    assert {name: outcomes[name]["details"] for name in failed - may_fail} == {}, stderr
    assert may_fail - failed == set(), "passed unexpectedly"
    unknown = {pattern for pattern in expected if not fnmatch.filter(outcomes, pattern)}
    assert unknown == set(), "no test has this name"


def run(module: str) -> tuple[dict[str, Any], str]:
    """Run a module in a process of its own; what came out of each test, and what was written to standard error."""
    not_run = ",".join(NOT_RUN)
    argv = [sys.executable, "-W", "ignore", str(HERE / "cpython.py"), "--not-run", not_run, module]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=GUARD_OF_A_MODULE)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    outcomes: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            report = json.loads(line)
            if "test" in report:
                outcomes[".".join(report["test"].split(".")[-2:])] = report
    assert outcomes
    return outcomes, done.stderr
