"""Micro-batches of a step: the rows of the reference, every row once, no batch larger than the largest group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmchat.generation.sequence import Completion
from lmchat.rl.groups import WIDTH_MULTIPLE, Group, micro_batches
from lmchat.types import IGNORE_INDEX

PAD = 999


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
@given(
    groups=st.integers(1, 6), samples=st.integers(2, 5), max_tokens=st.sampled_from([1, 8, 90]), seed=st.integers(0, 99)
)
def test_every_row_with_an_advantage_is_in_one_batch(groups: int, samples: int, max_tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    step = [group(rng, samples, max_tokens) for _ in range(groups)]
    batches = micro_batches(step, PAD)
    assert len(batches) == groups

    rows = []
    for batch in batches:
        for index in range(len(batch["inputs"])):
            targets = batch["targets"][index].tolist()
            live = [at for at, target in enumerate(targets) if target != IGNORE_INDEX]
            inputs = batch["inputs"][index].tolist()
            while inputs and inputs[-1] == PAD:
                inputs.pop()
            values = [float(batch["logprobs"][index][at]) for at in live]
            numbers = round(float(batch["advantages"][index]), 6), int(batch["group_tokens"][index])
            rows.append((inputs, live, [targets[at] for at in live], values, *numbers))

    expected = []
    for each in step:
        rewards = each.rewards.double()
        for reward, completion in zip(rewards.tolist(), each.completions, strict=True):
            advantage = reward - float(rewards.mean())
            if abs(advantage) < 1e-9:
                continue
            ids = [*each.prompt, *completion.ids]
            live = [
                at
                for at in range(len(ids) - 1)
                if at + 1 >= len(each.prompt) and completion.mask[at + 1 - len(each.prompt)]
            ]
            values = [value for value, bit in zip(completion.logprobs, completion.mask, strict=True) if bit]
            tokens = sum(sum(other.mask) for other in each.completions)
            expected.append((ids[:-1], live, [ids[at + 1] for at in live], values, round(advantage, 6), tokens))
    assert sorted(map(repr, rows)) == sorted(map(repr, expected))

    largest = max(len(each.completions) * -(-each.width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for each in step)
    assert all(batch["inputs"].numel() <= largest for batch in batches)
    widths = [batch["inputs"].size(1) for batch in batches if len(batch["inputs"])]
    assert widths == sorted(widths, reverse=True) and all(width % WIDTH_MULTIPLE == 0 for width in widths)


def test_rows_of_one_group_are_those_of_the_reference(oracles: Path) -> None:
    """Its rows have prompts of their own; here they are forced tokens after a prompt of one token."""
    with np.load(oracles / "c09_rl.npz") as arrays:
        ids, mask = arrays["ids"].tolist(), arrays["mask"].tolist()
        measured = {name: torch.from_numpy(arrays[name]) for name in ("inputs", "targets", "rewards", "advantages")}
    lengths = [len(row) - row[::-1].index(1) for row in mask]
    rows = zip(ids, mask, lengths, strict=True)
    completions = [Completion(row[:end], bits[:end], True, [0.0] * end) for row, bits, end in rows]
    pad_id = ids[lengths.index(min(lengths))][-1]
    (batch,) = micro_batches([Group([PAD], completions, measured["rewards"])], pad_id)

    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    width = measured["inputs"].size(1)
    expected = measured["inputs"].clone()
    for row, length in enumerate(lengths):
        expected[row, length - 1 :] = pad_id  # the reference also reads the last token, and predicts nothing from it
    assert torch.equal(batch["inputs"][:, 1 : width + 1], expected[order])
    assert torch.equal(batch["targets"][:, 1 : width + 1], measured["targets"][order])
    assert (batch["inputs"][:, width + 1 :] == pad_id).all() and (
        batch["targets"][:, width + 1 :] == IGNORE_INDEX
    ).all()
    torch.testing.assert_close(batch["advantages"], measured["advantages"][order], rtol=0, atol=1e-7)
    assert batch["group_tokens"].tolist() == [sum(map(sum, mask))] * len(ids)


def test_prompt_padding_and_forced_tokens_are_no_targets_but_the_stop_token_is() -> None:
    completions = [Completion([5, 6, 7], [1, 0, 1], True, [-1.0, 0.0, -2.0]), Completion([8], [1], False, [-4.0])]
    (batch,) = micro_batches([Group([3, 4], completions, torch.tensor([1.0, 0.0]))], pad_id=0)
    none = IGNORE_INDEX
    assert batch["inputs"][:, :5].tolist() == [[3, 4, 5, 6, 0], [3, 4, 0, 0, 0]]
    assert batch["targets"][:, :5].tolist() == [[none, 5, none, 7, none], [none, 8, none, none, none]]
    assert batch["logprobs"][:, :5].tolist() == [[0, -1, 0, -2, 0], [0, -4, 0, 0, 0]]
    assert batch["advantages"].tolist() == [0.5, -0.5]


def test_equal_rewards_leave_empty_batches() -> None:
    rng = np.random.default_rng(0)
    step = [Group(each.prompt, each.completions, torch.ones(3)) for each in (group(rng, 3, 9), group(rng, 3, 9))]
    assert [len(batch["inputs"]) for batch in micro_batches(step, PAD)] == [0, 0]
