"""Lengths in token files: their histogram, and what packing into rows crops or splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.packing import BestFitPacker
from lmchat.data.token_file import Header, read_offsets, token_dirs, token_path
from lmchat.progress import ProgressBar

Lengths = npt.NDArray[np.int64]


def check_tokens(
    data_dir: Path, shards: Sequence[Path], sequence_len: int, *, progress: bool = True
) -> list[dict[str, Any]]:
    """For each tokenizer with token files of the shards: numbers per shard, and of the training shards.

    Token files that are missing or of another format are left out; ``packed`` is None unless all training shards are
    there.

    Args:
        data_dir: folder of the shards.
        shards: the shards; the last is for validation.
        sequence_len: T; packed rows have T + 1 tokens.
        progress: show a progress bar on stderr.

    Raises:
        UserError: a token file has wrong offsets.
    """
    folders = [folder for parent in token_dirs(data_dir) for folder in sorted(parent.glob("*")) if folder.is_dir()]
    return [
        report for folder in folders if (report := _check_folder(folder, shards, sequence_len, progress)) is not None
    ]


def _check_folder(folder: Path, shards: Sequence[Path], sequence_len: int, progress: bool) -> dict[str, Any] | None:
    lengths: dict[str, Lengths] = {}
    for shard in shards:
        path = token_path(folder, shard)
        if (header := Header.read(path)) is not None:
            lengths[shard.name] = np.diff(read_offsets(path, header))
    if not lengths:
        return None
    train = [lengths[shard.name] for shard in shards[:-1] if shard.name in lengths]
    whole = len(train) == len(shards) - 1 and sum(map(len, train)) > 0
    return {
        "folder": str(folder),
        "sequence_len": sequence_len,
        "shards": [{"shard": name, **_summary(each, sequence_len)} for name, each in lengths.items()],
        "total": _summary(np.concatenate(list(lengths.values())), sequence_len),
        "packed": packing_losses(np.concatenate(train), sequence_len, progress=progress) if whole else None,
    }


def _summary(lengths: Lengths, sequence_len: int) -> dict[str, Any]:
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max(initial=0)),
        "longer_than_a_row": int((lengths > sequence_len + 1).sum()),
        "histogram": length_histogram(lengths),
    }


def length_histogram(lengths: Lengths) -> dict[str, int]:
    """Numbers of documents by length in tokens; the key N counts lengths from N to 2N − 1, for powers of two."""
    exponents = np.frexp(lengths)[1] - 1
    return {str(1 << int(e)): int(count) for e, count in zip(*np.unique(exponents, return_counts=True), strict=True)}


def packing_losses(lengths: Lengths, sequence_len: int, *, progress: bool = True) -> dict[str, float]:
    """What training does to the documents that it packs until each has been placed once, with the default buffer.

    Returns:
        ``cropped``: share of the tokens that ``--data.long_documents crop`` discards. ``split_documents``,
        ``split_tokens``: share of the documents that ``split`` cuts into pieces, and of the tokens after the first cut.
    """
    cropped = _cut_tokens(lengths, sequence_len, "crop", progress)
    split = _cut_tokens(lengths, sequence_len, "split", progress)
    return {
        "cropped": cropped[1] / cropped[3],
        "split_documents": split[0] / split[2],
        "split_tokens": split[1] / split[3],
    }


def _cut_tokens(lengths: Lengths, sequence_len: int, policy: Any, progress: bool) -> tuple[int, int, int, int]:
    """Documents cut, tokens after their first cut, documents placed, their tokens."""
    packer = BestFitPacker(lengths, row_tokens=sequence_len + 1, policy=policy)
    cut = tokens_cut = documents = tokens = 0
    with ProgressBar(f"Packing ({policy})", len(lengths), unit="documents", enabled=progress) as bar:
        while packer.placed < len(lengths):
            row = next(packer)
            # A row that begins inside of a document continues one that has been counted.
            for document, taken in row[packer.start > 0 :]:
                length = int(lengths[document])
                if policy == "split" and taken == 1 < length:
                    continue  # the next row holds this token again, so that it begins the document
                cut += taken < length
                tokens_cut += length - taken
                documents += 1
                tokens += length
            bar.set(packer.placed)
    return cut, tokens_cut, documents, tokens
