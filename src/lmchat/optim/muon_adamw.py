"""MuonAdamW: Muon for the blocks' matrices, AdamW for everything else, in one torch optimizer.

Muon is Nesterov momentum, made nearly orthogonal by Polar Express (arXiv:2505.16932), with NorMuon's variance reduction
(arXiv:2510.05491) and cautious weight decay. The matrices of a stack are independent: norms and products run over the
last two dimensions only, so splitting a stack, over calls or ranks, does not change the result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lmchat.optim.saved_state import check_same_parameters, restore, saved_group
from lmchat.types import UserError, user_errors

POLAR_EXPRESS_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""(a, b, c) of each step X ← aX + bXXᵀX + c(XXᵀ)²X."""

NORM_MARGIN = 1.02
"""Safety factor by which singular values start below 1, so that rounding does not push them above."""

MAX_STACK_SHAPES = 64
"""Recompile limit of Muon's update: one graph per stack shape. Beyond torch's default of 8, they would run eagerly."""

StateDict = dict[str, Any]


class MuonAdamW(Optimizer):
    """Optimizer with Muon and AdamW parameter groups.

    Schedules set ``lr``, ``momentum`` and ``weight_decay`` in ``param_groups`` between steps, as plain numbers.
    Parameters without a gradient and their state are not changed. ``state[param]`` holds, in the parameter's dtype,
    ``momentum_buffer`` (rows, cols) and ``second_moment`` for Muon, views of one stack per group, and ``exp_avg``,
    ``exp_avg_sq`` and ``step`` for AdamW.

    Args:
        param_groups: groups as returned by `param_groups.build_param_groups`.
        polar_dtype: dtype of Muon's orthogonalisation; None is that of the parameters. bf16 changes a single update by
            3 to 6 % of its norm.
        compile: compile Muon's update, once per stack shape.
    """

    def __init__(
        self,
        param_groups: Iterable[dict[str, Any]],
        *,
        polar_dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self.polar_dtype = polar_dtype
        self.compile = compile
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._names: dict[Tensor, str] = {}
        super().__init__([dict(group) for group in param_groups], defaults={})

    @cached_property
    def _compiled_update(self) -> Callable[..., None]:
        limit = torch._dynamo.config.patch(recompile_limit=MAX_STACK_SHAPES)
        return limit(torch.compile(muon_update, dynamic=False))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which needs ``name``, ``kind`` and the settings of its update rule."""
        name, kind = param_group.get("name"), param_group.get("kind")
        if kind not in ("adamw", "muon"):
            raise UserError(f'param group {name} has kind {kind}; give "adamw" or "muon"')
        if any(name == group["name"] for group in self.param_groups):
            raise UserError(f"two param groups are named {name}; give each its own name")
        shapes = {tuple(param.shape) for param in param_group["params"]}
        if kind == "muon" and (len(shapes) != 1 or len(*shapes) != 2):
            raise UserError(f"Muon group {name} has shapes {sorted(shapes)}; give it matrices of one shape")
        names = param_group.setdefault("param_names", [f"{name}.{i}" for i in range(len(param_group["params"]))])
        super().add_param_group(param_group)
        self._names.update(zip(param_group["params"], names, strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs ``closure`` (forward and backward), steps every group with its gradients, and returns its result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            live = [param for param in params if param.grad is not None]
            if group["kind"] == "adamw":
                adamw_update(live, [param.grad for param in live], [self.adamw_state(p, p) for p in live], group)
            elif live:
                grads = torch.stack([torch.zeros_like(param) if param.grad is None else param.grad for param in params])
                self.step_matrices(group, group["name"], params, grads, [param.grad is not None for param in params])

    def step_matrices(
        self, group: dict[str, Any], key: str, params: Sequence[Tensor], grads: Tensor, live: Sequence[bool]
    ) -> None:
        """Steps the matrices ``params`` of a Muon group that are ``live``, i.e. have a gradient.

        ``key`` is the name of their stack of state; ``grads`` are (n, rows, cols).
        """
        state = self.muon_state(key, params)
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "beta2")}
        update: Callable[..., None] = muon_update
        if self.compile:
            # Tensors, so that changing hyperparameters do not recompile.
            settings = {name: torch.tensor(value, dtype=grads.dtype) for name, value in settings.items()}
            update = self._compiled_update
        parts = [slice(0, len(params))] if all(live) else [slice(i, i + 1) for i, alive in enumerate(live) if alive]
        for part in parts:
            stacked = torch.stack(list(params[part]))
            update(stacked, grads[part], *(each[part] for each in state), **settings, polar_dtype=self.polar_dtype)
            torch._foreach_copy_(list(params[part]), stacked.unbind())

    def adamw_state(self, param: Tensor, part: Tensor) -> dict[str, Tensor]:
        """State of ``part`` of ``param``, which this rank steps; initially zeros."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(part)
            state["exp_avg_sq"] = torch.zeros_like(part)
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
        return state

    def muon_state(self, key: str, params: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Stacked momentum buffers and second moments of ``params``; initially zeros."""
        if key not in self._stacks:
            shape = params[0].shape
            momentum_buffers = params[0].new_zeros(len(params), *shape)
            second_moments = params[0].new_zeros(len(params), *second_moment_shape(*shape))
            for i, param in enumerate(params):
                self.state[param] = {"momentum_buffer": momentum_buffers[i], "second_moment": second_moments[i]}
            self._stacks[key] = momentum_buffers, second_moments
        return self._stacks[key]

    def state_dict(self) -> StateDict:
        """State and settings keyed by names, ready for `torch.save` and for ``torch.load(weights_only=True)``.

        Returns:
            ``state``: tensors by parameter name; if they are a part of the rows, ``row_start`` is the first row.
            ``param_groups``: the groups, with ``param_names`` and ``param_shapes`` instead of parameters.
        """
        self._allocate_state()
        return {
            "state": {
                self._names[param]: {**state, "row_start": self._own_rows(param).start}
                for param, state in self.state.items()
            },
            "param_groups": [saved_group(group) for group in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Restores the state exactly, from one `state_dict` or from those of all ranks of a sharded run.

        The settings of the groups stay as they are: they follow from the options of the run. If the state has exact
        parameters, because other ranks had rounded ones, they are restored too.

        Raises:
            UserError: the saved parameters have other names or shapes, state is missing, or the state is damaged.
        """
        damage = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
        with user_errors("the saved optimizer state is damaged", "use an older checkpoint", *damage):
            parts = [state_dict] if isinstance(state_dict, dict) else list(state_dict)
            check_same_parameters(self.param_groups, parts[0]["param_groups"])
            self._allocate_state()
            for param, state in self.state.items():
                name, rows = self._names[param], self._own_rows(param)
                pieces = [part["state"][name] for part in parts if name in part["state"]]
                for key, tensor in state.items():
                    restore(tensor, pieces, key, rows.start, name)
                if pieces and "param" in pieces[0]:
                    restore(param[rows], pieces, "param", rows.start, name)

    def _allocate_state(self) -> None:
        for group in self.param_groups:
            if group["kind"] == "muon":
                self.muon_state(group["name"], group["params"])
            else:
                for param in group["params"]:
                    self.adamw_state(param, param)

    def _own_rows(self, param: Tensor) -> slice:
        """The rows of ``param`` whose state is kept here."""
        return slice(0, None)


def polar_express(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices; singular values end between about 0.86 and 1.14.

    Args:
        matrices: (K, rows, cols).
        dtype: dtype of the iteration and of the result; default is that of ``matrices``.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = (matrices * (NORM_MARGIN * norms + 1e-6).reciprocal()).to(dtype or matrices.dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        # In this order each product is rounded once, which is three times as accurate in bf16 as term by term.
        square = torch.baddbmm(gram, gram, gram, beta=b / c)
        left, right = (x, square) if tall else (square, x)
        x = torch.baddbmm(x, left, right, beta=a, alpha=c)
    return x


def second_moment_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of a matrix's second moment: one value per row, or per column if the matrix is wide."""
    return (rows, 1) if rows >= cols else (1, cols)


def reduce_variance(update: Tensor, second_moment: Tensor, beta2: float | Tensor) -> Tensor:
    """NorMuon: divides each row (column, if wide) by its running root mean square, keeping the Frobenius norm.

    Args:
        update: (K, rows, cols).
        second_moment: (K, rows, 1) or (K, 1, cols), updated in place; no bias correction.
        beta2: decay of the second moment.
    """
    axis = -1 if second_moment.size(-1) == 1 else -2
    mean_square = update.square().mean(dim=axis, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    scaled_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * (scale * (norm / scaled_norm.clamp_min(1e-10)))


def muon_update(
    params: Tensor,
    grads: Tensor,
    momentum_buffers: Tensor,
    second_moments: Tensor,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor,
    beta2: float | Tensor = 0.95,
    polar_dtype: torch.dtype | None = None,
) -> None:
    """Takes one step, in place on ``params``, ``momentum_buffers`` and ``second_moments``.

    The learning rate is multiplied by √max(1, rows / cols). Weight decay applies where update and parameter have the
    same sign, in the same subtraction as the update. Everything but the orthogonalisation is computed in the dtype of
    the parameters, including hyperparameters; nanochat rounds lr, weight decay and beta2 to bf16 with the update.

    Args:
        params: (K, rows, cols), like ``grads`` and ``momentum_buffers``.
        second_moments: (K, *second_moment_shape(rows, cols)).
        lr, momentum, weight_decay, beta2: numbers, or 0-dim tensors if the call is compiled.
        polar_dtype: dtype of `polar_express`; default is that of ``params``.
    """
    rows, cols = params.shape[-2:]
    momentum_buffers.lerp_(grads, 1 - momentum)
    nesterov = grads.lerp(momentum_buffers, momentum)
    update = polar_express(nesterov, polar_dtype).to(params.dtype)
    update = reduce_variance(update, second_moments, beta2)
    decay = weight_decay * params * (update * params >= 0)
    params.sub_((update + decay) * (lr * max(1, rows / cols) ** 0.5))


def adamw_update(
    params: list[Tensor], grads: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], settings: Mapping[str, Any]
) -> None:
    """Takes one step of AdamW (arXiv:1711.05101), in place on ``params`` and ``states``.

    torch's fused kernel makes one pass over memory for all tensors of a call.

    p ← p(1 − lr·wd); m ← lerp(m, g, 1−β₁); v ← lerp(v, g², 1−β₂); p ← p − lr/(1−β₁ᵗ) · m / (√(v/(1−β₂ᵗ)) + eps).
    Elementwise, so splitting a tensor does not change the result.

    Args:
        params: tensors of any shape; ``grads`` and ``states`` correspond one to one.
        states: ``exp_avg`` (m), ``exp_avg_sq`` (v) and ``step``, a 0-dim fp32 tensor on the parameter's device: the
            number of previous steps (t − 1).
        settings: ``lr``, ``betas``, ``eps`` and ``weight_decay``, e.g. a parameter group.
    """
    exp_avgs, exp_avg_sqs, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    beta1, beta2 = settings["betas"]
    pairs = zip(params, grads, strict=True)
    adamw(
        params,
        # The fused kernel ignores strides.
        [grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad) for param, grad in pairs],
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        **{name: settings[name] for name in ("lr", "eps", "weight_decay")},
    )


def are_finite(sums: Sequence[Tensor]) -> list[bool]:
    """Whether the tensors with these sums are finite; a sum over an infinity or NaN never is."""
    return torch.stack(list(sums)).isfinite().tolist() if sums else []
