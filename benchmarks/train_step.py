"""Forward and backward pass of a training step on the CPU: lmchat compared with a plain implementation of the model.

    python benchmarks/train_step.py [--depth 4] [--rows 16] [--seconds 60]

The plain implementation is straightforward: eager, an explicit mask in every layer, all logits in memory, the default
allocator. All variants run in turn in one process, so that other load affects them equally; the allocator is set for
the last ones only, since that cannot be undone. Prints the median time of each and its ratio to the plain one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmchat.losses import softcap
from lmchat.model.allocator import tune_malloc
from lmchat.model.compile import compile_blocks
from lmchat.model.gpt import GPT, default_compute_dtype, norm, rotate
from lmchat.scaling import config_for_depth, flops_per_token


def plain_loss(model: GPT, ids: Tensor, targets: Tensor) -> Tensor:
    """The model's loss in fp32, written out with stock functions on the same weights."""
    batch, length = ids.shape
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None]
    cos, sin = model.cos[:length].float(), model.sin[:length].float()
    x = x0 = norm(F.embedding(ids, model.transformer.wte.weight))
    for layer, block in enumerate(model.blocks):
        attn = block.attn
        x = model.resid_lambdas[layer] * x + model.x0_lambdas[layer] * x0
        h = norm(x)
        q, k, v = (F.linear(h, m.weight).view(batch, length, -1, attn.head_dim) for m in (attn.c_q, attn.c_k, attn.c_v))
        if hasattr(attn, "ve_gate"):
            gate = 2 * torch.sigmoid(F.linear(h[..., :32], attn.ve_gate.weight))
            v = v + gate[..., None] * F.embedding(ids, model.value_embeds[str(layer)].weight).view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        mask = (distance >= 0) & (distance <= attn.window)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        x = x + F.linear(y.transpose(1, 2).reshape(batch, length, -1), attn.c_proj.weight)
        x = x + F.linear(F.relu(F.linear(norm(x), block.mlp.c_fc.weight)).square(), block.mlp.c_proj.weight)
    logits = softcap(F.linear(norm(x), model.lm_head.weight)[..., : model.config.vocab_size].float())
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def take_turns(
    variants: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each variant, called in turn for about `seconds` in all."""
    for variant in variants.values():
        variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 3:
        for name, variant in variants.items():
            start = clock()
            variant()
            times[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60, help="measuring time, compilation aside")
    parser.add_argument("--cpu-clock", action="store_true", help="count CPU seconds, for a machine others use too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    config = config_for_depth(args.depth, args.vocab_size, args.sequence_len)
    tokens = torch.randint(config.vocab_size, (args.rows, args.sequence_len + 1))
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    compute_dtype = default_compute_dtype("cpu")
    model = GPT(config, compute_dtype=compute_dtype)
    model.init_weights()
    compiled = GPT(config, compute_dtype=compute_dtype)
    compiled.load_state_dict(model.state_dict())
    compile_blocks(compiled)
    compiled_plain = torch.compile(plain_loss, dynamic=False)

    def step(loss: Callable[[], Tensor], weights: GPT) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            weights.zero_grad(set_to_none=True)

        return run

    variants = {
        "plain": step(lambda: plain_loss(model, ids, targets), model),
        "plain, compiled": step(lambda: compiled_plain(model, ids, targets), model),
        "lmchat": step(lambda: model.loss(ids, targets), model),
        "lmchat, compiled": step(lambda: compiled.loss(ids, targets), compiled),
    }
    clock = time.process_time if args.cpu_clock else time.perf_counter
    medians = take_turns(variants, args.seconds / 2, clock)
    if tune_malloc():
        kept = {f"{name}, large blocks kept": variant for name, variant in variants.items()}
        medians |= take_turns(kept, args.seconds / 2, clock)

    count = ids.numel()
    flops = flops_per_token(config) * count
    print(
        f"depth {args.depth}, {count:,} tokens per step, {args.threads} thread(s), lmchat computes in {compute_dtype}"
    )
    print(f"{'':42}{'ms':>8}{'tokens/s':>10}{'GFLOP/s':>9}{'speed':>7}")
    for name, taken in medians.items():
        print(
            f"{name:42}{taken * 1e3:8.0f}{count / taken:10,.0f}{flops / taken / 1e9:9.0f}"
            f"{medians['plain'] / taken:6.2f}x"
        )


if __name__ == "__main__":
    main()
