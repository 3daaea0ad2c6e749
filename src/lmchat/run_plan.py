"""The plan of a training run: every number that several parts need, decided once."""

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
    """The decided numbers of a training run.

    Attributes:
        steps: optimizer steps.
        global_batch_tokens: tokens per optimizer step over all ranks; None where batches are groups of samples.
        micro_batch_size: rows per micro-batch and rank.
        accumulate_grad_batches: micro-batches per optimizer step and rank.
        validate_every_n_batches: micro-batches between two entries of the validation loop.
        lr_scale: factor on every base learning rate.
        weight_decay: weight decay of Muon at the start.
    """

    steps: int
    global_batch_tokens: int | None
    micro_batch_size: int
    accumulate_grad_batches: int
    validate_every_n_batches: int
    lr_scale: float
    weight_decay: float


def horizon(max_steps: int | None, data_steps: int | None, laws: Plan | None) -> int:
    """Optimizer steps of a run: the scaling laws' where they apply, else the user's, never more than the data has.

    Args:
        max_steps: the user's ``--trainer.max_steps``; the scaling laws have taken it into account already.
        data_steps: steps that the data lasts; None is without end.
        laws: plan of the scaling laws; None for stages that do not scale with depth.

    Raises:
        UserError: nothing decides the number of steps.
    """
    limits = [laws.steps if laws else max_steps, data_steps]
    given = [steps for steps in limits if steps is not None]
    if not given:
        raise UserError("nothing decides the length of the run; give --trainer.max_steps")
    return min(given)


def validation_interval(every_n_steps: Sequence[int], accumulate_grad_batches: int) -> int:
    """Micro-batches between two entries of the validation loop, so that each cadence in steps can be met.

    Args:
        every_n_steps: cadences of the evaluators in optimizer steps; 0 is at the start and the end only.
        accumulate_grad_batches: micro-batches per optimizer step and rank.
    """
    return math.gcd(*every_n_steps) * accumulate_grad_batches or NEVER
