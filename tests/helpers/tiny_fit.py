"""A tiny pretraining run: its config, to be overridden, and a comparison of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

CONFIG = """
trainer: {accelerator: cpu, devices: 1}
model:
  class_path: PretrainModule
  init_args: {depth: 2, sequence_len: 32, aspect_ratio: 32, head_dim: 32, window_pattern: SL, global_batch_tokens: 128}
data:
  class_path: FineWebDataModule
  init_args: {micro_batch_size: 2, eval_tokens: 128, buffer_size: 20}
samples: {max_new_tokens: 0}
"""


def config_options(base: Path, own: str) -> list[str]:
    """Options of `lmchat fit` for the tiny config and an overriding YAML, both written to ``base``."""
    paths = {base / "tiny.yaml": CONFIG, base / "own.yaml": own}
    for path, text in paths.items():
        path.write_text(text)
    return [option for path in paths for option in ("--config", str(path))]


def same(a: object, b: object) -> bool:
    """Whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b
