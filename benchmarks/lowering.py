"""Memory traffic of the compiled parts of a training step on an H100, counted without one.

    make bench-lowering                          # the model of depth 12, 32 rows in a micro-batch
    make bench-lowering DEPTH=26 ROWS=8

torch's compiler lowers each part for an H100 that is not there; no kernel is compiled or run. It prints the number of
fused kernels of each part, the bytes that they read and write, the number of products and attention kernels, and the
activations kept for the backward pass, in units of A: one bf16 activation of the model's width. Needs Triton, which
torch's CUDA wheels include, and private functions of the compiler of torch 2.11.
"""

from __future__ import annotations

import argparse
import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.func import functional_call

from lmchat import losses
from lmchat.model import gpt
from lmchat.model.attention import attend_flash
from lmchat.model.config import GPTConfig
from lmchat.scaling import config_for_depth
from lmchat.types import CHUNK_TOKENS

VOCAB_SIZE, SEQUENCE_LEN = 32768, 2048
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=85 * 10**9,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    is_integrated=False,
)


@contextmanager
def pretended_h100() -> Iterator[None]:
    """Context manager in which torch's compiler finds an H100."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    cuda = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "synchronize": None,
    }
    interface = {
        "current_device": 0,
        "get_device_properties": H100,
        "get_compute_capability": 90,
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "is_bf16_supported": True,
    }
    worker = {"get_device_properties": H100, "current_device": 0}
    with ExitStack() as stack:
        for owner, values in ((torch.cuda, cuda), (CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, staticmethod(always(value))))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", always(None)))
        stack.enter_context(mock.patch.object(_triton, "triton_hash_with_backend", always("none")))
        _triton.has_triton.cache_clear()  # False after a compilation for a CPU; not to stay True after this one
        stack.callback(_triton.has_triton.cache_clear)
        yield


@dataclass
class Counts:
    """What a part of the step does.

    Attributes:
        fused: bytes read and written by each fused kernel.
        others: number of other kernels: matrix products and attention.
        saved: tensors that the forward pass keeps for the backward pass, inputs included.
    """

    fused: list[int] = field(default_factory=list)
    others: int = 0
    saved: list[Tensor] = field(default_factory=list)

    @property
    def fused_bytes(self) -> int:
        return sum(self.fused)

    def saved_bytes(self, tokens: int) -> int:
        """Bytes of the saved tensors that have a row per token, views of one tensor once; so no weights."""
        matrices = [x for x in self.saved if x.dim() > 1 and x.is_floating_point()]
        per_token = [x for x in matrices if tokens in (len(x), x.shape[:2].numel(), len(x) * x.size(-2))]
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in per_token}
        return sum(storages.values())


def count(function: Callable[..., Any], *inputs: Any, recompute: bool = False) -> Counts:
    """Lowers a function, and its backward pass if an input requires a gradient.

    Args:
        inputs: fake tensors on the CPU; they are on the pretended GPU when their operators are lowered.
        recompute: as in `lmchat.model.compile.compile_blocks`.
    """
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    counts = Counts()

    def lowering(is_backward: bool) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
            traced = copy.deepcopy(graph)
            if not is_backward:
                (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
                counts.saved = [out.meta["val"] for out in outputs[1:] if isinstance(out.meta["val"], Tensor)]
            with pretended_h100():
                _lower(graph, examples, is_backward, counts)
            return make_boxed_func(traced.forward)

        return compile_graph

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    with config.patch(ban_recompute_materialized_backward=not recompute):
        compiled = aot_function(
            function, lowering(False), lowering(True), partition, decompositions=select_decomp_table()
        )
        out = compiled(*inputs)
        if isinstance(out, Tensor) and out.requires_grad:
            out.backward(torch.empty_like(out))
    return counts


def _lower(graph: torch.fx.GraphModule, examples: list[Any], is_backward: bool, counts: Counts) -> None:
    """Lowers a graph for the pretended GPU and counts its kernels."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    device = torch.device("cuda", 0)
    mode = next(x.fake_mode for x in examples if isinstance(x, fake_tensor.FakeTensor))
    with mode:
        moved = [
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device) if isinstance(x, Tensor) else x
            for x in examples
        ]
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()
    view_to_reshape(graph)
    with torch.no_grad():
        mode = compile_fx.fake_tensor_prop(graph, moved)
    compile_fx._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph, example_inputs=moved, is_backward=is_backward)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*moved)
            lowered.codegen()
            for node in lowered.scheduler.nodes:
                if isinstance(node, ExternKernelSchedulerNode):
                    counts.others += not isinstance(node.node, MultiOutput)
                elif not isinstance(node, NopKernelSchedulerNode) and node.is_gpu():
                    counts.fused.append(node.get_read_write_buffers_sizes())


