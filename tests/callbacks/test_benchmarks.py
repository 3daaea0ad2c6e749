"""CORE and ChatCORE in training: when they run, what they write, and that they do not change training."""

from __future__ import annotations

import csv
import errno
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from core_bundle import write_bundle
from forked import exit_statuses
from killable_fit import start_fit
from lmchat.__main__ import main
from lmchat.checkpoint.load import find_checkpoint, load_model, load_model_state, load_rank_state
from lmchat.evaluation.benchmark import centered
from lmchat.evaluation.bits_per_byte import BitsPerByteEvaluator
from lmchat.evaluation.chat_core import ChatCoreEvaluator, make_task
from lmchat.evaluation.chat_tasks import grade
from lmchat.evaluation.core import Example, examples, read_bundle
from lmchat.evaluation.core_evaluator import CoreEvaluator
from lmchat.evaluation.core_scoring import is_correct
from lmchat.generation.engine import Engine
from lmchat.tokenizer.bpe import Tokenizer
from reference_core import score_plainly
from tiny_fit import config_options, same

OWN = """
trainer: {max_steps: 5}
monitor: {every_n_steps: 1}
eval: {every_n_steps: 3}
checkpoint: {every_n_steps: 2}
"""
CORE = ["--core.every_n_steps", "2", "--core.max_per_task", "4"]
CHAT_TASKS = ("ARC-Easy", "GSM8K")


