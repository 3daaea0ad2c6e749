"""The policy: a network together with its tokenizer and an engine that samples from it."""

from __future__ import annotations

from dataclasses import dataclass

from lmchat.generation.engine import Engine
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Policy:
    """What evaluation and reinforcement learning need of a model.

    Attributes:
        net: the network, with its current weights.
        tokenizer: the tokenizer it was trained with.
    """

    net: GPT
    tokenizer: Tokenizer

    @property
    def engine(self) -> Engine:
        """An engine that samples from the network's current weights."""
        return Engine(self.net, self.tokenizer)
