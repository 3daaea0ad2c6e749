from __future__ import annotations

import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from forked import exit_statuses, lmchat, start
from lmchat.commands.demo import demo
from lmchat.demo import pipeline, training
from lmchat.demo import run as demo_run
from lmchat.demo import text as demo_text
from lmchat.demo.run import Demo
from lmchat.demo.tasks.stories import FAMILIES
from lmchat.serve.terminal import TerminalChat
from lmchat.stage_table import STAGES
from lmchat.types import UserError

PRETRAIN = """
seed_everything: 1
trainer: {accelerator: cpu, max_steps: 4}
model:
  class_path: PretrainModule
  init_args: {depth: 1, sequence_len: 128, aspect_ratio: 32, head_dim: 16, window_pattern: L, global_batch_tokens: 512}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 4, eval_tokens: 1024}}
scaling_laws: {lr_scale: 1.0}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
"""
SFT = """
seed_everything: 1
trainer: {accelerator: cpu}
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args:
    micro_batch_size: 4
    eval_tokens: 1024
    eval_max_new_tokens: 2
    train: [task: {class_path: SimpleSpelling, init_args: {size: 8}}]
    val: [task: {class_path: SimpleSpelling, init_args: {size: 4}}]
    eval_tasks:
      - {class_path: Identity, init_args: {split: test, size: 2}}
      - {class_path: SimpleSpelling, init_args: {split: test, size: 2}}
      - {class_path: SpellingBee, init_args: {split: test, size: 2}}
      - {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 2, families: %(taught)s}}
      - {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 2, families: %(new)s}}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
"""
GRPO = """
seed_everything: 1
trainer: {accelerator: cpu, max_steps: 2}
model: {class_path: GRPOModule}
data:
  class_path: RolloutDataModule
  init_args:
    questions_per_step: 1
    num_samples: 2
    max_new_tokens: 3
    eval_num_samples: 1
    train: [{task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {size: 8}}}]
    eval_task: {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 2, families: %(new)s}}
    eval_tasks:
      - {class_path: Identity, init_args: {split: test, size: 2}}
      - {class_path: SimpleSpelling, init_args: {split: test, size: 2}}
      - {class_path: SpellingBee, init_args: {split: test, size: 2}}
      - {class_path: lmchat.demo.tasks.Arithmetic, init_args: {split: test, size: 2, families: %(taught)s}}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
"""


FAMILY_LISTS = {"taught": [*FAMILIES][:12], "new": [*FAMILIES][12:]}


@pytest.fixture(autouse=True)
def tiny_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for stage, config in (("pretrain", PRETRAIN), ("sft", SFT), ("rl", GRPO)):
        (tmp_path / "configs" / f"{stage}.yaml").write_text(config % FAMILY_LISTS)
    monkeypatch.setattr(demo_run, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(demo_text, "VOCAB_SIZE", 300)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(100)]
    for number in range(80):
        (folder / f"{number}.txt").write_text(" ".join(rng.choices(words, k=60)))
    return folder


