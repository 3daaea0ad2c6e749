"""Rollouts: groups of sampled and graded answers to questions, the batches of reinforcement learning."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lmchat.data.mixture import Mixture, check_fingerprint
from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.sequence import Completion
from lmchat.option_checks import count_in
from lmchat.tasks.base import graded
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import IGNORE_INDEX, Rollout


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards (samples,) minus the mean of the group, not divided by the standard deviation.

    As in Dr. GRPO (arXiv:2503.20783). Exactly 0 if all rewards are equal, also if their mean is rounded.
    """
    return torch.zeros_like(rewards) if rewards.min() == rewards.max() else rewards - rewards.mean()


@dataclass(frozen=True)
class Group:
    """The samples of one question, with log-probabilities, and their rewards, (samples,) float32."""

    prompt: Sequence[int]
    completions: Sequence[Completion]
    rewards: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens; forced ones do not count."""
        return sum(sum(completion.mask) for completion in self.completions)

    def micro_batch(self) -> Rollout:
        """The samples in one row behind their common prompt.

        The last token of the prompt, which predicts the first token of a sample, starts each sample. Samples without
        advantage have no gradient and are left out. The stop token of a sample is a target; the reference leaves it
        out, so its policy never learns when to stop. Without samples the row is empty.
        """
        pairs = zip(self.completions, group_advantages(self.rewards).tolist(), strict=True)
        samples = [(completion, advantage) for completion, advantage in pairs if advantage]
        *prompt, last = self.prompt if samples else self.prompt[-1:]
        rows = [(token, IGNORE_INDEX, 0.0, 0.0) for token in prompt]
        for completion, advantage in samples:
            read = [last, *completion.ids[:-1]]
            tokens = zip(read, completion.ids, completion.mask, completion.logprobs, strict=True)
            for token, target, sampled, logprob in tokens:
                rows.append((token, target if sampled else IGNORE_INDEX, advantage, logprob))
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), 4)
        inputs, targets, advantages, logprobs = table.T[:, None]
        return Rollout(
            inputs=inputs.long(),
            targets=targets.long(),
            advantages=advantages.float(),
            logprobs=logprobs.float(),
            prompt_tokens=len(prompt),
            sample_tokens=[len(completion.ids) for completion, _ in samples],
            group_tokens=self.num_tokens,
        )


@dataclass(eq=False)
class Rollouts(IterableDataset[Rollout]):
    """On-policy micro-batches of one rank: all groups of a step are sampled before the first row is trained on.

    Questions are taken in the order of the mixture, again and again; rank r of W takes questions r, r + W, … of each
    step. The dataset has a length, so that Lightning does not prefetch: a prefetched group would be sampled from the
    policy before the last step.

    Args:
        engine: returns an engine on the current policy; called once per step.
        sampling: sampling parameters of every question; their seed follows from ``seed``.
        questions_per_step: number of questions over all ranks, a multiple of ``world_size``.
        steps: optimizer steps of the whole run.
        all_reduce: sums a float64 tensor over the ranks.
        fingerprint: fingerprint of the questions; part of the state.
        state: state of the batch to continue after.

    Attributes:
        sampled_at: when the groups of the current step were ready, by `time.perf_counter`.

    Raises:
        UserError: the state is a position in other questions.
    """

    mixture: Mixture
    engine: Callable[[], Engine]
    sampling: SamplingParams
    _: KW_ONLY
    questions_per_step: int
    steps: int
    seed: int
    rank: int
    world_size: int
    all_reduce: Callable[[Tensor], Tensor]
    fingerprint: dict[str, str]
    state: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        assert self.questions_per_step % self.world_size == 0
        self.sampling = replace(self.sampling, logprobs=True)
        self.first_step = 0
        if self.state is not None:
            check_fingerprint(self.state.get("data"), self.fingerprint)
            self.first_step = count_in(self.state, "steps", len(self.mixture) // self.questions_per_step)
        self.sampled_at = time.perf_counter()

    def __len__(self) -> int:
        return self.steps * self.questions_per_step // self.world_size

    def __iter__(self) -> Iterator[Rollout]:
        for step in range(self.first_step, self.steps):
            started = time.perf_counter()
            groups = self._sample(step)
            self.sampled_at = time.perf_counter()
            metrics = rollout_metrics(groups, self.all_reduce)
            for group in groups:
                batch = group.micro_batch()
                batch["loss_tokens"] = max(1, int(metrics["sampled_tokens"]))
                batch["state"] = {"steps": step + 1, "data": self.fingerprint}
                batch["metrics"] = {**metrics, "rollout_seconds": self.sampled_at - started}
                yield batch

    def _sample(self, step: int) -> list[Group]:
        first = step * self.questions_per_step
        numbers = range(first + self.rank, first + self.questions_per_step, self.world_size)
        located = [self.mixture.locate(number % len(self.mixture)) for number in numbers]
        questions = [(task := self.mixture.parts[part].task, task[index]) for part, index in located]
        engine = self.engine()
        prompts = [render_for_completion(engine.tokenizer, conversation) for _, conversation in questions]
        # A different seed for every question of the run.
        params = [replace(self.sampling, seed=(self.seed << 32) + number) for number in numbers]
        samples, groups = engine.generate(prompts, params), []
        for (task, conversation), prompt, completions in zip(questions, prompts, samples, strict=True):
            texts = [engine.tokenizer.decode(completion.content) for completion in completions]
            rewards = [graded(task).reward(conversation, text) for text in texts]
            groups.append(Group(prompt, completions, torch.tensor(rewards, dtype=torch.float32)))
        return groups


def rollout_metrics(groups: Sequence[Group], all_reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Metrics of one step over all ranks, from this rank's groups.

    reward: mean reward. pass@1: share of samples with reward 1. length: sampled tokens per sample. truncated: share of
    samples cut at the token limit. entropy: mean negative log-likelihood of the sampled tokens, in nats. no_signal:
    number of groups whose samples all have the same reward. sampled_tokens: their number.
    """
    rewards = torch.cat([group.rewards for group in groups]).double()
    completions = [completion for group in groups for completion in group.completions]
    sums = [
        len(rewards),
        sum(group.num_tokens for group in groups),
        float(rewards.sum()),
        int((rewards >= 1).sum()),
        sum(not completion.finished for completion in completions),
        -sum(map(sum, (completion.logprobs for completion in completions))),
        sum(not group_advantages(group.rewards).any() for group in groups),
    ]
    totals = all_reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
    samples, tokens, reward, full_rewards, truncated, sampled_nll, no_signal = totals
    return {
        "reward": reward / samples,
        "pass@1": full_rewards / samples,
        "length": tokens / samples,
        "truncated": truncated / samples,
        "entropy": sampled_nll / max(1, tokens),
        "no_signal": no_signal,
        "sampled_tokens": tokens,
    }
