"""Runs a request on the engine and collects its answers, streamed or not."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from lmchat.generation.sampling import SamplingParams
from lmchat.serve.answers import Answer, Delta, Token, text_offsets
from lmchat.serve.engine_worker import EngineWorker, Generation
from lmchat.serve.metrics import Metrics


@dataclass(frozen=True)
class Plan:
    """A request to the engine.

    Attributes:
        params: sampling parameters; None if nothing is generated.
        num_samples: number of completions per prompt.
        chat: see `Answer`.
        echo: for each prompt its last tokens, which precede the answers; None for none.
        top_logprobs: number of most likely tokens to return at each position; None for no log-probabilities.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams | None
    num_samples: int = 1
    stops: Sequence[str] = ()
    chat: bool = False
    echo: Sequence[Sequence[int]] | None = None
    top_logprobs: int | None = None


class Run:
    """A running request.

    Attributes:
        answers: the completions, samples of the first prompt first.
        echoes: the text of the echo of each prompt, and its tokens if the plan wants log-probabilities.
    """

    def __init__(self, worker: EngineWorker, plan: Plan, metrics: Metrics) -> None:
        tokenizer = worker.engine.tokenizer
        self.plan = plan
        self.echoes = [Delta() for _ in plan.prompts]
        for echo, ids in zip(self.echoes, plan.echo or (), strict=False):
            if ids:
                echo.parts.append({"type": "text", "text": tokenizer.decode(ids)})
        self.answers = [
            Answer(tokenizer, plan.stops, chat=plan.chat, start=len(echo.text))
            for echo in self.echoes
            for _ in range(plan.num_samples)
        ]
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

    def echo_of(self, number: int) -> Delta:
        """The echo before an answer."""
        return self.echoes[number // self.plan.num_samples]

    async def start(self) -> None:
        """Queues the prompts in the engine, and scores them if requested.

        Raises:
            UserError: the engine refuses one.
        """
        self._metrics.prompt_tokens.inc(self.num_prompt_tokens)
        if self.plan.params is not None:
            self._generation = await self._worker.generate(self.plan.prompts, self.plan.params)
        if self.plan.echo is not None and self.plan.top_logprobs is not None:
            for prompt, ids, echo in zip(self.plan.prompts, self.plan.echo, self.echoes, strict=True):
                score = partial(self._worker.engine.score, prompt, self.plan.top_logprobs)
                logprobs, top = await self._worker.call(score)
                columns = (prompt, (None, *logprobs), ((), *top))
                offsets = text_offsets(self._worker.engine.tokenizer, ids)
                echo.tokens += map(Token, *(column[len(prompt) - len(ids) :] for column in columns), offsets)

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
