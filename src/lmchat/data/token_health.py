"""Lengths in tokens: their histogram, and what packing into rows crops, splits or pads."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.mixture import Mixture
from lmchat.data.packing import BestFitPacker
from lmchat.data.padded_batches import PaddedPlan
from lmchat.data.rendered_conversations import RenderedConversations, render_all
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
    train = [name for name in lengths if name != shards[-1].name]
    packed, cropped = packing_losses([lengths[name] for name in train], sequence_len)
    if len(train) < len(lengths):
        cropped += packing_losses([lengths[shards[-1].name]], sequence_len)[1]
    return {
        "name": f"tokenizer {folder.name}",
        "sequence_len": sequence_len,
        "shards": [
            {"shard": name, **_summary(each, sequence_len + 1), "cropped": share, **FULL_ROWS}
            for (name, each), share in zip(lengths.items(), cropped, strict=True)
        ],
        "total": _summary(np.concatenate(list(lengths.values())), sequence_len + 1),
        "packed": {**packed, **FULL_ROWS},
    }


def check_mixture(name: str, mixture: Mixture, tokenizer: Tokenizer, sequence_len: int) -> dict[str, Any]:
    """Numbers per task of a mixture, and of packing all into rows, as for fine-tuning.

    Raises:
        UserError: a conversation is malformed, or there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        render_all(mixture, tokenizer, sequence_len, Path(folder), title=f"Rendering {name}")
        rendered = RenderedConversations(Path(folder))
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


def packing_losses(shards: Sequence[Lengths], sequence_len: int) -> tuple[dict[str, float], list[float]]:
    """What training does to the documents that it packs until each has been placed once, with the default buffer.

    Args:
        shards: lengths of each shard's documents, which are packed as one stream.
        sequence_len: T; packed rows have T + 1 tokens.

    Returns:
        ``cropped``: share of the tokens that ``--data.long_documents crop`` discards. ``split_documents``,
        ``split_tokens``: share of the documents that ``split`` cuts into pieces, and of the tokens after the first cut.
        And for each shard the share of its tokens that ``crop`` discards.
    """
    lengths = np.concatenate([np.zeros(0, np.int64), *shards])
    placed, _, cropped = _cuts(lengths, sequence_len, "crop")
    tokens, starts = placed * lengths, np.cumsum([len(shard) for shard in shards])[:-1]
    times, cuts, after = _cuts(lengths, sequence_len, "split")
    return {
        "cropped": _share(cropped, tokens),
        "split_documents": _share(cuts, times),
        "split_tokens": _share(after, times * lengths),
    }, [_share(*each) for each in zip(np.split(cropped, starts), np.split(tokens, starts), strict=True)]


def _cuts(lengths: Lengths, sequence_len: int, policy: Any) -> npt.NDArray[np.int64]:
    """(3, documents): how often each document was placed, how often cut, and its tokens after the first cut."""
    found = np.zeros((len(lengths), 3), dtype=np.int64)
    if not len(lengths):
        return found.T
    packer = BestFitPacker(lengths, row_tokens=sequence_len + 1, policy=policy)
    with ProgressBar(f"Packing ({policy})", len(lengths), unit="documents") as bar:
        while packer.placed < len(lengths):
            row = next(packer)
            # A row that starts inside a document continues one that has been counted.
            for document, taken in row[packer.start > 0 :]:
                length = int(lengths[document])
                if policy == "split" and taken == 1 < length:
                    continue  # the next row repeats this token, so the document starts there
                found[document] += (1, taken < length, length - taken)
            bar.set(packer.placed)
    return found.T
