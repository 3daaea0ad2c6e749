"""The make targets of the full pipeline, shrunk: what is finished is left alone, what was killed goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = {
    "PRETRAIN": """
trainer: {accelerator: cpu, max_steps: 20}
model: {class_path: PretrainModule, init_args: {depth: 9, sequence_len: 64, head_dim: 32, global_batch_tokens: 256}}
data: {class_path: FineWebDataModule, init_args: {micro_batch_size: 4, eval_tokens: 256}}
checkpoint: {every_n_steps: 1}
samples: {max_new_tokens: 0}
""",
    "SFT": """
trainer: {accelerator: cpu, max_steps: 3}
model: {class_path: SFTModule}
data:
  class_path: SFTDataModule
  init_args:
    eval_tokens: 256
    train:
      - task: {class_path: JSONLConversations, init_args: {path: FOLDER/chat.jsonl}}
      - task: {class_path: GSM8K, init_args: {path: FOLDER/problems.jsonl}}
      - task: {class_path: SimpleSpelling, init_args: {size: 10}}
    val: [{task: {class_path: JSONLConversations, init_args: {path: FOLDER/chat.jsonl}}}]
samples: {max_new_tokens: 0}
""",
    "RL": """
trainer: {accelerator: cpu, max_steps: 2}
model: {class_path: GRPOModule}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: GSM8K, init_args: {path: FOLDER/problems.jsonl}}}]
    eval_task: {class_path: GSM8K, init_args: {path: FOLDER/problems.jsonl, stop: 2}}
    questions_per_step: 2
    num_samples: 2
    eval_num_samples: 2
    max_new_tokens: 4
samples: {max_new_tokens: 0}
""",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("make") is None, reason="there is no make"),
]


class Pipeline:
    """A base folder, and make with everything shrunk."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
        problem = {"question": "How many are 1 and 1?", "answer": "They are <<1+1=2>>2.\n#### 2"}
        (folder / "chat.jsonl").write_text((json.dumps(chat) + "\n") * 20)
        (folder / "problems.jsonl").write_text((json.dumps(problem) + "\n") * 8)
        for name, text in CONFIGS.items():
            (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
        from pydoc_data.topics import topics

        texts = folder / "texts"
        texts.mkdir()
        for name, text in topics.items():
            (texts / f"{name}.txt").write_text(text)
        variables = {"DEPTH": 1, "DEVICES": 1, "VOCAB_SIZE": 400, "BASE": self.base, "TEXT": texts, "VENV": sys.prefix}
        configs = {name: folder / f"{name}.yaml" for name in CONFIGS}
        self.variables = [f"{name}={value}" for name, value in {**variables, **configs}.items()]

    def start(self, target: str) -> subprocess.Popen[str]:
        # The test itself may run under make, which would pass on its flags.
        environment = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
        return subprocess.Popen(
            ["make", "-o", f"{sys.prefix}/.installed", target, *self.variables],
            cwd=REPOSITORY,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def make(self, target: str) -> str:
        process = self.start(target)
        printed, _ = process.communicate(timeout=3000)
        assert process.returncode == 0, printed
        return printed

    def files(self) -> dict[str, int]:
        """Every file of the stages with its time of change."""
        folders = ("tokenizer", "base_checkpoints", "chatsft_checkpoints", "chatrl_checkpoints", "evaluations", "logs")
        paths = [path for folder in folders for path in (self.base / folder).rglob("*") if path.is_file()]
        return {str(path): path.stat().st_mtime_ns for path in paths if path.name != ".lock"}


def test_a_killed_speedrun_goes_on_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path)
    process = pipeline.start("speedrun")
    awaited = pipeline.base / "base_checkpoints" / "d1" / "meta_000002.json"
    deadline = time.monotonic() + 1200
    while not awaited.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    printed, _ = process.communicate()
    assert awaited.exists(), printed
    tokenizer = pipeline.base / "tokenizer" / "tokenizer.json"
    trained = tokenizer.stat().st_mtime_ns
    kept = awaited.stat().st_mtime_ns
    assert not (pipeline.base / "evaluations").exists()

    printed = pipeline.make("speedrun")
    assert "tokenizer: finished" in printed
    assert (tokenizer.stat().st_mtime_ns, awaited.stat().st_mtime_ns) == (trained, kept), "made again"
    for folder, steps in {"base": 20, "chatsft": 3, "chatrl": 2}.items():
        assert (pipeline.base / f"{folder}_checkpoints" / "d1" / f"meta_{steps:06d}.json").exists()
    reports = {path.name: path.read_text() for path in (pipeline.base / "evaluations").iterdir()}
    assert sorted(reports) == ["d1_pretrain.txt", "d1_rl.txt", "d1_sft.txt"]
    assert "val/bpb" in reports["d1_pretrain.txt"]
    assert "val/bpb" in reports["d1_sft.txt"]
    assert "val/pass@1" in reports["d1_rl.txt"]
    assert "make chat" in printed

    before = pipeline.files()
    printed = pipeline.make("speedrun")
    assert pipeline.files() == before
    for stage in ("pretrain", "sft", "grpo"):
        assert f"{stage} d1 is finished" in printed
