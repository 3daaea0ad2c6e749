"""Token files: each parquet shard tokenized once, then mapped into memory by every process that trains on it.

A token file is a header of 4,096 bytes (JSON, readable with ``head -1``), the tokens of all documents on end (uint16
or uint32, each document with its leading BOS), and the int64 offset of each document and of the end.
The header says which tokenizer and which parquet file the tokens come from, so a change of either is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lmchat.data.parquet_text import check_text_column, list_shards, open_parquet, read_documents
from lmchat.files import locked, synced_file
from lmchat.paths import base_dir
from lmchat.progress import ProgressBar
from lmchat.types import UserError

_FORMAT = "lmchat tokens 1"
_HEADER_BYTES = 4096
_CHUNK_CHARACTERS = 1 << 18


class TextTokenizer(Protocol):
    """What token files need of a tokenizer."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]: ...


@dataclass(frozen=True)
class Source:
    """The identity of a parquet file: cheap to compare, except sha256, which settles a changed time stamp."""

    size: int
    mtime_ns: int
    footer: str
    sha256: str


@dataclass(frozen=True)
class Header:
    """What a token file says about itself. crc32: of everything after the header."""

    tokenizer: str
    dtype: str
    documents: int
    tokens: int
    skipped: int
    crc32: int
    source: Source

    @property
    def offsets_at(self) -> int:
        """Where the offsets begin: after the tokens, on a multiple of 8 bytes."""
        return _HEADER_BYTES + -(-self.tokens * np.dtype(self.dtype).itemsize // 8) * 8

    @property
    def file_bytes(self) -> int:
        return self.offsets_at + 8 * (self.documents + 1)

    def write(self, file: BinaryIO) -> None:
        line = json.dumps({"format": _FORMAT, **asdict(self)}).encode()
        file.seek(0)
        file.write(line.ljust(_HEADER_BYTES - 1) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Header | None:
        """The header, or None when the file is missing, truncated or in another format."""
        try:
            with path.open("rb") as file:
                fields = json.loads(file.read(_HEADER_BYTES))
                size = os.fstat(file.fileno()).st_size
            if fields.pop("format") != _FORMAT:
                return None
            header = cls(**{**fields, "source": Source(**fields["source"])})
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return header if size == header.file_bytes else None


@dataclass(frozen=True)
class TokenReport:
    """What `prepare_token_shards` found or made. skipped: null and empty texts. made: shards tokenized just now."""

    directory: Path
    shards: int
    made: int
    documents: int
    tokens: int
    skipped: int


def token_dir(data_dir: Path, tokenizer: TextTokenizer) -> Path:
    """The folder of the token files: in the data folder, or under the base folder when that one is read-only."""
    name = tokenizer.fingerprint[:12]
    beside = data_dir / "tokens" / name
    # Root may write anywhere; a folder without any write bit is meant to stay as it is.
    if beside.is_dir() or (os.access(data_dir, os.W_OK) and stat.S_IMODE(data_dir.stat().st_mode) & 0o222):
        return beside
    path = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()
    return base_dir() / "tokens" / f"{data_dir.resolve().name}-{path[:8]}" / name


def prepare_token_shards(
    data_dir: Path, tokenizer: TextTokenizer, *, num_threads: int | None = None, progress: bool = True
) -> TokenReport:
    """Tokenize the shards of a folder that have no up-to-date token file, on all cores.

    One process works, others that call this for the same folder wait for it. A shard's file appears when it is
    complete, so an interrupted run continues with the shard it was at.

    Args:
        data_dir: folder of parquet shards with a string column ``text``; null and empty texts are skipped.
        num_threads: None is one per core.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the folder is missing, has fewer than two shards, or one that cannot be read; or the token files
            cannot be written.
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
                _tokenize_all(stale, directory, tokenizer, num_threads or os.cpu_count() or 1, progress)
        except OSError as error:
            raise UserError(
                f"cannot write token files to {directory} ({error.strerror}); make room or give it write permission"
            ) from error
    headers = [_read_header(_token_path(directory, shard), tokenizer) for shard in shards]
    return TokenReport(
        directory=directory,
        shards=len(shards),
        made=len(stale),
        documents=sum(header.documents for header in headers),
        tokens=sum(header.tokens for header in headers),
        skipped=sum(header.skipped for header in headers),
    )


def _token_path(directory: Path, shard: Path) -> Path:
    return directory / f"{shard.stem}.tokens"


def _read_header(path: Path, tokenizer: TextTokenizer) -> Header:
    header = Header.read(path)
    if header is None or header.tokenizer != tokenizer.fingerprint:
        state = "damaged" if path.exists() else "missing"
        raise UserError(f"the token file {path} is {state}; make it with `lmchat data tokenize`")
    return header


def _stale(shards: Iterable[Path], directory: Path, tokenizer: TextTokenizer) -> list[Path]:
    return [shard for shard in shards if not _is_current(_token_path(directory, shard), shard, tokenizer)]


def _is_current(path: Path, shard: Path, tokenizer: TextTokenizer) -> bool:
    header, status = Header.read(path), shard.stat()
    return (
        header is not None
        and header.tokenizer == tokenizer.fingerprint
        and (header.source.size, header.source.mtime_ns) == (status.st_size, status.st_mtime_ns)
        and header.source.footer == _footer_digest(shard)
    )


def _restamp(directory: Path, shard: Path, tokenizer: TextTokenizer) -> bool:
    """Whether the shard differs from the tokenized one in its time stamp only, as a copy does; if so, note it."""
    path = _token_path(directory, shard)
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
    """Digest of a parquet file's footer: sizes, offsets and statistics of every column chunk."""
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


def _tokenize_all(
    shards: Sequence[Path], directory: Path, tokenizer: TextTokenizer, num_threads: int, progress: bool
) -> None:
    """Every shard in turn, on one pool of threads: tiktoken and pyarrow release the GIL."""
    if not shards:
        return
    total = sum(_count_rows(shard) for shard in shards)
    with (
        ThreadPoolExecutor(num_threads) as pool,
        ProgressBar("Tokenizing", total, unit="documents", enabled=progress) as bar,
    ):
        for shard in shards:
            encode = _OrderedEncoder(pool, tokenizer, look_ahead=2 * num_threads)
            path = _token_path(directory, shard)
            for documents in _write_token_file(path, shard, encode, tokenizer.fingerprint):
                bar.advance(documents)


def _count_rows(shard: Path) -> int:
    with open_parquet(shard) as parquet:
        check_text_column(parquet, shard)
        return int(parquet.metadata.num_rows)


@dataclass
class _Chunk:
    """Some documents on end. rows: how many rows of the parquet file they come from."""

    rows: int
    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]


class _OrderedEncoder:
    """Texts to chunks of tokens, in order, with a bounded number of chunks under way."""

    def __init__(self, pool: ThreadPoolExecutor, tokenizer: TextTokenizer, look_ahead: int) -> None:
        self.pool = pool
        self.tokenizer = tokenizer
        self.look_ahead = look_ahead
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def __call__(self, texts: Iterable[str | None]) -> Iterator[_Chunk]:
        under_way: deque[Future[_Chunk]] = deque()
        for chunk in _split(texts, _CHUNK_CHARACTERS):
            under_way.append(self.pool.submit(self._encode, chunk))
            if len(under_way) > self.look_ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def _encode(self, texts: Sequence[str | None]) -> _Chunk:
        bos = np.array([self.tokenizer.bos_id], dtype=self.dtype)
        documents = [self.tokenizer.encode_to_numpy(text).astype(self.dtype) for text in texts if text]
        lengths = np.array([1 + len(document) for document in documents], dtype=np.int64)
        parts = [part for document in documents for part in (bos, document)]
        return _Chunk(len(texts), np.concatenate(parts or [bos[:0]]), lengths)


def _split(texts: Iterable[str | None], characters: int) -> Iterator[list[str | None]]:
    """Consecutive texts in lists of at least ``characters`` characters, the last one excepted."""
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
    """Tokenize one shard; yields the number of rows done as it goes. The file appears when it is complete."""
    source = _identify(shard)
    rows = tokens = crc = 0
    lengths = [np.zeros(1, dtype=np.int64)]
    with synced_file(path) as file:

        def append(array: npt.NDArray[Any]) -> None:
            nonlocal crc
            data = array.tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)

        file.write(bytes(_HEADER_BYTES))
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


