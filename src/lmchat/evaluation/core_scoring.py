"""Scores of CORE examples: the loss of each option's tokens, and whether greedy decoding gives them.

Examples of similar length are read together. The beginning that the options of an example share is read once, and the
head is applied to scored positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from lmchat.evaluation.core import CoreTask, Example, Kind, common_prefix, examples
from lmchat.model.gpt import GPT
from lmchat.model.kv_cache import KVCache
from lmchat.progress import ProgressBar
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

LogitsOf = Callable[[Tensor], Tensor]
"""Logits (B, T, vocabulary) of ids (B, T) int64, in which padding follows the tokens."""

MIN_SHARED_TOKENS = 16
MAX_BATCH_TOKENS = 1 << 14
CHUNK_EXAMPLES = 512
"""Examples held as token ids at a time, and sorted by length."""


@dataclass(frozen=True)
class OptionScore:
    """Score of an option's tokens.

    Attributes:
        loss: mean cross-entropy, in nats.
        greedy: whether every token is the most likely one.
    """

    loss: float
    greedy: bool


@dataclass(frozen=True)
class CoreResult:
    """Result of a task.

    Attributes:
        questions: number of examples.
        correct: number of correct ones.
        cut: number of examples whose scored tokens did not fit into the context as a whole.
    """

    questions: int
    correct: int
    cut: int


def is_correct(kind: Kind, example: Example, scores: Sequence[OptionScore]) -> bool:
    """Whether the gold option has the lowest mean loss (the first minimum), or the continuation is decoded greedily."""
    if kind == "language_modeling":
        return scores[0].greedy
    losses = [score.loss for score in scores]
    return losses.index(min(losses)) == example.gold


def evaluate_core_task(
    net: GPT, tokenizer: Tokenizer, task: CoreTask, max_items: int | None = None, max_tokens: int | None = None
) -> CoreResult:
    """Evaluates a network on a task in this process.

    Args:
        net: the network.
        tokenizer: the tokenizer it was trained with.
        task: the task.
        max_items: maximum number of items.
        max_tokens: longest prompt, see `make_example`; default is the network's limit.

    Raises:
        UserError: the task's file cannot be read, or there is nothing in it.
    """
    limit = len(net.cos)
    found = examples(task, tokenizer, max_items=max_items, max_tokens=min(max_tokens or limit, limit))
    correct = number = cut = 0
    with ProgressBar(task.name, unit="examples") as progress:
        while chunk := list(islice(found, CHUNK_EXAMPLES)):
            for example, scores in zip(chunk, score(net, chunk), strict=True):
                correct += is_correct(task.kind, example, scores)
                cut += example.cut
            number += len(chunk)
            progress.advance(len(chunk))
    if not number:
        raise UserError(f"{task.path} has no items; unpack the evaluation bundle again")
    return CoreResult(number, correct, cut)


@torch.inference_mode()
def score_plainly(logits_of: LogitsOf, questions: Sequence[Example]) -> list[list[OptionScore]]:
    """Scores of each example's options, one option at a time. Works with any causal model."""
    results = []
    for example in questions:
        scores = []
        for option, (start, end) in zip(example.options, example.spans, strict=True):
            logits = logits_of(torch.tensor([option]))[0, start - 1 : end - 1]
            scores += _scores(logits, [option[start:end]])
        results.append(scores)
    return results


@torch.inference_mode()
def score(net: GPT, questions: Sequence[Example], max_batch_tokens: int = MAX_BATCH_TOKENS) -> list[list[OptionScore]]:
    """Scores of each example's options, equal to those of `score_plainly` up to the order of summation.

    Options with equal tokens get equal scores.

    Args:
        net: the network; its mode and weights stay as they are.
        questions: the questions, in any order.
        max_batch_tokens: maximum number of tokens read together, padding included.
    """
    found: dict[int, list[OptionScore]] = {}
    for batch in _batches(questions, max_batch_tokens):
        chosen = [questions[index] for index in batch]
        found.update(zip(batch, _score_batch(net, chosen), strict=True))
    return [found[index] for index in range(len(questions))]


