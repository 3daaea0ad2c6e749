"""Rollouts: groups, metrics compared with plain counts, several ranks, resuming."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmchat.data.mixture import Mixture, MixturePart
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.sequence import Completion
from lmchat.rl.rollouts import Group, Rollouts, group_advantages
from lmchat.tasks.base import Graded, Task, exchange
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Conversation, Rollout, UserError

STEPS, QUESTIONS, SAMPLES, SEED = 3, 4, 5, 7


class Guess(Task, Graded):
    """Seven questions, fewer than the run needs; the reward is the number of a's, at most 1."""

    def num_examples(self) -> int:
        return 7

    def example(self, index: int) -> Conversation:
        return exchange(f"Question {index}?", "a")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return "a" in completion

    def reward(self, conversation: Conversation, completion: str) -> float:
        return min(1.0, completion.count("a") / 2)


class Monkey:
    """Generates a's and b's, some of them forced, determined by prompt and seed."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Completion]]:
        assert all(each.logprobs for each in params)
        return [
            [self._type(random.Random(f"{prompt}/{each.seed}/{number}")) for number in range(each.num_samples)]
            for prompt, each in zip(prompts, params, strict=True)
        ]

    def _type(self, rng: random.Random) -> Completion:
        length, stops = rng.randint(1, 6), rng.random() < 0.5
        ids = [self.tokenizer.encode(rng.choice("ab"))[0] for _ in range(length)]
        mask = [int(rng.random() < 0.8) for _ in ids]
        if stops:
            ids.append(self.tokenizer.special("assistant_end"))
            mask.append(1)
        return Completion(ids, mask, stops, [mask_bit * -rng.random() for mask_bit in mask])


@pytest.fixture(scope="module")
def monkey(tiny_base: Path) -> Monkey:
    return Monkey(Tokenizer.load(tiny_base / "tokenizer"))


def rollouts(monkey: Any, rank: int = 0, world_size: int = 1, **options: Any) -> Rollouts:
    options = {"all_reduce": lambda number: number, "fingerprint": {"questions": "7"}, **options}
    return Rollouts(
        Mixture([MixturePart(Guess(), 1)]),
        lambda: monkey,
        SamplingParams(num_samples=SAMPLES),
        questions_per_step=QUESTIONS,
        steps=STEPS,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        **options,
    )


def groups_of(data: Rollouts) -> list[Group]:
    """The groups of all steps."""
    return [group for step in range(STEPS) for group in data._sample(step)]


def same(a: Rollout, b: Rollout) -> bool:
    tensors = all(torch.equal(a[key], b[key]) for key in ("inputs", "targets", "advantages", "logprobs"))  # type: ignore[literal-required]
    return tensors and all(a[key] == b[key] for key in ("prompt_tokens", "sample_tokens", "group_tokens"))  # type: ignore[literal-required]


def test_metrics_equal_those_counted_one_by_one(monkey: Monkey) -> None:
    recorder = SimpleNamespace(tokenizer=monkey.tokenizer, asked=[])

    def generate(prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Completion]]:
        recorder.asked.append(monkey.generate(prompts, params))
        return recorder.asked[-1]

    recorder.generate = generate
    batches = list(rollouts(recorder))
    assert len(batches) == STEPS * QUESTIONS == len(rollouts(monkey))
    for step, answers in enumerate(recorder.asked):
        of_step = batches[step * QUESTIONS : (step + 1) * QUESTIONS]
        completions = [completion for group in answers for completion in group]
        texts = [monkey.tokenizer.decode(completion.content) for completion in completions]
        values = [min(1.0, text.count("a") / 2) for text in texts]
        tokens = sum(sum(completion.mask) for completion in completions)
        signals = [len({values[i * SAMPLES + j] for j in range(SAMPLES)}) > 1 for i in range(QUESTIONS)]
        expected = {
            "reward": sum(values) / len(values),
            "pass@1": sum(value == 1 for value in values) / len(values),
            "length": tokens / len(values),
            "truncated": sum(not completion.finished for completion in completions) / len(values),
            "entropy": -sum(sum(completion.logprobs) for completion in completions) / tokens,
            "no_signal": signals.count(False),
            "sampled_tokens": tokens,
        }
        for batch in of_step:
            metrics = batch["metrics"]
            assert metrics.pop("rollout_seconds") >= 0
            assert metrics == pytest.approx(expected)
            assert batch["loss_tokens"] == tokens


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.3, 1 / 3, 0.7, 0.9, 1.0, 1e-6, -2.3])
def test_equal_rewards_give_zero_advantages(reward: float) -> None:
    for samples in range(2, 65):
        assert not group_advantages(torch.full((samples,), reward)).any()


def test_advantages_are_rewards_minus_their_mean() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        rewards = rng.choice([0.0, 0.1, 0.5, 1.0], size=rng.integers(2, 20))
        rewards[:2] = 0, 1
        advantages = group_advantages(torch.from_numpy(rewards)).numpy()
        np.testing.assert_allclose(advantages, rewards - rewards.mean(), atol=1e-15)


def test_rewards_may_be_integers(monkey: Monkey, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = groups_of(rollouts(monkey))
    monkeypatch.setattr(Guess, "reward", lambda *question: int("a" in question[-1]))
    groups = groups_of(rollouts(monkey))
    assert all(group.rewards.dtype == torch.float32 for group in groups)
    for group, other in zip(groups, expected, strict=True):
        assert (group.rewards == 1).equal(other.rewards > 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_metrics_are_over_all_ranks(monkey: Monkey, world_size: int) -> None:
    sums: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
    for rank, own in enumerate(sums):
        list(rollouts(monkey, rank, world_size, all_reduce=lambda numbers, own=own: own.append(numbers) or numbers))
    totals = iter([torch.stack(step).sum(0) for step in zip(*sums, strict=True)])
    shared = list(rollouts(monkey, 0, world_size, all_reduce=lambda _: next(totals)))
    for group, expected in zip(shared[:: QUESTIONS // world_size], list(rollouts(monkey))[::QUESTIONS], strict=True):
        metrics, others = group["metrics"], expected["metrics"]
        del metrics["rollout_seconds"], others["rollout_seconds"]
        assert metrics == pytest.approx(others, rel=1e-12)
        assert group["loss_tokens"] == expected["loss_tokens"]


def test_questions_are_divided_among_ranks(monkey: Monkey) -> None:
    alone = groups_of(rollouts(monkey))
    for world_size in (2, 4):
        ranks = [groups_of(rollouts(monkey, rank, world_size)) for rank in range(world_size)]
        shared = [group for groups in zip(*ranks, strict=True) for group in groups]
        for group, expected in zip(shared, alone, strict=True):
            assert group.prompt == expected.prompt and group.completions == expected.completions
            assert torch.equal(group.rewards, expected.rewards)


def test_a_repeated_question_is_sampled_again(monkey: Monkey) -> None:
    groups = groups_of(rollouts(monkey))
    first, again = groups[0], groups[7]
    assert first.prompt == again.prompt
    assert first.completions != again.completions


def test_resumes_at_its_position(monkey: Monkey) -> None:
    whole = list(rollouts(monkey))
    state = whole[QUESTIONS - 1]["state"]
    assert state.keys() == {"steps", "data"}
    # The positions of older checkpoints also hold the metrics.
    rest = list(rollouts(monkey, state={**state, "figures": {"reward": 0.5}}))
    assert len(rest) == (STEPS - 1) * QUESTIONS
    assert all(same(a, b) for a, b in zip(whole[QUESTIONS:], rest, strict=True))
    with pytest.raises(UserError, match="questions"):
        rollouts(monkey, state=whole[0]["state"], fingerprint={"questions": "8"})


@pytest.mark.parametrize("state", [{"steps": "1"}, {"steps": -1}, {"steps": 99}, {}, {"steps": 1, "data": 3}])
def test_a_damaged_position_is_refused(monkey: Monkey, state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="use an older checkpoint"):
        rollouts(monkey, state={"data": {"questions": "7"}, **state})
