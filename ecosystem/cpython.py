"""Run test modules of `test.test_asyncio`, the running Python's own, with our event loop in place of asyncio's.

    python cpython.py [--asyncio] [--not-run NAMES] test_tasks test_streams …

Nothing of them is copied or changed: before they are imported, `asyncio.SelectorEventLoop` becomes the loop under test,
and the default policy makes it, which is what `asyncio.new_event_loop` asks. With `--asyncio` they are left alone.
NAMES, `Class.test` separated by commas, are left out; in them `*` stands for anything.

For each test there is a line of JSON when it begins, and one when it has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import fnmatch
import importlib
import json
import sys
import traceback
import unittest
import warnings
from typing import Any

from transports_anyio import EventLoop

#: In seconds; a test that takes longer hangs, and the process ends with every thread's stack.
GUARD_OF_A_TEST = 20


class LoopUnderTest(EventLoop):
    """Takes a selector, as asyncio's, and does not need it."""

    def __init__(self, selector: Any = None) -> None:
        super().__init__()


def replace_event_loop() -> None:
    """Let asyncio make our event loop wherever it would make the selector loop."""
    asyncio.SelectorEventLoop = LoopUnderTest  # type: ignore[assignment,misc]
    if sys.version_info >= (3, 13):
        asyncio.EventLoop = LoopUnderTest  # type: ignore[assignment,misc]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.DefaultEventLoopPolicy._loop_factory = LoopUnderTest


def say(**what: object) -> None:
    print(json.dumps(what), file=sys.__stdout__, flush=True)


class Result(unittest.TestResult):
    """Says how each test has ended: the worst of the test and its subtests."""

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802  # unittest's name
        super().startTest(test)
        self.outcome, self.details = "passed", ""
        # trio's thread stays for a while. It is there before the test, or the test waits for its end.
        asyncio.run(asyncio.sleep(0.0001), loop_factory=EventLoop)
        faulthandler.dump_traceback_later(GUARD_OF_A_TEST, exit=True)
        say(began=test.id())

    def stopTest(self, test: unittest.TestCase) -> None:  # noqa: N802  # unittest's name
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        say(test=test.id(), outcome=self.outcome, details=self.details)

    def _bad(self, err: Any) -> None:
        self.outcome = "failed"
        self.details = "".join(traceback.format_exception(*err))

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802  # unittest's name
        if isinstance(test, unittest.TestCase):
            self._bad(err)
        else:  # A class or module could not be set up.
            say(test=str(test), outcome="failed", details="".join(traceback.format_exception(*err)))

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802  # unittest's name
        self._bad(err)

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:  # noqa: N802  # unittest's name
        if err is not None:
            self._bad(err)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802  # unittest's name
        self.outcome, self.details = "skipped", reason

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802  # unittest's name
        self.outcome = "skipped"


def without(tests: unittest.TestSuite, names: set[str]) -> unittest.TestSuite:
    kept = unittest.TestSuite()
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            kept.addTest(without(test, names))
        elif not any(fnmatch.fnmatchcase(".".join(test.id().split(".")[-2:]), name) for name in names):
            kept.addTest(test)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--asyncio", action="store_true")
    parser.add_argument("--not-run", default="")
    parser.add_argument("modules", nargs="+")
    options = parser.parse_args()
    if not options.asyncio:
        replace_event_loop()
    for name in options.modules:
        module = importlib.import_module(f"test.test_asyncio.{name}")
        tests = without(unittest.defaultTestLoader.loadTestsFromModule(module), set(options.not_run.split(",")))
        tests.run(Result())


if __name__ == "__main__":
    main()
