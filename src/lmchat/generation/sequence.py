"""Sequences being generated, their completions and calculator calls."""

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
    """Completion of a prompt.

    Attributes:
        ids: token ids, including the stop token if one was sampled.
        mask: for each token 1 if it was sampled, 0 if it was forced (calculator output).
        finished: whether it ended with a stop token; otherwise it was cut at ``max_new_tokens``.
        logprobs: log-probability of each token before temperature and top-k; 0 for forced tokens. Empty if not
            requested.
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
        text: text added by the token; empty for special tokens and incomplete characters.
        role: text, calculator call or calculator output, the latter two including their special tokens.
    """

    id: int
    text: str
    role: Role


class Sequence:
    """One sample of a prompt while it is generated.

    Attributes:
        prompt: token ids.
        sample: index among the prompt's samples.
        request: id of its request, assigned by the engine.
        shared: the prompt that it shares with other sequences, if any.
        uniforms: (max_new_tokens,) float64 random numbers, one per token.
        completion: what has been generated so far.
        prefilled: tokens of the prompt that are in the KV pool. All but the last are read before decoding starts.
        inherited: number of tokens in its slot before it was assigned, some of which are reused.
    """

    def __init__(self, prompt: tuple[int, ...], params: SamplingParams, sample: int, tokenizer: Tokenizer) -> None:
        self.prompt = prompt
        self.params = params
        self.sample = sample
        self.tokenizer = tokenizer
        self.request = -1
        self.shared: SharedPrompt | None = None
        self.uniforms = sample_uniforms(params.seed, sample, params.max_new_tokens)
        usual_stops = (tokenizer.special("assistant_end"), tokenizer.bos_id)
        self.stop_tokens = frozenset(usual_stops if params.stop_tokens is None else params.stop_tokens)
        self._call_start, self._call_end = tokenizer.special("python_start"), tokenizer.special("python_end")
        self.completion = Completion()
        self.prefilled = 0
        self.inherited = 0

    @property
    def done(self) -> bool:
        """Whether it has stopped or reached ``max_new_tokens``."""
        return self.completion.finished or len(self.completion.ids) >= self.params.max_new_tokens

    @property
    def base(self) -> int:
        """Position of the first token in its slot; the tokens before it are in the slot of the shared prompt."""
        return len(self.prompt) - 1 if self.shared else 0

    @property
    def is_prefilled(self) -> bool:
        """Whether decoding can start."""
        return self.prefilled >= len(self.prompt) - 1

    @property
    def position(self) -> int:
        """Position of the next token to read, which is the number of tokens in the KV pool."""
        return len(self.prompt) - 1 + len(self.completion.ids) if self.is_prefilled else self.prefilled

    @property
    def num_own(self) -> int:
        """Number of tokens in its own slot."""
        return self.position - self.base

    @property
    def written(self) -> int:
        """Number of tokens ever written to its slot, also before; see `lmchat.generation.prefix_cache.Held`."""
        return max(self.inherited, self.num_own)

    @property
    def slot_tokens(self) -> int:
        """Number of tokens that its slot must have room for."""
        return len(self.prompt) + self.params.max_new_tokens - self.base

    def append(self, token: int, forced: bool, logprob: float) -> list[int] | None:
        """Appends a sampled or forced token. Returns the tokens to force next if it ends a calculator call."""
        completion = self.completion
        completion.ids.append(token)
        completion.mask.append(0 if forced else 1)
        if self.params.logprobs:
            completion.logprobs.append(0.0 if forced else logprob)
        completion.finished = not forced and token in self.stop_tokens
        return self._answer() if token == self._call_end and self.params.calculator and not forced else None

    def _answer(self) -> list[int] | None:
        """The calculator's output, if any, for the call that the last token ends; None if there is no call.

        The call is what follows the last ``<|python_start|>``, the output comes in ``<|output_start|>`` and
        ``<|output_end|>``.
        """
        ids, tokenizer = self.completion.ids[:-1], self.tokenizer
        marks = [place for place, token in enumerate(ids) if token in (self._call_start, self._call_end)]
        if not marks or ids[marks[-1]] == self._call_end:
            return None
        result = calculate(tokenizer.decode(ids[marks[-1] + 1 :]))
        output = [] if result is None else tokenizer.encode(result)
        return output and [tokenizer.special("output_start"), *output, tokenizer.special("output_end")]


class SharedPrompt:
    """A prompt of several sequences, which is prefilled once.

    Attributes:
        prompt: token ids.
        waiting: sequences that are not running yet.
        prefilled: number of prompt tokens in its slot; finally all but the last.
    """

    def __init__(self, prompt: tuple[int, ...], sequences: list[Sequence]) -> None:
        self.prompt = prompt
        self.waiting = deque(sequences)
        self.prefilled = 0
        for sequence in sequences:
            sequence.shared = self

    @property
    def is_prefilled(self) -> bool:
        """Whether its sequences can start."""
        return self.prefilled >= len(self.prompt) - 1


class TextDecoder:
    """Decodes UTF-8 in pieces that may end in the middle of a character; invalid bytes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def next(self, data: bytes, last: bool = False) -> tuple[str, int]:
        """The text that a piece adds, and the number of characters before the one that has its first byte.

        ``last`` ends an incomplete character.
        """
        text = self._decoder.decode(data[:1], final=last and len(data) <= 1)
        is_complete = data and not self._decoder.getstate()[0]
        offset = self._length + len(text) - (1 if is_complete else 0)
        text += self._decoder.decode(data[1:], final=last)
        self._length += len(text)
        return text, offset


class TokenStream:
    """Converts the tokens of a sequence to text and roles, one by one."""

    offset = 0
    """Number of characters before the one that the last token starts or continues."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start, self._end = tokenizer.special("python_start"), tokenizer.special("python_end")
        self._decoder = TextDecoder()
        self._in_call = False

    def next(self, token: int, forced: bool, last: bool) -> StreamedToken:
        """Converts the next token; ``last`` ends the sequence and flushes an incomplete character."""
        self._in_call = token == self._start or (self._in_call and token != self._end)
        role: Role = "python_output" if forced else "python" if self._in_call or token == self._end else "text"
        is_special = bool(self._tokenizer.token_bytes[token] == 0)
        data = b"" if is_special else self._tokenizer.decode_bytes([token])
        text, self.offset = self._decoder.next(data, last=is_special or last)
        return StreamedToken(token, text, role)
