"""Computes the plan of a run from the depth and the options."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lmchat.callbacks.evaluate import Evaluate
from lmchat.option_checks import MAX_COUNT, check_range
from lmchat.run_plan import RunPlan, horizon, validation_interval
from lmchat.scaling import Plan, make_plan
from lmchat.stages.device_memory import choose_micro_batch
from lmchat.strategies.lightning_internals import set_max_steps
from lmchat.types import UserError


class TrainingPlan(Callback):
    """Plans the run, and writes the plan to the trainer and the module.

    Stages that scale with depth take batch, steps, learning-rate scale and weight decay from the scaling laws (see
    `lmchat.scaling`). The number of steps is ``trainer.max_steps`` if set, else follows from ``target_flops``, else
    from ``tokens_per_parameter``. An explicit ``global_batch_tokens`` is kept. Other stages train for
    ``trainer.max_steps`` or as long as their data lasts.

    Args:
        tokens_per_parameter: training tokens per scaling parameter (the blocks' matrices and the head).
        target_flops: total training FLOPs, instead of ``tokens_per_parameter``.
        lr_scale: factor on every learning rate; null takes √(batch / 2¹⁹).
        weight_decay: weight decay of Muon at the start of training, not scaled; null scales the module's by the law.
    """

    def __init__(
        self,
        tokens_per_parameter: float = 10.5,
        target_flops: float | None = None,
        lr_scale: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        options = {"target_flops": target_flops, "lr_scale": lr_scale, "weight_decay": weight_decay}
        check_range("scaling_laws", tokens_per_parameter=tokens_per_parameter, **options)
        self.tokens_per_parameter = tokens_per_parameter
        self.target_flops = target_flops
        self.lr_scale = lr_scale
        self.weight_decay = weight_decay

    def scale(self, module: Any, max_steps: int) -> Plan:
        """The scaling laws' plan of a module that scales with depth; ``max_steps`` is the trainer's (-1: not set)."""
        plan = make_plan(
            vocab_size=module.tokenizer.vocab_size,
            **module.shape,
            ratio=self.tokens_per_parameter,
            target_flops=self.target_flops,
            max_steps=max_steps if max_steps > 0 else None,
            global_batch_tokens=module.global_batch_tokens,
            weight_decay=module.weight_decay,
        )
        if plan.steps > MAX_COUNT:
            raise UserError(
                f"the scaling laws give a run of {plan.steps:.0e} steps, more than any has; use a lower "
                "--scaling_laws.tokens_per_parameter or --scaling_laws.target_flops"
            )
        return plan

    def plan(self, trainer: L.Trainer, module: Any) -> RunPlan:
        data = trainer.datamodule  # type: ignore[attr-defined]
        laws = self.scale(module, trainer.max_steps) if module.scales_with_depth else None
        batch = laws.global_batch_tokens if laws else module.global_batch_tokens
        if data.chooses_micro_batch and batch is not None:
            max_rows = data.max_micro_batch_size(trainer.world_size)
            data.own_micro_batch_size = choose_micro_batch(module, batch, max_rows)
        accumulate = data.micro_batches_per_step(batch, trainer.world_size)
        lr_scale, weight_decay = module.lr_scale, module.weight_decay
        if laws:
            lr_scale = laws.lr_scale if self.lr_scale is None else self.lr_scale
            weight_decay = laws.weight_decay if self.weight_decay is None else self.weight_decay
        default = [each.every_n_steps for each in trainer.callbacks if isinstance(each, Evaluate)]  # type: ignore[attr-defined]
        own = [each.every_n_steps for each in data.evaluators if each.every_n_steps is not None]
        return RunPlan(
            steps=horizon(trainer.max_steps if trainer.max_steps > 0 else None, data.max_steps, laws),
            global_batch_tokens=batch,
            micro_batch_size=data.micro_batch_size,
            accumulate_grad_batches=accumulate,
            validate_every_n_batches=validation_interval([*default, *own], accumulate),
            lr_scale=lr_scale,
            weight_decay=weight_decay,
            mask_documents=data.mask_documents,
        )

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        plan = self.plan(trainer, pl_module)
        limit_train_batches(trainer, plan.accumulate_grad_batches)
        set_max_steps(trainer, plan.steps)
        trainer.accumulate_grad_batches = plan.accumulate_grad_batches
        # With check_val_every_n_epoch None, Lightning counts micro-batches over the whole run.
        trainer.check_val_every_n_epoch = None
        trainer.val_check_interval = plan.validate_every_n_batches
        pl_module.plan = plan


def limit_train_batches(trainer: L.Trainer, accumulate: int) -> None:
    """Converts the trainer's ``limit_train_batches`` to a limit of whole optimizer steps.

    ``fast_dev_run`` and ``overfit_batches`` count optimizer steps, since they mean a number of updates.

    Raises:
        UserError: ``limit_train_batches`` cuts an optimizer step.
    """
    limit = trainer.limit_train_batches
    if trainer.fast_dev_run or trainer.overfit_batches:  # type: ignore[attr-defined]
        trainer.limit_train_batches = int(limit) * accumulate
    elif isinstance(limit, int) and limit % accumulate:
        raise UserError(
            f"--trainer.limit_train_batches is {limit} micro-batches, and an optimizer step has {accumulate}; give a "
            "multiple of that, or use --trainer.max_steps"
        )
