"""Accuracy on a task: one greedy answer per question, or for multiple choice the most likely letter."""

import math
from collections.abc import Iterator, Sequence

from lmchat.evaluation.evaluator import Counts, Evaluator, Metrics
from lmchat.evaluation.intervals import wilson_interval
from lmchat.evaluation.sandbox import Sandbox
from lmchat.generation.engine import Engine
from lmchat.generation.policy import Policy
from lmchat.generation.sampling import SamplingParams
from lmchat.tasks.base import GradedByTests, MultipleChoice, Task, graded
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Conversation


class ChatTaskEvaluator(Evaluator):
    """Accuracy on a task that grades answers; the metric has the task's name.

    ``batch_size`` questions are answered together.
    """

    def __init__(self, task: Task, batch_size: int, max_new_tokens: int) -> None:
        self.task = task
        self.name = task.name
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self._counts = Counts(2)  # questions, correct

    def batches(self, rank: int, world_size: int) -> Iterator[list[Conversation]]:
        return question_batches(self.task, self.batch_size, rank, world_size)

    def update(self, policy: Policy, batch: list[Conversation]) -> None:
        self._counts.to(policy.net.device)  # first: NCCL cannot reduce a failed rank's on a CPU
        correct = grade(policy.engine, self.task, batch, max_new_tokens=self.max_new_tokens)
        self._counts.update([len(correct), sum(correct)])

    def compute(self) -> Metrics:
        questions, correct = self._counts.pop()
        self.intervals = {self.name: wilson_interval(correct, questions)}
        return {self.name: correct / questions if questions else math.nan}


def question_batches(task: Task, batch_size: int, rank: int, world_size: int) -> Iterator[list[Conversation]]:
    """Yields one rank's questions in batches: rank r of W has questions r, r + W, … of the task.

    A rank without questions gets one empty batch, since metrics are reduced over all ranks.
    """
    own = range(rank, len(task), world_size)
    for start in range(0, max(1, len(own)), batch_size):
        yield [task[index] for index in own[start : start + batch_size]]


def grade(
    engine: Engine,
    task: Task,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 256,
    sandbox: Sandbox | None = None,
) -> list[bool]:
    """Whether each question is answered correctly.

    Multiple choice is answered by the most likely letter, everything else greedily. Programs are tested in ``sandbox``,
    by default one that refuses to run where a protection is missing.
    """
    grader = task if isinstance(task, GradedByTests) else graded(task)
    if isinstance(grader, MultipleChoice):
        answers = _most_likely_letters(engine, grader, conversations)
    else:
        greedy = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
        answers = [answer for (answer,) in sampled_answers(engine, conversations, greedy)]
    pairs = list(zip(conversations, answers, strict=True))
    if isinstance(grader, GradedByTests):
        checks = [grader.code_check(*pair) for pair in pairs]
        return [verdict.passed for verdict in (sandbox or Sandbox()).run(checks)]
    return [grader.evaluate(*pair) for pair in pairs]


def sampled_answers(engine: Engine, conversations: Sequence[Conversation], params: SamplingParams) -> list[list[str]]:
    """Texts of the ``num_samples`` answers to each question."""
    prompts = [render_for_completion(engine.tokenizer, conversation) for conversation in conversations]
    samples = engine.generate(prompts, params)
    return [[engine.tokenizer.decode(completion.content) for completion in group] for group in samples]


def _most_likely_letters(engine: Engine, grader: MultipleChoice, conversations: Sequence[Conversation]) -> list[str]:
    if not conversations:
        return []
    tokenizer = engine.tokenizer
    prompts = [render_for_completion(tokenizer, conversation) for conversation in conversations]
    answers = []
    for conversation, logits in zip(conversations, engine.next_logits(prompts).cpu(), strict=True):
        letters = grader.letters(conversation)
        scores = logits[[tokenizer.encode(letter)[0] for letter in letters]]
        answers.append(letters[int(scores.argmax())])
    return answers
