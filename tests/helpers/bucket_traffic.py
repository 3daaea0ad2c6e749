"""Bytes that a rank sends in an optimizer step, from the shapes of the buckets' messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmchat.optim.buckets import Bucket

FP32, BF16 = 4, 2


def bytes_sent(buckets: Sequence[Bucket], world_size: int) -> tuple[float, float]:
    """By reduce-scatter of fp32 gradients and all-gather of parameters, bf16 except for vectors."""
    share = (world_size - 1) / world_size
    gradients = sum(math.prod(bucket.shape) * FP32 for bucket in buckets)
    parameters = sum(math.prod(bucket.shape) * (BF16 if len(bucket.shape) > 2 else FP32) for bucket in buckets)
    return share * gradients, share * parameters
