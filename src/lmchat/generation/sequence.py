"""A sequence being generated, the completion it becomes, and the calculator calls within it."""

from __future__ import annotations

import codecs
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from lmchat.generation.calculator import calculate
from lmchat.generation.sampling import SamplingParams, sample_uniforms
from lmchat.tokenizer.bpe import Tokenizer

Role = Literal["text", "python", "python_output"]


@dataclass
class Completion:
    """What was generated after a prompt.

    Attributes:
        ids: token ids, the stop token included where one was sampled.
        mask: per token 1 if the model sampled it, 0 if it was forced (the calculator's output).
        finished: a stop token ended it and is its last id; otherwise it was cut at ``max_new_tokens``.
        logprobs: log-probability of each token under the model's full distribution, before temperature and top-k, as
            a training pass computes it; 0 where forced. Empty unless asked for.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finished: bool = False
    logprobs: list[float] = field(default_factory=list)

    @property
    def content(self) -> list[int]:
        """The tokens without the stop token."""
        return self.ids[:-1] if self.finished else self.ids


@dataclass(frozen=True)
class StreamedToken:
    """One token of a stream.

    Attributes:
        id: token id.
        text: what the token adds to the text; empty for special tokens and within a character of several tokens.
        role: text, calculator call or calculator output; the special tokens around the latter two belong to them.
    """

    id: int
    text: str
    role: Role


class ToolUse:
    """Follows the calculator calls of one sequence and queues the tokens to force.

    After ``<|python_start|>`` it collects an expression. At ``<|python_end|>`` the calculator evaluates it, and
    ``<|output_start|>``, the result and ``<|output_end|>`` replace the next sampled tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = tokenizer.special("python_start")
        self.end = tokenizer.special("python_end")
        self.call: list[int] | None = None
        self.forced: deque[int] = deque()

    def next_forced(self) -> int | None:
        """Removes and returns the token that replaces the sampled one, if any."""
        return self.forced.popleft() if self.forced else None

    def observe(self, token: int) -> None:
        """Takes a sampled token. A start within a call restarts the call; a call without a value gets no output."""
        if token == self.start:
            self.call = []
        elif self.call is not None and token == self.end:
            self._answer(self.call)
            self.call = None
        elif self.call is not None:
            self.call.append(token)

    def _answer(self, call: list[int]) -> None:
        result = calculate(self.tokenizer.decode(call))
        if result is not None:
            special, encode = self.tokenizer.special, self.tokenizer.encode
            self.forced.extend((special("output_start"), *encode(result), special("output_end")))


class Sequence:
    """One sample of a prompt while it is generated.

    Args:
        prompt: token ids.
        params: sampling parameters of the prompt.
        sample: its number among the prompt's samples.
        tokenizer: tokenizer of the model.

    Attributes:
        uniforms: (max_new_tokens,) float64 random numbers, one per token.
        completion: what has been generated so far.
    """

    def __init__(self, prompt: tuple[int, ...], params: SamplingParams, sample: int, tokenizer: Tokenizer) -> None:
        self.prompt = prompt
        self.params = params
        self.uniforms = sample_uniforms(params.seed, sample, params.max_new_tokens)
        stop_tokens = params.stop_tokens
        if stop_tokens is None:
            stop_tokens = (tokenizer.special("assistant_end"), tokenizer.bos_id)
        self.stop_tokens = frozenset(stop_tokens)
        self.tool = ToolUse(tokenizer) if params.calculator else None
        self.completion = Completion()

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        return float(self.uniforms[len(self.completion.ids)])

    @property
    def done(self) -> bool:
        """Whether it has stopped or has all its tokens."""
        return self.completion.finished or len(self.completion.ids) == self.params.max_new_tokens

    def append(self, sampled: int, logprob: float | None) -> None:
        """Appends the sampled token, or the token that is forced in its place."""
        completion = self.completion
        forced = self.tool.next_forced() if self.tool else None
        completion.ids.append(sampled if forced is None else forced)
        completion.mask.append(1 if forced is None else 0)
        if forced is None:
            completion.finished = sampled in self.stop_tokens
            if self.tool:
                self.tool.observe(sampled)
        if logprob is not None:
            completion.logprobs.append(logprob if forced is None else 0.0)


class TokenStream:
    """Turns the tokens of one sequence into text and roles, one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start, self._end = tokenizer.special("python_start"), tokenizer.special("python_end")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._in_call = False

    def next(self, token: int, forced: bool, last: bool) -> StreamedToken:
        """Takes the next token; ``last`` ends the sequence, and with it a character that is still incomplete."""
        self._in_call = token == self._start or (self._in_call and token != self._end)
        role: Role = "python_output" if forced else "python" if self._in_call or token == self._end else "text"
        is_special = bool(self._tokenizer.token_bytes[token] == 0)
        data = b"" if is_special else self._tokenizer.decode_bytes([token])
        return StreamedToken(token, self._decoder.decode(data, final=is_special or last), role)
