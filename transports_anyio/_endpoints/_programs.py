"""Programs, as users name them, found along `PATH` and started.

May know: `os`, `subprocess`. Knows nothing of what becomes of a child.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

# With these the child looks for its program in other places than we would, or has other rights there.
SEARCH_OPTIONS = {"executable", "shell", "env", "cwd", "user", "group", "extra_groups", "preexec_fn"}


@lru_cache
def candidates(program: str, directories: str) -> tuple[str, ...]:
    """Return the paths that `program` may have, in the order of the search."""
    return tuple(os.path.join(each, program) for each in dict.fromkeys(directories.split(os.pathsep)))  # noqa: PTH118


def find_program(program: object) -> str | None:
    """Return the path of `program`, the first file along `PATH` that we may run; `None` leaves the search to `Popen`.

    What can be no name of a program is left to `Popen` too, which raises the right error.
    """
    if isinstance(program, str) and os.sep not in program and os.access in os.supports_effective_ids:
        with suppress(ValueError):  # A NUL, or a character that no path can have.
            for path in candidates(program, os.environ.get("PATH", os.defpath)):
                # By the rights that count for running it, or else we might pass over the right one. The directories of
                # `PATH` are found by `""` and `"."`, and may be searched, which is the same right.
                if os.access(path, os.X_OK, effective_ids=True) and not os.path.isdir(path):  # noqa: PTH112
                    return path
    return None


def start_program(args: Any, options: dict[str, Any]) -> subprocess.Popen[Any]:
    """Return the `Popen` of a child that runs `args`.

    `Popen` makes a list of all the paths that the program may have, for the child to try: that costs more than to look
    for it. Where it cannot be run after all (its interpreter is missing, say), the child tries them one by one.
    """
    start: Callable[..., subprocess.Popen[Any]] = partial(subprocess.Popen, args, bufsize=0, **options)
    if SEARCH_OPTIONS.isdisjoint(options):
        path = find_program(args[0])
        if path is not None:
            with suppress(OSError):
                return start(executable=path)
    return start()
