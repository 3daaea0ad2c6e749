"""Compiles a model's blocks with torch.compile."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from lmchat.model.gpt import GPT

RECOMPILE_LIMIT = 32
"""torch's 8 variants of one function are too few: evaluation and its batch shape double and double the four again."""


def compile_blocks(net: GPT, *, recompute: bool = False) -> None:
    """Compiles each block in place for fixed shapes; on CUDA with the mix, and the look-ups and the head's loss too.

    Parameter names stay. Blocks of one kind share their code: there are four kinds at most, by window and value
    embedding. On a CPU, compiling the mix and the head is not faster.

    Args:
        recompute: recompute the inputs of matrix products in the backward pass instead of saving them, where they
            follow elementwise from other saved tensors: a block saves 10.7 to 12.7 activations instead of 18.7 to
            19.7 (in units of one bf16 activation), for an estimated 2 % of a training step.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.optimize_ddp = False  # it would cut each block in parts; between blocks DDP overlaps anyway
    on_gpu = net.device.type == "cuda"
    for block in net.blocks:
        block.compile(dynamic=False, backend=recomputing("inductor") if recompute else "inductor")
    net.fused_ends = net.mix_in_blocks = on_gpu


@cache  # Compiled code is shared only between functions with the same backend.
def recomputing(backend: str) -> Callable[..., Any]:
    """A torch.compile backend that lets the backward pass recompute the inputs of matrix products."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._functorch import config

    inner = lookup_backend(backend)

    def compile_recomputing(graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        with config.patch(ban_recompute_materialized_backward=False):
            return inner(graph, example_inputs, **options)

    return compile_recomputing
