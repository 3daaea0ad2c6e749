"""Byte-level BPE: trained by Hugging Face ``tokenizers``, encoded by tiktoken, saved without pickle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from lmchat.files import json_object, replacing
from lmchat.option_checks import check_count
from lmchat.paths import expand_user
from lmchat.tokenizer import files
from lmchat.types import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Pre-tokenization pattern: GPT-4's, but with runs of at most two digits. Merges do not cross its matches."""

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""They have the last ids of every vocabulary, in this order."""

_FILE = "tokenizer.json"
_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_LARGEST_VOCABULARY = 2**24

# tiktoken's regex engine uses one stack entry per character of a whitespace run and panics beyond a million.
_WHITESPACE_LIMIT = 500_000
_LONG_WHITESPACE = re.compile(rf"(?<!\s)\s{{{_WHITESPACE_LIMIT}}}")


class TooFewMerges(UserError):
    """The text has too few byte pairs for the requested vocabulary; ``possible_vocab_size`` is the largest possible."""

    def __init__(self, message: str, possible_vocab_size: int) -> None:
        super().__init__(message)
        self.possible_vocab_size = possible_vocab_size


class Tokenizer:
    """A byte-level BPE tokenizer; the ids of the nine special tokens follow the last rank.

    Args:
        ranks: rank (id and merge priority) of each token's bytes. All 256 bytes, ranks 0..n-1.
        pattern: regular expression that splits text before merging.

    Attributes:
        bos_id: id of ``<|bos|>``, the first token of every document and conversation.
        vocab_size: number of ids, of ranks and special tokens.
        dtype: the smaller of uint16 and uint32 that holds all ids.

    Raises:
        UserError: the ranks have gaps or lack a byte, or the pattern is not a regular expression.
    """

    def __init__(self, ranks: Mapping[bytes, int], pattern: str = SPLIT_PATTERN) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise UserError(f"the {len(ranks)} ranks of a vocabulary must be 0..{len(ranks) - 1}, each once")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise UserError(f"a byte-level vocabulary needs all 256 single bytes; {missing[0]:#04x} is missing")
        self.ranks = dict(sorted(ranks.items(), key=lambda entry: entry[1]))
        self.pattern = pattern
        self._special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id = self.special("bos")
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        try:
            self._encoding = tiktoken.Encoding(
                "lmchat", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self._special_ids
            )
        except ValueError as error:
            raise UserError(f"the split pattern {pattern!r} is not a regular expression: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, pattern: str = SPLIT_PATTERN) -> Tokenizer:
        """Trains a vocabulary of exactly ``vocab_size`` entries, special tokens included. Deterministic.

        Of equally frequent pairs, the one with the lower ids is merged first.

        Raises:
            UserError: ``vocab_size`` is below 256 plus the number of special tokens, or above 2²⁴.
            TooFewMerges: the text has too few pairs to merge.
        """
        from tokenizers import Tokenizer as HuggingFaceTokenizer
        from tokenizers import models, trainers

        check_count(None, _SMALLEST_VOCABULARY, _LARGEST_VOCABULARY, vocab_size=vocab_size)
        trained = HuggingFaceTokenizer(models.BPE())
        trained.pre_tokenizer = files.pre_tokenizer(pattern)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=0,
            show_progress=False,
            # Given as first special tokens, the bytes get ids 0..255 in byte order. As the trainer's alphabet they
            # would be ordered by their printable character, and ties between pairs broken differently from nanochat.
            special_tokens=list(files.BYTE_CHARACTERS),
        )
        trained.train_from_iterator(texts, trainer)
        vocab = trained.get_vocab()
        if (possible := len(vocab) + len(SPECIAL_TOKENS)) < vocab_size:
            raise TooFewMerges(
                f"the text has pairs for only {len(vocab) - 256} merges, vocab_size {vocab_size} needs "
                f"{vocab_size - _SMALLEST_VOCABULARY}: give more text, or a vocab_size of at most {possible}",
                possible,
            )
        return cls({files.from_characters(token): rank for token, rank in vocab.items()}, pattern)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Loads a tokenizer written by `save`; reads only ``tokenizer.json``.

        Raises:
            UserError: there is no tokenizer in the folder, or it is damaged.
        """
        path = expand_user(directory) / _FILE
        if Path(directory).is_file():
            raise UserError(f"{directory} is a file; give the folder that contains the tokenizer")
        if not path.is_file():
            raise UserError(
                f"no tokenizer in {directory} ({_FILE} is missing): train one with `lmchat tokenizer train`"
            )
        try:
            return cls(*files.from_hugging_face(json_object(path.read_bytes()), SPECIAL_TOKENS))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the tokenizer {path} is damaged or not an lmchat tokenizer ({error}): "
                f"train it again with `lmchat tokenizer train --output {directory}`"
            ) from error

    @classmethod
    def import_file(cls, path: str | Path) -> Tokenizer:
        """Loads a vocabulary trained by another program; see `files.read_vocabulary` for the formats.

        Raises:
            UserError: the file is missing, or is not a byte-level BPE vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no tokenizer file {path}; give the path of an existing one")
        try:
            return cls(*files.read_vocabulary(path, SPECIAL_TOKENS, SPLIT_PATTERN))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"cannot import {path} ({error}): give a Hugging Face tokenizer.json of a byte-level BPE, a tiktoken "
                "rank file, or JSON with mergeable_ranks and pattern"
            ) from error

    def save(self, directory: str | Path) -> None:
        """Writes ``tokenizer.json``, which Hugging Face's library reads too."""
        path = Path(directory) / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files.hugging_face(self.ranks, self.pattern, SPECIAL_TOKENS).to_str(pretty=True)
        with replacing(path) as unfinished:
            unfinished.write_text(content, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``. Special tokens in it are ordinary characters; lone surrogates become U+FFFD."""
        if len(text) < _WHITESPACE_LIMIT:
            return self._encoding.encode_ordinary(text)
        return [token for segment in _segments(text) for token in self._encoding.encode_ordinary(segment)]

    def encode_to_numpy(self, text: str) -> npt.NDArray[np.uint32]:
        """`encode` as a (tokens,) uint32 array, without building a Python list."""
        try:
            arrays = [self._encoding.encode_to_numpy(segment, disallowed_special=()) for segment in _segments(text)]
        except UnicodeEncodeError:
            # As in tiktoken's encode_ordinary: surrogate pairs are joined, lone ones replaced.
            return self.encode_to_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``; they may end in the middle of a character."""
        return self._encoding.decode_bytes(ids)

    def special(self, name: str) -> int:
        """Id of a special token, given its name without brackets: ``special("assistant_end")``."""
        return self._special_ids[f"<|{name}|>"]

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """(vocab_size,) int32: number of bytes of each token's text, 0 for special tokens."""
        return np.array([*map(len, self.ranks), *[0] * len(SPECIAL_TOKENS)], dtype=np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of ranks, pattern and special tokens."""
        digest = hashlib.sha256()
        for part in (self.pattern.encode(), *map(str.encode, SPECIAL_TOKENS), *self.ranks):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def _segments(text: str) -> Iterator[str]:
    """Splits the text within whitespace runs that are too long for tiktoken."""
    while len(text) >= _WHITESPACE_LIMIT and (run := _LONG_WHITESPACE.search(text)):
        yield text[: run.end()]
        text = text[run.end() :]
    yield text
