"""The plan of a training run: numbers that several parts need, computed in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmchat.scaling import Plan
from lmchat.types import UserError

NEVER = 2**62
"""An interval in micro-batches that no run reaches."""


@dataclass(frozen=True)
class RunPlan:
    """The numbers of a training run.

    Attributes:
        steps: optimizer steps.
        global_batch_tokens: tokens per optimizer step over all ranks; None where batches are groups of samples.
        micro_batch_size: rows per micro-batch and rank.
        accumulate_grad_batches: micro-batches per optimizer step and rank.
        validate_every_n_batches: micro-batches between two runs of the validation loop.
        lr_scale: factor on every base learning rate.
        weight_decay: weight decay of Muon at the start.
        mask_documents: whether attention stays within documents.
    """

    steps: int
    global_batch_tokens: int | None
    micro_batch_size: int
    accumulate_grad_batches: int
    validate_every_n_batches: int
    lr_scale: float
    weight_decay: float
    mask_documents: bool = False


def horizon(max_steps: int | None, data_steps: int | None, laws: Plan | None) -> int:
    """Optimizer steps of a run: those of the scaling laws if they apply, else ``max_steps``, else ``data_steps``.

    Args:
        max_steps: ``--trainer.max_steps``, which ``laws`` already takes into account.
        data_steps: steps that the data lasts; None is unlimited.

    Raises:
        UserError: all three are None, or the data does not last for ``max_steps``.
    """
    steps = laws.steps if laws else max_steps
    if steps is None:
        steps = data_steps
    if steps is None:
        raise UserError("the length of the run is not set; give --trainer.max_steps")
    if data_steps is not None and steps > data_steps:
        raise UserError(
            f"--trainer.max_steps is {steps:,}, and the training data lasts {data_steps:,} optimizer step(s); leave it "
            "out, or raise the epochs of the data (--data.epochs, or epochs of the tasks in --data.train)"
        )
    return steps


def validation_interval(every_n_steps: Sequence[int], accumulate_grad_batches: int) -> int:
    """Micro-batches between two runs of the validation loop: the largest interval that fits every evaluator's.

    ``every_n_steps`` are optimizer steps between evaluations of each; 0 is at the start and the end only.
    """
    return math.gcd(*every_n_steps) * accumulate_grad_batches or NEVER
