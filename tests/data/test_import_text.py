"""Text, JSON lines and parquet to shards: nothing lost, nothing twice, the same every time."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmchat.data import importing
from lmchat.data.importing import import_folder, write_shards
from lmchat.data.parquet_text import list_shards
from lmchat.types import UserError


def _read(folder: Path) -> list[list[str]]:
    return [pq.read_table(path)["text"].to_pylist() for path in list_shards(folder)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One file of each kind, some documents more than once."""
    folder = tmp_path / "source"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("plain text", encoding="utf-8-sig")
    (folder / "deep" / "B.MD").write_text("# mark\ndown")
    (folder / "deep" / "er" / "c.rst").write_text("plain text")
    (folder / "d.jsonl").write_text('{"text": "json one"}\n\n{"text": "json two", "x": 1}\n{"text": null}\n')
    (folder / "e.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "json one"}\n{"text": "zipped \\ud800 \\ud83d\\ude00"}')
    )
    pq.write_table(pa.table({"text": ["from parquet", None, "  \n"]}), folder / "f.parquet")
    (folder / "binary.txt").write_bytes(b"abc\x00def")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "code.py").write_text("pass")
    (folder / ".git" / "hidden.txt").write_text("hidden")
    return folder


def test_every_kind_of_file(source: Path, tmp_path: Path) -> None:
    report = import_folder(source, tmp_path / "out", progress=False)
    *train, validation = _read(tmp_path / "out")
    documents = {"plain text", "# mark\ndown", "json one", "json two", "zipped ? 😀", "from parquet"}
    assert sorted(sum(train, []) + validation) == sorted(documents)  # noqa: RUF017
    assert (report.shards.train_shards, report.shards.train_documents, report.shards.validation_documents) == (1, 5, 1)
    assert (report.shards.duplicates, report.shards.blank) == (2, 3)
    assert report.shards.characters == sum(map(len, documents))
    assert report.other_files == 1
    assert [path.name for path in report.undecodable] == ["binary.txt", "latin.txt"]
    assert not (tmp_path / "out.partial").exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=60),
    seed=st.integers(0, 2),
    fraction=st.floats(0.01, 0.9),
    shard_characters=st.integers(1, 300),
    buckets=st.integers(1, 5),
)
def test_documents_are_kept_once_and_split(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    seed: int,
    fraction: float,
    shard_characters: int,
    buckets: int,
) -> None:
    unique = {text for text in texts if text.strip()}
    output = tmp_path_factory.mktemp("import") / "out"
    options = {"seed": seed, "validation_fraction": fraction, "shard_characters": shard_characters}
    expected_bytes = (buckets - 1) * importing._BUCKET_BYTES
    if len(unique) < 2:
        with pytest.raises(UserError, match="at least 2 are needed"):
            write_shards(texts, output, expected_bytes=expected_bytes, **options)
        assert not output.exists()
        return
    report = write_shards(texts, output, expected_bytes=expected_bytes, **options)
    *train, validation = _read(output)
    documents = [text for shard in (*train, validation) for text in shard]
    assert sorted(documents) == sorted(unique)
    assert len(validation) == report.validation_documents == min(max(1, round(fraction * len(unique))), len(unique) - 1)
    assert len(train) == report.train_shards
    assert all(sum(map(len, shard)) >= shard_characters for shard in train[:-1])
    assert all(sum(map(len, shard[:-1])) < shard_characters for shard in train)

    # Neither the order of the input nor the number of buckets matters.
    write_shards(reversed(texts), output.with_name("again"), **options)
    assert _read(output.with_name("again")) == [*train, validation]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(200)]
    orders = []
    for seed in (0, 1):
        write_shards(texts, tmp_path / str(seed), seed=seed)
        orders.append([text for shard in _read(tmp_path / str(seed)) for text in shard])
    assert orders[0] != orders[1] != texts != orders[0]


def test_a_separator_cuts_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one<|end|>two<|end|>\n")
    report = import_folder(path, tmp_path / "out", separator="<|end|>", progress=False)
    assert sorted(text for shard in _read(tmp_path / "out") for text in shard) == ["one", "two"]
    assert report.shards.blank == 1


def test_another_field_and_column(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"content": "one"}))
    pq.write_table(pa.table({"content": ["two"]}), tmp_path / "in" / "b.parquet")
    import_folder(tmp_path / "in", tmp_path / "out", text_field="content", progress=False)
    assert sorted(text for shard in _read(tmp_path / "out") for text in shard) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n[1]\n', r"a\.jsonl:2 has no field `text` but a list"),
        ("a.jsonl", b'{"messages": [], "id": 3}', r"a\.jsonl:1 has no field `text` but the fields messages, id"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field `text` holds a int, not a string"),
        ("a.jsonl", b'\n{"text": "\xff"}', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 9)[:-12], r"a\.jsonl\.gz is damaged after line \d"),
        ("a.jsonl.gz", b'{"text": "one"}\n', r"a\.jsonl\.gz is damaged after line 0"),
        ("a.parquet", b"PAR1", r"cannot read .*a\.parquet"),
        ("a.txt", b"only one", r"found 1 document\(s\) with text, at least 2"),
        ("a.docx", b"word", r"has no file of the kinds \.txt"),
    ],
)
def test_malformed_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "in", tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_user_mistakes_are_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"nothing to import: .*nowhere does not exist"):
        import_folder(tmp_path / "nowhere", output, progress=False)
    with pytest.raises(UserError, match="lies inside the source"):
        import_folder(source, source / "deep" / "out", progress=False)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"found 0 document.* \(left out: 1 file.* not UTF-8 text, such as .*latin.txt"):
        import_folder(latin, output, progress=False)
    with pytest.raises(UserError, match=r"validation_fraction is 1\.0"):
        import_folder(source, output, validation_fraction=1.0, progress=False)
    with pytest.raises(UserError, match="shard_characters is 0"):
        import_folder(source, output, shard_characters=0, progress=False)
    output.mkdir()
    (output / "shard_00000.parquet").touch()
    with pytest.raises(UserError, match="out is not empty; choose another with --output"):
        import_folder(source, output, progress=False)
