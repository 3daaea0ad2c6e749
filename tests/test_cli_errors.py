"""A user error gives one message with the option, the value and the remedy, without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmchat.__main__ import main
from lmchat.report.runs import read_run

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
    """A copy of the shards that a test may damage."""
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


def text_of_numbers(base: Path) -> None:
    pq.write_table(pa.table({"text": [1]}), own_data(base) / "shard_00001.parquet")


def link_to_a_lost_shard(base: Path) -> None:
    shard = own_data(base) / "shard_00001.parquet"
    shard.unlink()
    shard.symlink_to(base / "elsewhere.parquet")


def logs_on_a_disk_that_is_gone(base: Path) -> None:
    (base / "logs").symlink_to(base / "unmounted")


def truncated_parquet(base: Path) -> None:
    shard = own_data(base) / "shard_00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])


def tokens_that_are_a_file(base: Path) -> None:
    (own_data(base) / "tokens").touch()


def base_in_a_lost_home(base: Path) -> None:
    os.environ["LMCHAT_BASE_DIR"] = "~nobody-of-this-name/lmchat"


def broken_yaml(base: Path) -> None:
    (base / "tiny.yaml").write_text("model: [")


def with_config(content: str | bytes) -> Callable[[Path], None]:
    """Writes ``own.yaml``."""

    def write(base: Path) -> None:
        (base / "own.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def finished_run(base: Path) -> None:
    assert main(["fit", "--config", str(base / "tiny.yaml")]) == 0


def altered_checkpoint(base: Path) -> None:
    finished_run(base)
    (model,) = base.rglob("model_*.pt")
    model.write_bytes(model.read_bytes()[:-1])


def base_is_a_file(base: Path) -> None:
    own_data(base)
    config = base / "tiny.yaml"
    folders = {"model": f"tokenizer_dir: {base / 'tokenizer'}", "data": f"data_dir: {base / 'own'}"}
    text = TINY.replace("{depth", f"{{{folders['model']}, depth").replace("{micro", f"{{{folders['data']}, micro")
    config.write_text(text)
    os.environ["LMCHAT_BASE_DIR"] = str(config)  # The fixture restores it.


def nothing(base: Path) -> None:
    pass


OWN = ["--data.data_dir", "{base}/own"]
OVER = ["--config", "{base}/own.yaml"]
CASES: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    # case: (what is wrong in the base folder, arguments after the config, parts of the message)
    "unknown key": (nothing, ["--model.dept", "3"], ["no option 'dept'", "`lmchat fit --model.help PretrainModule`"]),
    "unknown callback option": (
        nothing,
        ["--monitor.every_steps", "3"],
        ["--monitor.every_steps", "`lmchat fit --help_all` lists them"],
    ),
    "abbreviated flag": (
        nothing,
        ["--trainer.max_step", "3"],
        ["--trainer.max_step 3", "written in full, `lmchat fit --help_all`"],
    ),
    "wrong type": (nothing, ["--model.depth", "deep"], ["--model.depth is deep; it must be int"]),
    "unknown class": (
        nothing,
        ["--model", "PretrainModul"],
        ["--model is PretrainModul", "`lmchat fit --help_all` lists them"],
    ),
    "base class": (
        nothing,
        ["--model", "StageModule"],
        ["--model is StageModule, a base class; use PretrainModule, SFTModule, GRPOModule or a subclass"],
    ),
    "class of a missing module": (
        nothing,
        ["--trainer.callbacks", "[{{class_path: nowhere.Class}}]"],
        ["--trainer.callbacks: No module named 'nowhere'; correct the path of the class"],
    ),
    "class that is no callback": (
        nothing,
        ["--trainer.callbacks", "[{{class_path: lmchat.types.UserError}}]"],
        ["--trainer.callbacks: Import path lmchat.types.UserError does not correspond to a subclass of Callback"],
    ),
    "callback of every run": (
        nothing,
        ["--trainer.callbacks", "[{{class_path: lmchat.callbacks.evaluate.Evaluate}}]"],
        ["every run has Evaluate; leave it out, and set its options with --eval"],
    ),
    "callback given twice": (
        nothing,
        ["--trainer.callbacks", "[&c {{class_path: EarlyStopping, init_args: {{monitor: val/bpb}}}}, *c]"],
        ["--trainer.callbacks has EarlyStopping twice, with equal options; leave one out"],
    ),
    "profiler of another device": (
        nothing,
        ["--trainer.profiler", "xla"],
        ["--trainer.profiler is xla", "use simple, advanced or pytorch"],
    ),
    "negative warm-up of the monitor": (
        nothing,
        ["--monitor.warmup_steps", "-1"],
        ["--monitor.warmup_steps is -1; it must be at least 0"],
    ),
    "missing config": (
        nothing,
        ["--config", "nowhere.yaml"],
        ["nowhere.yaml is not there", "give the path of a YAML file"],
    ),
    "config that is an address": (
        nothing,
        ["--config", "https://example.com/x.yaml"],
        ["--config https://example.com/x.yaml is not there; give the path of a YAML file"],
    ),
    "broken yaml": (broken_yaml, [], ["tiny.yaml is not valid YAML", "line 2, column 1"]),
    "unknown key in a config": (
        with_config("modell: {depth: 3}"),
        OVER,
        ["there is no option --modell.depth; `lmchat fit --help_all` lists them"],
    ),
    "empty config": (
        with_config(""),
        OVER,
        ["own.yaml has no options", "write them as in trainer: {{max_steps: 100}}"],
    ),
    "config that is a list": (with_config("- a"), OVER, ["own.yaml has no options", "write them as in trainer:"]),
    "group that is a list": (
        with_config("trainer: [1, 2]"),
        OVER,
        ["--trainer is [1, 2]; it must be a mapping, as in trainer: {{option: value}}"],
    ),
    "group that is a number": (with_config("eval: 5"), OVER, ["--eval is 5; it must be a mapping"]),
    "group without options": (with_config("trainer: null"), OVER, ["--trainer is null; it must be a mapping"]),
    "group that is a word": (with_config("trainer: cpu"), OVER, ["--trainer is cpu; it must be a mapping"]),
    "config in another encoding": (
        with_config("# Größe".encode("latin-1")),
        OVER,
        ["own.yaml is not text in UTF-8", "save it as UTF-8"],
    ),
    "no tokenizer": (no_tokenizer, [], ["{base}/tokenizer", "train one with `lmchat tokenizer train`"]),
    "tokenizer that is a file": (
        nothing,
        ["--model.tokenizer_dir", "{base}/tiny.yaml"],
        ["tiny.yaml is a file; give the folder that contains the tokenizer"],
    ),
    "damaged tokenizer": (
        damaged_tokenizer,
        [],
        ["tokenizer.json is damaged", "`lmchat tokenizer train --output {base}/tokenizer`"],
    ),
    "no data folder": (no_data, [], ["{base}/base_data", "`lmchat data download`", "`lmchat data import`"]),
    "empty data folder": (empty_data, OWN, ["{base}/own", "`lmchat data download` fetches"]),
    "one shard only": (one_shard, OWN, ["{base}/own has only shard_00000.parquet", "`lmchat data import` makes"]),
    "parquet without text": (
        no_text_column,
        OWN,
        [
            "shard_00001.parquet has no column `text`",
            "it has: content",
            "`lmchat data import FOLDER --text_field COLUMN`",
        ],
    ),
    "parquet with numbers": (
        text_of_numbers,
        OWN,
        ["column `text`", "shard_00001.parquet contains int64", "`lmchat data import FOLDER --text_field COLUMN`"],
    ),
    "shard that is a broken link": (
        link_to_a_lost_shard,
        OWN,
        ["shard_00001.parquet is a link to {base}/elsewhere.parquet", "restore it or download it again"],
    ),
    "file missing in the base folder": (
        logs_on_a_disk_that_is_gone,
        [],
        ["{base}/logs/pretrain", "put it back", "set LMCHAT_BASE_DIR to another folder"],
    ),
    "token files that cannot be made": (
        tokens_that_are_a_file,
        OWN,
        ["cannot write token files to {base}/own/tokens/", "make room or give it write permission"],
    ),
    "logs in a file": (
        nothing,
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "{base}/tiny.yaml"],
        ["tiny.yaml/lightning_logs: Not a directory"],
    ),
    "truncated parquet": (truncated_parquet, OWN, ["shard_00001.parquet", "download or create it again"]),
    "indivisible batch": (
        nothing,
        ["--model.global_batch_tokens", "100"],
        ["100", "use --model.global_batch_tokens 64 or --model.global_batch_tokens 128"],
    ),
    "batch beyond all memory": (
        nothing,
        ["--data.micro_batch_size", "1000000000"],
        ["--data.micro_batch_size is 1000000000", "GB, and cpu has", "choose a smaller one, or auto"],
    ),
    "batch beyond all numbers": (
        nothing,
        ["--model.global_batch_tokens", "1" + 30 * "0"],
        ["--model.global_batch_tokens is 1000000000000000000000000000000; it must be at most"],
    ),
    "bad window pattern": (
        nothing,
        ["--model.window_pattern", "SXL"],
        ["window_pattern is 'SXL'", "the letters S and L, like SSSL"],
    ),
    "depth left open": (nothing, ["--model.depth", "null"], ["PretrainModule needs depth", "--model.help"]),
    "negative learning rate": (
        nothing,
        ["--model.matrix_lr", "-1"],
        ["--model.matrix_lr is -1.0; it must be a number from 0"],
    ),
    "learning rate that is no number": (nothing, ["--model.embedding_lr", ".nan"], ["--model.embedding_lr is nan"]),
    "negative scale of the learning rates": (
        nothing,
        ["--scaling_laws.lr_scale", "-1"],
        ["--scaling_laws.lr_scale is -1.0; it must be a number from 0"],
    ),
    "weight decay that is no number": (
        nothing,
        ["--scaling_laws.weight_decay", ".nan"],
        ["--scaling_laws.weight_decay is nan; it must be a number from 0"],
    ),
    "negative seed": (nothing, ["--seed_everything", "-5"], ["--seed_everything is -5; it must be a number from 0 to"]),
    "budget without minutes": (
        nothing,
        ["--trainer.callbacks", "lmchat.demo.time_budget.TimeBudget", "--trainer.callbacks.minutes", "-1"],
        ["TimeBudget's minutes are -1.0", "use minutes above 0"],
    ),
    "share above one": (
        nothing,
        ["--model.warmdown_ratio", "2"],
        ["--model.warmdown_ratio is 2.0; it must be a number from 0 to 1"],
    ),
    "odd head size": (
        nothing,
        ["--model.head_dim", "33"],
        ["head_dim is 33", "use an even number"],
    ),
    "width below the gates": (
        nothing,
        ["--model.aspect_ratio", "1", "--model.head_dim", "2"],
        ["n_embd is 2", "a larger depth, aspect_ratio or head_dim"],
    ),
    "kv heads": (nothing, ["--model.n_kv_head", "7"], ["n_kv_head 7", "choose a divisor"]),
    "depth zero": (nothing, ["--model.depth", "0"], ["depth is 0", "at least 1"]),
    "depth beyond all memory": (
        nothing,
        ["--model.depth", "100000000"],
        ["depth 100000000", "does not fit on cpu", "choose a smaller --model.depth"],
    ),
    "depth beyond this machine": (
        nothing,
        ["--model.depth", "1000"],
        ["depth 1000", "does not fit on cpu", "GB of weights", "choose a smaller --model.depth"],
    ),
    "stage without a start": (
        nothing,
        ["--model", "GRPOModule"],
        ["rl starts from a checkpoint", "give one of stage sft or pretrain with --ckpt_path"],
    ),
    "no batches": (
        nothing,
        ["--trainer.limit_train_batches", "0"],
        ["--trainer.limit_train_batches is 0, which trains nothing", "use lmchat validate"],
    ),
    "devices that are a word": (
        nothing,
        ["--trainer.devices", "many"],
        ["--trainer.devices is many", "auto, a number of devices"],
    ),
    "logger that is not installed": (
        nothing,
        ["--trainer.logger", "CometLogger"],
        ["CometLogger needs comet-ml", "pip install"],
    ),
    "negative length of samples": (
        nothing,
        ["--samples.max_new_tokens", "-1"],
        ["--samples.max_new_tokens is -1", "at least 0"],
    ),
    "bf16-true": (
        nothing,
        ["--trainer.precision", "bf16-true"],
        ["--trainer.precision is bf16-true,", "leave it at 32-true", "--model.compute_dtype bf16"],
    ),
    "16-mixed": (
        nothing,
        ["--trainer.precision", "16-mixed"],
        ["--trainer.precision is 16-mixed,", "leave it at 32-true", "--model.compute_dtype bf16"],
    ),
    "checkpoint folder without checkpoints": (
        nothing,
        ["--ckpt_path", "last"],
        ["base_checkpoints/d1", "train one first (lmchat fit)"],
    ),
    "missing checkpoint": (
        nothing,
        ["--ckpt_path", "{base}/model_000007.pt"],
        ["step 7", "there is none in that folder", "train one first (lmchat fit)", "--ckpt_path"],
    ),
    "checkpoint of another step": (
        finished_run,
        ["--ckpt_path", "{base}/base_checkpoints/d1/model_000007.pt"],
        ["step 7", "complete there: steps 1; give one of these with --ckpt_path"],
    ),
    "no checkpoint at all": (
        nothing,
        ["--ckpt_path", "{base}/tiny.yaml"],
        ["tiny.yaml is not an lmchat checkpoint", "give its folder, a model_005000.pt"],
    ),
    "truncated checkpoint": (
        altered_checkpoint,
        ["--ckpt_path", "last"],
        ["model_000001.pt is truncated", "copy it again"],
    ),
    "base folder that is a file": (base_is_a_file, [], ["tiny.yaml", "set LMCHAT_BASE_DIR"]),
    "second run in the same folder": (
        finished_run,
        [],
        ["base_checkpoints/d1", "resume it with --ckpt_path last", "--model.tag"],
    ),
    "other shape than the checkpoint": (
        finished_run,
        ["--ckpt_path", "last", "--model.sequence_len", "16"],
        ["sequence_len 32, this run 16", "another --model.tag"],
    ),
    "eval smaller than a batch": (
        nothing,
        ["--data.eval_tokens", "3"],
        ["--data.eval_tokens 3", "use --data.eval_tokens 64 or more"],
    ),
    "negative eval": (nothing, ["--data.eval_tokens", "-1"], ["--data.eval_tokens is -1; it must be at least 1"]),
    "base folder in a lost home": (
        base_in_a_lost_home,
        ["--model.tag", "x"],
        ["no home folder for ~nobody-of-this-name/lmchat", "set LMCHAT_BASE_DIR"],
    ),
    "negative evaluation interval": (
        nothing,
        ["--eval.every_n_steps", "-1"],
        ["--eval.every_n_steps is -1", "at least 0"],
    ),
    "checkpoint interval zero": (
        nothing,
        ["--checkpoint.every_n_steps", "0"],
        ["--checkpoint.every_n_steps is 0", "at least 1"],
    ),
    "unknown attention backend": (
        nothing,
        ["--model.attention", "flashy"],
        ["attention is 'flashy'", "choose auto or one of", "masked"],
    ),
    "buffer without end": (
        nothing,
        ["--data.buffer_size", "1000000000000"],
        ["--data.buffer_size is 1000000000000; it must be at most 1048576"],
    ),
    "no micro-batch": (nothing, ["--data.micro_batch_size", "0"], ["--data.micro_batch_size is 0", "at least 1"]),
    "no monitor interval": (nothing, ["--monitor.every_n_steps", "0"], ["monitor.every_n_steps is 0", "at least 1"]),
    "accumulation by hand": (
        nothing,
        ["--trainer.accumulate_grad_batches", "7"],
        ["--trainer.accumulate_grad_batches 7", "use --model.global_batch_tokens"],
    ),
    "evaluation by micro-batches": (
        nothing,
        ["--trainer.val_check_interval", "3"],
        ["--trainer.val_check_interval 3", "use --eval.every_n_steps"],
    ),
    "evaluation by epochs": (
        nothing,
        ["--trainer.check_val_every_n_epoch", "2"],
        ["--trainer.check_val_every_n_epoch 2", "use --eval.every_n_steps"],
    ),
    "epochs": (nothing, ["--trainer.max_epochs", "0"], ["--trainer.max_epochs 0", "use --trainer.max_steps"]),
    "logging by batches": (
        nothing,
        ["--trainer.log_every_n_steps", "3"],
        ["--trainer.log_every_n_steps 3", "use --monitor.every_n_steps"],
    ),
    "no steps": (nothing, ["--trainer.max_steps", "0"], ["--trainer.max_steps is 0", "1 step or more", "leave it out"]),
    "negative steps": (nothing, ["--trainer.max_steps", "-2"], ["--trainer.max_steps is -2", "1 step or more"]),
    "folder as config": (nothing, ["--config", "{base}"], ["--config {base} is a folder", "a YAML file"]),
    "one of a few words": (
        nothing,
        ["--model.compute_dtype", "bf17"],
        ["--model.compute_dtype is bf17; it must be auto, bf16 or fp32"],
    ),
    "yes, no or auto": (nothing, ["--model.compile", "maybe"], ["--model.compile is maybe; it must be bool or auto"]),
    "tag that leaves the folder": (
        nothing,
        ["--model.tag", "a/../../b"],
        ["--model.tag is 'a/../../b'", "leave out slashes"],
    ),
    "hidden tag": (nothing, ["--model.tag", ".."], ["--model.tag is '..'", "leave out", "dot"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_get_one_clear_message(case: str, base: Path, config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, arguments, wanted = CASES[case]
    spoil(base)
    capfd.readouterr()
    status = main(["fit", "--config", str(config), *(text.format(base=base) for text in arguments)])
    error = capfd.readouterr().err
    assert status == 2
    assert_one_line(error, [text.format(base=base) for text in wanted])


def assert_one_line(error: str, wanted: list[str]) -> None:
    assert "Traceback" not in error
    *before, message = error.splitlines()
    assert message.startswith("lmchat: ")
    assert not any(line.startswith("lmchat: ") for line in before)
    for text in wanted:
        assert text in message


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["fitt"], ["unknown command 'fitt'", "the commands are fit, validate, tokenizer"]),
        (["test"], ["unknown command 'test'", "the commands are"]),
        (["predict"], ["unknown command 'predict'", "the commands are"]),
        (["fit"], ["model missing", "--config configs/d12_pretrain.yaml"]),
        (["fit", "--config=broken.yaml"], ["broken.yaml is not valid YAML", "line 2, column 1"]),
        (["fit", "--config=number_key.yaml"], ["number_key.yaml has the key 1, which YAML does not read as text"]),
        (["validate", "--config", "tiny.yaml"], ["give one with --ckpt_path"]),
        (["tokenizer"], ["one of {train,"]),
        (["tokenizer", "train", "--vocab_sizes", "3"], ["--vocab_sizes", "`lmchat tokenizer --help` lists them"]),
        (["tokenizer", "train", "--vocab_size", "many"], ["--vocab_size is many; it must be int"]),
        (["tokenizer", "train", "--data", "nowhere"], ["nowhere", "lmchat data"]),
        (["data", "import"], ["lmchat data import: source missing", "`lmchat data import --help`"]),
        (["data", "import", "nowhere"], ["nowhere does not exist"]),
        (["data", "import", ".", "--seed", "1" + 70 * "0"], ["seed is 1000", "below 2^63"]),
        (
            ["data", "import", "deep.jsonl", "--output", "new"],
            ["deep.jsonl:1 is not valid JSON", "correct or remove the line"],
        ),
        (["data", "tokenize", "--num_threads", "0"], ["num_threads is 0; it must be at least 1"]),
        (["data", "words", "--output", "."], ["the word list . is a folder; name a file"]),
        (["data", "words", "--output", "/proc/nowhere/words.txt"], ["/proc/nowhere", "give another path"]),
        (["data", "show", "deep.jsonl", "--limit", "0"], ["--limit is 0; it must be at least 1"]),
        (["tokenizer", "eval", "--data", "nowhere"], ["nowhere", "lmchat data"]),
        (["tokenizer", "import", "deep.json"], ["deep.json", "nested too deeply"]),
        (["tokenizer", "train", "--vocab_size", "1000000000"], ["vocab_size is 1000000000; it must be at most"]),
        (["demo", "--output", "tiny.yaml/demo"], ["tiny.yaml", "Not a directory; "]),
    ],
)
def test_mistakes_in_other_commands(
    arguments: list[str],
    wanted: list[str],
    base: Path,
    config: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(base)
    (base / "broken.yaml").write_text("model: [")
    (base / "number_key.yaml").write_text("trainer: {max_steps: 1, 1: 2}")
    for name in ("deep.json", "deep.jsonl"):
        (base / name).write_text(100_000 * '{"text":' + "1" + 100_000 * "}")
    capfd.readouterr()
    assert main(arguments) == 2
    assert_one_line(capfd.readouterr().err, wanted)


def test_ctrl_c_while_a_command_is_imported_ends_quietly(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "jsonargparse", Interrupted("jsonargparse"))
    assert main(["report"]) == 130
    assert capfd.readouterr().err == ""


def test_an_unknown_environment_variable_is_refused(
    base: Path, config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCHAT_FIT__EVAL__EVERY_STEPS", "3")
    assert main(["fit", "--config", str(config)]) == 2
    assert_one_line(
        capfd.readouterr().err,
        ["the environment variable LMCHAT_FIT__EVAL__EVERY_STEPS is not an option", "`lmchat fit --help_all`"],
    )


def test_a_checkpoint_is_validated(base: Path, config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Metrics are logged at the checkpoint's step, and the report keeps the curves of training."""
    finished_run(base)
    trained = read_run(str(base)).stages["pretrain"]
    capfd.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", "last"]) == 0
    assert "val/bpb" in capfd.readouterr().out
    validated = read_run(str(base)).stages["pretrain"]
    step = max(trained.records)
    assert validated.records.keys() == trained.records.keys()
    assert validated.records[step].keys() >= trained.records[step].keys() | {"val/bpb"}


