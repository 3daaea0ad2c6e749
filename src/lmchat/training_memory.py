"""Memory of a training step, by counting: what fits a card, and the largest micro-batch that does.

Saved activations per token and block were counted from what autograd keeps (tests/test_training_memory.py counts
again): in the compute dtype, of the model's width D and the width of keys and values K,

- compiled: 15 D + 3 K: the block's input, its norm, rotated and normed queries, attention's output, the residual
  stream between the parts and its norm (7 D), rotated keys, normed keys, values (3 K), the MLP's hidden states before
  and after the squared ReLU (8 D);
- recomputing: 8 D + 2 K, without what follows elementwise from the rest;
- eager: 19 D + 4 K;
- checkpointed: D, and in the backward pass the above for one block at a time.

A layer with value embeddings keeps K more. Everything else is estimated: no figure was measured on a GPU so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmchat.batching import divisors
from lmchat.losses import CHUNK_TOKENS
from lmchat.model.config import GPTConfig
from lmchat.scaling import parameter_counts

Mode = Literal["eager", "compiled", "recomputing"]

SAVED_WIDTHS: dict[Mode, tuple[int, int]] = {"eager": (19, 4), "compiled": (15, 3), "recomputing": (8, 2)}
"""Saved per token and block: how many times the model's width, and the width of keys and values."""
BACKWARD_WIDTHS = 12
"""Widths per token that the backward pass of one block holds at a time, gradients and recomputed values; estimated."""
OPTIMIZER_COPIES = 8
"""fp32 copies of the largest group of equal matrices that Muon's step holds, uncompiled: gradients, weights, update and
the operands of its products."""
RESERVE_BYTES = int(1.5e9)
"""CUDA's context, libraries and communication buffers; estimated."""
FRAGMENTATION = 0.05
"""Share of the allocator's memory that no tensor can use; estimated."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per device at the fullest moment of a training step, by what holds them.

    Attributes:
        states: fp32 weights, gradients and optimizer state.
        activations: what autograd keeps for the backward pass.
        workspace: the larger of the head and a block's backward pass, and of the optimizer's temporaries beyond the
            activations, which are freed by then.
        reserve: context, libraries, fragmentation.
    """

    states: float
    activations: float
    workspace: float
    reserve: float

    @property
    def total(self) -> float:
        return self.states + self.activations + self.workspace + self.reserve


def training_memory(
    config: GPTConfig,
    rows: int,
    *,
    mode: Mode = "compiled",
    checkpoint_blocks: bool = False,
    optimizer_shards: int = 1,
    element_bytes: int = 2,
    chunk_tokens: int = CHUNK_TOKENS["cuda"],
    on_gpu: bool = True,
) -> TrainingMemory:
    """Memory per device of training with micro-batches of `rows` rows.

    Args:
        mode: how the blocks run; see the module.
        checkpoint_blocks: keep each block's input only, and run the block again in the backward pass.
        optimizer_shards: ranks that share the optimizer's state.
        element_bytes: of the compute dtype.
        chunk_tokens: tokens whose logits the loss holds at a time.
    """
    tokens, width = rows * config.sequence_len, config.n_embd
    counts = parameter_counts(config)
    matrices, tables = counts.transformer_matrices, counts.total - counts.transformer_matrices  # by Muon, by AdamW
    states = 8 * counts.total + (4 * matrices + 8 * tables) / optimizer_shards
    activations = _saved_bytes(config, tokens, mode, checkpoint_blocks, element_bytes)
    chunk = min(chunk_tokens, tokens)
    head: float = chunk * config.vocab_size * (2 * element_bytes + (0 if mode != "eager" else 12))
    head += config.padded_vocab_size * width * (4 + 2 * element_bytes)
    workspace = max(head, BACKWARD_WIDTHS * tokens * width * element_bytes)
    largest_group = 4 * config.n_layer * width**2
    optimizer = OPTIMIZER_COPIES * 4 * largest_group / optimizer_shards
    workspace = max(workspace, optimizer - activations)
    held = states + activations + workspace
    return TrainingMemory(states, activations, workspace, RESERVE_BYTES + FRAGMENTATION * held if on_gpu else 0)


def _saved_bytes(config: GPTConfig, tokens: int, mode: Mode, checkpoint_blocks: bool, element_bytes: int) -> float:
    """Bytes that autograd keeps: blocks, embeddings, the end of the model, the loss's gradients."""
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    widths, kv_widths = SAVED_WIDTHS[mode]
    # Logarithms of attention's sums and the norms' factors, fp32; weights cast to the compute dtype.
    per_block = (widths * width + kv_widths * kv_width) * element_bytes + 4 * (3 * config.n_head + 2)
    cast_weights = 0 if element_bytes == 4 else 2 * (10 * width**2 + 2 * width * kv_width)
    block, blocks = tokens * per_block + cast_weights, config.n_layer
    value_rows = len(config.value_embedding_layers) * tokens * kv_width * element_bytes
    saved = block + blocks * tokens * width * element_bytes if checkpoint_blocks else blocks * block
    ends = 5 * tokens * width * element_bytes  # embedding, its norm, the last norm, hidden states and their gradient
    return saved + value_rows + ends


def largest_micro_batch(
    config: GPTConfig, memory_bytes: float, rows_per_step: int, *, mode: Mode = "compiled", **options: bool | int
) -> int | None:
    """The largest divisor of the rows of a rank's optimizer step with which training fits, or None if not one row does.

    Args:
        memory_bytes: of the device.
        rows_per_step: rows per rank and optimizer step, all micro-batches together.
        mode, options: as in `training_memory`.
    """
    for rows in reversed(divisors(rows_per_step)):
        if training_memory(config, rows, mode=mode, **options).total <= memory_bytes:  # type: ignore[arg-type]
            return rows
    return None
