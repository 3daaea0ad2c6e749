"""What a stage's DataModule is told of the stage, since neither knows the other's class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmchat.generation.policy import Policy
from lmchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class StageSpec:
    """The settings of a stage that its data depends on, once its checkpoint has been loaded.

    Attributes:
        tag: name of the run.
        tokenizer: tokenizer of the model.
        sequence_len: tokens per row.
        global_batch_tokens: tokens per optimizer step over all ranks, given or of the parent checkpoint; None leaves it
            to the scaling laws.
        micro_batch_size: rows per micro-batch and rank in the parent checkpoint, if any.
        policy: returns the policy with its current weights; for data that the policy samples.
    """

    tag: str
    tokenizer: Tokenizer
    sequence_len: int
    global_batch_tokens: int | None
    micro_batch_size: int | None
    policy: Callable[[], Policy]
