"""Writes tiktoken's rank files, which lmchat reads only."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from lmchat.tokenizer.bpe import Tokenizer


def write_ranks(path: Path, tokenizer: Tokenizer) -> Path:
    """Writes a token in base64 and its rank per line; returns the path."""
    lines = (f"{b64encode(token).decode()} {rank}\n" for token, rank in tokenizer.ranks.items())
    path.write_text("".join(lines), encoding="ascii")
    return path
