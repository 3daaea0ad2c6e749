"""Trains a tokenizer on parquet shards or text files."""

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lmchat.data.parquet_text import count_documents, list_shards, read_documents
from lmchat.option_checks import check_count
from lmchat.progress import ProgressBar
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError, user_errors


def train_tokenizer(
    data: list[Path] | Path,
    output: Path,
    vocab_size: int,
    max_chars: int = 2_000_000_000,
    doc_cap: int = 10_000,
    max_shards: int | None = None,
) -> str:
    """Trains a byte-level BPE and saves it to ``output``; the options are those of ``lmchat tokenizer train``.

    Returns a summary in a sentence.

    Raises:
        UserError: an option is out of range, there is no text, or ``output`` cannot be written.
        TooFewMerges: the text is too small for ``vocab_size`` entries.
    """
    check_count("", 1, max_chars=max_chars, doc_cap=doc_cap, max_shards=max_shards)
    files = training_files(data)[:max_shards]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"there is no file {missing[0]}; give existing files with --data")
    total_documents = sum(1 if file.suffix == ".txt" else count_documents(file) for file in files)
    check_writable(output)
    started, documents, characters = time.perf_counter(), 0, 0
    with ProgressBar("Reading text", 1.0) as bar:

        def texts() -> Iterator[str]:
            nonlocal documents, characters
            for text in read_beginnings(files, max_chars, doc_cap):
                documents += 1
                characters += len(text)
                bar.set(max(documents / total_documents, characters / max_chars))
                yield text
            bar.set(1.0, "Computing merges")

        tokenizer = Tokenizer.train(texts(), vocab_size)
    tokenizer.save(output)
    seconds = time.perf_counter() - started
    return (
        f"trained {vocab_size:,} tokens on {characters:,} characters of {documents:,} documents in {seconds:.0f} s "
        f"({characters / seconds / 1e6:.1f} M characters/s): {output}"
    )


def training_files(data: list[Path] | Path) -> list[Path]:
    """The files that ``data`` names; see `train_tokenizer`."""
    if isinstance(data, list):
        return data
    if data.is_file():
        return [data]
    if data.is_dir() and not any(data.glob("*.parquet")) and (texts := sorted(data.rglob("*.txt"))):
        return texts
    return list_shards(data)[:-1]


def check_writable(directory: Path) -> None:
    """Creates the folder and a temporary file in it, to fail before training instead of after it, and removes both.

    Raises:
        UserError: the folder cannot be written.
    """
    missing: list[Path] = []
    with user_errors(f"cannot write to the folder {directory}", "choose another --output", OSError):
        try:
            missing += [folder for folder in (directory, *directory.parents) if not folder.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def read_beginnings(files: Iterable[Path], max_chars: int, doc_cap: int) -> Iterator[str]:
    """Yields the first ``doc_cap`` characters of each document, at most ``max_chars`` in total."""
    for file in files:
        plain = file.suffix == ".txt"
        documents = iter([file.read_text("utf-8", "replace")]) if plain else read_documents(file)
        for document in filter(None, documents):
            text = document[: min(doc_cap, max_chars)]
            max_chars -= len(text)
            yield text
            if max_chars == 0:
                return
