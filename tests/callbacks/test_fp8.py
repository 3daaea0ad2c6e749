"""FP8 through the real command, by torchao's emulation: close to fp32, resumed bit for bit, off in evaluation."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmchat.__main__ import main
from lmchat.callbacks.fp8 import FP8
from lmchat.checkpoint.load import find_checkpoint, load_model_state, load_rank_state
from lmchat.demo.tasks import Arithmetic
from lmchat.evaluation.bits_per_byte import BitsPerByteEvaluator
from lmchat.generation.policy import Policy
from lmchat.model import fp8
from lmchat.types import UserError
from tiny_fit import same

if find_spec("torchao") is None:  # its import takes a second
    pytest.skip("torchao is not installed", allow_module_level=True)

CONFIG = """
trainer: {accelerator: cpu, devices: 1, max_steps: 4}
model:
  class_path: PretrainModule
  init_args: {depth: 2, aspect_ratio: 64, sequence_len: 32, head_dim: 64, global_batch_tokens: 256, compute_dtype: fp32,
    compile: false}
data:
  class_path: FineWebDataModule
  init_args: {micro_batch_size: 4, eval_tokens: 512, buffer_size: 20}
samples: {max_new_tokens: 2, prompts: [The]}
scaling_laws: {lr_scale: 0.3}
monitor: {every_n_steps: 1}
checkpoint: {every_n_steps: 2}
fp8: {enabled: true, emulate: true}
"""

RL = """
trainer: {accelerator: cpu, devices: 1, max_steps: 1}
model:
  class_path: GRPOModule
  init_args: {compute_dtype: fp32}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: train, size: 2}}}]
    eval_task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 1}}
    questions_per_step: 2
    num_samples: 3
    eval_num_samples: 1
    max_new_tokens: 5
samples: {max_new_tokens: 0}
fp8: {enabled: true, emulate: true}
"""


def fit(base: Path, tag: str, *options: str) -> float:
    """Runs `lmchat fit` and returns the last validation bits per byte."""
    config = base / "fp8.yaml"
    config.write_text(CONFIG)
    assert main(["fit", "--config", str(config), "--model.tag", tag, *options]) == 0
    return bits_per_byte(base, tag)


def bits_per_byte(base: Path, tag: str) -> float:
    newest = max(base.glob(f"logs/*/{tag}/**/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open() as file:
        return [float(row["val/bpb"]) for row in csv.DictReader(file) if row["val/bpb"]][-1]


def saved(base: Path, tag: str) -> list[Any]:
    checkpoint = find_checkpoint(base / "base_checkpoints" / tag)
    return [load_model_state(checkpoint), load_rank_state(checkpoint, 0)["optimizer_states"]]


class Products:
    """Counts the FP8 products of training and of evaluation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        float8 = fp8._import_torchao_float8()
        original = float8.float8_linear.Float8Linear.forward

        def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return original(layer, x)

        monkeypatch.setattr(float8.float8_linear.Float8Linear, "forward", forward)


