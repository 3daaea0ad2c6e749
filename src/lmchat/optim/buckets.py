"""Buckets of parameters, which ZeRO-2 exchanges in messages: collectives over NCCL or gloo."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmchat.optim.muon_adamw import MuonAdamW, adamw_update

Group = dict[str, Any]
Piece = tuple[Tensor, slice, int | slice]
"""Parameter, rows of it, and their entries in a message whose first two dimensions are flattened."""

# torch 2.13 renamed both and warns about the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """Asynchronous collectives of tensors on one device.

    On CPUs they reduce by all-to-all and a local sum (``by_exchange``), since gloo implements reduce-scatter as an
    all-reduce that sends twice the bytes. ``process_group`` None is the default group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.process_group = process_group
        self.device = device
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        self.by_exchange = device.type == "cpu"

    def reduce_scatter_mean(self, send: Tensor) -> Callable[[], Tensor]:
        """Reduces ``send`` (world_size, ...); the result waits for this rank's part (...) of the mean over ranks."""
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

    def all_gather(self, message: Tensor) -> dist.Work:
        """Gathers the ranks' parts of ``message`` (world_size, ...) in place; each rank has set its own."""
        return all_gather(message.flatten(0, 1), message[self.rank], group=self.process_group, async_op=True)

    def broadcast_from_rank0(self, numbers: Sequence[int]) -> list[int]:
        """The ``numbers`` of rank 0, on every rank."""
        tensor = torch.tensor(numbers, device=self.device)
        dist.broadcast(tensor, group=self.process_group, group_src=0)
        return tensor.tolist()


