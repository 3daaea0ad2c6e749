"""The documents of several memory-mapped token files as one sequence."""

from __future__ import annotations

import hashlib
import json
import threading
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lmchat.data.parquet_text import list_shards
from lmchat.data.token_file import HEADER_BYTES, Header, read_header, read_offsets, token_dir, token_path
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError, user_errors


def map_tokens(path: Path, header: Header) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]:
    """Maps the (tokens,) tokens, uint16 or uint32, and the (documents + 1,) offsets of a token file.

    Raises:
        UserError: the checksum is wrong. Computing it also reads the file into the page cache.
    """
    # Arrow closes the file descriptor after mapping, so thousands of shards stay within the limit of open files.
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    if header.file_bytes != len(data) or zlib.crc32(data[HEADER_BYTES:]) != header.crc32:
        raise UserError(f"the token file {path} is damaged (wrong checksum); delete it; it will be written again")
    tokens = np.frombuffer(data, dtype=header.dtype, count=header.tokens, offset=HEADER_BYTES)
    return tokens, np.frombuffer(data, dtype=np.int64, offset=header.offsets_at)


class TokenShards:
    """The documents of several token files as one sequence. Tokens are opened and verified on first use.

    Attributes:
        lengths: (documents,) int32, tokens of each document.

    Raises:
        UserError: a file is missing, damaged or of another tokenizer, or there are no documents.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer) -> None:
        self.paths = list(paths)
        self._headers = [read_header(path, tokenizer) for path in self.paths]
        self._opened: dict[int, tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64]]] = {}
        self._damage: list[UserError] = []
        # The first document of each shard, and the number of documents.
        self._firsts: list[int] = np.cumsum([0, *(header.documents for header in self._headers)]).tolist()
        if not len(self):
            raise UserError(f"there is no text in {', '.join(path.stem for path in self.paths)}; import some more")
        self.dtype = np.dtype(self._headers[0].dtype)
        offsets = [read_offsets(path, header) for path, header in zip(self.paths, self._headers, strict=True)]
        self.lengths = np.concatenate([np.diff(each) for each in offsets], dtype=np.int32, casting="same_kind")

    @classmethod
    def open_split(cls, data_dir: Path, tokenizer: Tokenizer) -> tuple[TokenShards, TokenShards]:
        """The training shards and the validation shard, after `prepare_token_shards`."""
        directory = token_dir(data_dir, tokenizer)
        paths = [token_path(directory, shard) for shard in list_shards(data_dir)]
        return cls(paths[:-1], tokenizer), cls(paths[-1:], tokenizer)

    def __len__(self) -> int:
        return self._firsts[-1]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the documents and their order; does not depend on paths."""
        contents = [(header.documents, header.tokens, header.crc32) for header in self._headers]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]

    @property
    def tokens(self) -> int:
        return sum(header.tokens for header in self._headers)

    def share_beyond(self, max_tokens: int) -> float:
        """Share of the tokens that come after the first ``max_tokens`` of their document."""
        return int((self.lengths - max_tokens).clip(min=0).sum(dtype=np.int64)) / self.tokens

    def shard_of(self, document: int) -> int:
        return bisect_right(self._firsts, document) - 1

    def check_in_background(self) -> None:
        """Verifies the checksums of all files in a thread; the next `copy` after a wrong one raises UserError."""
        threading.Thread(target=self._check_all, name="token file check", daemon=True).start()

    def _check_all(self) -> None:
        for shard, (path, header) in enumerate(zip(self.paths, self._headers, strict=True)):
            if shard not in self._opened:  # open shards have been checked
                try:
                    with user_errors(f"cannot read the token file {path}", "check its disk, or delete it", OSError):
                        map_tokens(path, header)
                except UserError as error:
                    self._damage.append(error)
                    return

    def copy(self, document: int, into: npt.NDArray[np.unsignedinteger], start: int = 0) -> None:
        """Fills an array of the shards' dtype with the tokens of a document from token ``start`` on.

        Raises:
            UserError: the document's file is damaged, or `check_in_background` has found a damaged one.
        """
        if self._damage:
            raise self._damage[0]
        number = self.shard_of(document)
        if number not in self._opened:
            self._opened[number] = map_tokens(self.paths[number], self._headers[number])
        tokens, offsets = self._opened[number]
        start += int(offsets[document - self._firsts[number]])
        into[:] = tokens[start : start + len(into)]
