"""Decode throughput of the engine compared with plain loops over the same model, and with the reference engine.

    python benchmarks/decode.py [--depth 4] [--rows 1 16 64] [--prompt 64] [--new 128] [--top-k 50]

The plain loop decodes one prompt with all rows at the same position: a contiguous cache, slices instead of masks,
`torch.multinomial` instead of per-row random numbers, no tools, and no row that ends early. Without a cache, every
token needs a pass over the whole context.

The rollouts are 16 questions of 100 to 150 tokens with 8 samples each of 20 to 256 tokens, most of them short. The
engine decodes them together; the loop takes one question at a time until its longest sample ends; the reference engine,
`tests/helpers/reference_engine.py`, starts them together and decodes the rows that are left. Useful tokens count.

All variants are run in turn, so that other load affects them equally. Elapsed time is measured, with two threads by
default (--threads); the best of several runs counts. The last line counts the operators of one decode step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.attention import attend_banded
from lmchat.model.gpt import GPT
from lmchat.scaling import config_for_depth
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import reference_engine

VOCAB_SIZE = 8192
QUESTIONS, SAMPLES = 16, 8


class PlainCache:
    """KV cache of rows that are all at the same position."""

    def __init__(self, model: GPT, rows: int, max_len: int) -> None:
        config = model.config
        shape = (config.n_layer, 2, rows, max_len, config.n_kv_head, config.head_dim)
        self.held = torch.zeros(shape, dtype=model.compute_dtype)
        self.longest = 0
        self.positions = torch.arange(0)

    def expect(self, length: int) -> PlainCache:
        self.positions = torch.arange(self.longest, self.longest + length)[None]
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        end = self.longest + q.size(1)
        keys, values = self.held[layer]
        keys[:, self.longest : end] = k
        values[:, self.longest : end] = v
        if layer == len(self.held) - 1:
            self.longest = end
        if q.size(1) > 1:
            return attend_banded(q, k, v, window)
        start = max(0, end - 1 - window)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys[:, start:end], values[:, start:end]))
        grouped = q.size(1) != keys.size(1)
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped).transpose(1, 2)


def plain_loop(model: GPT, prompt: list[int], rows: int, new: int, top_k: int, cached: bool = True) -> Tensor:
    """(rows, new) sampled ids."""
    generator = torch.Generator().manual_seed(42)
    ids = torch.tensor([prompt]).expand(rows, -1)
    cache: PlainCache | None = PlainCache(model, rows, len(prompt) + new) if cached else None
    context, out = ids, []
    for _ in range(new):
        logits = model.logits(model.hidden(context, cache and cache.expect(context.size(1)))[:, -1])
        values, candidates = logits.topk(top_k)
        choice = torch.multinomial(values.softmax(-1), 1, generator=generator)
        out.append(candidates.gather(-1, choice))
        context = out[-1] if cached else torch.cat((context, out[-1]), dim=1)
    return torch.cat(out, dim=1)


class CountOperators(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators_per_step(run: Callable[[int], object]) -> float:
    """Operators per step of ``run(new tokens)``, from the difference between a longer and a shorter run."""
    counts = []
    for new in (4, 12):
        with CountOperators() as counter:
            run(new)
        counts.append(counter.count)
    return (counts[1] - counts[0]) / 8


def best_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Elapsed seconds of each function: the best of several repeats, called in turn."""
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def rollouts(model: GPT, tokenizer: Tokenizer, top_k: int, repeats: int) -> Table:
    """A table of the three ways to sample the same rollouts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB_SIZE - 9, length).tolist() for length in rng.integers(100, 151, QUESTIONS)]
    lengths = np.clip(np.exp(rng.normal(4.1, 0.7, (QUESTIONS, SAMPLES))), 20, 256).astype(int)
    requests = [
        (prompts[question], SamplingParams(max_new_tokens=int(lengths[question, sample]), top_k=top_k,
                                           seed=question * SAMPLES + sample, stop_tokens=(), logprobs=True))
        for question in range(QUESTIONS) for sample in range(SAMPLES)
    ]  # fmt: skip
    engine, reference = Engine(model, tokenizer), reference_engine.Engine(model, tokenizer)

    def together() -> None:
        engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])

    def before() -> None:
        rows = [reference._row(tuple(p), each.seed, 0, each.max_new_tokens, (), True) for p, each in requests]
        with reference_engine._for_inference(model):
            for _ in reference._decode(rows, reference_engine.Sampler(1.0, top_k), True):
                pass

    @torch.inference_mode()
    def question_by_question() -> None:
        for prompt, longest in zip(prompts, lengths.max(axis=1).tolist(), strict=True):
            plain_loop(model, prompt, SAMPLES, longest, top_k)

    runs = {"engine": together, "reference engine": before, "question by question": question_by_question}
    seconds = best_seconds(runs, repeats)
    useful = int(lengths.sum())
    table = Table("", "tokens/s", "engine's speed-up", title=f"rollouts, {useful:,} useful tokens")
    for name, elapsed in seconds.items():
        table.add_row(name, f"{useful / elapsed:,.0f}", f"{elapsed / seconds['engine']:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-cache", action="store_true", help="also time one row without a cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--skip-rollouts", action="store_true")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = GPT(config_for_depth(options.depth, VOCAB_SIZE, 256), compute_dtype=getattr(torch, options.dtype))
    model.init_weights(torch.Generator().manual_seed(0))
    # Two-byte ranks fill up the vocabulary; nothing is decoded to text here.
    ranks = [bytes([i]) for i in range(256)] + [bytes(divmod(i, 256)) for i in range(VOCAB_SIZE - 256)]
    tokenizer = Tokenizer({token: rank for rank, token in enumerate(ranks[: VOCAB_SIZE - len(SPECIAL_TOKENS)])})
    prompt = torch.randint(0, VOCAB_SIZE - 9, (options.prompt,), generator=torch.Generator().manual_seed(1)).tolist()

    generator = Engine(model, tokenizer, max_rows=max(options.rows))

    def engine(rows: int, new: int) -> object:
        params = SamplingParams(num_samples=rows, max_new_tokens=new, top_k=options.top_k, stop_tokens=())
        generator.prefixes.clear()
        return generator.generate([prompt], params)

    @torch.inference_mode()
    def plain(rows: int, new: int, cached: bool = True) -> object:
        return plain_loop(model, prompt, rows, new, options.top_k, cached)

    console = Console()
    table = Table(
        "rows", "plain loop, tokens/s", "engine, tokens/s", "engine / plain", title=f"decode, depth {options.depth}"
    )
    for rows in options.rows:
        runs = {"plain": lambda r=rows: plain(r, options.new), "engine": lambda r=rows: engine(r, options.new)}
        seconds = best_seconds(runs, options.repeats)
        rates = {name: rows * options.new / second for name, second in seconds.items()}
        cells = (f"{rates['plain']:,.0f}", f"{rates['engine']:,.0f}", f"{rates['engine'] / rates['plain']:.2f}")
        table.add_row(str(rows), *cells)
    console.print(table)
    if not options.skip_rollouts:
        console.print(rollouts(model, tokenizer, options.top_k, options.repeats))
    if options.without_cache:
        seconds = best_seconds({"": lambda: plain(1, options.new, cached=False)}, 1)
        console.print(f"without a cache, 1 row: {options.new / seconds['']:,.0f} tokens/s")
    console.print(
        f"operators per step, 16 rows: plain {operators_per_step(lambda new: plain(16, new)):.0f}, "
        f"engine {operators_per_step(lambda new: engine(16, new)):.0f}; 1 row: plain "
        f"{operators_per_step(lambda new: plain(1, new)):.0f}, "
        f"engine {operators_per_step(lambda new: engine(1, new)):.0f}"
    )


if __name__ == "__main__":
    main()
