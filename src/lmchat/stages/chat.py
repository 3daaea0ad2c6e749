"""What fine-tuning and reinforcement learning share: they start from a checkpoint and answer questions."""

from __future__ import annotations

from typing import Any

import torch

from lmchat.checkpoint.load import Checkpoint, load_model_state
from lmchat.generation.engine import Engine
from lmchat.model.config import GPTConfig
from lmchat.stages.base import StageModule
from lmchat.types import UserError


class ChatModule(StageModule):
    """A stage that takes its network, and every setting left open, from a checkpoint of this or an earlier stage.

    Args:
        init_lr_fraction: factor on every learning rate.
    """

    earlier_stages: tuple[str, ...]

    def __init__(self, *, init_lr_fraction: float = 1.0, weight_decay: float = 0.0, **kwargs: Any) -> None:
        super().__init__(weight_decay=weight_decay, **kwargs)
        self.lr_scale = init_lr_fraction
        self._config: GPTConfig | None = None
        self._start: Checkpoint | None = None
        self._inherited_tag = self.stage

    @property
    def default_tag(self) -> str:
        return self._inherited_tag

    @property
    def config(self) -> GPTConfig:
        if self._config is None:
            raise UserError(
                f"{self.stage} starts from a checkpoint; give one of stage {' or '.join(self.earlier_stages)} "
                "with --ckpt_path, e.g. its folder"
            )
        return self._config

    @property
    def sequence_len(self) -> int:  # type: ignore[override]
        return self.config.sequence_len

    def adopt(self, checkpoint: Checkpoint) -> None:
        if checkpoint.stage not in (self.stage, *self.earlier_stages):
            raise UserError(
                f"{checkpoint.paths.meta} is of stage {checkpoint.stage}; {self.stage} starts from "
                f"{' or '.join(self.earlier_stages)}"
            )
        self.continue_numerics(checkpoint)
        self._config = GPTConfig(**checkpoint.meta["model"])
        self._inherited_tag = checkpoint.meta["tag"]
        if self.global_batch_tokens is None:
            self.global_batch_tokens = checkpoint.meta["global_batch_tokens"]
        if checkpoint.stage != self.stage:
            self._start = checkpoint

    def configure_model(self) -> None:
        super().configure_model()
        if self._start is not None:
            self.net.load_state_dict(load_model_state(self._start))
            self._start = None

    @property
    def engine(self) -> Engine:
        return Engine(self.net, self.tokenizer)


def sum_over_step(loss_sum: torch.Tensor, loss_tokens: int, module: StageModule) -> torch.Tensor:
    """A micro-batch's share of the optimizer step's mean loss over ``loss_tokens`` tokens.

    The trainer divides by the number of micro-batches, and the strategy averages over ranks; both are taken back, so
    that every token of the step has the same weight wherever it lies.
    """
    trainer = module.trainer
    return loss_sum * (trainer.accumulate_grad_batches * trainer.world_size / loss_tokens)
