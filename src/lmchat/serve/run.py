"""Runs a request on the engine and collects its answers, streamed or not."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from lmchat.generation.engine import TokenScores
from lmchat.generation.sampling import SamplingParams
from lmchat.serve.answers import Answer, Delta
from lmchat.serve.engine_worker import EngineWorker, Generation
from lmchat.serve.metrics import Metrics


@dataclass(frozen=True)
class Plan:
    """A request to the engine.

    Attributes:
        params: sampling parameters; None if nothing is generated, only prompts are scored.
        num_samples: number of completions per prompt.
        chat: see `Answer`.
        echo: include scores of the prompts.
        top_logprobs: number of most likely tokens to return at each position; None for no log-probabilities.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams | None
    num_samples: int = 1
    stops: Sequence[str] = ()
    chat: bool = False
    echo: bool = False
    top_logprobs: int | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether it needs log-probabilities that sampling does not provide: of prompts, or of other tokens."""
        return self.top_logprobs is not None and (self.echo or self.top_logprobs > 0)


class Run:
    """A running request.

    Attributes:
        answers: the completions, samples of the first prompt first.
        scores: log-probabilities of prompt and completion, for each completion; only if the plan needs them.
    """

    def __init__(self, worker: EngineWorker, plan: Plan, metrics: Metrics) -> None:
        tokenizer = worker.engine.tokenizer
        count = len(plan.prompts) * plan.num_samples
        self.plan = plan
        self.answers = [Answer(tokenizer, plan.stops, chat=plan.chat) for _ in range(count)]
        self.scores: list[TokenScores] = []
        self._worker = worker
        self._metrics = metrics
        self._generation: Generation | None = None
        self._started = time.perf_counter()
        self._first = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.plan.prompts))

    @property
    def num_generated_tokens(self) -> int:
        return sum(answer.num_tokens for answer in self.answers)

    def prompt_of(self, number: int) -> Sequence[int]:
        return self.plan.prompts[number // self.plan.num_samples]

    async def start(self) -> None:
        """Queues the prompts in the engine.

        Raises:
            UserError: the engine refuses one.
        """
        self._metrics.prompt_tokens.inc(self.num_prompt_tokens)
        if self.plan.params is not None:
            self._generation = await self._worker.generate(self.plan.prompts, self.plan.params)

    async def deltas(self) -> AsyncIterator[dict[int, Delta]]:
        """Yields additions to the answers, by number of the answer, as they are generated."""
        if self._generation is None:
            for answer in self.answers:
                answer.whole.finish_reason = "length"
            return
        async for batch in self._generation:
            self._first = self._first or time.perf_counter()
            gained: dict[int, Delta] = {}
            for number, event in batch:
                answer = self.answers[number]
                if not answer.done:
                    gained.setdefault(number, Delta()).add(answer.take(event))
                    if answer.done:
                        self._generation.cancel(number)
            yield gained

    async def finish(self) -> None:
        """Waits for the complete answers, and scores them if needed."""
        async for _ in self.deltas():
            pass
        if not self.plan.needs_scores:
            return
        for number, answer in enumerate(self.answers):
            ids = [*self.prompt_of(number), *(token.id for token in answer.whole.tokens)]
            self.scores.append(await self._worker.score(ids, self.plan.top_logprobs or 0))

    def close(self) -> None:
        """Cancels unfinished completions and records the metrics."""
        if self._generation is not None:
            self._generation.close()
        metrics, now = self._metrics, time.perf_counter()
        metrics.generated_tokens.inc(self.num_generated_tokens)
        metrics.duration.observe(now - self._started)
        if self._first:
            metrics.first_token.observe(self._first - self._started)
            longest = max(answer.num_tokens for answer in self.answers)
            if longest > 1:
                metrics.token_interval.observe((now - self._first) / (longest - 1))