class Bucket(ABC):
    """Parameters whose gradients are reduced in one message, and whose new values are gathered in another.

    Messages are (world_size, entries per rank, ...), padded at the end of each rank's part; each rank steps its part
    and gathers the others.

    Args:
        group: group of the parameters.
        entries: entries of each parameter, as in `Piece`.
        shape: shape of a message.
        own: what this rank steps.
        others: what the other ranks step.
    """

    rows = slice(0, None)
    """Rows of its parameters that this rank steps, if any."""

    def __init__(
        self,
        group: Group,
        entries: Mapping[Tensor, int | slice],
        shape: tuple[int, ...],
        own: Sequence[Piece],
        others: Sequence[Piece],
        collectives: Collectives,
    ) -> None:
        self.group, self.params, self.shape, self.collectives = group, list(entries), shape, collectives
        self._entries, self._own, self._others = entries, own, others
        self.missing = set(self.params)
        self.sums: dict[Tensor, Tensor] = {}
        self._message: Tensor | None = None
        self._reduced: Callable[[], Tensor] | None = None
        self._gathered: tuple[Tensor, dist.Work] | None = None

    @abstractmethod
    def allocate_state(self, optimizer: MuonAdamW) -> None:
        """Allocates the optimizer state that this rank keeps."""

    @abstractmethod
    def step(self, optimizer: MuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        """Steps the parameters in ``live`` that this rank owns with their mean gradients, the result of `take`."""

    def collect(self, param: Tensor) -> None:
        """Moves the gradient of ``param`` into the message; zeros if there is none."""
        if param not in self.missing:
            raise RuntimeError("a second backward pass in the micro-batch that ends the step; sum the losses first")
        if self._message is None:
            self._message = param.new_empty(self.shape)
        place = self._message.flatten(0, 1)[self._entries[param]]
        if param.grad is None:
            place.zero_()
        else:
            place.copy_(param.grad)
            self.sums[param] = param.grad.sum()
            param.grad = None
        self.missing.remove(param)

    def reduce(self) -> None:
        """Starts the reduction of the collected gradients."""
        assert self._message is not None and not self.missing
        self._reduced = self.collectives.reduce_scatter_mean(self._message)

    def take(self) -> Tensor:
        """Waits for the reduced gradients and prepares the bucket for the next step."""
        assert self._reduced is not None
        reduced = self._reduced()
        self._message = self._reduced = None
        self.missing = set(self.params)
        self.sums.clear()
        return reduced

    def gather(self, dtype: torch.dtype | None) -> None:
        """Starts the exchange of new values in ``dtype``, by default the parameters' own; vectors are always exact."""
        message = self.params[0].new_empty(self.shape, dtype=dtype if len(self.shape) > 2 else None)
        entries = message.flatten(0, 1)
        copy_all([entries[at] for *_, at in self._own], [param[rows] for param, rows, _ in self._own])
        self._gathered = message, self.collectives.all_gather(message)

    def finish(self) -> None:
        """Waits for the new values of the other ranks and copies them to the parameters."""
        assert self._gathered is not None
        message, work = self._gathered
        work.wait()
        entries = message.flatten(0, 1)
        copy_all([param[rows] for param, rows, _ in self._others], [entries[at] for *_, at in self._others])
        self._gathered = None


class MatrixBucket(Bucket):
    """Matrices of one Muon group, each owned by a rank and one entry of a message."""

    def __init__(
        self, group: Group, key: str, params: Sequence[Tensor], owners: Sequence[int], collectives: Collectives
    ) -> None:
        rank, slots = collectives.rank, [owners[:i].count(owner) for i, owner in enumerate(owners)]
        size = max(slots) + 1
        entries = {param: owner * size + slot for param, owner, slot in zip(params, owners, slots, strict=True)}
        mine = [(param, self.rows, at) for param, at in entries.items() if at // size == rank]
        others = [(param, self.rows, at) for param, at in entries.items() if at // size != rank]
        self.key, self.own = key, [param for param, *_ in mine]
        super().__init__(group, entries, (collectives.world_size, size, *params[0].shape), mine, others, collectives)

    def allocate_state(self, optimizer: MuonAdamW) -> None:
        if self.own:
            optimizer.muon_state(self.key, self.own)

    def step(self, optimizer: MuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        if self.own:
            optimizer.step_matrices(self.group, self.key, self.own, grads, [param in live for param in self.own])


class RowBucket(Bucket):
    """One AdamW tensor, split by rows, each of which is an entry of a message."""

    def __init__(self, group: Group, param: Tensor, collectives: Collectives) -> None:
        size = -(-len(param) // collectives.world_size)
        start, stop = (min(rank * size, len(param)) for rank in (collectives.rank, collectives.rank + 1))
        before, self.rows, after = slice(0, start), slice(start, stop), slice(stop, len(param))
        own, *others = ((param, rows, rows) for rows in (self.rows, before, after))
        shape = (collectives.world_size, size, *param.shape[1:])
        super().__init__(group, {param: slice(0, len(param))}, shape, [own], others, collectives)

    def allocate_state(self, optimizer: MuonAdamW) -> None:
        optimizer.adamw_state(self.params[0], self.params[0][self.rows])

    def step(self, optimizer: MuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        (param,) = self.params
        part = param[self.rows]
        adamw_update([part], [grads[: len(part)]], [optimizer.adamw_state(param, part)], self.group)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source to its target, converting dtypes, in few kernel launches."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def assign_owners(count: int, loads: list[float], weight: float) -> list[int]:
    """Assigns ``count`` equal matrices to ranks: round-robin, the remainder to the least loaded ranks.

    ``loads`` are the ranks' in any unit; each matrix of the remainder adds ``weight``.
    """
    ranks = len(loads)
    in_turn, left = divmod(count, ranks)
    lightest = sorted(range(ranks), key=loads.__getitem__)[:left]
    for rank in lightest:
        loads[rank] += weight
    return [*range(ranks)] * in_turn + lightest


def make_buckets(groups: Iterable[Group], collectives: Collectives, bucket_bytes: int) -> list[Bucket]:
    """Puts the trainable parameters of MuonAdamW groups into buckets, identically on every rank.

    Matrices are ordered from the last layer to the first, as the backward pass computes their gradients. A bucket holds
    the same number of matrices for each rank: at least one, otherwise as many as fit into ``bucket_bytes``.
    """
    buckets: list[Bucket] = []
    loads = [0.0] * collectives.world_size
    by_size = sorted(groups, key=lambda group: -group["params"][0].numel())  # Large remainders are assigned first.
    for group in by_size:
        params = [param for param in reversed(group["params"]) if param.requires_grad]
        if group["kind"] == "adamw":
            buckets += [RowBucket(group, param, collectives) for param in params]
            continue
        matrix_bytes = group["params"][0].nbytes
        per_rank = max(1, bucket_bytes // (matrix_bytes * collectives.world_size))
        count = per_rank * collectives.world_size
        for first in range(0, len(params), count):
            members = params[first : first + count]
            owners = assign_owners(len(members), loads, matrix_bytes)
            buckets.append(MatrixBucket(group, f"{group['name']}[{first}]", members, owners, collectives))
    return buckets
