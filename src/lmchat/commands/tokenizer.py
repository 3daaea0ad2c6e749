"""``lmchat tokenizer``: train, evaluate, look at or import a tokenizer."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from lmchat.paths import base_data_dir, tokenizer_dir
from lmchat.types import UserError

if TYPE_CHECKING:
    import tiktoken
    from rich.progress import Progress
    from rich.table import Table

    from lmchat.tokenizer.bpe import Tokenizer

BASELINES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
"""Column title to the name tiktoken knows the encoding by."""

_BASELINE_TIMEOUT_SECONDS = 20
_EVAL_SHARD_CHARS = 1_000_000
_PIECE_STYLES = ("black on cyan", "black on yellow", "black on green", "black on magenta")


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
        vocab_size: entries of the vocabulary, the nine special tokens included.
        max_chars: read this many characters at most.
        doc_cap: read this many characters of a document at most.
        max_shards: read this many files at most, the first by name: the same ones while others are downloaded.
        output: folder to write; default is $LMCHAT_BASE_DIR/tokenizer.
    """
    from lmchat.tokenizer.bpe import Tokenizer

    for name, value in (("max_chars", max_chars), ("doc_cap", doc_cap), ("max_shards", max_shards)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    files = _training_files(data or base_data_dir())[:max_shards]
    total_documents = sum(map(_count_documents, files))
    output = _writable(output or tokenizer_dir())
    started = time.perf_counter()
    with _progress_bar() as bar:
        texts = _Reading(_capped(files, max_chars, doc_cap), bar, total_documents, max_chars)
        tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(output)
    seconds = time.perf_counter() - started
    print(
        f"trained {tokenizer.vocab_size:,} tokens on {texts.chars:,} characters of {texts.documents:,} documents "
        f"in {seconds:.0f} s ({texts.chars / seconds / 1e6:.1f} M characters/s): {output}"
    )


def evaluate(tokenizer: Path | None = None, data: Path | None = None) -> None:
    """Bytes per token on several kinds of text, beside GPT-2's and GPT-4's encodings where tiktoken can load them.

    Args:
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        data: folder of shards, the last of which is evaluated too; default is $LMCHAT_BASE_DIR/base_data if it is
            there.
    """
    from rich.console import Console

    from lmchat.data.parquet_text import list_shards
    from lmchat.tokenizer.bpe import Tokenizer
    from lmchat.tokenizer.samples import SAMPLES

    ours = Tokenizer.load(tokenizer or tokenizer_dir())
    texts = dict(SAMPLES)
    if shards := list_shards(data) if data else sorted(base_data_dir().glob("*.parquet")):
        texts["validation shard"] = "\n".join(_capped([shards[-1]], _EVAL_SHARD_CHARS, _EVAL_SHARD_CHARS))
    loaded = {title: _baseline(name) for title, name in BASELINES.items()}
    baselines = {title: encoding for title, encoding in loaded.items() if encoding}
    console = Console()
    console.print(_compression_table(ours, texts, baselines))
    if missing := [title for title in BASELINES if title not in baselines]:
        console.print(f"not available here: {', '.join(missing)} (tiktoken fetches them once, then keeps them)")


def show(text: str, tokenizer: Path | None = None) -> None:
    """Show a text's tokens in colour, each with its id.

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
    line = Text()
    for token, style in zip(ids, cycle(_PIECE_STYLES), strict=False):
        line.append(_visible(ours.decode_bytes([token])), style=style).append(f" {token}  ", style="dim")
    n_bytes = len(text.encode(errors="replace"))
    console = Console(highlight=False)
    console.print(line)
    console.print(f"{len(ids):,} tokens, {n_bytes:,} bytes, {n_bytes / max(len(ids), 1):.2f} bytes per token")


def import_tokenizer(file: Path, output: Path | None = None) -> None:
    """Import a byte-level BPE vocabulary that another program trained.

    Args:
        file: a Hugging Face tokenizer.json, a tiktoken rank file, or JSON with mergeable_ranks and pattern.
        output: folder to write; default is $LMCHAT_BASE_DIR/tokenizer.
    """
    from lmchat.tokenizer.bpe import Tokenizer

    tokenizer = Tokenizer.import_file(file)
    output = _writable(output or tokenizer_dir())
    tokenizer.save(output)
    print(f"imported {tokenizer.vocab_size:,} tokens: {output}")


COMMANDS = {"train": train, "eval": evaluate, "show": show, "import": import_tokenizer}


def _training_files(data: list[Path] | Path) -> list[Path]:
    from lmchat.data.parquet_text import list_shards

    if isinstance(data, list):
        return data
    if data.is_file():
        return [data]
    if data.is_dir() and not any(data.glob("*.parquet")) and (texts := sorted(data.rglob("*.txt"))):
        return texts
    return list_shards(data)[:-1]


def _writable(directory: Path) -> Path:
    """The folder, made if need be: better to fail before training than after."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the folder {directory} ({error.strerror}): choose another --output"
        ) from error
    return directory


