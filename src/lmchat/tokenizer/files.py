"""Reads and writes byte-level BPE vocabularies: Hugging Face ``tokenizer.json``, tiktoken ranks, JSON ranks.

A vocabulary is a mapping of token bytes to rank, which is both id and merge priority, as in tiktoken. Special tokens
are not part of it: their ids follow the last rank. Readers raise ValueError, KeyError, TypeError or OSError on a
damaged file; callers turn these into a UserError.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmchat.files import json_object
from lmchat.types import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers.pre_tokenizers import PreTokenizer


_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_SUBSTITUTES = iter(range(0x100, 0x200))
BYTE_CHARACTERS = tuple(chr(byte if byte in _PRINTABLE else next(_SUBSTITUTES)) for byte in range(256))
"""The character of each byte in ``tokenizer.json``, as introduced by GPT-2: itself, if it is printable Latin-1, or the
next one from U+0100 on."""
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def to_characters(token: bytes) -> str:
    """Converts token bytes to the printable string in ``tokenizer.json``."""
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def from_characters(token: str) -> bytes:
    """The inverse of `to_characters`. Raises KeyError for a character without a byte."""
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def merge_pairs(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of two or more bytes is merged from, in rank order.

    Merging a token's bytes with lower ranks only leaves exactly two parts: the pair.

    Raises:
        UserError: it does not, so the ranks are not those of a byte-pair encoding.
    """
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        pieces = _merge(token, ranks)
        if len(pieces) != 2:
            raise UserError(f"token {token!r} of rank {ranks[token]} is not the merge of two tokens of lower rank")
        pairs.append((pieces[0], pieces[1]))
    return pairs


def _merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    limit = ranks[token]
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        merged = [ranks.get(left + right, limit) for left, right in pairwise(pieces)]
        lowest = min(merged)
        if lowest == limit:
            break
        i = merged.index(lowest)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def pre_tokenizer(pattern: str) -> PreTokenizer:
    """Pre-tokenizer of the ``tokenizers`` library: splits by ``pattern``, then maps bytes to characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def hugging_face(ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]) -> HuggingFaceTokenizer:
    """The same tokenizer as an object of the ``tokenizers`` library; its ``save`` writes ``tokenizer.json``.

    Special tokens are vocabulary entries, not "added tokens", which the library would recognize in any text, so that a
    user could type ``<|assistant_end|>``.
    """
    from tokenizers import Tokenizer, decoders, models

    vocab = {to_characters(token): rank for token, rank in ranks.items()}
    vocab |= {name: len(ranks) + i for i, name in enumerate(special_tokens)}
    merges = [(to_characters(left), to_characters(right)) for left, right in merge_pairs(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def from_hugging_face(content: dict[str, Any], special_tokens: Sequence[str]) -> tuple[dict[bytes, int], str]:
    """Ranks and split pattern of a parsed ``tokenizer.json`` of a byte-level BPE with these special tokens."""
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    vocab: dict[str, int] = content["model"]["vocab"] | added
    n_ranks = len(vocab) - len(special_tokens)
    if [vocab.pop(name, None) for name in special_tokens] != list(range(n_ranks, n_ranks + len(special_tokens))):
        raise ValueError(f"its last {len(special_tokens)} entries are not {' '.join(special_tokens)}")
    ranks = {from_characters(token): rank for token, rank in sorted(vocab.items(), key=lambda entry: entry[1])}
    # Some converters list all pairs that a token can be merged from, one after another.
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"])
    results = list(dict.fromkeys(left + right for left, right in pairs))
    if [vocab.get(token) for token in results] != list(range(256, n_ranks)):
        raise ValueError("its ids are not in the order of its merges")
    return ranks, _split_pattern(content)


def _split_pattern(content: dict[str, Any]) -> str:
    match content["pre_tokenizer"]:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    raise ValueError("its pre_tokenizer is not a Split by a regular expression followed by ByteLevel")


def read_vocabulary(path: Path, special_tokens: Sequence[str], default_pattern: str) -> tuple[dict[bytes, int], str]:
    """Reads ranks and split pattern from a file in any of three formats.

    - ``tokenizer.json`` of the Hugging Face library;
    - a JSON object with ``mergeable_ranks`` [[base64, rank], ...] and ``pattern`` or ``split_pattern``;
    - tiktoken's rank file, with a token in base64 and its rank on each line; its pattern is ``default_pattern``.
    """
    if path.suffix != ".json":
        pairs, pattern = [line.split() for line in path.read_text(encoding="ascii").splitlines() if line], None
    else:
        content = json_object(path.read_bytes())
        if "mergeable_ranks" not in content:
            return from_hugging_face(content, special_tokens)
        pairs, pattern = content["mergeable_ranks"], content.get("pattern") or content.get("split_pattern")
    return {b64decode(token, validate=True): int(rank) for token, rank in pairs}, pattern or default_pattern
