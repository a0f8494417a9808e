"""Python's own tests of asyncio, with our event loop in place of asyncio's selector loop.

`cpython.toml` lists the tests that fail, each with its reason. It is held in both directions: a test that is not listed
must pass, and a test that is listed must exist and fail.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.specifiers import SpecifierSet

HERE = Path(__file__).parent
#: In seconds, for one module. Each of its tests has a guard of its own.
GUARD_OF_A_MODULE = 600
#: In seconds, for a test of which is known that it fails or hangs.
GUARD_APART = 5
#: How often such a test may pass before it is taken off the list.
TRIES = 10

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

Lists = dict[str, list[str]]


def read_lists() -> tuple[Lists, Lists]:
    """The patterns of each module that this Python has: of tests that fail, and of those that run apart."""
    document = tomllib.loads((HERE / "cpython.toml").read_text())
    apart = document.pop("apart")
    return for_this_python(document), for_this_python(apart)


def for_this_python(lists: dict[str, dict[str, Any]]) -> Lists:
    def holds(entry: str | dict[str, str]) -> bool:
        if isinstance(entry, str):  # A reason alone.
            return True
        return SpecifierSet(entry["python"]).contains(platform.python_version(), prereleases=True)

    assert set(lists) <= set(MODULES)
    return {module: [name for name, entry in entries.items() if holds(entry)] for module, entries in lists.items()}


FAIL, APART = read_lists()


@pytest.fixture(autouse=True)
def _on_trio_only(backend: Any) -> None:
    if backend.name != "trio":
        pytest.skip("asyncio's own event loop, which has these tests already")
    if importlib.util.find_spec("test.test_asyncio") is None:
        pytest.skip("this Python has come without its tests")


@pytest.mark.parametrize("trio", [False, True], ids=["before trio runs", "while trio runs"])
@pytest.mark.parametrize("module", MODULES)
def test_module(module: str, trio: bool) -> None:
    """Each test passes, or fails as is expected of it: an unexpected pass is an error, too.

    Some of these tests have time-outs of 0.1 s, which a busy machine exceeds: what went wrong runs once more, as
    Python's own runner does with `--rerun`.
    """
    if importlib.util.find_spec(f"test.test_asyncio.{module}") is None:
        pytest.skip("not a module of this Python")
    if unexpected(module, trio):
        assert unexpected(module, trio) == {}


def unexpected(module: str, trio: bool) -> dict[str, str]:
    """Run `module`; return what is not as expected, by test or pattern."""
    outcomes, ended = run(module, trio=trio, without=APART.get(module, []))
    if ended.returncode != 0 or not outcomes:
        return {module: ended.stdout[-1000:] + ended.stderr}
    patterns = FAIL.get(module, [])
    failed = names(outcomes, "failed")
    listed = matching(set(outcomes), patterns)
    return {
        **{name: outcomes[name]["details"] for name in failed - listed},
        **dict.fromkeys(listed - failed - names(outcomes, "skipped"), "passed unexpectedly"),
        **{pattern: "no test has this name" for pattern in patterns if not fnmatch.filter(outcomes, pattern)},
    }


@pytest.mark.parametrize(("module", "pattern"), [(module, pattern) for module in APART for pattern in APART[module]])
def test_what_hangs_or_fails_by_chance(module: str, pattern: str) -> None:
    """One of the tests that the pattern names fails or hangs, if not at once, then at one of several tries."""
    for _ in range(TRIES):
        outcomes, ended = run(module, only=[pattern], without=FAIL.get(module, []), guard=GUARD_APART)
        hangs = ended.returncode != 0 and "Timeout (" in ended.stderr
        if hangs or names(outcomes, "failed"):
            return
        assert names(outcomes, "passed"), "no test has this name"
    pytest.fail("passed unexpectedly")


def names(outcomes: dict[str, Any], outcome: str) -> set[str]:
    return {name for name, report in outcomes.items() if report["outcome"] == outcome}


def matching(tests: set[str], patterns: list[str]) -> set[str]:
    return {name for name in tests if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def run(module: str, **options: Any) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Run a module in a process of its own; return what came out of each test, and how the process ended."""
    argv = [sys.executable, "-W", "ignore", str(HERE / "cpython.py")]
    for option, value in options.items():
        if value is True:
            argv.append(f"--{option}")
        elif value:
            argv.append(f"--{option}={','.join(value) if isinstance(value, list) else value}")
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    ended = subprocess.run(
        [*argv, module], check=False, capture_output=True, text=True, timeout=GUARD_OF_A_MODULE, env=environment
    )
    outcomes: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        if line.startswith("{"):
            report = json.loads(line)
            if "test" in report:
                outcomes[".".join(report["test"].split(".")[-2:])] = report
    return outcomes, ended
