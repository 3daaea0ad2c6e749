"""Micro-batches of packed rows from token files."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lmchat.data.packing import BestFitPacker, PackedRow
from lmchat.data.token_shards import TokenShards
from lmchat.option_checks import check_count
from lmchat.types import Batch, UserError

DOCUMENTS_PER_ROW = 16
"""Room for document starts in a batch, doubled as often as needed."""


@dataclass(eq=False)
class PackedBatches(IterableDataset[Batch]):
    """The micro-batches of one rank, from a global sequence of packed rows.

    Micro-batch k, rows k·b … (k+1)·b − 1 of the sequence, belongs to rank k mod W. Every rank packs all rows, which
    needs lengths only, and gathers the tokens of its own rows. Data, order and state, which is that after W
    micro-batches, therefore do not depend on the world size.

    Args:
        shards: the documents, read in order and repeatedly.
        sequence_len: T; a packed row has T + 1 tokens, since targets are the inputs shifted by one.
        micro_batch_size: b, rows per micro-batch.
        buffer_size: documents that best-fit packing chooses from.
        long_documents: "crop" or "split", the policy of `BestFitPacker`.
        rank: r, this rank.
        world_size: W, number of ranks.
        state: state of the batch to continue after; None is the beginning.
        num_batches: batches per iteration, for evaluation; they have no state. None is endless.
        mask_documents: add ``document_starts`` to the batches.

    Raises:
        UserError: the state is a position in other documents.
    """

    shards: TokenShards
    _: KW_ONLY
    sequence_len: int
    micro_batch_size: int
    buffer_size: int = 1000
    long_documents: Literal["crop", "split"] = "crop"
    rank: int = 0
    world_size: int = 1
    state: dict[str, Any] | None = None
    num_batches: int | None = None
    mask_documents: bool = False

    def __post_init__(self) -> None:
        check_count(None, 1, sequence_len=self.sequence_len, micro_batch_size=self.micro_batch_size)
        self.fingerprint = self.shards.fingerprint + {"crop": "", "split": " split"}[self.long_documents]
        if self.state is not None and self.state.get("data") != self.fingerprint:
            raise UserError(
                f"the run to resume was trained on documents with the fingerprint {self.state.get('data')}, those of "
                f"{self.shards.paths[0].parent} have {self.fingerprint}; give the data it began with by "
                "--data.data_dir and --data.long_documents, or start a new run with another --model.tag"
            )
        assert 0 <= self.rank < self.world_size

    def __iter__(self) -> Iterator[Batch]:
        packer = BestFitPacker(
            self.shards.lengths,
            row_tokens=self.sequence_len + 1,
            buffer_size=self.buffer_size,
            policy=self.long_documents,
        )
        if self.state is not None:
            packer.restore(self.state)
        buffer = np.empty((self.micro_batch_size, self.sequence_len + 1), dtype=self.shards.dtype)
        for _ in count() if self.num_batches is None else range(self.num_batches):
            micro_batches = [
                [(row, packer.start) for row in islice(packer, self.micro_batch_size)] for _ in range(self.world_size)
            ]
            batch = self._gather(micro_batches[self.rank], buffer)
            if self.num_batches is None:
                batch["state"] = self._state(packer)
            yield batch

    def _gather(self, rows: list[tuple[PackedRow, int]], buffer: np.ndarray) -> Batch:
        """The batch of the given rows, each with its packer's ``start``; ``buffer`` is (rows, sequence_len + 1)."""
        starts = []
        for index, ((row, start), line) in enumerate(zip(rows, buffer, strict=True)):
            at = 0
            for document, tokens in row:
                self.shards.copy(document, line[at : at + tokens], start if at == 0 else 0)
                if at < self.sequence_len:
                    starts.append(index * self.sequence_len + at)
                at += tokens
        inputs, targets = torch.empty((2, len(rows), self.sequence_len), dtype=torch.int64)
        np.copyto(inputs.numpy(), buffer[:, :-1])
        np.copyto(targets.numpy(), buffer[:, 1:])
        batch = Batch(inputs=inputs, targets=targets)
        if self.mask_documents:
            batch["document_starts"] = _padded_starts(starts, len(rows), self.sequence_len)
        return batch

    def _state(self, packer: BestFitPacker) -> dict[str, Any]:
        """State of the packer (buffer as an int64 tensor), fingerprint of the data, epoch (from 0) and shard."""
        state = packer.state()
        state["buffer"] = torch.from_numpy(state["buffer"])
        epoch, document = divmod(packer.placed, len(self.shards))
        shard = self.shards.shard_of(document)
        return {**state, "data": self.fingerprint, "epoch": epoch, "shard": shard}


def _padded_starts(starts: list[int], rows: int, length: int) -> torch.Tensor:
    """Pads ``document_starts`` to `DOCUMENTS_PER_ROW` times a power of two, since a new size recompiles the blocks."""
    size = rows * DOCUMENTS_PER_ROW
    while size < len(starts):
        size *= 2
    padded = torch.full((size + 1,), rows * length, dtype=torch.int32)
    padded[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
    return padded
