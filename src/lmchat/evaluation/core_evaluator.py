"""CORE as an `Evaluator`: in training, in ``lmchat validate`` and in ``lmchat eval``."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from lmchat.evaluation.benchmark import Benchmark
from lmchat.evaluation.core import CoreTask, Example, PromptTokenizer, examples
from lmchat.evaluation.core_scoring import batches_by_length, is_correct, max_batch_tokens, score
from lmchat.evaluation.hf_model import HFModel
from lmchat.evaluation.results import Result

CHUNK_EXAMPLES = 512
"""Number of examples that are tokenized together and sorted by length."""


class CoreEvaluator(Benchmark):
    """Centered accuracy of each task as ``core/TASK``, and their mean as ``core``.

    Args:
        max_per_task: maximum number of examples of a task.
        max_tokens: maximum length of a prompt; longer ones are cut at the beginning.
        every_n_steps, device: see `Benchmark`.
    """

    name = "core"
    mean_name = "CORE"
    metric = "centered"
    has_cut = True

    def __init__(
        self,
        tasks: Sequence[CoreTask],
        tokenizer: PromptTokenizer,
        *,
        max_tokens: int,
        max_per_task: int | None = None,
        every_n_steps: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__({task.name: task.baseline for task in tasks}, every_n_steps, device)
        self.tasks = list(tasks)
        self.tokenizer = tokenizer
        self.max_per_task = max_per_task
        self.max_tokens = max_tokens

    def task_batches(self, number: int, rank: int, world_size: int) -> Iterator[list[Example]]:
        found = examples(
            self.tasks[number],
            self.tokenizer,
            max_items=self.max_per_task,
            max_tokens=self.max_tokens,
            rank=rank,
            world_size=world_size,
        )
        while chunk := list(islice(found, CHUNK_EXAMPLES)):
            for batch in batches_by_length(chunk, max_batch_tokens(self.device)):
                yield [chunk[index] for index in batch]

    def score_batch(self, policy: Any, number: int, examples: Sequence[Example]) -> tuple[int, int]:
        kind = self.tasks[number].kind
        scores = policy.score(examples) if isinstance(policy, HFModel) else score(policy.net, examples)
        correct = sum(is_correct(kind, *pair) for pair in zip(examples, scores, strict=True))
        return correct, sum(example.cut for example in examples)

    def settings(self, number: int) -> Result:
        return {
            "limit": self.max_per_task,
            "max_tokens": self.max_tokens,
            "data": self.tasks[number].fingerprint,
        }
