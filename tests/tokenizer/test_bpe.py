from __future__ import annotations

import errno
import json
import pickle
import random
import resource
import shutil
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer

from lmchat.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from lmchat.types import UserError
from rank_file import write_ranks

# Text on which split patterns often differ: contractions, case folding, digits, whitespace, marks, emoji.
HARD_PIECES = [
    *("'s", "'S", "'ll", "'LL", "'ſ", "'re", "don't", "K", "ﬀ", "ß", "İ", "0", "12", "123", "١٢٣", "½", "Ⅷ"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2028", "\u3000", "\u0085", "\x1c", "\u200b", "\u180e", "\x00"),
    *("!", "...", "—", "a", "é", "e\u0301", "你好", "नमस्ते", "🌍", "👩\u200d🚀", "\U0010ffff", "_", "$x$"),
    *SPECIAL_TOKENS,
]
# Without unassigned characters, since regex libraries support different versions of Unicode.
assigned = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=4)
texts = st.lists(st.one_of(st.sampled_from(HARD_PIECES), assigned), max_size=30).map("".join)


@pytest.fixture(scope="session")
def saved(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="session")
def hugging_face(saved: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.from_file(str(saved / "tokenizer.json"))


def plain_encode(ranks: Mapping[bytes, int], text: str) -> list[int]:
    """Byte-pair encoding by its definition: merges each piece's leftmost pair of lowest rank until none is left."""
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while candidates := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(candidates)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def plain_train(documents: Iterable[str], n_merges: int) -> list[bytes]:
    """Byte-pair training by its definition: recounts all pairs for every merge; ties go to the lowest ids."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = Counter(tuple(piece.encode()) for text in documents for piece in regex.findall(SPLIT_PATTERN, text))
    for _ in range(n_merges):
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merged: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            merged[_replace(word, best, len(tokens))] += count
        words = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def _replace(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    out: list[int] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def random_documents(seed: int, n: int = 30) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("aabbcdeé ", k=rng.randint(1, 8))) for _ in range(60)]
    words += ["aaaa", "aaaaaaa", "你好", "12345", "it's", "\n\n", "   "]
    return [" ".join(rng.choices(words, k=60)) for _ in range(n)]


class TestEncode:
    def test_ids_are_those_of_the_reference(self, tokenizer: Tokenizer, measured: dict[str, Any]) -> None:
        for ids in measured["ids"]:
            text = tokenizer.decode(ids)
            assert tokenizer.encode(text) == ids
            assert tokenizer.encode_to_numpy(text).tolist() == ids

    def test_matches_the_oracle(self, tokenizer: Tokenizer, c07: dict[str, Any], oracles: Path) -> None:
        imported = Tokenizer.import_file(oracles / "c07_render.json")
        assert imported.fingerprint == tokenizer.fingerprint
        assert c07["split_pattern"] == SPLIT_PATTERN
        assert {name: tokenizer.special(name[2:-2]) for name in SPECIAL_TOKENS} == c07["special_token_ids"]
        assert tokenizer.token_bytes.tolist() == c07["token_bytes_head"]
        for case in c07["encode_ordinary"]:
            assert tokenizer.encode(case["text"]) == case["ids"]
        case = c07["encode_prepend_append"]
        ids = [tokenizer.bos_id, *tokenizer.encode(case["text"]), tokenizer.special("assistant_end")]
        assert ids == case["ids"]

    @given(text=texts)
    @settings(max_examples=150, deadline=None)
    def test_definition_hugging_face_and_round_trip(
        self, tokenizer: Tokenizer, hugging_face: HuggingFaceTokenizer, text: str
    ) -> None:
        ids = tokenizer.encode(text)
        assert ids == plain_encode(tokenizer.ranks, text)
        assert ids == hugging_face.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < len(tokenizer.ranks)
        array = tokenizer.encode_to_numpy(text)
        assert array.dtype == np.uint32
        assert array.tolist() == ids

    @pytest.mark.parametrize("name", SPECIAL_TOKENS)
    def test_special_text_is_ordinary_text(
        self, tokenizer: Tokenizer, hugging_face: HuggingFaceTokenizer, name: str
    ) -> None:
        ids = tokenizer.encode(f"say {name} twice{name}")
        assert max(ids) < tokenizer.bos_id
        assert ids == hugging_face.encode(f"say {name} twice{name}").ids
        assert hugging_face.token_to_id(name) == tokenizer.special(name[2:-2])

    def test_lone_surrogates_are_replaced(self, tokenizer: Tokenizer) -> None:
        text = "a\ud83c\udf0db\ud800c"
        assert tokenizer.decode(tokenizer.encode(text)) == "a🌍b\ufffdc"
        assert tokenizer.encode_to_numpy(text).tolist() == tokenizer.encode(text)

    @pytest.mark.parametrize("run", [" ", "\t ", "\n"])
    def test_endless_whitespace(self, tokenizer: Tokenizer, run: str) -> None:
        text = "start" + run * (1_200_000 // len(run)) + "end"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_to_numpy(text).tolist() == ids

    def test_decode_names_special_tokens_and_replaces_half_characters(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("Hi")]) == "<|bos|>Hi"
        assert tokenizer.decode_bytes([0xF0, 0x9F]) == b"\xf0\x9f"
        assert tokenizer.decode([0xF0, 0x9F, ord("x")]) == "\ufffdx"

    def test_token_bytes(self, tokenizer: Tokenizer) -> None:
        expected = [len(tokenizer.decode_bytes([token])) for token in range(768)] + [0] * 9
        assert tokenizer.token_bytes.tolist() == expected
        assert tokenizer.token_bytes.dtype == np.int32


class TestTrain:
    @pytest.mark.parametrize("seed", range(4))
    def test_follows_the_definition(self, seed: int) -> None:
        documents = random_documents(seed)
        tokenizer = Tokenizer.train(iter(documents), 256 + 80 + 9)
        assert list(tokenizer.ranks) == plain_train(documents, 80)
        assert tokenizer.vocab_size == 345
        assert tokenizer.bos_id == 336

    def test_does_not_depend_on_the_order_of_documents(self) -> None:
        documents = random_documents(seed=9)
        forwards, backwards = Tokenizer.train(documents, 400), Tokenizer.train(reversed(documents), 400)
        assert forwards.fingerprint == backwards.fingerprint

    def test_oracle_merges(self, oracles: Path, tokenizer: Tokenizer) -> None:
        documents = json.loads((oracles / "c07_training_docs.json").read_text())
        assert Tokenizer.train(documents, 777).fingerprint == tokenizer.fingerprint

    def test_exact_size_or_an_error(self) -> None:
        # "abcd" allows three merges: a pair, then two up to the whole word.
        assert Tokenizer.train(["abcd"], 256 + 3 + 9).vocab_size == 268
        with pytest.raises(UserError, match=r"only 3 merges, vocab_size 269 needs 4.*at most 268"):
            Tokenizer.train(["abcd"], 269)
        with pytest.raises(UserError, match="vocab_size is 264; it must be at least 265"):
            Tokenizer.train(["abcd"], 264)

    def test_an_error_while_reading_reaches_the_caller(self) -> None:
        def documents() -> Iterable[str]:
            yield "some text"
            raise UserError("shard 3 is damaged")

        with pytest.raises(UserError, match="shard 3 is damaged"):
            Tokenizer.train(documents(), 300)


class TestFiles:
    def test_a_full_disk_leaves_what_was_there(
        self, tokenizer: Tokenizer, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(saved, tmp_path / "old")
        before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        for folder in ("old", "new"):
            with pytest.raises(OSError, match="No space left"):
                tokenizer.save(tmp_path / folder)
        assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
        assert not list((tmp_path / "new").iterdir())

    def test_round_trip(self, tokenizer: Tokenizer, saved: Path) -> None:
        loaded = Tokenizer.load(saved)
        assert loaded.ranks == tokenizer.ranks
        assert loaded.pattern == tokenizer.pattern
        assert loaded.fingerprint == tokenizer.fingerprint
        assert [path.name for path in saved.iterdir()] == ["tokenizer.json"]

    def test_pickles_for_worker_processes(self, tokenizer: Tokenizer) -> None:
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode("Hello world") == tokenizer.encode("Hello world")

    def test_fingerprint_tells_ranks_and_pattern_apart(self, tokenizer: Tokenizer) -> None:
        *_, last = tokenizer.ranks
        fewer = Tokenizer({token: rank for token, rank in tokenizer.ranks.items() if token != last})
        other_pattern = Tokenizer(tokenizer.ranks, SPLIT_PATTERN.replace("{1,2}", "{1,3}"))
        assert len({tokenizer.fingerprint, fewer.fingerprint, other_pattern.fingerprint}) == 3

    def test_every_format_is_imported(self, tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
        ranks = [[b64encode(token).decode(), rank] for token, rank in tokenizer.ranks.items()]
        as_json = tmp_path / "ranks.json"
        as_json.write_text(json.dumps({"pattern": SPLIT_PATTERN, "mergeable_ranks": ranks}))
        for file in (as_json, saved / "tokenizer.json", write_ranks(tmp_path / "ranks.tiktoken", tokenizer)):
            assert Tokenizer.import_file(file).fingerprint == tokenizer.fingerprint

    def test_imports_special_tokens_that_are_added_tokens(
        self, tokenizer: Tokenizer, hugging_face: HuggingFaceTokenizer, tmp_path: Path
    ) -> None:
        other = HuggingFaceTokenizer.from_str(hugging_face.to_str())
        other.add_special_tokens(list(SPECIAL_TOKENS))
        other.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint

    def test_oracle_8192(self, oracles: Path, tmp_path: Path) -> None:
        imported = Tokenizer.import_file(oracles / "tokenizer_edu_mix_8192.json")
        imported.save(tmp_path)
        assert Tokenizer.load(tmp_path).fingerprint == imported.fingerprint
        hugging_face = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for text in json.loads((oracles / "c07_training_docs.json").read_text())[:50]:
            assert hugging_face.encode(text).ids == imported.encode(text)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no tokenizer in .*nowhere.*lmchat tokenizer train"):
            Tokenizer.load(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"there is no tokenizer file .*nowhere"):
            Tokenizer.import_file(tmp_path / "nowhere")

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
    def test_truncated(self, saved: Path, tmp_path: Path, share: float) -> None:
        content = (saved / "tokenizer.json").read_bytes()
        (tmp_path / "tokenizer.json").write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=rf"{tmp_path}.*lmchat tokenizer train"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda content: content["model"]["vocab"].pop("<|bos|>"), "last 9 entries"),
            (lambda content: content["model"]["vocab"].update({"<|bos|>": 769, "<|user_start|>": 768}), "last 9"),
            (lambda content: content["model"]["merges"].pop(), "order of its merges"),
            (lambda content: content["model"]["merges"].reverse(), "order of its merges"),
            (lambda content: content["model"]["vocab"].update({"A": content["model"]["vocab"]["B"]}), "each once"),
            (lambda content: content.pop("model"), "model"),
            (lambda content: content.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
            (lambda content: content.update(pre_tokenizer=None), "pre_tokenizer"),
        ],
    )
    def test_damaged(self, saved: Path, tmp_path: Path, damage: Any, reason: str) -> None:
        content = json.loads((saved / "tokenizer.json").read_text())
        damage(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=reason):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "null", "{}", '{"mergeable_ranks": [["AA==", 0]]}', "not json"])
    def test_other_formats_are_not_imported(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=r"x\.json"):
            Tokenizer.import_file(tmp_path / "x.json")

    def test_ranks_must_be_those_of_a_byte_pair_encoding(self, tmp_path: Path) -> None:
        ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
        with pytest.raises(UserError, match="b'abc' of rank 256 is not the merge"):
            Tokenizer(ranks).save(tmp_path)
        with pytest.raises(UserError, match="0x41 is missing"):
            Tokenizer({b"ab" if token == b"A" else token: rank for token, rank in ranks.items()})
        with pytest.raises(UserError, match="not a regular expression"):
            Tokenizer({bytes([byte]): byte for byte in range(256)}, "(")


def test_a_full_disk_names_the_file_that_did_not_fit(tmp_path: Path) -> None:
    """The vocabulary, which is too large, and not a small file after it; none is left."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {bytes([1, byte]): 256 + byte for byte in range(256)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            Tokenizer(ranks).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert raised.value.filename == str(tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())
