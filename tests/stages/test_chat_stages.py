"""Fine-tuning and reinforcement learning: through the command line, and their plans."""

from __future__ import annotations

import csv
import json
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import numpy as np
import pytest
import torch

from lmchat.__main__ import main
from lmchat.checkpoint.load import find_checkpoint, load_model_state
from lmchat.data.mixture import Mixture, MixturePart
from lmchat.data.padded_batches import PaddedBatches, PaddedPlan
from lmchat.data.rendered_conversations import RenderedConversations, render_all
from lmchat.demo.run import CONFIGS as DEMO_CONFIGS
from lmchat.demo.tasks import Arithmetic
from lmchat.evaluation.intervals import wilson_interval
from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.sequence import StreamedToken
from lmchat.report.runs import read_run
from lmchat.stages.base import StageModule
from lmchat.stages.rl import RolloutDataModule
from lmchat.stages.sft import SFTDataModule
from lmchat.tasks import HumanEval, Identity, JSONLConversations, Task
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_conversation
from lmchat.types import IGNORE_INDEX, Batch, UserError
from tiny_fit import config_options

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAIN = """
trainer: {accelerator: cpu, devices: 1, max_steps: 2}
model:
  class_path: PretrainModule
  init_args:
    {depth: 1, sequence_len: 256, aspect_ratio: 32, head_dim: 32, window_pattern: L, global_batch_tokens: 2048,
     tag: tiny}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 4, eval_tokens: 1024}}
samples: {max_new_tokens: 0}
"""
SFT = """
trainer: {accelerator: cpu, devices: 1}
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args:
    micro_batch_size: 4
    eval_tokens: 2048
    train:
      - task: {class_path: Identity, init_args: {split: train, size: 24}}
        epochs: 2
      - task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: train, size: 16}}
    val:
      - task: {class_path: Identity, init_args: {split: test, size: 8}}
    eval_tasks:
      - {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 4}}
    eval_max_new_tokens: 8
eval: {every_n_steps: 0}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
checkpoint: {every_n_steps: 2}
"""
GRPO = """
trainer: {accelerator: cpu, devices: 1, max_steps: 2}
model: {class_path: GRPOModule}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: train, size: 8}}}]
    eval_task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 4}}
    eval_tasks:
      - {class_path: Identity, init_args: {split: test, size: 4}}
    questions_per_step: 2
    num_samples: 3
    eval_num_samples: 2
    max_new_tokens: 8
eval: {every_n_steps: 0}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
checkpoint: {every_n_steps: 1}
"""


