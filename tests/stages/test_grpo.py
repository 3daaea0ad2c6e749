"""The policy loss compared with the reference implementation, and with sums over its recorded log-probabilities."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lmchat.generation.sequence import Completion
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.rl.rollouts import Group, group_advantages
from lmchat.stages.rl import GRPOModule
from lmchat.strategies.zero2_muon import Zero2MuonStrategy
from lmchat.types import IGNORE_INDEX, Rollout, UserError

PASSES = [slice(0, 8), slice(8, 16)]
"""The reference takes its 16 samples of a question in two passes; here each stands for a micro-batch."""
REFERENCE_MICRO_BATCHES = 4
"""Two passes of each of two questions, of which one was recorded."""


class Recorded(nn.Module):
    """A mock network that returns recorded log-probabilities; its inputs are their indices."""

    def __init__(self, logp: Tensor, targets: Tensor) -> None:
        super().__init__()
        self.logp, self.targets = logp, targets
        self.lm_head = nn.Linear(1, 1)  # an empty batch has a loss of its type

    def loss(
        self, inputs: Tensor, targets: Tensor, reduction: str, weights: Tensor, *, token_losses: Tensor, kv_cache: Any
    ) -> Tensor:
        assert reduction == "sum"
        assert targets.equal(self.targets.flatten()[inputs])
        token_losses.copy_(-self.logp.flatten()[inputs] * weights)
        return token_losses.sum()


def module(net: nn.Module, normalization: Any, micro_batches: int, world_size: int = 1) -> GRPOModule:
    grpo = GRPOModule(normalization)
    grpo.net = net  # type: ignore[assignment]
    grpo._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=micro_batches, world_size=world_size
    )
    return grpo


def micro_batch(inputs: Tensor, targets: Tensor, rewards: Tensor, rows: slice, loss_tokens: int) -> Rollout:
    """Rows of one group, including those without advantage, as in the reference."""
    count, width = targets[rows].shape
    return Rollout(
        inputs=inputs[rows].reshape(1, -1),
        targets=targets[rows].reshape(1, -1),
        advantages=(rewards - rewards.mean())[rows, None].expand(count, width).reshape(1, -1),
        logprobs=torch.zeros(1, count * width),
        prompt_tokens=0,
        sample_tokens=[width] * count,
        group_tokens=int((targets[rows] != IGNORE_INDEX).sum()),
        loss_tokens=loss_tokens,
    )


@pytest.fixture(scope="module")
def recorded(fixtures: Path) -> dict[str, Tensor]:
    with np.load(fixtures / "rl.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {**tensors, "targets": tensors["targets"].long(), "rows": torch.arange(16 * 40).view(16, 40)}


def test_normalization_by_group_equals_the_reference_loss(recorded: dict[str, Tensor]) -> None:
    grpo = module(Recorded(recorded["logp"], recorded["targets"]), "group", REFERENCE_MICRO_BATCHES)
    for rows, expected in zip(PASSES, recorded["losses"], strict=True):
        batch = micro_batch(recorded["rows"], recorded["targets"], recorded["rewards"], rows, loss_tokens=-1)
        loss = grpo.training_step(batch, 0) / REFERENCE_MICRO_BATCHES  # as the trainer divides
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("micro_batches", "world_size"), [(2, 1), (1, 2)])
def test_normalization_by_step_weights_all_tokens_equally(
    recorded: dict[str, Tensor], micro_batches: int, world_size: int
) -> None:
    targets, rewards = recorded["targets"], recorded["rewards"]
    tokens = int((targets != IGNORE_INDEX).sum())
    grpo = module(Recorded(recorded["logp"], targets), "step", micro_batches, world_size)
    losses = [grpo.training_step(micro_batch(recorded["rows"], targets, rewards, rows, tokens), 0) for rows in PASSES]
    # The trainer divides by micro-batches, the strategy averages over ranks.
    step = torch.stack(losses).sum() / (micro_batches * world_size)
    advantages = rewards.double().numpy() - 0.25  # four of the sixteen answers are right
    expected = -(recorded["logp"].double().numpy() * advantages[:, None]).sum() / 335
    assert float(step) == pytest.approx(expected, rel=1e-5)


def test_several_processes_need_a_strategy_for_samples_without_gradient() -> None:
    """DDP waits for the gradients of every process, and an empty batch has none."""
    grpo = GRPOModule()
    for kind, world_size, refused in ((DDPStrategy, 2, True), (DDPStrategy, 1, False), (Zero2MuonStrategy, 2, False)):
        grpo._trainer = SimpleNamespace(  # type: ignore[assignment]
            precision="32-true", world_size=world_size, strategy=kind()
        )
        with pytest.raises(UserError, match="zero2_muon") if refused else nullcontext():
            grpo.setup("fit")


def test_an_empty_batch_has_no_gradient(recorded: dict[str, Tensor]) -> None:
    for normalization in ("group", "step"):
        grpo = module(Recorded(recorded["logp"], recorded["targets"]), normalization, 2)
        batch = micro_batch(recorded["rows"], recorded["targets"], recorded["rewards"], slice(0, 0), 335)
        loss = grpo.training_step(batch, 0)
        loss.backward()
        assert loss == 0 and grpo.net.lm_head.weight.grad is None


def test_logprob_gap_is_the_mean_distance_to_the_engine(recorded: dict[str, Tensor]) -> None:
    targets = recorded["targets"]
    sampled = targets != IGNORE_INDEX
    noise = torch.linspace(-0.01, 0.02, targets.numel()).view(targets.shape)
    grpo = module(Recorded(recorded["logp"], targets), "step", 2)
    for rows in PASSES:
        batch = micro_batch(recorded["rows"], targets, recorded["rewards"], rows, 335)
        batch["logprobs"] = torch.where(sampled, recorded["logp"] + noise, 0.0)[rows].reshape(1, -1)
        grpo.training_step(batch, 0)
    assert grpo.pop_step_metrics()["logprob_gap"].item() == pytest.approx(noise[sampled].abs().mean().item(), rel=1e-4)
    assert grpo.pop_step_metrics()["logprob_gap"] == 0


@pytest.mark.parametrize("normalization", ["step", "group"])
@pytest.mark.parametrize(("window_pattern", "checkpoint_blocks"), [("L", False), ("SL", False), ("L", True)])
def test_batched_gradients_equal_those_of_single_samples(
    normalization: Any, window_pattern: str, checkpoint_blocks: bool
) -> None:
    """Shared prompts in fp64, some longer than a window, compared with single samples and a plain log-softmax."""
    config = GPTConfig(
        sequence_len=32, vocab_size=50, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern=window_pattern
    )
    net = GPT(config).double()
    net.checkpoint_blocks = checkpoint_blocks
    net.compute_dtype = torch.float64
    net.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.lm_head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    rng = np.random.default_rng(3)
    groups = []
    for _ in range(5):
        lengths = rng.integers(1, 40, 4)
        masks = [(rng.random(length) < 0.8).astype(int).tolist() for length in lengths]
        completions = [
            Completion(rng.integers(0, 50, len(mask)).tolist(), mask, True, [0.0] * len(mask)) for mask in masks
        ]
        groups.append(
            Group(
                rng.integers(0, 50, rng.integers(1, 40)).tolist(),
                completions,
                torch.tensor(rng.choice([0.0, 1.0], 4)).float(),
            )
        )
    assert any(group_advantages(group.rewards).any() for group in groups)
    total = sum(group.num_tokens for group in groups)

    grpo = module(net, normalization, len(groups))
    for group in groups:
        batch = group.micro_batch()
        batch["loss_tokens"] = total
        (grpo.training_step(batch, 0) / len(groups)).backward()
    actual = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()

    expected = torch.zeros((), dtype=torch.float64)
    for group in groups:
        divisor = total if normalization == "step" else len(groups) * group.num_tokens
        advantages = group_advantages(group.rewards).tolist()
        for advantage, completion in zip(advantages, group.completions, strict=True):
            ids = torch.tensor([[*group.prompt, *completion.ids]])
            logp = net.logits(net.hidden(ids[:, :-1])).double().log_softmax(-1)[0, len(group.prompt) - 1 :]
            chosen = logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            expected = expected - advantage * (chosen * torch.tensor(completion.mask)).sum() / divisor
    expected.backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("momentum", [-1.0, 1.5, float("nan")])
def test_a_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(UserError, match=f"^--model.momentum is {momentum}; it must be a number from 0 to 1$"):
        GRPOModule(momentum=momentum)
