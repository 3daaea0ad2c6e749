"""What every test shares: the oracle folder where it is at hand, one thread per test process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _shared(folder: str, variable: str) -> Path:
    path = Path(os.environ.get(variable) or REPOSITORY.parent / "shared" / folder)
    if not path.is_dir():
        pytest.skip(f"no {folder} folder; set {variable} to run this test")
    return path


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Measured inputs and outputs of the reference implementation."""
    return _shared("oracles", "LMCHAT_ORACLES")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text, conversations and tasks."""
    return _shared("data", "LMCHAT_SHARED_DATA")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small committed numeric fixtures."""
    return Path(__file__).parent / "fixtures"
