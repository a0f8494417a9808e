"""Ctrl-C while a task is about to wait: the group still ends in order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from network import run_program
from support import Stack

pytestmark = [pytest.mark.anyio, pytest.mark.ours_only("the other process uses a group")]


@pytest.mark.parametrize(
    "where",
    [
        "serve_forever",
        "wait_closed of the server",
        "wait_closed of the group",
        "leaving",
        "sendfile",
        "handshake",
        "start_tls",
    ],
)
async def test_interrupted_between_registering_and_waiting(stack: Stack, where: str) -> None:
    if stack.name != "trio":
        pytest.skip("only trio interrupts a task there")
    output = await run_program(sys.executable, str(Path(__file__).with_name("interrupted.py")), where)
    *before, last = output.decode().splitlines()
    assert last == "KeyboardInterrupt"
    assert set(before) == {"connection_lost"}


@pytest.mark.parametrize("where", ["aborting", "losing"])
async def test_interrupted_while_everything_is_aborted(stack: Stack, where: str) -> None:
    if stack.name != "trio":
        pytest.skip("only trio interrupts a task there")
    output = await run_program(sys.executable, str(Path(__file__).with_name("interrupted.py")), where)
    assert output.decode().split() == ["connection_lost", "KeyboardInterrupt"]
