"""Bytes per token of a tokenizer, compared with GPT-2's and GPT-4's encodings, and by script."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lmchat.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    import regex
    import tiktoken
    from rich.table import Table

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""Column title and name of the encoding in tiktoken."""

DOWNLOAD_TIMEOUT_SECONDS = 20

SCRIPTS = (
    "Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Gurmukhi",
    "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Myanmar", "Khmer", "Tibetan",
    "Ethiopic", "Hangul", "Hiragana", "Katakana", "Han",
)  # fmt: skip
"""Unicode scripts that are distinguished; others are not counted."""

POOR_BYTES_PER_TOKEN = 1.5
"""Below this, a script is encoded almost byte by byte."""


def load_baselines() -> dict[str, tiktoken.Encoding]:
    """The encodings of `BASELINES` by title, as far as they are in tiktoken's cache or arrive within the timeout."""
    import tiktoken

    loaded: dict[str, tiktoken.Encoding] = {}

    def load() -> None:
        for title, name in BASELINES.items():
            with contextlib.suppress(OSError, ValueError):
                loaded[title] = tiktoken.get_encoding(name)

    # tiktoken downloads without a timeout.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT_SECONDS)
    return dict(loaded)


def compression_table(
    tokenizer: Tokenizer, texts: Mapping[str, str], baselines: Mapping[str, tiktoken.Encoding]
) -> Table:
    """Table of bytes per token of texts by kind, compared with the baselines by title; empty texts are left out."""
    from rich.table import Table

    table = Table("text", title="bytes per token (more is better)")
    sizes = {"ours": tokenizer.vocab_size, **{title: encoding.n_vocab for title, encoding in baselines.items()}}
    for title in ("bytes", *(f"{title}\n{size:,}" for title, size in sizes.items()), *(f"vs {b}" for b in baselines)):
        table.add_column(title, justify="right")
    for kind, text in texts.items():
        if not text:
            continue
        n_bytes = len(text.encode())
        own = len(tokenizer.encode(text))
        theirs = [len(encoding.encode_ordinary(text)) for encoding in baselines.values()]
        table.add_row(
            kind,
            f"{n_bytes:,}",
            *(f"{n_bytes / count:.2f}" for count in (own, *theirs)),
            *(f"{count / own - 1:+.1%}" for count in theirs),
        )
    return table


@dataclass(frozen=True)
class ScriptCount:
    """Characters, UTF-8 bytes and tokens of a script in a text, spaces and punctuation within included."""

    characters: int
    n_bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.n_bytes / self.tokens

    @property
    def is_poor(self) -> bool:
        return self.bytes_per_token < POOR_BYTES_PER_TOKEN


def count_scripts(tokenizer: Tokenizer, text: str) -> dict[str, ScriptCount]:
    """Counts by script, the most frequent first; each run of characters of a script is encoded separately."""
    runs: dict[str, list[str]] = {}
    for match in _runs().finditer(text):
        runs.setdefault(str(match.lastgroup), []).append(match[0])
    counts = {
        script: ScriptCount(
            characters=sum(map(len, own)),
            n_bytes=sum(len(run.encode()) for run in own),
            tokens=sum(len(tokenizer.encode(run)) for run in own),
        )
        for script, own in runs.items()
    }
    return dict(sorted(counts.items(), key=lambda item: -item[1].characters))


@cache
def _runs() -> regex.Pattern[str]:
    """Matches runs of one script, starting with a letter, with their spaces, punctuation, digits and marks."""
    import regex

    # A character shared by all scripts belongs to the run before it.
    groups = (rf"(?P<{name}>\p{{Script={name}}}[\p{{Script={name}}}\p{{Common}}\p{{Inherited}}]*)" for name in SCRIPTS)
    return regex.compile("|".join(groups))


def script_table(counts: dict[str, ScriptCount]) -> Table:
    """Table of the scripts of a text."""
    from rich.table import Table

    table = Table("script", title="bytes per token by script")
    for title in ("characters", "bytes per token", "tokens per character"):
        table.add_column(title, justify="right")
    for script, count in counts.items():
        table.add_row(
            script,
            f"{count.characters:,}",
            f"{count.bytes_per_token:.2f}",
            f"{count.tokens / count.characters:.2f}",
            style="yellow" if count.is_poor else "",
        )
    return table
