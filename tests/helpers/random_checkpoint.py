"""Checkpoints of untrained models in which every weight affects the output."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from lmchat.checkpoint.layout import CheckpointPaths, checkpoint_dir
from lmchat.checkpoint.writer import write_checkpoint
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer

SHAPE = {"sequence_len": 32, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "window_pattern": "SL"}
NATIVE = {"window_pattern": "L", "value_embeddings": False, "residual_mix": False}


def random_state(config: GPTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random non-zero weights, scaled so that logits differ by several units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(config).state_dict().items()}
    return {
        name: (1.0 if len(shape) == 1 or "wte" in name else 0.15) * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def save_random_checkpoint(
    tokenizer: Tokenizer, *, stage: str = "sft", tag: str = "tiny", step: int = 7, **shape: Any
) -> CheckpointPaths:
    """A checkpoint below ``$LMCHAT_BASE_DIR``, without optimizer state."""
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **{**SHAPE, **shape})
    paths = CheckpointPaths(checkpoint_dir(stage, tag), step)
    paths.directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        paths,
        model=random_state(config),
        rank_state={},
        meta={
            "stage": stage,
            "tag": tag,
            "model": asdict(config),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "global_batch_tokens": 512,
            "micro_batch_size": 2,
            "total_steps": step,
            "learning_rates": {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02, "scalar_lr": 0.5},
        },
    )
    return paths
