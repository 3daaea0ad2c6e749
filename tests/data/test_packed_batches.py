"""Batches of packed rows: their content, their order for any world size, and their state."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from byte_tokenizer import ByteTokenizer
from lmchat.data.packed_batches import PackedBatches, _padded_starts
from lmchat.data.packing import BestFitPacker
from lmchat.data.token_shards import TokenShards
from lmchat.data.tokenize import prepare_token_shards
from lmchat.types import Batch, UserError

T, ROWS, BUFFER = 16, 2, 10


@pytest.fixture
def texts() -> list[list[str]]:
    """Four shards of documents of 1 to 40 tokens."""
    rng = np.random.default_rng(1)
    return [["".join(rng.choice(list("abcdefgh"), rng.integers(0, 40))) for _ in range(n)] for n in (50, 1, 70, 9)]


@pytest.fixture
def shards(write_shards: Callable[..., Path], texts: list[list[str]]) -> tuple[TokenShards, TokenShards]:
    folder = write_shards(*texts)
    prepare_token_shards(folder, ByteTokenizer())
    return TokenShards.open_split(folder, ByteTokenizer())


def _batches(shards: TokenShards, **options: Any) -> PackedBatches:
    return PackedBatches(shards, **{"sequence_len": T, "micro_batch_size": ROWS, "buffer_size": BUFFER, **options})


def _rows(batch: Batch) -> list[list[int]]:
    """The packed rows of the batches, T + 1 tokens each."""
    assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    return torch.cat([batch["inputs"], batch["targets"][:, -1:]], dim=1).tolist()


def test_rows_contain_the_beginnings_of_packed_documents(
    shards: tuple[TokenShards, TokenShards], texts: list[list[str]]
) -> None:
    documents = [ByteTokenizer().document(text) for shard in texts[:-1] for text in shard if text]
    packer = BestFitPacker(np.array(list(map(len, documents))), row_tokens=T + 1, buffer_size=BUFFER)
    expected = [[token for d, n in row for token in documents[d][:n]] for row in islice(packer, 100 * ROWS)]
    batches = list(islice(_batches(shards[0]), 100))
    assert [row for batch in batches for row in _rows(batch)] == expected
    for tensor in (batches[0]["inputs"], batches[0]["targets"]):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((ROWS, T), torch.int64, True)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_sequence_of_rows_does_not_depend_on_the_world_size(
    shards: tuple[TokenShards, TokenShards], world_size: int
) -> None:
    rounds = 24 // world_size
    ranks = [islice(_batches(shards[0], rank=r, world_size=world_size), rounds) for r in range(world_size)]
    dealt = [_rows(batch) for batches in zip(*ranks, strict=True) for batch in batches]
    assert dealt == [_rows(batch) for batch in islice(_batches(shards[0]), 24)]


def test_resumes_exactly_at_every_batch_on_any_world_size(shards: tuple[TokenShards, TokenShards]) -> None:
    whole = list(islice(_batches(shards[0]), 120))
    assert whole[-1]["state"]["epoch"] == 2
    for at in range(0, 108, 7):
        file = io.BytesIO()
        torch.save(whole[at]["state"], file)
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        rest = [_rows(batch) for batch in whole[at + 1 : at + 13]]
        for world_size in (1, 2, 3):
            ranks = [iter(_batches(shards[0], rank=r, world_size=world_size, state=state)) for r in range(world_size)]
            assert [_rows(next(rank)) for _ in range(12 // world_size) for rank in ranks] == rest


def test_all_ranks_carry_the_same_state(shards: tuple[TokenShards, TokenShards]) -> None:
    first, second = (next(islice(_batches(shards[0], rank=r, world_size=2), 5, None))["state"] for r in (0, 1))
    third = next(islice(_batches(shards[0]), 11, None))["state"]
    assert torch.equal(first.pop("buffer"), third["buffer"])
    assert torch.equal(second.pop("buffer"), third.pop("buffer"))
    assert first == second == third


def test_the_state_has_epoch_and_shard(shards: tuple[TokenShards, TokenShards]) -> None:
    seen = [(batch["state"]["epoch"], batch["state"]["shard"]) for batch in islice(_batches(shards[0]), 150)]
    assert seen == sorted(seen)
    assert {(0, 0), (0, 2), (1, 0), (1, 2)} <= set(seen)


def test_evaluation_restarts_at_the_first_batch(shards: tuple[TokenShards, TokenShards]) -> None:
    batches = _batches(shards[1], num_batches=30)
    first, second = ([_rows(batch) for batch in batches] for _ in range(2))
    assert first == second
    assert len(first) == 30
    assert "state" not in next(iter(batches))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_works_with_a_torch_data_loader(shards: tuple[TokenShards, TokenShards], num_workers: int) -> None:
    loader = DataLoader(_batches(shards[0]), batch_size=None, num_workers=num_workers)
    loaded, direct = list(islice(loader, 5)), list(islice(_batches(shards[0]), 5))
    assert list(map(_rows, loaded)) == list(map(_rows, direct))
    assert torch.equal(loaded[-1]["state"]["buffer"], direct[-1]["state"]["buffer"])


def test_user_mistakes_are_reported(shards: tuple[TokenShards, TokenShards], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="micro_batch_size is 0"):
        _batches(shards[0], micro_batch_size=0)


def test_a_position_is_refused_for_other_documents(
    write_shards: Callable[..., Path], texts: list[list[str]], shards: tuple[TokenShards, TokenShards], tmp_path: Path
) -> None:
    """A copy with other file names is the same data; other documents of the same lengths are not."""
    state = next(iter(_batches(shards[0])))["state"]
    expected = _rows(list(islice(_batches(shards[0]), 2))[1])
    copies = [Path(shutil.copy(path, tmp_path / f"{path.stem}.copy")) for path in shards[0].paths]
    assert _rows(next(iter(_batches(TokenShards(copies, ByteTokenizer()), state=state)))) == expected

    other = write_shards(*[[text.replace("a", "b") for text in shard] for shard in texts])
    prepare_token_shards(other, ByteTokenizer())
    train, _ = TokenShards.open_split(other, ByteTokenizer())
    assert [train.lengths[i] for i in range(len(train))] == [shards[0].lengths[i] for i in range(len(train))]
    reordered = TokenShards(copies[::-1], ByteTokenizer())
    for different in (train, reordered, shards[1]):
        with pytest.raises(UserError, match=f"{state['data']}, those of .* {different.fingerprint}; .*--data.data_dir"):
            _batches(different, state=state)


@pytest.mark.parametrize("world_size", [1, 3])
def test_split_documents_are_read_to_their_end(
    shards: tuple[TokenShards, TokenShards], texts: list[list[str]], world_size: int
) -> None:
    """The concatenated rows of all ranks are the documents; a resumed run continues with the rest of its document."""
    documents = {tuple(ByteTokenizer().document(text)) for shard in texts[:-1] for text in shard if text}
    assert max(map(len, documents)) > 2 * T
    ranks = [
        list(islice(_batches(shards[0], long_documents="split", rank=rank, world_size=world_size), 24 // world_size))
        for rank in range(world_size)
    ]
    rows = [row for batches in zip(*ranks, strict=True) for batch in batches for row in _rows(batch)]
    bos = ByteTokenizer().bos_id
    tokens: list[int] = []
    for row in rows:  # a row that continues a document repeats the last token
        tokens += row if row[0] == bos and tokens[-1:] != [bos] else row[1:]
    starts = [at for at, token in enumerate(tokens) if token == bos]
    assert {tuple(tokens[start:end]) for start, end in pairwise(starts)} <= documents

    state = ranks[0][3]["state"]
    rest = _batches(shards[0], long_documents="split", world_size=world_size, state=state)
    for expected, batch in zip(ranks[0][4:], rest, strict=False):
        assert _rows(batch) == _rows(expected)
    with pytest.raises(UserError, match="long_documents"):
        _batches(shards[0], state=state)


def test_the_share_that_cropping_never_reads(shards: tuple[TokenShards, TokenShards], texts: list[list[str]]) -> None:
    lengths = [len(ByteTokenizer().document(text)) for shard in texts[:-1] for text in shard if text]
    assert shards[0].share_beyond(T + 1) == sum(max(0, length - T - 1) for length in lengths) / sum(lengths)
    assert shards[0].share_beyond(max(lengths)) == 0


@pytest.mark.parametrize("policy", ["crop", "split"])
def test_document_starts_are_the_tokens_that_begin_documents_and_rows(
    shards: tuple[TokenShards, TokenShards], policy: str
) -> None:
    """Every document of the token files begins with BOS."""
    for batch in islice(_batches(shards[0], long_documents=policy, mask_documents=True), 200):
        begins = batch["inputs"] == ByteTokenizer().bos_id
        assert policy == "split" or begins[:, 0].all()
        begins[:, 0] = True
        (expected,) = begins.flatten().nonzero(as_tuple=True)
        starts = batch["document_starts"]
        assert starts.dtype == torch.int32 and len(starts) == 16 * ROWS + 1
        assert starts[: len(expected)].tolist() == expected.tolist() and (starts[len(expected) :] == ROWS * T).all()


def test_room_for_document_starts_is_doubled_where_documents_are_short() -> None:
    for number, size in ((1, 32), (32, 32), (33, 64), (129, 256)):
        starts = _padded_starts(list(range(number)), rows=2, length=500)
        assert starts.tolist() == [*range(number), *[1000] * (size + 1 - number)]
