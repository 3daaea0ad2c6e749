"""``lmchat tokenizer``: train, evaluate, show or import a tokenizer."""

import sys
from itertools import cycle
from pathlib import Path

from lmchat.paths import base_data_dir, tokenizer_dir

EVAL_CHARACTERS = 1_000_000
"""Characters of a shard that ``lmchat tokenizer eval`` reads."""
_TOKENS_AT_ONCE = 1000
"""Tokens that ``lmchat tokenizer show`` formats before it prints them."""
_STYLES = ("black on cyan", "black on yellow", "black on green", "black on magenta")
# Marks of white space, and what terminals that lack them show.
_WHITESPACE = {" ": "·_", "\n": ("⏎", r"\n"), "\t": ("⇥", r"\t"), "\r": ("␍", r"\r")}


def train(
    data: list[Path] | Path | None = None,
    vocab_size: int = 32_768,
    max_chars: int = 2_000_000_000,
    doc_cap: int = 10_000,
    max_shards: int | None = None,
    output: Path | None = None,
) -> None:
    """Train a byte-level BPE on parquet shards or text files.

    Args:
        data: a folder of parquet shards (the last of several is held out for validation) or of .txt files, or a list
            of such files; default is $LMCHAT_BASE_DIR/base_data.
        vocab_size: size of the vocabulary, including the nine special tokens.
        max_chars: maximum number of characters to read.
        doc_cap: maximum number of characters to read of a document.
        max_shards: maximum number of files to read, in order of their names.
        output: folder to write; default is $LMCHAT_BASE_DIR/tokenizer.
    """
    from lmchat.data.tokenizer_text import train_tokenizer

    summary = train_tokenizer(
        data or base_data_dir(), output or tokenizer_dir(), vocab_size, max_chars, doc_cap, max_shards
    )
    print(summary)


def evaluate(tokenizer: Path | None = None, data: Path | None = None) -> None:
    """Show bytes per token on several kinds of text, compared with GPT-2's and GPT-4's encodings if available.

    Args:
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        data: folder of shards; the last one is evaluated too, by script. Default is $LMCHAT_BASE_DIR/base_data, if it
            exists.
    """
    from rich.console import Console

    from lmchat.data.parquet_text import list_shards
    from lmchat.data.tokenizer_text import read_beginnings
    from lmchat.tokenizer.bpe import Tokenizer
    from lmchat.tokenizer.compression import (
        BASELINES,
        POOR_BYTES_PER_TOKEN,
        compression_table,
        count_scripts,
        load_baselines,
        script_table,
    )
    from lmchat.yaml_loading import load_package_yaml

    ours = Tokenizer.load(tokenizer or tokenizer_dir())
    texts: dict[str, str] = load_package_yaml("lmchat.tokenizer", "samples.yaml")
    if shards := list_shards(data) if data else sorted(base_data_dir().glob("*.parquet")):
        texts["validation shard"] = "\n".join(read_beginnings([shards[-1]], EVAL_CHARACTERS, EVAL_CHARACTERS))
    baselines = load_baselines()
    console = Console()
    console.print(compression_table(ours, texts, baselines))
    counts = count_scripts(ours, texts.get("validation shard", ""))
    if counts:
        console.print(script_table(counts))
    if poor := [script for script, count in counts.items() if count.is_poor]:
        console.print(
            f"{', '.join(poor)}: fewer than {POOR_BYTES_PER_TOKEN} bytes per token, so that context and training are "
            "spent on bytes; train the tokenizer on more text of that kind, or with a larger --vocab_size"
        )
    if missing := [title for title in BASELINES if title not in baselines]:
        console.print(f"not available here: {', '.join(missing)} (tiktoken needs the network once to get them)")


def show(text: str, tokenizer: Path | None = None) -> None:
    """Show a text's tokens in color, each with its id.

    Args:
        text: the text, or - to read it from standard input.
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
    """
    from rich.console import Console
    from rich.text import Text

    from lmchat.tokenizer.bpe import Tokenizer

    ours = Tokenizer.load(tokenizer or tokenizer_dir())
    text = sys.stdin.read() if text == "-" else text
    ids = ours.encode(text)
    n_bytes = len(text.encode(errors="replace"))
    console = Console(highlight=False)
    encoding = console.encoding
    for start in range(0, len(ids), _TOKENS_AT_ONCE):
        line = Text()
        for token, style in zip(ids[start : start + _TOKENS_AT_ONCE], cycle(_STYLES), strict=False):
            visible = ours.decode_bytes([token]).decode(errors="backslashreplace")
            for character, marks in _WHITESPACE.items():
                visible = visible.replace(character, next(mark for mark in marks if mark.encode(encoding, "ignore")))
            line.append(visible.encode(encoding, "backslashreplace").decode(encoding), style=style)
            line.append(f" {token}  ", style="dim")
        console.print(line)
    console.print(f"{len(ids):,} tokens, {n_bytes:,} bytes, {n_bytes / max(len(ids), 1):.2f} bytes per token")


def import_tokenizer(file: Path, output: Path | None = None) -> None:
    """Import a byte-level BPE vocabulary that another program trained.

    Args:
        file: a Hugging Face tokenizer.json, a tiktoken rank file, or JSON with mergeable_ranks and pattern.
        output: folder to write; default is $LMCHAT_BASE_DIR/tokenizer.
    """
    from lmchat.data.tokenizer_text import check_writable
    from lmchat.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.import_file(file)
    check_writable(output := output or tokenizer_dir())
    tokenizer.save(output)
    print(f"imported {tokenizer.vocab_size:,} tokens: {output}")


COMMANDS = {"train": train, "eval": evaluate, "show": show, "import": import_tokenizer}
