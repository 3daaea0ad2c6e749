"""The packer compared with recorded rows of the reference and with a brute-force implementation; its state."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmchat.data.packing import BestFitPacker
from lmchat.types import UserError


def _reference_rows(fixtures: Path, name: str) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """Oracle case c06: document lengths and rows; ``segments`` counts the segments of each row."""
    data = np.load(fixtures / "packing.npz")
    segments = list(zip(data[f"{name}_documents"].tolist(), data[f"{name}_tokens"].tolist(), strict=True))
    ends = np.cumsum(data[f"{name}_segments"])
    return data[f"{name}_lengths"], [
        segments[end - n : end] for n, end in zip(data[f"{name}_segments"], ends, strict=True)
    ]


def test_pretraining_rows_match_the_reference(fixtures: Path) -> None:
    lengths, rows = _reference_rows(fixtures, "pretrain")
    assert list(BestFitPacker(lengths, row_tokens=257, buffer_size=100, refill=128, epochs=1)) == rows


def test_sft_rows_match_the_reference(fixtures: Path) -> None:
    """The oracle shows the 256 input columns of rows of 257, over more than one epoch."""
    lengths, rows = _reference_rows(fixtures, "sft")
    packer = BestFitPacker(lengths, row_tokens=257, buffer_size=100, refill=1, policy="pad")

    def visible(row: list[tuple[int, int]]) -> list[tuple[int, int]]:
        *head, (document, tokens) = row
        return [*head, (document, tokens - 1)] if sum(n for _, n in row) == 257 and tokens > 1 else row

    assert [visible(row) for row in islice(packer, len(rows))] == rows


def _brute_force(lengths, row_tokens, buffer_size, refill, policy, epochs):  # type: ignore[no-untyped-def]
    """The packing rules on plain lists."""
    stream = [document for _ in range(epochs) for document in range(len(lengths))]
    buffer: list[int] = []
    rows = []
    cut = None
    while True:
        row: list[tuple[int, int]] = []
        room = row_tokens
        if cut:
            document, position = cut
            row.append((document, min(room, lengths[document] - position + 1)))
            room -= row[-1][1]
            position += row[-1][1] - 1
            cut = (document, position) if position < lengths[document] else None
        while room > 0:
            while len(buffer) < buffer_size and stream:
                buffer += stream[:refill]
                del stream[:refill]
            if len(buffer) < buffer_size and (policy != "pad" or not buffer):
                break
            fitting = [i for i, document in enumerate(buffer) if lengths[document] <= room]
            if fitting:
                best = max(fitting, key=lambda i: (lengths[buffer[i]], -i))
                document = buffer.pop(best)
                row.append((document, lengths[document]))
            elif policy == "crop":
                shortest = min(range(len(buffer)), key=lambda i: (lengths[buffer[i]], i))
                row.append((buffer.pop(shortest), room))
            elif policy == "split":
                longer = [i for i, document in enumerate(buffer) if lengths[document] > row_tokens]
                longest = max(range(len(buffer)), key=lambda i: (lengths[buffer[i]], -i))
                cut = (buffer.pop(longer[0] if longer else longest), room)
                row.append(cut)
            else:
                break
            room -= row[-1][1]
        if not row or (policy != "pad" and room):
            return rows
        rows.append(row)


packings = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=60),
        "row_tokens": st.integers(12, 20),
        "buffer_size": st.integers(1, 12),
        "refill": st.integers(1, 5),
        "policy": st.sampled_from(["crop", "split", "pad"]),
        "epochs": st.integers(1, 3),
    }
)


@given(packings)
def test_equals_brute_force(case: dict) -> None:
    if case["policy"] != "pad":
        case["row_tokens"] -= 6  # some documents are longer than a row
    lengths = np.array(case.pop("lengths"))
    assert list(BestFitPacker(lengths, **case)) == _brute_force(lengths.tolist(), **case)


def test_a_few_long_documents_are_read_in_turn_though_the_buffer_has_many_epochs_of_them() -> None:
    lengths = 500 + np.arange(12) * 7 % 12
    packer = BestFitPacker(lengths, row_tokens=65, policy="split")
    documents = [document for row in islice(packer, lengths.sum() // 64) for document, _ in row]
    order = [document for document, _ in groupby(documents)]
    assert order[:12] == list(range(12))


@given(packings)
def test_splitting_makes_a_target_of_each_token_once(case: dict) -> None:
    """Tokens are pairs of document and position; only the last document may be cut."""
    lengths = [max(2, length) for length in case.pop("lengths")]
    packer = BestFitPacker(np.array(lengths), **{**case, "policy": "split", "row_tokens": case["row_tokens"] - 9})
    read: list[tuple[int, int]] = []
    for row in packer:
        tokens = [
            (document, position)
            for index, (document, count) in enumerate(row)
            for position in range(packer.start if index == 0 else 0, (packer.start if index == 0 else 0) + count)
        ]
        assert len(tokens) == case["row_tokens"] - 9
        if read and tokens[0] == read[-1]:  # a row that continues a document starts with the last token
            tokens = tokens[1:]
        assert read == [] or tokens[0][1] == 0 or tokens[0][1] == read[-1][1] + 1
        read += tokens
    ends = [at for at in range(len(read)) if at + 1 == len(read) or read[at + 1][1] == 0]
    for at in ends:
        document, position = read[at]
        assert read[at - position : at + 1] == [(document, each) for each in range(position + 1)]
        assert position == lengths[document] - 1 or at + 1 == len(read)


@given(packings)
def test_padding_places_every_document_once_per_epoch(case: dict) -> None:
    lengths = np.array(case.pop("lengths"))
    rows = list(BestFitPacker(lengths, **{**case, "policy": "pad"}))
    placed = Counter(segment for row in rows for segment in row)
    assert placed == dict.fromkeys(enumerate(lengths.tolist()), case["epochs"])
    assert max(sum(tokens for _, tokens in row) for row in rows) <= case["row_tokens"]


@given(packings, st.integers(0, 40))
def test_a_restored_packer_continues_exactly(case: dict, rows_before: int) -> None:
    lengths = np.array(case.pop("lengths"))
    packer = BestFitPacker(lengths, **case)
    list(islice(packer, rows_before))
    state = packer.state()
    state = json.loads(json.dumps({**state, "buffer": state["buffer"].tolist()}))
    restored = BestFitPacker(lengths, **case)
    restored.restore(state)
    assert [(row, restored.start) for row in restored] == [(row, packer.start) for row in packer]


def test_without_epochs_rows_are_endless() -> None:
    packer = BestFitPacker(np.array([3, 4]), row_tokens=7, buffer_size=1, refill=2)
    assert list(islice(packer, 3)) == [[(1, 4), (0, 3)]] * 3
    assert packer.placed == 6


def test_a_document_beyond_the_largest_key_is_cropped() -> None:
    lengths = np.array([1 << 40, 5])
    assert next(BestFitPacker(lengths, row_tokens=8, buffer_size=1, refill=2)) == [(1, 5), (0, 3)]


def test_the_state_is_small() -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 5000)
    packer = BestFitPacker(lengths, row_tokens=2049)
    list(islice(packer, 500))
    buffer = packer.state()["buffer"]
    assert buffer.dtype == np.int64
    assert buffer.nbytes <= 8 * (1000 + 128)
    assert (np.diff(buffer) > 0).all()


def test_user_mistakes_are_reported() -> None:
    with pytest.raises(UserError, match="buffer_size is 0"):
        BestFitPacker(np.array([1]), row_tokens=4, buffer_size=0)
    with pytest.raises(UserError, match="epochs is 0"):
        BestFitPacker(np.array([1]), row_tokens=4, epochs=0)
    for wrong in (0, -2):
        with pytest.raises(UserError, match=f"document 2 has {wrong} tokens"):
            list(BestFitPacker(np.array([3, 1, wrong]), row_tokens=4, epochs=1))
    with pytest.raises(UserError, match="no documents"):
        BestFitPacker(np.array([], dtype=int), row_tokens=4)
    with pytest.raises(UserError, match="document 1 has 9 tokens, but a row has 4"):
        next(BestFitPacker(np.array([2, 9]), row_tokens=4, policy="pad"))


HOSTILE = {
    "no next": {"buffer": [0]},
    "next is text": {"next": "5", "buffer": []},
    "next is a float": {"next": 5.0, "buffer": []},
    "next is negative": {"next": -1, "buffer": []},
    "next is past the end": {"next": 2**70, "buffer": []},
    "no buffer": {"next": 5},
    "buffer of text": {"next": 5, "buffer": ["a"]},
    "buffer of floats": {"next": 5, "buffer": [float("nan")]},
    "nested buffer": {"next": 5, "buffer": [[0, 1]]},
    "ragged buffer": {"next": 5, "buffer": [[0], [1, 2]]},
    "negative arrival": {"next": 5, "buffer": [-1, 0]},
    "arrival to come": {"next": 5, "buffer": [0, 5]},
    "arrival twice": {"next": 5, "buffer": [1, 1]},
    "unsorted buffer": {"next": 5, "buffer": [2, 1]},
    "huge arrival": {"next": 5, "buffer": [2**63]},
    "cut is a number": {"next": 5, "buffer": [], "cut": 3},
    "cut of text": {"next": 5, "buffer": [], "cut": ["0", 1]},
    "cut document to come": {"next": 5, "buffer": [], "cut": [5, 1]},
    "cut document in the buffer": {"next": 5, "buffer": [2], "cut": [2, 1]},
    "cut at its beginning": {"next": 5, "buffer": [], "cut": [2, 0]},
    "cut behind its end": {"next": 5, "buffer": [], "cut": [2, 30]},
}


@pytest.mark.parametrize("state", HOSTILE.values(), ids=HOSTILE)
def test_an_impossible_state_is_refused(state: dict) -> None:
    packer = BestFitPacker(np.full(10, 30), row_tokens=8, policy="split", epochs=2)
    with pytest.raises(UserError, match="use an older checkpoint"):
        packer.restore(state)
