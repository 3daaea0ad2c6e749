"""``lmchat data`` through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmchat.__main__ import main
from lmchat.data.token_shards import TokenShards
from lmchat.tokenizer.bpe import Tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "mix", "it"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with a small tokenizer."""
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    Tokenizer({bytes([byte]): byte for byte in range(256)}).save(tmp_path / "base" / "tokenizer")
    return tmp_path / "base"


def test_a_folder_of_text_becomes_token_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for number, word in enumerate(WORDS):
        (source / f"{number}.txt").write_text(f"{word} {number}")
    (source / "copy.txt").write_text("the 0")

    assert main(["data", "import", str(source), "--validation_fraction", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(WORDS) - 3} documents for training in 1 shards and 3 for validation" in printed
    assert "1 duplicates" in printed

    assert main(["data", "tokenize"]) == 0
    tokens = sum(1 + len(f"{word} {number}") for number, word in enumerate(WORDS))
    assert f"{tokens} tokens of {len(WORDS)} documents" in capsys.readouterr().out
    train, validation = TokenShards.open_split(base / "base_data", Tokenizer.load(base / "tokenizer"))
    assert (len(train), len(validation)) == (len(WORDS) - 3, 3)

    assert main(["data", "tokenize"]) == 0
    assert "0 of 2 shards tokenized now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere"], "nothing to import: nowhere does not exist"),
        (["tokenize"], "no data folder"),
        (["tokenize", "--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["download", "--num_shards", "0"], "num_shards is 0"),
        (["show", "nowhere.jsonl"], "no file or folder nowhere.jsonl"),
        (["show", "nowhere.yaml"], "nowhere.yaml is not there"),
        (["show", "nowhere.jsonl", "--overlay", "mine.yaml"], "nowhere.jsonl is not a config"),
        (["show", str(CONFIGS / "grpo.yaml"), "--split", "val"], "no mixture data.init_args.val"),
        (["show", str(CONFIGS / "d12_pretrain.yaml")], "no mixture data.init_args.train"),
        (["show", "nowhere.jsonl", "--rows", "-1"], "--rows is -1"),
    ],
)
def test_user_mistakes_end_in_one_line(
    base: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_the_words_command_writes_the_list_for_spelling(base: Path, tiny_base: Path) -> None:
    from lmchat.tasks.words import read_words

    assert main(["data", "words", "--data_dir", str(tiny_base / "base_data")]) == 0
    found = read_words(None)
    assert {"statement", "function"} <= set(found)
    assert all(word.isalpha() and word == word.lower() for word in found)


SUM = [
    {"role": "user", "content": "2+2?\nquick"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "It is "},
            {"type": "python", "text": "2+2"},
            {"type": "python_output", "text": "4"},
            {"type": "text", "text": "4.\nBye\x1b"},
        ],
    },
]
LONG = [{"role": "user", "content": "x" * 60}, {"role": "assistant", "content": "no"}]
SHOWN = r"""conversation 0, JSONLConversations/chat: 36 tokens, 19 with loss
  <|bos|><|user_start|>2+2?⏎
  quick<|user_end|><|assistant_start|>
+ It is <|python_start|>2+2<|python_end|>
  <|output_start|>4<|output_end|>
+ 4.⏎
+ Bye\x1b<|assistant_end|>

conversation 1, JSONLConversations/chat: 40 tokens, 0 with loss, truncated
  <|bos|><|user_start|>xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx

JSONLConversations/chat: 2 conversations
2 conversations, 76 tokens, 19 with loss, 1 truncated, 1 without loss
packed into rows of 40 tokens: 2 rows, 7.3% padding, 1 rows without loss
"""


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_show_marks_tokens_with_loss(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", {"messages": SUM}, {"messages": LONG})
    assert main(["data", "show", str(chat), "--max_tokens", "40"]) == 0
    assert capsys.readouterr().out == SHOWN
    counts = SHOWN.splitlines()[-3:]
    first, second = SHOWN.split("\n\n")[:2]
    for option, expected in (
        (["--start", "1"], [second]),
        (["--rows", "1"], [first]),
        (["--only", "truncated"], [second]),
        (["--only", "unsupervised", "--start", "2"], []),
    ):
        assert main(["data", "show", str(chat), "--max_tokens", "40", *option]) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines()[-3:] == counts
        assert printed.split("\n\n")[:-1] == expected
    assert main(["data", "show", str(chat), "--rows", "0", "--limit", "1"]) == 0
    assert "1 conversations, 36 tokens" in capsys.readouterr().out


def test_show_colours_tokens_with_loss(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat = write_rows(tmp_path / "chat.jsonl", SUM)
    assert main(["data", "show", str(chat)]) == 0
    printed = capsys.readouterr().out
    green, magenta, dim = "\x1b[32m", "\x1b[35m", "\x1b[2m"
    assert f"{green}It is \x1b[0m{magenta}<|python_start|>\x1b[0m{green}2+2\x1b[0m" in printed
    assert f"{magenta}<|output_start|>\x1b[0m{dim}4\x1b[0m" in printed


def test_show_reads_the_mixture_of_a_config(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", SUM)
    config = tmp_path / "mine.yaml"
    train = f"[{{task: {{class_path: JSONLConversations, init_args: {{path: {chat}}}}}, epochs: 3}}]"
    val = "[{task: {class_path: Identity, init_args: {split: test, size: 2}}}]"
    config.write_text(f"data: {{class_path: SFTDataModule, init_args: {{train: {train}, val: {val}}}}}\n")
    assert main(["data", "show", str(config), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "JSONLConversations/chat: 3 conversations\n3 conversations, 108 tokens, 57 with loss" in printed
    assert main(["data", "show", str(config), "--split", "val"]) == 0
    assert "Identity/test: 2 conversations" in capsys.readouterr().out


def test_show_overlays_configs_like_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = "[{task: {class_path: Identity, init_args: {size: SIZE}}}]"
    config, overlays = tmp_path / "sft.yaml", []
    config.write_text(
        f"data: {{class_path: SFTDataModule, init_args: {{train: {train.replace('SIZE', '9')}, val: []}}}}\n"
    )
    for number, text in enumerate((f"train: {train.replace('SIZE', '4')}", "shuffle_seed: 7", "shuffle_seed: 8")):
        overlays.append(tmp_path / f"{number}.yaml")
        overlays[-1].write_text(f"data: {{init_args: {{{text}}}}}\n")
    first, second, third = (["--overlay", str(path)] for path in overlays)

    def show(*overlay: str) -> str:
        assert main(["data", "show", str(config), *overlay, "--rows", "4"]) == 0
        return capsys.readouterr().out

    printed = [show(*first), show(*first, *second), show(*first, *third, *second), show(*first, *second, *third)]
    for text in printed:
        assert "Identity/train: 4 conversations\n4 conversations" in text
    assert printed[1] == printed[2], "the last one holds"
    assert len(set(printed)) == 3
    overlays[1].write_text("data: {init_args: {shufle_seed: 7}}\n")
    assert main(["data", "show", str(config), f"--overlay={overlays[1]}"]) == 2
    assert "no option 'shufle_seed'" in capsys.readouterr().err


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([ASSISTANT, USER], "where 'user' is expected"),
        ([USER, {"role": "assistant", "content": ""}], "message 1 (assistant) is empty"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "a part of type image"),
        ([USER, {"role": "critic", "content": "x"}], "unknown role 'critic'"),
        ({"text": "a"}, "no known format has the fields text"),
    ],
)
def test_show_names_file_and_line_of_what_it_cannot_render(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, complaint: str
) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", [USER, ASSISTANT], row)
    with pytest.warns(UserWarning, match=rf"{chat}, line 2: .*{re.escape(complaint)}"):
        assert main(["data", "show", str(chat)]) == 0
    assert "1 of 2 records read" in capsys.readouterr().out
    chat = write_rows(tmp_path / "chat.jsonl", row)
    assert main(["data", "show", str(chat)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{chat}, line 1" in error
    assert complaint in error
