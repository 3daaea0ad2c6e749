"""CORE's examples per second: batched with shared prefixes, compared with one option at a time with all logits.

    python benchmarks/core_eval.py --bundle eval_bundle.zip --examples 8 --threads 1

Times are CPU seconds (user + system) without tokenization, so that other load matters little. The model is random and
of the given depth: its answers do not change the cost.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch

from lmchat.evaluation.core import CoreTask, Example, examples, read_bundle
from lmchat.evaluation.core_scoring import OptionScore, is_correct, score_in_batches
from lmchat.model.gpt import GPT
from lmchat.scaling import config_for_depth
from lmchat.tokenizer.bpe import Tokenizer

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from reference_core import score_plainly

POOL = 200
"""Items of a task among which few-shot examples are chosen."""


def random_net(depth: int, sequence_len: int, vocab_size: int, dtype: torch.dtype) -> GPT:
    """A model with random weights, so that options differ."""
    net = GPT(config_for_depth(depth=depth, vocab_size=vocab_size, sequence_len=sequence_len), compute_dtype=dtype)
    net.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return net.eval()


def cpu_seconds(run: Callable[[], list[list[OptionScore]]]) -> tuple[list[list[OptionScore]], float]:
    """Result of a call, and its CPU seconds."""
    started = time.process_time()
    return run(), time.process_time() - started


def compare(net: GPT, task: CoreTask, found: Sequence[Example]) -> tuple[float, float]:
    """CPU seconds of both methods; prints them and the largest difference."""
    score_in_batches(net, found[:2])
    plain, plain_seconds = cpu_seconds(lambda: score_plainly(net, found))
    batched, seconds = cpu_seconds(lambda: score_in_batches(net, found))
    pairs = [(a, b) for one, other in zip(plain, batched, strict=True) for a, b in zip(one, other, strict=True)]
    difference = max(abs(a.loss - b.loss) for a, b in pairs)
    same = sum(
        is_correct(task.kind, example, one) == is_correct(task.kind, example, other)
        for example, one, other in zip(found, plain, batched, strict=True)
    )
    tokens = sum(len(option) for example in found for option in example.options) / len(found)
    print(
        f"{task.name:33} {len(found[0].options):2} options {tokens:6.0f} tokens   {len(found) / plain_seconds:7.2f} → "
        f"{len(found) / seconds:7.2f} /s  × {plain_seconds / seconds:5.1f}   losses differ by {difference:.1e}, "
        f"{same} of {len(found)} answers equal",
        flush=True,
    )
    return plain_seconds, seconds


def main() -> None:
    """Prints one line per task and the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sequence_len", type=int, default=2048)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.load(options.tokenizer)
    net = random_net(options.depth, options.sequence_len, tokenizer.vocab_size, getattr(torch, options.dtype))
    totals = [0.0, 0.0]
    number = 0
    for task in read_bundle(options.bundle):
        found = list(islice(examples(task, tokenizer, max_items=POOL, max_tokens=len(net.cos)), options.examples))
        number += len(found)
        totals = [total + seconds for total, seconds in zip(totals, compare(net, task, found), strict=True)]
    print(f"all: {number / totals[0]:.2f} → {number / totals[1]:.2f} examples/s, × {totals[0] / totals[1]:.1f}")


if __name__ == "__main__":
    main()
