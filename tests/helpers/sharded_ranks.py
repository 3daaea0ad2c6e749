"""The code that each of four gloo processes runs for test_sharded.py.

Smaller world sizes use subgroups of the four. The processes write results to files, which the test checks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bucket_traffic import bytes_sent
from lmchat.optim import buckets
from lmchat.optim.muon_adamw import MuonAdamW
from lmchat.optim.param_groups import build_param_groups
from lmchat.optim.sharded import ShardedMuonAdamW

RANKS = 4
MICRO_BATCHES = 12
STEPS = 4
SHAPES = {
    "resid_lambdas": (3,),
    "x0_lambdas": (3,),
    "transformer.wte.weight": (27, 48),
    **{f"transformer.h.{i}.attn.c_q.weight": (8, 8) for i in range(5)},
    **{f"transformer.h.{i}.attn.ve_gate.weight": (2, 32) for i in (0, 2, 4)},
    **{f"transformer.h.{i}.mlp.c_fc.weight": (16, 8) for i in range(5)},
    **{f"transformer.h.{i}.mlp.c_proj.weight": (8, 16) for i in range(5)},
    "lm_head.weight": (24, 48),
    "value_embeds.4.weight": (10, 7, 16),
}

Params = dict[str, nn.Parameter]
Groups = tuple[Callable[[Tensor], Tensor], dist.ProcessGroup]
"""To agree over, and for gradients and parameters."""


def make_params(dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def loss_of(params: Params, step: int, micro_batch: int, absent: Collection[str] = ()) -> Tensor:
    """A loss whose gradient depends on the parameters, different for every micro-batch; those ``absent`` get none."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for name, param in params.items():
        slope = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        if name not in absent:
            scaled = param * slope
            total = total + (scaled + 0.5 * scaled * scaled).sum()
    return total


def sparse_loss_of(params: Params, step: int, micro_batch: int) -> Tensor:
    """Some parameters have gradients in some micro-batches only, or in none; in step 1 no parameter has any."""
    absent = {"transformer.h.2.attn.c_q.weight", "lm_head.weight", "x0_lambdas"} if step == 2 else set()
    if micro_batch % 2:
        absent |= {"value_embeds.4.weight", "transformer.h.1.mlp.c_fc.weight", "resid_lambdas"}
    return loss_of(params, step, micro_batch, absent=params if step == 1 else absent)


def set_schedule(optimizer: MuonAdamW, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - step / 10)
        if group["kind"] == "muon":
            group["momentum"], group["weight_decay"] = 0.85 + step / 100, 0.2 - step / 50


def train(
    optimizer: MuonAdamW,
    params: Params,
    steps: range,
    rank: int,
    world_size: int,
    overlap: bool,
    loss: Callable[[Params, int, int], Tensor] = loss_of,
) -> None:
    """Micro-batch k of a step belongs to rank k mod world_size."""
    for step in steps:
        set_schedule(optimizer, step)
        mine = range(rank, MICRO_BATCHES, world_size)
        for micro_batch in mine:
            if overlap and micro_batch == mine[-1] and isinstance(optimizer, ShardedMuonAdamW):
                optimizer.reduce_during_backward()
            (loss(params, step, micro_batch) / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()


def groups_of(params: Params) -> list[dict[str, Any]]:
    return build_param_groups(params.items(), n_embd=8)


def copies(params: Params) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in params.items()}


class CountedCollectives:
    """Counts the bytes that a rank sends by torch's collectives with gloo's algorithms."""

    PLACES: ClassVar = {"all_to_all_single": dist, "all_gather": buckets, "all_reduce": dist}

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.sent = dict.fromkeys(self.PLACES, 0.0)
        self.calls = 0
        self._originals = {name: getattr(place, name) for name, place in self.PLACES.items()}

    def __enter__(self) -> CountedCollectives:
        for name, place in self.PLACES.items():
            setattr(place, name, self._counted(name))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, function in self._originals.items():
            setattr(self.PLACES[name], name, function)

    def _counted(self, name: str) -> Any:
        def call(*tensors: Tensor, **kwargs: Any) -> Any:
            n, size = self.world_size, tensors[-1].nbytes
            share = {
                "all_to_all_single": (n - 1) / n,
                "all_gather": n - 1,
                "all_reduce": 2 * (n - 1) / n,
            }[name]
            self.sent[name] += share * size
            self.calls += 1
            return self._originals[name](*tensors, **kwargs)

        return call


def equivalence(rank: int, world_size: int, groups: Groups, overlap: bool, by_exchange: bool = True) -> dict[str, Any]:
    params = make_params()
    optimizer = ShardedMuonAdamW(groups_of(params), *groups, bucket_bytes=world_size * 2 * 8 * 16 * 8)
    optimizer._collectives.by_exchange = by_exchange
    train(optimizer, params, range(STEPS), rank, world_size, overlap)
    return {"params": copies(params), "optimizer": optimizer.state_dict()}


