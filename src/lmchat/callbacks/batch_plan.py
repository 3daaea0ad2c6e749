"""Gradient accumulation from the global batch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class BatchPlan(Callback):
    """Fills the global batch with micro-batches: sets ``trainer.accumulate_grad_batches``."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            trainer.accumulate_grad_batches = pl_module.data.accumulation_steps(trainer.world_size)
