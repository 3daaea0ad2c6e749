"""MuonAdamW with optimizer state sharded over ranks: ZeRO-2 (arXiv:1910.02054) with Muon.

A step of N ranks equals a step of one rank with the mean of their gradients. Muon needs whole matrices, so each matrix
has an owner; AdamW is elementwise, so its tensors are split by rows. Gradients are reduce-scattered to the ranks that
need them, which compute the updates, and new parameters are all-gathered. Both use buckets: reductions overlap with the
backward pass, gathers with updates.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmchat.optim.buckets import Collectives, Group, make_buckets
from lmchat.optim.muon_adamw import MuonAdamW, StateDict, are_finite

MISSING, FINITE, NON_FINITE = range(3)
"""Gradient status; ranks reduce it with max."""


class ShardedMuonAdamW(MuonAdamW):
    """MuonAdamW whose gradients and state are sharded over the ranks of a process group.

    Every rank must hold the same parameters and take (or skip) the same steps. `step` leaves ``param.grad`` None. A
    parameter without a gradient on every rank is not changed; a gradient missing on some ranks counts as zero there.
    ``state[param]`` exists only on the owning rank, and of a table split by rows only the rank's rows.

    Args:
        param_groups: as in `MuonAdamW`.
        agree: returns the maximum over the ranks of a uint8 tensor on the CPU. It needs its own process group, since
            ranks may call it with different collectives in flight; one on the CPU does not wait for the device.
        process_group: group of the gradients and parameters; None is the default group.
        gather_dtype: dtype in which new values are gathered; default is the parameters' own. bf16 halves the bytes; the
            owner keeps exact values and the other ranks rounded ones, until `gather_exact`.
        bucket_bytes: size of a gradient message, unless one matrix per rank is larger.
        kwargs: as in `MuonAdamW`.
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
        self._skipped = False
        self._agree = agree
        self._completed: list[int] = []
        self._order = self._buckets
        self._reduced = 0
        self._agreed: list[int] | None = None
        for param in self._bucket_of:
            param.register_post_accumulate_grad_hook(self._on_gradient)

    def reduce_during_backward(self) -> None:
        """Starts reductions during the next backward pass, which must be the last before `step`.

        Without this call `step` starts all reductions.
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
        """Starts the reduction of complete buckets, in an order that is the same on all ranks."""
        while self._reduced < len(self._order) and not self._order[self._reduced].missing:
            self._order[self._reduced].reduce()
            self._reduced += 1

    def _step(self) -> None:
        """Steps with the mean of all ranks' gradients."""
        live = {param for param, worst in zip(self._bucket_of, self._agree_on_gradients(), strict=True) if worst}
        buckets = [bucket for bucket in self._order if not live.isdisjoint(bucket.params)]
        for bucket in buckets[self._reduced :]:
            for param in tuple(bucket.missing):
                bucket.collect(param)
            bucket.reduce()
        for bucket in buckets:
            grads = bucket.take()
            if not self._skipped:
                bucket.step(self, grads, live)
                bucket.gather(self._gather_dtype)
        if not self._skipped:
            for bucket in buckets:
                bucket.finish()
        self._learn_order()
        self._overlapping, self._skipped, self._reduced, self._agreed = False, False, 0, None
        self._completed.clear()

    @torch.no_grad()
    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters with an infinite or NaN gradient on any rank; needs a device sync.

        Must be called on all ranks or none, between the backward pass and the update, i.e. within `step`'s closure.
        """
        worst = zip(self._bucket_of, self._agree_on_gradients(), strict=True)
        return [self._names[param] for param, state in worst if state == NON_FINITE]

    def skip_step(self) -> None:
        """Makes the current step, whose closure has run, discard its gradients; parameters and state do not change."""
        self._skipped = True

    def _agree_on_gradients(self) -> list[int]:
        """The status of each parameter's gradient, reduced over the ranks with max, once per step.

        Returns after all ranks have finished their backward pass, so no rank changes a parameter before that.
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

    def _learn_order(self) -> None:
        """Sets the order of the reductions, once, to that in which a backward pass on rank 0 completed the buckets."""
        if self._order is self._buckets and self._overlapping:
            complete = len(self._completed) == len(self._buckets)
            indices = self._collectives.broadcast_from_rank0(self._completed if complete else [-1] * len(self._buckets))
            if indices[0] >= 0:
                self._order = [self._buckets[index] for index in indices]

    @torch.no_grad()
    def gather_exact(self) -> None:
        """Gathers the exact parameters, if `step` gathers rounded ones."""
        for bucket in self._buckets:
            bucket.gather(None)
        for bucket in self._buckets:
            bucket.finish()

    def _allocate_state(self) -> None:
        for bucket in self._buckets:
            bucket.allocate_state(self)

    def _own_rows(self, param: Tensor) -> slice:
        return self._bucket_of[param].rows

    def state_dict(self) -> StateDict:
        """This rank's state. With a narrower ``gather_dtype``, ``param`` holds the exact parameters of this rank."""
        saved = super().state_dict()
        if self._gather_dtype is not None:
            for param in self.state:
                saved["state"][self._names[param]]["param"] = param[self._own_rows(param)].detach()
        return saved

    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Restores state as `MuonAdamW` does; call it on all ranks.

        It needs this rank's state only if the same number of ranks saved it, else the states of all ranks.
        """
        super().load_state_dict(state_dict)
        self.gather_exact()
