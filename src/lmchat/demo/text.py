"""The demo's text stages: collection into shards, tokenizer, token files, compression baselines."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from lmchat.demo.run import Demo, Metrics

VALIDATION_SHARE = 0.05
FEW_FILES = 20
"""Below this number of plain text files, files are split into paragraphs, so that some text of each can be held out."""
LONG_FILE_BYTES = 4_000
"""Above this mean length files are split, since training reads only one row of each document."""


def collect_text(run: Demo) -> Metrics:
    """Writes text shards to ``base_data``, the last one for validation, and the word list."""
    shutil.rmtree(run.data_dir, ignore_errors=True)  # of an interrupted run
    metrics = _import_text(run, run.text) if run.text is not None else _collect_documentation(run)
    return {**metrics, "words": _list_words(run)}


def _import_text(run: Demo, text: Path) -> Metrics:
    from lmchat.data.import_text import import_folder

    imported = import_folder(
        text, run.data_dir, separator=_separator(text), validation_fraction=VALIDATION_SHARE
    ).shards
    documents = imported.train_documents + imported.validation_documents
    return {"documents": documents, "megabytes": round(imported.characters / 1e6, 2)}


def _collect_documentation(run: Demo) -> Metrics:
    from rich.console import Console

    from lmchat.demo.local_corpus import collect_documentation, corpus_table

    files = collect_documentation(run.data_dir, validation_share=VALIDATION_SHARE)
    Console().print(corpus_table(files))
    documents = [text for file in files for text in file.documents]
    return {"documents": len(documents), "megabytes": round(sum(map(len, documents)) / 1e6, 2)}


def _list_words(run: Demo) -> int:
    """Writes the word list of the spelling tasks: words of the text and of Python's manual."""
    from pydoc_data.topics import topics

    from lmchat.data.parquet_text import list_shards, read_documents
    from lmchat.tasks.words import words_from_text, write_words

    *train, _ = list_shards(run.data_dir)
    text = (text or "" for shard in train for text in read_documents(shard))
    words = words_from_text(chain(text, topics.values()))
    write_words(words, run.words)
    return len(words)


def _separator(text: Path) -> str | None:
    """Separator that splits plain text files into documents; None keeps files whole (many short files)."""
    from lmchat.data.documents import PLAIN_SUFFIXES

    found = [text] if text.is_file() else [path for path in text.rglob("*") if path.is_file()]
    files = [path for path in found if path.suffix.lower() in PLAIN_SUFFIXES]
    try:
        if len(files) >= FEW_FILES and sum(path.stat().st_size for path in files) <= LONG_FILE_BYTES * len(files):
            return None
        paragraph_breaks = ("\r\n\r\n", "\n\n")
        cut = next((cut for cut in paragraph_breaks if _count(cut, files) >= FEW_FILES), "\n")
        return cut if _count(cut, files) else None
    except OSError:
        return None  # the import raises an error that names the file


def _count(cut: str, files: list[Path]) -> int:
    """Number of occurrences of ``cut`` in the files."""
    return sum(path.read_bytes().count(cut.encode()) for path in files)


def train_tokenizer(run: Demo) -> Metrics:
    """Trains a byte-level BPE on the training shards; a small text gives a smaller vocabulary."""
    from lmchat.data.tokenizer_text import train_tokenizer as train
    from lmchat.tokenizer.bpe import TooFewMerges

    vocab_size = run.vocab_size
    try:
        trained = train(run.data_dir, run.tokenizer_dir, vocab_size=vocab_size)
    except TooFewMerges as error:
        vocab_size = error.possible_vocab_size
        print(f"this text is too small for {run.vocab_size:,} entries; the tokenizer gets {vocab_size:,}")
        trained = train(run.data_dir, run.tokenizer_dir, vocab_size=vocab_size)
    print(trained)
    return {"vocab_size": vocab_size}


def tokenize(run: Demo) -> Metrics:
    """Tokenizes all shards."""
    from lmchat.data.token_shards import TokenShards
    from lmchat.data.tokenize import prepare_token_shards
    from lmchat.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.load(run.tokenizer_dir)
    prepare_token_shards(run.data_dir, tokenizer)
    train, validation = TokenShards.open_split(run.data_dir, tokenizer)
    print(f"{train.tokens:,} tokens to train on, {validation.tokens:,} held out")
    return {"tokens": train.tokens, "validation_tokens": validation.tokens}


def measure_baselines(run: Demo) -> Metrics:
    """Measures bits per byte of compressors and an n-gram model on the held-out text."""
    from rich.console import Console

    from lmchat.data.parquet_text import list_shards, read_documents
    from lmchat.demo.baseline import compression_baselines

    *train, validation = list_shards(run.data_dir)
    console, activity = Console(), "gzip, xz and an n-gram model are reading the text"
    if not console.is_terminal:
        console.print(activity)
    with console.status(activity):
        baselines = compression_baselines(
            (text or "" for shard in train for text in read_documents(shard)),
            (text or "" for text in read_documents(validation)),
        )
    print(f"bits per byte: gzip {baselines.gzip:.3f}, xz {baselines.xz:.3f}, n-gram model {baselines.ngram:.3f}")
    return {f"{name}_bpb": round(value, 4) for name, value in asdict(baselines).items()}
