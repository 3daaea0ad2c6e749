from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import lzma
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from contextlib import redirect_stderr
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lmchat import progress
from lmchat.data.parquet_text import read_documents
from lmchat.tasks.base import exchange, reference_answer
from lmchat.tasks.row_files import MalformedRow, read_rows
from lmchat.tasks.rows import HubDataset, RowTask, field
from lmchat.types import Conversation, UserError


class Texts(RowTask):
    """A task whose rows have one text each."""

    def __init__(self, path: str | None = None, split: str = "test", **options: Any) -> None:
        super().__init__(hub=HubDataset("nobody/nothing", None, split), path=path, **options)

    def conversation(self, row: Any) -> Conversation:
        return exchange("say it", field(row, "text", str))


ROWS = [{"text": f"text {number}"} for number in range(7)]


def texts(task: RowTask) -> list[str]:
    return [reference_answer(conversation) for conversation in task]


def write(path: Path, rows: list[Any]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_reads_every_format(tmp_path: Path, name: str) -> None:
    task = Texts(str(write(tmp_path / name, ROWS)), shuffle_seed=None)
    assert texts(task) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_reading_shows_its_progress_to_the_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    rows = [{"text": random.Random(number).randbytes(500).hex()} for number in range(3000)]
    path = write(tmp_path / name, rows)
    if name == "rows.csv":
        path.write_text("\n".join(["text", *(row["text"] for row in rows)]))
    with redirect_stderr(io.StringIO()) as log:
        assert len(read_rows(path)) == len(rows)
    shares = [int(re.match(rf"Reading {name}: +(\d+)%", line)[1]) for line in log.getvalue().splitlines()]  # type: ignore[index]
    assert len(set(shares)) > 2 and shares[-1] == 100


def test_order_matches_the_reference(tmp_path: Path, fixtures: Path) -> None:
    oracle = json.loads((fixtures / "c12_tasks.json").read_text())["dataset_shuffle_seed42_first20"]
    for size, first in oracle.items():
        if int(size) < 2_000:
            path = write(tmp_path / f"{size}.jsonl", [{"text": str(number)} for number in range(int(size))])
            assert texts(Texts(str(path), stop=20)) == [str(number) for number in first]
        assert np.random.default_rng(42).permutation(int(size))[:20].tolist() == first


def test_a_malformed_row_does_not_change_the_order(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": str(number)} for number in range(50)]
    whole = texts(Texts(str(write(tmp_path / "whole.jsonl", rows))))
    rows[17] = {"text": ""}
    with pytest.warns(UserWarning, match="1 of 50"):
        rest = texts(Texts(str(write(tmp_path / "rest.jsonl", rows)), skip_malformed=True))
    assert rest == [text for text in whole if text != "17"]
    bad = write(tmp_path / "bad.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"(?s)1 of 1 rows are malformed.*; correct them$"):
        texts(Texts(str(bad), skip_malformed=True))


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="shuffle_seed is -1; use 0 or more, or null"):
        Texts("rows.jsonl", shuffle_seed=-1)


def test_a_folder_gives_the_files_of_the_split_in_order(tmp_path: Path) -> None:
    write(tmp_path / "test-00001-of-00002.parquet", ROWS[3:])
    write(tmp_path / "test-00000-of-00002.jsonl", ROWS[:3])
    write(tmp_path / "train.jsonl", [{"text": "not this"}])
    write(tmp_path / "testing.jsonl", [{"text": "nor this"}])
    (tmp_path / "test.txt").write_text("nor this")
    task = Texts(str(tmp_path), shuffle_seed=None)
    assert texts(task) == [row["text"] for row in ROWS]
    assert len(read_rows(tmp_path)) == len(ROWS) + 2


def test_malformed_rows_are_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n\n{"text": 3}\n{"txt": "x"}\n{"text": \n[1]\n{"text": ""}\n{"text": "\xff"}\n'
        b'{"text": "\\ud800"}\n{"text": "good too"}\n' + b"[" * 100_000 + b"\n"
    )
    with pytest.raises(UserError) as caught:
        len(Texts(str(path)))
    message = str(caught.value)
    assert "8 of 10 rows are malformed" in message
    for expected in (
        f"{path}, line 3: field 'text' is int, not str",
        "line 4: field 'text' is missing (there are: txt)",
        "line 5: not JSON",
        "line 6: the row is list",
        "line 7: field 'text' is empty",
        "...",
        "skip_malformed",
    ):
        assert expected in message
    assert "line 8" not in message  # only the first few are listed

    task = Texts(str(path), skip_malformed=True, shuffle_seed=None)
    with pytest.warns(UserWarning, match="8 of 10 rows are malformed"):
        assert texts(task) == ["good", "good too"]
    with pytest.raises(MalformedRow, match="surrogate"):
        task.check(task.rows[7])


def test_malformed_parquet_rows_are_located(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"text": "good"}, {"text": None}])
    with pytest.raises(UserError, match=r"rows.parquet, row 1: field 'text' is NoneType"):
        len(Texts(str(path)))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.parquet"])
