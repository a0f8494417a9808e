"""Fixtures for the tests of TLS: the TLS version, and the kind of recorder."""

from __future__ import annotations

from typing import Any

import pytest
from support import (
    Recorder,
)
from tls_support import (
    VERSIONS,
    ViewRecorder,
)


@pytest.fixture(params=list(VERSIONS))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[Recorder, ViewRecorder], ids=["protocol", "buffered"])
def recorder(request: pytest.FixtureRequest) -> type[Any]:
    kind: type[Any] = request.param
    return kind
