"""Rollouts: groups of sampled and graded answers to a question, the batches of reinforcement learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lmchat.data.fingerprint import check_fingerprint
from lmchat.data.mixture import Mixture
from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.sequence import Completion
from lmchat.rl.advantages import group_advantages
from lmchat.tasks.base import Task, graded
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import IGNORE_INDEX, Conversation, Rollout


def collate_group(prompt: Sequence[int], completions: Sequence[Completion], rewards: Tensor, pad_id: int) -> Rollout:
    """The samples of one question as rows of equal length.

    Prompt, padding and forced tokens are not targets. The stop token of a sample is one; the reference leaves it out,
    so that it never trains when to stop.

    Args:
        prompt: token ids of the question.
        completions: the samples, with log-probabilities.
        rewards: (samples,) float32.
        pad_id: token id of the padding.
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
        sampled_nll=-sum(map(sum, (completion.logprobs for completion in completions))),
    )


class Rollouts(IterableDataset[Rollout]):
    """On-policy groups of one rank, step by step: all groups of a step are sampled before the first is trained on.

    Questions are taken in the order of the mixture, again and again; rank r of W takes questions r, r + W, … of each
    step. The dataset has a length, so that Lightning does not prefetch: a prefetched group would be sampled from the
    policy before the last step.

    Args:
        mixture: the questions.
        engine: returns an engine on the current policy; called once per step.
        sampling: sampling parameters of every question; their seed is replaced.
        questions_per_step: number of questions over all ranks, a multiple of ``world_size``.
        steps: optimizer steps of the whole run.
        seed: seed of the samples.
        rank: rank of this process.
        world_size: number of ranks.
        all_reduce: sums a float64 tensor over the ranks.
        fingerprint: of the questions; part of the state.
        state: state of the batch to continue after.

    Attributes:
        sampled_at: when the groups of the current step were ready, by `time.perf_counter`.

    Raises:
        UserError: the state is a position in other questions.
    """

    def __init__(
        self,
        mixture: Mixture,
        engine: Callable[[], Engine],
        sampling: SamplingParams,
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
        self.sampling = replace(sampling, logprobs=True)
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

    def __len__(self) -> int:
        return self.steps * self.questions_per_step // self.world_size

    def __iter__(self) -> Iterator[Rollout]:
        for step in range(self.first_step, self.steps):
            started = time.perf_counter()
            groups = self._sample(step)
            self.sampled_at = time.perf_counter()
            metrics = rollout_metrics(self.all_reduce(_sums(groups)))
            for group in groups:
                group["loss_tokens"] = max(1, int(metrics["sampled_tokens"]))
                group["state"] = {"steps": step + 1, "data": self.fingerprint}
                group["metrics"] = {**metrics, "rollout_seconds": self.sampled_at - started}
                yield group

    def _sample(self, step: int) -> list[Rollout]:
        numbers = range(
            step * self.questions_per_step + self.rank, (step + 1) * self.questions_per_step, self.world_size
        )
        located = [self.mixture.locate(number % len(self.mixture)) for number in numbers]
        questions = [(task, task[index]) for task, index in located]
        engine = self.engine()
        prompts = [render_for_completion(engine.tokenizer, conversation) for _, conversation in questions]
        params = [replace(self.sampling, seed=self._seed(number)) for number in numbers]
        return [
            collate_group(prompt, completions, _rewards(engine, *question, completions), engine.tokenizer.bos_id)
            for prompt, completions, question in zip(prompts, engine.generate(prompts, params), questions, strict=True)
        ]

    def _seed(self, number: int) -> int:
        """A seed of its own for every question of the run."""
        return (self.seed << 32) + number


def _rewards(engine: Engine, task: Task, conversation: Conversation, completions: Sequence[Completion]) -> Tensor:
    texts = [engine.tokenizer.decode(completion.content) for completion in completions]
    grader = graded(task)
    return torch.tensor([grader.reward(conversation, text) for text in texts], dtype=torch.float32)


def _sums(groups: Sequence[Rollout]) -> Tensor:
    """The sums that `rollout_metrics` needs, (7,) float64."""
    rewards = torch.cat([group["rewards"] for group in groups]).double()
    counts = [
        len(rewards),
        sum(group["num_tokens"] for group in groups),
        float(rewards.sum()),
        int((rewards >= 1).sum()),
        sum(group["truncated"] for group in groups),
        sum(group["sampled_nll"] for group in groups),
        sum(not group["has_signal"] for group in groups),
    ]
    return torch.tensor(counts, dtype=torch.float64)


def rollout_metrics(sums: Tensor) -> dict[str, float]:
    """Metrics of one step over all ranks.

    Args:
        sums: (7,) float64 over all groups: samples, sampled tokens, rewards, rewards of at least 1, truncated samples,
            negative log-likelihood in nats, groups without signal.

    Returns:
        reward: mean reward. pass@1: share of samples with reward 1. length: sampled tokens per sample. truncated: share
        of samples cut at the token limit. entropy: mean negative log-likelihood of the sampled tokens, in nats.
        no_signal: number of groups whose samples all have the same reward. sampled_tokens: their number.
    """
    samples, tokens, reward, full_rewards, truncated, sampled_nll, no_signal = sums.tolist()
    return {
        "reward": reward / samples,
        "pass@1": full_rewards / samples,
        "length": tokens / samples,
        "truncated": truncated / samples,
        "entropy": sampled_nll / max(1, tokens),
        "no_signal": no_signal,
        "sampled_tokens": tokens,
    }
