"""pass@k: the probability that at least one of k samples is correct."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchmetrics import Metric

from lmchat.evaluation.chat_tasks import question_batches
from lmchat.evaluation.evaluator import Evaluator, Metrics, compute_and_reset
from lmchat.generation.policy import Policy
from lmchat.generation.sampling import SamplingParams
from lmchat.tasks.base import Task, graded
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Conversation


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Unbiased estimate of pass@k from ``num_samples`` samples of each question, c of them correct:
    1 − C(n − c, k) / C(n, k) (arXiv:2107.03374, eq. 1).

    Args:
        num_correct: (questions,) correct samples of each question.
        num_samples: n, samples of each question; at least k.

    Returns:
        (questions,) float64.
    """
    assert 1 <= k <= num_samples, f"pass@{k} needs at least {k} samples, not {num_samples}"
    wrong = num_samples - num_correct.to(torch.float64)
    draws = torch.arange(k, dtype=torch.float64, device=num_correct.device)
    # C(n − c, k) / C(n, k), factor by factor; it is 0 if fewer than k samples are wrong.
    all_wrong = ((wrong[:, None] - draws) / (num_samples - draws)).clamp(min=0).prod(dim=1)
    return 1 - all_wrong


class PassAtK(Metric):
    """Mean of `pass_at_k` over questions, summed over batches and ranks.

    Args:
        k: number of samples, of which at least one must be correct.
    """

    full_state_update = False
    higher_is_better = True

    total: Tensor
    questions: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("questions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, num_correct: Tensor, num_samples: int) -> None:
        """Adds questions: (questions,) number of correct samples of ``num_samples`` per question."""
        self.total += pass_at_k(num_correct, num_samples, self.k).sum()
        self.questions += len(num_correct)

    def compute(self) -> Tensor:
        """A float64 scalar in 0…1; NaN without questions."""
        return self.total / self.questions


class PassAtKEvaluator(Evaluator):
    """pass@1 … pass@n of sampled answers to a task's questions, where n is the number of samples.

    Args:
        task: a task that grades answers, see `lmchat.tasks.base.Graded`.
        sampling: sampling parameters of the answers.
        batch_size: questions answered together.
    """

    name = "pass@k"

    def __init__(self, task: Task, sampling: SamplingParams, batch_size: int) -> None:
        self.task = task
        self.grader = graded(task)
        self.sampling = sampling
        self.batch_size = batch_size
        self._metrics = {f"pass@{k}": PassAtK(k) for k in range(1, sampling.num_samples + 1)}

    def batches(self, rank: int, world_size: int) -> Iterator[list[Conversation]]:
        return question_batches(self.task, self.batch_size, rank, world_size)

    def update(self, policy: Policy, batch: list[Conversation]) -> None:
        prompts = [render_for_completion(policy.tokenizer, conversation) for conversation in batch]
        samples = policy.engine.generate(prompts, self.sampling)
        correct = torch.tensor(
            [
                sum(self.grader.evaluate(conversation, policy.tokenizer.decode(sample.content)) for sample in group)
                for conversation, group in zip(batch, samples, strict=True)
            ],
            device=policy.net.device,
        )
        for metric in self._metrics.values():
            metric.to(policy.net.device).update(correct, self.sampling.num_samples)

    def compute(self) -> Metrics:
        return compute_and_reset(self._metrics)
