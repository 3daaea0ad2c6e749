"""Micro-batches of groups: the reference's samples, each once, after their prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmchat.generation.sequence import Completion
from lmchat.rl.rollouts import Group
from lmchat.types import IGNORE_INDEX

NONE = IGNORE_INDEX


def group(rng: np.random.Generator, samples: int, max_tokens: int) -> Group:
    prompt = rng.integers(0, 100, rng.integers(1, 40)).tolist()
    completions = []
    for _ in range(samples):
        length = int(rng.integers(1, max_tokens + 1))
        mask = (rng.random(length) < 0.8).astype(int).tolist()
        logprobs = [bit * -int(rng.integers(1, 64)) / 64 for bit in mask]
        completions.append(Completion(rng.integers(0, 100, length).tolist(), mask, True, logprobs))
    return Group(prompt, completions, torch.from_numpy(rng.choice([0.0, 0.5, 1.0], samples)).float())


@settings(deadline=None, max_examples=100)
@given(samples=st.integers(2, 5), max_tokens=st.sampled_from([1, 8, 90]), seed=st.integers(0, 99))
def test_every_sample_with_an_advantage_follows_the_prompt(samples: int, max_tokens: int, seed: int) -> None:
    each = group(np.random.default_rng(seed), samples, max_tokens)
    batch = each.micro_batch()
    names = ("inputs", "targets", "logprobs", "advantages")
    row = list(zip(*(batch[name][0].tolist() for name in names), strict=True))  # type: ignore[literal-required]
    prompt, row = row[: batch["prompt_tokens"]], row[batch["prompt_tokens"] :]
    found = []
    for length in batch["sample_tokens"]:
        sample, row = prompt + row[:length], row[length:]
        live = [(at, *rest) for at, (_, *rest) in enumerate(sample) if rest[0] != NONE]
        found.append(([token for token, *_ in sample], [(*rest, round(weight, 6)) for *rest, weight in live]))
    assert not row

    expected, rewards = [], each.rewards.double()
    for reward, completion in zip(rewards.tolist(), each.completions, strict=True):
        advantage = round(reward - float(rewards.mean()), 6)
        if abs(advantage) < 1e-9:
            continue
        ids, mask = [*each.prompt, *completion.ids], [0] * len(each.prompt) + completion.mask
        logprobs = [0.0] * len(each.prompt) + completion.logprobs
        live = [(at - 1, ids[at], logprobs[at], advantage) for at in range(len(ids)) if mask[at]]
        expected.append((ids[:-1], live))
    assert found == expected
    assert batch["group_tokens"] == sum(sum(completion.mask) for completion in each.completions)


def test_samples_of_a_group_match_the_reference(oracles: Path) -> None:
    """The reference's rows have different prompts; here these are forced tokens after a prompt of one token."""
    with np.load(oracles / "c09_rl.npz") as arrays:
        ids, mask = arrays["ids"].tolist(), arrays["mask"].tolist()
        measured = {name: torch.from_numpy(arrays[name]) for name in ("inputs", "targets", "rewards", "advantages")}
    lengths = [len(row) - row[::-1].index(1) for row in mask]
    rows = zip(ids, mask, lengths, strict=True)
    completions = [Completion(row[:end], bits[:end], True, [0.0] * end) for row, bits, end in rows]
    batch = Group([7], completions, measured["rewards"]).micro_batch()
    assert batch["prompt_tokens"] == 0 and batch["sample_tokens"] == lengths
    assert batch["group_tokens"] == sum(map(sum, mask))
    split = [batch[name][0].split(lengths) for name in ("inputs", "targets", "advantages")]  # type: ignore[literal-required]
    for number, (inputs, targets, advantages) in enumerate(zip(*split, strict=True)):
        end = lengths[number] - 1
        assert inputs[0] == 7 and torch.equal(inputs[1:], measured["inputs"][number, :end])
        assert targets[0] == NONE and torch.equal(targets[1:], measured["targets"][number, :end])
        assert (measured["targets"][number, end:] == NONE).all()
        torch.testing.assert_close(advantages, measured["advantages"][number].expand(end + 1), rtol=0, atol=1e-7)


def test_prompt_and_forced_tokens_have_no_loss_but_stop_tokens_have() -> None:
    completions = [Completion([5, 6, 7], [1, 0, 1], True, [-1.0, 0.0, -2.0]), Completion([8], [1], False, [-4.0])]
    batch = Group([3, 4], completions, torch.tensor([1.0, 0.0])).micro_batch()
    assert batch["inputs"].tolist() == [[3, 4, 5, 6, 4]]
    assert batch["targets"].tolist() == [[NONE, 5, NONE, 7, 8]]
    assert batch["logprobs"].tolist() == [[0, -1, 0, -2, -4]]
    assert batch["advantages"].tolist() == [[0, 0.5, 0.5, 0.5, -0.5]]
    assert (batch["prompt_tokens"], batch["sample_tokens"], batch["group_tokens"]) == (1, [3, 1], 3)


def test_equal_rewards_leave_an_empty_row() -> None:
    each = group(np.random.default_rng(0), 3, 9)
    batch = Group(each.prompt, each.completions, torch.ones(3)).micro_batch()
    assert batch["inputs"].shape == batch["targets"].shape == batch["advantages"].shape == (1, 0)
