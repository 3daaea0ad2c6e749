"""Proves a refactor: trains all stages at two revisions on the same text and compares every loss and every weight.

    python benchmarks/loss_compare.py REVISION_A REVISION_B

Each revision is checked out beside the repository and runs pretraining, fine-tuning and reinforcement learning through
`lmchat`, with one process and with two (zero2_muon). Equal losses and weights print "identical" and exit 0; the first
step that differs is named, and the exit status is 1.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

import torch

SAME_KERNELS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""No bf16 units, so that "auto" means fp32 on every x86 CPU."""
REPOSITORY = Path(__file__).resolve().parent.parent
COMMON = """
trainer: {accelerator: cpu, max_steps: STEPS}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
"""
STAGES = {
    "pretrain": """
model:
  class_path: PretrainModule
  init_args:
    {depth: 2, sequence_len: 64, head_dim: 32, window_pattern: SL, global_batch_tokens: 512, compute_dtype: fp32}
data:
  class_path: FineWebDataModule
  init_args: {micro_batch_size: 4, eval_tokens: 1024}
""",
    "sft": """
model: {class_path: SFTModule, init_args: {compute_dtype: fp32}}
data:
  class_path: SFTDataModule
  init_args:
    train: [{task: {class_path: Identity, init_args: {split: train, size: 300}}}]
    val: [{task: {class_path: Identity, init_args: {split: test, size: 20}}}]
    eval_tasks: [{class_path: SpellingBee, init_args: {split: test, size: 4}}]
    eval_max_new_tokens: 8
    eval_tokens: 1024
""",
    "rl": """
model: {class_path: GRPOModule, init_args: {compute_dtype: fp32}}
data:
  class_path: RolloutDataModule
  init_args:
    train: [{task: {class_path: loss_compare_task.Parity, init_args: {split: train, size: 300}}}]
    eval_task: {class_path: Identity, init_args: {split: test, size: 4}}
    questions_per_step: 2
    num_samples: 4
    eval_num_samples: 2
    max_new_tokens: 12
""",
}
"""Stage by name: its config."""
TASK = """
from lmchat.tasks import Identity


class Parity(Identity):
    def reward(self, conversation, completion):
        return float(sum(completion.encode()) % 2)
"""
"""A task for RL: the answers of an untrained model are rewarded by their letters, so that samples have advantages."""
STEPS = {"pretrain": 20, "sft": 8, "rl": 6}
FOLDERS = {"pretrain": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
PREDECESSOR = {"sft": "pretrain", "rl": "sft"}


def write_text(folder: Path) -> None:
    """Writes Python's language reference, one file per topic."""
    folder.mkdir()
    for name, text in topics.topics.items():
        (folder / f"{name}.txt").write_text(text)


def check_out(revision: str, folder: Path) -> str:
    """A worktree of `revision`; returns its commit."""
    command = ["git", "worktree", "add", "--quiet", "--detach", folder, revision]
    if (done := subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)).returncode:
        sys.exit(f"cannot check out {revision}: {done.stderr.strip()}")
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True).strip()


def run(source: Path, base: Path, text: Path, configs: Path) -> dict[str, tuple[list[str], dict[str, torch.Tensor]]]:
    """The losses of every step, as logged in full precision, and the final weights of each run with ``source``."""
    environment = {**os.environ, **SAME_KERNELS, "PYTHONPATH": f"{source}:{configs}", "LMCHAT_BASE_DIR": str(base)}

    def lmchat(*args: str) -> None:
        done = subprocess.run([sys.executable, "-m", "lmchat", *args], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"`lmchat {' '.join(args)}` failed in {source}:\n{done.stderr[-2000:]}")

    lmchat("data", "import", str(text))
    lmchat("tokenizer", "train", "--vocab_size", "512")
    lmchat("data", "words")
    results = {}
    for ranks in (1, 2):
        for stage in STAGES:
            options = ["--trainer.devices", str(ranks), "--model.tag", f"ranks{ranks}"]
            options += ["--trainer.strategy", "zero2_muon"] if ranks > 1 else []
            if stage in PREDECESSOR:
                options += ["--ckpt_path", str(base / FOLDERS[PREDECESSOR[stage]] / f"ranks{ranks}")]
            known = set(base.rglob("metrics.csv"))
            lmchat("fit", "--config", str(configs / f"{stage}.yaml"), *options)
            (metrics,) = set(base.rglob("metrics.csv")) - known
            with metrics.open() as file:
                losses = [row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")]
            if not any(map(float, losses)):
                sys.exit(f"{stage} has losses of 0 only, which compare nothing")
            (weights,) = (base / FOLDERS[stage] / f"ranks{ranks}").glob("model_*.pt")
            results[f"{stage}, {ranks} process(es)"] = losses, torch.load(weights, weights_only=True)
    return results


def difference(
    a: tuple[list[str], dict[str, torch.Tensor]], b: tuple[list[str], dict[str, torch.Tensor]]
) -> str | None:
    """The first difference of two runs; None if there is none."""
    for step, (first, second) in enumerate(zip(*(losses for losses, _ in (a, b)), strict=True), start=1):
        if first != second:
            return f"different from step {step} on: loss {first} and {second}"
    names = [name for name, weight in a[1].items() if not torch.equal(weight, b[1][name])]
    return f"equal losses, different weights: {names}" if names or a[1].keys() != b[1].keys() else None


def main(revisions: list[str]) -> int:
    if len(revisions) != 2:
        print("usage: make loss-compare A=revision B=revision", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_text(folder / "text")
        for stage, config in STAGES.items():
            (folder / f"{stage}.yaml").write_text(COMMON.replace("STEPS", str(STEPS[stage])) + config)
        (folder / "loss_compare_task.py").write_text(TASK)
        runs, trees = [], [folder / f"tree_{index}" for index in range(2)]
        try:
            for index, (revision, tree) in enumerate(zip(revisions, trees, strict=True)):
                commit = check_out(revision, tree)
                runs.append(run(tree / "src", folder / f"base_{index}", folder / "text", folder))
                print(
                    f"{revision} ({commit}): {', '.join(f'{name} {len(r[0])} losses' for name, r in runs[-1].items())}"
                )
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=REPOSITORY, capture_output=True)
    found = {name: difference(runs[0][name], runs[1][name]) for name in runs[0]}
    for name, what in found.items():
        print(f"{name}: {what or 'identical'}")
    return any(found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
