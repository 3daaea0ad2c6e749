"""A stage with another optimizer, torch's AdamW, as the README describes."""

from __future__ import annotations

from typing import Any

import torch

from lmchat.stages.pretrain import PretrainModule


class AdamWModule(PretrainModule):
    """Pretraining with one AdamW group, whose learning rate the stage's schedule sets."""

    def configure_optimizers(self) -> Any:
        group = {"params": list(self.net.parameters()), "kind": "adamw", "lr": 1e-3, "initial_lr": 1e-3}
        return torch.optim.AdamW([group])