class TokenShard:
    """One token file in memory. tokens: (tokens,) uint16 or uint32; offsets: (documents + 1,) int64.

    Raises:
        UserError: the file's checksum is wrong. It is computed once, which also reads the file ahead.
    """

    def __init__(self, path: Path, header: Header) -> None:
        # Arrow's mapping outlives its file descriptor: thousands of shards stay within the limit of open files.
        with pa.memory_map(str(path)) as file:
            data = file.read_buffer()
        if zlib.crc32(data[_HEADER_BYTES:]) != header.crc32:
            raise UserError(f"the token file {path} is damaged (wrong checksum); delete it, and it is made anew")
        self.tokens = np.frombuffer(data, dtype=header.dtype, count=header.tokens, offset=_HEADER_BYTES)
        self.offsets = np.frombuffer(data, dtype=np.int64, offset=header.offsets_at)


class TokenShards:
    """The documents of several token files, numbered through. Files are opened when first read.

    Args:
        paths: token files in the order of their documents.
    Raises:
        UserError: a file is missing or damaged, or there is no document in any of them.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: TextTokenizer) -> None:
        self.paths = list(paths)
        self._headers = [_read_header(path, tokenizer) for path in self.paths]
        self._opened: list[TokenShard | None] = [None] * len(self.paths)
        # The first document of each shard, and the number of documents.
        self._firsts: list[int] = np.cumsum([0, *(header.documents for header in self._headers)]).tolist()
        if not len(self):
            raise UserError(f"there is no text in {', '.join(path.stem for path in self.paths)}; import some more")
        self.dtype = np.dtype(self._headers[0].dtype)
        self.lengths = DocumentLengths(self)

    @classmethod
    def open_split(cls, data_dir: Path, tokenizer: TextTokenizer) -> tuple[TokenShards, TokenShards]:
        """The training shards and the validation shard, after `prepare_token_shards`."""
        directory = token_dir(data_dir, tokenizer)
        paths = [_token_path(directory, shard) for shard in list_shards(data_dir)]
        return cls(paths[:-1], tokenizer), cls(paths[-1:], tokenizer)

    def __len__(self) -> int:
        """Number of documents."""
        return self._firsts[-1]

    @cached_property
    def fingerprint(self) -> str:
        """Names the documents and their order, wherever the files lie and whatever they are called."""
        contents = [(header.documents, header.tokens, header.crc32) for header in self._headers]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(header.tokens for header in self._headers)

    def shard_of(self, document: int) -> int:
        """The position of the shard that holds a document."""
        return bisect_right(self._firsts, document) - 1

    def open(self, shard: int) -> tuple[TokenShard, int]:
        """A shard and the number of its first document."""
        opened = self._opened[shard]
        if opened is None:
            opened = self._opened[shard] = TokenShard(self.paths[shard], self._headers[shard])
        return opened, self._firsts[shard]

    def copy(self, document: int, into: npt.NDArray[np.unsignedinteger]) -> None:
        """Fill an array of the shards' dtype with the document's first tokens."""
        shard, first = self.open(self.shard_of(document))
        start = int(shard.offsets[document - first])
        into[:] = shard.tokens[start : start + len(into)]


class DocumentLengths:
    """Document lengths of `TokenShards` as a sequence; a slice reads no more of the files than it covers."""

    def __init__(self, shards: TokenShards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> npt.NDArray[np.int64]: ...
    def __getitem__(self, index: int | slice) -> int | npt.NDArray[np.int64]:
        if isinstance(index, int):
            return int(self[index : index + 1][0])
        start, stop, step = index.indices(len(self))
        assert step == 1
        parts = []
        while start < stop:
            shard, first = self._shards.open(self._shards.shard_of(start))
            end = min(stop, first + len(shard.offsets) - 1)
            parts.append(np.diff(shard.offsets[start - first : end - first + 1]))
            start = end
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
