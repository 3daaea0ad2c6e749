"""pass@k: the chance that at least one of k samples is right."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Unbiased estimate of pass@k from ``num_samples`` samples of each question, c of them right:
    1 − C(n − c, k) / C(n, k) (arXiv:2107.03374, eq. 1).

    Args:
        num_correct: (questions,) right samples of each question.
        num_samples: n, samples of each question; at least k.

    Returns:
        (questions,) float64.
    """
    assert 1 <= k <= num_samples, f"pass@{k} needs at least {k} samples, not {num_samples}"
    wrong = num_samples - num_correct.to(torch.float64)
    draws = torch.arange(k, dtype=torch.float64, device=num_correct.device)
    # C(n − c, k) / C(n, k), factor by factor; a factor of 0 stands for fewer than k wrong samples.
    all_wrong = ((wrong[:, None] - draws) / (num_samples - draws)).clamp(min=0).prod(dim=1)
    return 1 - all_wrong


class PassAtK(Metric):
    """Mean of `pass_at_k` over questions, summed over batches and ranks.

    Args:
        k: samples of which one must be right.
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
        """Add questions, with the number of right ones among ``num_samples`` samples of each."""
        self.total += pass_at_k(num_correct, num_samples, self.k).sum()
        self.questions += len(num_correct)

    def compute(self) -> Tensor:
        """A float64 scalar in 0…1; NaN without a question."""
        return self.total / self.questions
