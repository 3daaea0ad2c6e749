"""Runs a request on the engine and collects its answers, streamed or not."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from lmchat.generation.sampling import SamplingParams
from lmchat.serve.answers import Answer, Delta, Token
from lmchat.serve.engine_worker import EngineWorker, Generation
from lmchat.serve.metrics import Metrics


@dataclass(frozen=True)
class Plan:
    """A request to the engine.

    Attributes:
        params: sampling parameters; None if nothing is generated.
        num_samples: number of completions per prompt.
        chat: see `Answer`.
        echo: return the prompts too.
        top_logprobs: number of most likely tokens to return at each position; None for no log-probabilities.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams | None
    num_samples: int = 1
    stops: Sequence[str] = ()
    chat: bool = False
    echo: bool = False
    top_logprobs: int | None = None


class Run:
    """A running request.

    Attributes:
        answers: the completions, samples of the first prompt first.
        prompt_tokens: the tokens of each prompt with log-probabilities; only if the plan wants both.
    """

    def __init__(self, worker: EngineWorker, plan: Plan, metrics: Metrics) -> None:
        tokenizer = worker.engine.tokenizer
        count = len(plan.prompts) * plan.num_samples
        self.plan = plan
        self.answers = [Answer(tokenizer, plan.stops, chat=plan.chat) for _ in range(count)]
        self.prompt_tokens: list[list[Token]] = []
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

    async def start(self) -> None:
        """Queues the prompts in the engine, and scores them if requested.

        Raises:
            UserError: the engine refuses one.
        """
        self._metrics.prompt_tokens.inc(self.num_prompt_tokens)
        if self.plan.params is not None:
            self._generation = await self._worker.generate(self.plan.prompts, self.plan.params)
        if self.plan.echo and self.plan.top_logprobs is not None:
            for prompt in self.plan.prompts:
                scores = await self._worker.score(prompt, self.plan.top_logprobs)
                scored = map(Token, prompt[1:], scores.logprobs, scores.top)
                self.prompt_tokens.append([Token(prompt[0], None), *scored])

    async def deltas(self) -> AsyncIterator[dict[int, Delta]]:
        """Yields additions to the answers, by number of the answer, as they are generated."""
        if self._generation is None:
            for answer in self.answers:
                answer.whole.finish_reason = "length"
            yield {number: answer.whole for number, answer in enumerate(self.answers)}
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
        """Waits for the complete answers."""
        async for _ in self.deltas():
            pass

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
