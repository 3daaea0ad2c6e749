"""pass@k: the probability that at least one of k samples is correct."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lmchat.evaluation.chat_tasks import question_batches, sampled_answers
from lmchat.evaluation.evaluator import Counts, Evaluator, Metrics
from lmchat.evaluation.intervals import mean_with_interval
from lmchat.generation.policy import Policy
from lmchat.generation.sampling import SamplingParams
from lmchat.tasks.base import Task, graded
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


class PassAtKEvaluator(Evaluator):
    """pass@1 … pass@n of sampled answers to a task's questions, where n is the number of samples.

    ``batch_size`` questions are answered together.
    """

    name = "pass@k"

    def __init__(self, task: Task, sampling: SamplingParams, batch_size: int) -> None:
        self.task = task
        self.grader = graded(task)
        self.sampling = sampling
        self.batch_size = batch_size
        self._questions = Counts(sampling.num_samples + 1)  # by the number of correct samples

    def batches(self, rank: int, world_size: int) -> Iterator[list[Conversation]]:
        return question_batches(self.task, self.batch_size, rank, world_size)

    def update(self, policy: Policy, batch: list[Conversation]) -> None:
        self._questions.to(policy.net.device)  # first: NCCL cannot reduce a failed rank's on a CPU
        answers = zip(batch, sampled_answers(policy.engine, batch, self.sampling), strict=True)
        correct = [sum(self.grader.evaluate(question, text) for text in texts) for question, texts in answers]
        self._questions.update([correct.count(number) for number in range(self.sampling.num_samples + 1)])

    def compute(self) -> Metrics:
        questions, samples = self._questions.pop(), self.sampling.num_samples
        estimates = {
            f"pass@{k}": mean_with_interval(pass_at_k(torch.arange(samples + 1), samples, k).tolist(), questions)
            for k in range(1, samples + 1)
        }
        self.intervals = {name: interval for name, (_, interval) in estimates.items()}
        return {name: mean for name, (mean, _) in estimates.items()}
