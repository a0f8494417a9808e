"""Find programs along `PATH`, and start them.

Holds: the search, which is faster than `Popen`'s.
May know: `os`, `subprocess`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

# With these options the child searches in other directories, or has other permissions.
SEARCH_OPTIONS = {"executable", "shell", "env", "cwd", "user", "group", "extra_groups", "preexec_fn"}


@lru_cache
def candidates(program: str, directories: str) -> tuple[str, ...]:
    """Return the paths to search for `program`, in order."""
    return tuple(os.path.join(each, program) for each in dict.fromkeys(directories.split(os.pathsep)))  # noqa: PTH118


def find_program(program: object) -> str | None:
    """Return the first executable file called `program` along `PATH`, or `None` to let `Popen` search.

    `Popen` also raises the error for an object that cannot be a program.
    """
    if isinstance(program, str) and os.sep not in program and os.access in os.supports_effective_ids:
        with suppress(ValueError):  # A NUL character, or one that paths cannot contain.
            for path in candidates(program, os.environ.get("PATH", os.defpath)):
                # By the effective IDs, which are used to run it. `X_OK` is also true for a directory that may be
                # searched: `program` may be "" or ".", or the name of a directory.
                if os.access(path, os.X_OK, effective_ids=True) and not os.path.isdir(path):  # noqa: PTH112
                    return path
    return None


def start_program(args: Any, options: dict[str, Any]) -> subprocess.Popen[Any]:
    """Start a child that runs `args`, and return its `Popen`.

    `Popen` lets the child try each directory of `PATH`, which costs more than the search here. If the file that was
    found cannot be run (its interpreter is missing, for example), `Popen` searches.
    """
    start: Callable[..., subprocess.Popen[Any]] = partial(subprocess.Popen, args, bufsize=0, **options)
    if SEARCH_OPTIONS.isdisjoint(options):
        path = find_program(args[0])
        if path is not None:
            with suppress(OSError):
                return start(executable=path)
    return start()
