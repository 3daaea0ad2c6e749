"""CORE: the mean centered accuracy of a base model on 22 tasks (DCLM, Li et al. 2024, arXiv:2406.11794).

Tasks, prompts and baselines are those of nanochat's ``eval_bundle``: ``core.yaml``, ``eval_meta_data.csv`` and
``eval_data/``, in a folder or a zip file.
"""

import csv
import hashlib
import json
import random
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from lmchat.types import UserError, user_errors
from lmchat.yaml_loading import load_yaml

SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234


class PromptTokenizer(Protocol):
    """The part of a tokenizer that CORE uses."""

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every prompt."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""


Kind = Literal["multiple_choice", "schema", "language_modeling"]
Item = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle.

    Attributes:
        kind: how items are rendered and scored.
        path: JSON lines file of the items.
        num_fewshot: number of solved items before each question.
        baseline: accuracy of random answers, 0 … 1.
    """

    name: str
    kind: Kind
    path: Traversable
    num_fewshot: int
    delimiter: str
    baseline: float

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that determines the task's examples and centered accuracy.

        Raises:
            UserError: the file of items cannot be read.
        """
        settings = [self.name, self.kind, self.num_fewshot, self.delimiter, self.baseline]
        return hashlib.sha256(json.dumps(settings).encode() + self._content()).hexdigest()[:16]

    def _content(self) -> bytes:
        with self._readable(OSError, LookupError):
            return self.path.read_bytes()

    def _readable(self, *kinds: type[Exception]) -> AbstractContextManager[None]:
        return user_errors(f"cannot read {self.path}", "unpack the evaluation bundle again", *kinds)

    def items(self, max_items: int | None = None) -> list[Item]:
        """The items in nanochat's order, at most ``max_items``.

        Raises:
            UserError: the file is missing or not JSON lines.
        """
        lines = self._content().split(b"\n")
        with self._readable(ValueError):
            items = [json.loads(line) for line in lines if line.strip()]
        random.Random(SHUFFLE_SEED).shuffle(items)
        return items[:max_items]


@dataclass(frozen=True)
class Example:
    """An item as token ids.

    Attributes:
        options: token ids of each option, ``<|bos|>`` first. A language modelling item has one option.
        spans: start and end (exclusive) of the scored tokens of each option.
        gold: index of the correct option.
        cut: whether scored tokens were cut off, because the context is too short.
    """

    options: list[list[int]]
    spans: list[tuple[int, int]]
    gold: int
    cut: bool = False


def read_bundle(path: Path) -> list[CoreTask]:
    """The tasks of an evaluation bundle, a folder or zip file, in its order.

    Raises:
        UserError: a file is missing or malformed.
    """
    if not path.exists():
        raise UserError(f"there is no evaluation bundle at {path}; get it with lmchat data download --eval_bundle true")
    try:
        folder: Traversable = zipfile.Path(path) / "eval_bundle" if path.suffix == ".zip" else path
        config, table = folder / "core.yaml", folder / "eval_meta_data.csv"
        rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        tasks = [
            CoreTask(
                name=task["label"],
                kind=task["icl_task_type"],
                path=folder / "eval_data" / task["dataset_uri"],
                num_fewshot=int(task["num_fewshot"][0]),
                delimiter=task.get("continuation_delimiter", " "),
                baseline=baselines[task["label"]],
            )
            for task in load_yaml(config.read_text(encoding="utf-8"))["icl_tasks"]
        ]
        for task in tasks:
            if not 0 <= task.baseline < 1 or not task.name.isprintable():
                raise ValueError(f"task {task.name!r} has the random baseline {task.baseline:.0%}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not an evaluation bundle ({type(error).__name__}: {error}); give a folder or zip file "
            "with core.yaml, eval_meta_data.csv and eval_data/"
        ) from error
    return tasks


def choose(tasks: Sequence[CoreTask], names: Sequence[str] | None) -> list[CoreTask]:
    """The tasks with the given names; None is all. Raises UserError for an unknown name."""
    known = {task.name: task for task in tasks}
    for name in names or ():
        if name not in known:
            raise UserError(f"there is no CORE task {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(tasks)


def fewshot_indices(index: int, num_items: int, num_fewshot: int) -> list[int]:
    """Indices of the items used as solved examples for item ``index``; deterministic."""
    others = [other for other in range(num_items) if other != index]
    return random.Random(FEWSHOT_SEED + index).sample(others, min(num_fewshot, len(others)))


def render_prompts(kind: Kind, item: Item, fewshot: Sequence[Item], delimiter: str) -> list[str]:
    """The prompts of an item: one per option, or for language modelling without and with the continuation."""
    before = ""
    for example in fewshot:
        gold = -1 if kind == "language_modeling" else example["gold"]
        before += render_prompts(kind, example, (), delimiter)[gold] + "\n\n"
    if kind == "multiple_choice":
        return [f"{before}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if kind == "schema":
        return [f"{before}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    context = f"{before}{item['context'].strip()}{delimiter}"
    return [context.strip(), context + item["continuation"]]


def make_example(
    kind: Kind, prompts: Sequence[str], gold: int, tokenizer: PromptTokenizer, max_tokens: int | None = None
) -> Example:
    """Token ids and scored spans of rendered prompts.

    Multiple choice scores the tokens after the common prefix of the options, schema the common suffix, language
    modelling the continuation. Options longer than ``max_tokens`` are cut at the beginning.
    """
    options = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if kind == "schema":
        length = common_prefix([option[::-1] for option in options])
        spans = [(len(option) - length, len(option)) for option in options]
    else:
        start = common_prefix(options)
        options = options if kind == "multiple_choice" else options[1:]
        spans = [(start, len(option)) for option in options]
    return cut_example(options, spans, gold, max_tokens or sys.maxsize)


def cut_example(options: list[list[int]], spans: list[tuple[int, int]], gold: int, max_tokens: int) -> Example:
    """An example whose options are cut to ``max_tokens`` at the beginning."""
    removed = [max(0, len(option) - max_tokens) for option in options]
    return Example(
        [option[less:] for option, less in zip(options, removed, strict=True)],
        [(max(1, start - less), end - less) for (start, end), less in zip(spans, removed, strict=True)],
        gold,
        cut=any(start - less < 1 for (start, _), less in zip(spans, removed, strict=True)),
    )


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({sequence[i] for sequence in sequences}) > 1), shortest)


def examples(
    task: CoreTask,
    tokenizer: PromptTokenizer,
    *,
    max_items: int | None = None,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Example]:
    """Yields one rank's examples: rank r of W has items r, r + W, … of the task.

    Raises:
        UserError: the task's file cannot be read, or an item lacks a field.
    """
    items, problem = task.items(max_items), f"{task.path}: an item is not valid for a {task.kind} task"
    for index in range(rank, len(items), world_size):
        item = items[index]
        with user_errors(problem, "correct or remove it", LookupError, TypeError, AttributeError):
            fewshot = [items[other] for other in fewshot_indices(index, len(items), task.num_fewshot)]
            prompts = render_prompts(task.kind, item, fewshot, task.delimiter)
            gold = 0 if task.kind == "language_modeling" else int(item["gold"])
        yield make_example(task.kind, prompts, gold, tokenizer, max_tokens)