def test_truncated_files_are_reported(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{name}"):
        len(Texts(str(path)))


def test_missing_and_useless_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        len(Texts(str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"contains no test\.jsonl"):
        len(Texts(str(tmp_path)))
    (tmp_path / "rows.xlsx").write_text("text\na\n")
    with pytest.raises(UserError, match="is not one of"):
        len(Texts(str(tmp_path / "rows.xlsx")))
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match="contains no rows"):
        len(Texts(str(tmp_path / "rows.jsonl")))


def test_the_hub_is_accessed_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    class Builder:
        cache_dir = "nowhere"

        def __init__(self, repository: str, config: str | None) -> None:
            asked.append((repository, config))

        def download_and_prepare(self) -> None:
            asked.append("download")

        def as_dataset(self, split: str) -> datasets.Dataset:
            asked.append(split)
            return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    task = Texts(split="train", shuffle_seed=None)
    assert asked == []
    assert task.name == "Texts/train"
    assert texts(task) == [row["text"] for row in ROWS]
    assert asked == [("nobody/nothing", None), "download", "train"]


def test_a_hub_failure_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset_builder(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError, match=r"nobody/nothing \(test\).*no route.*`path`"):
        len(Texts())


def test_field_does_not_accept_a_boolean_as_a_number() -> None:
    assert field({"answer": 1}, "answer", int) == 1
    with pytest.raises(MalformedRow, match="bool"):
        field({"answer": True}, "answer", int)


def packed(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        path.write_bytes(zstd(content))
    else:
        path.write_bytes(content)
    return path


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PAIR = [{"text": "a"}, {"text": "b"}]
CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"},\n{"text": "b"},\n', PAIR),
        ('[{"text": "a"}, {"text": "b"},]', PAIR),
        ('[\n{"text": "a"},\n{"text": "b"}\n]\n', PAIR),
        ('[{"text": "a"}]\n[{"text": "b"}]', [PAIR[:1], PAIR[1:]]),
        ('{"text":\n"a"\n}\n{"text":\n"b"\n}', PAIR),
        (json.dumps(CONVERSATION), [CONVERSATION]),
        (json.dumps([CONVERSATION] * 2, indent=1), [CONVERSATION] * 2),
    ],
)
def test_json_is_read_however_it_is_broken_into_lines(
    tmp_path: Path, kind: str, content: str, expected: list[Any]
) -> None:
    (tmp_path / f"rows{kind}").write_text(content)
    assert list(read_rows(tmp_path / f"rows{kind}")) == expected  # type: ignore[call-overload]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_are_read(tmp_path: Path, delimiter: str) -> None:
    table = f'prompt{delimiter}answer\r\n"two\nlines"{delimiter}"a ""b"", c; d"\r\n'
    (tmp_path / "rows.csv").write_text(table, newline="")
    rows = read_rows(tmp_path / "rows.csv")
    assert list(rows) == [{"prompt": "two\nlines", "answer": 'a "b", c; d'}]  # type: ignore[call-overload]
    assert rows.location(0).endswith("rows.csv, row 0")


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json"])
def test_reads_lines_and_arrays_compressed_or_not(tmp_path: Path, kind: str, packing: str) -> None:
    content = json.dumps(ROWS) if kind == ".json" else "\r\n".join(map(json.dumps, ROWS))
    task = Texts(str(packed(tmp_path / f"rows{kind}{packing}", content.encode())), shuffle_seed=None)
    assert texts(task) == [row["text"] for row in ROWS]


def test_a_json_file_may_contain_lines_or_one_row(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    assert len(read_rows(packed(tmp_path / "lines.json", lines.encode()))) == len(ROWS)
    assert len(read_rows(packed(tmp_path / "one.json", b'{\n"text":\n"a"}'))) == 1
    for content, problem in (
        (b'[{"text": "a"},', "ends within its array, after value 1"),
        (b'[{"text": "a"}, {"text": ]', "value 2 is not valid JSON"),
        (b'[{"text": "\xe9"}]', "is not valid utf-8 text .*save it as UTF-8"),
    ):
        with pytest.raises(UserError, match=rf"broken\.json.* {problem}"):
            read_rows(packed(tmp_path / "broken.json", content))
    with pytest.raises(UserError, match=r"quotes\.csv, line 2: unexpected end of data"):
        read_rows(packed(tmp_path / "quotes.csv", b'text\n"open'))
    rows = read_rows(packed(tmp_path / "array.json", b'[{"text": "a"}, 3]'))
    assert rows.location(1).endswith("array.json, element 1")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_read_and_reported(tmp_path: Path, encoding: str) -> None:
    rows = read_rows(packed(tmp_path / "rows.jsonl", '{"text": "日本é"}\n\n{"text": "b"}\n'.encode(encoding)))
    assert [row["text"] for row in map(rows.__getitem__, range(2))] == ["日本é", "b"]
    assert rows.location(1).endswith("line 3")
    assert bool(rows.notes) is (encoding != "utf-8-sig")
    assert all(f"is {encoding.upper()}" in note for note in rows.notes)


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    good = zstd(b'{"text": "a"}\n' * 1000)
    for name, content in (("a.jsonl.zst", good[:-9]), ("b.jsonl.zst", b"xxxx"), ("c.jsonl", b"\xff\xfea")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}"):
            read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), r"\.gz data; unpack it, or add \.gz to its name"),
        (zstd(b'{"text": "a"}'), r"\.zst data; unpack it, or add \.zst to its name"),
        (lzma.compress(b'{"text": "a"}'), r"\.xz data; unpack it, or add \.xz to its name"),
        (bz2.compress(b'{"text": "a"}'), r"\.bz2 data; unpack it, or add \.bz2 to its name"),
        (b"PK\x03\x04\x14", "a ZIP archive or a spreadsheet"),
        (b"PAR1\x15", r"parquet; end its name in \.parquet"),
    ],
)
def test_packed_files_under_another_name_are_recognized(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"a.jsonl contains {message}"):
        read_rows(tmp_path / "a.jsonl")


