"""A server for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from live_server import LiveServer, live_server, tiny_engine


@pytest.fixture(scope="package")
def live() -> Iterator[LiveServer]:
    """A server without a token, with 8 running and 256 waiting completions."""
    with live_server(tiny_engine()) as live:
        yield live
