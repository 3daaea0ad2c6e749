"""Tokenizes parquet shards into token files, on all cores."""

import hashlib
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.parquet_text import count_documents, list_shards, read_documents
from lmchat.data.token_file import HEADER_BYTES, Header, Source, read_header, token_dir, token_path
from lmchat.files import locked, synced_file
from lmchat.parquet_pages import open_parquet
from lmchat.progress import ProgressBar
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import user_errors

_CHUNK_CHARACTERS = 1 << 18

_Chunk = tuple[int, npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]


def prepare_token_shards(data_dir: Path, tokenizer: Tokenizer, *, num_threads: int | None = None) -> str:
    """Tokenizes the shards of a folder that have no up-to-date token file, on all cores.

    If several processes call this for the same folder, one works and the others wait. A token file appears when it is
    complete, so a rerun after an interruption continues. Returns a summary in a sentence.

    Args:
        data_dir: folder of parquet shards with a string column ``text``; null and empty texts are skipped.
        num_threads: number of threads; None is one per core.

    Raises:
        UserError: the folder is missing or has fewer than two shards, a shard cannot be read, or a token file cannot be
            written.
    """
    shards = list_shards(data_dir)
    directory = token_dir(data_dir, tokenizer)
    stale = [shard for shard in shards if not _is_current(shard, directory, tokenizer)]
    if stale:
        waiting = f"Waiting for another process to finish tokenizing into {directory}"
        with user_errors(f"cannot write token files to {directory}", "make room or give it write permission", OSError):
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory / ".lock", when_taken=partial(print, waiting, file=sys.stderr, flush=True)):
                stale = [shard for shard in stale if not _is_current(shard, directory, tokenizer, restamp=True)]
                _tokenize_all(stale, directory, tokenizer, num_threads or os.cpu_count() or 1)
    headers = [read_header(token_path(directory, shard), tokenizer) for shard in shards]
    tokens, documents, skipped = (
        sum(getattr(header, name) for header in headers) for name in ("tokens", "documents", "skipped")
    )
    return (
        f"{tokens:,} tokens of {documents:,} documents in {directory}; {len(stale)} of {len(shards)} shards tokenized "
        f"now, {skipped:,} empty documents skipped"
    )


def _is_current(shard: Path, directory: Path, tokenizer: Tokenizer, *, restamp: bool = False) -> bool:
    """Whether a shard has an up-to-date token file.

    If only the shard's time stamp has changed, as in a copy, ``restamp`` updates the one in the header.
    """
    path = token_path(directory, shard)
    header = Header.read(path)
    if header is None or header.tokenizer != tokenizer.fingerprint:
        return False
    if header.source == _identify(shard, header.source.sha256):
        return True
    if not restamp or header.source != replace(source := _identify(shard), mtime_ns=header.source.mtime_ns):
        return False
    with path.open("r+b") as file:
        replace(header, source=source).write(file)
    return True


def _footer_digest(shard: Path) -> str:
    """Digest of a parquet file's footer, which has sizes, offsets and statistics of all column chunks."""
    with open_parquet(shard), shard.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def _identify(shard: Path, sha256: str | None = None) -> Source:
    status = shard.stat()
    if sha256 is None:
        with shard.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(status.st_size, status.st_mtime_ns, _footer_digest(shard), sha256)


def _tokenize_all(shards: Sequence[Path], directory: Path, tokenizer: Tokenizer, num_threads: int) -> None:
    """Tokenizes shards one by one with a pool of threads; tiktoken and pyarrow release the GIL."""
    total = sum(map(count_documents, shards))
    with ThreadPoolExecutor(num_threads) as pool, ProgressBar("Tokenizing", total, unit="documents") as bar:
        for shard in shards:
            chunks = _encoded(_split(read_documents(shard)), tokenizer, pool, look_ahead=2 * num_threads)
            _write_token_file(token_path(directory, shard), _identify(shard), chunks, tokenizer, bar)


def _split(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Yields lists of consecutive texts, each long enough to be worth a thread's time."""
    chunk: list[str | None] = []
    room = _CHUNK_CHARACTERS
    for text in texts:
        chunk.append(text)
        room -= len(text or "") + 1
        if room <= 0:
            yield chunk
            chunk, room = [], _CHUNK_CHARACTERS
    if chunk:
        yield chunk


def _encoded(
    chunks: Iterable[Sequence[str | None]], tokenizer: Tokenizer, pool: ThreadPoolExecutor, look_ahead: int
) -> Iterator[_Chunk]:
    """Encodes chunks, in order, with a bounded number of them in progress."""
    pending: deque[Future[_Chunk]] = deque()
    for texts in chunks:
        pending.append(pool.submit(_encode, texts, tokenizer))
        if len(pending) > look_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _encode(texts: Sequence[str | None], tokenizer: Tokenizer) -> _Chunk:
    """Number of rows, concatenated tokens of their documents, and the (documents,) lengths of these."""
    bos = np.array([tokenizer.bos_id], dtype=tokenizer.dtype)
    documents = [tokenizer.encode_to_numpy(text).astype(tokenizer.dtype) for text in texts if text]
    lengths = np.array([1 + len(document) for document in documents], dtype=np.int64)
    parts = [part for document in documents for part in (bos, document)]
    return len(texts), np.concatenate(parts or [bos[:0]]), lengths


def _write_token_file(
    path: Path, source: Source, chunks: Iterable[_Chunk], tokenizer: Tokenizer, bar: ProgressBar
) -> None:
    """Writes a token file, which appears when it is complete."""
    skipped = tokens = crc = 0
    all_lengths = [np.zeros(1, dtype=np.int64)]
    with synced_file(path) as file:

        def append(array: npt.NDArray[Any]) -> None:
            nonlocal crc
            data = array.tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)

        file.write(bytes(HEADER_BYTES))
        for rows, ids, lengths in chunks:
            append(ids)
            all_lengths.append(lengths)
            skipped += rows - len(lengths)
            tokens += len(ids)
            bar.update(rows)
        offsets = np.cumsum(np.concatenate(all_lengths))
        append(np.zeros(-tokens * tokenizer.dtype.itemsize % 8, dtype=np.uint8))
        append(offsets)
        dtype, documents = tokenizer.dtype.name, len(offsets) - 1
        Header(tokenizer.fingerprint, dtype, documents, tokens, skipped, crc, source).write(file)
