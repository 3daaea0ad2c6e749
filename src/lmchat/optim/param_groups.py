"""The parameter groups of a GPT: which parameters Muon updates and which AdamW, and with which settings."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lmchat.types import UserError

REFERENCE_WIDTH = 768
"""Width that the AdamW learning rates of tables are tuned for; otherwise they are × √(REFERENCE_WIDTH / n_embd)."""

LEARNING_RATES = {"embedding_lr": 0.3, "unembedding_lr": 0.004, "matrix_lr": 0.02, "scalar_lr": 0.5}
"""Default learning rates of pretraining, nanochat's, at width 768 and batch 2¹⁹: of the token and value embeddings, the
output head, Muon, and the residual scalars."""

BETAS = (0.8, 0.95)
"""Betas of AdamW, except those of x0_lambdas."""


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    n_embd: int,
    *,
    lr_scale: float = 1.0,
    learning_rates: Mapping[str, float] = LEARNING_RATES,
    weight_decay: float = 0.2,
) -> list[dict[str, Any]]:
    """nanochat's parameter groups in its order: head, tables, scalars, then one Muon group per matrix shape, ascending.

    Args:
        named_parameters: parameters of a GPT; the group depends on the name only.
        n_embd: width of the model.
        lr_scale: factor on every learning rate, from the batch size.
        learning_rates: base learning rates, named as in `LEARNING_RATES`.
        weight_decay: weight decay of Muon; AdamW has none.

    Returns:
        Groups with ``name``, ``kind`` ("adamw" or "muon"), ``params``, ``param_names``, ``lr``, ``initial_lr`` and the
        settings of their update rule.

    Raises:
        UserError: a parameter belongs to no group.
    """
    table_scale = (n_embd / REFERENCE_WIDTH) ** -0.5
    adamw = {"kind": "adamw", "betas": BETAS, "eps": 1e-10, "weight_decay": 0.0}
    settings: dict[str | tuple[int, ...], dict[str, Any]] = {
        "lm_head": {**adamw, "lr": learning_rates["unembedding_lr"] * table_scale},
        "wte": {**adamw, "lr": learning_rates["embedding_lr"] * table_scale},
        "value_embeds": {**adamw, "lr": learning_rates["embedding_lr"] * table_scale},
        "resid_lambdas": {**adamw, "lr": learning_rates["scalar_lr"] * 0.01},
        "x0_lambdas": {**adamw, "lr": learning_rates["scalar_lr"], "betas": (0.96, 0.95)},
    }
    # Schedules set the momentum before the first step.
    muon = {"kind": "muon", "momentum": 0.95, "beta2": 0.95, "weight_decay": weight_decay}
    members: dict[str | tuple[int, ...], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, param in named_parameters:
        is_matrix = name.startswith("transformer.h.") and param.ndim == 2
        key = tuple(param.shape) if is_matrix else name.removeprefix("transformer.").split(".")[0]
        if not is_matrix and key not in settings:
            raise UserError(
                f"parameter {name} of shape {tuple(param.shape)} belongs to no optimizer group; name it as in GPT, or "
                "give MuonAdamW param groups of your own"
            )
        members[key].append((name, param))
    for shape in sorted(key for key in members if isinstance(key, tuple)):
        settings[shape] = {**muon, "lr": learning_rates["matrix_lr"], "name": f"muon_{shape[0]}x{shape[1]}"}
    groups: list[dict[str, Any]] = []
    for key, group in settings.items():
        if key in members:
            names, params = zip(*members[key], strict=True)
            lr = group["lr"] * lr_scale
            own = {"params": list(params), "param_names": list(names), "lr": lr, "initial_lr": lr}
            groups.append({"name": key, **group, **own})
    return groups
