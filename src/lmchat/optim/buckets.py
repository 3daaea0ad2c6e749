"""Buckets of parameters, which ZeRO-2 exchanges in messages: collectives over NCCL or gloo."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmchat.optim.muon_adamw import MuonAdamW, adamw_update

Group = dict[str, Any]

# torch 2.13 renamed both and warns about the old names.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives:
    """Asynchronous collectives of tensors on one device; each returns a function that waits for the result.

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
        """Reduces ``send`` (world_size, ...); the result is this rank's part (...) of the mean over ranks."""
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

    def all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Gathers ``part`` (...) of every rank; the result is (world_size, ...)."""
        received = part.new_empty(self.world_size, *part.shape)
        work = all_gather(received.flatten(0, 1), part, group=self.process_group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return received

        return finish

    def broadcast_from_rank0(self, numbers: Sequence[int]) -> list[int]:
        """The ``numbers`` of rank 0, on every rank."""
        tensor = torch.tensor(numbers, device=self.device)
        dist.broadcast(tensor, group=self.process_group, group_src=0)
        return tensor.tolist()


class Bucket(ABC):
    """Parameters whose gradients are reduced in one message, and whose new values are gathered in another.

    Messages have the ``shape`` (world_size, ...); each rank steps its part and gathers the others.
    """

    shape: tuple[int, ...]
    rows = slice(0, None)
    """Rows of its parameters that this rank steps, if any."""

    def __init__(self, params: Sequence[Tensor], collectives: Collectives) -> None:
        self.params = list(params)
        self.collectives = collectives
        self.missing = set(self.params)
        self.sums: dict[Tensor, Tensor] = {}
        self._message: Tensor | None = None
        self._reduced: Callable[[], Tensor] | None = None
        self._gathered: Callable[[], Tensor] | None = None

    @abstractmethod
    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        """The parameter's view of a message, in the parameter's shape."""

    @abstractmethod
    def allocate_state(self, optimizer: MuonAdamW) -> None:
        """Allocates the optimizer state that this rank keeps."""

    @abstractmethod
    def _part(self) -> Tensor:
        """This rank's part of a message of parameters."""

    @abstractmethod
    def _take(self, values: Tensor) -> None:
        """Copies the other ranks' parts of a message to the parameters."""

    @abstractmethod
    def step(self, optimizer: MuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        """Steps the parameters in ``live`` that this rank owns with their mean gradients, the result of `take`."""

    def collect(self, param: Tensor) -> None:
        """Moves the gradient of ``param`` into the message; zeros if there is none."""
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
        part = self._part()
        narrow = dtype if part.ndim > 1 else None
        self._gathered = self.collectives.all_gather(part.to(narrow or part.dtype))

    def finish(self) -> None:
        """Waits for the new values of the other ranks and copies them to the parameters."""
        assert self._gathered is not None
        self._take(self._gathered())
        self._gathered = None


class MatrixBucket(Bucket):
    """Matrices of one Muon group, each owned by a rank; messages are (world_size, max per rank, rows, cols)."""

    def __init__(
        self, group: Group, key: str, params: Sequence[Tensor], owners: Sequence[int], collectives: Collectives
    ) -> None:
        super().__init__(params, collectives)
        self.group, self.key = group, key
        by_owner: list[list[Tensor]] = [[] for _ in range(collectives.world_size)]
        for param, owner in zip(params, owners, strict=True):
            by_owner[owner].append(param)
        self.own = by_owner[collectives.rank]
        self.others = [param for param, owner in zip(params, owners, strict=True) if owner != collectives.rank]
        self.shape = (collectives.world_size, max(map(len, by_owner)), *params[0].shape)
        self._index = {param: (rank, i) for rank, owned in enumerate(by_owner) for i, param in enumerate(owned)}

    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        return message[self._index[param]]

    def allocate_state(self, optimizer: MuonAdamW) -> None:
        if self.own:
            optimizer.muon_state(self.key, self.own)

    def step(self, optimizer: MuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        if self.own:
            optimizer.step_matrices(self.group, self.key, self.own, grads, [param in live for param in self.own])

    def _part(self) -> Tensor:
        part = self.params[0].new_empty(self.shape[1:])
        copy_all(part[: len(self.own)].unbind(), self.own)
        return part

    def _take(self, values: Tensor) -> None:
        copy_all(self.others, [self._place(values, param) for param in self.others])


class RowBucket(Bucket):
    """One AdamW tensor, split by rows; messages are (world_size, rows per rank, ...), padded at the end."""

    def __init__(self, group: Group, param: Tensor, collectives: Collectives) -> None:
        super().__init__([param], collectives)
        self.group, self.param = group, param
        per_rank = -(-len(param) // collectives.world_size)
        self.shape = (collectives.world_size, per_rank, *param.shape[1:])
        start = min(collectives.rank * per_rank, len(param))
        self.rows = slice(start, min(start + per_rank, len(param)))

    @property
    def own(self) -> Tensor:
        """The rows that this rank steps."""
        return self.param[self.rows]

    def _place(self, message: Tensor, param: Tensor) -> Tensor:
        return message.flatten(0, 1)[: len(param)]

    def allocate_state(self, optimizer: MuonAdamW) -> None:
        optimizer.adamw_state(self.param, self.own)

    def step(self, optimizer: MuonAdamW, grads: Tensor, live: set[Tensor]) -> None:
        state = optimizer.adamw_state(self.param, self.own)
        adamw_update([self.own], [grads[: len(self.own)]], [state], self.group)

    def _part(self) -> Tensor:
        if len(self.own) == self.shape[1]:
            return self.own
        part = self.param.new_empty(self.shape[1:])
        part[: len(self.own)] = self.own
        return part

    def _take(self, values: Tensor) -> None:
        values = self._place(values, self.param)
        self.param[: self.rows.start] = values[: self.rows.start]
        self.param[self.rows.stop :] = values[self.rows.stop :]


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
