"""Gradient accumulation from the global batch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmchat.types import UserError


class BatchPlan(Callback):
    """Fills the module's ``global_batch_tokens`` with micro-batches: sets ``trainer.accumulate_grad_batches``."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        tokens = pl_module.global_batch_tokens
        if tokens is None:
            raise UserError("no global batch is set; give --model.global_batch_tokens, e.g. 524288")
        trainer.accumulate_grad_batches = accumulation_steps(
            tokens, pl_module.data.micro_batch_size, pl_module.sequence_len, trainer.world_size
        )


def accumulation_steps(global_batch_tokens: int, micro_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step.

    Args:
        global_batch_tokens: tokens per optimizer step over all ranks.
        micro_batch_size: rows per micro-batch and rank.
        sequence_len: tokens per row.
        world_size: number of ranks.

    Raises:
        UserError: the global batch is not a whole number of rounds of micro-batches; names what would fit.
    """
    round_tokens = micro_batch_size * sequence_len * world_size
    steps, rest = divmod(global_batch_tokens, round_tokens)
    if rest == 0 and steps > 0:
        return steps
    smaller = [n for n in range(1, micro_batch_size) if global_batch_tokens % (n * sequence_len * world_size) == 0]
    nearest = [n * round_tokens for n in (steps, steps + 1) if n]
    remedies = [f"--data.micro_batch_size {smaller[-1]}"] if smaller else []
    remedies += [f"--model.global_batch_tokens {tokens}" for tokens in nearest]
    raise UserError(
        f"global_batch_tokens {global_batch_tokens} is not a multiple of micro_batch_size {micro_batch_size} × "
        f"sequence_len {sequence_len} × {world_size} rank(s) = {round_tokens}; use {' or '.join(remedies)}"
    )
