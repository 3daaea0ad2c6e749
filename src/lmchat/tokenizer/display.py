"""Tokens made visible in a terminal."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from lmchat.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = ("black on cyan", "black on yellow", "black on green", "black on magenta")


def colored_tokens(tokenizer: Tokenizer, ids: list[int]) -> Text:
    """Each token's text in a color of its own, followed by its id."""
    from rich.text import Text

    line = Text()
    for token, style in zip(ids, cycle(_STYLES), strict=False):
        line.append(visible(tokenizer.decode_bytes([token])), style=style).append(f" {token}  ", style="dim")
    return line


def visible(token: bytes) -> str:
    """A token's bytes with whitespace and incomplete characters made visible."""
    text = token.decode("utf-8", errors="backslashreplace")
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
