"""Writes the tables of docs/performance.md: rooflines, and the largest depth by the memory of a card.

    python docs/make_performance_tables.py

`tests/test_performance_page.py` checks that the page is up to date. The memory model is `lmchat.training_memory`, whose
tests compare it with the tensors that autograd saves.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from lmchat.hardware import DENSE_BF16_PEAK
from lmchat.model.config import GPTConfig
from lmchat.scaling import config_for_depth, flops_per_token, parameter_counts
from lmchat.training_memory import training_memory

PAGE = Path(__file__).with_name("performance.md")
VOCAB_SIZE, SEQUENCE_LEN = 32768, 2048
CARDS_GB = (8, 12, 16, 24, 40, 80)
MAX_DEPTH = 80
SHIPPED_ROWS = {12: 32, 20: 16, 26: 8}

PEAK_FLOPS = DENSE_BF16_PEAK["H100"]
BYTES_PER_SECOND = 3.35e12
"""Of an H100's memory, by its data sheet."""
POINTWISE_WIDTHS = 66
"""bf16 activations of the model's width that the fused kernels of one block read and write per token, forward and
backward, the residual mix and the casts of weights included; counted by benchmarks/lowering.py: d12 with 32 rows 60
without value embeddings and 66 with, d26 with 8 rows 67 and 73."""
HEAD_PASSES = 2
"""Times that the fused kernel between the head's products reads or writes the bf16 logits; counted likewise."""

WAYS: dict[str, dict[str, Any]] = {
    "1 row": {"rows": 1},
    "8 rows": {"rows": 8},
    "8 rows, recomputing": {"rows": 8, "mode": "recomputing"},
    "8 rows, checkpoint_blocks": {"rows": 8, "checkpoint_blocks": True},
}


@cache
def config_of(depth: int) -> GPTConfig:
    return config_for_depth(depth, VOCAB_SIZE, SEQUENCE_LEN)


def largest_depth(memory_bytes: float, rows: int, **options: Any) -> int:
    """The largest even depth that can be trained with micro-batches of some rows of 2,048 tokens; 0 if none."""
    fitting = [
        depth
        for depth in range(2, MAX_DEPTH + 1, 2)
        if training_memory(config_of(depth), rows, **options).total <= memory_bytes
    ]
    return max(fitting, default=0)


def card_row(gigabytes: int) -> str:
    cells = []
    for options in WAYS.values():
        depth = largest_depth(gigabytes * 1e9, **options)
        cells.append(f"d{depth} ({parameter_counts(config_of(depth)).total / 1e9:.2f} B)" if depth else "–")
    return f"| {gigabytes} GB | {' | '.join(cells)} |"


def roofline_row(depth: int) -> str:
    """Milliseconds of a micro-batch at the peak of the matrix units, and at the peak of the memory."""
    config, rows = config_of(depth), SHIPPED_ROWS[depth]
    tokens = rows * SEQUENCE_LEN
    products = 1e3 * tokens * flops_per_token(config) / PEAK_FLOPS
    moved = 2 * tokens * (POINTWISE_WIDTHS * config.n_layer * config.n_embd + HEAD_PASSES * config.vocab_size)
    memory = 1e3 * moved / BYTES_PER_SECOND
    ceiling = products / (products + memory)
    held = training_memory(config, rows), training_memory(config, rows, optimizer_shards=8)
    return (
        f"| d{depth} | {rows} | {flops_per_token(config) / 1e9:.2f} | {products:.0f} | {memory:.0f} | {ceiling:.0%} "
        f"| {held[0].total / 1e9:.0f} | {held[1].total / 1e9:.0f} |"
    )


def tables() -> dict[str, str]:
    """The page's tables by name."""
    rooflines = [
        "| model | rows | GFLOPs/token | products, ms | memory, ms | MFU at most | GB, 1 GPU | GB, 8 × zero2_muon |",
        "|---|---|---|---|---|---|---|---|",
        *map(roofline_row, SHIPPED_ROWS),
    ]
    cards = [f"| card | {' | '.join(WAYS)} |", f"|{'---|' * (len(WAYS) + 1)}", *map(card_row, CARDS_GB)]
    return {"rooflines": "\n".join(rooflines), "cards": "\n".join(cards)}


def fill(page: str) -> str:
    """The page with new tables."""
    for name, table in tables().items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        page = re.sub(f"{start}.*?{end}", f"{start}\n{table}\n\n{end}", page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
