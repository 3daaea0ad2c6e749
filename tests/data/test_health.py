"""`lmchat data check` compared with brute force: all pairs of documents, and sets of word tuples."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from byte_tokenizer import ByteTokenizer
from lmchat.commands.data import check
from lmchat.data import health as health_module
from lmchat.data.evaluation_overlap import EvaluationOverlap, evaluation_files, strings_of
from lmchat.data.health import check_mixtures, check_shards
from lmchat.data.mixture import Mixture, MixturePart
from lmchat.data.near_duplicates import NearDuplicates
from lmchat.data.packing import BestFitPacker
from lmchat.data.tokenize import prepare_token_shards
from lmchat.data.word_grams import word_hashes
from lmchat.tasks import JSONLConversations
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_conversation
from lmchat.types import UserError

WriteShards = Callable[..., Path]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def _text(rng: random.Random, words: int) -> list[str]:
    return [f"w{rng.randrange(2000)}" for _ in range(words)]


def _corpus(rng: random.Random) -> list[str]:
    """Documents of 0 to 300 words, a third of them copies with no, two or 40 % of the words changed."""
    documents = [_text(rng, rng.choice([0, 1, 4, 5, 6, 40, 300, 300])) for _ in range(60)]
    for original in rng.choices(documents, k=30):
        changed = rng.sample(range(len(original)), min(len(original), rng.choice([0, 2, 2, len(original) * 2 // 5])))
        documents.append([f"x{word}" if at in changed else word for at, word in enumerate(original)])
    return [" ".join(words) for words in documents]


def test_duplicates_equal_brute_force_over_all_pairs(write_shards: WriteShards) -> None:
    texts = _corpus(random.Random(3))
    first: dict[str, int] = {}
    expected: dict[str, list[int]] = {"exact_duplicates": [0, 0], "near_duplicates": [0, 0], "empty": [0, 0]}
    for number, text in enumerate(texts):
        shard, grams = int(number >= 45), _grams(text, 5)
        similarities = [
            len(grams & other) / len(grams | other) for other in (_grams(each, 5) for each in first) if grams | other
        ]
        assert not any(0.7 < value < 0.9 for value in similarities), "too close to the threshold for a test"
        if not text:
            expected["empty"][shard] += 1
        elif text in first:
            expected["exact_duplicates"][shard] += 1
        else:
            first[text] = number
            expected["near_duplicates"][shard] += any(value >= 0.8 for value in similarities)
    health = check_shards(write_shards(texts[:45], texts[45:]))
    for name, counts in expected.items():
        assert [getattr(shard, name) for shard in health.shards] == counts
        assert getattr(health.total, name) == sum(counts)
    assert expected["exact_duplicates"][1] > 2 and expected["near_duplicates"][1] > 2
    assert health.total.characters == sum(map(len, texts))


def test_copies_of_many_small_documents_are_counted_in_little_memory(
    write_shards: WriteShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "_BATCH_CHARACTERS", 1 << 13)
    rng = random.Random(1512)
    texts = [f"{rng.randrange(3_000):x} of few words" if rng.random() < 0.9 else "" for _ in range(4_000)]
    peaks = []
    for count in (1_000, 4_000):
        folder = write_shards(texts[: count // 3], texts[count // 3 : count])
        tracemalloc.start()
        health = check_shards(folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 30 * 3_000

    copies = Counter(filter(None, texts))
    assert health.total.exact_duplicates == copies.total() - len(copies)
    assert health.total.empty == texts.count("")
    frequent = health.most_frequent
    assert [each["copies"] for each in frequent] == [count for _, count in copies.most_common(10)]
    for each in frequent:
        position = each["row"] + (4_000 // 3 if each["shard"] == health.shards[1].shard else 0)
        assert position == texts.index(each["beginning"]) and copies[each["beginning"]] == each["copies"]


def test_signatures_estimate_the_jaccard_similarity() -> None:
    rng = random.Random(0)
    original = _text(rng, 400)
    near = NearDuplicates()
    texts = [original, *(original[:keep] + _text(rng, 400 - keep) for keep in range(0, 401, 25))]
    near.add(range(len(texts)), [word_hashes(" ".join(words)) for words in texts])
    signatures = near.signatures(np.arange(len(texts)))
    sets = [_grams(" ".join(words), 5) for words in texts]
    for signature, grams in zip(signatures, sets, strict=True):
        similarity = len(grams & sets[0]) / len(grams | sets[0])
        assert (signature == signatures[0]).mean() == pytest.approx(similarity, abs=0.15)


def test_overlap_equals_sets_of_tuples(tmp_path: Path) -> None:
    rng = random.Random(1)
    examples = [{"question": " ".join(_text(rng, rng.choice([3, 20, 60]))), "n": 3} for _ in range(30)]
    examples += [{"choices": [{"text": " ".join(_text(rng, 14))}, " ".join(_text(rng, 12))]}]
    files = [tmp_path / "a.jsonl", tmp_path / "b" / "c.json"]
    files[1].parent.mkdir()
    files[0].write_text("\n".join(map(json.dumps, examples[:20])))
    files[1].write_text(json.dumps(examples[20:]))
    strings = [[e["question"]] if "question" in e else [e["choices"][0]["text"], e["choices"][1]] for e in examples]
    grams = [set().union(*(_grams(text, 13) for text in each)) for each in strings]
    documents = [" ".join(_text(rng, words)) for words in (0, 5, 12, 13, 14, 100)]
    # Quotations of every length around 13 words, with other case and punctuation.
    for words in range(10, 18):
        quoted = rng.choice([text for each in strings for text in each]).split()[:words]
        documents.append(" ".join(_text(rng, 20)) + " " + ", ".join(quoted).upper() + ". " + " ".join(_text(rng, 5)))

    overlap = EvaluationOverlap(evaluation_files(tmp_path))
    half = len(documents) // 2
    counts = [*overlap.count([word_hashes(text) for text in documents[:half]])]
    counts += [*overlap.count([word_hashes(text) for text in documents[half:]])]
    assert counts == [len(_grams(text, 13) & set().union(*grams)) for text in documents]
    assert sum(counts) > 3
    everything = set().union(*(_grams(text, 13) for text in documents))
    found = [bool(each & everything) for each in grams]
    for number, part in enumerate((slice(0, 20), slice(20, None))):
        report = overlap.report()[number]
        assert report["file"] == str(files[number]) and report["examples"] == len(examples[part])
        assert report["checked"] == sum(map(bool, grams[part])) and report["overlapping"] == sum(found[part])


def test_a_zip_file_is_compared_like_its_folder(tmp_path: Path) -> None:
    text = " ".join(_text(random.Random(2), 40))
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"question": text}))
    pq.write_table(pa.table({"question": [text, "short"]}), folder / "b.parquet")
    (folder / "notes.txt").write_text(text)
    (folder / "folder.json").mkdir()
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"bundle/{path.name}")
    reports = []
    for source in (folder, tmp_path / "bundle.zip"):
        overlap = EvaluationOverlap(evaluation_files(source))
        assert overlap.count([word_hashes(text)]) == [28]
        reports.append([{**each, "file": Path(each["file"]).name} for each in overlap.report()])
    assert reports[0] == reports[1] and len(reports[0]) == 2
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(UserError, match=r"cannot read the evaluation set .*bad\.zip"):
        evaluation_files(tmp_path / "bad.zip")


def test_strings_are_found_at_any_depth_in_order() -> None:
    value: object = ["a", {"name": "b", "n": 1, "c": None}, [["c"], "d"]]
    for _ in range(50_000):
        value = [value, "e"]
    assert "".join(strings_of(value)) == "abcd" + 50_000 * "e"


def test_cropped_tokens_equal_one_epoch_of_packing(write_shards: WriteShards) -> None:
    rng = random.Random(5)
    texts = ["a" * int(rng.lognormvariate(3, 1)) + "b" for _ in range(3000)]
    folder = write_shards(texts[:2000], texts[2000:2900], texts[2900:])
    assert check_shards(folder).tokens == []
    prepare_token_shards(folder, ByteTokenizer(), num_threads=1)
    (report,) = check_shards(folder, sequence_len=63).tokens
    lengths = [len(text) + 1 for text in texts]  # with BOS
    assert [shard["tokens"] for shard in report["shards"]] == [
        sum(lengths[part]) for part in (slice(0, 2000), slice(2000, 2900), slice(2900, None))
    ]
    assert report["total"]["longest"] == max(lengths)
    assert report["total"]["longer_than_a_row"] == sum(length > 64 for length in lengths)
    by_bits = Counter(1 << (length.bit_length() - 1) for length in lengths)
    assert report["total"]["histogram"] == {str(start): by_bits[start] for start in sorted(by_bits)}

    train = np.array(lengths[:2900])
    packer = BestFitPacker(train, row_tokens=64)
    placed: list[tuple[int, int]] = []
    while packer.placed < len(train):
        placed += next(packer)
    tokens = sum(int(train[document]) for document, _ in placed)
    kept = sum(taken for _, taken in placed)
    assert report["packed"]["cropped"] == pytest.approx(1 - kept / tokens) and kept < tokens
    assert report["packed"]["padded"] == report["packed"]["masked_rows"] == 0
    for shard, part in zip(report["shards"], (range(2000), range(2000, 2900)), strict=False):
        own = [(length, int(train[document])) for document, length in placed if document in part]
        assert shard["cropped"] == pytest.approx(1 - sum(kept for kept, _ in own) / sum(length for _, length in own))
        assert shard["padded"] == shard["masked_rows"] == 0
    assert 0 < report["shards"][2]["cropped"] < 1  # validation, packed by itself


def _chat(path: Path, *exchanges: tuple[str, str]) -> JSONLConversations:
    roles = ("user", "assistant")
    rows = [[{"role": r, "content": text} for r, text in zip(roles, each, strict=True)] for each in exchanges]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return JSONLConversations(str(path))


def test_a_mixture_is_checked_task_by_task(tmp_path: Path) -> None:
    rng = random.Random(8)
    texts = [
        (" ".join(_text(rng, rng.choice([2, 9, 30]))), " ".join(_text(rng, rng.choice([1, 20])))) for _ in range(40)
    ]
    first, second = _chat(tmp_path / "first.jsonl", *texts[:25]), _chat(tmp_path / "second.jsonl", *texts[25:])
    held_out = _chat(tmp_path / "val.jsonl", texts[3], ("new", "answer"))
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})
    mixture = Mixture([MixturePart(first, 2), MixturePart(second)])
    health = check_mixtures({"train": mixture, "val": Mixture([MixturePart(held_out)])}, tokenizer, sequence_len=80)
    assert [(shard.documents, shard.exact_duplicates) for shard in health.shards] == [(25, 0), (15, 0), (2, 1)]
    assert health.shards[2].shard == f"val: {held_out.name}"
    assert sum(shard.characters for shard in health.shards[:2]) == sum(len(q) + len(a) + 2 for q, a in texts)
    train, val = health.tokens
    lengths = [[len(render_conversation(tokenizer, each, None)[0]) for each in task] for task in (first, second)]
    for part, own in zip(train["shards"], ([*lengths[0], *lengths[0]], lengths[1]), strict=True):
        assert part["documents"] == len(own) and part["tokens"] == sum(own)
        assert part["longer_than_a_row"] == sum(length > 80 for length in own)
        assert part["cropped"] == pytest.approx(sum(max(0, length - 80) for length in own) / sum(own))
    kept = [min(80, length) for length in [*lengths[0], *lengths[0], *lengths[1]]]
    packed = train["packed"]
    assert packed["padded"] == pytest.approx(1 - sum(kept) / (81 * packed["rows"]))
    assert 0 < packed["masked_rows"] < packed["rows"] and 0 < packed["cropped"] < 1
    assert val["packed"]["masked_rows"] == 0


def test_the_command_writes_tables_and_json(
    write_shards: WriteShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "one two three four five six seven eight nine ten eleven twelve thirteen"
    folder = write_shards(
        ["[red]a \x1b[31mlonger\n document", "short", "short", None], ["short", f"Quoted: {sentence}!"]
    )
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": sentence}))
    check(folder, evaluation=[questions], output=tmp_path / "report.json")
    printed = capsys.readouterr().out
    assert "shard_00001 " in printed and "[red]a [31mlonger document" in printed and "questions.jsonl" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["total"]["overlapping"] == 1 and report["evaluation"][0]["overlapping"] == 1
    assert report["most_frequent"] == [
        {"shard": "shard_00000.parquet", "row": 1, "copies": 3, "beginning": "short"},
    ]
    assert [each["row"] for each in report["longest"]] == [1, 0, 1, 2, 0]
    assert Counter(each["characters"] for each in report["longest"])[5] == 3


def test_the_command_checks_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _chat(tmp_path / "chat.jsonl", ("question", "answer"), ("x" * 60, "no"))
    Tokenizer({bytes([byte]): byte for byte in range(256)}).save(tmp_path / "tokenizer")
    options = {"mixture": tmp_path / "chat.jsonl", "tokenizer": tmp_path / "tokenizer", "sequence_len": 40}
    check(**options, output=tmp_path / "report.json")  # type: ignore[arg-type]
    assert "masked" in capsys.readouterr().out
    (tokens,) = json.loads((tmp_path / "report.json").read_text())["tokens"]
    assert tokens["packed"]["masked_rows"] == 1 and tokens["packed"]["rows"] == 2
    with pytest.raises(UserError, match="give one of them"):
        check(**options, data_dir=tmp_path)  # type: ignore[arg-type]


def test_unreadable_files_are_reported(write_shards: WriteShards, tmp_path: Path) -> None:
    folder = write_shards(["a"], ["b"])
    with pytest.raises(UserError, match=r"no evaluation set .*absent"):
        check(folder, evaluation=[tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty contains no evaluation set; the kinds are \.jsonl"):
        check(folder, evaluation=[tmp_path / "empty"])
    (tmp_path / "bad.jsonl").write_text('{"question": ')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        check(folder, evaluation=[tmp_path / "bad.jsonl"])
    (tmp_path / "bad.parquet").write_text("none")
    with pytest.raises(UserError, match=r"cannot read the evaluation set .*bad\.parquet"):
        check(folder, evaluation=[tmp_path / "bad.parquet"])
    with pytest.raises(UserError, match=r"--similarity is 1\.5"):
        check(folder, similarity=1.5)
    with pytest.raises(UserError, match="cannot write the report"):
        check(folder, output=tmp_path / "absent" / "report.json")
