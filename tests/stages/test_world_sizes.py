"""World sizes that do not divide a step are refused, with the nearest valid values."""

from __future__ import annotations

import pytest

from lmchat.data.mixture import MixturePart
from lmchat.demo.tasks import Arithmetic
from lmchat.run_plan import accumulation_steps, divisors
from lmchat.stages.rl import RolloutDataModule
from lmchat.types import UserError


def remedies(error: UserError) -> list[str]:
    return str(error).split("; use ")[1].split(" or ")


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_valid_world_sizes_divide_the_batch(world_size: int, micro_batches: int) -> None:
    assert accumulation_steps(24 * 32, 2, 32, world_size) == micro_batches


@pytest.mark.parametrize(
    ("world_size", "nearest"),
    [
        # of pretraining and fine-tuning, with micro-batches of 2 rows of 32 tokens and steps of 24 rows
        (5, ["--model.global_batch_tokens 640", "--model.global_batch_tokens 960", "4 rank(s)", "6 rank(s)"]),
        (
            8,
            [
                "--data.micro_batch_size 1",
                "--model.global_batch_tokens 512",
                "--model.global_batch_tokens 1024",
                "6 rank(s)",
                "12 rank(s)",
            ],
        ),
        (13, ["--model.global_batch_tokens 832", "12 rank(s)"]),
    ],
)
def test_other_world_sizes_are_refused(world_size: int, nearest: list[str]) -> None:
    with pytest.raises(UserError, match=rf"768 is not a multiple of .* {world_size} rank") as caught:
        accumulation_steps(24 * 32, 2, 32, world_size)
    assert remedies(caught.value) == nearest
    for remedy in nearest:
        option, _, value = remedy.rpartition(" ")
        if option == "--model.global_batch_tokens":
            assert accumulation_steps(int(value), 2, 32, world_size)
        elif option == "--data.micro_batch_size":
            assert accumulation_steps(24 * 32, int(value), 32, world_size)
        else:
            assert accumulation_steps(24 * 32, 2, 32, int(remedy.split()[0]))


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (1, 16),
        (8, 2),
        (16, 1),
        (3, ["--data.questions_per_step 15", "--data.questions_per_step 18", "2 rank(s)", "4 rank(s)"]),
        (12, ["--data.questions_per_step 12", "--data.questions_per_step 24", "8 rank(s)", "16 rank(s)"]),
        (32, ["--data.questions_per_step 32", "16 rank(s)"]),
    ],
)
def test_questions_are_divided_among_ranks(world_size: int, expected: int | list[str]) -> None:
    task = Arithmetic("train", size=100)
    data = RolloutDataModule([MixturePart(task)], task, questions_per_step=16)
    if isinstance(expected, int):
        assert data.micro_batches_per_step(None, world_size) == expected
        return
    with pytest.raises(UserError, match=f"16 is not a multiple of {world_size} ranks") as caught:
        data.micro_batches_per_step(None, world_size)
    assert remedies(caught.value) == expected


def test_divisors() -> None:
    assert [divisors(n) for n in range(200)] == [[d for d in range(1, n + 1) if n % d == 0] for n in range(200)]


def test_large_numbers_are_fast() -> None:
    with pytest.raises(UserError, match=r"use --data.micro_batch_size 536870912 or"):
        accumulation_steps(2**40, 2**30 - 1, 2048, 1)
