"""Shapes of models, and errors for impossible ones."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from lmchat.model.config import GPTConfig
from lmchat.types import UserError

SMALL = {"sequence_len": 64, "vocab_size": 100, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


@pytest.mark.parametrize(
    ("pattern", "layers", "windows"),
    [
        ("SSSL", 4, (32, 32, 32, 64)),
        ("SSSL", 6, (32, 32, 32, 64, 32, 64)),
        ("SL", 5, (32, 64, 32, 64, 64)),
        ("S", 3, (32, 32, 64)),
        ("L", 2, (64, 64)),
        ("SSSL", 1, (64,)),
    ],
)
def test_windows_tile_and_the_last_layer_sees_all(pattern: str, layers: int, windows: tuple[int, ...]) -> None:
    assert GPTConfig(**SMALL | {"window_pattern": pattern, "n_layer": layers}).window_sizes == windows


@pytest.mark.parametrize(("layers", "expected"), [(1, (0,)), (4, (1, 3)), (5, (0, 2, 4))])
def test_every_other_layer_from_the_last_has_value_embeddings(layers: int, expected: tuple[int, ...]) -> None:
    assert tuple(GPTConfig(**SMALL | {"n_layer": layers}).value_embedding_layers) == expected


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 64), (64, 64), (65, 128), (50257, 50304), (32768, 32768)])
def test_tables_are_padded_to_64(vocab_size: int, padded: int) -> None:
    assert GPTConfig(**SMALL | {"vocab_size": vocab_size}).padded_vocab_size == padded


@pytest.mark.parametrize("options", [{}, {"window_pattern": "L", "value_embeddings": False, "residual_mix": False}])
def test_a_config_survives_json(options: dict) -> None:
    config = GPTConfig(**SMALL | options)
    assert GPTConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("options", "obstacles"),
    [
        ({"window_pattern": "L", "value_embeddings": False, "residual_mix": False}, []),
        ({"window_pattern": "S", "value_embeddings": False, "residual_mix": False, "n_layer": 1}, []),
        ({"window_pattern": "SL", "value_embeddings": False, "residual_mix": False}, ["window_pattern L"]),
        ({"window_pattern": "L", "residual_mix": False}, ["value_embeddings false"]),
        ({}, ["value_embeddings false", "residual_mix false", "window_pattern L"]),
    ],
)
def test_features_that_transformers_lacks_are_reported(options: dict, obstacles: list[str]) -> None:
    config = GPTConfig(**SMALL | options)
    assert [text.split("--model.")[1].rstrip(")") for text in config.native_obstacles] == obstacles


def test_without_value_embeddings_a_model_may_be_narrow() -> None:
    assert tuple(GPTConfig(**SMALL | {"n_embd": 16, "value_embeddings": False}).value_embedding_layers) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"n_embd": 66}, "n_embd 66 over n_head 4"),
        ({"n_embd": 68, "n_head": 4}, "gives no even head size"),
        ({"n_embd": 16}, "n_embd is 16"),
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"window_pattern": ""}, "window_pattern is ''"),
        ({"window_pattern": "SSXL"}, "window_pattern is 'SSXL'"),
    ],
)
def test_invalid_shapes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(**SMALL | changes)
