"""The scaling laws set the options that the user leaves unset, and no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmchat.callbacks.training_plan import TrainingPlan
from lmchat.scaling import make_plan

SHAPE: dict[str, Any] = {"depth": 2, "sequence_len": 32, "head_dim": 32, "window_pattern": "L"}


@pytest.mark.parametrize(("given", "expected"), [(None, "law"), (0.05, 0.05), (0.0, 0.0)])
def test_an_explicit_weight_decay_is_not_scaled(given: float | None, expected: float | str) -> None:
    module = SimpleNamespace(
        scales_with_depth=True,
        shape=SHAPE,
        tokenizer=SimpleNamespace(vocab_size=512),
        global_batch_tokens=None,
        weight_decay=0.2,
        lr_scale=1.0,
    )
    data = SimpleNamespace(
        mask_documents=False,
        max_steps=None,
        micro_batch_size=1,
        evaluators=[],
        chooses_micro_batch=False,
        micro_batches_per_step=lambda *_: 1,
    )
    trainer: Any = SimpleNamespace(max_steps=-1, world_size=1, callbacks=[], datamodule=data)
    run = TrainingPlan(weight_decay=given).plan(trainer, module)
    plan = make_plan(vocab_size=512, **SHAPE, weight_decay=0.2)
    assert run.weight_decay == (plan.weight_decay if expected == "law" else expected)
    assert (run.lr_scale, run.steps) == (plan.lr_scale, plan.steps)
    assert plan.weight_decay not in (0.2, 0.05)
