"""Twenty steps of d12 on one card, without a network: tokens/s, utilisation, memory.

    python benchmarks/gpu_run.py [DEPTH]

Trains a tokenizer and the model on random words, packed as documents of web-like lengths. The last lines are the card
and the median of the second half of the steps, after compilation. Never run on a GPU so far.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

STEPS = 20


def write_random_text(folder: Path) -> None:
    """Three shards of words drawn at random, some 12 M characters."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    words = np.array(["".join(map(chr, random.integers(97, 123, random.integers(2, 9)))) for _ in range(20_000)])
    for shard in range(3):
        lengths = random.lognormal(6, 1, 1500).astype(int) + 10
        texts = [" ".join(random.choice(words, length)) for length in lengths]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard:05d}.parquet")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; this benchmark needs one")
    depth = sys.argv[1] if len(sys.argv) > 1 else "12"
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        write_random_text(base / "base_data")
        environment = {**os.environ, "LMCHAT_BASE_DIR": str(base), "HF_HUB_OFFLINE": "1"}
        config = Path(__file__).resolve().parent.parent / "configs" / "d12_pretrain.yaml"
        fit = f"fit --config {config} --model.depth {depth} --trainer.max_steps {STEPS} --trainer.devices 1"
        quick = "--monitor.every_n_steps 1 --samples.max_new_tokens 0 --data.eval_tokens 524288"
        for command in ("tokenizer train --vocab_size 32768", f"{fit} {quick}"):
            subprocess.run([sys.executable, "-m", "lmchat", *command.split()], env=environment, check=True)
        (metrics,) = base.rglob("metrics.csv")
        with metrics.open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    steady = rows[STEPS // 2 :]
    speed, mfu = (
        statistics.median(float(row[f"train/{name}"]) for row in steady) for name in ("tokens_per_second", "mfu")
    )
    memory = max(float(row["train/memory_gb"]) for row in rows)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, depth {depth}")
    print(f"{speed:,.0f} tokens/s, {100 * mfu:.1f} % MFU, {memory:.1f} GB, loss {rows[-1]['train/loss']}")


if __name__ == "__main__":
    main()
