"""Choice of the micro-batch, refusal of models that cannot fit, and messages for out-of-memory errors."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lmchat.__main__ import main
from lmchat.checkpoint.load import find_checkpoint
from lmchat.model.gpt import GPT
from lmchat.scaling import config_for_depth, parameter_counts
from lmchat.stages import device_memory
from lmchat.training_memory import training_memory
from tiny_fit import config_options

OWN = """
trainer: {max_steps: 2}
model: {init_args: {compile: false, global_batch_tokens: 256}}
data: {init_args: {eval_tokens: 256}}
eval: {every_n_steps: 0}
monitor: {every_n_steps: 1}
"""
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = config_for_depth(2, 512, 32, aspect_ratio=32, head_dim=32, window_pattern="SL")


def fit(base: Path, *options: str) -> int:
    return main(["fit", *config_options(base, OWN), *options])


def losses(base: Path) -> list[float]:
    (metrics,) = base.rglob("metrics.csv")
    return [float(row["train/loss"]) for row in csv.DictReader(metrics.open()) if row["train/loss"]]


def bytes_of(rows: int) -> float:
    return training_memory(CONFIG, rows, mode="eager", element_bytes=4, on_gpu=False).total


def set_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(device_memory, "memory_limit_bytes", lambda device: size)


def test_auto_takes_the_largest_micro_batch_that_fits(
    new_base: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory suffices for 4 of the step's 8 rows; a resumed run keeps its micro-batch for any memory."""
    results = []
    for size in ("2", "auto"):
        base = new_base()
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        set_memory(monkeypatch, 1.001 * bytes_of(4) / device_memory.CPU_SHARE)
        assert fit(base, "--data.micro_batch_size", size) == 0
        results.append(losses(base))
    folder = base / "base_checkpoints" / "d2"
    assert find_checkpoint(folder).meta["micro_batch_size"] == 4
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert "auto: 4 rows" in caplog.text
    set_memory(monkeypatch, 1e12)
    assert fit(base, "--data.micro_batch_size", "auto", "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    assert find_checkpoint(folder).meta["micro_batch_size"] == 4


def test_auto_leaves_a_micro_batch_for_the_evaluation(
    new_base: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A micro-batch has at most the tokens of an evaluation, also if a resumed run evaluates fewer than before."""
    base = new_base()
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    auto = ["--data.micro_batch_size", "auto", "--data.eval_tokens"]
    assert fit(base, *auto, "128") == 0
    folder = base / "base_checkpoints" / "d2"
    assert find_checkpoint(folder).meta["micro_batch_size"] == 4  # of the step's 8 rows of 32 tokens
    assert "at most 4, by --data.eval_tokens" in caplog.text
    assert fit(base, *auto, "64", "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    assert find_checkpoint(folder).meta["micro_batch_size"] == 2


def test_a_gpu_tries_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest size that runs is chosen; candidates without recomputation are tried first."""
    net = GPT(CONFIG)
    largest, tried = 0, list[int]()

    def run(net: GPT, rows: int) -> None:
        tried.append(rows)
        if rows > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_memory, "run_micro_batches", run)
    module = StandIn(net)
    for limit, largest in ((80e9, 16), (80e9, 3), (24e9, 99)):
        set_memory(monkeypatch, limit)
        tried.clear()
        chosen = device_memory.choose_micro_batch(module, 64 * 2048, sys.maxsize)
        assert chosen == tried[-1] <= largest < min(tried[:-1], default=sys.maxsize)
        recomputing = [device_memory.needs_recomputing(module, rows) for rows in tried]
        assert not recomputing[0] and recomputing == sorted(recomputing)
    largest = 0
    with pytest.raises(device_memory.UserError, match=r"not one row .* --model.checkpoint_blocks true"):
        device_memory.choose_micro_batch(module, 64 * 2048, sys.maxsize)


def test_ddp_takes_buffers_for_all_gradients() -> None:
    module: Any = StandIn(GPT(CONFIG))
    alone = device_memory.estimate(module, 8).states
    module.world_size = 2
    assert device_memory.estimate(module, 8).states - alone == 4 * parameter_counts(module.config).total
    module.shards_optimizer = True
    assert device_memory.estimate(module, 8).states < alone


class StandIn:
    """A mock module of depth 12 on one GPU, with a small network."""

    config = config_for_depth(12, 32768, 2048)
    sequence_len = 2048
    packed_rows = scales_with_depth = True
    checkpoint_blocks = False
    compile_mode = False
    resumed_micro_batch_size = None

    def __init__(self, net: GPT) -> None:
        self.net = net
        self.trainer = self
        self.strategy = self
        self.world_size, self.global_rank, self.num_devices = 1, 0, 1
        self.root_device = torch.device("cuda")

    def network_dtype(self, device: torch.device) -> torch.dtype:
        return torch.bfloat16

    def configure_model(self) -> None:
        pass

    def compiles_blocks(self) -> bool:
        return False

    def broadcast(self, value: object) -> object:
        return value


@pytest.mark.parametrize(
    "options",
    [
        ("--model.depth", "1000000000"),
        ("--model.depth", "100000"),
        ("--model.depth", "9000"),
        ("--model.depth", "200"),
        ("--model.aspect_ratio", "1000000000"),
        ("--model.sequence_len", "1000000000"),
        ("--trainer.max_steps", str(2**70)),
        ("--trainer.max_steps", str(2**62)),
    ],
)
def test_a_run_that_cannot_fit_is_refused_at_once(
    options: tuple[str, str], base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before text is tokenized or a network built, which would take minutes: CPU seconds are bounded generously."""
    start_seconds = time.process_time()
    assert fit(base, "--model.global_batch_tokens", "null", *options) == 2
    assert time.process_time() - start_seconds < 20
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lmchat: ")
    assert options[0] in message or options[1] in message or "billion parameters" in message
    assert not list(base.glob("base_data/*.bin")) and not (base / "base_checkpoints").exists()


class RunsOut(Callback):
    """A module that runs out of memory in the first forward pass."""

    def on_train_batch_start(self, *_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(("share", "expected"), [(1.001, 4), (0.9, None)])
def test_out_of_memory_names_the_largest_size_that_fits(
    share: float, expected: int | None, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With enough memory for 4 rows, or for less than 1 row, which the check before training does not detect."""
    monkeypatch.setattr("lmchat.cli.fit.check_model_fits", lambda *args, **kwargs: None)
    set_memory(monkeypatch, share * (bytes_of(4) if expected else bytes_of(1)))
    option = f"{__name__}.RunsOut"
    assert fit(base, "--data.micro_batch_size", "8", "--trainer.callbacks+", option) == 2
    (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lmchat: ")]
    assert "out of memory on cpu (0.0 GB) in step 1: " in message
    if expected:
        assert f"use --data.micro_batch_size {expected}," in message
    else:
        assert "--model.checkpoint_blocks true" in message


def test_checkpointed_blocks_train_the_same(new_base: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for checkpointed in ("false", "true"):
        base = new_base()
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        assert fit(base, "--model.checkpoint_blocks", checkpointed) == 0
        results.append(losses(base))
    assert results[0] == results[1] and len(results[0]) == 2


@pytest.mark.parametrize(("name", "depth"), [("d12_pretrain", 12), ("d20_pretrain", 20), ("d26_pretrain", 26)])
def test_a_shipped_config_fits_the_cards_it_names(name: str, depth: int) -> None:
    """On one card of 80 GB, and on 8 with sharded optimizer state, without recomputation."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config = config_for_depth(depth, 32768, 2048)
    for shards in (1, 8):
        memory = training_memory(config, options["data"]["init_args"]["micro_batch_size"], optimizer_shards=shards)
        assert memory.total < 80e9


@pytest.mark.parametrize("error", [MemoryError(), ImportError("libx.so: failed to map segment from shared object")])
def test_out_of_memory_outside_training_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lmchat.__main__._run_command", fail)
    assert main(["chat"]) == 2
    assert capfd.readouterr().err.startswith("lmchat: out of memory (")


def test_activations_are_recomputed_if_nothing_else_fits(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr("lmchat.stages.base.needs_recomputing", lambda module, rows: rows == 2)
    monkeypatch.setattr("lmchat.stages.base.compile_blocks", lambda net, recompute: compiled.append(recompute))
    for rows in ("2", "4"):
        assert fit(base, "--model.compile", "true", "--data.micro_batch_size", rows, "--model.tag", rows) == 0
    assert compiled == [True, False]
