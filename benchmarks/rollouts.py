"""Rollouts on a GPU: sampled tokens/s of the engine, compared with the bound by memory bandwidth.

    python benchmarks/rollouts.py [--depth 20] [--questions 16] [--samples 16] [--toy]

All groups decode together, as in reinforcement learning: first with answers of equal length, then with a long tail of
lengths between 20 and --new tokens. A decode step reads all weights but the embeddings once, and the keys and values of
every sequence; the bound is what the card's bandwidth allows for that. Captures and warm-up are not timed. --toy runs
depth 2 on any device, in seconds. Needs no network, no tokenizer and no data. Never run on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.gpt import GPT
from lmchat.scaling import config_for_depth
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

BANDWIDTH = {"H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "B200": 8.0e12, "4090": 1.01e12}
"""Memory bandwidth in bytes/s by words of the card's name, from the vendors' data sheets; more specific names first."""


def random_engine(depth: int, vocab_size: int, sequence_len: int, rows: int, device: torch.device) -> Engine:
    """An engine on a network with random weights, bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = GPT(config_for_depth(depth, vocab_size, sequence_len), compute_dtype=dtype).to(device)
    net.init_weights(torch.Generator(device).manual_seed(0))
    ranks = [bytes([i]) for i in range(256)] + [bytes(divmod(i, 256)) for i in range(vocab_size - 256)]
    tokens = ranks[: vocab_size - len(SPECIAL_TOKENS)]
    return Engine(net, Tokenizer({token: rank for rank, token in enumerate(tokens)}), max_rows=rows)


def roofline(engine: Engine, prompt: float, new: float, rows: float) -> float | None:
    """Tokens/s at which reading weights, keys and values takes all of the bandwidth; None for an unknown card."""
    name = torch.cuda.get_device_name() if engine.runner.device.type == "cuda" else ""
    bandwidth = next((value for words, value in BANDWIDTH.items() if words in name), None)
    if bandwidth is None:
        return None
    net, layout = engine.runner.net, engine.runner.layout
    embeddings = sum(p.numel() for n, p in net.named_parameters() if "wte" in n or "value_embeds" in n)
    weights = (sum(p.numel() for p in net.parameters()) - embeddings) * 2
    context = prompt + new / 2
    columns = sum(min(context, window) for window in layout.config.window_sizes)
    cache = 2 * columns * layout.config.n_kv_head * layout.config.head_dim * layout.dtype.itemsize
    return rows * bandwidth / (weights + rows * cache)


def measure(engine: Engine, prompts: list[list[int]], lengths: np.ndarray, top_k: int) -> float:
    """Sampled tokens/s of one request per entry of ``lengths`` (questions, samples); the second run counts."""
    requests = [
        (prompt, SamplingParams(max_new_tokens=int(length), top_k=top_k, seed=number, stop_tokens=(), logprobs=True))
        for prompt, row in zip(prompts, lengths, strict=True)
        for number, length in enumerate(row)
    ]
    seconds = 0.0
    for _ in range(2):
        engine.prefixes.clear()
        if engine.runner.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        engine.generate([prompt for prompt, _ in requests], [params for _, params in requests])
        seconds = time.perf_counter() - started
    return float(lengths.sum()) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--toy", action="store_true", help="depth 2, 4 × 4 sequences of 32 tokens, vocabulary 1,024")
    options = parser.parse_args()
    if options.toy:
        options.depth, options.questions, options.samples, options.new, options.vocab = 2, 4, 4, 32, 1024
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = options.questions * options.samples
    engine = random_engine(options.depth, options.vocab, 2048, rows, device)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, options.vocab - 9, (options.questions, options.prompt)).tolist()
    shape = (options.questions, options.samples)
    workloads = {
        "equal lengths": np.full(shape, options.new),
        "long tail": np.clip(np.exp(rng.normal(4.1, 0.7, shape)), 20, options.new).astype(int),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table("answers", "tokens/s", "bound", "share", title=f"{name}, depth {options.depth}, {rows} sequences")
    results = {"device": name, "torch": torch.__version__, "depth": options.depth, "sequences": rows}
    for workload, lengths in workloads.items():
        rate = measure(engine, prompts, lengths, options.top_k)
        # With a long tail, fewer sequences share a step: on average, the number of tokens per step.
        bound = roofline(engine, options.prompt, float(lengths.mean()), lengths.sum() / lengths.max())
        table.add_row(
            workload, f"{rate:,.0f}", f"{bound:,.0f}" if bound else "", f"{rate / bound:.0%}" if bound else ""
        )
        results[workload] = {"tokens_per_second": round(rate), "bound": bound and round(bound)}
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
