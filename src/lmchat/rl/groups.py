"""Groups of sampled and graded answers to a question, and the micro-batches that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmchat.generation.sequence import Completion
from lmchat.types import IGNORE_INDEX, Rollout


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards minus the mean of the group, not divided by the standard deviation (Dr. GRPO, arXiv:2503.20783).

    Args:
        rewards: (samples,) float, rewards of one group.

    Returns:
        (samples,) advantages; exactly 0 if all rewards are equal, also if their mean is rounded.
    """
    return torch.zeros_like(rewards) if rewards.min() == rewards.max() else rewards - rewards.mean()


@dataclass(frozen=True)
class Group:
    """The samples of one question, with log-probabilities, and their rewards, (samples,) float32."""

    prompt: Sequence[int]
    completions: Sequence[Completion]
    rewards: Tensor

    @property
    def advantages(self) -> Tensor:
        """(samples,) float32."""
        return group_advantages(self.rewards)

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
        samples = [
            (completion, advantage)
            for completion, advantage in zip(self.completions, self.advantages.tolist(), strict=True)
            if advantage
        ]
        prompt, last = list(self.prompt[:-1]) if samples else [], self.prompt[-1]
        ids, targets = prompt.copy(), [IGNORE_INDEX] * len(prompt)
        logprobs, weights = [0.0] * len(prompt), [0.0] * len(prompt)
        for completion, advantage in samples:
            ids += [last, *completion.ids[:-1]]
            targets += [
                token if sampled else IGNORE_INDEX
                for token, sampled in zip(completion.ids, completion.mask, strict=True)
            ]
            logprobs += completion.logprobs
            weights += [advantage] * len(completion.ids)
        return Rollout(
            inputs=torch.tensor([ids], dtype=torch.int64),
            targets=torch.tensor([targets], dtype=torch.int64),
            advantages=torch.tensor([weights]),
            logprobs=torch.tensor([logprobs]),
            prompt_tokens=len(prompt),
            sample_tokens=[len(completion.ids) for completion, _ in samples],
            group_tokens=self.num_tokens,
        )
