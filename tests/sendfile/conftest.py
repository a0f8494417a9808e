"""A fixture for the tests of `sendfile`: the TLS context of a server."""

from __future__ import annotations

import ssl

import pytest
import trustme


@pytest.fixture
def server_context(certificate_authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate_authority.issue_cert("localhost").configure_cert(context)
    return context