def _capped(files: Iterable[Path], max_chars: int, doc_cap: int) -> Iterator[str]:
    """The beginnings of the documents, ``max_chars`` in all."""
    for file in files:
        for document in _documents(file):
            text = document[: min(doc_cap, max_chars)]
            max_chars -= len(text)
            yield text
            if max_chars == 0:
                return


def _documents(file: Path) -> Iterator[str]:
    from lmchat.data.parquet_text import read_documents

    if not file.is_file():
        raise UserError(f"no file {file}")
    if file.suffix != ".txt":
        yield from (text for text in read_documents(file) if text)
    elif text := file.read_text(encoding="utf-8", errors="replace"):
        yield text


def _count_documents(file: Path) -> int:
    from lmchat.data.parquet_text import open_parquet

    return 1 if file.suffix == ".txt" else open_parquet(file).metadata.num_rows


class _Reading:
    """Documents on their way to the trainer: counts them, moves a bar, then pulses while merges are computed."""

    def __init__(self, texts: Iterable[str], bar: Progress, total_documents: int, max_chars: int) -> None:
        self.documents = self.chars = 0
        self._texts = texts
        self._bar = bar
        self._total_documents = total_documents
        self._max_chars = max_chars

    def __iter__(self) -> Iterator[str]:
        task = self._bar.add_task("reading text", total=1.0)
        for text in self._texts:
            self.documents += 1
            self.chars += len(text)
            if self.documents % 100 == 0:
                progress = max(self.documents / self._total_documents, self.chars / self._max_chars)
                self._bar.update(task, completed=progress)
            yield text
        self._bar.update(task, description="computing merges", completed=0.0, total=None)


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _baseline(name: str) -> tiktoken.Encoding | None:
    """An encoding from tiktoken's cache or from the network; None when neither answers in time."""
    import tiktoken

    loaded: list[tiktoken.Encoding] = []

    def load() -> None:
        with contextlib.suppress(OSError, ValueError):
            loaded.append(tiktoken.get_encoding(name))

    # tiktoken downloads without a time limit.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(_BASELINE_TIMEOUT_SECONDS)
    return loaded[0] if loaded else None


def _compression_table(ours: Tokenizer, texts: Mapping[str, str], baselines: Mapping[str, tiktoken.Encoding]) -> Table:
    from rich.table import Table

    table = Table("text", title="bytes per token (more is better)")
    sizes = {"ours": ours.vocab_size, **{title: encoding.n_vocab for title, encoding in baselines.items()}}
    for title in ("bytes", *(f"{title}\n{size:,}" for title, size in sizes.items()), *(f"vs {b}" for b in baselines)):
        table.add_column(title, justify="right")
    for kind, text in texts.items():
        if not text:
            continue
        n_bytes = len(text.encode())
        own = len(ours.encode(text))
        theirs = [len(encoding.encode_ordinary(text)) for encoding in baselines.values()]
        table.add_row(
            kind,
            f"{n_bytes:,}",
            *(f"{n_bytes / count:.2f}" for count in (own, *theirs)),
            *(f"{count / own - 1:+.1%}" for count in theirs),
        )
    return table


def _visible(piece: bytes) -> str:
    """A token's bytes with whitespace and half characters made visible."""
    text = piece.decode("utf-8", errors="backslashreplace")
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
