"""ZeRO-2 on real gloo processes: equality with one process, bytes sent, and state across world sizes."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharded_ranks as worker
from forked import exit_statuses, start
from lmchat.model.gpt import GPT
from lmchat.optim.buckets import Bucket, RowBucket, assign_owners, make_buckets
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups
from lmchat.scaling import config_for_depth
from lmchat.types import UserError

WORLD_SIZES = range(1, worker.RANKS + 1)
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of the four processes, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = [folder / f"output_rank{rank}.txt" for rank in range(worker.RANKS)]
    processes = [start(worker.main, rank, folder, output=log) for rank, log in enumerate(logs)]
    assert exit_statuses(processes) == [0] * worker.RANKS, "\n".join(log.read_text() for log in logs)
    results = [torch.load(folder / f"results_{rank}.pt") for rank in range(worker.RANKS)]
    results[0]["resharded"] = [
        [torch.load(folder / f"resharding_{step}_{rank}.pt", weights_only=True) for rank in range(world_size)]
        for step, world_size in enumerate((4, 2, 3, 1))
    ]
    return results


@pytest.fixture(scope="module")
def one_process() -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Parameters and optimizer state after each step of the plain optimizer."""
    params = worker.make_params()
    optimizer = MuonAdamW(worker.groups_of(params))
    after = []
    for step in range(worker.STEPS):
        worker.train(optimizer, params, range(step, step + 1), rank=0, world_size=1, overlap=False)
        after.append((worker.copies(params), state_of(optimizer)))
    return after


