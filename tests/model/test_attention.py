"""Attention backends compared with recorded outputs and brute force; the probe on broken kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmchat.model.attention import (
    BACKENDS,
    attend_banded,
    attend_flash,
    attend_flex,
    attend_masked,
    choose_backend,
    exclude_cudnn,
    probe,
)
from lmchat.types import UserError

CPU = torch.device("cpu")
SETTING: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "head_dim": 16, "grouped": False}


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


def brute_force(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention for one query and one head at a time."""
    out = torch.zeros_like(q)
    group = q.size(2) // k.size(2)
    for batch in range(q.size(0)):
        for t in range(q.size(1)):
            seen = slice(max(0, t - window), t + 1)
            for head in range(q.size(2)):
                scores = k[batch, seen, head // group] @ q[batch, t, head] / math.sqrt(q.size(3))
                out[batch, t, head] = torch.softmax(scores, 0) @ v[batch, seen, head // group]
    return out


def random_qkv(length: int, heads: int, kv_heads: int, head_dim: int, seed: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, n, head_dim, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("name", ["banded", "masked"])
@pytest.mark.parametrize("window", [-1, 0, 1, 4, 8, 15, 16])
def test_recorded_outputs(fixtures: Path, name: str, window: int) -> None:
    with np.load(fixtures / "attention_window.npz") as arrays:
        q, k, v, expected = (torch.from_numpy(arrays[key]) for key in ("q", "k", "v", f"out_window_{window}"))
    actual = BACKENDS[name](q, k, v, window if window >= 0 else q.size(1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 24), window=st.integers(0, 30), kv_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99)
)
def test_every_window_and_length_against_brute_force(length: int, window: int, kv_heads: int, seed: int) -> None:
    qkv = random_qkv(length, 4, kv_heads, 6, seed)
    expected = brute_force(*qkv, window)
    for backend in (attend_banded, attend_masked):
        torch.testing.assert_close(backend(*qkv, window), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("length", "window"), [(300, 10), (300, 130), (257, 128), (256, 255), (200, 64)])
def test_bands_of_many_blocks(length: int, window: int) -> None:
    """Several blocks, whose gradients add up in shared keys."""
    qkv = random_qkv(length, 2, 1, 8, 5, batch=1)
    upstream = torch.randn(1, length, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = [backend(*qkv, window) for backend in (attend_banded, attend_masked)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(out, qkv, upstream) for out in outputs]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("torch_version", ["2.11", "2.13"])
@pytest.mark.parametrize("grouped", [False, True])
def test_flash_packs_rows_as_the_kernel_defines_them(
    monkeypatch: pytest.MonkeyPatch, grouped: bool, torch_version: str
) -> None:
    """The kernel needs a GPU; a mock that follows its documentation replaces it.

    In torch 2.11 it has no `enable_gqa`: the same kernel takes grouped queries as they are.
    """

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
    ):  # type: ignore[no-untyped-def]
        left, right = window_size
        assert right == 0 and cu_seq_q.dtype == torch.int32 and cu_seq_q.equal(cu_seq_k)
        starts = cu_seq_q.tolist()
        assert max_q == max_k >= max(b - a for a, b in pairwise(starts))
        assert starts[-1] == len(q) == len(k) == len(v) and k.size(1) == v.size(1) == (2 if grouped else 4)
        sequences = [part for part in pairwise(starts) if part[0] < part[1]]
        return torch.cat([brute_force(q[None, a:b], k[None, a:b], v[None, a:b], left)[0] for a, b in sequences])

    import torch.nn.attention.varlen

    def with_grouped_queries(*args, enable_gqa: bool = False, **options):  # type: ignore[no-untyped-def]
        assert enable_gqa == grouped
        return kernel(*args, **options)

    stand_in = kernel if torch_version == "2.11" else with_grouped_queries
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", stand_in)
    qkv = random_qkv(12, 4, 2 if grouped else 4, 8, 3, batch=3)
    for window in (0, 5, 11, 12):
        torch.testing.assert_close(attend_flash(*qkv, window), brute_force(*qkv, window), rtol=1e-9, atol=1e-12)
        documents = torch.tensor([0, 5, 12, 24, 25, 36, 36], dtype=torch.int32)
        expected = attend_masked(*qkv, window, documents)
        torch.testing.assert_close(attend_flash(*qkv, window, documents), expected, rtol=1e-9, atol=1e-12)


def test_cudnn_is_excluded_and_allowed_again() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    with exclude_cudnn():
        assert not enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert enabled()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_sees_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and forward only, since FlexAttention on a CPU supports nothing else."""
    from torch.nn.attention.flex_attention import flex_attention as uncompiled

    from lmchat.model import attention_cuda

    monkeypatch.setattr(attention_cuda, "_compiled_flex", lambda: uncompiled)
    q, k, v = (x.detach().float() for x in random_qkv(130, 4, 2, 8, 3))
    for window in (5, 130):
        torch.testing.assert_close(attend_flex(q, k, v, window), attend_masked(q, k, v, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_probe_accepts_correct_backends(dtype: torch.dtype, grouped: bool) -> None:
    assert probe("banded", CPU, dtype, 64, grouped) is None


BROKEN = {
    "one key too many": lambda q, k, v, window: attend_masked(q, k, v, window + 1),
    "one key too few": lambda q, k, v, window: attend_masked(q, k, v, window - 1),
    "no window": lambda q, k, v, window: attend_masked(q, k, v, q.size(1)),
    "no scale": lambda q, k, v, window: attend_masked(q * 8, k, v, window),
    "heads mixed up": lambda q, k, v, window: attend_masked(q, k.flip(2), v, window),
    "not finite": lambda q, k, v, window: attend_masked(q, k, v, window) * math.nan,
    "no gradient for values": lambda q, k, v, window: attend_masked(q, k, v.detach() + 0 * v, window),
    "no kernel image": lambda q, k, v, window: 1 / 0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", BROKEN)
def test_the_probe_finds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fault: str) -> None:
    monkeypatch.setitem(BACKENDS, "broken", BROKEN[fault])
    assert probe("broken", CPU, dtype, 64, grouped=False) is not None


@pytest.mark.usefixtures("fresh_choice")
def test_auto_skips_failing_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto", **SETTING) == "banded"
    choose_backend.cache_clear()
    monkeypatch.setitem(BACKENDS, "banded", BROKEN["one key too few"])
    assert choose_backend("auto", **SETTING) == "masked"


@pytest.mark.usefixtures("fresh_choice")
def test_a_named_backend_is_probed_too() -> None:
    assert choose_backend("masked", **SETTING) == "masked"
    with pytest.raises(UserError, match=r"attention 'flash' does not work on cpu in torch\.float32 \(.+\); use auto"):
        choose_backend("flash", **SETTING)
    with pytest.raises(
        UserError, match="attention is 'best'; choose auto or one of flash, cudnn, flex, banded, masked"
    ):
        choose_backend("best", **SETTING)


@pytest.mark.usefixtures("fresh_choice")
def test_choosing_draws_no_global_random_numbers() -> None:
    state = torch.get_rng_state()
    choose_backend("auto", **SETTING)
    assert torch.get_rng_state().equal(state)
