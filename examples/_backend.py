"""What the examples share: the choice of a backend on the command line, and a quiet end on Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

#: The arguments of `anyio.run` for each choice.
BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backend", choices=list(BACKENDS), default="asyncio", help="what to run on")
    parser.add_argument("--host", default="127.0.0.1", help="address of the server")
    parser.add_argument("--port", type=int, default=8888, help="port of the server")
    return parser


def run(backend: str, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Run an async function on one of the backends; Ctrl-C ends it without a traceback."""
    try:
        anyio.run(function, *arguments, **BACKENDS[backend])
    except KeyboardInterrupt:
        pass
    except asyncio.CancelledError:  # how AnyIO's asyncio backend ends on Ctrl-C where a task has no `uncancel`
        if sys.version_info >= (3, 11):
            raise
    except BaseExceptionGroup as group:  # task groups may have wrapped it
        _, others = group.split(KeyboardInterrupt)
        if others is not None:
            raise others from None
