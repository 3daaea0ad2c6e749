"""Micro-batches of padded rows of whole conversations, planned for one epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from lmchat.data.fingerprint import check_fingerprint
from lmchat.data.packing import BestFitPacker, PackedRow
from lmchat.data.position import count_in
from lmchat.data.rendered import RenderedConversations
from lmchat.types import IGNORE_INDEX, Batch

BUFFER_SIZE = 100
"""Conversations that best fit chooses from, as in nanochat."""


class PaddedPlan:
    """Assignment of conversations to rows for a whole epoch, by their lengths only.

    Rows are packed by best fit and padded; every conversation is in exactly one row. Steps take rows in order; the last
    step is filled up with empty rows.

    Args:
        conversations: the rendered conversations.
        sequence_len: T; a packed row has T + 1 tokens, since targets are the inputs shifted by one.
        rows_per_step: rows per optimizer step over all ranks.
    """

    def __init__(self, conversations: RenderedConversations, sequence_len: int, rows_per_step: int) -> None:
        self.conversations = conversations
        self.sequence_len = sequence_len
        self.rows_per_step = rows_per_step
        self.rows: list[PackedRow] = list(
            BestFitPacker(
                conversations.lengths,
                row_tokens=sequence_len + 1,
                buffer_size=BUFFER_SIZE,
                refill=1,
                policy="pad",
                epochs=1,
            )
        )

    @property
    def steps(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)

    def row(self, index: int) -> PackedRow:
        """Row number ``index`` of the epoch; empty beyond the last."""
        return self.rows[index] if index < len(self.rows) else []

    def padded_share(self) -> float:
        """Share of the positions of all rows that are padding."""
        return 1 - sum(length for row in self.rows for _, length in row) / (len(self.rows) * (self.sequence_len + 1))

    def masked_rows(self) -> int:
        """Number of rows without a token that receives loss."""
        counts = self.conversations.loss_tokens
        return sum(not any(counts[document] for document, _ in row) for row in self.rows)

    def loss_tokens(self, step: int) -> int:
        """Tokens with loss in an optimizer step over all ranks; at least 1, since the loss is divided by it."""
        rows = self.rows[step * self.rows_per_step : (step + 1) * self.rows_per_step]
        return max(1, int(sum(self.conversations.loss_tokens[document] for row in rows for document, _ in row)))


class PaddedBatches(IterableDataset[Batch]):
    """The micro-batches of one rank: micro-batch k of the plan belongs to rank k mod W, as in pretraining.

    Each batch has the number of tokens with loss in its optimizer step (``loss_tokens``), the divisor of its loss.
    Padding is ``bos_id``, without loss.

    Args:
        fingerprint: fingerprint of the plan's data; part of the state.
        state: state of the batch to continue after, with any number of ranks; None is the beginning.
        num_batches: number of batches; None is one epoch plus one batch, which is prefetched and never trained on.

    Raises:
        UserError: the state belongs to other data.
    """

    def __init__(
        self,
        plan: PaddedPlan,
        *,
        bos_id: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        fingerprint: dict[str, str] | None = None,
        state: dict[str, Any] | None = None,
        num_batches: int | None = None,
    ) -> None:
        self.plan = plan
        self.bos_id = bos_id
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.fingerprint = fingerprint or {}
        if state is not None:
            check_fingerprint(state.get("data"), self.fingerprint)
        rows = count_in(state, "rows", len(plan.rows)) if state else 0
        self.first = rows // (micro_batch_size * world_size)
        self.num_batches = num_batches

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.plan.rows_per_step // (self.micro_batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        last = self.plan.steps * self.micro_batches_per_step + 1 if self.num_batches is None else self.num_batches
        for number in range(self.first, last):
            batch = self._gather((number * self.world_size + self.rank) * self.micro_batch_size)
            if self.num_batches is None:
                batch["loss_tokens"] = self.plan.loss_tokens(number // self.micro_batches_per_step)
                rows = (number + 1) * self.micro_batch_size * self.world_size
                batch["state"] = {
                    "rows": rows,
                    "epoch": min(1.0, rows / len(self.plan.rows)),
                    "data": self.fingerprint,
                }
            yield batch

    def _gather(self, first_row: int) -> Batch:
        shape = (self.micro_batch_size, self.plan.sequence_len + 1)
        tokens, targets = np.full(shape, self.bos_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        for line in range(self.micro_batch_size):
            at = 0
            for document, length in self.plan.row(first_row + line):
                ids, mask = self.plan.conversations[document]
                tokens[line, at : at + length] = ids
                targets[line, at : at + length][mask] = ids[mask]
                at += length
        inputs, shifted = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())
        return Batch(inputs=inputs, targets=shifted)
