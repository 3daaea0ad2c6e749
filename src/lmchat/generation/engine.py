"""The engine: completions of many prompts with continuous batching, prompts shared and reused, and a calculator."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lmchat.generation.kv_pool import MemoryBudget
from lmchat.generation.prefix_cache import PrefixCache
from lmchat.generation.runner import Runner
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.scheduler import PREFILL_TOKENS, Scheduler
from lmchat.generation.sequence import Completion, Sequence, StreamedToken, TokenStream
from lmchat.model.gpt import GPT, ROTARY_ROWS
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError

FinishReason = Literal["stop", "length"]

NOT_FINITE = "the model's logits are not finite; its training diverged or its checkpoint is damaged"


class TokenScores(NamedTuple):
    """Log-probabilities of a text under the model's full distribution.

    Attributes:
        logprobs: of each token from the second on.
        top: the most likely tokens at the same places, each (token id, log-probability), the likeliest first.
    """

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class TokenEvent:
    """A token that `Engine.step` has generated.

    Attributes:
        request: id of the request.
        sample: number of the completion among the request's samples.
        token: token id.
        forced: whether it is calculator output instead of a sampled token.
        logprob: log-probability before temperature, top-k and top-p; None unless asked for, or where forced.
        finish_reason: "stop" if the token is a stop token, "length" if it is the last that is allowed, else None.
    """

    request: int
    sample: int
    token: int
    forced: bool
    logprob: float | None
    finish_reason: FinishReason | None


class Engine:
    """Generates with a network and its tokenizer.

    Requests enter and leave a running batch. `generate` and `stream` are made of `add_request`, `step` and `cancel`,
    which a server calls itself; all of them from one thread. What a request yields depends on its prompt and sampling
    parameters, not on what else runs.

    The engine has inference weights of its own; the network it is made of is only read, and its mode, parameters and
    gradients stay as they are. After the network has been trained on, `refresh` takes over its weights.

    Args:
        net: the network.
        tokenizer: the tokenizer it was trained with.
        max_rows: maximum number of sequences decoded together.
        max_bytes: memory for keys and values; None is half of what is free when the engine first needs some.

    Raises:
        UserError: network and tokenizer differ in vocabulary size, or ``max_rows`` is below 1.
    """

    def __init__(self, net: GPT, tokenizer: Tokenizer, *, max_rows: int = 128, max_bytes: int | None = None) -> None:
        if tokenizer.vocab_size != net.config.vocab_size:
            raise UserError(
                f"the model has {net.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; it must be at least 1")
        self.config = net.config
        self.tokenizer = tokenizer
        self.runner = Runner(net, tokenizer, max_rows)
        self.budget = MemoryBudget(self.runner.layout, self.runner.device, max_bytes)
        self.prefixes = PrefixCache(self.runner.pool)
        self.scheduler = Scheduler(self.runner, max_rows, self.budget, self.prefixes)
        self._requests: dict[int, list[Sequence]] = {}
        self._places: dict[Sequence, tuple[int, int]] = {}
        self._next_id = 0

    @property
    def context_limit(self) -> int:
        """Maximum number of tokens of a prompt and its completion; attention windows slide within it."""
        return ROTARY_ROWS * self.config.sequence_len

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place in the batch."""
        return self.scheduler.num_waiting

    def refresh(self) -> None:
        """Takes over the network's current weights. Call it only while nothing runs."""
        assert not self._requests, "the weights may not change under a running request; cancel or finish it first"
        self.runner.refresh()
        self.prefixes.clear()

    def release_memory(self) -> None:
        """Frees the memory of keys and values until the next request; cached prefixes are lost."""
        assert not self._requests, "a request is running; cancel or finish it first"
        self.prefixes.clear()
        self.runner.pool.release()
        self.runner.prompts.release()

    # -----------------------------------------------------------------------------------------------------------------
    # Requests, step by step

    def add_request(self, prompt: Seq[int], params: SamplingParams | None = None) -> int:
        """Queues a prompt. It enters the batch in a later `step`, once there is room.

        Args:
            prompt: token ids, at least one.
            params: sampling parameters; default `SamplingParams()`.

        Returns:
            The id of the request, for `TokenEvent.request` and `cancel`.

        Raises:
            UserError: the prompt is empty, has ids outside the vocabulary, or does not fit with ``max_new_tokens`` into
                the model's context or the memory for keys and values.
        """
        params = params or SamplingParams()
        ids = self._checked("the prompt", prompt, params.max_new_tokens)
        sequences = [Sequence(ids, params, sample, self.tokenizer) for sample in range(params.num_samples)]
        self.scheduler.add(sequences)
        return self._register(sequences)

    def step(self) -> list[TokenEvent]:
        """Admits requests, reads prompts and decodes every running sequence by one token, on a GPU by a few.

        Returns:
            The new tokens, in the order they follow each other in every sequence. Empty if there is no request.

        Raises:
            UserError: the model's logits are not finite. All requests are cancelled.
        """
        self.scheduler.prepare()
        if not self.scheduler.running:
            return []
        sequences, decoded = self.scheduler.decode()
        if (decoded.tokens == -1).any():
            for request in list(self._requests):
                self.cancel(request)
            raise UserError(NOT_FINITE)
        events: list[TokenEvent] = []
        columns = (values.T.tolist() for values in decoded)
        for sequence, *column in zip(sequences, *columns, strict=True):
            for token, is_forced, logprob in zip(*column, strict=True):
                if token >= 0 and not sequence.done:
                    events.append(self._append(sequence, token, is_forced, logprob))
        self.scheduler.free_done()
        for sequence in sequences:
            if sequence.done:
                self._forget(sequence)
        return events

    def is_open(self, request: int) -> bool:
        """Whether the request has samples that have not ended."""
        return request in self._requests

    def cancel(self, request: int, sample: int | None = None) -> None:
        """Ends a request, or one of its samples, now and frees its place. What has ended before is ignored."""
        sequences = [
            sequence
            for number, sequence in enumerate(self._requests.get(request, ()))
            if sequence in self._places and sample in (None, number)
        ]
        self.scheduler.remove(sequences)
        for sequence in sequences:
            self._forget(sequence)

    # -----------------------------------------------------------------------------------------------------------------
    # Whole requests

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Completes prompts.

        Args:
            prompts: token ids, each prompt non-empty. Equal prompts are read once.
            params: sampling parameters, for all prompts or one per prompt; default `SamplingParams()`. Prompts of one
                seed draw equal random numbers.

        Returns:
            For each prompt its ``num_samples`` completions.

        Raises:
            UserError: as in `add_request`, or the model's logits are not finite.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for all, or one per prompt"
            )
        checked = [
            self._checked(f"prompt {index}", prompt, each.max_new_tokens)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        by_prompt = [
            [Sequence(prompt, each, sample, self.tokenizer) for sample in range(each.num_samples)]
            for prompt, each in zip(checked, params, strict=True)
        ]
        sharing: dict[tuple[int, ...], list[Sequence]] = {}
        for sequence in (sequence for sequences in by_prompt for sequence in sequences):
            sharing.setdefault(sequence.prompt, []).append(sequence)
        for sequences in sharing.values():
            self.scheduler.add(sequences)
        requests = [self._register(sequences) for sequences in by_prompt]
        try:
            while any(request in self._requests for request in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return [[sequence.completion for sequence in sequences] for sequences in by_prompt]

    def stream(self, prompt: Seq[int], params: SamplingParams | None = None) -> Iterator[StreamedToken]:
        """The first completion that `generate` returns for the prompt, token by token, its stop token included.

        Arguments and errors as in `generate`; errors are raised by the call, not by the iterator. Closing the iterator
        cancels the request.
        """
        params = params or SamplingParams()
        sequence = Sequence(self._checked("the prompt", prompt, params.max_new_tokens), params, 0, self.tokenizer)
        return self._stream(sequence)

    def _stream(self, sequence: Sequence) -> Iterator[StreamedToken]:
        self.scheduler.add([sequence])
        request = self._register([sequence])
        stream, completion, read = TokenStream(self.tokenizer), sequence.completion, 0
        try:
            while read < len(completion.ids) or not sequence.done:
                if read == len(completion.ids):
                    self.step()
                while read < len(completion.ids):
                    last = sequence.done and read == len(completion.ids) - 1
                    yield stream.next(completion.ids[read], forced=completion.mask[read] == 0, last=last)
                    read += 1
        finally:
            self.cancel(request)

    def next_logits(self, prompts: Seq[Seq[int]]) -> Tensor:
        """Logits of the token after each prompt, before temperature and top-k.

        Returns:
            (prompts, vocab_size) fp32.

        Raises:
            UserError: a prompt is empty, has ids outside the vocabulary or exceeds the context limit.
        """
        checked = [self._checked(f"prompt {index}", prompt, 1) for index, prompt in enumerate(prompts)]
        batches: list[list[tuple[int, ...]]] = []
        tokens = PREFILL_TOKENS
        for prompt in checked:
            if tokens + len(prompt) > PREFILL_TOKENS:
                batches.append([])
                tokens = 0
            batches[-1].append(prompt)
            tokens += len(prompt)
        return torch.cat([self.runner.next_logits(batch) for batch in batches])

    def score(self, ids: Seq[int], top: int = 0) -> TokenScores:
        """Log-probabilities of the tokens of a text, each given the tokens before it; see `TokenScores`.

        Args:
            ids: token ids, at least one.
            top: number of most likely tokens to list at each place.

        Raises:
            UserError: as in `add_request`, or the model's logits are not finite.
        """
        logprobs, top_logprobs, top_ids = self.runner.score(self._checked("the text", ids, 0), top)
        if not logprobs.isfinite().all():
            raise UserError(NOT_FINITE)
        return TokenScores(
            logprobs.tolist(),
            [list(zip(*each, strict=True)) for each in zip(top_ids.tolist(), top_logprobs.tolist(), strict=True)],
        )

    # -----------------------------------------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, token: int, forced: bool, logprob: float) -> TokenEvent:
        """Takes a token of a running sequence."""
        forced_next = sequence.append(token, forced, logprob)
        if forced_next is not None and not sequence.done:
            self.scheduler.resume(sequence, forced_next)
        request, sample = self._places[sequence]
        reason: FinishReason | None = None
        if sequence.done:
            reason = "stop" if sequence.completion.finished else "length"
        shown = logprob if sequence.params.logprobs and not forced else None
        return TokenEvent(request, sample, token, forced, shown, reason)

    def _register(self, sequences: list[Sequence]) -> int:
        request = self._next_id
        self._next_id += 1
        self._requests[request] = sequences
        self._places.update((sequence, (request, sample)) for sample, sequence in enumerate(sequences))
        return request

    def _forget(self, sequence: Sequence) -> None:
        """A sequence has ended; with the last one its request ends."""
        request, _ = self._places.pop(sequence)
        if not any(other in self._places for other in self._requests[request]):
            del self._requests[request]

    def _checked(self, name: str, prompt: Seq[int], max_new_tokens: int) -> tuple[int, ...]:
        vocab_size, limit = self.config.vocab_size, self.context_limit
        ids = tuple(map(int, prompt))
        if not ids:
            raise UserError(f"{name} is empty; begin it with <|bos|>")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise UserError(
                f"{name} holds ids {min(ids)} to {max(ids)}, the model knows 0 to {vocab_size - 1}; "
                "encode it with the model's tokenizer"
            )
        if len(ids) + max_new_tokens > limit:
            raise UserError(
                f"{name} has {len(ids)} tokens, which with max_new_tokens {max_new_tokens} passes the "
                f"model's limit of {limit}; shorten one of them"
            )
        self.budget.check(len(ids) + max_new_tokens)
        return ids