def state_of(optimizer: MuonAdamW) -> dict[str, dict[str, Tensor]]:
    saved = optimizer.state_dict()["state"]
    return {name: {k: torch.as_tensor(v).clone() for k, v in values.items()} for name, values in saved.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_trained_the_same(outcomes: list[dict[str, Any]], params: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Every rank's parameters, and the state of all ranks together, equal those of one process."""
    for outcome in outcomes:
        assert_same(outcome["params"], params)
        assert_same(outcome["params"], outcomes[0]["params"], tolerance=0)
    merged = MuonAdamW(worker.groups_of(worker.make_params()))
    merged.load_state_dict([outcome["optimizer"] for outcome in outcomes])
    for name, values in state_of(merged).items():
        assert_same(values, state[name])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("run", ["equivalence_{}_False", "equivalence_{}_True", "reduce_scatter_{}", "dropped_{}"])
def test_equal_to_one_process(world_size: int, run: str, ranks: Results, one_process: list) -> None:
    outcomes = [ranks[rank][run.format(world_size)] for rank in range(world_size)]
    assert_trained_the_same(outcomes, *one_process[-1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_skipped_step_changes_nothing(world_size: int, ranks: Results) -> None:
    for rank in range(world_size):
        outcome = ranks[rank][f"dropped_{world_size}"]
        assert outcome["found"] == [["lm_head.weight"], ["x0_lambdas"], []]
        assert_same(outcome["dropped"], worker.copies(worker.make_params()), tolerance=0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_without_gradients_do_not_change(world_size: int, ranks: Results) -> None:
    params = worker.make_params()
    optimizer = MuonAdamW(worker.groups_of(params))
    worker.train(optimizer, params, range(worker.STEPS), 0, 1, overlap=False, loss=worker.sparse_loss_of)
    assert float(optimizer.state[params["lm_head.weight"]]["step"]) == worker.STEPS - 2
    outcomes = [ranks[rank][f"sparse_{world_size}"] for rank in range(world_size)]
    assert_trained_the_same(outcomes, worker.copies(params), state_of(optimizer))


def test_state_continues_on_another_world_size(ranks: Results, one_process: list) -> None:
    for step, outcomes in enumerate(ranks[0]["resharded"]):
        for outcome in outcomes:
            assert_same(outcome["params"], one_process[step][0])


def test_missing_ranks_are_reported(ranks: Results) -> None:
    outcomes = [ranks[rank]["equivalence_3_True"]["optimizer"] for rank in range(3)]
    with pytest.raises(UserError, match="are not in the saved optimizer state; give the files of all ranks"):
        MuonAdamW(worker.groups_of(worker.make_params())).load_state_dict(outcomes[:2])


def expected_bytes(world_size: int) -> dict[str, float]:
    """Closed form: fp32 gradients and bf16 parameters, matrices and rows padded to a multiple of the ranks."""
    elements, exact = 0, 0  # vectors are gathered in fp32
    by_shape: dict[tuple[int, ...], int] = {}
    for name, shape in worker.SHAPES.items():
        if ".h." in name:
            by_shape[shape] = by_shape.get(shape, 0) + 1
        else:
            padded = -(-shape[0] // world_size) * world_size * torch.Size(shape[1:]).numel()
            elements += padded
            exact += padded if len(shape) == 1 else 0
    for shape, count in by_shape.items():
        elements += -(-count // world_size) * world_size * torch.Size(shape).numel()
    share = (world_size - 1) / world_size
    return {
        "all_to_all_single": share * elements * 4,
        "all_gather": share * (elements + exact) * 2,
        "all_reduce": 2 * share * len(worker.SHAPES),  # a byte per parameter, which says whether it has a gradient
    }


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bytes_sent_in_one_step(world_size: int, ranks: Results) -> None:
    for rank in range(world_size):
        traffic = ranks[rank][f"traffic_{world_size}"]
        assert traffic["sent"] == pytest.approx(expected_bytes(world_size))
        assert traffic["stated"] == pytest.approx(tuple(expected_bytes(world_size).values())[:2])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_reductions_start_in_the_last_backward_pass(world_size: int, ranks: Results) -> None:
    for rank in range(world_size):
        traffic = ranks[rank][f"traffic_{world_size}"]
        *accumulating, last = traffic["calls_after_micro_batches"]
        assert not any(accumulating)
        assert last == traffic["buckets"]
        # The ranks agree once on which parameters have gradients.
        assert traffic["calls"] == 2 * traffic["buckets"] + 1


def test_bf16_gathers_round_only_on_other_ranks(ranks: Results) -> None:
    traffic = [ranks[rank]["traffic_2"] for rank in range(2)]
    exact = traffic[0]["params"]  # restored from what the two ranks saved
    assert_same(traffic[1]["params"], exact, tolerance=0)
    for name, value in exact.items():
        rounded = [outcome["rounded"][name] for outcome in traffic]
        for tensor in rounded:
            assert ((tensor == value) | (tensor == value.bfloat16())).all()
        if value.ndim > 1:
            assert all((tensor != value).any() for tensor in rounded) or value.numel() < 1024
        else:
            assert all(tensor.equal(value) for tensor in rounded)


def test_a_second_backward_is_refused(ranks: Results) -> None:
    assert "second backward pass" in ranks[0]["second_backward"]["message"]


@pytest.mark.parametrize(("count", "world_size"), [(12, 4), (5, 3), (2, 4), (7, 1)])
def test_assign_owners_gives_every_rank_its_share(count: int, world_size: int) -> None:
    loads = [0.0] * world_size
    loads[0] = 0.5
    owners = assign_owners(count, loads, weight=1.0)
    shares = [owners.count(rank) for rank in range(world_size)]
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1
    if count % world_size and world_size > 1:
        assert shares[0] == min(shares)


def state_bytes(buckets: list[Bucket], optimizer: MuonAdamW) -> int:
    for bucket in buckets:
        bucket.allocate_state(optimizer)  # type: ignore[arg-type]
    return sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


@pytest.mark.parametrize(("depth", "world_size"), [(4, 2), (12, 3), (12, 8), (20, 8), (26, 8), (26, 32), (32, 64)])
def test_state_per_rank_is_its_share(depth: int, world_size: int) -> None:
    with torch.device("meta"):
        net = GPT(config_for_depth(depth, vocab_size=32768, sequence_len=2048))

    def optimizer() -> MuonAdamW:
        return MuonAdamW(build_param_groups(net.named_parameters(), n_embd=net.config.n_embd))

    def on_rank(rank: int, ranks: int) -> int:
        sharded = optimizer()
        collectives: Any = SimpleNamespace(rank=rank, world_size=ranks)
        return state_bytes(make_buckets(sharded.param_groups, collectives, 32 * 2**20), sharded)

    whole = on_rank(0, 1)
    assert whole == pytest.approx(sum(p.nbytes * (1 if ".h." in n else 2) for n, p in net.named_parameters()), rel=2e-3)
    shares = [on_rank(rank, world_size) for rank in range(world_size)]
    assert max(shares) <= 1.1 * whole / world_size
    assert sum(shares) == pytest.approx(whole, rel=1e-3)


def test_rows_are_split_for_any_first_dimension() -> None:
    param = nn.Parameter(torch.zeros(10, 200))
    spans = []
    for rank in range(4):
        collectives: Any = SimpleNamespace(rank=rank, world_size=4)
        bucket = RowBucket({}, param, collectives)
        spans.append((bucket.rows.start, bucket.rows.stop))
    assert spans[0][0] == 0 and spans[-1][1] == 10
    assert all(a[1] == b[0] for a, b in pairwise(spans))
