"""What the README says of adding an optimizer: a stage that trains with torch's own AdamW."""

from __future__ import annotations

from typing import Any

import torch

from lmchat.stages.pretrain import PretrainModule


class AdamWModule(PretrainModule):
    """Pretraining with one group of AdamW, whose learning rate the stage's schedule drives."""

    def configure_optimizers(self) -> Any:
        group = {"params": list(self.net.parameters()), "kind": "adamw", "lr": 1e-3, "initial_lr": 1e-3}
        return torch.optim.AdamW([group])
