"""Every option of Lightning's Trainer either works or is refused with a message that names the alternative."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lmchat.__main__ import main
from lmchat.checkpoint.layout import committed_steps
from lmchat.cli.fit import default_strategy
from tiny_fit import config_options

OWN = "{trainer: {max_steps: 4}, model: {init_args: {tag: tiny}}, eval: {every_n_steps: 2}}"

WORKS = {
    "accelerator": "cpu",
    "strategy": "zero2_muon",
    "devices": "1",
    "num_nodes": "1",
    "logger": "false",
    "callbacks": "[{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]",
    "max_steps": "3",
    "max_time": "00:01:00:00",
    "limit_train_batches": "4",
    "limit_val_batches": "1",
    "limit_test_batches": "1",
    "limit_predict_batches": "1",
    "enable_progress_bar": "true",
    "enable_model_summary": "true",
    "gradient_clip_val": "0.5",
    "gradient_clip_algorithm": "value",
    "deterministic": "true",
    "benchmark": "true",
    "inference_mode": "false",
    "profiler": "simple",
    "detect_anomaly": "true",
    "plugins": "[]",
    "enable_autolog_hparams": "false",
    "default_root_dir": "somewhere",
    "min_steps": "2",
    "min_epochs": "1",
    "use_distributed_sampler": "true",
    "sync_batchnorm": "true",
    "reload_dataloaders_every_n_epochs": "1",
    "model_registry": "name",
    "fast_dev_run": "true",
    "overfit_batches": "2",
}
REFUSED = {
    "precision": ("64-true", "--model.compute_dtype"),
    "max_epochs": ("2", "--trainer.max_steps"),
    "val_check_interval": ("10", "--eval.every_n_steps"),
    "check_val_every_n_epoch": ("2", "--eval.every_n_steps"),
    "log_every_n_steps": ("10", "--monitor.every_n_steps"),
    "num_sanity_val_steps": ("1", "--eval.at_start"),
    "enable_checkpointing": ("false", "--checkpoint.every_n_steps"),
    "barebones": ("true", "--trainer.logger false"),
    "accumulate_grad_batches": ("2", "--model.global_batch_tokens"),
}


def fit(base: Path, tiny_base: Path, option: str, value: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    shutil.copytree(tiny_base, base)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(base)
    return main(["fit", *config_options(base, OWN), f"--trainer.{option}", value, *more])


def test_every_option_is_in_one_table() -> None:
    options = inspect.signature(L.Trainer.__init__).parameters.keys() - {"self"}
    assert options == WORKS.keys() | REFUSED.keys()
    assert not WORKS.keys() & REFUSED.keys()


def test_options_work_together(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"fast_dev_run", "overfit_batches", "strategy", "logger"}  # exclude others or change what is trained
    options = [part for name in sorted(WORKS.keys() - others) for part in (f"--trainer.{name}", WORKS[name])]
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(base)
    assert main(["fit", *config_options(base, OWN), *options]) == 0
    assert committed_steps(base / "base_checkpoints" / "tiny") == [3]


@pytest.mark.slow
@pytest.mark.parametrize("option", WORKS)
def test_works(option: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    assert fit(base, tiny_base, option, WORKS[option], monkeypatch) == 0
    steps = {"max_steps": 3, "fast_dev_run": 1}.get(option, 4)
    assert committed_steps(base / "base_checkpoints" / "tiny") == [steps]


@pytest.mark.parametrize("option", REFUSED)
def test_is_refused_with_the_alternative(
    option: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value, remedy = REFUSED[option]
    assert fit(tmp_path / "base", tiny_base, option, value, monkeypatch) == 2
    message = capsys.readouterr().err
    assert f"--trainer.{option}" in message and remedy in message


def test_overfitting_repeats_the_first_batches(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Recorder(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: object, batch: dict, *_: object) -> None:
            seen.append(batch["inputs"].clone())

    monkeypatch.setattr("faults.Recorder", Recorder, raising=False)
    value = ["2", "--trainer.callbacks+=faults.Recorder"]
    shutil.copytree(tiny_base, tmp_path / "base")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    assert main(["fit", *config_options(tmp_path / "base", OWN), "--trainer.overfit_batches", *value]) == 0
    per_step = 2
    assert len(seen) == 4 * per_step
    for first, again in zip(seen[: 2 * per_step], seen[2 * per_step :], strict=True):
        assert first.equal(again)
    assert not seen[0].equal(seen[1])


@pytest.mark.parametrize("limit", ["3", "0.5"])
def test_a_limit_that_cuts_an_optimizer_step_is_refused(
    limit: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "base", tiny_base, "limit_train_batches", limit, monkeypatch) == 2
    assert "--trainer.max_steps" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", ".nan"])
def test_a_clipping_without_effect_is_refused(
    value: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "base", tiny_base, "gradient_clip_val", value, monkeypatch) == 2
    assert "gradient_clip_val is" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("trainer.overfit_batches", str(2**70)),
        ("trainer.fast_dev_run", str(2**70)),
        ("trainer.min_steps", str(2**70)),
        ("trainer.min_epochs", "-5"),
        ("trainer.num_nodes", "1000000000000"),
        ("trainer.num_nodes", "0"),
        ("trainer.gradient_clip_val", "1e400"),
        ("trainer.strategy", "ddp_spawn"),
        ("trainer.strategy", "ddp_notebook_find_unused_parameters_true"),
        ("trainer.strategy", "ddp_fork"),
    ],
)
def test_values_that_no_run_can_have_are_refused(
    option: str,
    value: str,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    assert main(["fit", *config_options(tmp_path / "base", OWN), f"--{option}", value]) == 2
    assert f"--{option} is " in capsys.readouterr().err.splitlines()[-1]


def test_own_classes_may_have_any_name(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = "{class_path: own_classes.NotebookStrategy, init_args: {folder: spawn/fork}}"
    assert fit(tmp_path / "base", tiny_base, "strategy", strategy, monkeypatch, "--model=own_classes.ChatModule") == 0


def test_a_strategy_that_copies_processes_is_refused_by_its_launcher(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = "{class_path: own_classes.NotebookStrategy, init_args: {folder: a, start_method: spawn}}"
    assert fit(tmp_path / "base", tiny_base, "strategy", strategy, monkeypatch) == 2
    assert "--trainer.strategy is own_classes.NotebookStrategy" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("law", ["--scaling_laws.tokens_per_parameter=1e21", "--scaling_laws.target_flops=1e300"])
def test_scaling_laws_without_end_are_refused(
    law: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "base", tiny_base, "max_steps", "-1", monkeypatch, law) == 2
    assert "the scaling laws give a run of" in (message := capsys.readouterr().err.splitlines()[-1])
    assert law.partition("=")[0] in message


@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_a_missing_metric_is_reported(
    callback: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = f"[{{class_path: lightning.pytorch.callbacks.{callback}, init_args: {{monitor: val_loss}}}}]"
    assert fit(tmp_path / "base", tiny_base, "callbacks", value, monkeypatch) == 2
    message = capsys.readouterr().err
    assert "val_loss" in message and "val/bpb" in message and message.strip().count("\n") == 0


UNUSABLE = {
    "EarlyStopping, init_args: {monitor: val/bpb, mode: sideways}": "EarlyStopping cannot be created: `mode` can be",
    "EarlyStopping, init_args: {patience: x}": "--trainer.callbacks.patience is x; it must be int",
    "LearningRateMonitor, init_args: {logging_interval: bad}": "logging_interval is bad; it must be step, epoch",
    "LearningRateFinder": "--trainer.callbacks: LearningRateFinder failed: When using the learning rate finder",
    "BackboneFinetuning": "--trainer.callbacks: BackboneFinetuning failed: 'PretrainModule' object has no attribute",
    "OnExceptionCheckpoint, init_args: {dirpath: .}": "OnExceptionCheckpoint is not supported",
}


@pytest.mark.parametrize("callback", UNUSABLE)
def test_a_callback_that_does_not_work_is_reported(
    callback: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = f"[{{class_path: lightning.pytorch.callbacks.{callback}}}]"
    assert fit(tmp_path / "base", tiny_base, "callbacks", value, monkeypatch) == 2
    assert UNUSABLE[callback] in capsys.readouterr().err.splitlines()[-1]


def test_a_callback_without_the_logger_it_needs_is_named_with_its_option(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "[{class_path: LearningRateMonitor}]"
    assert fit(tmp_path / "base", tiny_base, "callbacks", value, monkeypatch, "--trainer.logger", "false") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--trainer.callbacks: LearningRateMonitor failed: Cannot use" in message and "leave it out" in message


@pytest.mark.parametrize(
    ("option", "value"), [("devices", "-1"), ("devices", "[0, 0]"), ("devices", "4096"), ("accelerator", "tpu")]
)
def test_a_missing_device_is_reported(
    option: str,
    value: str,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit(tmp_path / "base", tiny_base, option, value, monkeypatch) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lmchat: --trainer")


@pytest.mark.parametrize(
    ("options", "strategy"),
    [
        ({"devices": 1, "num_nodes": 1}, "auto"),
        ({"devices": "auto", "num_nodes": 1}, "auto"),  # one, on a CPU
        ({"devices": 2, "num_nodes": 1}, "zero2_muon"),
        ({"devices": 1, "num_nodes": 2}, "zero2_muon"),
    ],
)
def test_several_processes_shard_the_optimizer_by_default(options: dict[str, Any], strategy: str) -> None:
    assert default_strategy({"accelerator": "cpu", **options}) == strategy
