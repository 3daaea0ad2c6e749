"""Where lmchat keeps its files."""

from __future__ import annotations

import os
from pathlib import Path


def base_dir() -> Path:
    """The folder for tokenizer, data and checkpoints: ``$LMCHAT_BASE_DIR``, by default ``~/.cache/lmchat``."""
    return Path(os.environ.get("LMCHAT_BASE_DIR") or "~/.cache/lmchat").expanduser()


def tokenizer_dir() -> Path:
    """The folder of the trained tokenizer."""
    return base_dir() / "tokenizer"


def base_data_dir() -> Path:
    """The folder of the pretraining shards and their token files."""
    return base_dir() / "base_data"
