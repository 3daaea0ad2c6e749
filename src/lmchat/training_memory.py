"""Memory model of a training step.

Activations saved by autograd per token and block, in the compute dtype, with model width D and key/value width K
(counted in tests/test_training_memory.py):

- compiled: 15 D + 3 K: the block's input, its norm, rotated and normed queries, attention's output, the residual
  stream between the parts and its norm (7 D), rotated keys, normed keys, values (3 K), the MLP's hidden states before
  and after the squared ReLU (8 D);
- recomputing: 8 D + 2 K, without what follows elementwise from the rest;
- eager: 19 D + 4 K;
- checkpointed: D, or 2 D if eager (before and after the residual mix), and in the backward pass the above for one block
  at a time.

Layers with value embeddings save K more. Everything else is estimated; nothing was measured on a GPU so far.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lmchat.model.config import GPTConfig
from lmchat.scaling import parameter_counts
from lmchat.types import CHUNK_TOKENS, UserError

Mode = Literal["eager", "compiled", "recomputing"]

SAVED_WIDTHS: dict[Mode, tuple[int, int]] = {"eager": (19, 4), "compiled": (15, 3), "recomputing": (8, 2)}
"""Saved activations per token and block, as multiples of D and K."""
BACKWARD_WIDTHS = 12
"""Gradients and recomputed values per token in the backward pass of one block, as a multiple of D; estimated."""
OPTIMIZER_COPIES = 8
"""fp32 copies of the largest stack of matrices in Muon's uncompiled step: gradients, weights, update, operands."""
RESERVE_BYTES = int(1.5e9)
"""CUDA's context, libraries and communication buffers; estimated."""
FRAGMENTATION = 0.05
"""Share of the allocator's memory that no tensor can use; estimated."""
MODEL_ERROR = 1.2
"""Tolerance of the memory model: sizes that exceed the device by more than this factor are not tried."""
CHOSEN_ERROR = 2.0
"""The same for a micro-batch that the user has chosen."""


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of a training step per device, in bytes.

    Attributes:
        states: fp32 weights, gradients and optimizer state.
        activations: tensors saved by autograd for the backward pass.
        workspace: the maximum of the head and a block's backward pass, and of the optimizer's temporaries beyond the
            activations, which are freed by then.
        reserve: fragmentation, and on a GPU the CUDA context and libraries.
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
        checkpoint_blocks: save only the input of each block and recompute the block in the backward pass.
        optimizer_shards: number of ranks that the optimizer state is sharded over.
        element_bytes: bytes per element of the compute dtype.
        chunk_tokens: as in `lmchat.losses.linear_cross_entropy`.
        on_gpu: add what CUDA and its libraries take.
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
    return TrainingMemory(states, activations, workspace, RESERVE_BYTES * on_gpu + FRAGMENTATION * held)


def _saved_bytes(config: GPTConfig, tokens: int, mode: Mode, checkpoint_blocks: bool, element_bytes: int) -> float:
    """Bytes saved by autograd: blocks, embeddings, the end of the model, gradients of the loss."""
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    widths, kv_widths = SAVED_WIDTHS[mode]
    # Log-sum-exp of attention and factors of the norms, fp32; weights cast to the compute dtype.
    per_block = (widths * width + kv_widths * kv_width) * element_bytes + 4 * (3 * config.n_head + 2)
    cast_weights = 0 if element_bytes == 4 else 2 * (10 * width**2 + 2 * width * kv_width)
    block, blocks = tokens * per_block + cast_weights, config.n_layer
    value_rows = len(config.value_embedding_layers) * tokens * kv_width * element_bytes
    inputs = 2 if mode == "eager" and config.residual_mix else 1
    saved = block + blocks * inputs * tokens * width * element_bytes if checkpoint_blocks else blocks * block
    ends = 5 * tokens * width * element_bytes  # embedding, its norm, the last norm, hidden states and their gradient
    return saved + value_rows + ends


def check_fits(
    config: GPTConfig, device: Any, limit: float, estimate: Callable[[int], TrainingMemory] | None, rows: int = 1
) -> None:
    """Raises UserError if a model cannot fit a device with ``limit`` bytes of memory.

    ``estimate`` gives the memory of training by rows per micro-batch; None if the model is not trained. ``rows`` is the
    number that will be used, if known.
    """
    weights = 4 * parameter_counts(config).total
    if weights > limit:
        raise no_room(config, device, f"{_memory(weights)} of weights, {_memory(limit)} of memory")
    if estimate is None:
        return
    if (needed := estimate(1)).total > MODEL_ERROR * limit:
        reason = (
            f"training needs about {_memory(needed.total)}, {_memory(needed.states)} of them for weights, "
            f"gradients and optimizer; the device has {_memory(limit)}"
        )
        raise no_room(config, device, reason)
    if (needed := estimate(rows)).total > CHOSEN_ERROR * limit:
        raise UserError(
            f"--data.micro_batch_size is {rows}; training with micro-batches of {rows:,} rows of "
            f"{config.sequence_len:,} tokens needs about {_memory(needed.total)}, and {device} has "
            f"{_memory(limit)}; choose a smaller one, or auto"
        )


def no_room(config: GPTConfig, device: Any, reason: str) -> UserError:
    """The error for a model that does not fit."""
    count = parameter_counts(config).total
    size = f"{count / 1e6:,.1f} million" if count < 1e9 else f"{_billions(count)} billion"
    return UserError(
        f"a model of depth {config.n_layer} for {config.sequence_len} tokens has about {size} parameters and does not "
        f"fit on {device} ({reason}); choose a smaller --model.depth or --model.sequence_len"
    )


def _memory(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{_billions(size)} GB"


def _billions(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number < 1e15 else f"{number / 1e9:.1e}"
