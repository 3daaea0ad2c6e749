"""Lengths in tokens: their histogram, and what packing into rows crops or pads."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.mixture import Mixture
from lmchat.data.packing import BestFitPacker
from lmchat.data.padded_batches import PaddedPlan
from lmchat.data.rendered_conversations import render_all
from lmchat.data.token_file import Header, read_offsets, token_dirs, token_path
from lmchat.progress import ProgressBar
from lmchat.tokenizer.bpe import Tokenizer

Lengths = npt.NDArray[np.integer[Any]]

FULL_ROWS = {"padded": 0.0, "masked_rows": 0}
"""Rows of pretraining have no padding, and all of their tokens receive loss."""


def check_tokens(data_dir: Path, shards: Sequence[Path], sequence_len: int) -> list[dict[str, Any]]:
    """For each tokenizer with token files of the shards: numbers per shard, and of packing the training shards.

    Token files that are missing or of another format are left out. Packed rows have ``sequence_len`` + 1 tokens. The
    last shard is for validation, and packed by itself.

    Raises:
        UserError: a token file has wrong offsets.
    """
    folders = [folder for parent in token_dirs(data_dir) for folder in sorted(parent.glob("*")) if folder.is_dir()]
    return [report for folder in folders if (report := _check_folder(folder, shards, sequence_len)) is not None]


def _check_folder(folder: Path, shards: Sequence[Path], sequence_len: int) -> dict[str, Any] | None:
    lengths: dict[str, Lengths] = {}
    for shard in shards:
        path = token_path(folder, shard)
        if (header := Header.read(path)) is not None:
            lengths[shard.name] = np.diff(read_offsets(path, header))
    if not lengths:
        return None
    documents = np.concatenate(list(lengths.values()))
    training = sum(len(each) for name, each in lengths.items() if name != shards[-1].name)
    streams = [_cropped(part, sequence_len) for part in (documents[:training], documents[training:])]
    starts = np.cumsum([len(each) for each in lengths.values()])[:-1]
    cropped = map(_share, *(np.split(each, starts) for each in np.concatenate(streams, axis=1)))
    return {
        "name": f"tokenizer {folder.name}",
        "sequence_len": sequence_len,
        "shards": [
            {"shard": name, **_summary(each, sequence_len + 1), "cropped": share, **FULL_ROWS}
            for (name, each), share in zip(lengths.items(), cropped, strict=True)
        ],
        "total": _summary(documents, sequence_len + 1),
        "packed": {"cropped": _share(*streams[0]), **FULL_ROWS},
    }


def check_mixture(name: str, mixture: Mixture, tokenizer: Tokenizer, sequence_len: int) -> dict[str, Any]:
    """Numbers per task of a mixture, and of packing all into rows, as for fine-tuning.

    Raises:
        UserError: a conversation is malformed, or there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendered = render_all(mixture, tokenizer, sequence_len, Path(folder), title=f"Rendering {name}")
    plan = PaddedPlan(rendered, sequence_len, rows_per_step=1)
    cut, lengths, owners = rendered.cut_tokens, rendered.lengths + rendered.cut_tokens, mixture.part_numbers
    return {
        "name": f"{name} mixture",
        "sequence_len": sequence_len,
        "shards": [
            {
                "shard": part.task.name,
                **_summary(lengths[owners == number], sequence_len),
                "cropped": _share(cut[owners == number], lengths[owners == number]),
            }
            for number, part in enumerate(mixture.parts)
        ],
        "total": _summary(lengths, sequence_len),
        "packed": {
            "cropped": _share(cut, lengths),
            "padded": plan.padded_share(),
            "masked_rows": plan.masked_rows(),
            "rows": plan.num_rows,
        },
    }


def _summary(lengths: Lengths, row_tokens: int) -> dict[str, Any]:
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max(initial=0)),
        "longer_than_a_row": int((lengths > row_tokens).sum()),
        "histogram": length_histogram(lengths),
    }


def _share(part: Lengths, whole: Lengths) -> float:
    return float(part.sum() / max(1, whole.sum()))


def length_histogram(lengths: Lengths) -> dict[str, int]:
    """Numbers of documents by length in tokens; the key N counts lengths from N to 2N − 1, for powers of two."""
    exponents = np.frexp(lengths)[1] - 1
    return {str(1 << int(e)): int(count) for e, count in zip(*np.unique(exponents, return_counts=True), strict=True)}


def _cropped(lengths: Lengths, sequence_len: int) -> npt.NDArray[np.int64]:
    """(2, documents): tokens of each that ``--data.long_documents crop`` discards, and all of its tokens.

    The documents are packed as one stream, with the default buffer, until each has been placed once; those that are
    placed more often count as often.
    """
    found = np.zeros((2, len(lengths)), dtype=np.int64)
    if not len(lengths):
        return found
    packer = BestFitPacker(lengths, row_tokens=sequence_len + 1)
    with ProgressBar("Packing", len(lengths), unit="documents") as bar:
        while packer.placed < len(lengths):
            for document, taken in next(packer):
                found[:, document] += lengths[document] - taken, lengths[document]
            bar.set(packer.placed)
    return found
