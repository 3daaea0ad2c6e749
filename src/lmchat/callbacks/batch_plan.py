"""Gradient accumulation from the global batch."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmchat.scaling import accumulation_steps
from lmchat.types import UserError


class BatchPlan(Callback):
    """Fills the module's ``global_batch_tokens`` with micro-batches: sets ``trainer.accumulate_grad_batches``."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        tokens = pl_module.global_batch_tokens
        if tokens is None:
            raise UserError("no global batch is set; give --model.global_batch_tokens, e.g. 524288")
        trainer.accumulate_grad_batches = accumulation_steps(
            tokens, trainer.datamodule.micro_batch_size, pl_module.sequence_len, trainer.world_size
        )