@pytest.fixture(scope="module")
def pipeline(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with a checkpoint of each stage."""
    base = tmp_path_factory.mktemp("pipeline")
    for name in ("base_data", "tokenizer"):
        (base / name).symlink_to(tiny_base / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        fit(base, "pretrain", PRETRAIN)
        fit(base, "sft", SFT, "--ckpt_path", str(base / "base_checkpoints" / "tiny"))
        fit(base, "grpo", GRPO, "--ckpt_path", str(base / "chatsft_checkpoints" / "tiny"))
    return base


def fit(base: Path, name: str, config: str, *options: str) -> None:
    path = base / f"{name}.yaml"
    path.write_text(config)
    shipped = [] if name == "pretrain" else ["--config", str(CONFIGS / f"{config_of(config)}.yaml")]
    assert main(["fit", *shipped, "--config", str(path), *options]) == 0


def config_of(config: str) -> str:
    """The shipped config that ``config`` shrinks."""
    return "sft" if config is SFT else "grpo"


def log(base: Path, stage: str) -> list[dict[str, str]]:
    (path,) = (base / "logs" / stage / "tiny").rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_each_stage_starts_from_the_one_before(pipeline: Path) -> None:
    for folder, stage in (("base", "pretrain"), ("chatsft", "sft"), ("chatrl", "rl")):
        checkpoint = find_checkpoint(pipeline / f"{folder}_checkpoints" / "tiny")
        assert checkpoint.stage == stage
        assert checkpoint.meta["model"]["sequence_len"] == 256
        assert checkpoint.meta["global_batch_tokens"] == 2048


@pytest.mark.parametrize(
    ("stage", "small", "start"), [("sft", SFT, "base_checkpoints"), ("rl", GRPO, "chatsft_checkpoints")]
)
def test_the_demos_config_runs(
    stage: str, small: str, start: str, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    shrunk = pipeline / f"demo_{stage}.yaml"
    shrunk.write_text(small)
    configs = ["--config", str(DEMO_CONFIGS / f"{stage}.yaml"), "--config", str(shrunk)]
    started = ["--ckpt_path", str(pipeline / start / "tiny"), "--model.tag", "demo"]
    assert main(["fit", *configs, *started, "--trainer.max_steps", "1"]) == 0


def test_fine_tuning_takes_exactly_one_epoch(pipeline: Path) -> None:
    rows = [row for row in log(pipeline, "sft") if row["train/loss"]]
    rendered = RenderedConversations(pipeline / "rendered" / "tiny" / "train")
    plan = PaddedPlan(rendered, 256, 8)
    assert len(rendered) == 2 * 24 + 16
    assert len(rows) == plan.steps > 1
    assert float(rows[-1]["train/epoch"]) == 1
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])


def test_held_out_metrics_are_logged(pipeline: Path) -> None:
    sft = [row for row in log(pipeline, "sft") if row["val/bpb"]]
    assert len(sft) == 2
    assert float(sft[1]["val/bpb"]) < float(sft[0]["val/bpb"])
    assert all(0 <= float(row["val/Arithmetic/test"]) <= 1 for row in sft)
    grpo = [row for row in log(pipeline, "grpo") if row["val/pass@1"]]
    assert len(grpo) == 2
    assert all(0 <= float(row["val/pass@1"]) <= float(row["val/pass@2"]) <= 1 for row in grpo)
    assert all(0 <= float(row["val/Identity/test"]) <= 1 for row in grpo)


def test_held_out_shares_have_their_intervals_in_the_report(pipeline: Path) -> None:
    run = read_run(str(pipeline / "tiny"))
    rl, sft = run.stages["rl"], run.stages["sft"]
    for stage, metric, questions in ((sft, "val/Arithmetic/test", 4), (rl, "val/pass@2", 4)):
        value, interval = stage.final(metric), stage.final_interval(metric)
        assert value is not None and interval == pytest.approx(wilson_interval(value * questions, questions))
    low, high = rl.final_interval("val/pass@1") or (1, 0)
    assert low <= rl.final("val/pass@1") <= high  # type: ignore[operator]
    assert sft.final_interval("val/bpb") is None


def test_steps_without_advantages_do_not_change_the_model(pipeline: Path) -> None:
    rows = [row for row in log(pipeline, "grpo") if row["train/loss"]]
    assert [float(row["train/no_signal"]) for row in rows] == [2, 2], "an untrained model solves nothing"
    before = load_model_state(find_checkpoint(pipeline / "chatsft_checkpoints" / "tiny"))
    after = load_model_state(find_checkpoint(pipeline / "chatrl_checkpoints" / "tiny"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_consists_of_sampling_and_training_also_after_an_evaluation(pipeline: Path) -> None:
    for row in (row for row in log(pipeline, "grpo") if row["train/loss"]):
        rollout, training = (float(row[f"train/{name}_seconds"]) for name in ("rollout", "training"))
        assert min(rollout, training) > 0
        assert float(row["train/step_ms"]) > 1000 * (rollout + training) - 1e-6


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_resumes_its_own_run(
    stage: str, pipeline: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    folder = {"sft": "chatsft_checkpoints", "grpo": "chatrl_checkpoints"}[stage]
    last = find_checkpoint(pipeline / folder / "tiny")
    other = f"{stage}_again"
    first = {"sft": 2, "grpo": 1}[stage]
    start = pipeline / folder / "tiny" / f"meta_{first:06d}.json"
    config = {"sft": SFT, "grpo": GRPO}[stage]
    fit(pipeline, other, config, "--ckpt_path", str(start), "--model.tag", other)
    again = find_checkpoint(pipeline / folder / other)
    assert again.step == last.step
    assert not [str(warning.message) for warning in recwarn if "resum" in str(warning.message)]
    expected, actual = load_model_state(last), load_model_state(again)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize(
    ("stage", "old", "new", "message"),
    [
        ("sft", "split: train, size: 16", "split: train, size: 17", "Arithmetic/train: 16 conversations"),
        ("grpo", "split: train, size: 8", "split: train, size: 8, seed: 1", "Arithmetic/train: 8 conversations"),
        ("grpo", "questions_per_step: 2", "questions_per_step: 4", "questions per step: 2, now 4"),
    ],
)
def test_a_stage_does_not_resume_on_other_data(
    stage: str,
    old: str,
    new: str,
    message: str,
    pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    config, folder = {"sft": (SFT, "chatsft_checkpoints"), "grpo": (GRPO, "chatrl_checkpoints")}[stage]
    assert old in config
    (pipeline / "changed.yaml").write_text(config.replace(old, new))
    start = min((pipeline / folder / "tiny").glob("meta_*.json"))
    arguments = ["--config", str(CONFIGS / f"{stage}.yaml"), "--config", str(pipeline / "changed.yaml")]
    assert main(["fit", *arguments, "--ckpt_path", str(start), "--model.tag", "changed"]) == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert "--model.tag" in errors
    assert "Traceback" not in errors
    assert not (pipeline / folder / "changed" / "meta_000002.json").exists()


def test_a_chat_stage_without_a_checkpoint_is_refused(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    (pipeline / "sft.yaml").write_text(SFT)
    assert main(["fit", "--config", str(pipeline / "sft.yaml"), "--model.tag", "none"]) == 2
    assert "--ckpt_path" in capfd.readouterr().err


@pytest.fixture
def rendered(tiny_base: Path, tmp_path: Path) -> tuple[Mixture, Tokenizer, RenderedConversations]:
    tokenizer = Tokenizer.load(tiny_base / "tokenizer")
    mixture = Mixture([MixturePart(Identity("train", size=30)), MixturePart(Arithmetic("train", size=20), epochs=2)])
    conversations = render_all(mixture, tokenizer, 128, tmp_path, title="")
    assert str(conversations).startswith("70 conversations, ")
    return mixture, tokenizer, conversations


def test_every_conversation_is_in_the_plan_once(rendered: tuple[Mixture, Tokenizer, RenderedConversations]) -> None:
    plan = PaddedPlan(rendered[2], 128, 8)
    assert sorted(plan.documents(0, plan.num_rows)) == list(range(70))
    assert sum(plan.loss_tokens(step) for step in range(plan.steps)) == rendered[2].loss_tokens.sum()


def test_a_plan_takes_few_bytes_per_conversation() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 10_000)
    conversations = cast(RenderedConversations, SimpleNamespace(lengths=lengths))
    tracemalloc.start()
    try:
        plan = PaddedPlan(conversations, 64, 8)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(plan.documents(0, plan.num_rows)) == 10_000
    assert held < 20 * 10_000, "8 for its index, and 8 for each row and the spare room of the arrays"


def test_padding_and_masked_rows_equal_those_of_the_batches(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base / "tokenizer")
    # Cut to 48 tokens, some conversations end before the answer.
    render_all(Mixture([MixturePart(Arithmetic("train", size=40))]), tokenizer, 48, tmp_path, title="")
    conversations = RenderedConversations(tmp_path)
    plan = PaddedPlan(conversations, 48, 1)
    batches = PaddedBatches(plan, bos_id=tokenizer.bos_id, micro_batch_size=1, num_batches=plan.num_rows)
    masked = sum(bool((batch["targets"] == IGNORE_INDEX).all()) for batch in batches)
    assert 0 < plan.masked_rows() == masked < plan.num_rows
    assert plan.padded_share() == pytest.approx(1 - conversations.lengths.sum() / (49 * plan.num_rows))


@pytest.mark.parametrize(("rows", "world"), [(8, 1), (4, 2), (2, 1), (1, 4)])
def test_batches_have_the_same_rows_for_every_split(
    rows: int, world: int, rendered: tuple[Mixture, Tokenizer, RenderedConversations]
) -> None:
    mixture, tokenizer, conversations = rendered
    plan = PaddedPlan(conversations, 128, 8)
    ranks = [
        list(PaddedBatches(plan, bos_id=tokenizer.bos_id, micro_batch_size=rows, rank=rank, world_size=world))
        for rank in range(world)
    ]
    batches = [batch for round_ in zip(*ranks, strict=True) for batch in round_]
    inputs = torch.cat([batch["inputs"] for batch in batches])
    targets = torch.cat([batch["targets"] for batch in batches])
    for index in range(plan.num_rows):
        ids, mask = [], []
        for document in plan.documents(index):
            own_ids, own_mask = render_conversation(tokenizer, mixture[document], 128)
            ids += own_ids
            mask += own_mask
        expected = [token if spoken else IGNORE_INDEX for token, spoken in zip(ids, mask, strict=True)]
        expected += [IGNORE_INDEX] * (129 - len(expected))
        assert targets[index].tolist() == expected[1:]
        assert inputs[index, : min(len(ids), 128)].tolist() == ids[:128]
    assert (targets[plan.num_rows :] == IGNORE_INDEX).all()
    live = [int((batch["targets"] != IGNORE_INDEX).sum()) for batch in batches]
    per_step = 8 // rows
    for step in range(plan.steps):
        assert sum(live[step * per_step : (step + 1) * per_step]) == batches[step * per_step]["loss_tokens"]


@pytest.mark.parametrize("steps", [(), ("--trainer.max_steps", "1")])
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_finished_run_has_nothing_to_train(
    name: str,
    steps: tuple[str, ...],
    pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    fit(pipeline, name, {"sft": SFT, "grpo": GRPO}[name], "--ckpt_path", "last", "--model.tag", "tiny", *steps)
    assert "nothing to train" in caplog.text


@pytest.mark.parametrize(("rows", "world"), [(8, 1), (4, 2), (2, 1), (1, 4)])
def test_a_position_is_valid_for_any_number_of_ranks(
    rows: int, world: int, rendered: tuple[Mixture, Tokenizer, RenderedConversations]
) -> None:
    plan = PaddedPlan(rendered[2], 128, 8)

    def batches(micro_batch_size: int, world_size: int, **kwargs: Any) -> list[Batch]:
        loaders = [
            PaddedBatches(plan, bos_id=0, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, **kwargs)
            for rank in range(world_size)
        ]
        return [batch for round_ in zip(*loaders, strict=True) for batch in round_]

    def inputs(batches: list[Batch]) -> torch.Tensor:
        return torch.cat([batch["inputs"] for batch in batches])[: 8 * plan.steps]

    # Two steps of 8 rows are four micro-batches of 2 rows on two ranks.
    states = [batch["state"] for batch in batches(2, 2)[6:8]]
    assert states[0] == states[1]
    unbroken, resumed = inputs(batches(8, 1)), inputs(batches(rows, world, state=states[0]))
    assert torch.equal(resumed[: len(unbroken) - 16], unbroken[16:])
    # The last step is filled up with empty rows, which the position counts.
    assert plan.num_rows % 8
    last = batches(2, 2)[4 * plan.steps - 1]["state"]
    assert len(batches(rows, world, state=last)) == world  # one more than the run has, which is never trained on


def test_truncated_conversations_are_counted(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base / "tokenizer")
    rendered = render_all(Arithmetic("train", size=5), tokenizer, 16, tmp_path, title="")
    assert str(rendered).endswith(" 0 with loss, 5 truncated, 5 without loss")
    assert (rendered.lengths == 16).all()


def test_the_split_into_micro_batches_does_not_change_the_weights(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    # Rounding to bf16, the default where the CPU multiplies it fast, depends on the order of sums.
    monkeypatch.setattr(StageModule, "muon_dtype", lambda self: torch.float32)
    weights = []
    for rows in (8, 2):
        tag = f"rows{rows}"
        options = ("--model.tag", tag, "--data.micro_batch_size", str(rows), "--trainer.max_steps", "2")
        exact = ("--model.compute_dtype", "fp32")
        fit(pipeline, tag, SFT, "--ckpt_path", str(pipeline / "base_checkpoints" / "tiny"), *options, *exact)
        weights.append(load_model_state(find_checkpoint(pipeline / "chatsft_checkpoints" / tag)))
    meta = json.loads(next((pipeline / "chatsft_checkpoints" / "rows2").glob("meta_*.json")).read_text())
    assert meta["step"] == 2
    for name, expected in weights[0].items():
        scale = float(expected.abs().max()) or 1.0
        # On average: Adam takes whole steps for gradients that are rounding errors, so single elements may differ.
        assert float((weights[1][name] - expected).square().mean().sqrt()) < 2e-4 * scale, name


def test_chat_uses_the_latest_stage(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    answers = []
    for _ in range(2):
        assert main(["chat", "-p", "Who are you?", "--max_new_tokens", "12"]) == 0
        out, error = capfd.readouterr()
        assert "rl" in error
        answers.append(out)
    assert answers[0] == answers[1] != "\n"
    base = str(pipeline / "base_checkpoints" / "tiny")
    assert main(["chat", "--checkpoint", base, "--prompt", "Hi", "--max_new_tokens", "2"]) == 0
    assert "pretrain tiny" in capfd.readouterr().err


def test_chat_uses_the_tokenizer_of_the_model(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    ask = ["chat", "-p", "Hi", "--max_new_tokens", "2", "--tokenizer"]
    assert main([*ask, str(pipeline / "tokenizer")]) == 0
    Tokenizer({bytes([byte]): byte for byte in range(256)}).save(tmp_path)
    capfd.readouterr()
    assert main([*ask, str(tmp_path)]) == 2
    assert f"a different tokenizer from the one in {tmp_path}; give its own with" in capfd.readouterr().err


def test_chat_keeps_the_conversation_until_it_is_reset(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    lines = iter(["Hello", "Hello", "/reset", "/nonsense", "Hello", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    prompts = []
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompt, params: prompts.append(prompt) or iter([StreamedToken(1, "x", "text")])
    )
    assert main(["chat"]) == 0
    assert len(prompts) == 3
    assert len(prompts[1]) > len(prompts[0]) == len(prompts[2])
    assert "/nonsense" in capfd.readouterr().err


def test_chat_continues_after_a_too_long_message(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    lines = iter(["Hello", "word " * 4000, "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    answered, stream = [], Engine.stream

    def noted(self: Engine, prompt: list[int], params: SamplingParams) -> Any:
        pieces = stream(self, prompt, params)
        answered.append(self.tokenizer.decode(prompt))
        return pieces

    monkeypatch.setattr(Engine, "stream", noted)
    assert main(["chat", "--max_new_tokens", "4"]) == 0
    assert [prompt.count("Hello") for prompt in answered] == [1, 2]
    assert "word" not in answered[1]
    errors = capfd.readouterr().err
    assert "the model's context of 2560; shorten the message; this message is ignored" in errors


def test_chat_sets_and_removes_a_system_prompt(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    lines = iter(["Hi", "/system Be kind.", "Hi", "/reset", "Hi", "/system", "Hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    prompts = []
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompt, params: prompts.append(prompt) or iter([StreamedToken(1, "x", "text")])
    )
    assert main(["chat"]) == 0
    assert prompts[0] == prompts[3] != prompts[1] == prompts[2]


def test_chat_without_a_model_is_refused_with_the_remedy(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "-p", "Hi"]) == 2
    assert "lmchat fit" in capfd.readouterr().err


def test_validation_renders_only_held_out_conversations(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(pipeline))
    (pipeline / "sft.yaml").write_text(SFT)
    configs = ["--config", str(CONFIGS / "sft.yaml"), "--config", str(pipeline / "sft.yaml")]
    checkpoint = str(pipeline / "chatsft_checkpoints" / "tiny")
    assert main(["validate", *configs, "--ckpt_path", checkpoint, "--model.tag", "judged"]) == 0
    assert [folder.name for folder in (pipeline / "rendered" / "judged").iterdir()] == ["val"]


def test_rendering_again_does_not_change_open_readers(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_base / "tokenizer")
    render_all(Identity("train", size=400), tokenizer, 128, tmp_path, title="")
    running = RenderedConversations(tmp_path)
    before = [tuple(array.tolist() for array in running[index]) for index in range(len(running))]
    render_all(Arithmetic("train", size=3), tokenizer, 128, tmp_path, title="")
    assert [tuple(array.tolist() for array in running[index]) for index in range(len(running))] == before
    assert len(RenderedConversations(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "renderings", "tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions_per_step": 0}, "--data.questions_per_step is 0; it must be at least 1"),
        ({"questions_per_step": -2}, "--data.questions_per_step is -2"),
        ({"num_samples": 0}, "--data.num_samples is 0; it must be at least 2"),
        ({"num_samples": 1}, "--data.num_samples is 1; it must be at least 2"),
        ({"eval_num_samples": 0}, "--data.eval_num_samples is 0"),
        ({"max_new_tokens": 0}, "--data.max_new_tokens is 0"),
        ({"eval_batch_size": 0}, "--data.eval_batch_size is 0; it must be at least 1"),
        ({"temperature": -1.0}, "--data.temperature is -1.0; it must be a number from 0"),
        ({"eval_temperature": float("nan")}, "--data.eval_temperature is nan"),
        ({"top_k": 0}, "--data.top_k is 0; it must be at least 1"),
        ({"seed": -1}, "--data.seed is -1; it must be at least 0"),
        ({"eval_tasks": [Identity("test"), HumanEval()]}, "HumanEval.*programs"),
        ({"eval_task": JSONLConversations("chat.jsonl")}, "has no correct answers"),
    ],
)
def test_impossible_rollouts_are_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutDataModule([MixturePart(Arithmetic())], **{"eval_task": Arithmetic("test"), **options})


def test_evaluation_tasks_of_the_same_name_are_refused() -> None:
    tasks: list[Task] = [Arithmetic("test", steps=(1, 1)), Identity("test"), Arithmetic("test", steps=(2, 2))]
    with pytest.raises(UserError, match=r"Arithmetic/test, Identity/test, Arithmetic/test.*leave one of them out"):
        SFTDataModule([MixturePart(Identity())], [MixturePart(Identity("test"))], tasks)


def test_fine_tuning_without_validation(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    assert main(["fit", *config_options(base, "{trainer: {max_steps: 1}, model: {init_args: {tag: tiny}}}")]) == 0
    (base / "sft.yaml").write_text(
        """
trainer: {accelerator: cpu, devices: 1}
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args: {train: [{task: {class_path: Identity, init_args: {split: train, size: 20}}}], val: []}
samples: {max_new_tokens: 0}
"""
    )
    options = ["--config", str(base / "sft.yaml"), "--ckpt_path"]
    assert main(["fit", *options, str(base / "base_checkpoints" / "tiny")]) == 0
    assert (base / "chatsft_checkpoints" / "tiny").is_dir()
    capsys.readouterr()
    assert main(["validate", *options, str(base / "chatsft_checkpoints" / "tiny")]) == 2
    assert "--data.val is empty" in capsys.readouterr().err
