"""The endpoint functions have asyncio's parameters: names, kinds, defaults and order."""

from __future__ import annotations

import asyncio
import inspect
import sys

import pytest

from transports_anyio import TransportGroup

FUNCTIONS = [
    "connect_accepted_socket",
    "create_connection",
    "create_server",
    "create_unix_connection",
    "create_unix_server",
    "sendfile",
]


def parameters(function: object) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


@pytest.mark.skipif(sys.version_info < (3, 13), reason="the parameters are those of Python 3.13")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name: str) -> None:
    expected = parameters(getattr(asyncio.SelectorEventLoop, name))
    ours = parameters(getattr(TransportGroup, name))
    positional = [each for each in expected if each[1] is not inspect.Parameter.KEYWORD_ONLY]
    assert ours[: len(positional)] == positional
    assert {each[0]: each for each in ours} == {each[0]: each for each in expected}
