"""Micro-batches of padded rows of whole conversations, planned for one epoch."""

from array import array
from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset

from lmchat.data.mixture import check_fingerprint
from lmchat.data.packing import BestFitPacker
from lmchat.data.rendered_conversations import RenderedConversations
from lmchat.option_checks import count_in
from lmchat.progress import ProgressBar
from lmchat.types import IGNORE_INDEX, Batch

BUFFER_SIZE = 100
"""Conversations that best fit chooses from, as in nanochat."""


class PaddedPlan:
    """Assignment of conversations to rows for a whole epoch, by their lengths only.

    Rows are packed by best fit and padded; every conversation is in exactly one row. Steps take rows in order; the last
    step is filled up with empty rows.

    Args:
        sequence_len: T; a packed row has T + 1 tokens, since targets are the inputs shifted by one.
        rows_per_step: rows per optimizer step over all ranks.
    """

    def __init__(
        self, conversations: RenderedConversations, sequence_len: int, rows_per_step: int, *, progress: bool = True
    ) -> None:
        self.conversations = conversations
        self.sequence_len = sequence_len
        self.rows_per_step = rows_per_step
        packer = BestFitPacker(
            conversations.lengths,
            row_tokens=sequence_len + 1,
            buffer_size=BUFFER_SIZE,
            refill=1,
            policy="pad",
            epochs=1,
        )
        # Arrays instead of lists: there may be millions of conversations.
        documents, bounds = array("I"), array("q", [0])
        with ProgressBar("Packing", len(conversations.lengths), unit="conversations", enabled=progress) as bar:
            for row in packer:
                documents.extend(document for document, _ in row)
                bounds.append(len(documents))
                bar.update(len(row))
        self._documents, self._bounds = np.asarray(documents), np.asarray(bounds)
        self.num_rows = len(bounds) - 1
        self.steps = -(-self.num_rows // rows_per_step)

    def documents(self, first_row: int, rows: int = 1) -> npt.NDArray[np.uint32]:
        """Indices of the conversations in ``rows`` rows of the epoch, in order; none beyond the last row."""
        start, end = self._bounds[np.minimum((first_row, first_row + rows), self.num_rows)]
        return self._documents[start:end]

    def padded_share(self) -> float:
        """Share of the positions of all rows that are padding."""
        return 1 - int(self.conversations.lengths.sum()) / (self.num_rows * (self.sequence_len + 1))

    def masked_rows(self) -> int:
        """Number of rows without a token that receives loss."""
        counts = np.add.reduceat(self.conversations.loss_tokens[self._documents], self._bounds[:-1])
        return int((counts == 0).sum())

    def loss_tokens(self, step: int) -> int:
        """Tokens with loss in an optimizer step over all ranks; at least 1, since the loss is divided by it."""
        documents = self.documents(step * self.rows_per_step, self.rows_per_step)
        return max(1, int(self.conversations.loss_tokens[documents].sum()))


@dataclass(eq=False)
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

    plan: PaddedPlan
    _: KW_ONLY
    bos_id: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    fingerprint: dict[str, str] = field(default_factory=dict)
    state: InitVar[dict[str, Any] | None] = None
    num_batches: int | None = None

    def __post_init__(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            check_fingerprint(state.get("data"), self.fingerprint)
        rows = count_in(state, "rows", self.plan.steps * self.plan.rows_per_step) if state else 0
        self.first = rows // (self.micro_batch_size * self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        per_step = self.plan.rows_per_step // (self.micro_batch_size * self.world_size)
        last = self.plan.steps * per_step + 1 if self.num_batches is None else self.num_batches
        for number in range(self.first, last):
            batch = self._gather((number * self.world_size + self.rank) * self.micro_batch_size)
            if self.num_batches is None:
                batch["loss_tokens"] = self.plan.loss_tokens(number // per_step)
                rows = (number + 1) * self.micro_batch_size * self.world_size
                epoch = min(1.0, rows / self.plan.num_rows)
                batch["state"] = {"rows": rows, "epoch": epoch, "data": self.fingerprint}
            yield batch

    def _gather(self, first_row: int) -> Batch:
        shape = (self.micro_batch_size, self.plan.sequence_len + 1)
        tokens, targets = np.full(shape, self.bos_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        for line in range(self.micro_batch_size):
            at = 0
            for document in self.plan.documents(first_row + line):
                ids, mask = self.plan.conversations[document]
                length = len(ids)
                tokens[line, at : at + length] = ids
                targets[line, at : at + length][mask] = ids[mask]
                at += length
        inputs, shifted = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())
        return Batch(inputs=inputs, targets=shifted)
