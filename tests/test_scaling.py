"""Plans compared with the reference implementation, and properties of the scaling laws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lmchat.model.gpt import GPT
from lmchat.scaling import (
    config_for_depth,
    flops_per_token,
    make_plan,
    optimal_batch_tokens,
    parameter_counts,
)
from lmchat.types import UserError

CASES = json.loads((Path(__file__).parent / "fixtures" / "scaling_laws.json").read_text())
D12 = {"vocab_size": 32768, "sequence_len": 2048}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"d{case['depth']}-{case['ratio']}")
def test_plans_match_the_reference(case: dict) -> None:
    plan = make_plan(case["depth"], ratio=case["ratio"], **case["options"])
    config, counts, flops = plan.config, parameter_counts(plan.config), flops_per_token(plan.config)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.head_dim) == (
        case["model_dim"],
        case["n_head"],
        case["n_kv_head"],
        case["head_dim"],
    )
    assert list(config.window_sizes) == case["window_sizes"]
    assert list(config.value_embedding_layers) == case["ve_layers"]
    assert {name: getattr(counts, name) for name in case["param_counts"]} == case["param_counts"]
    assert counts.scaling == case["scaling_params"]
    assert int(case["ratio"] * counts.scaling) == case["target_tokens"]
    assert plan.global_batch_tokens == case["total_batch_size"]
    assert plan.lr_scale == pytest.approx(case["batch_lr_scale"], rel=1e-12)
    assert plan.weight_decay == pytest.approx(case["weight_decay_scaled"], rel=1e-12)
    assert plan.steps == case["num_iterations"]
    assert plan.steps * plan.global_batch_tokens == case["total_training_tokens"]
    assert flops == case["flops_per_token"]
    assert case["total_training_tokens"] * flops == pytest.approx(case["total_training_flops"], rel=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7, 11, 13])
def test_widths_round_up_to_whole_heads(depth: int) -> None:
    config = config_for_depth(depth, 32768, 2048)
    assert config.n_embd % 128 == 0
    assert 0 <= config.n_embd - 64 * depth < 128


NATIVE = {"window_pattern": "L", "value_embeddings": False, "residual_mix": False}


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        (3, {"n_kv_head": 1, "window_pattern": "SSSL"}),
        (4, {"n_kv_head": 2, "window_pattern": "SL"}),
        (5, {"window_pattern": "L"}),
        (4, {"value_embeddings": False}),
        (5, {"residual_mix": False}),
        (6, NATIVE),
    ],
)
def test_parameter_counts_equal_those_of_a_built_model(depth: int, options: dict) -> None:
    config = config_for_depth(depth, 1000, 64, head_dim=32, **options)
    with torch.device("meta"):
        model = GPT(config)
    counts = parameter_counts(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.transformer_matrices == sum(p.numel() for p in model.transformer.h.parameters())
    assert counts.wte == counts.lm_head == 1024 * config.n_embd
    # 6 operations per matrix weight, 12 · width per visible key: the formula of the scaling-law literature.
    visible = sum(min(window, 64) for window in config.window_sizes)
    assert flops_per_token(config) == 6 * (counts.transformer_matrices + counts.lm_head) + 12 * config.n_embd * visible


def test_the_native_variant_is_scaled_from_its_own_depth_12() -> None:
    full, native = make_plan(12, **D12), make_plan(12, **D12, **NATIVE)
    gates = 6 * 6 * 32  # in six layers one gate of 32 channels for each of six heads
    counts = parameter_counts(native.config)
    assert counts.scaling == parameter_counts(full.config).scaling - gates
    assert (counts.value_embeds, counts.scalars) == (0, 0)
    assert native.lr_scale == 1.0
    assert native.weight_decay == pytest.approx(0.2, rel=1e-6)  # depth 12 is its own reference


def test_max_steps_override_flops_which_override_the_ratio() -> None:
    by_ratio = make_plan(12, **D12)
    by_flops = make_plan(12, **D12, target_flops=1e18)
    by_steps = make_plan(12, **D12, target_flops=1e18, max_steps=77)
    counts, flops = parameter_counts(by_ratio.config), flops_per_token(by_ratio.config)
    assert by_ratio.steps == int(10.5 * counts.scaling) // by_ratio.global_batch_tokens
    assert by_flops.steps * by_flops.global_batch_tokens * flops == pytest.approx(1e18, rel=0.01)
    assert by_steps.steps == 77
    assert by_ratio.global_batch_tokens == by_flops.global_batch_tokens == by_steps.global_batch_tokens


def test_an_explicit_batch_scales_rates_and_decay() -> None:
    plan = make_plan(12, **D12, global_batch_tokens=4096)
    assert plan.lr_scale == pytest.approx(math.sqrt(4096 / 2**19))
    assert plan.weight_decay == pytest.approx(0.2 * plan.lr_scale, rel=1e-6)  # depth 12 is its own reference


def test_depth_12_is_the_reference() -> None:
    plan = make_plan(12, **D12)
    assert plan.global_batch_tokens == 2**19
    assert plan.lr_scale == 1.0


@pytest.mark.parametrize("factor", [0.01, 0.3, 1.0, 7.0, 400.0])
def test_batches_are_the_nearest_powers_of_two(factor: float) -> None:
    batch = optimal_batch_tokens(int(1e9 * factor), 1e9)
    exact = 2**19 * factor**0.383
    assert batch.bit_count() == 1
    assert 1 / math.sqrt(2) - 1e-9 <= batch / exact <= math.sqrt(2) + 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"aspect_ratio": -1}, "aspect_ratio is -1"),
        ({"ratio": 0}, "ratio is 0"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": float("inf")}, "ratio is inf"),
        ({"target_flops": float("inf")}, "target_flops is inf"),
        ({"global_batch_tokens": 0}, "global_batch_tokens is 0"),
        ({"max_steps": 0}, "max_steps 0 is less than one step"),
        ({"target_flops": 1.0}, "target_flops 1 is less than one step"),
        ({"global_batch_tokens": 10**12}, "is less than one step of 1,000,000,000,000 tokens"),
        ({"n_kv_head": 4}, "n_kv_head 4 does not divide n_head 6"),
        ({"window_pattern": "SX"}, "window_pattern is 'SX'"),
    ],
)
def test_mistakes_are_reported(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(**({"depth": 12} | D12 | changes))
