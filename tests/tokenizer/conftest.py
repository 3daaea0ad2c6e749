from __future__ import annotations

import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from lmchat.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="session")
def measured(fixtures: Path) -> dict[str, Any]:
    """Ranks trained by the reference (base64, in rank order), and its ids of some texts."""
    return json.loads((fixtures / "tokenizer_777.json").read_text())


@pytest.fixture(scope="session")
def tokenizer(measured: dict[str, Any]) -> Tokenizer:
    """768 ranks of the reference and the nine special tokens."""
    return Tokenizer({b64decode(token): rank for rank, token in enumerate(measured["ranks"])})


@pytest.fixture(scope="session")
def c07(oracles: Path) -> dict[str, Any]:
    return json.loads((oracles / "c07_render.json").read_text())
