"""The engine: completions of many prompts, decoded together over a KV cache, with a calculator."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from lmchat.generation.runner import Runner
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.scheduler import Scheduler
from lmchat.generation.sequence import Completion, Sequence, StreamedToken, TokenStream
from lmchat.model.gpt import GPT, ROTARY_ROWS
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError


class Engine:
    """Generates with a network and its tokenizer.

    The engine has inference weights of its own; the network it is made of is only read, and its mode, parameters and
    gradients stay as they are. After the network has been trained on, `refresh` takes over its weights.

    Args:
        net: the network.
        tokenizer: the tokenizer it was trained with.
        max_rows: maximum number of sequences decoded together, which bounds the memory of the KV cache.

    Raises:
        UserError: network and tokenizer differ in vocabulary size, or ``max_rows`` is below 1.
    """

    def __init__(self, net: GPT, tokenizer: Tokenizer, *, max_rows: int = 128) -> None:
        if tokenizer.vocab_size != net.config.vocab_size:
            raise UserError(
                f"the model has {net.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; it must be at least 1")
        self.config = net.config
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.runner = Runner(net)

    @property
    def context_limit(self) -> int:
        """Maximum number of tokens of a prompt and its completion; attention windows slide within it."""
        return ROTARY_ROWS * self.config.sequence_len

    def refresh(self) -> None:
        """Takes over the network's current weights."""
        self.runner.refresh()

    def generate(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Completes prompts.

        A completion depends on its prompt, its sampling parameters and its number among the samples, not on the rest
        of the batch (up to the last bits of matrix products, whose order of summation may change with the number of
        rows).

        Args:
            prompts: token ids, each prompt non-empty.
            params: sampling parameters, for all prompts or one per prompt; default `SamplingParams()`. Prompts of one
                seed draw equal random numbers.

        Returns:
            For each prompt its ``num_samples`` completions.

        Raises:
            UserError: a prompt is empty, has ids outside the vocabulary or leaves no room for ``max_new_tokens``, or
                the model's logits are not finite.
        """
        by_prompt = self._sequences(prompts, params)
        for _ in self._decode([sequence for sequences in by_prompt for sequence in sequences]):
            pass
        return [[sequence.completion for sequence in sequences] for sequences in by_prompt]

    def stream(self, prompt: Seq[int], params: SamplingParams | None = None) -> Iterator[StreamedToken]:
        """The first completion that `generate` returns for the prompt, token by token, its stop token included.

        Arguments and errors as in `generate`; errors are raised by the call, not by the iterator.
        """
        sequence = self._sequences([prompt], params)[0][0]
        return self._stream(sequence)

    def next_logits(self, prompts: Seq[Seq[int]]) -> Tensor:
        """Logits of the token after each prompt, before temperature and top-k.

        Returns:
            (prompts, vocab_size) fp32.

        Raises:
            UserError: a prompt is empty, has ids outside the vocabulary or exceeds the context limit.
        """
        checked = [self._checked(index, prompt, 1) for index, prompt in enumerate(prompts)]
        batches = [checked[start : start + self.max_rows] for start in range(0, len(checked), self.max_rows)]
        return torch.cat([self.runner.prefill(batch)[1] for batch in batches])

    def _stream(self, sequence: Sequence) -> Iterator[StreamedToken]:
        stream = TokenStream(self.tokenizer)
        completion = sequence.completion
        for _ in self._decode([sequence]):
            yield stream.next(completion.ids[-1], forced=completion.mask[-1] == 0, last=sequence.done)

    def _sequences(
        self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams] | None
    ) -> list[list[Sequence]]:
        """The samples of each prompt."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts; give one for all, or one per prompt"
            )
        checked = [
            self._checked(index, prompt, each.max_new_tokens)
            for index, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        ]
        return [
            [Sequence(prompt, each, sample, self.tokenizer) for sample in range(each.num_samples)]
            for prompt, each in zip(checked, params, strict=True)
        ]

    def _checked(self, index: int, prompt: Seq[int], max_new_tokens: int) -> tuple[int, ...]:
        vocab_size, limit = self.config.vocab_size, self.context_limit
        ids = tuple(map(int, prompt))
        if not ids:
            raise UserError(f"prompt {index} is empty; begin it with <|bos|>")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise UserError(
                f"prompt {index} holds ids {min(ids)} to {max(ids)}, the model knows 0 to {vocab_size - 1}; "
                "encode it with the model's tokenizer"
            )
        if len(ids) + max_new_tokens > limit:
            raise UserError(
                f"prompt {index} has {len(ids)} tokens, which with max_new_tokens {max_new_tokens} passes the "
                f"model's limit of {limit}; shorten one of them"
            )
        return ids

    def _decode(self, sequences: Seq[Sequence]) -> Iterator[None]:
        """Completes sequences, pausing after each new token of every running sequence."""
        scheduler, runner = Scheduler(sequences, self.max_rows), self.runner
        while scheduler.admit():
            cache, logits = runner.start(scheduler.running)
            while True:
                ids, logprobs = runner.sample(logits, scheduler.running)
                for sequence, token, logprob in zip(scheduler.running, ids, logprobs, strict=True):
                    sequence.append(token, logprob)
                yield
                if finished := scheduler.finished():
                    scheduler.reorder(runner.drop(cache, finished))
                if not scheduler.running:
                    break
                logits = runner.decode(cache, scheduler.running)