def chat_core(base: Path) -> list[str]:
    """Options of ChatCORE for local questions, which are written to ``base``."""
    arc = [{"question": f"{i}?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}
           for i in range(9)]  # fmt: skip
    gsm8k = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(3)]
    for name, rows in zip(CHAT_TASKS, (arc, gsm8k), strict=True):
        (base / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = ",".join(f"{name}={base / name}.jsonl" for name in CHAT_TASKS)
    options = {"tasks": f"[{tasks}]", "every_n_steps": 3, "max_per_task": 7, "max_new_tokens": 4}
    return [f"--chat_core.{name}={value}" for name, value in options.items()]


def checkpoint_of(base: Path) -> Any:
    return find_checkpoint(base / "base_checkpoints" / "d2")


def metrics(base: Path, name: str) -> dict[int, float]:
    (path,) = base.rglob("metrics.csv")
    return {int(row["step"]): float(row[name]) for row in csv.DictReader(path.open()) if row.get(name)}


def logged_rows(base: Path) -> list[dict[str, str]]:
    """The rows of the log without their step and epoch."""
    (path,) = base.rglob("metrics.csv")
    rows = csv.DictReader(path.open())
    return [{name: value for name, value in row.items() if name not in ("step", "epoch")} for row in rows]


def steps_with_samples(base: Path) -> list[int]:
    (path,) = base.rglob("samples.jsonl")
    return [json.loads(line)["step"] for line in path.open()]


def same_run(one: Path, other: Path, world_size: int = 1) -> bool:
    checkpoints = [checkpoint_of(one), checkpoint_of(other)]
    assert [checkpoint.step for checkpoint in checkpoints] == [5, 5]
    ranks = [[load_rank_state(each, rank) for each in checkpoints] for rank in range(world_size)]
    names = ("optimizer_states", "rng", "FineWebDataModule", "callbacks")
    assert [name for a, b in ranks for name in names if not same(a[name], b[name])] == []
    return same(*map(load_model_state, checkpoints))


def expected_results(base: Path, step: int) -> dict[str, float]:
    """Accuracies of the checkpoint of a step, one option at a time."""
    net = load_model(find_checkpoint(base / "base_checkpoints" / "d2" / f"meta_{step:06d}.json"), "cpu")
    tokenizer, accuracies = Tokenizer.load(base / "tokenizer"), {}
    for task in read_bundle(base / "eval_bundle"):
        found = list(examples(task, tokenizer, max_items=4))
        pairs = zip(found, score_plainly(net, found), strict=True)
        accuracies[task.name] = sum(is_correct(task.kind, *pair) for pair in pairs) / len(found)
    return accuracies


def expected_chat_results(base: Path, step: int) -> dict[str, float]:
    """Accuracies of the checkpoint of a step, one question at a time."""
    net = load_model(find_checkpoint(base / "base_checkpoints" / "d2" / f"meta_{step:06d}.json"), "cpu")
    engine, accuracies = Engine(net, Tokenizer.load(base / "tokenizer"), max_rows=1), {}
    for name in CHAT_TASKS:
        task = make_task(f"{name}={base / name}.jsonl", 7)
        accuracies[name] = sum(grade(engine, task, [each], max_new_tokens=4)[0] for each in task) / len(task)
    return accuracies


@pytest.fixture(scope="module")
def without(new_base: Callable[[], Path]) -> Path:
    base = new_base()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        assert main(["fit", *config_options(base, OWN)]) == 0
    return base


@pytest.mark.parametrize("world_size", [1, 2])
def test_core_is_logged_and_does_not_change_training(
    world_size: int,
    without: Path,
    new_base: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = new_base()
    write_bundle(base / "eval_bundle", broken=False)
    if world_size == 1:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        samples = ["--samples.max_new_tokens", "1"]
        assert main(["fit", *config_options(base, OWN), *samples, *CORE, *chat_core(base)]) == 0
        assert steps_with_samples(base) == [0, 2, 3, 4, 5]  # nothing is evaluated after step 1
        assert all(any(row.values()) for row in logged_rows(base))
        lines = re.findall(r"step (\d)/5 \| held out: (.*)", capsys.readouterr().out)
        shown = {int(step): re.findall(r"(?:^|\| )([a-z_]+) ", line) for step, line in lines}
        assert shown == {0: ["bpb"], 2: ["core"], 3: ["bpb", "chat_core"], 4: ["core"], 5: ["bpb", "core", "chat_core"]}
    else:
        without = new_base()
        ranks = ["--trainer.devices", "2", "--trainer.strategy", "zero2_muon"]
        for folder, options in ((base, [*CORE, *chat_core(base)]), (without, [])):
            processes = start_fit([*config_options(folder, OWN), *ranks, *options], folder, world_size)
            assert exit_statuses(processes) == [0, 0], (folder / "output_rank0.txt").read_text()
    assert same_run(base, without, world_size)
    assert metrics(base, "train/loss") == metrics(without, "train/loss")
    assert metrics(base, "val/bpb") == metrics(without, "val/bpb")
    core = metrics(base, "val/core")
    assert sorted(core) == [2, 4, 5]  # not at the start
    baselines = {task.name: task.baseline for task in read_bundle(base / "eval_bundle")}
    for step in core:
        results = json.loads((base / "base_checkpoints" / "d2" / f"eval_{step:06d}.json").read_text())
        accuracies = expected_results(base, step)
        assert {name: results[name]["accuracy"] for name in accuracies} == accuracies
        shares = {name: centered(accuracies[name], baselines[name]) for name in accuracies}
        assert core[step] == pytest.approx(sum(shares.values()) / len(shares))
        for name, share in shares.items():
            assert metrics(base, f"val/core/{name}")[step] == pytest.approx(share)
    chat = metrics(base, "val/chat_core")
    assert sorted(chat) == [3, 5]
    results = json.loads((base / "base_checkpoints" / "d2" / "eval_000005.json").read_text())
    accuracies = expected_chat_results(base, 5)
    assert {name: results[name]["accuracy"] for name in CHAT_TASKS} == accuracies
    assert 0 < accuracies["ARC-Easy"] < 1
    assert metrics(base, "val/chat_core/ARC-Easy")[5] == pytest.approx(accuracies["ARC-Easy"])
    expected = [centered(accuracies["ARC-Easy"], 0.25), accuracies["GSM8K"]]
    assert chat[5] == results["ChatCORE"]["centered"] == pytest.approx(sum(expected) / 2)
    assert results["CORE"]["centered"] == pytest.approx(core[5])
    assert list(base.rglob("events.out.tfevents*"))


def out_of_memory_from(rows: int) -> Callable[..., Any]:
    """Mocks `update` so that more than ``rows`` rows or examples are out of memory."""

    def patch(original: Callable[..., None]) -> Callable[..., None]:
        def update(self: Any, policy: Any, batch: Any) -> None:
            if len(batch["inputs"] if isinstance(batch, dict) else batch.examples) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory (of the test)")
            original(self, policy, batch)

        return update

    return patch


def test_out_of_memory_makes_batches_smaller_or_skips_the_evaluation(
    base: Path, without: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_bundle(base / "eval_bundle", broken=False)
    monkeypatch.setattr(BitsPerByteEvaluator, "update", out_of_memory_from(1)(BitsPerByteEvaluator.update))
    monkeypatch.setattr(CoreEvaluator, "update", out_of_memory_from(0)(CoreEvaluator.update))
    monkeypatch.setattr(ChatCoreEvaluator, "update", out_of_memory_from(2)(ChatCoreEvaluator.update))
    assert main(["fit", *config_options(base, OWN), *CORE, *chat_core(base)]) == 0
    assert same_run(base, without)
    assert metrics(base, "val/bpb") == pytest.approx(metrics(without, "val/bpb"), rel=1e-6)
    assert not metrics(base, "val/core")
    result = json.loads((base / "base_checkpoints" / "d2" / "eval_000002.json").read_text())["sums"]
    assert "out of memory with the smallest batch" in result["error"]
    assert "bpb: out of memory, continuing with 1/2 of its batch" in caplog.text
    assert "chat_core: out of memory, continuing with 1/4 of its batch" in caplog.text
    results = json.loads((base / "base_checkpoints" / "d2" / "eval_000005.json").read_text())
    assert {name: results[name]["accuracy"] for name in CHAT_TASKS} == expected_chat_results(base, 5)


def test_an_error_in_one_task_does_not_affect_the_others(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(base / "eval_bundle")

    def score(net: Any, found: Sequence[Example]) -> Any:
        if len(found[0].options) > 1:
            raise ZeroDivisionError("of the test")
        return score_plainly(net, found)

    monkeypatch.setattr("lmchat.evaluation.core_evaluator.score", score)
    assert main(["fit", *config_options(base, OWN), *CORE]) == 0
    results = json.loads((base / "base_checkpoints" / "d2" / "eval_000005.json").read_text())
    assert results["sums"]["error"] == "ZeroDivisionError: of the test"
    assert "is not valid for a schema task" in results["broken"]["error"]
    assert 0 <= results["capitals"]["accuracy"] <= 1
    assert metrics(base, "val/core/capitals") and not metrics(base, "val/core")


def test_a_missing_bundle_is_reported_with_the_remedy(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *config_options(base, OWN), *CORE]) == 2
    assert "lmchat data download --eval_bundle true" in capsys.readouterr().err
    assert main(["fit", *config_options(base, OWN), "--chat_core.tasks=[GSM8K=missing.jsonl]"]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


def test_out_of_memory_while_reading_the_data_skips_the_evaluation(
    base: Path, without: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_bundle(base / "eval_bundle", broken=False)

    def fail(*_: Any) -> Iterator[Any]:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
        yield

    monkeypatch.setattr(BitsPerByteEvaluator, "batches", fail)
    assert main(["fit", *config_options(base, OWN), *CORE, *chat_core(base)]) == 0
    assert same_run(base, without)
    assert not metrics(base, "val/bpb")
    assert metrics(base, "val/core")
    assert "bpb: out of memory while reading its data" in caplog.text
