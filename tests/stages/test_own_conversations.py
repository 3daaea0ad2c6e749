"""Fine-tuning on your own conversations through the command line: reading, validation split, report, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (its log handler keeps the stderr of its import: not that of one test)
import pytest

from lmchat.__main__ import main
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_conversation
from random_checkpoint import save_random_checkpoint

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "sft_own.yaml"
SMALL = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--model.compile",
    "false",
    "--eval.every_n_steps",
    "0",
]


def chats(count: int, question: str = "How many?") -> list[Any]:
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"There are {number}."}]}
        for number in range(count)
    ]


@pytest.fixture
def start(base: Path) -> str:
    """A pretrained model in the base folder."""
    tokenizer = Tokenizer.load(base / "tokenizer")
    return str(save_random_checkpoint(tokenizer, stage="pretrain", sequence_len=64, n_layer=1).directory)


def fit(start: str, *options: str) -> int:
    return main(["fit", "--config", str(CONFIG), "--ckpt_path", start, *SMALL, *options])


def test_a_folder_of_mixed_formats_is_trained_on(start: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = base / "chats"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(chats(20)), encoding="utf-16")
    rows = [{"instruction": f"Say {number}", "output": str(number)} for number in range(19)]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"instruction": "nothing"}])))
    (folder / "._b.jsonl").write_bytes(b"\0")
    refused = r"1 of 40 rows are malformed:\n.*b.jsonl, line 20: no known format has the fields instruction"
    with pytest.warns(UserWarning, match=refused):
        assert fit(start, "--data.train", str(folder), "--data.epochs", "1") == 0
    printed = capfd.readouterr().out
    for expected in (
        "a.json is UTF-16",
        "hidden files and folders passed over: 1",
        "39 of 40 records read",
        "20 × records of the format messages",
        "19 × records of the format alpaca",
        "train: JSONLConversations/chats/train 38; 38 conversations",
        "val: JSONLConversations/chats/val 1; 1 conversations",
        "held out: bpb",
    ):
        assert printed.count(expected) == (2 if expected == "held out: bpb" else 1), expected
    assert list(base.glob("chatsft_checkpoints/tiny/meta_*.json"))


def test_validation_files_may_be_given(start: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, count in (("train", 6), ("val", 3)):
        (base / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chats(count))))
    data = ["--data.train", str(base / "train.jsonl"), "--data.val", str(base / "val.jsonl")]
    assert fit(start, *data) == 0
    printed = capfd.readouterr().out
    assert "train: JSONLConversations/train 12; 12 conversations" in printed  # twice each, as the config says
    assert "val: JSONLConversations/val 3; 3 conversations" in printed


def test_conversations_cut_before_the_answer_are_refused(
    start: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "long.jsonl").write_text("\n".join(map(json.dumps, chats(4, question="word " * 200))))
    assert fit(start, "--data.train", str(base / "long.jsonl")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no token of the conversations receives loss (6 of 6 are cut at 64 tokens)" in error
    assert "--model.sequence_len" in error


def test_many_conversations_without_loss_give_a_warning(start: str, base: Path) -> None:
    rows = [*chats(9), *chats(3, question="word " * 200)]
    (base / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (base / "val.jsonl").write_text("\n".join(map(json.dumps, chats(1))))
    data = ["--data.train", str(base / "some.jsonl"), "--data.val", str(base / "val.jsonl")]
    with pytest.warns(UserWarning, match="25% of the train conversations have no token with loss"):
        assert fit(start, *data) == 0


def test_messages_of_weight_0_receive_no_loss(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "It is 5.", "weight": 0},
        {"role": "user", "content": "Look again."},
        {"role": "assistant", "content": "It is 4.", "weight": 1},
    ]
    tokenizer = Tokenizer.load(base / "tokenizer")
    ids, mask = render_conversation(tokenizer, {"messages": messages})  # type: ignore[typeddict-item]
    spoken = [token for token, counts in zip(ids, mask, strict=True) if counts]
    assert tokenizer.decode(spoken) == "It is 4.<|assistant_end|>"
    (base / "weights.jsonl").write_text(json.dumps({"messages": messages}))
    assert main(["data", "show", str(base / "weights.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "+ It is 5." not in printed and "+ It is 4." in printed
    assert "1 × an assistant message of weight 0 read without loss" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "train"),
        (["--data.train", "nowhere.jsonl"], "there is no file or folder nowhere.jsonl"),
        (["--data.train", "EMPTY"], "contains no rows"),
        (["--data.train", "CHATS", "--data.format", "alpaca"], "has the format messages, not alpaca"),
        (["--data.train", "CHATS", "--data.val_fraction", "0"], "val_fraction is 0"),
    ],
)
def test_mistakes_give_one_message(
    options: list[str], message: str, start: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "empty.jsonl").touch()
    (base / "chats.jsonl").write_text("\n".join(map(json.dumps, chats(3))))
    names = {"EMPTY": str(base / "empty.jsonl"), "CHATS": str(base / "chats.jsonl")}
    assert fit(start, *(names.get(option, option) for option in options)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_size_of_the_batch_is_checked_before_rendering(
    start: str, base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (base / "chats.json").write_text(json.dumps(chats(20)))
    assert fit(start, "--data.train", str(base / "chats.json"), "--data.micro_batch_size", "3") == 2
    assert "is not a multiple of micro_batch_size 3" in capfd.readouterr().err
    assert not (base / "rendered").exists()


def test_the_message_about_a_missing_run_names_it(start: str, base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The run took its name from the model it started from."""
    (base / "chats.json").write_text(json.dumps(chats(20)))
    options = ["--data.train", str(base / "chats.json"), "--data.epochs", "1"]
    assert fit(start, *options) == 0
    assert fit("last", *options) == 2
    assert "there is no run named sft of stage sft" in (error := capfd.readouterr().err) and "--model.tag" in error
    assert fit("last", *options, "--model.tag", "tiny") == 0
