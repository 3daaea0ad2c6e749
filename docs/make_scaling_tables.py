"""Writes the tables of docs/scaling.md: memory per GPU and communication per step from closed forms.

    python docs/make_scaling_tables.py

`tests/test_scaling_page.py` compares the closed forms with the optimizer's buckets, the allocated state and the tensors
saved for a backward pass, and checks that the page is up to date.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lmchat.hardware import DENSE_BF16_PEAK
from lmchat.model.config import GATE_CHANNELS, GPTConfig
from lmchat.optim.buckets import assign_owners
from lmchat.scaling import flops_per_token, make_plan, parameter_counts

PAGE = Path(__file__).with_name("scaling.md")
DEPTHS = (12, 16, 20, 24, 26, 32)
GPUS = (1, 8, 16, 64, 256, 1024)
VOCAB_SIZE, SEQUENCE_LEN = 32768, 2048

FP32, BF16 = 4, 2
GPU_BYTES = 80e9
USABLE = 0.9
"""Of a GPU's memory: the rest is for the allocator, NCCL and the kernels' work space."""
FLOPS = 0.4 * DENSE_BF16_PEAK["H100"]
"""Assumed: two fifths of an H100's dense bf16 peak."""
BYTES_PER_SECOND = {"within a node": 450e9, "between nodes": 50e9}
"""Assumed per GPU and direction: NVLink 4 within a node of 8, a 400 Gb/s adapter per GPU between nodes."""
GPUS_PER_NODE = 8

ACTIVATION_BYTES = 51
"""Kept for the backward pass per token, layer and channel, uncompiled; measured on a CPU in bf16, rounded up."""


def matrices(config: GPTConfig) -> Counter[tuple[int, int]]:
    """Number of Muon matrices of each shape (rows, cols)."""
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    shapes: Counter[tuple[int, int]] = Counter()
    per_layer = [(width, width)] * 2 + [(kv_width, width)] * 2 + [(4 * width, width), (width, 4 * width)]
    for shape in per_layer:
        shapes[shape] += config.n_layer
    shapes[config.n_kv_head, GATE_CHANNELS] += len(config.value_embedding_layers)
    return shapes


def tables(config: GPTConfig) -> Counter[tuple[int, int]]:
    """Number of token tables of each shape (rows, cols), and of vectors of scalars, with one column."""
    shapes = Counter({(config.padded_vocab_size, config.n_embd): 2})
    shapes[config.padded_vocab_size, config.n_kv_head * config.head_dim] += len(config.value_embedding_layers)
    shapes[config.n_layer, 1] += parameter_counts(config).scalars // config.n_layer
    return shapes


