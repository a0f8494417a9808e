"""Run a program of the documentation on a given backend.

    python docs_program.py BACKEND PROGRAM [ARGUMENT ...]

`anyio.run`, and `run_asyncio`, which calls it, get BACKEND, whatever the program asks for. `asyncio.run` stays what it
is.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import anyio

name, options = json.loads(sys.argv[1])
anyio_run = anyio.run


def run(function: Any, *args: Any, **_ignored: Any) -> Any:
    return anyio_run(function, *args, backend=name, backend_options=options)


anyio.run = run  # type: ignore[assignment]
sys.argv = sys.argv[2:]
# As `python PROGRAM` does.
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
