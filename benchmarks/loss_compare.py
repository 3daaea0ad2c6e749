"""Proves a refactor: trains a few steps at two revisions on the same text and compares every loss.

    python benchmarks/loss_compare.py REVISION_A REVISION_B

Each revision is checked out beside the repository and run with its own source through `lmchat`. Equal losses print
"identical" and exit 0; the first step that differs is named, and the exit status is 1.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = 20
FIT = f"""
trainer: {{accelerator: cpu, devices: 1, max_steps: {STEPS}}}
model:
  class_path: PretrainModule
  init_args: {{depth: 2, sequence_len: 64, head_dim: 32, window_pattern: SL, global_batch_tokens: 512, compile: false}}
data:
  class_path: FineWebDataModule
  init_args: {{micro_batch_size: 4, eval_tokens: 1024}}
monitor: {{every_n_steps: 1}}
samples: {{max_new_tokens: 0}}
"""


def write_text(folder: Path) -> None:
    """The language reference that every Python carries, one file a topic."""
    folder.mkdir()
    for name, text in topics.topics.items():
        (folder / f"{name}.txt").write_text(text)


def check_out(revision: str, folder: Path) -> str:
    """A worktree of `revision`; returns its commit."""
    command = ["git", "worktree", "add", "--quiet", "--detach", folder, revision]
    if (done := subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)).returncode:
        sys.exit(f"cannot check out {revision}: {done.stderr.strip()}")
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder, text=True).strip()


def losses(source: Path, base: Path, text: Path, config: Path) -> list[str]:
    """The loss of every step, as printed in full precision, of a run with the code in `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "LMCHAT_BASE_DIR": str(base)}

    def lmchat(*args: str) -> None:
        done = subprocess.run([sys.executable, "-m", "lmchat", *args], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"`lmchat {' '.join(args)}` failed in {source}:\n{done.stderr[-2000:]}")

    lmchat("data", "import", str(text))
    lmchat("tokenizer", "train", "--vocab_size", "512")
    lmchat("fit", "--config", str(config))
    (metrics,) = base.rglob("metrics.csv")
    with metrics.open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")]


def main(revisions: list[str]) -> int:
    if len(revisions) != 2:
        print("usage: make loss-compare A=revision B=revision", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_text(folder / "text")
        (folder / "fit.yaml").write_text(FIT)
        runs, trees = [], [folder / f"tree_{index}" for index in range(2)]
        try:
            for index, (revision, tree) in enumerate(zip(revisions, trees, strict=True)):
                commit = check_out(revision, tree)
                runs.append(losses(tree / "src", folder / f"base_{index}", folder / "text", folder / "fit.yaml"))
                print(f"{revision} ({commit}): {len(runs[-1])} losses, first {runs[-1][0]}, last {runs[-1][-1]}")
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=REPOSITORY, capture_output=True)
    if runs[0] == runs[1] and len(runs[0]) == STEPS:
        print("identical")
        return 0
    step = next((i for i, (a, b) in enumerate(zip(*runs, strict=False)) if a != b), min(map(len, runs)))
    print(f"different from step {step + 1} on: {[run[step : step + 1] for run in runs]}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
