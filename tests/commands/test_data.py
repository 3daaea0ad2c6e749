"""``lmchat data`` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmchat.__main__ import main
from lmchat.data.token_shards import TokenShards
from lmchat.tokenizer.bpe import Tokenizer

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
    ],
)
def test_user_mistakes_end_in_one_line(
    base: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["data", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_words_makes_the_list_that_spelling_reads(base: Path, tiny_base: Path) -> None:
    from lmchat.tasks.words import read_words

    assert main(["data", "words", "--data_dir", str(tiny_base / "base_data")]) == 0
    found = read_words(None)
    assert {"statement", "function"} <= set(found)
    assert all(word.isalpha() and word == word.lower() for word in found)
