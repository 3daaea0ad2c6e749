"""From the depth to the whole training plan."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmchat.option_checks import check_range
from lmchat.scaling import Plan, make_plan


class ScalingLaws(Callback):
    """Decides batch, steps, learning-rate scale and weight decay from the model's depth (see `lmchat.scaling`).

    The horizon is ``trainer.max_steps`` where that is set, else ``target_flops``, else ``tokens_per_parameter``.
    A ``global_batch_tokens`` set on the module stays. Stages that do not scale with depth
    (``module.scales_with_depth`` is false) are left alone.

    Args:
        tokens_per_parameter: training tokens per scaling parameter (the blocks' matrices and the head).
        target_flops: total training FLOPs to spend, in place of the ratio.
        lr_scale: factor on every learning rate; null takes √(batch / 2¹⁹).
        weight_decay: Muon's weight decay at the start of training, as it is; null scales the module's by the law.
    """

    def __init__(
        self,
        tokens_per_parameter: float = 10.5,
        target_flops: float | None = None,
        lr_scale: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        options = {"target_flops": target_flops, "lr_scale": lr_scale, "weight_decay": weight_decay}
        given = {name: value for name, value in options.items() if value is not None}
        check_range("scaling_laws", tokens_per_parameter=tokens_per_parameter, **given)
        self.tokens_per_parameter = tokens_per_parameter
        self.target_flops = target_flops
        self.lr_scale = lr_scale
        self.weight_decay = weight_decay

    def plan(self, module: Any, max_steps: int) -> Plan:
        """What the laws make of a module that scales with depth; ``max_steps`` is the trainer's, -1 for none."""
        return make_plan(
            **module.shape,
            ratio=self.tokens_per_parameter,
            target_flops=self.target_flops,
            max_steps=max_steps if max_steps > 0 else None,
            global_batch_tokens=module.global_batch_tokens,
            weight_decay=module.weight_decay,
        )

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit" or not pl_module.scales_with_depth:
            return
        plan = self.plan(pl_module, trainer.max_steps)
        trainer.fit_loop.epoch_loop.max_steps = plan.steps
        pl_module.global_batch_tokens = plan.global_batch_tokens
        pl_module.weight_decay = plan.weight_decay if self.weight_decay is None else self.weight_decay
        pl_module.lr_scale = plan.lr_scale if self.lr_scale is None else self.lr_scale
