"""Bytes per token of a tokenizer, compared with GPT-2's and GPT-4's encodings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lmchat.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    import tiktoken
    from rich.table import Table

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""Column title and name of the encoding in tiktoken."""

DOWNLOAD_TIMEOUT_SECONDS = 20


def load_baselines() -> dict[str, tiktoken.Encoding]:
    """The encodings of `BASELINES` that tiktoken has in its cache or can download, by title."""
    loaded = {title: load_baseline(name) for title, name in BASELINES.items()}
    return {title: encoding for title, encoding in loaded.items() if encoding is not None}


def load_baseline(name: str) -> tiktoken.Encoding | None:
    """Loads an encoding from tiktoken's cache or the network; None if it is not available within the timeout."""
    import tiktoken

    loaded: list[tiktoken.Encoding] = []

    def load() -> None:
        with contextlib.suppress(OSError, ValueError):
            loaded.append(tiktoken.get_encoding(name))

    # tiktoken downloads without a timeout.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT_SECONDS)
    return loaded[0] if loaded else None


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
