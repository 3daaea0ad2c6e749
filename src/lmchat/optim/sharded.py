"""MuonAdamW over several ranks, each keeping a share of the optimizer's state: ZeRO-2 (arXiv:1910.02054) with Muon.

A step of N ranks is that of one rank on the mean of their gradients. Muon needs whole matrices, so the matrices of a
shape are dealt to the ranks; AdamW works elementwise, so large tensors are split by rows, and small ones are stepped
by every rank. Gradients are reduce-scattered to the ranks that need them, there the pure updates run, and the new
parameters are all-gathered. They travel in buckets: reductions overlap with the backward pass, gathers with updates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lmchat.optim.muon_adamw import MuonAdamW, StateDict, are_finite

# torch 2.13 renamed both and warns of the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SMALL_NUMEL = 1024
"""AdamW tensors below this many elements are all-reduced and stepped by every rank."""

MISSING, FINITE, NON_FINITE = range(3)
"""States of a gradient; of several ranks' the greatest counts."""

Group = dict[str, Any]


class BytesSent(NamedTuple):
    """What one rank sends in one step."""

    reduce_scatter: float
    all_gather: float
    all_reduce: float


class Collectives:
    """Collectives over a process group (None is the default one), of tensors on ``device``.

    The asynchronous ones return a function that waits for the result; their tensors have the ranks as first dimension.

    Attributes:
        by_exchange: reduce by an all-to-all and a sum, as on CPUs: gloo's reduce-scatter is an all-reduce inside, which
            sends twice the bytes.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.process_group = process_group
        self.device = device
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        self.by_exchange = device.type == "cpu"

    def reduce_scatter_mean(self, send: Tensor) -> Callable[[], Tensor]:
        """send: (N, ...); the result is this rank's part (...) of the mean over ranks."""
        if self.by_exchange:
            received = torch.empty_like(send)
            work = dist.all_to_all_single(received, send, group=self.process_group, async_op=True)
        else:
            received = torch.empty_like(send[0])
            work = reduce_scatter(received, send.flatten(0, 1), group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return (received.sum(0) if self.by_exchange else received).div_(self.world_size)

        return finish

    def all_reduce_mean(self, tensor: Tensor) -> Callable[[], Tensor]:
        """In place."""
        work = dist.all_reduce(tensor, group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return tensor.div_(self.world_size)

        return finish

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """part: (...); the result is (N, ...)."""
        received = part.new_empty(self.world_size, *part.shape)
        work = all_gather(received.flatten(0, 1), part, group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return received

        return finish

    def first_ranks(self, numbers: Sequence[int]) -> list[int]:
        """The first rank's ``numbers``, on every rank."""
        tensor = torch.tensor(numbers, device=self.device)
        dist.broadcast(tensor, group=self.process_group, group_src=0)
        return tensor.tolist()


def maximum_over(process_group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor]:
    """The maximum over the ranks of a group, of a tensor that is changed."""

    def maximum(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=process_group)
        return tensor

    return maximum


class Bucket(ABC):
    """Parameters whose gradients are reduced in one message, a tensor of ``shape``."""

    shape: tuple[int, ...]

    def __init__(self, params: Sequence[Tensor], collectives: Collectives) -> None:
        self.params = list(params)
        self.collectives = collectives
        self.missing = set(self.params)
        self.sums: dict[Tensor, Tensor] = {}
        self._message: Tensor | None = None
        self._reduced: Callable[[], Tensor] | None = None

    @abstractmethod
    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        """The view of a message that holds a parameter, in the parameter's shape."""

    @abstractmethod
    def allocate_state(self, optimizer: ShardedMuonAdamW) -> None:
        """Makes the state that this rank keeps."""

    @abstractmethod
    def _begin_reduction(self, message: Tensor) -> Callable[[], Tensor]: ...

    @abstractmethod
    def _step(self, optimizer: ShardedMuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        """Steps those of ``live`` that this rank steps, with what the reduction gave."""

    @abstractmethod
    def bytes_sent(self, gather_dtype: torch.dtype | None) -> BytesSent:
        """By one rank in one step."""

    def collect(self, param: Tensor) -> None:
        """Takes a parameter's gradient over into the message, zeros where there is none."""
        if param not in self.missing:
            raise RuntimeError("a second backward pass in the micro-batch that ends the step; sum the losses first")
        if self._message is None:
            self._message = param.new_empty(self.shape)
        place = self._place(self._message, param)
        if param.grad is None:
            place.zero_()
        else:
            place.copy_(param.grad)
            self.sums[param] = param.grad.sum()
            param.grad = None
        self.missing.remove(param)

    def reduce(self) -> None:
        """Begins to reduce the collected gradients."""
        assert self._message is not None and not self.missing
        self._reduced = self._begin_reduction(self._message)

    def step(self, optimizer: ShardedMuonAdamW, live: set[Tensor]) -> None:
        """Waits for the mean gradients and steps ``live`` parameters with them."""
        self._step(optimizer, self.take(), live)

    def take(self) -> Tensor:
        """Waits for what the reduction gives and makes ready for the next step."""
        assert self._reduced is not None
        reduced = self._reduced()
        self._message = self._reduced = None
        self.missing = set(self.params)
        self.sums.clear()
        return reduced

    @abstractmethod
    def gather(self, dtype: torch.dtype | None) -> None:
        """Begins to exchange new values in ``dtype``, by default the parameters' own."""

    @abstractmethod
    def finish(self) -> None:
        """Waits for the other ranks' new values and takes them over."""


class ShardedBucket(Bucket):
    """A bucket whose message has the ranks first: each steps its part and sends the new values to the others."""

    _gathered: Callable[[], Tensor] | None = None

    @abstractmethod
    def _part(self) -> Tensor:
        """This rank's part of a message of parameters."""

    @abstractmethod
    def _take(self, values: Tensor) -> None:
        """Copies the other ranks' parts of a message to the parameters."""

    def _begin_reduction(self, message: Tensor) -> Callable[[], Tensor]:
        return self.collectives.reduce_scatter_mean(message)

    def gather(self, dtype: torch.dtype | None) -> None:
        part = self._part()
        self._gathered = self.collectives.all_gather(part.to(dtype or part.dtype))

    def finish(self) -> None:
        assert self._gathered is not None
        self._take(self._gathered())
        self._gathered = None

    def bytes_sent(self, gather_dtype: torch.dtype | None) -> BytesSent:
        dtype, ranks = self.params[0].dtype, self.collectives.world_size
        to_others = math.prod(self.shape) * (ranks - 1) / ranks
        return BytesSent(to_others * dtype.itemsize, to_others * (gather_dtype or dtype).itemsize, 0.0)


class MatrixBucket(ShardedBucket):
    """Matrices of one Muon group, dealt to the ranks: (N, most matrices of a rank, rows, cols)."""

    def __init__(
        self, group: Group, key: str, params: Sequence[Tensor], owners: Sequence[int], collectives: Collectives
    ) -> None:
        super().__init__(params, collectives)
        self.group, self.key = group, key
        hands: list[list[Tensor]] = [[] for _ in range(collectives.world_size)]
        for param, owner in zip(params, owners, strict=True):
            hands[owner].append(param)
        self.own = hands[collectives.rank]
        self.others = [param for param in params if all(param is not own for own in self.own)]
        self.shape = (collectives.world_size, max(map(len, hands)), *params[0].shape)
        self._index = {param: (rank, i) for rank, hand in enumerate(hands) for i, param in enumerate(hand)}

    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        return message[self._index[param]]

    def allocate_state(self, optimizer: ShardedMuonAdamW) -> None:
        if self.own:
            optimizer.muon_state(self.key, self.own)

    def _step(self, optimizer: ShardedMuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        if self.own:
            optimizer.step_matrices(self.group, self.key, self.own, grads, [param in live for param in self.own])

    def _part(self) -> Tensor:
        part = self.params[0].new_empty(self.shape[1:])
        copy_all(part[: len(self.own)].unbind(), self.own)
        return part

    def _take(self, values: Tensor) -> None:
        copy_all(self.others, [self._place(values, param) for param in self.others])


class RowBucket(ShardedBucket):
    """One large AdamW tensor, split by rows: (N, rows of a rank, ...), the last ranks' rows padded."""

    def __init__(self, group: Group, param: Tensor, collectives: Collectives) -> None:
        super().__init__([param], collectives)
        self.group, self.param = group, param
        per_rank = -(-len(param) // collectives.world_size)
        self.shape = (collectives.world_size, per_rank, *param.shape[1:])
        self.start = min(collectives.rank * per_rank, len(param))
        self.stop = min(self.start + per_rank, len(param))

    @property
    def own(self) -> Tensor:
        """The rows that this rank steps."""
        return self.param[self.start : self.stop]

    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        return message.flatten(0, 1)[: len(param)]

    def allocate_state(self, optimizer: ShardedMuonAdamW) -> None:
        optimizer.adamw_state(self.param, self.own)

    def _step(self, optimizer: ShardedMuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        state = optimizer.adamw_state(self.param, self.own)
        optimizer.update_adamw(self.group, [self.own], [grads[: len(self.own)]], [state])

    def _part(self) -> Tensor:
        if len(self.own) == self.shape[1]:
            return self.own
        part = self.param.new_empty(self.shape[1:])
        part[: len(self.own)] = self.own
        return part

    def _take(self, values: Tensor) -> None:
        values = self._place(values, self.param)
        self.param[: self.start] = values[: self.start]
        self.param[self.stop :] = values[self.stop :]


class SmallBucket(Bucket):
    """All small AdamW tensors, flat and all-reduced: every rank steps them all."""

    def __init__(self, members: Sequence[tuple[Group, Tensor]], collectives: Collectives) -> None:
        super().__init__([param for _, param in members], collectives)
        self.groups = [group for group, _ in members]
        ends = list(accumulate(param.numel() for param in self.params))
        self.shape = (ends[-1],)
        self._end = dict(zip(self.params, ends, strict=True))

    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        end = self._end[param]
        return message[end - param.numel() : end].view_as(param)

    def allocate_state(self, optimizer: ShardedMuonAdamW) -> None:
        for param in self.params:
            optimizer.adamw_state(param, param)

    def _begin_reduction(self, message: Tensor) -> Callable[[], Tensor]:
        return self.collectives.all_reduce_mean(message)

    def _step(self, optimizer: ShardedMuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        for group, param in zip(self.groups, self.params, strict=True):
            if param in live:
                state = optimizer.adamw_state(param, param)
                optimizer.update_adamw(group, [param], [self._place(grads, param)], [state])

    def gather(self, dtype: torch.dtype | None) -> None:
        pass

    def finish(self) -> None:
        pass

    def bytes_sent(self, gather_dtype: torch.dtype | None) -> BytesSent:
        ranks = self.collectives.world_size
        return BytesSent(0.0, 0.0, 2 * self.shape[0] * self.params[0].dtype.itemsize * (ranks - 1) / ranks)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source over its target, of any dtype, in few launches."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def deal(count: int, loads: list[float], weight: float) -> list[int]:
    """Owner of each of ``count`` equal matrices: all ranks in turn, what is left over to the least loaded.

    loads: of each rank, in any unit; ``weight`` is added for each matrix left over.
    """
    ranks = len(loads)
    in_turn, left = divmod(count, ranks)
    lightest = sorted(range(ranks), key=loads.__getitem__)[:left]
    for rank in lightest:
        loads[rank] += weight
    return [*range(ranks)] * in_turn + lightest


def make_buckets(groups: Iterable[Group], collectives: Collectives, bucket_bytes: int) -> list[Bucket]:
    """Sorts the trainable parameters of MuonAdamW groups into buckets, the same way on every rank.

    Matrices come from the last layer to the first, as the backward pass makes their gradients. A bucket holds whole
    rounds of one matrix per rank, at least one and otherwise up to ``bucket_bytes``.
    """
    buckets: list[Bucket] = []
    loads = [0.0] * collectives.world_size
    small: list[tuple[Group, Tensor]] = []
    by_size = sorted(groups, key=lambda group: -group["params"][0].numel())  # Large leftovers are dealt first.
    for group in by_size:
        params = [param for param in reversed(group["params"]) if param.requires_grad]
        if group["kind"] == "adamw":
            small += [(group, param) for param in params if param.numel() < SMALL_NUMEL]
            buckets += [RowBucket(group, param, collectives) for param in params if param.numel() >= SMALL_NUMEL]
            continue
        matrix_bytes = group["params"][0].nbytes
        rounds = max(1, bucket_bytes // (matrix_bytes * collectives.world_size))
        count = rounds * collectives.world_size
        for first in range(0, len(params), count):
            members = params[first : first + count]
            owners = deal(len(members), loads, matrix_bytes)
            buckets.append(MatrixBucket(group, f"{group['name']}[{first}]", members, owners, collectives))
    if small:
        buckets.append(SmallBucket(small, collectives))
    return buckets


class ShardedMuonAdamW(MuonAdamW):
    """MuonAdamW whose gradients and state are shared out among the ranks of a process group.

    Every rank must hold the same parameters and take (or drop) the same steps. `step` leaves ``param.grad`` None.
    Parameters without a gradient on all ranks are left alone; without one on some ranks, it counts as zero there.
    ``state[param]`` exists on the owning rank only, for a table its rows only.

    Args:
        param_groups: as of `MuonAdamW`.
        agree: the maximum over the ranks of a uint8 tensor on the CPU. It needs a group of its own, since ranks ask
            with different numbers of reductions begun; one on the CPU does not wait for the device.
        process_group: of the gradients and parameters; None is the default group.
        gather_dtype: dtype in which new values travel, by default the parameters' own. A narrower one halves those
            bytes; the owner keeps the exact values, others round, until `gather_exact`.
        bucket_bytes: size of a message of gradients, as far as one matrix per rank allows.
        kwargs: as of `MuonAdamW`.
    """

    def __init__(
        self,
        param_groups: Iterable[Group],
        agree: Callable[[Tensor], Tensor],
        process_group: dist.ProcessGroup | None = None,
        *,
        gather_dtype: torch.dtype | None = None,
        bucket_bytes: int = 32 * 2**20,
        **kwargs: Any,
    ) -> None:
        super().__init__(param_groups, **kwargs)
        self._collectives = Collectives(process_group, self.param_groups[0]["params"][0].device)
        self._gather_dtype = gather_dtype
        self._buckets = make_buckets(self.param_groups, self._collectives, bucket_bytes)
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.params}
        self._overlapping = False
        self._agree = agree
        self._completed: list[int] = []
        self._order = self._buckets
        self._reduced = 0
        self._agreed: list[int] | None = None
        for param in self._bucket_of:
            param.register_post_accumulate_grad_hook(self._on_gradient)

    @property
    def bytes_sent(self) -> BytesSent:
        """What this rank sends in one step in which every parameter has a gradient."""
        sent = [bucket.bytes_sent(self._gather_dtype) for bucket in self._buckets]
        ranks = self._collectives.world_size
        agreement = BytesSent(0.0, 0.0, 2 * len(self._bucket_of) * (ranks - 1) / ranks)
        return BytesSent(*map(sum, zip(agreement, *sent, strict=True)))

    def reduce_during_backward(self) -> None:
        """Lets the next backward pass, the last before `step`, start reductions as its gradients come in.

        Without this call `step` reduces everything itself.
        """
        self._overlapping = True

    def _on_gradient(self, param: Tensor) -> None:
        if not self._overlapping:
            return
        bucket = self._bucket_of[param]
        bucket.collect(param)
        if not bucket.missing:
            self._completed.append(self._buckets.index(bucket))
            self._reduce_in_order()

    def _reduce_in_order(self) -> None:
        """Reduces buckets that are complete, in the one order that all ranks keep."""
        while self._reduced < len(self._order) and not self._order[self._reduced].missing:
            self._order[self._reduced].reduce()
            self._reduced += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps with the mean of all ranks' gradients, after running ``closure``, whose result it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = {param for param, worst in zip(self._bucket_of, self._agree_on_gradients(), strict=True) if worst}
        buckets = [bucket for bucket in self._order if not live.isdisjoint(bucket.params)]
        for bucket in buckets[self._reduced :]:
            for param in tuple(bucket.missing):
                bucket.collect(param)
            bucket.reduce()
        if self._take_dropped():
            for bucket in buckets:
                bucket.take()
        else:
            self._step_and_gather(buckets, live)
        self._learn_order()
        self._overlapping, self._reduced, self._agreed = False, 0, None
        self._completed.clear()
        return loss

    @torch.no_grad()
    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters with an infinite or NaN gradient on any rank; synchronises with the device.

        To be called by all ranks or by none, between the backward pass and the update: within `step`'s closure.
        """
        worst = zip(self._bucket_of, self._agree_on_gradients(), strict=True)
        return [self._names[param] for param, state in worst if state == NON_FINITE]

    def _agree_on_gradients(self) -> list[int]:
        """The worst state of each parameter's gradient on any rank, agreed once per step.

        No rank returns, and so none changes a parameter, before all have ended their backward pass.
        """
        if self._agreed is None:
            sums = [
                bucket.sums.get(param) if param.grad is None else param.grad.sum()
                for param, bucket in self._bucket_of.items()
            ]
            finite = iter(are_finite([total for total in sums if total is not None]))
            here = [MISSING if total is None else FINITE if next(finite) else NON_FINITE for total in sums]
            self._agreed = self._agree(torch.tensor(here, dtype=torch.uint8)).tolist()
        return self._agreed

    def _step_and_gather(self, buckets: Sequence[Bucket], live: set[Tensor]) -> None:
        for bucket in buckets:
            bucket.step(self, live)
            bucket.gather(self._gather_dtype)
        for bucket in buckets:
            bucket.finish()

    def _learn_order(self) -> None:
        """Takes the order in which a backward pass of the first rank completed all buckets, once."""
        if self._order is self._buckets and self._overlapping:
            complete = len(self._completed) == len(self._buckets)
            indices = self._collectives.first_ranks(self._completed if complete else [-1] * len(self._buckets))
            if indices[0] >= 0:
                self._order = [self._buckets[index] for index in indices]

    @torch.no_grad()
    def gather_exact(self) -> None:
        """Gives every rank the exact parameters, where `step` gathered them in a narrower dtype."""
        for bucket in self._buckets:
            bucket.gather(None)
        for bucket in self._buckets:
            bucket.finish()

    def add_param_group(self, param_group: Group) -> None:
        if hasattr(self, "_buckets"):
            raise NotImplementedError("groups cannot be added to a sharded optimizer; make a new one")
        super().add_param_group(param_group)

    def _allocate_state(self) -> None:
        for bucket in self._buckets:
            bucket.allocate_state(self)

    def _first_row(self, param: Tensor) -> int:
        bucket = self._bucket_of[param]
        return bucket.start if isinstance(bucket, RowBucket) else 0

    def _own_part(self, param: Tensor) -> Tensor:
        bucket = self._bucket_of[param]
        return bucket.own if isinstance(bucket, RowBucket) else param

    def state_dict(self) -> StateDict:
        """This rank's share; where others hold rounded parameters, it holds this rank's exact ones as ``param``."""
        saved = super().state_dict()
        if self._gather_dtype is not None:
            for param in self.state:
                saved["state"][self._names[param]]["param"] = self._own_part(param).detach()
        return saved

    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """As of `MuonAdamW`, on all ranks at once: from this rank's share if as many ranks saved it, or from all."""
        super().load_state_dict(state_dict)
        self.gather_exact()
