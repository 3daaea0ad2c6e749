"""The stage's part of a checkpoint's ``meta``, for checkpoints whose weights are not those of a GPT."""

from __future__ import annotations

from typing import Any

MODEL = {
    "sequence_len": 8,
    "vocab_size": 16,
    "n_layer": 4,
    "n_head": 1,
    "n_kv_head": 1,
    "n_embd": 2,
    "window_pattern": "L",
    "value_embeddings": False,
    "residual_mix": True,
}
META: dict[str, Any] = {
    "stage": "pretrain",
    "tag": "tiny",
    "model": MODEL,
    "compute_dtype": "fp32",
    "tokenizer_fingerprint": "0" * 64,
    "global_batch_tokens": 64,
    "total_steps": 4,
    "learning_rates": {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02, "scalar_lr": 0.5},
}
