"""Helpers for the tests of scheduling: the ways to schedule a callback, and a group that counts its iterations."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import pytest

from transports_anyio import TransportGroup
from transports_anyio._core import Core

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def scheduler(group: Any, name: str) -> Callable[..., Any]:
    """Return `call_soon` or a similar method, with the time filled in."""
    if name == "call_later":
        return lambda callback, *args, **options: group.call_later(0.01, callback, *args, **options)
    if name == "call_at":
        return lambda callback, *args, **options: group.call_at(group.time() + 0.01, callback, *args, **options)
    method: Callable[..., Any] = getattr(group, name)
    return method


every_scheduler = pytest.mark.parametrize("name", ["call_soon", "call_soon_threadsafe", "call_later", "call_at"])


class CountingCore(Core):
    def run_once(self) -> float:
        self.group.iterations += 1  # type: ignore[attr-defined]
        return super().run_once()


class CountingGroup(TransportGroup):
    """A group that counts its iterations."""

    iterations = 0

    def __init__(self) -> None:
        super().__init__()
        self._core = CountingCore(self)
