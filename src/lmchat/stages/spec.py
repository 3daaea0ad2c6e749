"""The settings that a stage's module passes to its DataModule; neither knows the other's class."""

from collections.abc import Callable
from dataclasses import dataclass

from lmchat.generation.policy import Policy
from lmchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class StageSpec:
    """Settings of a stage that its data depends on.

    Attributes:
        tag: name of the run.
        tokenizer: tokenizer of the model.
        sequence_len: tokens per row.
        global_batch_tokens: tokens per optimizer step over all ranks, from the options or the parent checkpoint; None
            takes the scaling laws' value.
        micro_batch_size: rows per micro-batch and rank in the parent checkpoint, if any.
        policy: returns the policy with its current weights, to sample from.
    """

    tag: str
    tokenizer: Tokenizer
    sequence_len: int
    global_batch_tokens: int | None
    micro_batch_size: int | None
    policy: Callable[[], Policy]