# ---------------------------------------------------------------------------------------------------------------------
# The compiled parts of a step


def block(config: GPTConfig, rows: int, layer: int, *, recompute: bool = False) -> Counts:
    """A block with its residual mix, forward and backward."""
    own = gpt.Block(config, layer)
    own.attn.attend = lambda q, k, v, window, starts: attend_flash(q, k, v, min(window, SEQUENCE_LEN // 2))

    def activation(width: int) -> Tensor:
        return torch.empty(rows, SEQUENCE_LEN, width, dtype=torch.bfloat16, requires_grad=True)

    kv_width = config.n_kv_head * config.head_dim
    value_embedding = activation(kv_width) if layer in config.value_embedding_layers else None
    cos, sin = torch.empty(2, SEQUENCE_LEN, 1, config.head_dim // 2, dtype=torch.bfloat16)
    factors = [torch.empty((), requires_grad=True) for _ in range(2)]
    names, weights = zip(*own.named_parameters(), strict=True)

    def run(x: Tensor, value_embedding: Tensor | None, cos: Tensor, sin: Tensor, *rest: Tensor) -> Any:
        mix, weights = rest[:3], dict(zip(names, rest[3:], strict=True))
        return functional_call(own, weights, (x, value_embedding, gpt.AttentionInputs(cos, sin, None), mix))

    x, x0 = activation(config.n_embd), activation(config.n_embd)
    return count(run, x, value_embedding, cos, sin, x0, *factors, *weights, recompute=recompute)


def head(training: bool) -> Counts:
    """What follows the product of a chunk of the loss head: losses, and in training the gradient of the logits."""
    tokens = CHUNK_TOKENS["cuda"]
    logits = torch.empty(tokens, VOCAB_SIZE, dtype=torch.bfloat16)
    picks, scale = torch.empty(tokens, 1, dtype=torch.int64), torch.empty(tokens, 1)
    if training:
        return count(lambda *inputs: losses._loss_and_logit_gradient(*inputs, fused=True), logits, picks, scale)
    return count(lambda *inputs: losses._chunk_losses(*inputs), logits, picks, scale[:, 0])


def look_up(config: GPTConfig, rows: int) -> Counts:
    """The look-up in a token table, forward and backward."""
    ids = torch.empty(rows, SEQUENCE_LEN, dtype=torch.int64)
    table = nn.Parameter(torch.empty(VOCAB_SIZE, config.n_embd))
    return count(lambda ids, table: gpt._look_up(ids, torch.bfloat16, table), ids, table)


def print_counts(depth: int, rows: int) -> None:
    """Prints a line per part."""
    config = config_for_depth(depth, VOCAB_SIZE, SEQUENCE_LEN)
    tokens = rows * SEQUENCE_LEN
    activation, logits = tokens * config.n_embd * 2, CHUNK_TOKENS["cuda"] * VOCAB_SIZE * 2
    print(f"d{depth}, {rows} rows of {SEQUENCE_LEN}: A = {activation / 1e6:.0f} MB")
    for layer in (0, 1):
        kind = "with" if layer in config.value_embedding_layers else "without"
        for recompute in (False, True):
            with FakeTensorMode():
                counts = block(config, rows, layer, recompute=recompute)
            print(
                f"block {kind} value embedding{', recomputing' * recompute}: {len(counts.fused)} fused kernels, "
                f"{counts.fused_bytes / activation:.1f} A; {counts.others} others; "
                f"saved {counts.saved_bytes(tokens) / activation:.1f} A"
            )
    for training in (True, False):
        with FakeTensorMode():
            counts = head(training)
        name = "loss and gradient of the logits" if training else "losses in evaluation"
        print(f"{name}: {len(counts.fused)} fused kernels, {counts.fused_bytes / logits:.1f} x the bf16 logits")
    with FakeTensorMode():
        counts = look_up(config, rows)
    print(f"look-up in a token table: {len(counts.fused)} fused kernels, {counts.fused_bytes / activation:.1f} A")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32, help=f"rows of {SEQUENCE_LEN} tokens in a micro-batch")
    options = parser.parse_args()
    print_counts(options.depth, options.rows)


if __name__ == "__main__":
    main()
