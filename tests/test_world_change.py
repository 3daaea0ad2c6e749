"""A run continued on 4, 2, 1 and 3 processes equals an uninterrupted run of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from killable_fit import start_fit
from lmchat.checkpoint.load import find_checkpoint, load_model_state

MICRO_BATCHES = 12
CONFIG = """
trainer: {{accelerator: cpu, max_steps: {steps}, callbacks: [{callbacks}]}}
model:
  class_path: float64.Float64Pretrain
  init_args:
    {{depth: 2, sequence_len: 32, aspect_ratio: 32, head_dim: 32, window_pattern: SL, global_batch_tokens: 384}}
data:
  class_path: FineWebDataModule
  init_args: {{micro_batch_size: 1, eval_tokens: 128, buffer_size: 20}}
eval: {{every_n_steps: 0, at_start: false, at_end: false}}
samples: {{max_new_tokens: 0}}
checkpoint: {{every_n_steps: 100}}
"""


def fit(base: Path, tiny_base: Path, world_size: int, steps: int, stop_after: int | None = None) -> None:
    """Trains, from the last checkpoint if there is one, until a preemption after ``stop_after`` more steps."""
    for name in ("base_data", "tokenizer"):
        if not (base / name).exists():
            (base / name).symlink_to(tiny_base / name)
    callbacks = [f"{{class_path: faults.Diary, init_args: {{directory: {base}}}}}"]
    if stop_after is not None:
        count = stop_after * MICRO_BATCHES // world_size - 1
        fault = f"{{deed: SIGTERM, rank: {world_size - 1}, hook: on_train_batch_start, count: {count}}}"
        callbacks.append(f"{{class_path: faults.Fault, init_args: {fault}}}")
    config = base / "tiny.yaml"
    config.write_text(CONFIG.format(steps=steps, callbacks=", ".join(callbacks)))
    resume = ["--ckpt_path", "last"] if (base / "base_checkpoints").exists() else []
    ranks = start_fit(["--config", str(config), "--trainer.devices", str(world_size), *resume], base, world_size)
    for rank in ranks:
        rank.join(250)
    hanging = [rank for rank in ranks if rank.is_alive()]
    for rank in hanging:
        rank.kill()
    text = "\n".join(path.read_text()[-3000:] for path in base.glob("output_rank*.txt"))
    assert [rank.exitcode for rank in ranks] == [0 if stop_after is None else 143] * world_size, text


def diary(base: Path) -> dict[tuple[int, int], tuple[str, float]]:
    """Contents and loss of each micro-batch of all runs in ``base``, by step and position in the step."""
    entries: dict[tuple[int, int], tuple[str, float]] = {}
    for path in base.glob("diary_*.txt"):
        for line in path.read_text().splitlines():
            step, place, content, loss = line.split()
            assert (int(step), int(place)) not in entries, "a micro-batch was trained on twice"
            entries[int(step), int(place)] = content, float.fromhex(loss)
    return entries


@pytest.mark.parametrize(
    "worlds",
    [
        ((1, 1), (3, 1)),
        pytest.param(((2, 1), (1, 1), (3, 1)), marks=pytest.mark.slow),
        pytest.param(((4, 2), (2, 2), (1, 2), (3, 2)), marks=pytest.mark.slow),
        pytest.param(((3, 1), (4, 2), (1, 1), (2, 3)), marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_number_of_processes(
    worlds: tuple[tuple[int, int], ...], tiny_base: Path, tmp_path: Path
) -> None:
    steps = sum(count for _, count in worlds)
    unbroken, changing = tmp_path / "unbroken", tmp_path / "changing"
    unbroken.mkdir()
    changing.mkdir()
    fit(unbroken, tiny_base, 1, steps)
    for world_size, count in worlds[:-1]:
        fit(changing, tiny_base, world_size, steps, stop_after=count)
    fit(changing, tiny_base, worlds[-1][0], steps)
    expected, found = diary(unbroken), diary(changing)
    assert found.keys() == expected.keys() == {(s, k) for s in range(steps) for k in range(MICRO_BATCHES)}
    # Some documents of the small corpus are equal, and so are some rows, but most positions can be identified.
    assert len({content for content, _ in expected.values()}) > len(expected) / 3
    for place, (content, loss) in expected.items():
        assert found[place][0] == content
        assert found[place][1] == pytest.approx(loss, rel=1e-9), place
    weights = [load_model_state(find_checkpoint(base / "base_checkpoints" / "d2")) for base in (unbroken, changing)]
    for name, tensor in weights[0].items():
        distance = torch.linalg.vector_norm(weights[1][name] - tensor) / torch.linalg.vector_norm(tensor)
        assert distance < 1e-9, name
