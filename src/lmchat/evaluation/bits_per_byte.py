"""Bits per byte: the loss per byte of text, which does not depend on the vocabulary."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lmchat.evaluation.evaluator import Evaluator, Metrics
from lmchat.generation.policy import Policy
from lmchat.types import IGNORE_INDEX, Batch


class BitsPerByte(Metric):
    """Σ nll / (ln 2 · Σ bytes) over all text tokens of all batches and ranks.

    Ignored targets and special tokens, which have no bytes, count in neither sum.

    Args:
        token_bytes: (vocab_size,) integers, bytes of each token.
    """

    full_state_update = False

    token_bytes: Tensor
    nats: Tensor
    num_bytes: Tensor

    def __init__(self, token_bytes: Tensor) -> None:
        super().__init__()
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll: Tensor, targets: Tensor) -> None:
        """Adds losses (...) in nats, float, of targets (...) int64."""
        num_bytes = self.token_bytes[targets.clamp(min=0)] * (targets != IGNORE_INDEX)
        self.nats += torch.where(num_bytes > 0, nll, 0).sum(dtype=torch.float64)
        self.num_bytes += num_bytes.sum()

    def compute(self) -> Tensor:
        """Bits per byte, a float64 scalar; infinite if no byte was counted."""
        return torch.where(self.num_bytes > 0, self.nats / (math.log(2) * self.num_bytes.double()), math.inf)


class BitsPerByteEvaluator(Evaluator):
    """Bits per byte of held-out text, whose ``batches`` are given for a rank and world size; the metric is ``bpb``."""

    name = "bpb"

    def __init__(self, token_bytes: Tensor, batches: Callable[[int, int], Iterable[Batch]]) -> None:
        self._metric = BitsPerByte(token_bytes)
        self._batches = batches

    def batches(self, rank: int, world_size: int) -> Iterable[Batch]:
        return self._batches(rank, world_size)

    def split(self, batch: Any, parts: int) -> list[Any]:
        pieces, first, starts = [], 0, batch.get("document_starts")
        for inputs, targets in zip(batch["inputs"].chunk(parts), batch["targets"].chunk(parts), strict=True):
            pieces.append(Batch(inputs=inputs, targets=targets))
            end = first + inputs.numel()
            if starts is not None:
                own = starts[(starts >= first) & (starts < end)] - first
                pieces[-1]["document_starts"] = F.pad(own, (0, len(starts) - len(own)), value=end - first)
            first = end
        return pieces

    def update(self, policy: Policy, batch: Batch) -> None:
        device = torch.device("cpu") if policy.net.device.type == "mps" else policy.net.device  # MPS has no float64
        self._metric.to(device)  # first: NCCL cannot reduce a failed rank's on a CPU
        starts, targets = batch.get("document_starts"), batch["targets"]
        nll = policy.net.loss(batch["inputs"], targets, reduction="none", document_starts=starts)
        self._metric.update(nll.to(device), targets.to(device))

    def compute(self) -> Metrics:
        value = self._metric.compute()
        self._metric.reset()
        return {self.name: value}
