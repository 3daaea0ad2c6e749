"""Tokenizes parquet shards into token files, on all cores."""

from __future__ import annotations

import hashlib
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.parquet_text import check_text_column, list_shards, open_parquet, read_documents
from lmchat.data.token_file import HEADER_BYTES, Header, Source, read_header, token_dir, token_path
from lmchat.files import locked, synced_file
from lmchat.progress import ProgressBar
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

_CHUNK_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TokenReport:
    """Result of `prepare_token_shards`.

    ``made`` shards were tokenized by this call; ``skipped`` texts are null or empty.
    """

    directory: Path
    shards: int
    made: int
    documents: int
    tokens: int
    skipped: int


def prepare_token_shards(data_dir: Path, tokenizer: Tokenizer, *, num_threads: int | None = None) -> TokenReport:
    """Tokenizes the shards of a folder that have no up-to-date token file, on all cores.

    If several processes call this for the same folder, one works and the others wait. A token file appears when it is
    complete, so a rerun after an interruption continues.

    Args:
        data_dir: folder of parquet shards with a string column ``text``; null and empty texts are skipped.
        num_threads: number of threads; None is one per core.

    Raises:
        UserError: the folder is missing or has fewer than two shards, a shard cannot be read, or a token file cannot be
            written.
    """
    shards = list_shards(data_dir)
    directory = token_dir(data_dir, tokenizer)
    stale = _stale(shards, directory, tokenizer)
    if stale:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            waiting = f"Waiting for another process to finish tokenizing into {directory}"
            with locked(directory / ".lock", when_taken=partial(print, waiting, file=sys.stderr, flush=True)):
                stale = [
                    shard for shard in _stale(stale, directory, tokenizer) if not _restamp(directory, shard, tokenizer)
                ]
                _tokenize_all(stale, directory, tokenizer, num_threads or os.cpu_count() or 1)
        except OSError as error:
            raise UserError(
                f"cannot write token files to {directory} ({error.strerror}); make room or give it write permission"
            ) from error
    headers = [read_header(token_path(directory, shard), tokenizer) for shard in shards]
    return TokenReport(
        directory=directory,
        shards=len(shards),
        made=len(stale),
        documents=sum(header.documents for header in headers),
        tokens=sum(header.tokens for header in headers),
        skipped=sum(header.skipped for header in headers),
    )


def _stale(shards: Iterable[Path], directory: Path, tokenizer: Tokenizer) -> list[Path]:
    return [shard for shard in shards if not _is_current(token_path(directory, shard), shard, tokenizer)]


def _is_current(path: Path, shard: Path, tokenizer: Tokenizer) -> bool:
    header, status = Header.read(path), shard.stat()
    return (
        header is not None
        and header.tokenizer == tokenizer.fingerprint
        and (header.source.size, header.source.mtime_ns) == (status.st_size, status.st_mtime_ns)
        and header.source.footer == _footer_digest(shard)
    )


def _restamp(directory: Path, shard: Path, tokenizer: Tokenizer) -> bool:
    """Updates the time stamp in the header if only that has changed, as in a copy; returns whether it did."""
    path = token_path(directory, shard)
    header = Header.read(path)
    if header is None or header.tokenizer != tokenizer.fingerprint:
        return False
    source = _identify(shard)
    if replace(header.source, mtime_ns=source.mtime_ns) != source:
        return False
    with path.open("r+b") as file:
        replace(header, source=source).write(file)
    return True


def _footer_digest(shard: Path) -> str:
    """Digest of a parquet file's footer, which has sizes, offsets and statistics of all column chunks."""
    open_parquet(shard).close()
    with shard.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def _identify(shard: Path) -> Source:
    status = shard.stat()
    with shard.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(status.st_size, status.st_mtime_ns, _footer_digest(shard), sha256)


def _tokenize_all(shards: Sequence[Path], directory: Path, tokenizer: Tokenizer, num_threads: int) -> None:
    """Tokenizes shards one by one with a pool of threads; tiktoken and pyarrow release the GIL."""
    if not shards:
        return
    total = sum(_count_rows(shard) for shard in shards)
    with (
        ThreadPoolExecutor(num_threads) as pool,
        ProgressBar("Tokenizing", total, unit="documents") as bar,
    ):
        for shard in shards:
            encode = _OrderedEncoder(pool, tokenizer, look_ahead=2 * num_threads)
            path = token_path(directory, shard)
            for documents in _write_token_file(path, shard, encode, tokenizer.fingerprint):
                bar.update(documents)


def _count_rows(shard: Path) -> int:
    with open_parquet(shard) as parquet:
        check_text_column(parquet, shard)
        return int(parquet.metadata.num_rows)


@dataclass
class _Chunk:
    """Concatenated tokens of documents from ``rows`` rows of a parquet file."""

    rows: int
    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]


class _OrderedEncoder:
    """Encodes texts to chunks of tokens, in order, with a bounded number of chunks in progress."""

    def __init__(self, pool: ThreadPoolExecutor, tokenizer: Tokenizer, look_ahead: int) -> None:
        self.pool = pool
        self.tokenizer = tokenizer
        self.look_ahead = look_ahead
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def __call__(self, texts: Iterable[str | None]) -> Iterator[_Chunk]:
        pending: deque[Future[_Chunk]] = deque()
        for chunk in _split(texts, _CHUNK_CHARACTERS):
            pending.append(self.pool.submit(self._encode, chunk))
            if len(pending) > self.look_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode(self, texts: Sequence[str | None]) -> _Chunk:
        bos = np.array([self.tokenizer.bos_id], dtype=self.dtype)
        documents = [self.tokenizer.encode_to_numpy(text).astype(self.dtype) for text in texts if text]
        lengths = np.array([1 + len(document) for document in documents], dtype=np.int64)
        parts = [part for document in documents for part in (bos, document)]
        return _Chunk(len(texts), np.concatenate(parts or [bos[:0]]), lengths)


def _split(texts: Iterable[str | None], characters: int) -> Iterator[list[str | None]]:
    """Yields lists of consecutive texts with at least ``characters`` characters, except the last."""
    chunk: list[str | None] = []
    room = characters
    for text in texts:
        chunk.append(text)
        room -= len(text or "") + 1
        if room <= 0:
            yield chunk
            chunk, room = [], characters
    if chunk:
        yield chunk


def _write_token_file(path: Path, shard: Path, encode: _OrderedEncoder, fingerprint: str) -> Iterator[int]:
    """Tokenizes one shard and yields the number of rows done. The file appears when it is complete."""
    source = _identify(shard)
    rows = tokens = crc = 0
    lengths = [np.zeros(1, dtype=np.int64)]
    with synced_file(path) as file:

        def append(array: npt.NDArray[Any]) -> None:
            nonlocal crc
            data = array.tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)

        file.write(bytes(HEADER_BYTES))
        for chunk in encode(read_documents(shard)):
            append(chunk.tokens)
            lengths.append(chunk.lengths)
            rows += chunk.rows
            tokens += len(chunk.tokens)
            yield chunk.rows
        offsets = np.cumsum(np.concatenate(lengths))
        documents = len(offsets) - 1
        append(np.zeros(-tokens * encode.dtype.itemsize % 8, dtype=np.uint8))
        append(offsets)
        Header(fingerprint, encode.dtype.name, documents, tokens, rows - documents, crc, source).write(file)
