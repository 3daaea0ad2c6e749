"""The demo's text stages: collection into shards, tokenizer, token files, compression baselines."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

from lmchat.data.documents import PLAIN_SUFFIXES
from lmchat.data.import_text import import_folder
from lmchat.data.parquet_text import list_shards, read_documents
from lmchat.data.token_shards import TokenShards
from lmchat.data.tokenize import prepare_token_shards
from lmchat.data.tokenizer_text import train_tokenizer as train
from lmchat.demo.baseline import compression_baselines
from lmchat.demo.local_corpus import collect_documentation
from lmchat.demo.run import VOCAB_SIZE, Demo, Metrics
from lmchat.tasks.words import words_from_text, write_words
from lmchat.tokenizer.bpe import Tokenizer, TooFewMerges

VALIDATION_SHARE = 0.05
FEW_FILES = 20
"""Below this number of plain text files, files are split into paragraphs, so that some text of each can be held out."""
LONG_FILE_BYTES = 4_000
"""Above this mean length files are split, since training reads only one row of each document."""


def collect_text(run: Demo) -> Metrics:
    """Writes text shards to ``base_data``, the last one for validation, and the word list."""
    shutil.rmtree(run.data_dir, ignore_errors=True)  # of an interrupted run
    if run.text is None:
        documents, characters = _collect_documentation(run)
    else:
        separator = _separator(run.text)
        shards = import_folder(run.text, run.data_dir, separator=separator, validation_fraction=VALIDATION_SHARE).shards
        documents, characters = shards.train_documents + shards.validation_documents, shards.characters
    return {"documents": documents, "megabytes": round(characters / 1e6, 2), "words": _list_words(run)}


def _collect_documentation(run: Demo) -> tuple[int, int]:
    """Collects documentation on this machine; returns the numbers of documents and characters."""
    sizes: Counter[str] = Counter()
    documents = 0
    for file in collect_documentation(run.data_dir, validation_share=VALIDATION_SHARE):
        sizes[file.source] += sum(map(len, file.documents))
        documents += len(file.documents)
    largest = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.most_common(5))
    print(
        f"{sizes.total() / 1e6:.1f} MB in {documents:,} documents of {len(sizes)} packages; the largest are {largest}"
    )
    return documents, sizes.total()


def _list_words(run: Demo) -> int:
    """Writes the word list of the spelling tasks: words of the text and of Python's manual."""
    words = words_from_text(chain(_texts(list_shards(run.data_dir)[:-1]), topics.values()))
    write_words(words, run.words)
    return len(words)


def _texts(shards: Iterable[Path]) -> Iterator[str]:
    return (text or "" for shard in shards for text in read_documents(shard))


def _separator(text: Path) -> str | None:
    """Separator that splits plain text files into documents; None keeps files whole (many short files)."""
    found = [text] if text.is_file() else text.rglob("*")
    files = [path for path in found if path.suffix.lower() in PLAIN_SUFFIXES and path.is_file()]
    try:
        if len(files) >= FEW_FILES and sum(path.stat().st_size for path in files) <= LONG_FILE_BYTES * len(files):
            return None
        cut = next((cut for cut in ("\r\n\r\n", "\n\n") if _count(cut, files) >= FEW_FILES), "\n")
        return cut if _count(cut, files) else None
    except OSError:
        return None  # the import reports the file


def _count(cut: str, files: list[Path]) -> int:
    """Number of occurrences of ``cut`` in the files."""
    return sum(path.read_bytes().count(cut.encode()) for path in files)


def train_tokenizer(run: Demo) -> Metrics:
    """Trains a byte-level BPE on the training shards; a small text gives a smaller vocabulary."""
    vocab_size = VOCAB_SIZE
    try:
        summary = train(run.data_dir, run.tokenizer_dir, vocab_size=vocab_size)
    except TooFewMerges as error:
        vocab_size = error.possible_vocab_size
        print(f"this text is too small for {VOCAB_SIZE:,} entries; the tokenizer has {vocab_size:,}")
        summary = train(run.data_dir, run.tokenizer_dir, vocab_size=vocab_size)
    print(summary)
    return {"vocab_size": vocab_size}


def tokenize(run: Demo) -> Metrics:
    """Tokenizes all shards."""
    tokenizer = Tokenizer.load(run.tokenizer_dir)
    prepare_token_shards(run.data_dir, tokenizer)
    train, validation = TokenShards.open_split(run.data_dir, tokenizer)
    print(f"{train.tokens:,} tokens to train on, {validation.tokens:,} held out")
    return {"tokens": train.tokens, "validation_tokens": validation.tokens}


def measure_baselines(run: Demo) -> Metrics:
    """Measures bits per byte of compressors and an n-gram model on the held-out text."""
    *train, validation = list_shards(run.data_dir)
    print("measuring gzip, xz and an n-gram model on the text", flush=True)
    baselines = compression_baselines(_texts(train), _texts([validation]))
    print("bits per byte: gzip {gzip:.3f}, xz {xz:.3f}, n-gram model {ngram:.3f}".format(**baselines))
    return {f"{name}_bpb": round(value, 4) for name, value in baselines.items()}
