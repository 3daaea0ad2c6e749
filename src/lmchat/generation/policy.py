"""The policy: a network, its tokenizer, and an engine that samples from it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from lmchat.generation.engine import Engine
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Policy:
    """A network for evaluation and reinforcement learning, and the tokenizer it was trained with."""

    net: GPT
    tokenizer: Tokenizer

    @property
    def context_limit(self) -> int:
        """Maximum number of tokens of a context."""
        return len(self.net.cos)

    @property
    def engine(self) -> Engine:
        """An engine with the network's weights at the time of this call."""
        self._engine.refresh()
        return self._engine

    def release_memory(self) -> None:
        """Frees the engine, which is created again when needed, and torch's cache of free blocks."""
        self.__dict__.pop("_engine", None)
        torch.cuda.empty_cache()

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.net, self.tokenizer)
