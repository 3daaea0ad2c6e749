"""The closed forms of docs/scaling.md compared with the optimizer's buckets, allocations and saved activations.

tests/optim/test_sharded.py compares the buckets' bytes with counted ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import make_scaling_tables as page
from bucket_traffic import bytes_sent
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.optim.buckets import Bucket, make_buckets
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups
from lmchat.scaling import config_for_depth


def config_of(depth: int) -> GPTConfig:
    return config_for_depth(depth, page.VOCAB_SIZE, page.SEQUENCE_LEN)


def buckets_of(depth: int, rank: int, ranks: int) -> tuple[list[Bucket], MuonAdamW]:
    with torch.device("meta"):
        net = GPT(config_of(depth))
    optimizer = MuonAdamW(build_param_groups(net.named_parameters(), n_embd=net.config.n_embd))
    collectives: Any = SimpleNamespace(rank=rank, world_size=ranks)
    return make_buckets(optimizer.param_groups, collectives, 32 * 2**20), optimizer


@pytest.mark.parametrize(("depth", "ranks"), [(12, 1), (12, 3), (12, 8), (20, 64), (26, 16), (32, 1024)])
def test_bytes_sent(depth: int, ranks: int) -> None:
    buckets, _ = buckets_of(depth, 0, ranks)
    assert page.bytes_sent(config_of(depth), ranks) == pytest.approx(bytes_sent(buckets, ranks), rel=1e-12)


@pytest.mark.parametrize(("depth", "ranks"), [(12, 1), (12, 3), (4, 30), (26, 8)])
def test_optimizer_state_by_rank(depth: int, ranks: int) -> None:
    allocated = []
    for rank in range(ranks):
        buckets, optimizer = buckets_of(depth, rank, ranks)
        for bucket in buckets:
            bucket.allocate_state(optimizer)  # type: ignore[arg-type]
        allocated.append(sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values()))
    expected = page.state_bytes(config_of(depth), ranks)
    assert max(expected) == pytest.approx(max(allocated), rel=1e-4)
    assert sum(expected) == pytest.approx(sum(allocated), rel=1e-4)


def test_activation_memory_of_a_micro_batch() -> None:
    config = config_for_depth(8, vocab_size=256, sequence_len=128, head_dim=64)
    net = GPT(config, compute_dtype=torch.bfloat16, attention="banded")
    net.init_weights()
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), net.cos, net.sin)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net.hidden(torch.zeros(2, 128, dtype=torch.int64))
    measured = sum(storage.nbytes() for storage in kept.values())
    assert measured <= page.activation_bytes(config, rows=2) <= 1.05 * measured


def test_memory_is_the_sum_of_its_parts_and_fits() -> None:
    config = config_of(20)
    need = page.memory(config, 8, 2**20)
    parameters = sum(p.numel() for bucket in buckets_of(20, 0, 8)[0] for p in bucket.params)
    assert need.weights == 4 * parameters
    assert need.weights < need.gradients < 1.2 * need.weights
    assert need.total <= page.USABLE * page.GPU_BYTES
    doubled = page.activation_bytes(config, 2 * need.micro_batch_rows)
    assert need.total - need.activations + doubled > page.USABLE * page.GPU_BYTES


def test_the_page_shows_what_the_script_computes() -> None:
    text = page.PAGE.read_text()
    assert page.with_tables(text) == text, "run python docs/make_scaling_tables.py"
