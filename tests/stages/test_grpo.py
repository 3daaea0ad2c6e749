"""The policy loss against the reference implementation's, and against sums over its recorded log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.stages.rl import GRPOModule
from lmchat.types import IGNORE_INDEX, Rollout

PASSES = [slice(0, 8), slice(8, 16)]
"""The reference takes its 16 samples of a question in two passes; here each stands for a micro-batch."""
REFERENCE_MICRO_BATCHES = 4
"""Two passes of each of two questions, of which one was recorded."""


class Recorded(nn.Module):
    """A network whose log-probabilities are those that were recorded."""

    def __init__(self, logp: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.logp, self.targets = logp, targets
        self.lm_head = nn.Linear(1, 1)  # a group without a signal has a loss of its type

    def loss(self, inputs: Tensor, targets: Tensor, *, reduction: str, weights: Tensor) -> Tensor:
        assert reduction == "sum"
        rows = slice(int(inputs[0, 0]), int(inputs[-1, 0]) + 1)
        assert targets.equal(self.targets[rows])
        return -(self.logp[rows] * weights).sum()


def module(net: nn.Module, normalization: Any, micro_batches: int, world_size: int = 1) -> GRPOModule:
    grpo = GRPOModule(normalization)
    grpo.net = net  # type: ignore[assignment]
    grpo._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=micro_batches, world_size=world_size
    )
    return grpo


def micro_batch(inputs: Tensor, targets: Tensor, rewards: Tensor, rows: slice, loss_tokens: int) -> Rollout:
    return Rollout(
        inputs=inputs[rows],
        targets=targets[rows],
        advantages=(rewards - rewards.mean())[rows],
        rewards=rewards[rows],
        has_signal=bool((rewards != rewards.mean())[rows].any()),
        num_tokens=int((targets[rows] != IGNORE_INDEX).sum()),
        truncated=0,
        sampled_nll=0.0,
        loss_tokens=loss_tokens,
    )


@pytest.fixture(scope="module")
def recorded(fixtures: Path) -> dict[str, Tensor]:
    with np.load(fixtures / "rl.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {**tensors, "targets": tensors["targets"].long(), "rows": torch.arange(16)[:, None].expand(16, 40)}


def test_by_group_it_is_the_reference_loss(recorded: dict[str, Tensor]) -> None:
    grpo = module(Recorded(recorded["logp"], recorded["targets"]), "group", REFERENCE_MICRO_BATCHES)
    for rows, expected in zip(PASSES, recorded["losses"], strict=True):
        batch = micro_batch(recorded["rows"], recorded["targets"], recorded["rewards"], rows, loss_tokens=-1)
        loss = grpo.training_step(batch, 0) / REFERENCE_MICRO_BATCHES  # as the trainer divides
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("micro_batches", "world_size"), [(2, 1), (1, 2)])
def test_by_step_every_token_weighs_the_same(recorded: dict[str, Tensor], micro_batches: int, world_size: int) -> None:
    targets, rewards = recorded["targets"], recorded["rewards"]
    tokens = int((targets != IGNORE_INDEX).sum())
    grpo = module(Recorded(recorded["logp"], targets), "step", micro_batches, world_size)
    losses = [grpo.training_step(micro_batch(recorded["rows"], targets, rewards, rows, tokens), 0) for rows in PASSES]
    # The trainer divides by micro-batches, the strategy averages over ranks.
    step = torch.stack(losses).sum() / (micro_batches * world_size)
    advantages = rewards.double().numpy() - 0.25  # four of the sixteen answers are right
    expected = -(recorded["logp"].double().numpy() * advantages[:, None]).sum() / 335
    assert float(step) == pytest.approx(expected, rel=1e-5)


def test_equal_rewards_leave_no_gradient_in_either_way(recorded: dict[str, Tensor]) -> None:
    for normalization in ("group", "step"):
        grpo = module(Recorded(recorded["logp"], recorded["targets"]), normalization, 2)
        batch = micro_batch(recorded["rows"], recorded["targets"], torch.ones(16), PASSES[0], 335)
        assert grpo.training_step(batch, 0).item() == 0


def test_reference_gradients(oracles: Path) -> None:
    config = json.loads((oracles / "c05_gpt.json").read_text())["kv2"]["config"]
    net = GPT(GPTConfig(**config))
    with np.load(oracles / "c05_gpt_kv2.npz") as weights:
        net.load_state_dict({name[2:]: torch.from_numpy(weights[name]) for name in weights if name.startswith("w/")})
    with np.load(oracles / "c09_rl.npz") as arrays:
        measured = {name: torch.from_numpy(arrays[name]) for name in arrays}
    grpo = module(net, "group", REFERENCE_MICRO_BATCHES)
    for rows, expected in zip(PASSES, measured["losses"], strict=True):
        batch = micro_batch(measured["inputs"], measured["targets"], measured["rewards"], rows, loss_tokens=-1)
        loss = grpo.training_step(batch, 0) / REFERENCE_MICRO_BATCHES
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-6)
        loss.backward()
    gradients = {f"g/{name}": parameter.grad for name, parameter in net.named_parameters()}
    names = [name for name in measured if name.startswith("g/")]
    assert len(names) >= 4
    for name in names:
        scale = float(measured[name].abs().max())
        torch.testing.assert_close(gradients[name], measured[name], rtol=0, atol=1e-4 * scale)
