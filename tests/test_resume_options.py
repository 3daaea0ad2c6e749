"""Every stage option that is changed on resume is applied or refused, and the checkpoint records the value in use."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmchat.__main__ import main
from lmchat.callbacks.training_plan import TrainingPlan
from lmchat.checkpoint.load import find_checkpoint, load_model_state
from lmchat.stages.base import StageModule
from lmchat.stages.chat import ChatModule
from lmchat.stages.pretrain import FineWebDataModule, PretrainModule
from lmchat.stages.rl import GRPOModule, RolloutDataModule
from lmchat.stages.sft import SFTDataModule, SFTModule
from tiny_fit import config_options, same

pytestmark = pytest.mark.slow

RUN = """
trainer: {max_steps: 6}
model: {init_args: {tag: tiny}}
checkpoint: {every_n_steps: 3}
eval: {every_n_steps: 0, at_start: false, at_end: false}
"""
CHAT = """
trainer: {accelerator: cpu, devices: 1}
samples: {max_new_tokens: 0}
"""
STAGES = {
    "pretrain": "",
    "sft": CHAT
    + """
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args:
    micro_batch_size: 2
    eval_tokens: 256
    train: [{task: {class_path: Identity, init_args: {split: train, size: 60}}, epochs: 4}]
    val: [{task: {class_path: Identity, init_args: {split: test, size: 8}}}]
""",
    "rl": CHAT
    + """
model: {class_path: GRPOModule}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: float64.Whims, init_args: {split: train, size: 60}}}]
    eval_task: {class_path: Identity, init_args: {split: test, size: 3}}
    questions_per_step: 4
    num_samples: 3
    max_new_tokens: 24
    # Uniform over the vocabulary: some samples end early, so that groups differ in length.
    temperature: 100.0
    top_k: null