def test_fp8_is_used_only_in_training(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    products = Products(monkeypatch)
    exact = fit(base, "fp32", "--fp8.enabled", "false")
    assert products.count == 0
    assert fit(base, "fp8") == pytest.approx(exact, rel=0.005)
    assert products.count == 4 * 2 * 12, "steps × micro-batches × layers: evaluations and samples have none"
    report = "FP8 tensorwise (emulated): 12 linear layers in FP8; not converted: ve_gate (a gate), lm_head"
    assert report in caplog.text + "".join(capsys.readouterr())
    assert not same(saved(base, "fp32")[0], saved(base, "fp8")[0])


def test_resuming_is_exact_and_a_checkpoint_does_not_depend_on_fp8(base: Path) -> None:
    fit(base, "fp8")
    start = str(base / "base_checkpoints" / "fp8" / "meta_000002.json")
    fit(base, "resumed", "--ckpt_path", start)
    assert same(saved(base, "resumed"), saved(base, "fp8"))
    fit(base, "fp32", "--ckpt_path", start, "--fp8.enabled", "false")
    middle = str(base / "base_checkpoints" / "fp32" / "meta_000004.json")
    fit(base, "back", "--ckpt_path", middle, "--trainer.max_steps", "5")


def test_fp8_is_on_again_after_an_exception_in_evaluation(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, where the module is trained again."""
    nets = []

    def fail(evaluator: BitsPerByteEvaluator, policy: Policy, batch: Any) -> None:
        nets.append(policy.net)
        raise ValueError("damaged")

    monkeypatch.setattr(BitsPerByteEvaluator, "update", fail)
    with pytest.raises(ValueError, match="damaged"):
        fit(base, "failed")
    products, ids = Products(monkeypatch), torch.zeros(1, 32, dtype=torch.int64)
    nets[0].loss(ids, ids)
    assert products.count == 12


def test_reinforcement_learning_trains_in_fp8_and_samples_without(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches, a prompt with its samples, have any number of tokens."""
    long_rows = ["--model.sequence_len", "256", "--model.global_batch_tokens", "1024", "--data.eval_tokens", "1024"]
    fit(base, "tiny", *long_rows, "--trainer.max_steps", "1", "--fp8.enabled", "false")
    monkeypatch.setattr(Arithmetic, "reward", lambda task, conversation, completion: float(len(completion)))
    products = Products(monkeypatch)
    config = base / "rl.yaml"
    config.write_text(RL)
    assert main(["fit", "--config", str(config), "--ckpt_path", str(base / "base_checkpoints" / "tiny")]) == 0
    assert products.count == 2 * 12, "questions × layers: neither samples nor evaluations have any"


@pytest.mark.slow
def test_fifty_steps_at_depth_4_end_within_half_a_percent_of_fp32(base: Path) -> None:
    options = ["--model.depth", "4", "--model.aspect_ratio", "32", "--trainer.max_steps", "50"]
    options += ["--model.sequence_len", "64", "--model.global_batch_tokens", "1024", "--data.eval_tokens", "4096"]
    exact = fit(base, "fp32", *options, "--fp8.enabled", "false")
    for recipe in ("tensorwise", "rowwise"):
        assert fit(base, recipe, *options, "--fp8.recipe", recipe) == pytest.approx(exact, rel=0.005)


@pytest.mark.slow
def test_two_processes_train_the_same_as_one(base: Path) -> None:
    """Scales are per micro-batch, so the number of processes changes only the order of summation."""
    import os
    import subprocess
    import sys

    one = fit(base, "one")
    arguments = ["fit", "--config", str(base / "fp8.yaml"), "--model.tag", "two"]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "zero2_muon"]
    environment = {**os.environ, "LMCHAT_BASE_DIR": str(base)}
    subprocess.run([sys.executable, "-m", "lmchat", *arguments], env=environment, check=True)
    assert bits_per_byte(base, "two") == pytest.approx(one, rel=1e-4)
    for name, weight in saved(base, "one")[0].items():
        torch.testing.assert_close(saved(base, "two")[0][name], weight, rtol=1e-2, atol=1e-3)


def module(**attributes: Any) -> Any:
    defaults = {"scales_with_depth": True, "compile_mode": "auto", "device": torch.device("cuda"), "packed_rows": True}
    return SimpleNamespace(**{**defaults, "config": SimpleNamespace(n_layer=20), **attributes})


def test_auto_enables_fp8_from_depth_20_on_supported_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmchat.callbacks.fp8.missing_hardware", lambda device, recipe: None)
    auto = FP8()
    assert auto._is_on(module())
    assert not auto._is_on(module(config=SimpleNamespace(n_layer=19)))
    assert not auto._is_on(module(scales_with_depth=False))
    assert not auto._is_on(module(compile_mode=False))
    assert not FP8(enabled=False)._is_on(module())
    assert FP8(enabled=True)._is_on(module(config=SimpleNamespace(n_layer=2), scales_with_depth=False))
    monkeypatch.setattr("lmchat.callbacks.fp8.missing_hardware", lambda device, recipe: "it is old")
    assert not auto._is_on(module())
    with pytest.raises(UserError, match=r"--fp8.enabled is true, but cuda cannot train in FP8: it is old; use --fp8"):
        FP8(enabled=True)._is_on(module())


def test_emulation_without_fp8_is_refused() -> None:
    with pytest.raises(UserError, match=r"--fp8.emulate is true, .* use --fp8.enabled true"):
        FP8(emulate=True)
    assert not FP8(enabled=False, emulate=True)._is_on(module())


def test_a_model_without_a_layer_to_convert_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = base / "fp8.yaml"
    config.write_text(CONFIG)
    assert main(["fit", "--config", str(config), "--model.aspect_ratio", "32"]) != 0
    error = capsys.readouterr().err
    assert "no layer can be converted" in error and "64 x 64 is narrower than 128" in error
