"""The format of token files, which hold the tokens of one parquet shard.

A token file consists of a header of 4,096 bytes (JSON, readable with ``head -1``), the concatenated tokens of all
documents (uint16 or uint32, each document starting with BOS), and the int64 offsets of the documents and of the end.
The header identifies tokenizer and parquet file, so that changes of either are detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lmchat.files import json_object
from lmchat.paths import base_dir
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

_FORMAT = "lmchat tokens 1"
HEADER_BYTES = 4096
_DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Source:
    """Identity of a parquet file. ``sha256`` is compared only if the time stamp has changed."""

    size: int
    mtime_ns: int
    footer: str
    sha256: str


@dataclass(frozen=True)
class Header:
    """Header of a token file; ``crc32`` is the checksum of everything after it."""

    tokenizer: str
    dtype: str
    documents: int
    tokens: int
    skipped: int
    crc32: int
    source: Source

    @property
    def offsets_at(self) -> int:
        """Byte position of the offsets: after the tokens, aligned to 8."""
        return HEADER_BYTES + -(-self.tokens * np.dtype(self.dtype).itemsize // 8) * 8

    @property
    def file_bytes(self) -> int:
        return self.offsets_at + 8 * (self.documents + 1)

    def write(self, file: BinaryIO) -> None:
        line = json.dumps({"format": _FORMAT, **asdict(self)}).encode()
        file.seek(0)
        file.write(line.ljust(HEADER_BYTES - 1) + b"\n")

    def __post_init__(self) -> None:
        numbers = (self.documents, self.tokens, self.skipped, self.crc32, self.source.size)
        names = (self.tokenizer, self.source.footer, self.source.sha256)
        valid = self.dtype in _DTYPES and type(self.source.mtime_ns) is int
        if not valid or any(type(n) is not int or n < 0 for n in numbers) or any(type(n) is not str for n in names):
            raise ValueError("no header of a token file")

    @classmethod
    def read(cls, path: Path) -> Header | None:
        """Reads the header; None if the file is missing, truncated or in another format."""
        try:
            with path.open("rb") as file:
                fields = json_object(file.read(HEADER_BYTES))
                size = os.fstat(file.fileno()).st_size
            if fields.pop("format") != _FORMAT:
                return None
            header = cls(**{**fields, "source": Source(**fields["source"])})
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, KeyError, TypeError):
            return None
        return header if size == header.file_bytes else None


def token_dir(data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Folder of the token files: in the data folder, or in the base folder if the data folder is read-only."""
    beside, elsewhere = (folder / tokenizer.fingerprint[:12] for folder in token_dirs(data_dir))
    # Root can write anywhere, but a folder without any write bit should stay unchanged.
    if beside.is_dir() or (os.access(data_dir, os.W_OK) and stat.S_IMODE(data_dir.stat().st_mode) & 0o222):
        return beside
    return elsewhere


def token_dirs(data_dir: Path) -> tuple[Path, Path]:
    """The folders with a folder of token files per tokenizer: in the data folder, and in the base folder."""
    path = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()
    return data_dir / "tokens", base_dir() / "tokens" / f"{data_dir.resolve().name}-{path[:8]}"


def token_path(directory: Path, shard: Path) -> Path:
    return directory / f"{shard.stem}.tokens"


def read_header(path: Path, tokenizer: Tokenizer) -> Header:
    header = Header.read(path)
    if header is None or header.tokenizer != tokenizer.fingerprint:
        state = "damaged" if path.exists() else "missing"
        raise UserError(f"the token file {path} is {state}; make it with `lmchat data tokenize`")
    return header


def read_offsets(path: Path, header: Header) -> npt.NDArray[np.int64]:
    """The (documents + 1,) offsets of a token file, without a check of the whole file.

    Raises:
        UserError: they are damaged.
    """
    offsets = np.fromfile(path, dtype=np.int64, count=header.documents + 1, offset=header.offsets_at)
    whole = len(offsets) == header.documents + 1 and offsets[0] == 0 and offsets[-1] == header.tokens
    if not whole or (np.diff(offsets) < 1).any():
        raise UserError(f"the token file {path} is damaged (wrong offsets); delete it; it will be written again")
    return offsets
