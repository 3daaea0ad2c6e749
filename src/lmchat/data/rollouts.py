"""Groups of sampled answers to a question, graded: the batches of reinforcement learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lmchat.data.fingerprint import check_fingerprint
from lmchat.data.mixture import Mixture
from lmchat.generation.engine import Completion, Engine
from lmchat.tasks.base import Task
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import IGNORE_INDEX, Conversation, Rollout


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: per question, at most so many tokens, at a temperature, from the k likeliest."""

    num_samples: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50


def group_advantages(rewards: Tensor) -> Tensor:
    """Reward less the mean of its group (samples,); not divided by the deviation (Dr. GRPO, arXiv:2503.20783).

    Exactly 0 where all rewards are equal: their mean may be rounded, and the optimizers make a step of any gradient.
    """
    return torch.zeros_like(rewards) if rewards.min() == rewards.max() else rewards - rewards.mean()


def collate_group(prompt: Sequence[int], completions: Sequence[Completion], rewards: Tensor, pad_id: int) -> Rollout:
    """One question's samples as rows of equal length.

    Prompt, padding and forced tokens are no targets. The stop token that a sample ends with is one: the reference cuts
    it off and so never trains when to stop.
    """
    rows = [[*prompt, *completion.ids] for completion in completions]
    sampled = [[0] * len(prompt) + completion.mask for completion in completions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    is_target = torch.tensor([mask + [0] * (width - len(mask)) for mask in sampled], dtype=torch.bool)
    targets = torch.where(is_target, ids, IGNORE_INDEX)[:, 1:]
    advantages = group_advantages(rewards)
    return Rollout(
        inputs=ids[:, :-1].contiguous(),
        targets=targets.contiguous(),
        advantages=advantages,
        rewards=rewards,
        has_signal=bool(advantages.any()),
        num_tokens=int((targets != IGNORE_INDEX).sum()),
        truncated=sum(not completion.finished for completion in completions),
        surprisal=-sum(map(sum, (completion.logprobs for completion in completions))),
    )


class Rollouts(IterableDataset[Rollout]):
    """On-policy groups of one rank, step by step: all groups of a step are sampled before the first is trained on.

    Questions come in the mixture's order, over and over; rank r of W takes questions r, r + W, … of each step. It has a
    length, so that Lightning does not read ahead: a group read ahead would be sampled from the policy before the last
    step.

    Args:
        engine: called at each step for an engine on the current policy.
        questions_per_step: over all ranks, a multiple of ``world_size``.
        steps: of the whole run.
        all_reduce: sums a float64 tensor over the ranks.
        fingerprint: of the questions; part of the state.
        state: continue after the batch that carried it.

    Raises:
        UserError: the state is a position in other questions.
    """

    def __init__(
        self,
        mixture: Mixture,
        engine: Callable[[], Engine],
        sampling: Sampling,
        *,
        questions_per_step: int,
        steps: int,
        seed: int,
        rank: int,
        world_size: int,
        all_reduce: Callable[[Tensor], Tensor],
        fingerprint: dict[str, str],
        state: dict[str, Any] | None = None,
    ) -> None:
        assert questions_per_step % world_size == 0
        self.mixture = mixture
        self.engine = engine
        self.sampling = sampling
        self.questions_per_step = questions_per_step
        self.steps = steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.all_reduce = all_reduce
        self.fingerprint = fingerprint
        if state is not None:
            check_fingerprint(state["data"], fingerprint)
        self.first_step = state["steps"] if state else 0
        self.sampled_at = time.perf_counter()
        """When the groups of the current step were ready."""

    def __len__(self) -> int:
        return self.steps * self.questions_per_step // self.world_size

    def __iter__(self) -> Iterator[Rollout]:
        for step in range(self.first_step, self.steps):
            started = time.perf_counter()
            groups = self._sample(step)
            self.sampled_at = time.perf_counter()
            figures = _figures(self.all_reduce(_sums(groups)))
            for group in groups:
                group["loss_tokens"] = max(1, int(figures["sampled_tokens"]))
                group["state"] = {
                    "steps": step + 1,
                    "data": self.fingerprint,
                    "figures": {**figures, "rollout_seconds": self.sampled_at - started},
                }
                yield group

    def _sample(self, step: int) -> list[Rollout]:
        numbers = range(
            step * self.questions_per_step + self.rank, (step + 1) * self.questions_per_step, self.world_size
        )
        located = [self.mixture.locate(number % len(self.mixture)) for number in numbers]
        questions = [(task, task[index]) for task, index in located]
        engine = self.engine()
        prompts = [render_for_completion(engine.tokenizer, conversation) for _, conversation in questions]
        samples = engine.generate(
            prompts,
            num_samples=self.sampling.num_samples,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            seed=[self._seed(number) for number in numbers],
            logprobs=True,
        )
        return [
            collate_group(prompt, completions, _rewards(engine, *question, completions), engine.tokenizer.bos_id)
            for prompt, completions, question in zip(prompts, samples, questions, strict=True)
        ]

    def _seed(self, number: int) -> int:
        # A different stream of random numbers for every question of the run.
        return (self.seed << 32) + number


def _rewards(engine: Engine, task: Task, conversation: Conversation, completions: Sequence[Completion]) -> Tensor:
    texts = [engine.tokenizer.decode(completion.content) for completion in completions]
    return torch.tensor([task.reward(conversation, text) for text in texts], dtype=torch.float32)


def _sums(groups: Sequence[Rollout]) -> Tensor:
    """What the figures of a step are made of, float64, to be summed over ranks."""
    rewards = torch.cat([group["rewards"] for group in groups]).double()
    counts = [
        len(rewards),
        sum(group["num_tokens"] for group in groups),
        float(rewards.sum()),
        int((rewards >= 1).sum()),
        sum(group["truncated"] for group in groups),
        sum(group["surprisal"] for group in groups),
        sum(not group["has_signal"] for group in groups),
    ]
    return torch.tensor(counts, dtype=torch.float64)


def _figures(sums: Tensor) -> dict[str, float]:
    """Of one step, over all ranks.

    reward: mean. pass@1: share of samples with reward 1. length: sampled tokens per sample. truncated: share of
    samples that were cut off. entropy: mean surprisal of the sampled tokens, in nats. no_signal: groups all of whose
    samples got the same reward. sampled_tokens: how many.
    """
    samples, tokens, reward, full_rewards, truncated, surprisal, no_signal = sums.tolist()
    return {
        "reward": reward / samples,
        "pass@1": full_rewards / samples,
        "length": tokens / samples,
        "truncated": truncated / samples,
        "entropy": surprisal / max(1, tokens),
        "no_signal": no_signal,
        "sampled_tokens": tokens,
    }