def _batches(questions: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Indices of questions of similar length."""
    batch: list[int] = []
    rows = 0
    for index in sorted(range(len(questions)), key=lambda index: -max(map(len, questions[index].options))):
        longest = max(map(len, questions[(batch or [index])[0]].options))
        rows += len(questions[index].options)
        if batch and rows * longest > max_tokens:
            yield batch
            batch, rows = [], len(questions[index].options)
        batch.append(index)
    if batch:
        yield batch


def _score_batch(net: GPT, questions: Sequence[Example]) -> list[list[OptionScore]]:
    shared = [_shared_tokens(example) for example in questions]
    rows = [  # each distinct option once
        (number, option, span)
        for number, example in enumerate(questions)
        for option, span in dict(zip(map(tuple, example.options), example.spans, strict=True)).items()
    ]
    cache = None
    if all(shared):
        prefixes = [example.options[0][:length] for example, length in zip(questions, shared, strict=True)]
        longest = max(len(option) - shared[number] for number, option, _ in rows)
        cache = _read_prefixes(net, prefixes, [number for number, _, _ in rows], longest)
    skipped = [shared[number] if cache is not None else 0 for number, _, _ in rows]
    ids = _padded([option[skip:] for (_, option, _), skip in zip(rows, skipped, strict=True)])
    hidden = net.hidden(ids.to(net.device), cache)
    picked = [
        row_hidden[start - 1 - skip : end - 1 - skip]
        for row_hidden, (_, _, (start, end)), skip in zip(hidden, rows, skipped, strict=True)
    ]
    scores = _scores(net.logits(torch.cat(picked)), [option[start:end] for _, option, (start, end) in rows])
    by_option = {(number, option): score for (number, option, _), score in zip(rows, scores, strict=True)}
    return [
        [by_option[number, tuple(option)] for option in example.options] for number, example in enumerate(questions)
    ]


def _read_prefixes(net: GPT, prefixes: Sequence[Sequence[int]], rows: Sequence[int], room: int) -> KVCache:
    """A cache whose row r holds prefix ``rows[r]`` and has room for ``room`` more tokens; each prefix is read once."""
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    longest = int(lengths.max())
    read = KVCache(net.config, len(prefixes), longest, net.compute_dtype, net.device)
    net.hidden(_padded(prefixes).to(net.device), read)
    cache = KVCache(net.config, len(rows), longest + room, net.compute_dtype, net.device)
    index = torch.tensor(rows, device=net.device)
    cache.keys[:, :, :, :longest] = read.keys[:, index]
    cache.values[:, :, :, :longest] = read.values[:, index]
    cache.lengths = lengths[list(rows)]
    return cache


def _shared_tokens(example: Example) -> int:
    """Tokens at the beginning of all options that are worth reading once; at least one token before the span is not."""
    if len(example.options) < 2:
        return 0
    shared = min(common_prefix(example.options), *(start for start, _ in example.spans)) - 1
    return shared if shared >= MIN_SHARED_TOKENS else 0


def _scores(logits: Tensor, targets: Sequence[Sequence[int]]) -> list[OptionScore]:
    """Scores of consecutive rows of logits (tokens, vocabulary) for the tokens of each option."""
    lengths = [len(tokens) for tokens in targets]
    flat = torch.tensor([token for tokens in targets for token in tokens], device=logits.device)
    losses = F.cross_entropy(logits.float(), flat, reduction="none").cpu().split(lengths)
    greedy = (logits.argmax(dim=-1) == flat).cpu().split(lengths)
    return [OptionScore(float(loss.mean()), bool(hits.all())) for loss, hits in zip(losses, greedy, strict=True)]


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for ids, row in zip(padded, rows, strict=True):
        ids[: len(row)] = torch.tensor(row)
    return padded
