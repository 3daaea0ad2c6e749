"""Token files: contents, when they are written again, and errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import byte_tokenizer
from byte_tokenizer import ByteTokenizer
from lmchat import parquet_pages
from lmchat.data.token_file import Header, token_dir
from lmchat.data.token_shards import TokenShards
from lmchat.data.tokenize import prepare_token_shards
from lmchat.types import UserError

WriteShards = Callable[..., Path]
TEXTS = [["the", "quick", "", None, "brown fox"], ["jumps"], ["over", "die Größe", "the"], ["lazy", "dog"]]


def _prepare(folder: Path, tokenizer: ByteTokenizer) -> int:
    """Number of shards tokenized."""
    return _made(prepare_token_shards(folder, tokenizer, num_threads=2))


def _made(report: str) -> int:
    return int(report.split("; ")[1].split()[0])


def _documents(shards: TokenShards) -> list[list[int]]:
    out = []
    for document in range(len(shards)):
        tokens = np.empty(shards.lengths[document], dtype=shards.dtype)
        shards.copy(document, tokens)
        out.append(tokens.tolist())
    return out


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
@pytest.mark.parametrize("rows_at_once", [1, 2, 16])
def test_documents_keep_their_order_and_start_with_bos(
    write_shards: WriteShards, monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: type, rows_at_once: int
) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_ROWS", rows_at_once)
    tokenizer = ByteTokenizer(vocab_size=vocab_size)
    folder = write_shards(*TEXTS)
    report = prepare_token_shards(folder, tokenizer, num_threads=2)
    train, validation = TokenShards.open_split(folder, tokenizer)
    expected = [tokenizer.document(text) for texts in TEXTS for text in texts if text]
    assert _documents(train) + _documents(validation) == expected
    assert (len(train), len(validation), train.dtype) == (7, 2, dtype)
    tokens = sum(map(len, expected))
    assert train.tokens + validation.tokens == tokens
    made = "4 of 4 shards tokenized now, 2 empty documents skipped"
    assert report == f"{tokens} tokens of 9 documents in {token_dir(folder, tokenizer)}; {made}"


def test_lengths_behave_like_an_array(write_shards: WriteShards) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    shards, _ = TokenShards.open_split(folder, tokenizer)
    lengths = np.array([len(tokenizer.document(text)) for texts in TEXTS[:3] for text in texts if text])
    for start in range(8):
        for stop in range(9):
            assert shards.lengths[start:stop].tolist() == lengths[start:stop].tolist()
    assert [shards.lengths[i] for i in range(7)] == lengths.tolist()
    assert [shards.shard_of(i) for i in range(7)] == [0, 0, 0, 1, 2, 2, 2]


def test_token_files_are_reused(write_shards: WriteShards) -> None:
    folder = write_shards(*TEXTS)
    _prepare(folder, ByteTokenizer())
    again = ByteTokenizer()
    assert _prepare(folder, again) == 0
    assert again.encoded == []


def test_each_tokenizer_has_its_own_token_files(write_shards: WriteShards) -> None:
    folder = write_shards(*TEXTS)
    _prepare(folder, ByteTokenizer("one"))
    other = ByteTokenizer("two")
    with pytest.raises(UserError, match=r"is missing; make it with `lmchat data tokenize`"):
        TokenShards.open_split(folder, other)
    assert _prepare(folder, other) == 4
    assert _prepare(folder, ByteTokenizer("one")) == 0


def test_a_token_file_of_another_tokenizer_is_detected(write_shards: WriteShards) -> None:
    folder = write_shards(*TEXTS)
    one, two = ByteTokenizer("same-first-12 one"), ByteTokenizer("same-first-12 two")
    _prepare(folder, one)
    assert token_dir(folder, one) == token_dir(folder, two)
    assert _prepare(folder, two) == 4


def test_a_changed_shard_is_tokenized_again(write_shards: WriteShards) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    path = folder / "shard_00001.parquet"
    before = path.stat()
    write_shards(TEXTS[0], ["leaps"])  # as long as before
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.utime(folder / "shard_00000.parquet", ns=(0, 0))  # rewritten with the same content
    tokenizer.encoded.clear()
    assert _prepare(folder, tokenizer) == 1
    assert tokenizer.encoded == ["leaps"]


def test_a_copy_with_a_new_time_stamp_is_not_tokenized_again(write_shards: WriteShards) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    for path in folder.glob("*.parquet"):
        os.utime(path, ns=(1, 1))
    tokenizer.encoded.clear()
    assert _prepare(folder, tokenizer) == 0
    headers = [Header.read(path) for path in token_dir(folder, tokenizer).glob("*.tokens")]
    assert {header.source.mtime_ns for header in headers if header} == {1}
    assert tokenizer.encoded == []


@pytest.mark.parametrize("keep", [0, 100, 4096, -1])
def test_a_truncated_token_file_is_made_again(write_shards: WriteShards, keep: int) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    directory = token_dir(folder, tokenizer)
    path = directory / "shard_00002.tokens"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"shard_00002\.tokens is damaged"):
        TokenShards.open_split(folder, tokenizer)
    assert _prepare(folder, tokenizer) == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize(("at", "what"), [(4096, "checksum"), (-1, "offsets")])
def test_a_flipped_bit_is_detected_on_reading(write_shards: WriteShards, at: int, what: str) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    path = token_dir(folder, tokenizer) / "shard_00000.tokens"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"shard_00000\.tokens is damaged \(wrong {what}\); delete it"):
        _documents(TokenShards.open_split(folder, tokenizer)[0])


def test_tokenization_resumes_at_the_interrupted_shard(write_shards: WriteShards) -> None:
    folder = write_shards(*TEXTS)
    with pytest.raises(RuntimeError, match="interrupted"):
        _prepare(folder, ByteTokenizer(fails_on="die Größe"))
    tokenizer = ByteTokenizer()
    directory = token_dir(folder, tokenizer)
    assert sorted(path.name for path in directory.iterdir()) == [".lock", "shard_00000.tokens", "shard_00001.tokens"]
    assert _prepare(folder, tokenizer) == 2
    assert sorted(tokenizer.encoded) == sorted([*TEXTS[2], *TEXTS[3]])  # type: ignore[type-var]


_SLOW_PROCESS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from byte_tokenizer import ByteTokenizer
from lmchat.data.tokenize import prepare_token_shards

class Slow(ByteTokenizer):
    def encode_to_numpy(self, text):
        with open(sys.argv[3], "a") as log:
            log.write(text + "\\n")
        time.sleep(float(sys.argv[4]))
        return super().encode_to_numpy(text)

print(prepare_token_shards(Path(sys.argv[2]), Slow(), num_threads=1))
"""


