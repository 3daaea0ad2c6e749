"""Every config runs, shrunk, through the real entry point."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pytest

from core_bundle import write_bundle
from lmchat.__main__ import main
from lmchat.cli.fit import read_data_module
from lmchat.demo import run
from lmchat.demo.tasks import Arithmetic
from lmchat.demo.tasks.stories import FAMILIES
from lmchat.demo.training import SKILLS
from lmchat.stages.rl import RolloutDataModule
from lmchat.stages.sft import SFTDataModule
from lmchat.tokenizer.bpe import Tokenizer
from random_checkpoint import save_random_checkpoint

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEMO_CONFIGS = run.CONFIGS
SMALL_PRETRAIN = """
trainer: {accelerator: cpu, devices: 1, max_steps: 3}
model:
  init_args: {depth: 2, sequence_len: 32, aspect_ratio: 32, head_dim: 32, global_batch_tokens: 128, compile: false}
data: {init_args: {micro_batch_size: 2, eval_tokens: 128}}
eval: {every_n_steps: 2}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 2}
checkpoint: {every_n_steps: 2}
"""


def test_every_config_is_covered() -> None:
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert names == {*PRETRAIN, *OVERLAYS, *CHAT, "eval_base.yaml", "eval_chat.yaml"}


PRETRAIN = [
    *("d12_pretrain.yaml", "d20_pretrain.yaml", "d26_pretrain.yaml"),
    *("d12_native.yaml", "d20_native.yaml"),
]
OVERLAYS = ["cpu.yaml"]
CHAT = ["sft.yaml", "sft_own.yaml", "grpo.yaml"]
"""Run by tests/stages/test_chat_stages.py and test_own_conversations.py, with data that is at hand."""


@pytest.mark.parametrize("names", [[name] for name in PRETRAIN] + [["d12_pretrain.yaml", name] for name in OVERLAYS])
def test_a_config_trains(names: list[str], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = base / "small.yaml"
    small.write_text(SMALL_PRETRAIN)
    configs = [argument for name in names for argument in ("--config", str(CONFIGS / name))]
    assert main(["fit", *configs, "--config", str(small)]) == 0
    metas = sorted(base.glob("base_checkpoints/*/meta_*.json"))
    assert [json.loads(path.read_text())["step"] for path in metas] == [2, 3]
    assert json.loads(metas[-1].read_text())["stage"] == "pretrain"
    (metrics,) = base.rglob("metrics.csv")
    assert {"train/loss", "train/tokens_per_second", "val/bpb"} <= set(metrics.read_text().splitlines()[0].split(","))
    evaluated = [row["step"] for row in csv.DictReader(metrics.open()) if row["val/bpb"]]
    assert evaluated == ["0", "2", "3"]
    assert list(base.rglob("events.out.tfevents*"))
    printed = capsys.readouterr().out
    assert "step 3/3" in printed
    assert "bpb" in printed


def test_the_config_of_base_models_evaluates_core(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(base / "eval_bundle", broken=False)
    paths = save_random_checkpoint(Tokenizer.load(base / "tokenizer"), stage="pretrain")
    assert main(["eval", "--config", str(CONFIGS / "eval_base.yaml"), "--checkpoint", str(paths.directory)]) == 0
    results = json.loads((paths.directory / "eval_000007.json").read_text())
    assert results.keys() == {"capitals", "sums", "CORE"}
    low, high = results["CORE"]["interval_95"]
    assert low <= results["CORE"]["centered"] <= high
    assert "CORE" in capsys.readouterr().out


def test_the_config_of_chat_models_evaluates_six_benchmarks(
    base: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = save_random_checkpoint(Tokenizer.load(base / "tokenizer"), sequence_len=1024)
    sources = {
        **{f"ARC-{kind}": next((shared_data / "arc" / f"ARC-{kind}").glob("test*")) for kind in ("Easy", "Challenge")},
        "MMLU": shared_data / "mmlu" / "test.parquet",
        "GSM8K": shared_data / "gsm8k" / "test.jsonl",
        "HumanEval": shared_data / "humaneval" / "HumanEval.jsonl.gz",
        "SpellingBee": shared_data / "words" / "words_alpha.txt",
    }
    local = ["--tasks", json.dumps([f"{name}={path}" for name, path in sources.items()]), "--limit", "2"]
    options = ["--checkpoint", str(paths.directory), "--sandbox.allow_weak", "true", "--max_new_tokens", "4"]
    command = ["eval", "--config", str(CONFIGS / "eval_chat.yaml"), *options, *local]
    assert main(command) == 0
    results = json.loads((paths.directory / "eval_000007.json").read_text())
    assert results.keys() == {*sources, "ChatCORE"}, capsys.readouterr().out
    assert results["HumanEval"]["accuracy"] == 0 and results["HumanEval"]["questions"] == 2
    written = (paths.directory / "eval_000007.json").read_text()
    assert main(command) == 0  # all data is available
    assert (paths.directory / "eval_000007.json").read_text() == written


def test_the_demo_evaluates_families_of_sft_and_rl_separately() -> None:
    sft, grpo = (read_data_module([DEMO_CONFIGS / f"{stage}.yaml"]) for stage in ("sft", "rl"))
    assert isinstance(sft, SFTDataModule)
    assert isinstance(grpo, RolloutDataModule)
    (taught,) = (task for task in sft.mixtures["train"].parts[0].task.tasks if isinstance(task, Arithmetic))
    asked = {task.name: task for task in (*sft.eval_tasks, *grpo.eval_tasks) if isinstance(task, Arithmetic)}
    names = {skill: SKILLS[skill].removeprefix("val/") for skill in ("arithmetic_taught", "arithmetic_pass_at_1")}
    assert grpo.eval_task.name == names["arithmetic_pass_at_1"]
    assert asked.keys() == set(names.values())
    new = asked[names["arithmetic_pass_at_1"]].families
    assert grpo.eval_task.families == new
    assert asked[names["arithmetic_taught"]].families == taught.families
    assert [family for family in FAMILIES.values() if family not in taught.families] == new


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("*.yaml"), *DEMO_CONFIGS.glob("*.yaml")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_a_config_says_what_it_reproduces_and_how_to_run_it(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Reproduces:", "Run: "):
        assert any(word in line for line in header), word


def test_print_config_shows_all_settings(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(CONFIGS / "d26_pretrain.yaml"), "--model.depth", "4", "--print_config"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "depth: 4" in printed
    assert "tokens_per_parameter: 8.25" in printed


def test_environment_variables_set_options(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_FIT__EVAL__EVERY_N_STEPS", "77")
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    assert "every_n_steps: 77" in capsys.readouterr().out
