"""The endpoint functions have asyncio's parameters: names, kinds, defaults and order."""

from __future__ import annotations

import asyncio
import inspect
import sys

import pytest

from transports_anyio import TransportGroup

FUNCTIONS = [
    "call_at",
    "call_exception_handler",
    "call_later",
    "call_soon",
    "call_soon_threadsafe",
    "connect_accepted_socket",
    "connect_read_pipe",
    "connect_write_pipe",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "create_unix_connection",
    "create_unix_server",
    "default_exception_handler",
    "get_exception_handler",
    "sendfile",
    "set_exception_handler",
    "start_tls",
    "subprocess_exec",
    "subprocess_shell",
    "time",
]

#: Our own parameters.
ADDED = {
    "create_server": {"max_connections", "max_handshakes"},
    "create_unix_server": {"max_connections", "max_handshakes"},
    "start_tls": {"received"},
}

#: Parameters of which asyncio accepts one value only; we take them among the other options.
AMONG_OPTIONS = {"universal_newlines", "shell", "bufsize", "encoding", "errors", "text"}


def parameters(function: object) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [
        ("**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name, parameter.kind, parameter.default)
        for parameter in found
    ]


@pytest.mark.skipif(sys.version_info < (3, 13), reason="the parameters are those of Python 3.13")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature(name: str) -> None:
    expected = parameters(getattr(asyncio.SelectorEventLoop, name))
    if name.startswith("subprocess_"):
        expected = [each for each in expected if each[0] not in AMONG_OPTIONS]
    ours = [each for each in parameters(getattr(TransportGroup, name)) if each[0] not in ADDED.get(name, ())]
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    positional = [each for each in expected if each[1] not in by_name]
    assert ours[: len(positional)] == positional
    assert {each[0]: each for each in ours} == {each[0]: each for each in expected}
