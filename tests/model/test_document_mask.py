"""With document starts, each document of a packed row gives the same output as alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lmchat.model.attention import attend_banded, attend_flex, attend_masked, document_ids
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT, ROTARY_BASE

LENGTH = 160
CONFIG = GPTConfig(LENGTH, vocab_size=70, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
BOUNDS = [[0, 1, 2, 60, 160], [0, 130, 131, 159, 160]]
"""Documents of two rows; some are longer than the short window of 80 tokens, and some have one token."""
STARTS = torch.tensor([0, 1, 2, 60, 160, 290, 291, 319, *[320] * 5], dtype=torch.int32)


def network(n_layer: int = CONFIG.n_layer) -> GPT:
    net = GPT(replace(CONFIG, n_layer=n_layer), compute_dtype=torch.float64).double()
    # The model's tables are rounded, so that its rotations are not exactly relative.
    frequencies = ROTARY_BASE ** -(torch.arange(0, net.config.head_dim, 2, dtype=torch.float64) / net.config.head_dim)
    angles = torch.outer(torch.arange(LENGTH, dtype=torch.float64), frequencies)[:, None]
    net.cos, net.sin = angles.cos(), angles.sin()
    net.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for weight in net.parameters():  # the projections are initialized to 0
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return net


def tokens(seed: int) -> Tensor:
    return torch.randint(70, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_document_ids_of_all_tokens() -> None:
    ids = document_ids(STARTS, 2, LENGTH)
    assert ids[0].unique_consecutive(return_counts=True)[1].tolist() == [1, 1, 58, 100]
    assert ids[1].unique_consecutive(return_counts=True)[1].tolist() == [130, 1, 28, 1]


@pytest.mark.parametrize("attend", [attend_banded, attend_masked])
@pytest.mark.parametrize("window", [0, 5, 80, 159, 160, 1000])
def test_attention_equals_that_of_separate_documents(attend, window: int) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, LENGTH, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    out = attend(q, k, v, window, STARTS)
    for row, bounds in enumerate(BOUNDS):
        for start, end in pairwise(bounds):
            alone = attend_masked(*(x[row : row + 1, start:end] for x in (q, k, v)), window)
            torch.testing.assert_close(out[row : row + 1, start:end], alone)


@pytest.fixture(scope="module", autouse=True)
def reset_compiler() -> Iterator[None]:
    """Once, since compiling takes seconds: with and without checkpoints, blocks share the code."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradients_equal_those_of_separate_documents(checkpoint_blocks: bool, compiled: bool) -> None:
    ids, targets = tokens(3), tokens(4)
    layers = 2 if compiled else 4  # one of each kind, since compiling takes seconds
    alone = network(layers)
    for row, bounds in enumerate(BOUNDS):
        for start, end in pairwise(bounds):
            part = slice(row, row + 1), slice(start, end)
            alone.loss(ids[part], targets[part], "sum").backward()
    packed = network(layers)
    packed.checkpoint_blocks = checkpoint_blocks
    if compiled:
        for block in packed.blocks:
            block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    packed.loss(ids, targets, "sum", document_starts=STARTS).backward()
    for (name, expected), actual in zip(alone.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=name)
    whole_rows = alone.loss(ids, targets)  # uncompiled, which without document starts would compile again
    assert not torch.allclose(whole_rows, packed.loss(ids, targets, document_starts=STARTS))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_sees_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and forward only, since FlexAttention on a CPU supports nothing else."""
    from torch.nn.attention.flex_attention import flex_attention as uncompiled

    from lmchat.model import attention_cuda

    monkeypatch.setattr(attention_cuda, "_compiled_flex", lambda: uncompiled)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, LENGTH, heads, 8, generator=generator) for heads in (4, 2, 2))
    one_each = torch.arange(0, 321, 8, dtype=torch.int32)
    for starts in (STARTS, one_each):
        for window in (5, LENGTH, 5):  # the last mask is reused
            actual, expected = (attend(q, k, v, window, starts) for attend in (attend_flex, attend_masked))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
