"""Run test modules of `test.test_asyncio`, the running Python's own, with our event loop in place of asyncio's.

    python cpython.py [--asyncio] [--trio] [--only NAMES] [--without NAMES] [--guard SECONDS] test_tasks test_streams …

Nothing of them is copied or changed: before they are imported, `asyncio.SelectorEventLoop` becomes the loop under test,
and the default policy makes it, which is what `asyncio.new_event_loop` asks. With `--asyncio` they are left alone. With
`--trio` trio runs from the beginning of each call of the event loop on, as after the first call of backend code.
NAMES are `Class.test`, separated by commas; in them `*` stands for anything.

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


class LoopUnderTest(EventLoop):
    """Takes a selector, as asyncio's, and does not need it."""

    with_trio = False

    def __init__(self, selector: Any = None) -> None:
        super().__init__()

    def _check_may_run(self) -> None:
        super()._check_may_run()
        if self.with_trio:
            self._core.ready.appendleft(self._core.need_trio)


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

    def __init__(self, guard: float) -> None:
        super().__init__()
        self.guard = guard

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802  # unittest's name
        super().startTest(test)
        self.outcome, self.details = "passed", ""
        # trio's thread stays for a while. It is there before the test, or the test waits for its end.
        loop = LoopUnderTest()
        loop.run_until_complete(asyncio.sleep(0.0001))
        loop.close()
        faulthandler.dump_traceback_later(self.guard, exit=True)
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


def chosen(tests: unittest.TestSuite, only: list[str], without: list[str]) -> unittest.TestSuite:
    """The tests that one of `only` names, if it names any, and none of `without`."""
    kept = unittest.TestSuite()
    for test in tests:
        if isinstance(test, unittest.TestSuite):
            kept.addTest(chosen(test, only, without))
        else:
            name = ".".join(test.id().split(".")[-2:])
            if matches(name, only or ["*"]) and not matches(name, without):
                kept.addTest(test)
    return kept


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def names(given: str) -> list[str]:
    return given.split(",")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--asyncio", action="store_true")
    parser.add_argument("--trio", action="store_true")
    parser.add_argument("--only", type=names, default=[])
    parser.add_argument("--without", type=names, default=[])
    parser.add_argument("--guard", type=float, default=20, help="seconds; a test that takes longer ends the process")
    parser.add_argument("modules", nargs="+")
    options = parser.parse_args()
    LoopUnderTest.with_trio = options.trio
    if not options.asyncio:
        replace_event_loop()
    for name in options.modules:
        module = importlib.import_module(f"test.test_asyncio.{name}")
        tests = unittest.defaultTestLoader.loadTestsFromModule(module)
        chosen(tests, options.only, options.without).run(Result(options.guard))


if __name__ == "__main__":
    main()
