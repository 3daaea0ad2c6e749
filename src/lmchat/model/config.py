"""Hyperparameters of a GPT, without importing torch."""

from dataclasses import dataclass

from lmchat.option_checks import check_count
from lmchat.types import UserError

GATE_CHANNELS = 32
"""Channels of the block's input that the value-embedding gate reads."""

MAX_SEQUENCE_LEN = 2**17
"""Limit of ``sequence_len``, since the tables of rotary embeddings grow with it alone."""

VOCAB_MULTIPLE = 64
"""Rows of token tables are padded to a multiple of this, which matrix units need."""


@dataclass(frozen=True)
class GPTConfig:
    """Hyperparameters of a GPT.

    Without value embeddings, residual mix and short windows, the architecture is transformers' `NanoChatForCausalLM`
    (see `native_obstacles`).

    Args:
        sequence_len: tokens per training row; the attention windows follow from it.
        vocab_size: tokens of the tokenizer. The token tables are padded, and the logits cropped back.
        n_layer: number of blocks.
        n_head: query heads.
        n_kv_head: key and value heads; fewer than ``n_head`` gives grouped-query attention.
        n_embd: width of the residual stream.
        window_pattern: "L" (attends to ``sequence_len`` tokens back) and "S" (half of that), tiled over the layers;
            the last layer is always L.
        value_embeddings: give every other layer a token table whose gated rows are added to the attention's values.
        residual_mix: before each block, mix the residual stream with the normed embedding by two learned scalars.

    Raises:
        UserError: the numbers do not fit together.
    """

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"
    value_embeddings: bool = True
    residual_mix: bool = True

    def __post_init__(self) -> None:
        names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        check_count(None, 1, **{name: getattr(self, name) for name in names})
        check_count(None, 1, MAX_SEQUENCE_LEN, sequence_len=self.sequence_len)
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(
                f"n_embd {self.n_embd} over n_head {self.n_head} gives no even head size; "
                "choose an n_embd that is an even multiple of n_head"
            )
        if self.value_embeddings and self.n_embd < GATE_CHANNELS:
            raise UserError(
                f"n_embd is {self.n_embd}; the gates of the value embeddings read {GATE_CHANNELS} channels: use "
                "that or more (a larger depth, aspect_ratio or head_dim), or value_embeddings false"
            )
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; choose a divisor")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern is {self.window_pattern!r}; write it with the letters S and L, like SSSL")

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
        """Number of previous tokens that each layer attends to: with W, keys max(0, t - W)...t."""
        windows = {"S": self.sequence_len // 2, "L": self.sequence_len}
        tiled = (self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.n_layer - 1))
        return (*(windows[letter] for letter in tiled), windows["L"])

    @property
    def value_embedding_layers(self) -> range:
        """Indices of the layers with value embeddings: every other layer, including the last, or none."""
        return range((self.n_layer - 1) % 2, self.n_layer if self.value_embeddings else 0, 2)

    @property
    def native_obstacles(self) -> tuple[str, ...]:
        """What `NanoChatForCausalLM` lacks in contexts up to ``sequence_len``, with the options that disable it."""
        obstacles = {
            "value embeddings (--model.value_embeddings false)": self.value_embeddings,
            "the residual mix (--model.residual_mix false)": self.residual_mix,
            "short attention windows (--model.window_pattern L)": min(self.window_sizes) < self.sequence_len,
        }
        return tuple(name for name, present in obstacles.items() if present)

    @property
    def rounds_rotary_tables(self) -> bool:
        """Whether the rotary tables are rounded to bf16 for every compute dtype.

        True as in nanochat, which changes fp32 logits by about 3e-3. Without value embeddings and residual mix they
        have the compute dtype, as in transformers.
        """
        return self.value_embeddings or self.residual_mix
