"""Packed products: their rows, and for how many shapes oneDNN keeps code."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from live_server import tiny_engine
from lmchat.generation.packed import PackedLinear, can_pack, padded_rows
from lmchat.generation.sampling import SamplingParams

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="packed products are not exact with this torch"
)


class PackedShapes(TorchDispatchMode):
    """Collects the numbers of rows of the products that oneDNN computes, by shape of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: defaultdict[torch.Size, set[int]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.rows[args[1].shape].add(args[0].numel() // args[0].size(-1))
        return func(*args, **(kwargs or {}))


def test_rows_do_not_depend_on_their_number() -> None:
    torch.manual_seed(0)
    linear, weight, x = PackedLinear(torch.float32), torch.randn(96, 64), torch.randn(300, 64)
    linear.pack(weight)
    expected = linear(x)
    torch.testing.assert_close(expected, x @ weight.T)
    for rows in (*range(1, 70), 127, 129, 299):
        assert torch.equal(linear(x[:rows]), expected[:rows])
    assert linear(x.view(3, 100, 64)).shape == (3, 100, 96)
    assert torch.equal(linear(x.view(20, 15, 64)[:, 1:4]), expected.view(20, 15, 96)[:, 1:4])


def test_padding_is_little() -> None:
    decoding, prefill = ([padded_rows(rows) / rows - 1 for rows in range(*ends)] for ends in ((1, 65), (65, 4097)))
    assert min(decoding) == min(prefill) == 0
    assert sum(decoding) / len(decoding) < 0.01 and sum(prefill) / len(prefill) < 0.05


def test_few_shapes_are_multiplied() -> None:
    """Memory stays flat: every shape costs 0.6 MB, and there are as many as there are lengths of prompts."""
    engine, rng = tiny_engine(max_rows=64, sequence_len=256), random.Random(0)

    def generate(prompt_lengths: list[int], new_tokens: list[int]) -> None:
        prompts = [[rng.randrange(256) for _ in range(length)] for length in prompt_lengths]
        engine.generate(prompts, [SamplingParams(max_new_tokens=number, seed=number) for number in new_tokens])

    with PackedShapes() as shapes:
        generate([2] * 64, [*range(1, 65)])  # decodes 63 rows, then 62, until 1
        for _ in range(60):
            generate([rng.randint(2, 240) for _ in range(3)], [1] * 3)
    counts: set[int] = set().union(*shapes.rows.values())
    # Up to 64 there are 48, and then 8 per power of two.
    assert max(counts) > 512 and len([rows for rows in counts if rows > 64]) <= 8 * (max(counts).bit_length() - 6)
    assert len([rows for rows in counts if rows <= 64]) <= 48
