"""The plan of a training run: steps, gradient accumulation, intervals; computed in one place for several parts."""

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


def accumulation_steps(global_batch_tokens: int, micro_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-batches per rank and optimizer step, of ``micro_batch_size`` rows of ``sequence_len`` tokens.

    Raises:
        UserError: the global batch is not a multiple of the tokens of one micro-batch on every rank; the message names
            values that fit.
    """
    micro_batch_tokens = micro_batch_size * sequence_len * world_size
    steps, rest = divmod(global_batch_tokens, micro_batch_tokens)
    if rest == 0 and steps > 0:
        return steps
    nearest = [n * micro_batch_tokens for n in (steps, steps + 1) if n]
    rows, rest = divmod(global_batch_tokens, sequence_len * world_size)
    smaller = [] if rest else [n for n in divisors(rows) if n < micro_batch_size]
    remedies = [f"--data.micro_batch_size {smaller[-1]}"] if smaller else []
    remedies += [f"--model.global_batch_tokens {tokens}" for tokens in nearest]
    micro_batches, rest = divmod(global_batch_tokens, micro_batch_size * sequence_len)
    remedies += [] if rest else [f"{ranks} rank(s)" for ranks in nearest_divisors(micro_batches, world_size)]
    raise UserError(
        f"global_batch_tokens {global_batch_tokens} is not a multiple of micro_batch_size {micro_batch_size} × "
        f"sequence_len {sequence_len} × {world_size} rank(s) = {micro_batch_tokens}; use {' or '.join(remedies)}"
    )


def groups_per_rank(questions_per_step: int, world_size: int) -> int:
    """Questions per rank and optimizer step of reinforcement learning; a question is one micro-batch.

    Raises:
        UserError: the questions cannot be divided equally; the message names values that fit.
    """
    groups, rest = divmod(questions_per_step, world_size)
    if rest or not groups:
        remedies = [f"--data.questions_per_step {n * world_size}" for n in (groups, groups + 1) if n]
        remedies += [f"{ranks} rank(s)" for ranks in nearest_divisors(questions_per_step, world_size)]
        raise UserError(
            f"--data.questions_per_step {questions_per_step} is not a multiple of {world_size} ranks; "
            f"use {' or '.join(remedies)}"
        )
    return groups


def nearest_divisors(number: int, near: int) -> list[int]:
    """The divisors of ``number`` next below and next above ``near``, where they exist."""
    found = divisors(number)
    return [n for n in found if n < near][-1:] + [n for n in found if n > near][:1]


def divisors(number: int) -> list[int]:
    """The divisors of ``number`` in ascending order; none for 0."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