def test_a_folder_of_hidden_files_says_so(tmp_path: Path) -> None:
    (tmp_path / ".a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"contains no .* \(hidden files and folders passed over: 1\)"):
        read_rows(tmp_path)


def test_a_folder_is_read_with_its_subfolders_but_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/rows.jsonl", "a.jsonl", ".hidden.jsonl", ".git/x.jsonl", "._a.jsonl", "notes.txt"):
        packed(tmp_path / "data" / name, json.dumps({"text": name}).encode())
    packed(tmp_path / "elsewhere" / "c.jsonl", b'{"text": "linked"}')
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "lost.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "data" / "pipe.jsonl")
    rows = read_rows(tmp_path / "data")
    assert [rows[index]["text"] for index in range(len(rows))] == ["a.jsonl", "b/rows.jsonl", "linked"]
    assert any("hidden files and folders passed over: 3" in note for note in rows.notes)
    assert any("files of other kinds passed over: 1 .txt, 1 not a regular file" in note for note in rows.notes)
    assert any("1 link(s) that point nowhere passed over, such as lost.jsonl" in note for note in rows.notes)
    with pytest.raises(UserError, match="is not a regular file"):
        read_rows(tmp_path / "data" / "pipe.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])
def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "') + gzip.compress(b"a" * 2**20) * 600)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"line (of more|longer) than 134,217,728 "):
        read_rows(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 3 * 2**27
    tracemalloc.stop()


def test_a_row_in_another_encoding_says_so(tmp_path: Path) -> None:
    rows = read_rows(packed(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text": "é"}'.encode("latin-1")))
    with pytest.raises(MalformedRow, match=r"not UTF-8 .*0xe9"):
        rows[1]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv"])
def test_rows_stay_on_the_disk(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"{number} " + "word " * 1000} for number in range(4000)]
    content = {
        ".json": json.dumps(rows, indent=0),
        ".csv": "".join(f"{row['text']}\n" for row in [{"text": "text"}, *rows]),
    }.get(Path(name).suffix, "".join(json.dumps(row) + "\n" for row in rows))
    path = packed(tmp_path / name, content.encode())
    size = len(content)
    del content
    tracemalloc.start()
    found = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2
    assert [found[index] for index in (0, 1999, 3999)] == [rows[index] for index in (0, 1999, 3999)]
    assert len(found) == 4000


@pytest.mark.parametrize("reader", [read_rows, read_documents])
def test_a_small_parquet_file_of_large_rows_is_read_in_little_memory(
    tmp_path: Path, reader: Callable[..., Any]
) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"text": ["word " * 200_000] * 100}), path)
    assert path.stat().st_size < 200_000
    before, peak = pa.total_allocated_bytes(), 0
    rows = reader(path)
    for row in rows if reader is read_documents else map(rows.__getitem__, range(len(rows))):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert row in ("word " * 200_000, {"text": "word " * 200_000})
    assert peak < 40e6


def test_a_document_that_does_not_fit_in_memory_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(pa.table({"text": ["word"]}), tmp_path / "large.parquet")

    def fail(*_: Any, **__: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 999611200 failed")

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", fail)
    with pytest.raises(UserError, match=r"large\.parquet has too large documents for the free memory \(malloc"):
        list(read_documents(tmp_path / "large.parquet"))


def test_parquet_values_that_are_not_json_are_no_text(tmp_path: Path) -> None:
    row = {
        "text": b"a",
        "day": datetime.date(2026, 1, 2),
        "price": Decimal("1.5"),
        "part": float("nan"),
        "tags": ["b", None],
    }
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows[0]["tags"] == ["b", None] and rows[0]["day"] == {"date": "2026-01-02"}
    with pytest.raises(UserError, match=r"rows\.parquet, row 0: field 'text' is dict, not str"):
        texts(Texts(str(tmp_path / "rows.parquet")))
