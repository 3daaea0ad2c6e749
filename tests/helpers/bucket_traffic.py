"""Bytes that a rank sends in an optimizer step, from the shapes of the buckets' messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmchat.optim.buckets import Bucket, ShardedBucket

FP32, BF16 = 4, 2


def bytes_sent(buckets: Sequence[Bucket], world_size: int) -> tuple[float, float, float]:
    """By reduce-scatter of fp32 gradients, all-gather of bf16 parameters, and all-reduce of small fp32 gradients."""
    share = (world_size - 1) / world_size
    sharded = sum(math.prod(bucket.shape) for bucket in buckets if isinstance(bucket, ShardedBucket))
    small = sum(math.prod(bucket.shape) for bucket in buckets if not isinstance(bucket, ShardedBucket))
    return share * sharded * FP32, share * sharded * BF16, 2 * share * small * FP32