@pytest.fixture
def forked_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainings run in forked processes, which start faster."""

    def popen(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "lmchat"]
        process = start(lmchat, *command[3:], output=tmp_path / "stages.txt", environment=env)
        return SimpleNamespace(wait=lambda: exit_statuses([process])[0])

    monkeypatch.setattr(demo_run, "subprocess", SimpleNamespace(Popen=popen))


def fake_stages(monkeypatch: pytest.MonkeyPatch, calls: list[str], failing: str | None = None) -> None:
    def stage(name: str):
        def work(run: Demo) -> dict[str, float]:
            calls.append(name)
            if name == failing:
                raise UserError("the disk is full")
            return dict.fromkeys(["gzip_bpb", "xz_bpb", "ngram_bpb"], 2.0) if name == "baselines" else {"steps": 7}

        return work

    names = ("corpus", "baselines", "pretrain")
    monkeypatch.setattr(pipeline, "STAGES", {name: (name, stage(name)) for name in names})
    monkeypatch.setattr(pipeline, "result_tables", lambda run, summary: [])


@pytest.mark.usefixtures("forked_stages")
def test_a_user_trains_on_a_folder_of_text(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real stages through the real entry point, for a few steps and with short answers; then again."""
    monkeypatch.setattr(
        "lmchat.serve.terminal.TerminalChat",
        lambda engine, params: TerminalChat(engine, dataclasses.replace(params, max_new_tokens=4)),
    )
    output = tmp_path / "a run"
    demo(text=text, output=output)
    first_out = capfd.readouterr().out
    assert "measuring gzip, xz and an n-gram model on the text" in first_out
    summary = json.loads((output / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == list(pipeline.STAGES)
    assert stages["corpus"]["documents"] == 80
    assert stages["tokenizer"]["vocab_size"] == 300
    assert stages["tokens"]["tokens"] > 1000
    assert stages["pretrain"]["tokens"] == 4 * 512
    assert stages["pretrain"]["tokens_per_second"] > 0
    assert 0 < stages["pretrain"]["bpb_after"] < stages["pretrain"]["bpb_before"] < 8
    assert 0 < stages["baselines"]["ngram_bpb"] < stages["baselines"]["gzip_bpb"] < 8
    assert summary["minutes"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()) / 60, abs=0.01)
    assert [path.name for path in (output / "base_checkpoints" / "demo").glob("meta_*")] == ["meta_000004.json"]
    skills = ("identity", "spelling", "counting", "arithmetic_taught", "arithmetic_pass_at_1")
    assert all(0 <= stages[stage][skill] <= 1 for stage in ("sft", "rl") for skill in skills)
    assert stages["rl"]["steps"] == 2
    assert 2 <= stages["rl"]["tokens"] <= 2 * 2 * 3
    assert stages["conversation"]["questions"] == 6
    assert "bits per byte, held out" in (output / "report.html").read_text()
    assert "bits per byte, held out" in first_out
    assert "gzip, bits per byte" in first_out
    next_command, serving = first_out.strip().splitlines()[-2:]
    assert serving.endswith(" serve")
    variable, program, command = shlex.split(next_command)
    assert (Path(program).resolve().name, command) == ("lmchat", "chat") and Path(program).is_file()
    arguments = (command, "-p", "Who are you?", "--max_new_tokens", "3")
    talked = tmp_path / "talked.txt"
    assert exit_statuses([start(lmchat, *arguments, output=talked, environment=dict([variable.split("=")]))]) == [0]
    assert "rl demo, step 2" in talked.read_text()

    demo(text=text, output=output)
    assert json.loads((output / "summary.json").read_text()) == summary
    assert capfd.readouterr().out.count("done in an earlier run") == len(stages)


@pytest.mark.usefixtures("forked_stages")
def test_metrics_of_the_last_step_are_evaluated_if_not_logged(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    run = Demo(tmp_path / "run", text, 15)
    for stage in (demo_text.collect_text, demo_text.train_tokenizer, demo_text.tokenize):
        stage(run)
    logged = training.pretrain(run)
    log = next((run.output / "logs").rglob("metrics.csv"))
    header, *rows = log.read_text().splitlines()
    steps, bits = header.split(",").index("step"), header.split(",").index("val/bpb")
    evaluations = [row for row in rows if row.split(",")[bits]]
    assert [row.split(",")[steps] for row in evaluations] == ["0", "4"]
    # Without the evaluations, the last record is not that of the last step.
    kept = [row for row in rows if row not in evaluations and row.split(",")[steps] != "4"]
    stale = evaluations[0].split(",")
    stale[steps], stale[bits] = "2", "9.0"
    log.write_text("\n".join([header, *kept, ",".join(stale)]) + "\n")
    run_command = training.lmchat
    monkeypatch.setattr(training, "lmchat", lambda run, name, *rest: name == "fit" or run_command(run, name, *rest))
    measured = training.pretrain(run)
    assert measured["steps"] == 4
    assert "bpb_before" not in measured
    assert measured["bpb_after"] == pytest.approx(logged["bpb_after"], abs=1e-3)


def test_ctrl_c_waits_for_the_checkpoint(text: Path, tmp_path: Path) -> None:
    """Both processes get the signal, as in a terminal; the trainer takes longer than subprocess's 0.25 s."""
    trainer, driver = tmp_path / "trainer.sh", tmp_path / "driver.py"
    trainer.write_text(
        "#!/bin/sh\ncd " + shlex.quote(str(tmp_path)) + "\n"
        "trap 'sleep 0.5; touch saved; exit 1' INT\ntouch started\nwhile :; do sleep 0.1; done\n"
    )
    trainer.chmod(0o755)
    driver.write_text(
        "import sys\nfrom pathlib import Path\nfrom lmchat.__main__ import main\nfrom lmchat.demo import pipeline\n"
        f"import lmchat.demo.run\nlmchat.demo.run.CONFIGS = Path({str(demo_run.CONFIGS)!r})\n"
        "pipeline.STAGES = {'pretrain': pipeline.STAGES['pretrain']}\n"
        f"sys.executable = {str(trainer)!r}\n"
        f"sys.exit(main(['demo', '--output', {str(tmp_path / 'run')!r}]))\n"
    )
    # A shell's background job ignores the signal, and its children inherit that.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, str(driver)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "saved").exists()
    assert process.returncode == 130
    assert "Run the same command again to continue" in printed


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_one_small_file_is_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, newline: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_text, "VOCAB_SIZE", 4096)
    (tmp_path / "book").mkdir()
    paragraphs = [f"Paragraph {number}.{newline}Its second line says {number**2}." for number in range(60)]
    (tmp_path / "book" / "it.txt").write_bytes((newline * 2).join(paragraphs).encode())
    run = Demo(tmp_path / "run", tmp_path / "book", 15)
    assert demo_text.collect_text(run)["documents"] == 60
    size = demo_text.train_tokenizer(run)["vocab_size"]
    assert 265 < size < 4096
    assert f"the tokenizer has {size}" in capfd.readouterr().out
    assert demo_text.tokenize(run)["validation_tokens"] > 0


def test_separators_depend_on_number_and_length_of_files(text: Path, tmp_path: Path) -> None:
    assert demo_text._separator(text) is None
    for path in text.iterdir():
        path.write_text("A paragraph.\n\n" * 500)
    assert demo_text._separator(text) == "\n\n"
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree")
    assert demo_text._separator(tmp_path / "lines.txt") == "\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_derives_the_output_folder_from_the_text() -> None:
    def command_line(*variables: str) -> list[str]:
        root = Path(__file__).resolve().parents[2]
        # The test may run under make, whose flags must not be inherited.
        environment = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
        shown = subprocess.run(
            ["make", "-n", "-o", ".venv/.installed", "demo", *variables],
            cwd=root, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return shlex.split(shown.stdout.strip().splitlines()[-1])[1:]

    assert command_line() == ["demo", "--output", "runs/demo"]
    assert command_line("TEXT=/a b/my books") == ["demo", "--output", "runs/demo-my books", "--text", "/a b/my books"]
    assert command_line("TEXT=x", "OUTPUT=o p") == ["demo", "--output", "o p", "--text", "x"]


def test_a_failed_stage_is_reported_and_resumed(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    fake_stages(monkeypatch, calls, failing="pretrain")
    with pytest.raises(UserError, match="disk is full"):
        demo(text=text, output=tmp_path / "run")
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]) == ["corpus", "baselines"]
    fake_stages(monkeypatch, calls)
    demo(text=text, output=tmp_path / "run")
    assert calls == ["corpus", "baselines", "pretrain", "pretrain"]


def test_a_failing_training_names_the_stage(text: Path, tmp_path: Path) -> None:
    config = tmp_path / "configs" / "pretrain.yaml"
    config.write_text(PRETRAIN.replace("depth: 1,", f"depth: {10**9},"))  # refused before torch is imported
    with pytest.raises(UserError, match="stage pretrain failed with exit status 2"):
        demo(text=text, output=tmp_path / "run")


def test_another_recipe_is_refused(monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path) -> None:
    fake_stages(monkeypatch, [])
    demo(text=text, output=tmp_path / "run")
    with pytest.raises(UserError, match=r"another text; delete it.*OUTPUT="):
        demo(text=tmp_path, output=tmp_path / "run")
    (tmp_path / "configs" / "pretrain.yaml").write_text(PRETRAIN.replace("max_steps: 4", "max_steps: 5"))
    with pytest.raises(UserError, match=r"another config of pretrain"):
        demo(text=text, output=tmp_path / "run")


def test_a_folder_with_other_files_is_refused(text: Path) -> None:
    before = sorted(text.iterdir())
    with pytest.raises(UserError, match="is not the output of a demo"):
        demo(output=text)
    assert sorted(text.iterdir()) == before


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": 1}'])
def test_a_damaged_summary_is_reported(content: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary.json is damaged or was not written by a demo .*; delete .*--output"):
        demo(text, tmp_path)


def test_minutes_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--minutes is -1; give a time budget"):
        demo(None, tmp_path, minutes=-1)


def test_training_sees_no_network(tmp_path: Path) -> None:
    environment = Demo(tmp_path, None, 15).environment()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["LMCHAT_BASE_DIR"] == str(tmp_path)


def test_the_recipe_names_all_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    assert set(Demo(tmp_path, None, 15).recipe()) == {
        "text",
        "vocab_size",
        *(f"config of {stage}" for stage in STAGES),
    }
