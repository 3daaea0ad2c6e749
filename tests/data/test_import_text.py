"""Import of text files to shards: complete, without duplicates, deterministic."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmchat.data import documents, shard_writer
from lmchat.data.documents import NOT_TEXT, DocumentReader, parse_separator
from lmchat.data.import_text import import_folder
from lmchat.data.parquet_text import list_shards
from lmchat.data.shard_writer import write_shards
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
        gzip.compress(b'{"text": "json one"}\n{"text": "zipped \\ud800 \\ud83d\\ude00"}', mtime=0)
    )
    pq.write_table(pa.table({"text": ["from parquet", None, "  \n"]}), folder / "f.parquet")
    (folder / "binary.txt").write_bytes(b"abc\x00def")
    (folder / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (folder / "code.py").write_text("pass")
    (folder / ".git" / "hidden.txt").write_text("hidden")
    return folder


def test_every_file_format_is_imported(source: Path, tmp_path: Path) -> None:
    report = import_folder(source, tmp_path / "out")
    *train, validation = _read(tmp_path / "out")
    documents = {"plain text", "# mark\ndown", "json one", "json two", "zipped ? 😀", "from parquet"}
    assert sorted(sum(train, []) + validation) == sorted(documents)  # noqa: RUF017
    assert (report.shards.train_shards, report.shards.train_documents, report.shards.validation_documents) == (1, 5, 1)
    assert (report.shards.duplicates, report.shards.blank) == (2, 3)
    assert report.shards.characters == sum(map(len, documents))
    assert (report.found.others, report.found.hidden) == ({".py": 1}, 1)
    assert [Path(path).name for path in report.reader.left_out[NOT_TEXT]] == ["binary.txt", "latin.txt"]
    assert not (tmp_path / "out.partial").exists()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    texts=st.lists(st.text(max_size=30), max_size=60),
    seed=st.integers(0, 2),
    fraction=st.floats(0.01, 0.9),
    shard_characters=st.integers(1, 300),
)
def test_documents_are_kept_once_and_split(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    seed: int,
    fraction: float,
    shard_characters: int,
) -> None:
    unique = {text for text in texts if text.strip()}
    output = tmp_path_factory.mktemp("import") / "out"
    options = {"seed": seed, "validation_fraction": fraction, "shard_characters": shard_characters}
    if len(unique) < 2:
        with pytest.raises(UserError, match="at least 2 are needed"):
            write_shards(texts, output, **options)
        assert not output.exists()
        return
    report = write_shards(texts, output, **options)
    *train, validation = _read(output)
    documents = [text for shard in (*train, validation) for text in shard]
    assert sorted(documents) == sorted(unique)
    assert len(validation) == report.validation_documents == min(max(1, round(fraction * len(unique))), len(unique) - 1)
    assert len(train) == report.train_shards
    assert all(sum(map(len, shard)) >= shard_characters for shard in train[:-1])
    assert all(sum(map(len, shard[:-1])) < shard_characters for shard in train)

    # The order of the input does not matter.
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
    report = import_folder(path, tmp_path / "out", separator="<|end|>")
    assert sorted(text for shard in _read(tmp_path / "out") for text in shard) == ["one", "two"]
    assert report.shards.blank == 1


def test_another_field_and_column(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"content": "one"}))
    pq.write_table(pa.table({"content": ["two"]}), tmp_path / "in" / "b.parquet")
    import_folder(tmp_path / "in", tmp_path / "out", text_field="content")
    assert sorted(text for shard in _read(tmp_path / "out") for text in shard) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n[1]\n', r"a\.jsonl:2 has no field `text` but a list"),
        ("a.jsonl", b'{"messages": [], "id": 3}', r"a\.jsonl:1 has no field `text` but the fields messages, id"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field `text` is of type int, not a string"),
        ("a.jsonl", b'\n{"text": "\xff"}', r"a\.jsonl:2 is not valid JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 9, mtime=0)[:-12], r"a\.jsonl\.gz is damaged"),
        ("a.jsonl.gz", b'{"text": "one"}\n', r"a\.jsonl\.gz is damaged"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz is damaged or .* no compressed data; .* remove \.gz from its name"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst is .* no compressed data; .* remove \.zst from its name"),
        ("a.txt.xz", bz2.compress(b"text"), r"a\.txt\.xz is .* contains \.bz2 data; .* end its name in \.bz2"),
        ("a.parquet", b"PAR1", r"cannot read .*a\.parquet"),
        ("a.txt", b"only one", r"found 1 document\(s\) with text, at least 2"),
        ("a.docx", b"word", r"has no file of the kinds \.txt"),
    ],
)
def test_malformed_input_is_reported(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "in", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_user_mistakes_are_reported(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"nothing to import: .*nowhere does not exist"):
        import_folder(tmp_path / "nowhere", output)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"nothing to import: .*loop does not exist"):
        import_folder(tmp_path / "loop", output)
    with pytest.raises(UserError, match="is inside the source"):
        import_folder(source, source / "deep" / "out")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(
        UserError, match=r"found 0 document.* \(left out: 1 no text in a known encoding.*, such as .*latin.txt"
    ):
        import_folder(latin, output)
    with pytest.raises(UserError, match=r"validation_fraction is 1\.0"):
        import_folder(source, output, validation_fraction=1.0)
    with pytest.raises(UserError, match="shard_characters is 0"):
        import_folder(source, output, shard_characters=0)
    output.mkdir()
    (output / "shard_00000.parquet").touch()
    with pytest.raises(UserError, match="out is not empty; choose another with --output"):
        import_folder(source, output)


def texts_in(folder: Path) -> list[str]:
    return sorted(text for shard in _read(folder) for text in shard)


RECORDS = [{"text": "first"}, {"text": 'second, "quoted"\nwith a line break'}, {"text": "drei größer 😀"}]
EXPECTED = sorted(record["text"] for record in RECORDS)


def as_csv(delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *([str(number), record["text"]] for number, record in enumerate(RECORDS))])
    return file.getvalue()


JSON_LINES = "\n".join(map(json.dumps, RECORDS))
FORMS = {
    "a.json": json.dumps(RECORDS, ensure_ascii=False),
    "indented.json": json.dumps(RECORDS, indent=2),
    "lines.json": JSON_LINES,
    "strings.json": json.dumps(EXPECTED),
    "two_arrays.json": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]),
    "array_and_record.json": f"{json.dumps(RECORDS[:2])} {json.dumps(RECORDS[2])}",
    "comma.json": json.dumps(RECORDS)[:-1] + ",]",
    "a.ndjson": JSON_LINES,
    "a.csv": as_csv(","),
    "semicolons.csv": as_csv(";"),
    "a.tsv": as_csv("\t"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_formats_and_encodings_are_recognized(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name].encode(encoding))
    report = import_folder(tmp_path / name, tmp_path / "out")
    assert texts_in(tmp_path / "out") == EXPECTED
    assert len(report.reader.recoded) == (not encoding.startswith("utf-8"))


RUSSIAN = "Широкая электрификация южных губерний даст мощный толчок подъёму сельского хозяйства."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"{RUSSIAN}|еще"),
        ("a.csv", f"text\n{RUSSIAN}\nеще\n"),
        ("a.jsonl", f'{{"text": "{RUSSIAN}"}}\n{{"text": "еще"}}\n'),
        ("a.json", f'["{RUSSIAN}", "еще"]'),
    ],
)
@pytest.mark.parametrize(("encoding", "named"), [("cp1251", None), ("koi8-r", None), ("mac-cyrillic", "mac-cyrillic")])
def test_other_encodings_are_detected_or_given(
    tmp_path: Path, name: str, content: str, encoding: str, named: str | None
) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    separator = "|" if name == "a.txt" else None
    report = import_folder(tmp_path / name, tmp_path / "out", separator=separator, encoding=named)
    assert texts_in(tmp_path / "out") == sorted([RUSSIAN, "еще"])
    assert list(report.reader.recoded) == [encoding.replace("koi8-", "koi8_").upper()]


@pytest.mark.parametrize(
    "content",
    [
        ("größer " * 50).encode() + b"\xff" + ("größer " * 50).encode(),
        b"abc\0def\n" * 100,
        bytes(range(1, 256)) * 9,
        "ja".encode("utf-16")[:-1],
    ],
)
def test_files_that_are_not_text_are_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    reader = DocumentReader()
    assert list(reader.read(tmp_path / "a.txt")) == []
    assert reader.left_out[NOT_TEXT] == [str(tmp_path / "a.txt")]


def test_typographic_quotes_are_windows_1252(tmp_path: Path) -> None:
    text = "It’s a “quoted” text — really. " * 4
    (tmp_path / "a.txt").write_bytes(text.encode("cp1252"))
    reader = DocumentReader()
    assert (list(reader.read(tmp_path / "a.txt")), list(reader.recoded)) == ([text], ["CP1252"])


def test_serbian_is_not_read_as_hebrew(tmp_path: Path) -> None:
    text = "Није могуће да се прочита датотека из наведеног директоријума, проверите да ли имате право приступа.\n" * 2
    (tmp_path / "a.txt").write_bytes(text.encode("cp1251"))
    reader = DocumentReader()
    assert (list(reader.read(tmp_path / "a.txt")), list(reader.recoded)) == ([text], ["CP1251"])


def test_a_short_hebrew_text_is_not_read_as_cyrillic(tmp_path: Path) -> None:
    text = "אני הולך היום לשוק כדי לקנות לחם.\n"
    (tmp_path / "a.txt").write_bytes(text.encode("cp1255"))
    reader = DocumentReader()
    assert (list(reader.read(tmp_path / "a.txt")), list(reader.recoded)) == ([text], ["CP1255"])


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="--encoding is klingon, which Python does not know"):
        import_folder(tmp_path / "a.txt", tmp_path / "out", encoding="klingon")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files(tmp_path: Path, name: str, suffix: str) -> None:
    content = FORMS.get(name, JSON_LINES if name == "a.jsonl" else "|".join(EXPECTED)).encode()
    half = len(content) // 2
    compress = COMPRESSIONS[suffix]
    # Several streams one after the other, as parallel compressors write them.
    (tmp_path / f"{name}{suffix}").write_bytes(compress(content[:half]) + compress(content[half:]))
    separator = "|" if name == "a.txt" else None
    import_folder(tmp_path / f"{name}{suffix}", tmp_path / "out", separator=separator)
    assert texts_in(tmp_path / "out") == EXPECTED


def test_realistic_files_are_imported(tmp_path: Path) -> None:
    """A folder with links to a folder, in a circle and to a missing file, and with files that macOS creates."""
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("linked")
    (source / "more").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(source)
    (source / "lost.txt").symlink_to(tmp_path / "nowhere")
    (source / "a.txt").write_text("plain")
    (source / "._a.txt").write_bytes(b"\0\5\26\7")
    (source / "scan.PDF").write_bytes(b"%PDF")
    (source / "notes").write_text("no suffix")
    os.mkfifo(source / "pipe.txt")
    report = import_folder(source, tmp_path / "out")
    assert texts_in(tmp_path / "out") == ["linked", "plain"]
    assert report.found.others == {".pdf": 1, "without a suffix": 1, "not a regular file": 1}
    shown = str(report)
    assert "1 .pdf" in shown and "1 hidden files" in shown
    assert f"a link that points nowhere: {source / 'lost.txt'}" in shown


@pytest.mark.parametrize(
    ("content", "separator"),
    [
        ("one\n\ntwo\n\nthree", "\n\n"),
        ("one\r\n\r\ntwo\r\n\r\nthree", "\n\n"),
        ("one\n\ntwo\r\n\r\nthree", r"\n\n"),
        ("one\r\n\r\ntwo\n\nthree", "\r\n\r\n"),
        ("one\n---\ntwo\n---\nthree", r"\n---\n"),
        ("one\ttwo\tthree", r"\t"),
        (r"one\newpage two\newpage three", r"\newpage "),
        ("one.*two.*three", ".*"),
    ],
)
def test_separators_are_unescaped(tmp_path: Path, content: str, separator: str) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    import_folder(tmp_path / "a.txt", tmp_path / "out", separator=separator)
    assert texts_in(tmp_path / "out") == ["one", "three", "two"]


def test_a_separator_without_occurrence_is_reported(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\ntwo")
    (tmp_path / "in" / "b.txt").write_text("three\nfour")
    with pytest.raises(UserError, match=r"--separator '===' occurs in none of the 2 plain text files"):
        import_folder(tmp_path / "in", tmp_path / "out", separator="===")
    with pytest.raises(UserError, match="--separator is empty"):
        import_folder(tmp_path / "in", tmp_path / "out", separator="")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "c.txt").write_text("five===six")
    report = import_folder(tmp_path / "in", tmp_path / "out", separator="===")
    assert "without the separator: 2 plain text files" in str(report)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.text("ab\r\n ", max_size=12), min_size=1, max_size=12),
    chunk=st.integers(1, 7),
    most=st.integers(3, 40),
)
def test_streaming_equals_reading_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], chunk: int, most: int
) -> None:
    """Equals splitting the whole text at the separators; long parts are divided without loss, within the limit."""
    text = "\n\n".join(parts)
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    whole = re.split("\r?\n\r?\n", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_CHUNK_BYTES", chunk)
        unlimited = DocumentReader(separator=parse_separator("\n\n"))
        assert list(unlimited.read(path)) == whole
        assert unlimited.divided == 0
        limited = DocumentReader(separator=parse_separator("\n\n"), max_characters=most)
        pieces = list(limited.read(path))
    assert max(map(len, pieces)) <= most
    assert limited.divided == sum(len(part) > most for part in whole)
    assert "".join(pieces) == "".join(whole)


def test_long_documents_are_divided_at_words_and_long_lines_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("word " * 30)
    (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"text": "line " * 200}) + '\n{"text": "short"}\n')
    report = import_folder(tmp_path / "in", tmp_path / "out", max_document_characters=50)
    assert texts_in(tmp_path / "out") == ["short", "word " * 10]  # three equal pieces, once
    shown = str(report)
    assert "divided: 1 documents longer than 50 characters" in shown
    assert f"a record that is too long: {tmp_path / 'in' / 'b.jsonl'}:1" in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", r"a\.csv has no column `text` \(its first line has: id, body\)"),
        ("a.csv", 'text\n"open\n', r"a\.csv, line \d: unexpected end of data"),
        ("a.csv", "text\n" + "x" * 100, r"a\.csv has a line longer than 40 characters.*--max_document_characters"),
        ("a.json", '[{"text": "a"}, {"text": ]', r"a\.json: value 2 is not valid JSON"),
        ("a.json", '[{"text": "a"}', r"a\.json ends within its array, after value 1"),
        ("a.json", "[" * 100_000, r"a\.json: value 1 is "),
        ("a.json", '{"text": "' + "x" * 300, r"a\.json: value 1 is longer than 240 characters"),
        ("a.json", '{"data": [{"text": "a"}]}', r"value 1 has no field `text` but the fields data"),
    ],
)
def test_malformed_tables_and_arrays_are_reported(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / name, tmp_path / "out", max_document_characters=40)


def test_shards_are_in_the_order_of_their_documents_hashes(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(300)] + ["again"] * 300
    report = write_shards(texts, tmp_path / "out", seed=5, shard_characters=1000)
    found = [text for shard in _read(tmp_path / "out") for text in shard]
    assert found == sorted(
        set(texts), key=lambda text: hashlib.blake2b(text.encode(), digest_size=16, key=b"5").digest()
    )
    assert (report.train_documents + report.validation_documents, report.duplicates) == (301, 299)


@pytest.mark.parametrize(
    ("cache", "size", "message"),
    [
        (1, 1 << 20, r"cannot sort the documents in .*out.* \(.*\); make room, or"),
        (1 << 17, 1 << 15, r"cannot write .*out.* \(.*File too large\); make room, "),
    ],
)
def test_a_full_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: int, size: int, message: str
) -> None:
    """While documents are sorted, and while shards are written."""
    monkeypatch.setattr(shard_writer, "_CACHE_KILOBYTES", cache)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        with pytest.raises(UserError, match=message):
            write_shards((f"{number**99} " * 100 for number in range(1000)), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "dictionary", "end", "second stream"])
def test_xz_files_of_several_streams_are_read_in_bounded_memory(tmp_path: Path, damage: str) -> None:
    streams = [lzma.compress(f"part {number} ".encode() * 30_000, preset=number) for number in range(3)]
    if damage == "dictionary":  # in the header of a block, with its checksum: of 1.5 GB
        stream = bytearray(streams[1])
        end = 12 + stream[12] * 4
        stream[stream.index(b"\x21\x01", 12) + 2] = 37
        stream[end : end + 4] = zlib.crc32(stream[12:end]).to_bytes(4, "little")
        streams[1] = bytes(stream)
    elif damage == "second stream":
        streams[1] = b"garbage" + streams[1]
    content = bytes(8).join(streams)
    (tmp_path / "a.txt.xz").write_bytes(content[:-20] if damage == "end" else content)
    reader = DocumentReader()
    if not damage:
        assert "".join(reader.read(tmp_path / "a.txt.xz")) == "".join(f"part {n} " * 30_000 for n in range(3))
        return
    problem = "takes more than 300 MB of memory to decompress; .*xz -9" if damage == "dictionary" else "is damaged"
    with pytest.raises(UserError, match=rf"a\.txt\.xz {problem}"):
        list(reader.read(tmp_path / "a.txt.xz"))