def test_a_finished_run_is_reported(base: Path, config: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not an error: a scheduler that restarts a run until it succeeds must get status 0."""
    caplog.set_level("INFO")
    finished_run(base)
    assert "nothing to train" not in caplog.text
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 0
    assert "nothing to train: " in caplog.text and "meta_000001.json is of step 1, the run's last" in caplog.text
    assert "raise --trainer.max_steps" in caplog.text
    caplog.clear()
    assert main(["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_steps", "2"]) == 0
    assert "nothing to train" not in caplog.text


def test_files_of_the_user_are_not_changed(base: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a logger, Lightning's own callback writes config.yaml to the current folder."""
    (base / "work").mkdir()
    monkeypatch.chdir(base / "work")
    Path("config.yaml").write_text("# mine")
    assert main(["fit", "--config", str(config), "--trainer.logger", "false"]) == 0
    assert Path("config.yaml").read_text() == "# mine"
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]
    assert "depth: 1" in (base / "logs" / "pretrain" / "d1" / "config.yaml").read_text()


def test_tilde_is_expanded(base: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand it in a config."""
    monkeypatch.setenv("HOME", str(base))
    (base / "home.yaml").write_text(
        "model: {init_args: {tokenizer_dir: ~/tokenizer}}\n"
        "data: {init_args: {data_dir: ~/base_data}}\ncheckpoint: {dirpath: ~/mine}\n"
    )
    fit = ["fit", "--config", str(config), "--config", str(base / "home.yaml"), "--ckpt_path", "auto"]
    assert main(fit) == 0
    assert (base / "mine" / "meta_000001.json").is_file()
    assert main([*fit, "--trainer.max_steps", "2"]) == 0
    assert (base / "mine" / "meta_000002.json").is_file()


def test_auto_continues_a_finished_run_if_more_steps_are_requested(
    base: Path, config: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A finished run is skipped, unless more steps are requested than it has taken, directly or by the ratio."""
    caplog.set_level("INFO")
    small = ["--scaling_laws.tokens_per_parameter", "0.001"]
    fit = ["fit", "--config", str(config), "--ckpt_path", "auto", "--trainer.max_steps", "-1"]
    steps = [f"meta_{step:06d}.json" for step in (1, 2)]
    assert main([*fit, *small]) == 0
    assert main([*fit, *small]) == 0
    assert "pretrain d1 is finished" in caplog.text
    assert sorted(path.name for path in base.rglob("meta_*.json")) == steps[:1]
    assert main([*fit, "--scaling_laws.tokens_per_parameter", "0.002"]) == 0
    assert sorted(path.name for path in base.rglob("meta_*.json")) == steps


def test_a_mistake_removes_nothing(base: Path, config: Path) -> None:
    finished_run(base)
    kept = (path for path in base.rglob("base_checkpoints/d1/*") if path.is_file() and path.name != ".attempt")
    before = {path: path.read_bytes() for path in kept}  # except the name of the latest attempt
    assert main(["fit", "--config", str(config)]) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert any(json.loads(data)["stage"] == "pretrain" for path, data in before.items() if path.suffix == ".json")