def padded_elements(config: GPTConfig, ranks: int) -> int:
    """Elements of all messages, with matrices of a shape and rows of a tensor padded to a multiple of the ranks."""
    rounds = sum(-(-count // ranks) * ranks * rows * cols for (rows, cols), count in matrices(config).items())
    return rounds + sum(count * -(-rows // ranks) * ranks * cols for (rows, cols), count in tables(config).items())


def bytes_sent(config: GPTConfig, ranks: int) -> tuple[float, float]:
    """Bytes sent by a rank in a step: reduce-scattered fp32 gradients, gathered parameters, bf16 except for scalars."""
    share = (ranks - 1) / ranks
    elements = padded_elements(config, ranks)
    scalars = sum(count * -(-rows // ranks) * ranks for (rows, cols), count in tables(config).items() if cols == 1)
    return share * elements * FP32, share * (elements * BF16 + scalars * (FP32 - BF16))


def state_bytes(config: GPTConfig, ranks: int) -> list[float]:
    """Optimizer state by rank: Muon's momentum and its second moment by the longer side, AdamW's two moments."""
    loads, state = [0.0] * ranks, [0.0] * ranks
    for (rows, cols), count in sorted(matrices(config).items(), key=lambda item: -math.prod(item[0])):
        per_matrix = FP32 * (rows * cols + max(rows, cols))
        for owner in assign_owners(count, loads, FP32 * rows * cols):
            state[owner] += per_matrix
    for (rows, cols), count in tables(config).items():
        per_rank = -(-rows // ranks)
        for rank in range(ranks):
            own = max(0, min(per_rank, rows - rank * per_rank))
            state[rank] += count * 2 * FP32 * own * cols
    return state


def activation_bytes(config: GPTConfig, rows: int) -> float:
    """Activations that a micro-batch saves for its backward pass, and the bf16 copies of the matrices."""
    tokens = rows * config.sequence_len
    copies = BF16 * parameter_counts(config).transformer_matrices
    return ACTIVATION_BYTES * tokens * config.n_layer * config.n_embd + copies


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank with the most, and the rows of its micro-batch (0 if no row fits)."""

    weights: float
    gradients: float
    state: float
    activations: float
    micro_batch_rows: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.state + self.activations


def memory(config: GPTConfig, ranks: int, batch_tokens: int) -> Memory:
    """With the largest micro-batch, a power of two of rows, that fits a GPU and that the global batch can be made of.

    Gradients are whole on every rank until the last backward pass of a step reduces them; then each keeps its part.
    """
    weights = FP32 * parameter_counts(config).total
    gradients = weights + (FP32 * padded_elements(config, ranks) / ranks if ranks > 1 else 0)
    state = max(state_bytes(config, ranks))
    rows = batch_tokens // (config.sequence_len * ranks)
    while rows and weights + gradients + state + activation_bytes(config, rows) > USABLE * GPU_BYTES:
        rows //= 2
    return Memory(weights, gradients, state, activation_bytes(config, max(rows, 1)), rows)


def cell(depth: int, gpus: int) -> tuple[str, str]:
    """A cell of the memory table and of the communication table."""
    plan = make_plan(depth, vocab_size=VOCAB_SIZE, sequence_len=SEQUENCE_LEN)
    config, batch = plan.config, plan.global_batch_tokens
    if batch % (SEQUENCE_LEN * gpus):
        return "–", "–"
    need = memory(config, gpus, batch)
    fixed = (need.total - need.activations) / 1e9
    held = (
        f"{fixed:.1f} + {need.activations / 1e9:.1f} ({need.micro_batch_rows})" if need.micro_batch_rows else "too much"
    )
    sent = sum(bytes_sent(config, gpus))
    compute = flops_per_token(config) * batch / gpus / FLOPS
    link = "within a node" if gpus <= GPUS_PER_NODE else "between nodes"
    talk = sent / BYTES_PER_SECOND[link]
    spent = f"{sent / 1e9:.2f} GB, {1e3 * talk:,.0f} of {1e3 * compute:,.0f} ms" if gpus > 1 else "0"
    return held, spent


def make_tables() -> str:
    """Both tables as Markdown."""
    rows = {depth: [cell(depth, gpus) for gpus in GPUS] for depth in DEPTHS}
    head = ["model", "parameters", "batch tokens", *(f"{gpus:,} GPU{'s' * (gpus > 1)}" for gpus in GPUS)]
    titles = (
        "GB per GPU: weights, gradients and optimizer state + activations (rows of the micro-batch)",
        "Bytes one GPU sends per step, and the time that takes beside the time the step computes",
    )
    parts = []
    for number, title in enumerate(titles):
        lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for depth in DEPTHS:
            plan = make_plan(depth, vocab_size=VOCAB_SIZE, sequence_len=SEQUENCE_LEN)
            facts = [
                f"d{depth}",
                f"{parameter_counts(plan.config).total / 1e9:.2f} B",
                f"2^{int(math.log2(plan.global_batch_tokens))}",
            ]
            lines.append("| " + " | ".join([*facts, *(pair[number] for pair in rows[depth])]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def with_tables(page: str) -> str:
    """The page with new tables between its markers."""
    block = f"<!-- tables -->\n\n{make_tables()}\n\n<!-- end of tables -->"
    return re.sub(r"<!-- tables -->.*<!-- end of tables -->", lambda _: block, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
