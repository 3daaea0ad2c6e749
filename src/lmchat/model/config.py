"""The shape of a GPT, without torch: what the scaling laws, the model and its checkpoints share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lmchat.types import UserError

GATE_CHANNELS = 32
"""Channels of the block's input that the value-embedding gate reads."""

VOCAB_MULTIPLE = 64
"""Token tables are padded up to a multiple of this, which is what matrix units like."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    sequence_len: tokens per training row, which also sets the attention windows.
    vocab_size: tokens the tokenizer knows; tables are padded, logits cropped back.
    n_kv_head: key and value heads; fewer than `n_head` means grouped queries.
    window_pattern: "L" (sees `sequence_len` tokens back) and "S" (half of it), tiled over the layers; the last
        layer is always L.

    Raises `UserError` where the numbers do not fit together.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(
                f"n_embd {self.n_embd} over n_head {self.n_head} gives no even head size; "
                "choose an n_embd that is an even multiple of n_head"
            )
        if self.n_embd < GATE_CHANNELS:
            raise UserError(f"n_embd is {self.n_embd}; the value gates read {GATE_CHANNELS} channels, use that or more")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; choose a divisor")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern is {self.window_pattern!r}; write it with the letters S and L, like SSSL")

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; `GPTConfig(**fields)` gives the config back."""
        return asdict(self)

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token tables."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """Tokens each layer sees back, itself not counted: a window of W holds the keys max(0, t - W)...t."""
        windows = {"S": self.sequence_len // 2, "L": self.sequence_len}
        tiled = (self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layer - 1))
        return (*(windows[letter] for letter in tiled), windows["L"])

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Every other layer, counted so that the last one is among them."""
        return tuple(range((self.n_layer - 1) % 2, self.n_layer, 2))