def _start(folder: Path, log: Path, seconds_per_document: float) -> subprocess.Popen[str]:
    arguments = [Path(byte_tokenizer.__file__).parent, folder, log, seconds_per_document]
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW_PROCESS, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def test_after_sigkill_only_remaining_shards_are_tokenized(write_shards: WriteShards, tmp_path: Path) -> None:
    folder = write_shards(*TEXTS)
    directory = token_dir(folder, ByteTokenizer())
    process = _start(folder, tmp_path / "log", 0.3)
    deadline = time.monotonic() + 60
    while not (directory / "shard_00001.tokens").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tokenizer = ByteTokenizer()
    assert _prepare(folder, tokenizer) == 2
    assert not list(directory.glob("*.tmp"))
    train, validation = TokenShards.open_split(folder, tokenizer)
    assert _documents(train) + _documents(validation) == [
        tokenizer.document(text) for texts in TEXTS for text in texts if text
    ]


def test_only_one_of_several_processes_tokenizes(write_shards: WriteShards, tmp_path: Path) -> None:
    folder = write_shards(*TEXTS)
    log = tmp_path / "log"
    processes = [_start(folder, log, 0.1) for _ in range(3)]
    made = [_made(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(made) == [0, 0, 4]
    assert sorted(log.read_text().split("\n")[:-1]) == sorted(text for texts in TEXTS for text in texts if text)


def test_a_read_only_data_folder_is_not_changed(
    write_shards: WriteShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    folder.chmod(0o555)
    try:
        _prepare(folder, tokenizer)
        assert token_dir(folder, tokenizer).is_relative_to(tmp_path / "base" / "tokens")
        assert len(TokenShards.open_split(folder, tokenizer)[0]) == 7
        assert not (folder / "tokens").exists()
    finally:
        folder.chmod(0o755)


def test_mapped_shards_keep_no_file_descriptors(write_shards: WriteShards) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*[["text"]] * 30)
    _prepare(folder, tokenizer)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    train, _ = TokenShards.open_split(folder, tokenizer)
    assert len(_documents(train)) == 29
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_user_mistakes_are_reported(write_shards: WriteShards, tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()

    def fails(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            _prepare(folder, tokenizer)

    fails(tmp_path / "nowhere", r"no data folder .*nowhere; run `lmchat data download`")
    folder = write_shards()
    fails(folder, r"data has no \.parquet file; at least two shards")
    write_shards(["one"])
    fails(folder, r"has only shard_00000\.parquet; at least two")
    write_shards(["one"], ["two"], column="content")
    fails(folder, r"shard_00000\.parquet has no column `text` \(it has: content\)")
    write_shards(["", None], [])
    _prepare(folder, tokenizer)
    with pytest.raises(UserError, match="there is no text in shard_00000"):
        TokenShards.open_split(folder, tokenizer)
    pq.write_table(pa.table({"text": [1, 2]}), folder / "shard_00001.parquet")
    fails(folder, r"column `text` of .*shard_00001\.parquet contains int64, not strings")
    path = folder / "shard_00001.parquet"
    for broken in (path.read_bytes()[:-20], b"", b"no parquet"):
        path.write_bytes(broken)
        fails(folder, r"cannot read .*shard_00001\.parquet, truncated or not a parquet file")


def test_a_header_with_a_flipped_bit_is_read_correctly_or_rejected(write_shards: WriteShards) -> None:
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    path = token_dir(folder, tokenizer) / "shard_00000.tokens"
    whole = path.read_bytes()
    fields = len(whole[:4096].rstrip())
    for position in range(fields):
        for bit in (0, 2, 5, 7):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
            header = Header.read(path)
            assert header is None or header.dtype in ("uint16", "uint32")
    for line in (b"[" * 4095, b"7", b"null", b'{"format": 1}', b"\xff"):
        path.write_bytes(line.ljust(4095) + b"\n" + whole[4096:])
        assert Header.read(path) is None
    assert _prepare(folder, tokenizer) == 1
    assert path.read_bytes()[4096:] == whole[4096:]


def test_a_flipped_bit_is_detected_in_the_background(write_shards: WriteShards) -> None:
    """Also in a file that the run has not read yet."""
    tokenizer = ByteTokenizer()
    folder = write_shards(*TEXTS)
    _prepare(folder, tokenizer)
    path = token_dir(folder, tokenizer) / "shard_00002.tokens"
    content = bytearray(path.read_bytes())
    content[4097] ^= 4
    path.write_bytes(content)
    train, _ = TokenShards.open_split(folder, tokenizer)
    first = np.empty(1, dtype=train.dtype)
    train.copy(0, first)
    train.check_in_background()
    for thread in threading.enumerate():
        if thread.name == "token file check":
            thread.join(60)
    with pytest.raises(UserError, match=r"shard_00002\.tokens is damaged \(wrong checksum\); delete it"):
        train.copy(0, first)
