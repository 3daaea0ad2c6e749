"""`lmchat fit` on damaged checkpoints of two ranks: `last` falls back to an older step, an explicit step is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from killable_fit import start_fit
from lmchat.checkpoint.load import find_checkpoint, load_model_state
from tiny_fit import config_options

CONFIG = """
trainer: {strategy: zero2_muon, max_steps: 4}
eval: {every_n_steps: 100}
checkpoint: {every_n_steps: 2}
"""
PATIENCE_SECONDS = 240.0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_text('{"format": 1}')


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "altered": flip_a_bit,
    "missing": Path.unlink,
    "empty": empty,
}
FILES = ["model_000004.pt", "optim_000004_rank0.pt", "optim_000004_rank1.pt", "meta_000004.json"]
QUICK = [("optim_000004_rank1.pt", "altered"), ("meta_000004.json", "missing")]
CASES = [
    pytest.param(file, damage, id=f"{name}-{file}", marks=[] if (file, name) in QUICK else pytest.mark.slow)
    for file in FILES
    for name, damage in [*DAMAGE.items(), ("garbled", garble)][: 5 if file.endswith("json") else 4]
]


def fit(base: Path, world_size: int, *options: str) -> tuple[list[int | None], str]:
    """Exit status and output of the ranks."""
    args = [*config_options(base, CONFIG), "--trainer.devices", str(world_size), *options]
    ranks = start_fit(args, base, world_size)
    for rank in ranks:
        rank.join(PATIENCE_SECONDS)
        assert not rank.is_alive()
    output = "".join((base / f"output_rank{rank}.txt").read_text() for rank in range(world_size))
    return [rank.exitcode for rank in ranks], output


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks' run of four steps, with checkpoints of the steps 2 and 4."""
    base = tmp_path_factory.mktemp("finished")
    for name in ("base_data", "tokenizer"):
        (base / name).symlink_to(tiny_base / name)
    statuses, output = fit(base, 2)
    assert statuses == [0, 0], output
    return base


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_a_damaged_checkpoint(file: str, damage: Callable[[Path], None], finished: Path, tmp_path: Path) -> None:
    base = tmp_path / "damaged"
    shutil.copytree(finished, base, symlinks=True, ignore=shutil.ignore_patterns("output*", "logs"))
    checkpoints = base / "base_checkpoints" / "d2"
    damage(checkpoints / file)

    statuses, output = fit(base, 1, "--ckpt_path", str(checkpoints / "model_000004.pt"))
    assert statuses == [2]
    (message,) = (line for line in output.splitlines() if line.startswith("lmchat: "))
    assert file in message
    assert "Traceback" not in output

    statuses, output = fit(base, 2, "--ckpt_path", "last")
    assert statuses == [0, 0], output
    warning, remedy = (output.index(said) for said in ("skipping the checkpoint of step 4", "falling back to"))
    assert file in output[warning:remedy]
    assert "meta_000002.json" in output[remedy:].splitlines()[0]
    again, first = (find_checkpoint(folder / "base_checkpoints" / "d2") for folder in (base, finished))
    assert again.step == first.step == 4
    weights = [load_model_state(checkpoint) for checkpoint in (again, first)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