def sparse_gradients(rank: int, world_size: int, groups: Groups) -> dict[str, Any]:
    params = make_params()
    optimizer = ShardedMuonAdamW(groups_of(params), *groups)
    train(optimizer, params, range(STEPS), rank, world_size, overlap=True, loss=sparse_loss_of)
    return {"params": copies(params), "optimizer": optimizer.state_dict()}


def dropped_step(rank: int, world_size: int, groups: Groups) -> dict[str, Any]:
    """Skipped steps, because of the last rank's gradient, with and without reductions in flight, then normal ones."""
    params = make_params()
    optimizer = ShardedMuonAdamW(groups_of(params), *groups)
    found = []

    def drop() -> None:
        found.append(optimizer.non_finite_gradients())
        optimizer.skip_step()

    for overlap, name, value in ((True, "lm_head.weight", torch.inf), (False, "x0_lambdas", torch.nan)):
        slope = value if rank == world_size - 1 else 1.0
        overflow = params[name].register_hook(lambda grad, slope=slope: grad * slope)
        if overlap:
            optimizer.reduce_during_backward()
        loss_of(params, 7, rank).backward()
        overflow.remove()
        optimizer.step(drop)
    dropped = copies(params)
    train(optimizer, params, range(STEPS), rank, world_size, overlap=True)
    found.append(optimizer.non_finite_gradients())
    return {"found": found, "dropped": dropped, "params": copies(params), "optimizer": optimizer.state_dict()}


def traffic(rank: int, world_size: int, groups: Groups) -> dict[str, Any]:
    params = make_params(torch.float32)
    optimizer = ShardedMuonAdamW(groups_of(params), *groups, gather_dtype=torch.bfloat16)
    train(optimizer, params, range(1), rank, world_size, overlap=True)
    calls = []
    with CountedCollectives(world_size) as counted:
        mine = range(rank, MICRO_BATCHES, world_size)
        for micro_batch in mine:
            if micro_batch == mine[-1]:
                optimizer.reduce_during_backward()
            loss_of(params, 1, micro_batch).backward()
            calls.append(counted.calls)
        optimizer.step()
    rounded, saved = copies(params), deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for param in params.values():
            param.copy_(param.bfloat16())
    optimizer.load_state_dict(saved)
    return {
        "calls_after_micro_batches": calls,
        "calls": counted.calls,
        "sent": counted.sent,
        "stated": bytes_sent(optimizer._buckets, world_size),
        "buckets": len(optimizer._buckets),
        "rounded": rounded,
        "params": copies(params),
    }


def resharding(rank: int, groups: dict[int, Groups], folder: Path) -> dict[str, Any]:
    """One step on each of 4, 2, 3 and 1 ranks, each from the previous one's files."""
    previous = None
    for step, world_size in enumerate((4, 2, 3, 1)):
        if rank < world_size:
            params = make_params()
            optimizer = ShardedMuonAdamW(groups_of(params), *groups[world_size])
            if previous is not None:
                files = [folder / f"resharding_{step - 1}_{r}.pt" for r in range(previous)]
                parts = [torch.load(file, weights_only=True, mmap=True) for file in files]
                optimizer.load_state_dict([part["optimizer"] for part in parts])
                with torch.no_grad():
                    for name, value in parts[0]["params"].items():
                        params[name].copy_(value)
            train(optimizer, params, range(step, step + 1), rank, world_size, overlap=step % 2 == 0)
            state = {"params": copies(params), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / f"resharding_{step}_{rank}.pt")
        dist.barrier()
        previous = world_size
    return {}


def second_backward(groups: Groups) -> dict[str, Any]:
    params = make_params()
    optimizer = ShardedMuonAdamW(groups_of(params), *groups)
    optimizer.reduce_during_backward()
    loss_of(params, 0, 0).backward()
    try:
        loss_of(params, 0, 1).backward()
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": ""}


def new_groups(ranks: list[int]) -> Groups:
    agreement = dist.new_group(ranks)

    def maximum(flags: Tensor) -> Tensor:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=agreement)
        return flags

    return maximum, dist.new_group(ranks)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = {size: new_groups(list(range(size))) for size in range(1, RANKS + 1)}
    results: dict[str, Any] = {}
    for size, pair in groups.items():
        if rank < size:
            for overlap in (False, True):
                results[f"equivalence_{size}_{overlap}"] = equivalence(rank, size, pair, overlap)
            results[f"reduce_scatter_{size}"] = equivalence(rank, size, pair, overlap=True, by_exchange=False)
            results[f"sparse_{size}"] = sparse_gradients(rank, size, pair)
            results[f"dropped_{size}"] = dropped_step(rank, size, pair)
            results[f"traffic_{size}"] = traffic(rank, size, pair)
    results["resharding"] = resharding(rank, groups, folder)
    if rank == 0:
        results["second_backward"] = second_backward(groups[1])
    torch.save(results, folder / f"results_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
