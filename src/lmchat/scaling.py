"""Scaling laws: from depth alone to the model's shape, batch, horizon, learning-rate scale and weight decay.

Pure arithmetic. The reference point is the depth-12 model of the same settings, for which the base hyperparameters
were tuned at a batch of 2^19 tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

from lmchat.model.config import GATE_CHANNELS, GPTConfig
from lmchat.option_checks import check_count
from lmchat.types import UserError

DEFAULT_SEQUENCE_LEN = 2048
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383
"""Optimal batch ~ training tokens ^ 0.383 (Power Lines, arXiv:2505.13738)."""


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters of each part of the model.

    Token tables include padding rows; matrices include the gates of the value embeddings; scalars are the residual
    lambdas.
    """

    wte: int
    value_embeds: int
    lm_head: int
    transformer_matrices: int
    scalars: int

    @property
    def total(self) -> int:
        return self.wte + self.value_embeds + self.lm_head + self.transformer_matrices + self.scalars

    @property
    def scaling(self) -> int:
        """Parameters that the scaling laws count: those that take part in every token's matrix products."""
        return self.transformer_matrices + self.lm_head


@dataclass(frozen=True)
class Plan:
    """A training run derived from a depth.

    Attributes:
        global_batch_tokens: tokens per optimizer step over all ranks.
        lr_scale: factor on every base learning rate.
        weight_decay: scaled weight decay of Muon.
        steps: optimizer steps.
    """

    config: GPTConfig
    global_batch_tokens: int
    lr_scale: float
    weight_decay: float
    steps: int


def config_for_depth(
    depth: int,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    n_kv_head: int | None = None,
    **options: Any,
) -> GPTConfig:
    """The shape of a model of `depth` layers: width depth · aspect_ratio, rounded up to whole heads.

    ``options`` are further fields of `GPTConfig`.
    """
    check_count(None, 1, depth=depth, aspect_ratio=aspect_ratio, head_dim=head_dim)
    if head_dim % 2:
        raise UserError(f"head_dim is {head_dim}; rotary embeddings turn pairs of channels: use an even number")
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=n_head,
        n_kv_head=n_head if n_kv_head is None else n_kv_head,
        n_embd=n_head * head_dim,
        **options,
    )


def parameter_counts(config: GPTConfig) -> ParameterCounts:
    """Counts the parameters of a model without building it."""
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    attention = 2 * width * width + 2 * width * kv_width
    mlp = 2 * width * 4 * width
    value_layers = len(config.value_embedding_layers)
    return ParameterCounts(
        wte=config.padded_vocab_size * width,
        value_embeds=value_layers * config.padded_vocab_size * kv_width,
        lm_head=config.padded_vocab_size * width,
        transformer_matrices=config.n_layer * (attention + mlp) + value_layers * config.n_kv_head * GATE_CHANNELS,
        scalars=2 * config.n_layer if config.residual_mix else 0,
    )


def flops_per_token(config: GPTConfig) -> int:
    """FLOPs per training token: 6 per matrix parameter, plus attention within its windows.

    Attention costs 12 · width per visible key: 2 · 2 · width for QKᵀ and for the weighted values, times 3 for forward
    and backward. Embedding look-ups count as free.
    """
    attention = sum(12 * config.n_embd * min(window, config.sequence_len) for window in config.window_sizes)
    return 6 * parameter_counts(config).scaling + attention


def make_plan(
    depth: int,
    *,
    ratio: float = 10.5,
    target_flops: float | None = None,
    max_steps: int | None = None,
    global_batch_tokens: int | None = None,
    weight_decay: float = 0.2,
    **shape: Any,
) -> Plan:
    """Plans a pretraining run.

    The horizon is `max_steps` if given, else `target_flops`, else `ratio`. Learning rates and weight decay scale with
    the batch also if `global_batch_tokens` is given. Weight decay keeps the timescale of AdamW's implicit moving
    average of the weights, in epochs, constant (arXiv:2405.13698).

    Args:
        ratio: training tokens per scaling parameter.
        target_flops, max_steps: FLOPs and optimizer steps of the whole run.
        global_batch_tokens: tokens per optimizer step over all ranks; None computes them.
        weight_decay: weight decay of the depth-12 model at a batch of 2^19 tokens.
        shape: further arguments of `config_for_depth`.

    Raises:
        UserError: the horizon is shorter than one step, or a number is out of range.
    """
    if not 0 < ratio < math.inf:
        raise UserError(f"ratio is {ratio}; tokens per parameter must be a number above 0")
    config = config_for_depth(depth, **shape)
    reference = config_for_depth(REFERENCE_DEPTH, **{**shape, "n_kv_head": None})
    target_tokens = int(ratio * parameter_counts(config).scaling)
    reference_tokens = ratio * parameter_counts(reference).scaling
    check_count(None, 1, global_batch_tokens=global_batch_tokens)
    batch = global_batch_tokens or optimal_batch_tokens(target_tokens, reference_tokens)
    lr_scale = math.sqrt(batch / REFERENCE_BATCH_TOKENS)
    return Plan(
        config=config,
        global_batch_tokens=batch,
        lr_scale=lr_scale,
        weight_decay=weight_decay * lr_scale * (reference_tokens / target_tokens),
        steps=_horizon(max_steps, target_flops, target_tokens, flops_per_token(config), batch),
    )


def optimal_batch_tokens(target_tokens: int, reference_tokens: float) -> int:
    """Batch in tokens for a horizon of `target_tokens`, rounded to a power of two."""
    predicted = REFERENCE_BATCH_TOKENS * (target_tokens / reference_tokens) ** BATCH_EXPONENT
    return 2 ** round(math.log2(predicted))


def _horizon(
    max_steps: int | None, target_flops: float | None, target_tokens: int, flops_per_token: int, batch_tokens: int
) -> int:
    if max_steps is not None:
        steps, source = max_steps, f"max_steps {max_steps}"
    elif target_flops is not None:
        if not 0 < target_flops < math.inf:
            raise UserError(f"target_flops is {target_flops}; it must be a number above 0")
        steps, source = round(target_flops / (flops_per_token * batch_tokens)), f"target_flops {target_flops:g}"
    else:
        steps, source = target_tokens // batch_tokens, f"{target_tokens:,} tokens at the given ratio"
    if steps < 1:
        raise UserError(
            f"{source} is less than one step of {batch_tokens:,} tokens; raise the horizon or lower global_batch_tokens"
        )
    return steps
