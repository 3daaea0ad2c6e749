"""A user's mistake ends in one message that names the thing, the value and the remedy, without a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmchat.__main__ import main

TINY = """
trainer: {accelerator: cpu, devices: 1, max_steps: 1}
model:
  class_path: PretrainModule
  init_args: {depth: 1, sequence_len: 32, head_dim: 32, window_pattern: L, global_batch_tokens: 64}
data:
  class_path: FineWebDataModule
  init_args: {micro_batch_size: 2, eval_tokens: 64}
samples: {max_new_tokens: 0}
"""


@pytest.fixture
def config(base: Path) -> Path:
    path = base / "tiny.yaml"
    path.write_text(TINY)
    return path


def own_data(base: Path) -> Path:
    """A copy of the shards that a test may spoil."""
    data = base / "own"
    shutil.copytree(base / "base_data", data, ignore=shutil.ignore_patterns("tokens"))
    return data


def no_tokenizer(base: Path) -> None:
    (base / "tokenizer").unlink()


def damaged_tokenizer(base: Path) -> None:
    (base / "tokenizer").unlink()
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "tokenizer.json").write_text("{}")


def no_data(base: Path) -> None:
    (base / "base_data").unlink()


def empty_data(base: Path) -> None:
    (base / "own").mkdir()


def one_shard(base: Path) -> None:
    data = own_data(base)
    for shard in sorted(data.glob("*.parquet"))[1:]:
        shard.unlink()


def no_text_column(base: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), own_data(base) / "shard_00001.parquet")


def truncated_parquet(base: Path) -> None:
    shard = own_data(base) / "shard_00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])


def broken_yaml(base: Path) -> None:
    (base / "tiny.yaml").write_text("model: [")


def finished_run(base: Path) -> None:
    assert main(["fit", "--config", str(base / "tiny.yaml")]) == 0


def altered_checkpoint(base: Path) -> None:
    finished_run(base)
    (model,) = base.rglob("model_*.pt")
    model.write_bytes(model.read_bytes()[:-1])


def nothing(base: Path) -> None:
    pass


OWN = ["--data.data_dir", "{base}/own"]
CASES: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    # case: (what is wrong in the base folder, arguments after the config, what the message must hold)
    "unknown key": (nothing, ["--model.dept", "3"], ["dept"]),
    "unknown callback option": (nothing, ["--monitor.every_steps", "3"], ["every_steps"]),
    "abbreviated flag": (nothing, ["--trainer.max_step", "3"], ["max_step"]),
    "wrong type": (nothing, ["--model.depth", "deep"], ["depth", "deep", "int"]),
    "unknown class": (nothing, ["--model", "PretrainModul"], ["PretrainModul"]),
    "missing config": (nothing, ["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "broken yaml": (broken_yaml, [], ["tiny.yaml"]),
    "no tokenizer": (no_tokenizer, [], ["tokenizer", "lmchat tokenizer train"]),
    "damaged tokenizer": (damaged_tokenizer, [], ["tokenizer.json", "damaged"]),
    "no data folder": (no_data, [], ["base_data", "lmchat data"]),
    "empty data folder": (empty_data, OWN, ["own", "lmchat data"]),
    "one shard only": (one_shard, OWN, ["own", "shard"]),
    "parquet without text": (no_text_column, OWN, ["shard_00001.parquet", "text", "content"]),
    "truncated parquet": (truncated_parquet, OWN, ["shard_00001.parquet"]),
    "indivisible batch": (nothing, ["--model.global_batch_tokens", "100"], ["100", "64", "128"]),
    "bad window pattern": (nothing, ["--model.window_pattern", "SXL"], ["SXL", "S and L"]),
    "odd head size": (nothing, ["--model.head_dim", "33"], ["head"]),
    "kv heads": (nothing, ["--model.n_kv_head", "7"], ["n_kv_head", "7"]),
    "depth zero": (nothing, ["--model.depth", "0"], ["depth", "0"]),
    "bf16-true": (nothing, ["--trainer.precision", "bf16-true"], ["bf16-true", "compute_dtype"]),
    "16-mixed": (nothing, ["--trainer.precision", "16-mixed"], ["16-mixed", "compute_dtype"]),
    "checkpoint folder without checkpoints": (nothing, ["--ckpt_path", "last"], ["base_checkpoints/d1"]),
    "missing checkpoint": (nothing, ["--ckpt_path", "{base}/model_000007.pt"], ["step 7"]),
    "no checkpoint at all": (nothing, ["--ckpt_path", "{base}/tiny.yaml"], ["tiny.yaml", "not a checkpoint"]),
    "truncated checkpoint": (altered_checkpoint, ["--ckpt_path", "last"], ["model_000001.pt", "truncated"]),
    "second run in the same folder": (finished_run, [], ["base_checkpoints/d1", "--ckpt_path last"]),
    "other shape than the checkpoint": (
        finished_run,
        ["--ckpt_path", "last", "--model.sequence_len", "16"],
        ["sequence_len", "16", "32"],
    ),
    "eval smaller than a batch": (nothing, ["--data.eval_tokens", "3"], ["eval_tokens", "3", "64"]),
    "negative evaluation interval": (nothing, ["--eval.every_n_steps", "-1"], ["eval.every_n_steps", "-1"]),
    "checkpoint interval zero": (nothing, ["--checkpoint.every_n_steps", "0"], ["checkpoint.every_n_steps", "0"]),
    "unknown attention backend": (nothing, ["--model.attention", "flashy"], ["flashy"]),
    "no micro-batch": (nothing, ["--data.micro_batch_size", "0"], ["micro_batch_size", "0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_get_one_clear_message(case: str, base: Path, config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, arguments, wanted = CASES[case]
    spoil(base)
    capfd.readouterr()
    status = main(["fit", "--config", str(config), *(text.format(base=base) for text in arguments)])
    error = capfd.readouterr().err
    message = error[error.rfind("lmchat: ") :]
    assert status == 2
    assert "Traceback" not in error
    assert message.count("\n") <= 4, message
    for text in wanted:
        assert re.search(re.escape(text), message), f"{text!r} is not in: {message}"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["fitt"], ["fitt", "fit"]),
        (["fit"], ["--config"]),
        (["tokenizer"], ["train"]),
        (["tokenizer", "train", "--vocab_sizes", "3"], ["vocab_sizes"]),
        (["tokenizer", "train", "--data", "nowhere"], ["nowhere"]),
        (["data", "import", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes_in_other_commands(
    arguments: list[str], wanted: list[str], base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    for text in wanted:
        assert text in error


def test_nothing_is_lost_by_a_mistake(base: Path, config: Path) -> None:
    finished_run(base)
    before = {path: path.read_bytes() for path in base.rglob("base_checkpoints/d1/*") if path.is_file()}
    assert main(["fit", "--config", str(config)]) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert any(json.loads(data)["stage"] == "pretrain" for path, data in before.items() if path.suffix == ".json")
