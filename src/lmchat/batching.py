"""Gradient accumulation: number of micro-batches in the global batch, and the nearest valid values for errors."""

from __future__ import annotations

import math

from lmchat.types import UserError


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