""",
}
FOLDERS = {"pretrain": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}

APPLIED, REFUSED, NO_EFFECT = "applied", "refused", "no effect on the weights"
"""No effect: options of evaluation and speed, and those whose time is over."""

SHARED = {
    "model.embedding_lr": ("0.05", APPLIED),
    "model.unembedding_lr": ("0.05", APPLIED),
    "model.matrix_lr": ("0.3", APPLIED),
    "model.scalar_lr": ("0.05", APPLIED),
    "model.weight_decay": ("0.9", APPLIED),
    "model.compute_dtype": ("bf16", APPLIED),
    "model.attention": ("masked", NO_EFFECT),
    "model.compile": ("false", NO_EFFECT),
    "model.checkpoint_blocks": ("true", NO_EFFECT),
}
TABLE = {
    "pretrain": {
        **SHARED,
        "model.depth": ("3", REFUSED),
        "model.sequence_len": ("16", REFUSED),
        "model.aspect_ratio": ("64", REFUSED),
        "model.head_dim": ("16", REFUSED),
        "model.n_kv_head": ("1", REFUSED),
        "model.window_pattern": ("L", REFUSED),
        "model.value_embeddings": ("false", REFUSED),
        "model.residual_mix": ("false", REFUSED),
        "model.warmup_ratio": ("0.9", APPLIED),
        "model.warmdown_ratio": ("0.9", APPLIED),
        "model.final_lr_fraction": ("0.3", APPLIED),
        "model.global_batch_tokens": ("512", APPLIED),
        "data.micro_batch_size": ("4", APPLIED),
        "data.buffer_size": ("2000", APPLIED),
        "data.eval_tokens": ("512", NO_EFFECT),
        "data.long_documents": ("split", REFUSED),
        "data.mask_documents": ("true", NO_EFFECT),  # each row is one document here; see test_mask_documents.py
        "scaling_laws.lr_scale": ("0.3", APPLIED),
        "scaling_laws.weight_decay": ("0.7", APPLIED),
        # An explicit --trainer.max_steps decides the length of the run.
        "scaling_laws.tokens_per_parameter": ("20", NO_EFFECT),
        "scaling_laws.target_flops": ("1e12", NO_EFFECT),
    },
    "sft": {
        **SHARED,
        "model.init_lr_fraction": ("0.3", APPLIED),
        "model.constant_until": ("0.1", APPLIED),
        "model.warm_start_optimizer": ("true", NO_EFFECT),
        "model.global_batch_tokens": ("512", REFUSED),
        "data.micro_batch_size": ("4", APPLIED),
        "data.shuffle_seed": ("7", REFUSED),
        "data.eval_tokens": ("128", NO_EFFECT),
        "data.eval_batch_size": ("3", NO_EFFECT),
        "data.eval_max_new_tokens": ("3", NO_EFFECT),
        "data.eval_tasks": ("[{class_path: Identity, init_args: {split: test, size: 2}}]", NO_EFFECT),
        "data.train": ("[{task: {class_path: Identity, init_args: {split: train, size: 50}}, epochs: 5}]", REFUSED),
        "data.val": ("[]", NO_EFFECT),
    },
    "rl": {
        **SHARED,
        "model.init_lr_fraction": ("0.3", APPLIED),
        "model.warm_start_optimizer": ("true", NO_EFFECT),
        "model.global_batch_tokens": ("512", NO_EFFECT),
        "model.normalization": ("group", APPLIED),
        "model.momentum": ("0.5", APPLIED),
        "data.questions_per_step": ("2", REFUSED),
        "data.num_samples": ("4", APPLIED),
        "data.max_new_tokens": ("3", APPLIED),
        "data.temperature": ("2.0", APPLIED),
        "data.top_k": ("2", APPLIED),
        "data.seed": ("7", REFUSED),
        "data.eval_num_samples": ("2", NO_EFFECT),
        "data.eval_temperature": ("0", NO_EFFECT),
        "data.eval_batch_size": ("3", NO_EFFECT),
        "data.eval_task": ("{class_path: Identity, init_args: {split: test, size: 2}}", NO_EFFECT),
        "data.eval_tasks": ("[{class_path: Identity, init_args: {split: test, size: 2}}]", NO_EFFECT),
        "data.train": ("[{task: {class_path: float64.Whims, init_args: {split: train, size: 50}}}]", REFUSED),
    },
}
PLACES = {"model.tag", "model.tokenizer_dir", "data.data_dir"}
"""Where files are. Other files are refused by their fingerprints (test_resume.py, test_world_change.py)."""

META = {
    "model.weight_decay": "weight_decay",
    "model.compute_dtype": "compute_dtype",
    "model.global_batch_tokens": "global_batch_tokens",
    "model.init_lr_fraction": "lr_scale",
    "data.micro_batch_size": "micro_batch_size",
    "scaling_laws.lr_scale": "lr_scale",
    "scaling_laws.weight_decay": "weight_decay",
}
"""Names in the metadata of a checkpoint; learning rates are under their own names."""

CASES = [(stage, option) for stage, options in TABLE.items() for option in options]


def options_of(*classes: Any, group: str) -> set[str]:
    parameters = (p for each in classes for p in inspect.signature(each.__init__).parameters.values())
    return {f"{group}.{p.name}" for p in parameters if p.name != "self" and p.kind != p.VAR_KEYWORD}


def test_the_tables_have_every_option() -> None:
    chat = options_of(StageModule, ChatModule, group="model")
    expected = {
        "pretrain": options_of(StageModule, PretrainModule, group="model")
        | options_of(FineWebDataModule, group="data")
        | options_of(TrainingPlan, group="scaling_laws"),
        "sft": chat | options_of(SFTModule, group="model") | options_of(SFTDataModule, group="data"),
        "rl": chat | options_of(GRPOModule, group="model") | options_of(RolloutDataModule, group="data"),
    }
    for stage, options in expected.items():
        assert TABLE[stage].keys() == options - PLACES, stage


@pytest.fixture(scope="module")
def runs(make_once: Callable[..., Path], tiny_base: Path) -> Path:
    """A finished run of every stage, each in a separate folder, with a copy of its last checkpoint."""

    def fill(folder: Path) -> None:
        shutil.copytree(tiny_base, folder / "base")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("LMCHAT_BASE_DIR", str(folder / "base"))
            for stage, before in {"pretrain": None, "sft": "pretrain", "rl": "sft"}.items():
                start = [] if before is None else ["--ckpt_path", str(folder / "base" / FOLDERS[before] / "tiny")]
                assert main(["fit", *options(folder / "base", stage), *start]) == 0

    return make_once("resume_options", fill)


def options(base: Path, stage: str) -> list[str]:
    """Command-line options of the stage's run."""
    if stage == "pretrain":
        return config_options(base, RUN)
    paths = {base / "stage.yaml": STAGES[stage], base / "run.yaml": RUN}
    for path, text in paths.items():
        path.write_text(text)
    return [option for path in paths for option in ("--config", str(path))]


@pytest.mark.parametrize(("stage", "option"), CASES, ids=[f"{stage} {option}" for stage, option in CASES])
def test_changed_on_resume(
    stage: str,
    option: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value, outcome = TABLE[stage][option]
    base = tmp_path / "base"
    shutil.copytree(runs / "base", base)
    checkpoints = base / FOLDERS[stage] / "tiny"
    unchanged = find_checkpoint(checkpoints)
    expected = load_model_state(unchanged)
    for path in checkpoints.glob("*_000006*"):
        path.unlink()
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    status = main(["fit", *options(base, stage), "--ckpt_path", "last", f"--{option}", value])
    if outcome == REFUSED:
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert status == 2 and message.startswith("lmchat: ")
        return
    assert status == 0
    found = find_checkpoint(checkpoints)
    assert found.step == 6
    assert same(load_model_state(found), expected) == (outcome == NO_EFFECT)
    meta = {**found.meta, **found.meta["learning_rates"]}
    name = META.get(option, option.partition(".")[2])
    if outcome == APPLIED and name in meta and option != "model.weight_decay":
        assert str(meta[name]) == value
    if outcome == APPLIED and option == "model.weight_decay":  # scaled by the laws in pretraining
        assert meta["weight_decay"] != unchanged.meta["weight_decay"]
