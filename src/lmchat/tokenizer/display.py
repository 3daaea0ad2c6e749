"""Colored display of tokens in a terminal."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from lmchat.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = ("black on cyan", "black on yellow", "black on green", "black on magenta")
_WHITESPACE = {" ": "·_", "\n": ("⏎", r"\n"), "\t": ("⇥", r"\t"), "\r": ("␍", r"\r")}


def colored_tokens(tokenizer: Tokenizer, ids: list[int], encoding: str = "utf-8") -> Text:
    """The tokens in alternating colors, each followed by its id; characters that ``encoding`` lacks are escaped."""
    from rich.text import Text

    line = Text()
    for token, style in zip(ids, cycle(_STYLES), strict=False):
        text = visible(tokenizer.decode_bytes([token]), encoding)
        line.append(text, style=style).append(f" {token}  ", style="dim")
    return line


def visible(token: bytes, encoding: str = "utf-8") -> str:
    """Text of a token with visible whitespace and escapes for incomplete characters."""
    text = token.decode("utf-8", errors="backslashreplace")
    for character, marks in _WHITESPACE.items():
        text = text.replace(character, next(mark for mark in marks if _can_encode(mark, encoding)))
    return text.encode(encoding, errors="backslashreplace").decode(encoding)


def _can_encode(text: str, encoding: str) -> bool:
    return text.encode(encoding, errors="ignore") != b""
