from __future__ import annotations

import io
import random
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from lmchat.commands import tokenizer as commands
from lmchat.tokenizer import compression
from lmchat.tokenizer.bpe import SPLIT_PATTERN, Tokenizer
from lmchat.types import UserError
from rank_file import write_ranks


def write_shard(path: Path, texts: list[str | None], column: str = "text") -> None:
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=7)


def documents(seed: int, n: int = 40) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(50)]
    return [" ".join(rng.choices(words, k=80)) for _ in range(n)]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def data(base: Path) -> Path:
    folder = base / "base_data"
    folder.mkdir()
    for i in range(3):
        write_shard(folder / f"shard_{i:05d}.parquet", [*documents(i), None, ""])
    return folder


class TestTrain:
    def test_reads_all_shards_but_the_last(self, base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        commands.train(vocab_size=350)
        expected = Tokenizer.train(documents(0) + documents(1), 350)
        assert Tokenizer.load(base / "tokenizer").fingerprint == expected.fingerprint
        assert "350 tokens" in capsys.readouterr().out

    @pytest.mark.parametrize("vocab_size", [10, 100_000])
    def test_a_refused_vocabulary_leaves_no_folder(self, data: Path, tmp_path: Path, vocab_size: int) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="vocab_size"):
            commands.train(vocab_size=vocab_size, output=tmp_path / "new" / "tokenizer")
        assert sorted(tmp_path.rglob("*")) == before

    def test_the_folder_is_created_after_training(
        self, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A signal may end training at any time."""
        monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail() if (base / "tokenizer").exists() else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            commands.train(vocab_size=350)

    def test_listed_files_are_all_read(self, data: Path, tmp_path: Path) -> None:
        files = sorted(data.glob("*.parquet"))
        commands.train(data=files, vocab_size=350, output=tmp_path / "all")
        commands.train(data=files[2], vocab_size=350, output=tmp_path / "one")
        everything = Tokenizer.train(documents(0) + documents(1) + documents(2), 350)
        assert Tokenizer.load(tmp_path / "all").fingerprint == everything.fingerprint
        assert Tokenizer.load(tmp_path / "one").fingerprint == Tokenizer.train(documents(2), 350).fingerprint

    def test_caps(self, data: Path, tmp_path: Path) -> None:
        commands.train(data=data, vocab_size=320, doc_cap=100, max_chars=1234, output=tmp_path / "capped")
        texts = [text[:100] for text in documents(0)][:13]
        texts[-1] = texts[-1][:34]
        assert sum(map(len, texts)) == 1234
        assert Tokenizer.load(tmp_path / "capped").fingerprint == Tokenizer.train(texts, 320).fingerprint

    def test_text_files(self, tmp_path: Path) -> None:
        (tmp_path / "text" / "deep").mkdir(parents=True)
        (tmp_path / "text" / "a.txt").write_text(documents(0)[0])
        (tmp_path / "text" / "deep" / "b.txt").write_text(documents(1)[0])
        commands.train(data=tmp_path / "text", vocab_size=300, output=tmp_path / "out")
        expected = Tokenizer.train([documents(0)[0], documents(1)[0]], 300)
        assert Tokenizer.load(tmp_path / "out").fingerprint == expected.fingerprint

    def test_mistakes(self, base: Path, data: Path) -> None:
        write_shard(base / "other.parquet", ["x"], column="body")
        (base / "truncated.parquet").write_bytes((data / "shard_00000.parquet").read_bytes()[:-100])
        (base / "empty").mkdir()
        for path, message in [
            (base / "nowhere", "nowhere"),
            ([base / "nowhere.parquet"], "nowhere.parquet"),
            (base / "empty", "empty"),
            (base / "other.parquet", "no column `text`"),
            (base / "truncated.parquet", "truncated.parquet"),
        ]:
            with pytest.raises(UserError, match=message):
                commands.train(data=path, vocab_size=300)
        with pytest.raises(UserError, match="vocab_size 5000 needs"):
            commands.train(vocab_size=5000)
        with pytest.raises(UserError, match="max_chars"):
            commands.train(max_chars=0)
        with pytest.raises(UserError, match=r"cannot write to the folder .*other\.parquet"):
            commands.train(vocab_size=300, output=base / "other.parquet")
        assert not (base / "tokenizer" / "tokenizer.json").exists()


@pytest.fixture
def trained(base: Path) -> Tokenizer:
    tokenizer = Tokenizer.train(documents(0), 300)
    tokenizer.save(base / "tokenizer")
    return tokenizer


class TestEvaluate:
    def test_table(
        self, trained: Tokenizer, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plain_bytes = tiktoken.Encoding(
            "bytes", pat_str=SPLIT_PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
        )
        monkeypatch.setattr(compression, "load_baselines", lambda: {"GPT-2": plain_bytes})
        commands.evaluate()
        output = capsys.readouterr().out
        for kind in ("English", "code", "maths", "German", "Korean", "conversation"):
            row = next(line for line in output.splitlines() if kind in line).split("│")
            assert float(row[3]) >= float(row[4]) == 1.0
        (shard,) = (line for line in output.splitlines() if "validation shard" in line)
        text = "\n".join(documents(2))
        cells = [cell.strip() for cell in shard.split("│")]
        assert cells[2:6] == [
            f"{len(text):,}",
            f"{len(text) / len(trained.encode(text)):.2f}",
            "1.00",
            f"{len(text) / len(trained.encode(text)) - 1:+.1%}",
        ]
        assert "not available here: GPT-4" in output

    def test_a_shard_without_text(
        self, trained: Tokenizer, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(compression, "load_baselines", dict)
        write_shard(data / "shard_00009.parquet", [None, ""])
        commands.evaluate()
        assert "German" in (output := capsys.readouterr().out) and "validation shard" not in output

    def test_without_a_tokenizer(self, base: Path) -> None:
        with pytest.raises(UserError, match="lmchat tokenizer train"):
            commands.evaluate()

    def test_baseline_that_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def get_encoding(name: str) -> str:
            if name == "gpt2":
                raise ConnectionError(name)
            return name

        monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
        assert compression.load_baselines() == {"GPT-4": "cl100k_base"}

    def test_a_download_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        released = threading.Event()
        monkeypatch.setattr(compression, "BASELINES", {"GPT-2": "gpt2"})
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name: released.wait() and name)
        monkeypatch.setattr(compression, "DOWNLOAD_TIMEOUT_SECONDS", 0.01)
        assert compression.load_baselines() == {}
        released.set()


class TestShow:
    def test_pieces_and_ids(self, trained: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
        text = "hi <|bos|> é\n"
        commands.show(text)
        output = capsys.readouterr().out
        ids = trained.encode(text)
        assert [int(word) for word in output.split() if word.isdigit()][: len(ids)] == ids
        assert "· " in output
        assert "⏎ 10" in output
        assert f"{len(ids)} tokens, 14 bytes" in output

    def test_standard_input(
        self, trained: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("zz"))
        commands.show("-")
        assert "z 122  z 122" in capsys.readouterr().out


class TestImport:
    def test_round_trip(self, trained: Tokenizer, base: Path) -> None:
        commands.import_tokenizer(write_ranks(base / "ranks.tiktoken", trained), output=base / "imported")
        assert Tokenizer.load(base / "imported").fingerprint == trained.fingerprint

    def test_missing_file(self, base: Path) -> None:
        with pytest.raises(UserError, match=r"nowhere\.json"):
            commands.import_tokenizer(base / "nowhere.json")


def test_command_line_needs_no_torch(base: Path, data: Path) -> None:
    script = (
        "import sys\n"
        "from lmchat.__main__ import main\n"
        "assert main(['tokenizer', 'train', '--vocab_size', '300']) == 0\n"
        "assert main(['tokenizer', 'show', 'hello']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "5 bytes" in done.stdout
