"""Scores CORE examples: the loss of each option's tokens, and whether greedy decoding produces them.

Examples of similar length are batched, see `lmchat.evaluation.prompt_trees`. The output head runs only at scored
positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmchat.evaluation.core import Example, Kind
from lmchat.evaluation.prompt_trees import PackedTrees, PromptTree
from lmchat.model.gpt import GPT

MAX_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Tokens per batch; larger batches do not fit into a CPU's caches."""
LOGITS_CHUNK = {"cpu": 1 << 6, "cuda": 1 << 11}
"""Tokens whose logits are computed together, likewise; on a GPU they take 0.9 GB with a vocabulary of 32,768."""


def max_batch_tokens(device: torch.device) -> int:
    return MAX_BATCH_TOKENS["cpu" if device.type == "cpu" else "cuda"]


@dataclass(frozen=True)
class OptionScore:
    """Mean cross-entropy of an option's tokens, in nats, and whether every token is the most likely one."""

    loss: float
    greedy: bool


def is_correct(kind: Kind, example: Example, scores: Sequence[OptionScore]) -> bool:
    """Whether the gold option has the lowest mean loss (the first minimum), or the continuation is decoded greedily."""
    if kind == "language_modeling":
        return scores[0].greedy
    losses = [score.loss for score in scores]
    return losses.index(min(losses)) == example.gold


@torch.inference_mode()
def score(net: GPT, questions: Sequence[Example]) -> list[list[OptionScore]]:
    """Scores the options of a batch of examples; equals scoring one at a time, up to the order of summation.

    Options with equal tokens get equal scores. Mode and weights of the network do not change.
    """
    trees = [PromptTree.of(example) for example in questions]
    packed = PackedTrees(trees, net.device, net.config.n_layer)
    hidden = net.hidden(packed.ids, packed, only=packed.predicting)[0, packed.order]
    scores = iter(scores_of(hidden, [target for tree in trees for target in tree.targets], net.logits))
    results = []
    for tree in trees:
        by_branch = [next(scores) for _ in tree.branches]
        results.append([by_branch[branch] for branch in tree.option_branch])
    return results


def score_in_batches(net: GPT, questions: Sequence[Example]) -> list[list[OptionScore]]:
    """`score` of any number of examples, in batches of similar length; results are in the order of the examples."""
    scores: dict[int, list[OptionScore]] = {}
    for batch in batches_by_length(questions, max_batch_tokens(net.device)):
        scores.update(zip(batch, score(net, [questions[index] for index in batch]), strict=True))
    return [scores[index] for index in range(len(questions))]


def batches_by_length(questions: Sequence[Example], max_tokens: int) -> Iterator[list[int]]:
    """Yields batches of indices of examples of similar length, with at most ``max_tokens`` tokens or one example."""
    trees = [PromptTree.of(example) for example in questions]
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(trees)), key=lambda index: -len(trees[index].prefix)):
        if batch and tokens + trees[index].num_tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += trees[index].num_tokens
    if batch:
        yield batch


def scores_of(hidden: Tensor, targets: Sequence[Sequence[int]], head: Callable[[Tensor], Tensor]) -> list[OptionScore]:
    """Scores of options.

    Args:
        hidden: (tokens, ...), states that predict the tokens of all options, one option after another.
        targets: tokens of each option.
        head: gives the logits of some states, since the logits of all would leave a CPU's caches.
    """
    flat = torch.tensor([token for tokens in targets for token in tokens], device=hidden.device)
    losses, hits = [], []
    chunk = LOGITS_CHUNK["cpu" if hidden.device.type == "cpu" else "cuda"]
    for rows, tokens in zip(hidden.split(chunk), flat.split(chunk), strict=True):
        logits = head(rows)
        losses.append(F.cross_entropy(logits, tokens, reduction="none"))
        hits.append(logits.argmax(dim=-1) == tokens)
    lengths = [len(tokens) for tokens in targets]
    pairs = zip(torch.cat(losses).cpu().split(lengths), torch.cat(hits).cpu().split(lengths), strict=True)
    return [OptionScore(float(loss.mean()), bool(hit.all())) for loss, hit in pairs]
